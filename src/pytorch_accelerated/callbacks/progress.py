"""Callbacks that show how far a run has come."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data
from pytorch_accelerated.data import length_of

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_SECONDS_BETWEEN_READS = 1.0
_SECONDS_BETWEEN_LOG_LINES = 30.0


class ProgressBarCallback(TrainerCallback):
    """Shows a bar for each epoch, with the running loss, on each machine once.

    Bars fit terminals and notebooks; where the output goes to a file they are written
    every 30 seconds and at the end. The loss is that of this process. It is read
    from the device once a second, when the bar is refreshed, and not at each step.

    Attributes:
        pbar: The bar of the training epoch under way, else None.
        eval_pbar: The bar of the evaluation under way, else None.
    """

    may_stop_alone = False

    pbar: Any = None
    eval_pbar: Any = None
    _next_read: float = 0.0

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Open the bar of a training epoch."""
        self._close()
        self.pbar = _open_bar(trainer, length_of(trainer._train_dataloader))
        self._read_later()

    @event_with_data
    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any
    ) -> None:
        """Move the bar to the number of steps done."""
        if self.pbar is not None and not self.pbar.disable:
            step = kwargs.get("step", self.pbar.n)
            self._advance(self.pbar, step + 1 - self.pbar.n, trainer)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bar of the training epoch."""
        self._close()

    @event_with_data
    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Open the bar of an evaluation, below that of a training epoch under way."""
        self._close_eval_bar()
        length, limit = length_of(trainer._eval_dataloader), trainer.eval_batch_limit
        if length is not None and limit is not None:
            length = min(length, limit)
        self.eval_pbar = _open_bar(
            trainer, length, is_passing=kwargs.get("is_intermediate", False)
        )
        self._read_later()

    @event_with_data
    def on_eval_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any
    ) -> None:
        """Move the bar on by one step."""
        if self.eval_pbar is not None and not self.eval_pbar.disable:
            self._advance(self.eval_pbar, 1, trainer)

    @event_with_data
    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bar of the evaluation."""
        self._close_eval_bar()

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bars."""
        self._close()

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bar of the evaluation, which may be amid a training epoch."""
        self._close_eval_bar()

    @event_with_data
    def on_exception(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bars."""
        self._close()

    def _advance(self, bar: Any, num_steps: int, trainer: Trainer) -> None:
        if time.monotonic() >= self._next_read:
            self._read_later()
            loss = trainer._loss_tracker.average
            bar.set_postfix_str(f"loss={loss:.4g}", refresh=False)
        bar.update(num_steps)

    def _read_later(self) -> None:
        self._next_read = time.monotonic() + _SECONDS_BETWEEN_READS

    def _close(self) -> None:
        self._close_eval_bar()
        if self.pbar is not None:
            self.pbar.close()
            self.pbar = None

    def _close_eval_bar(self) -> None:
        if self.eval_pbar is not None:
            self.eval_pbar.close()
            self.eval_pbar = None


def _open_bar(trainer: Trainer, total: int | None, *, is_passing: bool = False) -> Any:
    """Create a bar; one that is passing disappears once it is full."""
    is_live = _is_live()
    seconds = _SECONDS_BETWEEN_READS / 2 if is_live else _SECONDS_BETWEEN_LOG_LINES
    is_shown = trainer._accelerator.is_local_main_process
    bar: Any = tqdm(
        total=total,
        disable=not is_shown or (is_passing and not is_live),
        leave=not is_passing,
        mininterval=seconds,
        maxinterval=max(seconds, 10.0),
        miniters=1,  # else a thread of tqdm, by the wall clock, sees to it
    )
    # When the wall clock, which tqdm reads, is set back by an hour, a bar would stand
    # still for an hour and then show a negative time.
    bar._time = time.monotonic
    bar.start_t = bar.last_print_t = time.monotonic()
    return bar


def _is_live() -> bool:
    """Say whether a bar that is drawn anew replaces the old one, as in a terminal."""
    is_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    return is_notebook or sys.stderr.isatty()


class PrintProgressCallback(TrainerCallback):
    """Prints when runs and epochs start and end."""

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print that training starts."""
        trainer.print("\nStarting training run")

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print the number of the epoch."""
        trainer.print(f"\nStarting epoch {trainer.run_history.current_epoch}")

    @event_with_data
    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print that an evaluation starts, unless it is amid an epoch."""
        if not kwargs.get("is_intermediate", False):
            trainer.print("\nStarting eval epoch")

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print that training ends."""
        trainer.print("Finishing training run")

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print that the evaluation starts."""
        trainer.print("\nStarting evaluation run")

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print that the evaluation ends."""
        trainer.print("Finishing evaluation run")
