"""Callbacks that show how far a run has come."""

from __future__ import annotations

import io
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from html import escape
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data
from pytorch_accelerated.console import brief, duration, rate
from pytorch_accelerated.data.loaders import length_of

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_SECONDS_BETWEEN_READS = 1.0
_SECONDS_BETWEEN_LOG_LINES = 60.0

_BAR = "{desc} {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]"
_LINE = "{desc}, {percentage:.0f}%{postfix}"
_WITHOUT_TOTAL = "{desc}, {n:,} steps{postfix}"


class ProgressBarCallback(TrainerCallback):
    """Shows a bar for the epoch under way, with the running loss, on each machine once.

    In a terminal and in a notebook a bar gives way to the row that
    :class:`LogMetricsCallback` prints, and stays where there is none. In a file there
    are no bars: what takes longer than a minute is reported once a minute, in a plain
    line. The loss is that of this process. It is read from the device once a second,
    and not at each step.

    Attributes:
        pbar: The bar of the training epoch under way, else None.
        eval_pbar: The bar of the evaluation under way, else None.
    """

    may_stop_alone = False

    pbar: Any = None
    eval_pbar: Any = None
    _next_read: float = 0.0
    _place: NotebookPlace | None = None

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Open the bar of a training epoch."""
        self._close()
        progress, name = trainer._run.progress, f"epoch {epoch_of(trainer)}"
        self.pbar = self._open_bar(trainer, name, _num_steps(trainer), progress.step)

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
        self.eval_pbar = self._open_bar(trainer, "evaluation", length)
        if kwargs.get("is_intermediate", False):
            self.eval_pbar.leave = False

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
        """Close the bars; one that is open shows where the run was stopped."""
        self._close(stays=True)
        self._place = None

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bar of the evaluation, which may be amid a training epoch."""
        self._close_eval_bar()
        if self.pbar is None:
            self._place = None

    @event_with_data
    def on_exception(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bars of the run; that of the epoch shows where the error was."""
        self._close_eval_bar()
        if trainer._run.is_training:
            self._close(stays=True)

    def _open_bar(
        self, trainer: Trainer, name: str, total: int | None, initial: int = 0
    ) -> Any:
        """Create a bar, or what writes a line now and then where none can be drawn."""
        output: io.StringIO | None = None
        seconds, form = _SECONDS_BETWEEN_READS / 2, _BAR
        rows = [
            getattr(each, "prints_rows", False) for each in trainer.callback_handler
        ]
        if is_notebook():
            output = self._place = self._place or NotebookPlace()
        elif not is_terminal(sys.stderr):
            output, seconds, form = _Lines(trainer), _SECONDS_BETWEEN_LOG_LINES, _LINE
        bar: Any = tqdm(
            total=total,
            initial=initial,
            disable=not trainer._accelerator.is_local_main_process,
            leave=form == _BAR and not any(rows),
            mininterval=seconds,
            delay=seconds if form == _LINE else 0,
            miniters=1,  # else a thread of tqdm, by the wall clock, sees to it
            desc=name,
            bar_format=_WITHOUT_TOTAL if total is None else form,
            file=output,
            ncols=_bar_width(),
            nrows=20,
        )
        # When the wall clock, which tqdm reads, is set back by an hour, a bar would
        # stand still for an hour and then show a negative time.
        bar._time = time.monotonic
        bar.start_t = bar.last_print_t = time.monotonic()
        self._next_read = time.monotonic() + _SECONDS_BETWEEN_READS
        return bar

    def _advance(self, bar: Any, num_steps: int, trainer: Trainer) -> None:
        if time.monotonic() >= self._next_read:
            self._next_read = time.monotonic() + _SECONDS_BETWEEN_READS
            state = f"loss {brief(trainer._loss_tracker.average)}"
            if bar is self.pbar:
                state += f", {rate(trainer._run.samples_per_second)} samples/s"
            bar.set_postfix_str(state, refresh=False)
            bar.ncols = _bar_width()  # windows are resized
        bar.update(num_steps)

    def _close(self, *, stays: bool = False) -> None:
        self._close_eval_bar()
        if self.pbar is not None:
            self.pbar.leave = self.pbar.leave or stays
            self.pbar.close()
            self.pbar = None

    def _close_eval_bar(self) -> None:
        if self.eval_pbar is not None:
            self.eval_pbar.close()
            self.eval_pbar = None


class PrintProgressCallback(TrainerCallback):
    """Prints where a run of training starts and where it ends.

    What happens between, and an evaluation, is said by :class:`LogMetricsCallback`.
    """

    # After the last row, and what others say.
    called_last: tuple[str, ...] = ("on_training_run_end",)

    _start: float | None = None

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print where the run starts, which a resumed one does not at update 0."""
        self._start = time.monotonic()
        config, device = trainer.run_config, str(trainer.device)
        if config.num_processes > 1:
            device = f"{config.num_processes} processes, {device}"
        if config.mixed_precision != "no":
            device += f", {config.mixed_precision}"
        trainer.print(f"Training starts: {_standing(trainer)}, {device}", flush=True)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print where the run ends, unless an error follows that says so."""
        if not trainer.has_failed:
            text = f"Training ends: {_standing(trainer, is_over=True)}"
            if self._start is not None:
                text += f", {duration(time.monotonic() - self._start)}"
            trainer.print(text, flush=True)


def _standing(trainer: Trainer, *, is_over: bool = False) -> str:
    total, done = trainer.run_config.max_num_train_steps, trainer._run.progress
    of_total = "" if total is None else f"/{total:,}"
    epoch = epoch_of(trainer).strip()
    if is_over and epoch.isdigit() and done.is_at_epoch_start and done.epochs_done:
        epoch = str(int(epoch) - 1)  # the next one has not begun
    return f"epoch {epoch}, update {done.num_updates:,}{of_total}"


def epoch_of(trainer: Trainer) -> str:
    """Return the epoch under way, of those that there will be: " 3/10"."""
    run, epoch = trainer._run, trainer.run_history.current_epoch
    config = run.config
    if config is None or (
        run.max_num_train_steps is not None
        and config.num_update_steps_per_epoch is None
    ):
        return str(epoch)  # how many there will be is not known
    last = run.last_epoch(epoch)
    return f"{min(epoch, last):>{len(str(last))}}/{last}"


def above_bars() -> AbstractContextManager[Any]:
    """Put what is printed in a ``with`` block above the bars that are shown."""
    is_needed = getattr(tqdm, "_instances", None)
    return tqdm.external_write_mode() if is_needed else nullcontext()


def is_terminal(stream: Any) -> bool:
    """Say whether people see a stream, and it can draw a bar anew in its place."""
    is_log = os.environ.get("CI", "").lower() not in ("", "0", "false")
    is_dumb = os.environ.get("TERM") == "dumb"
    try:
        return stream.isatty() and not (is_log or is_dumb)
    except (AttributeError, ValueError):  # none, closed, or an object of the script's
        return False


def width_of(stream: Any) -> int:
    """Return the columns of a terminal; of a file, what is well read."""
    if not is_terminal(stream):
        return 120
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (AttributeError, OSError, ValueError):
        return 80


def is_notebook() -> bool:
    """Say whether this is a notebook, without importing anything."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class NotebookPlace(io.StringIO):
    """A place in the output of a notebook, where one thing is shown after another.

    A bar that draws itself here leaves no trace in the notebook that is saved.
    """

    encoding = "utf-8"
    _handle: Any = None

    def show(self, html: str) -> None:
        """Show HTML instead of what was there before."""
        from IPython.display import HTML, display

        if self._handle is None:
            self._handle = display(HTML(html), display_id=True)
        else:
            self._handle.update(HTML(html))

    def write(self, text: str) -> int:
        """Show what tqdm draws."""
        if text.startswith("\r") and len(text) > 1:
            self.show(f"<pre>{escape(text.strip())}</pre>" if text.strip() else "")
        return len(text)


class _Lines(io.StringIO):
    """Prints what tqdm draws, as lines below each other."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self._print = trainer.print

    def write(self, text: str) -> int:
        if text.startswith("\r") and text.strip():
            self._print(text.strip(), flush=True)
        return len(text)


def _bar_width() -> int:
    # "^C", which a terminal shows, would begin another line behind a wider bar.
    return 90 if is_notebook() else width_of(sys.stderr) - 3


def _num_steps(trainer: Trainer) -> int | None:
    """Return the steps of the epoch, fewer where the updates of the run are used up."""
    run, length = trainer._run, length_of(trainer._train_dataloader)
    if run.max_num_train_steps is None:
        return length
    left = max(0, run.max_num_train_steps - run.progress.num_updates)
    accumulation = run.accumulation.steps_per_window
    limit = (run.progress.step // accumulation + left) * accumulation
    return limit if length is None else min(length, limit)
