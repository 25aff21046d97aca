"""Who is told what, and how a run may end: errors that all processes agree on.

With several processes an error of what a user has written waits until all of them can
act on it together: a process that left alone would leave the others waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pytorch_accelerated import distributed
from pytorch_accelerated.diagnosis import explain
from pytorch_accelerated.errors import (
    StopTrainingError,
    TrainingInterruptedError,
)

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


def tell(trainer: Trainer, event: str, **kwargs: Any) -> None:
    """Call the callbacks for an event."""
    handler = trainer.callback_handler
    if handler.listeners(event):
        call(trainer, handler.call_event, event, trainer, **kwargs)


def call(
    trainer: Trainer, method: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """Call what a user may have written; an error of one process alone waits."""
    try:
        method(*args, **kwargs)
    except Exception as error:
        is_alone = trainer._accelerator.num_processes == 1
        if is_alone or distributed.is_on_all_processes(error):
            raise
        run = trainer._run
        run.noted_error = run.noted_error or error


def announce(trainer: Trainer, event: str, **kwargs: Any) -> None:
    """Call the callbacks for an event; then all processes raise what has waited."""
    tell(trainer, event, **kwargs)
    agree_to_go_on(trainer)


def agree_to_go_on(trainer: Trainer) -> None:
    """Raise on all processes what has waited on any of them."""
    run = trainer._run
    error, run.noted_error = run.noted_error, None
    distributed.raise_on_all(error)


class Ending:
    """Calls the hook and the event that end a run, however the block ends.

    A :class:`StopTrainingError` goes no further, once the callbacks have heard of it,
    unless it is one that reaches the caller.

    Args:
        trainer: The trainer.
        end: The name of the hook, which the event is named after.
    """

    def __init__(self, trainer: Trainer, end: str) -> None:
        self._trainer = trainer
        self._due: list[partial[None]] = [
            partial(call, trainer, getattr(trainer, end)),
            partial(announce, trainer, f"on_{end}"),
        ]

    def __enter__(self) -> None:
        """Nothing is to be done at the start."""

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        trainer, stops = self._trainer, []
        if error is not None:
            distributed.settle(error)
        if isinstance(error, StopTrainingError):
            trainer.print(error)
            trainer._run.stopped_by = error
            trainer.interrupted = isinstance(error, TrainingInterruptedError)
            stops.append(error)
            self._due.insert(0, partial(announce, trainer, "on_stop_training_error"))
        elif error is not None:
            self._clean_up_after(error)
            return False
        try:
            while self._due:
                try:
                    self._due.pop(0)()
                except StopTrainingError as stop:  # noqa: PERF203 (each on its own)
                    trainer.print(stop)  # the run is over as it is
                    stops.append(stop)
        except BaseException as another:
            distributed.settle(another)
            self._clean_up_after(another)
            raise
        for reason in stops:
            if reason.reaches_caller:
                raise reason
        return True

    def _clean_up_after(self, error: BaseException) -> None:
        """Let callbacks close what they opened; an error of theirs hides no other."""
        trainer = self._trainer
        trainer._run.has_failed = True
        call_event = trainer.callback_handler.call_event
        clean_ups = [
            partial(self._explain, error),
            partial(call_event, "on_exception", trainer, exception=error),
        ]
        # With several processes the others may be elsewhere, and be waited for.
        if trainer._accelerator.num_processes == 1:
            clean_ups += self._due
        for clean_up in clean_ups:
            try:
                clean_up()
            except Exception as another:  # noqa: PERF203 (each one on its own)
                trainer.print(f"While cleaning up after an error: {another!r}")

    def _explain(self, error: BaseException) -> None:
        trainer, run = self._trainer, self._trainer._run
        explain(
            error,
            trainer.run_history.current_epoch,
            run.training.progress,
            run.config,
            trainer.last_checkpoint,
        )
