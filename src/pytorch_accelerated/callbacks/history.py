"""Recording more of a run, and keeping it in a file as the run goes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data
from pytorch_accelerated.distributed import sum_over_processes
from pytorch_accelerated.errors import warn
from pytorch_accelerated.tracking import (
    InMemoryRunHistory,
    count_values,
    write_records,
)

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class Recorder(TrainerCallback):
    """Records learning rates, gradient norms and times, and keeps what is recorded.

    Each epoch has ``learning_rate``, that of its last update (of further parameter
    groups ``learning_rate_1`` and so on); the mean of the gradient norms as
    ``train_gradient_norm_epoch``, in runs that know them; ``samples_per_second``, of
    training, so far in the epoch; ``train_seconds_epoch``, and with the evaluation
    ``seconds_epoch``, since the process started or took up the epoch.

    With ``every_n_updates`` the learning rate, the samples per second, and the means
    since the last time, as ``train_loss``, ``train_gradient_norm`` and so on, are
    recorded after every n updates of the run and at the end of each epoch. That waits
    for the device once.

    With ``train(gradient_clip_norm=math.inf)`` norms are measured and nothing is
    clipped. If a trainer has several such callbacks, one of them records for all,
    whenever it is time to for any. Subclass it, and override :meth:`keep`, to keep the
    run history elsewhere while a run goes.

    Args:
        every_n_updates: Updates between two records of the loss, at least 1.
    """

    may_stop_alone = False
    # A state that is saved in these events is to have what is recorded in them.
    called_first: tuple[str, ...] = ("on_train_update_end", "on_training_run_epoch_end")
    called_last: tuple[str, ...] = ("on_training_run_end", "on_evaluation_run_end")

    every_n_updates: int | None = None
    # The sums of the epoch, and the updates of the run, up to the last record.
    _sums: Mapping[str, Any] = MappingProxyType({})
    _num_recorded: int = 0

    def __init__(self, every_n_updates: int | None = None) -> None:
        if every_n_updates is not None and every_n_updates < 1:
            raise ValueError(
                f"every_n_updates must be at least 1, got {every_n_updates}. To record "
                "at the end of epochs only, leave it out."
            )
        self.every_n_updates = every_n_updates

    def keep(self, trainer: Trainer) -> None:
        """Called on all processes whenever something may have been recorded."""

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        self._num_recorded = 0

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Keep what others have recorded since, and start the sums of the epoch."""
        self.keep(trainer)
        if not trainer._run.progress.is_amid_epoch:
            self._sums = {}

    @event_with_data
    def on_train_update_end(
        self, trainer: Trainer, *, num_updates: int = 0, **kwargs: Any
    ) -> None:
        """Add the gradient norm, and record the means if it is time to."""
        run, recorders = trainer._run, self._recorders(trainer)
        due = [each for each in recorders if each._is_due(num_updates)]
        if self is recorders[0]:
            if run.gradient_norm is not None:
                run.means.add_scalars({"gradient_norm": run.gradient_norm}, 1)
            if due:
                self._record(trainer)
        if self in due:
            self.keep(trainer)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record what has not been recorded yet, and the time."""
        if self is self._recorders(trainer)[0]:
            self._record(trainer)
            seconds = trainer._run.pace.seconds
            trainer.run_history.update_metric("train_seconds_epoch", seconds)
        self.keep(trainer)

    @event_with_data
    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Keep what has been recorded."""
        self.keep(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record the time of the whole epoch."""
        if self is self._recorders(trainer)[0]:
            seconds = trainer._run.pace.elapsed
            trainer.run_history.update_metric("seconds_epoch", seconds)
        self.keep(trainer)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Keep what has been recorded since."""
        self.keep(trainer)

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Keep what has been recorded since."""
        self.keep(trainer)

    def _recorders(self, trainer: Trainer) -> list[Recorder]:
        """Return those of the trainer; the first one records for all."""
        found = [c for c in trainer.callback_handler if isinstance(c, Recorder)]
        if self not in found:  # another callback has it
            return [self]
        return sorted(found, key=lambda each: each.every_n_updates is None)

    def _is_due(self, num_updates: int) -> bool:
        every = self.every_n_updates
        return every is not None and num_updates % every == 0

    def _record(self, trainer: Trainer) -> None:
        """Record what has come since the last time, if anything has. Collective."""
        run, history = trainer._run, trainer.run_history
        if run.progress.num_updates == self._num_recorded:
            return
        self._num_recorded = run.progress.num_updates
        if self.every_n_updates is not None:
            before, sums = self._sums, sum_over_processes(run.means.totals())
            for name, (total, count) in sums.items():
                total_before, count_before = before.get(name, (0.0, 0.0))
                if count > count_before:
                    mean = (total - total_before) / (count - count_before)
                    history.update_metric(f"train_{name}", mean)
            self._sums = sums
        for group, rate in enumerate(trainer.last_lr or ()):
            name = f"learning_rate_{group}" if group else "learning_rate"
            history.update_metric(name, rate)
        if run.samples_per_second > 0:
            history.update_metric("samples_per_second", run.samples_per_second)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next record goes on from."""
        return {"sums": self._sums, "num_recorded": self._num_recorded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._sums = state.get("sums", {})
        self._num_recorded = state.get("num_recorded", 0)


class RecordHistoryCallback(Recorder):
    """Records learning rates, gradient norms and times, and writes all to a file.

    What it records, once an epoch and with ``every_n_updates`` more often, is what a
    :class:`~pytorch_accelerated.callbacks.Recorder` does.

    With ``path``, everything in the run history is written there, by one process and as
    soon as a callback that is listed last hears of it: a crash loses nothing of it. A
    resumed run first writes what the run had recorded up to its place; one that starts
    afresh replaces the file. If writing fails, a warning says so, the run goes on, and
    the next time everything is written again. A trainer that only evaluates writes
    nothing.

    Args:
        path: The file: CSV if its name ends in ``.csv``, JSON lines if in ``.jsonl``,
            to be read with
            :meth:`~pytorch_accelerated.tracking.InMemoryRunHistory.load_jsonl`.
        every_n_updates: Updates between two records of the loss, at least 1.
    """

    path: Path | None = None
    _num_written: Mapping[str, int] | None = None

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        every_n_updates: int | None = None,
    ) -> None:
        super().__init__(every_n_updates)
        # Absolute, since a script may change its directory.
        self.path = None if path is None else Path(path).expanduser().absolute()
        if self.path is not None and self.path.suffix not in (".csv", ".jsonl"):
            raise ValueError(
                f"path must end in .jsonl (JSON lines) or .csv, got {str(path)!r}."
            )

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        super()._forget_earlier_runs(trainer)
        self._num_written = None

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that the history can be written.

        Raises:
            TypeError: If the run history cannot be written to a file.
        """
        history = trainer.run_history
        if self.path is not None and not isinstance(history, InMemoryRunHistory):
            raise TypeError(
                "RecordHistoryCallback(path=...) writes an InMemoryRunHistory, and the "
                f"trainer has a {type(history).__name__}. Leave path out, or subclass "
                "InMemoryRunHistory."
            )

    def keep(self, trainer: Trainer) -> None:
        """Write what is new, or everything if the file is not ours yet."""
        if self.path is None or not trainer._accelerator.is_main_process:
            return
        history: Any = trainer.run_history
        counts, known = count_values(history), (self._num_written or {}).items()
        if any(counts.get(name, 0) < number for name, number in known):
            self._num_written = None  # some are deleted: all others are written again
        is_of_training = trainer._run.training.is_training
        new = history.records(skip=self._num_written) if is_of_training else ()
        try:
            if new:
                write_records(new, self.path, append=self._num_written is not None)
                self._num_written = counts
        except OSError as error:
            self._num_written = None
            warn(f"The run history could not be written to {self.path}: {error}")
