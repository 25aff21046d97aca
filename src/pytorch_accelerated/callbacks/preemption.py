"""Ending a run in order when the machine is about to be taken away."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data
from pytorch_accelerated.errors import TrainingInterruptedError, warn

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

# A scheduler that signals a whole job reaches a process twice: by itself, and through
# the launcher, which passes the signal on.
_SAME_REQUEST_SECONDS = 1.0
_DEFAULT = ("SIGTERM", "SIGUSR1")


class PreemptionCallback(TrainerCallback):
    """Ends a run in order, to be resumed, when a signal asks the process to stop.

    Batch systems send a signal some time before they take a machine away. The run then
    ends on all processes together, after the next update or epoch, whichever of them
    got the signal; a :class:`SaveTrainingStateCallback` saves where it stands; and
    ``train()`` returns with ``trainer.interrupted`` set. What the script does then is
    up to it::

        callbacks = [PreemptionCallback, SaveTrainingStateCallback]
        trainer = Trainer(..., callbacks=callbacks)
        trainer.train(..., resume_from="auto")
        if trainer.interrupted:
            sys.exit(143)

    While a run is in progress a signal only leaves a note. If it comes again, more than
    a second later, it is handled as it was before the run: by default that ends the
    process at once. After the run the signals are handled as before.

    Signals reach the main thread only; in a run on another thread this callback warns
    and does nothing.

    Args:
        signals: Names of the signals; those that the system does not know are left
            out.
    """

    signals: Sequence[signal.Signals] = tuple(
        getattr(signal, name) for name in _DEFAULT if hasattr(signal, name)
    )
    _replaced: Mapping[int, Any] = MappingProxyType({})
    _received: int | None = None
    _received_at: float = 0.0
    _num_updates: int | None = None

    def __init__(self, signals: Iterable[str] = _DEFAULT) -> None:
        names = (signals,) if isinstance(signals, str) else tuple(signals)
        for name in names:
            if not isinstance(name, str) or not name.startswith("SIG"):
                raise ValueError(
                    f"signals must be names of signals such as 'SIGTERM', got {name!r}."
                )
        self.signals: list[signal.Signals] = [
            getattr(signal, name) for name in names if hasattr(signal, name)
        ]

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        self._restore_handlers()
        self._received = None
        self._num_updates = trainer.num_updates

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen for the signals."""
        if threading.current_thread() is not threading.main_thread():
            warn(
                "The run is not on the main thread, which is the only one that Python "
                "lets handle signals: PreemptionCallback does nothing."
            )
            return
        replaced = self._replaced = {}
        for number in self.signals:
            replaced[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = number, now
        elif now - self._received_at > _SAME_REQUEST_SECONDS:
            signal.signal(number, self._replaced.get(number, signal.SIG_DFL))
            os.kill(os.getpid(), number)

    @event_with_data
    def on_train_step_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """End the run, if a signal came and this step has made an update.

        Raises:
            TrainingInterruptedError: To end it, on all processes.
        """
        is_update = trainer.num_updates != self._num_updates
        self._num_updates = trainer.num_updates
        if is_update:
            self._end_run_if_asked_to()

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """End the run, if a signal came.

        Raises:
            TrainingInterruptedError: To end it, on all processes.
        """
        self._end_run_if_asked_to()

    def _end_run_if_asked_to(self) -> None:
        if self._received is not None:
            raise TrainingInterruptedError(
                f"Ending the run, as {signal.Signals(self._received).name} asks"
            )

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Let the signals be handled as before."""
        # One that came too late to end the run is not lost on the script.
        if trainer.agree(self._received is not None):
            trainer.interrupted = True
        self._restore_handlers()

    @event_with_data
    def on_exception(self, trainer: Trainer, **kwargs: Any) -> None:
        """Let the signals be handled as before, if it ends the training run."""
        if trainer._run.is_training:
            self._restore_handlers()

    def _restore_handlers(self) -> None:
        replaced, self._replaced = self._replaced, {}
        for number, handler in replaced.items():
            # None: it was not set from Python, which cannot set it again either
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
