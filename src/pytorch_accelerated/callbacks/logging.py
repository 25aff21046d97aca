"""Reporting the metrics of a run."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data
from pytorch_accelerated.callbacks.best import BestSoFar
from pytorch_accelerated.callbacks.progress import (
    epoch_of,
    is_notebook,
    is_terminal,
    show_html,
    width_of,
)
from pytorch_accelerated.console import (
    Pace,
    Table,
    duration,
    in_lines,
    labels_of,
)
from pytorch_accelerated.tracking import count_values, is_greater_better, is_number

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_SECONDS_BETWEEN_TABLES = 0.5

# "train_loss_epoch", "TRAIN_loss", "ema_model_train_loss", "training/accuracy"; not
# "constrained".
_TRAIN_WORD = re.compile(
    r"(?<![A-Za-z])([Tt]rain(ing)?(?![a-z])|TRAIN(ING)?(?![A-Za-z]))"
)


class LogMetricsCallback(TrainerCallback):
    """Prints the metrics of an epoch as a row of a table, and those of an evaluation.

    The row has the epoch, the metrics with a star at each that is the best so far, the
    learning rate, the samples of training per second, the time of the epoch and an
    estimate of what is left of the run. An evaluation amid an epoch is a row too, which
    starts with the number of the update. In a notebook the table grows in its place.

    Metrics with the word "train" in their name are logged at the end of the training
    epoch, the others at the end of the evaluation, and what is recorded later at the
    end of the whole epoch: each value once, in the order of recording.

    Override :meth:`log_metrics` to send them elsewhere::

        class LogToMLflow(LogMetricsCallback):
            def log_metrics(self, trainer, metrics):
                super().log_metrics(trainer, metrics)  # to print them as well
                if trainer.run_config.is_world_process_zero:
                    mlflow.log_metrics(metrics, step=trainer.run_history.current_epoch)
    """

    _num_logged: Mapping[str, int] = MappingProxyType({})
    _around: Mapping[str, int] = MappingProxyType({})
    _before: Mapping[str, int] = MappingProxyType({})
    _row: Mapping[str, Any] = MappingProxyType({})
    _epoch: str = ""
    _evaluated: Mapping[str, Any] = MappingProxyType({})
    _best: Mapping[str, BestSoFar] = MappingProxyType({})
    _table: Table | None = None
    _pace: Pace | None = None
    _start: tuple[float, int, int] | None = None
    _evaluation_start: float | None = None
    _shown: Any = None
    _next_show: float = 0.0

    @property
    def prints_rows(self) -> bool:
        """Whether each epoch leaves a row, so that no bar has to stay."""
        return type(self).log_metrics is LogMetricsCallback.log_metrics

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        self._num_logged = count_values(trainer.run_history)
        self._row, self._best = {}, {}
        self._table = self._pace = self._start = self._shown = None

    def log_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Add metrics to the row that is printed next; the method to override.

        Called on all processes.

        Args:
            trainer: The trainer.
            metrics: Names and values, at least one. A value is what was recorded: a
                number, or whatever else was given to ``update_metric``.
        """
        if trainer._run.is_training:
            self._row = {**self._row, **metrics}
            self._epoch = epoch_of(trainer)
        else:
            self._evaluated = {**self._evaluated, **metrics}

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start to measure the time."""
        self._print_row(trainer)
        progress = trainer._run.progress
        self._pace = Pace(progress.num_samples_seen)
        if self._start is None:
            done = progress.num_updates, progress.epochs_done
            self._start = (self._pace.started, *done)

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Leave out what has been recorded before."""
        self._around = self._num_logged
        self._num_logged = self._before = count_values(trainer.run_history)
        self._evaluated, self._evaluation_start = {}, time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log the new training metrics."""
        if self._pace is not None:
            self._pace.pause(for_good=True)
        names = [name for name in self._new_names(trainer) if _is_train_metric(name)]
        self._log_latest_metrics(trainer, names)

    @event_with_data
    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Leave the evaluation out of the time of training."""
        if self._pace is not None:
            self._pace.pause()

    @event_with_data
    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log the other new metrics; print those of an evaluation amid an epoch."""
        names = self._new_names(trainer)
        self._log_latest_metrics(
            trainer, [name for name in names if not _is_train_metric(name)]
        )
        if kwargs.get("is_intermediate", False):
            self._print_row(trainer, amid_epoch=True)
        if self._pace is not None:
            self._pace.go_on()

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log what has been recorded since, and print the row of the epoch."""
        self._log_latest_metrics(trainer, self._new_names(trainer))
        self._print_row(trainer)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print what there is of an epoch that was not finished."""
        self._print_row(trainer)
        self._show(trainer)

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log what has been recorded since, and print it all in a line."""
        self._log_latest_metrics(trainer, self._new_names(trainer))
        # What the epoch around it has recorded is still to be logged.
        own = self._num_logged.items() - self._before.items()
        self._num_logged = {**self._around, **dict(own)}
        metrics, self._evaluated = self._evaluated, {}
        if metrics:
            row = {label: metrics[name] for name, label in labels_of(metrics).items()}
            if self._evaluation_start is not None:
                row["time"] = duration(time.monotonic() - self._evaluation_start)
            text = in_lines("evaluation", row, width_of(sys.stdout))
            trainer.print(text, flush=True)

    def _print_row(self, trainer: Trainer, *, amid_epoch: bool = False) -> None:
        metrics, self._row = self._row, {}
        if not metrics:
            return
        run, labels = trainer._run, labels_of(metrics)
        if self._table is None:
            width = len(f"@{trainer.run_config.max_num_train_steps}")
            expected = ["train_loss", "eval_loss"][: 1 + bool(trainer.eval_dataset)]
            self._table = Table(expected, max(width, len(self._epoch)))
        row = {label: metrics[name] for name, label in labels.items()}
        row["epoch"] = f"@{run.progress.num_updates}" if amid_epoch else self._epoch
        rates = trainer.last_lr
        if rates and math.isfinite(rates[0]):
            row["lr"] = f"{rates[0]:.4g}"
        if self._pace is not None:
            seen = run.progress.num_samples_seen
            row["samples/s"] = self._pace.samples_per_second(seen)
            row["time"] = duration(time.monotonic() - self._pace.started)
            row["ETA"] = self._time_left(trainer, amid_epoch=amid_epoch)
        best = {
            label
            for name, label in labels.items()
            if self._is_best(trainer, name, metrics[name])
        }
        self._table.add(row, best)
        if not is_notebook():
            lines = self._table.lines(width_of(sys.stdout), is_styled=_is_styled())
            trainer.print("\n".join(lines), flush=True)
        elif time.monotonic() >= self._next_show:
            self._show(trainer)

    def _is_best(self, trainer: Trainer, name: str, value: Any) -> bool:
        """Say whether a value that has just been recorded is the best so far."""
        greater_is_better = is_greater_better(name)
        if greater_is_better is None or not is_number(value):
            return False
        if name not in self._best:
            best, history = BestSoFar(greater_is_better=greater_is_better), []
            if name in trainer.run_history.get_metric_names():
                history = list(trainer.run_history.get_metric_values(name))
            for earlier in filter(is_number, history[:-1]):  # of a resumed run
                best.update(earlier)
            self._best = {**self._best, name: best}
        return self._best[name].update(value)

    def _show(self, trainer: Trainer) -> None:
        """Show all rows in a notebook, which is not done for each of fast epochs."""
        is_shown = trainer._accelerator.is_local_main_process
        if self._table is not None and is_shown and is_notebook():
            self._shown = show_html(self._table.to_html(), self._shown)
            self._next_show = time.monotonic() + _SECONDS_BETWEEN_TABLES

    def _time_left(self, trainer: Trainer, *, amid_epoch: bool) -> str:
        """Estimate it from the time that this run has taken so far."""
        if self._start is None:
            return ""
        started, before, epochs_before = self._start
        config, progress = trainer.run_config, trainer._run.progress
        total, done = config.max_num_train_steps, progress.num_updates
        if total is None:
            total, before = config.num_epochs, epochs_before
            done = progress.epochs_done + (not amid_epoch)
        if not before < done < total:
            return ""
        elapsed = time.monotonic() - started
        return duration(elapsed * (total - done) / (done - before))

    def _new_names(self, trainer: Trainer) -> list[str]:
        return [
            name
            for name, count in count_values(trainer.run_history).items()
            if count and count != self._num_logged.get(name, 0)
        ]

    def _log_latest_metrics(self, trainer: Trainer, names: Iterable[str]) -> None:
        metrics = self._get_latest_metrics(trainer, names)
        counts = count_values(trainer.run_history)
        self._num_logged = {**self._num_logged, **{n: counts[n] for n in metrics}}
        if metrics:
            self.log_metrics(trainer, metrics)

    def _get_latest_metrics(
        self, trainer: Trainer, names: Iterable[str]
    ) -> dict[str, Any]:
        history = trainer.run_history
        return {name: list(history.get_metric_values(name))[-1] for name in names}


def _is_styled() -> bool:
    """Say whether what is printed may have colours."""
    has_codes = is_terminal(sys.stdout) and os.name != "nt"
    return has_codes and not os.environ.get("NO_COLOR")


def _is_train_metric(name: str) -> bool:
    return _TRAIN_WORD.search(name) is not None
