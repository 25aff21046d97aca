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
from pytorch_accelerated.console import Pace, brief, duration
from pytorch_accelerated.data import length_of

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_SECONDS_BETWEEN_READS = 1.0
_SECONDS_BETWEEN_LOG_LINES = 60.0

_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}"
_BAR_WITHOUT_TOTAL = "{desc} {n_fmt} [{elapsed}"


class ProgressBarCallback(TrainerCallback):
    """Shows a bar for the epoch under way, with the running loss, on each machine once.

    In a terminal and in a notebook a bar gives way to the row that
    :class:`LogMetricsCallback` prints, and stays where there is none. In a file there
    are no bars: what takes longer than a minute is reported once a minute, in a plain
    line. The loss is that of this process. It is read from the device when it is shown,
    at most once a second, and not at each step.

    Attributes:
        pbar: The bar of the training epoch under way, else None.
        eval_pbar: The bar of the evaluation under way, else None.
    """

    may_stop_alone = False

    pbar: Any = None
    eval_pbar: Any = None
    _is_plain: bool = False
    _next_read: float = 0.0
    _pace: Pace | None = None
    _output: _NotebookOutput | None = None

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Open the bar of a training epoch."""
        self._close()
        progress = trainer._run.progress
        self._pace = Pace(progress.num_samples_seen)
        self.pbar = self._open_bar(
            trainer, f"epoch {epoch_of(trainer)}", _num_steps(trainer), progress.step
        )

    @event_with_data
    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any
    ) -> None:
        """Move the bar to the number of steps done."""
        if self.pbar is not None and (self._is_plain or not self.pbar.disable):
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
        if self._pace is not None:
            self._pace.pause()
        self.eval_pbar = self._open_bar(trainer, "evaluation", length)
        if kwargs.get("is_intermediate", False):
            self.eval_pbar.leave = False

    @event_with_data
    def on_eval_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any
    ) -> None:
        """Move the bar on by one step."""
        bar = self.eval_pbar
        if bar is not None and (self._is_plain or not bar.disable):
            self._advance(bar, 1, trainer)

    @event_with_data
    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bar of the evaluation."""
        self._close_eval_bar()

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bars; one that is open shows where the run was stopped."""
        self._close(leave=True)
        self._output = None

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bar of the evaluation, which may be amid a training epoch."""
        self._close_eval_bar()
        if self.pbar is None:
            self._output = None

    @event_with_data
    def on_exception(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bars; that of the epoch shows where the error was."""
        self._close(leave=True)

    def _open_bar(
        self, trainer: Trainer, name: str, total: int | None, initial: int = 0
    ) -> Any:
        """Create a bar, or what counts the steps where none is shown."""
        is_shown = trainer._accelerator.is_local_main_process
        is_live = is_notebook() or is_terminal(sys.stderr)
        self._is_plain = is_shown and not is_live
        if is_shown and is_notebook():
            self._output = self._output or _NotebookOutput()
        bar: Any = tqdm(
            desc=name,
            total=total,
            initial=initial,
            disable=not (is_shown and is_live),
            leave=not any(
                getattr(callback, "prints_rows", False)
                for callback in trainer.callback_handler
            ),
            mininterval=_SECONDS_BETWEEN_READS / 2,
            miniters=1,  # else a thread of tqdm, by the wall clock, sees to it
            bar_format=(_BAR_WITHOUT_TOTAL if total is None else _BAR) + "{postfix}]",
            file=self._output,
            ncols=_bar_width(),
            nrows=20,
        )
        # When the wall clock, which tqdm reads, is set back by an hour, a bar would
        # stand still for an hour and then show a negative time.
        bar.desc, bar._time = name, time.monotonic
        bar.start_t = bar.last_print_t = time.monotonic()
        self._read_later()
        return bar

    def _advance(self, bar: Any, num_steps: int, trainer: Trainer) -> None:
        is_due = time.monotonic() >= self._next_read
        if self._is_plain:
            bar.n += num_steps  # which tqdm does for what it shows
            if is_due:
                done = f"{bar.n / bar.total:.0%}" if bar.total else f"{bar.n:,} steps"
                text = f"{bar.desc}, {done}, {self._state(trainer)}"
                trainer.print(text, flush=True)
            return
        if is_due:
            bar.ncols = _bar_width()  # windows are resized
            bar.set_postfix_str(self._state(trainer), refresh=False)
        bar.update(num_steps)

    def _state(self, trainer: Trainer) -> str:
        self._read_later()
        state = f"loss {brief(trainer._loss_tracker.average)}"
        if self.eval_pbar is None and self._pace is not None:
            pace = self._pace.samples_per_second(trainer._run.progress.num_samples_seen)
            state += f", {pace} samples/s" if pace else ""
        return state

    def _read_later(self) -> None:
        seconds = (
            _SECONDS_BETWEEN_LOG_LINES if self._is_plain else _SECONDS_BETWEEN_READS
        )
        self._next_read = time.monotonic() + seconds

    def _close(self, *, leave: bool = False) -> None:
        self._close_eval_bar()
        if self.pbar is not None:
            self.pbar.leave = self.pbar.leave or leave
            self.pbar.close()
            self.pbar = None

    def _close_eval_bar(self) -> None:
        if self.eval_pbar is not None:
            self.eval_pbar.close()
            self.eval_pbar = None
            if self.pbar is not None and self._pace is not None:
                self._pace.go_on()


class PrintProgressCallback(TrainerCallback):
    """Prints what a run of training is to do when it starts, and where it ended.

    What happens between, and an evaluation, is said by :class:`LogMetricsCallback`.
    """

    _start: float | None = None

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print what the run is to do, and from where a resumed run goes on."""
        self._start = time.monotonic()
        config, done = trainer.run_config, trainer._run.progress.num_updates
        total = config.max_num_train_steps
        text = f"Training: {_count(config.num_epochs, 'epoch')}"
        if trainer.is_resumed:
            of_total = "" if total is None else f" of {total:,}"
            text = f"Training: epoch {epoch_of(trainer).strip()}, after {done:,}"
            text += f"{of_total} updates"
        elif total is not None:
            text += f", {_count(total, 'update')}"
        if config.num_processes > 1:
            text += f", {config.num_processes} processes"
        if config.mixed_precision != "no":
            text += f", {config.mixed_precision}"
        trainer.print(f"{text}, on {trainer.device}", flush=True)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print where the run ended, unless an error follows that says so."""
        if not trainer.has_failed:
            updates = _count(trainer._run.progress.num_updates, "update")
            text = f"Training ended: epoch {epoch_of(trainer).strip()}, {updates}"
            if self._start is not None:
                text += f", {duration(time.monotonic() - self._start)}"
            trainer.print(text, flush=True)


def epoch_of(trainer: Trainer) -> str:
    """Return the epoch under way, of those that there will be: " 3/10"."""
    run, epoch = trainer._run, trainer.run_history.current_epoch
    config = run.config
    if config is None or (
        run.max_num_train_steps is not None
        and config.num_update_steps_per_epoch is None
    ):
        return str(epoch)  # how many there will be is not known
    last = epoch - run.progress.epochs_done + config.num_epochs - 1
    return f"{min(epoch, last):>{len(str(last))}}/{last}"


def above_bars() -> AbstractContextManager[Any]:
    """Put what is printed in a ``with`` block above the bars that are shown."""
    is_needed = getattr(tqdm, "_instances", None)
    return tqdm.external_write_mode() if is_needed else nullcontext()


def is_terminal(stream: Any) -> bool:
    """Say whether people see a stream, and it can draw a bar anew in its place."""
    is_log = os.environ.get("CI", "").lower() not in ("", "0", "false")
    is_dumb = os.environ.get("TERM") == "dumb"
    return stream is not None and stream.isatty() and not (is_log or is_dumb)


def width_of(stream: Any) -> int:
    """Return the columns of a terminal; of a file, what is well read."""
    if not is_terminal(stream):
        return 120
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def is_notebook() -> bool:
    """Say whether this is a notebook, without importing anything."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def show_html(html: str, handle: Any = None) -> Any:
    """Show HTML in a notebook, in the place of what was shown before.

    Args:
        html: What to show.
        handle: What this function returned before; by default it is a new place.
    """
    from IPython.display import HTML, display

    if handle is None:
        return display(HTML(html), display_id=True)
    handle.update(HTML(html))
    return handle


class _NotebookOutput(io.StringIO):
    """Shows the last line that tqdm writes, and leaves no trace in what is saved."""

    encoding = "utf-8"
    _handle: Any = None

    def write(self, text: str) -> int:
        if len(text) > 1 and text.startswith("\r"):
            html = f"<pre>{escape(text.strip())}</pre>" if text.strip() else ""
            self._handle = show_html(html, self._handle)
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
    accumulation = run.accumulation.num_steps
    limit = (run.progress.step // accumulation + left) * accumulation
    return limit if length is None else min(length, limit)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
