"""Reporting the metrics of a run."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.callbacks import progress
from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data
from pytorch_accelerated.callbacks.best import BestSoFar
from pytorch_accelerated.console import (
    Table,
    duration,
    in_lines,
    labels_of,
    rate,
)
from pytorch_accelerated.tracking import count_values, is_greater_better, is_number

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_SECONDS_BETWEEN_TABLES = 0.5

# Metrics that columns of the table, or a ThroughputCallback, say already.
_SAID = re.compile(
    r"learning_rate(_\d+)?|(train_)?samples_per_second|(train_)?seconds_epoch"
    r"|train_(data_wait_share|items_per_second|mfu|peak_memory_gib)"
    r"|train_step_seconds_(p50|p95|max)"
)

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

    # How many values of each metric have been logged, and what is in the next row.
    _num_logged: Mapping[str, int] = MappingProxyType({})
    _row: Mapping[str, Any] = MappingProxyType({})
    _best: Mapping[str, BestSoFar] = MappingProxyType({})
    _table: Table | None = None
    # When training started, and how many updates and epochs were done then.
    _start: tuple[float, int, int] | None = None
    # What an evaluation run, which may be amid a training run, has put aside.
    _around: tuple[Any, ...] | None = None
    _place: progress.NotebookPlace | None = None
    _next_show: float = 0.0

    @property
    def prints_rows(self) -> bool:
        """Whether each epoch leaves a row, so that no bar has to stay."""
        return type(self).log_metrics is LogMetricsCallback.log_metrics

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        self._num_logged = count_values(trainer.run_history)
        self._row, self._best, self._next_show = {}, {}, 0.0
        self._table = self._start = self._place = None

    def log_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Add metrics to the row that is printed next; the method to override.

        Called on all processes.

        Args:
            trainer: The trainer.
            metrics: Names and values, at least one. A value is what was recorded: a
                number, or whatever else was given to ``update_metric``.
        """
        self._row = {**self._row, **metrics}

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Leave out what a resumed run has logged before."""
        if trainer.is_resumed:
            self._num_logged = count_values(trainer.run_history)

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start to measure the time of the run."""
        run, done = trainer._run, trainer._run.progress
        if self._start is None:
            self._start = run.pace.started, done.num_updates, done.epochs_done

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Leave out what has been recorded before."""
        counts = count_values(trainer.run_history)
        self._around = self._num_logged, counts, self._row, time.monotonic()
        self._num_logged, self._row = counts, {}

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log the new training metrics."""
        names = [name for name in self._new_names(trainer) if _is_train_metric(name)]
        self._log_latest_metrics(trainer, names)

    @event_with_data
    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log the other new metrics; print those of an evaluation amid an epoch."""
        names = self._new_names(trainer)
        self._log_latest_metrics(
            trainer, [name for name in names if not _is_train_metric(name)]
        )
        if kwargs.get("is_intermediate", False):
            self._print_row(trainer, amid_epoch=True)

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
        metrics, self._row = self._row, {}
        row = {label: metrics[name] for name, label in labels_of(metrics).items()}
        if self._around is not None:
            num_logged, counts, self._row, start = self._around
            row["time"] = duration(time.monotonic() - start)
            # What the epoch around it has recorded is still to be logged.
            own = self._num_logged.items() - counts.items()
            self._num_logged = {**num_logged, **dict(own)}
        if metrics:
            text = in_lines("evaluation", row, progress.width_of(sys.stdout))
            trainer.print(text, flush=True)

    def _print_row(self, trainer: Trainer, *, amid_epoch: bool = False) -> None:
        metrics, self._row = self._row, {}
        if not metrics:
            return
        run, epoch = trainer._run, progress.epoch_of(trainer)
        if self._table is None:
            total = trainer.run_config.max_num_train_steps
            width = max(len(epoch), len(f"@{total}"))
            expected = ["train_loss"]
            if trainer.eval_dataset is not None:
                expected.append("eval_loss")
            self._table = Table(expected, width)
        metrics = {name: metrics[name] for name in metrics if not _SAID.fullmatch(name)}
        labels = labels_of(metrics)
        row = {label: metrics[name] for name, label in labels.items()}
        row["epoch"] = f"@{run.progress.num_updates}" if amid_epoch else epoch
        if trainer.last_lr:
            row["lr"] = f"{trainer.last_lr[0]:.4g}"
        if run.samples_per_second > 0:
            row["samples/s"] = rate(run.samples_per_second)
        row["time"] = duration(run.pace.elapsed)
        row["ETA"] = self._time_left(trainer, amid_epoch=amid_epoch)
        best = [name for name in labels if self._is_best(trainer, name, metrics[name])]
        self._table.add(row, [labels[name] for name in best])
        if not progress.is_notebook():
            width = progress.width_of(sys.stdout)
            lines = self._table.lines(width, is_styled=_is_styled())
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
        if self._table is not None and is_shown and progress.is_notebook():
            self._place = self._place or progress.NotebookPlace()
            self._place.show(self._table.to_html())
            self._next_show = time.monotonic() + _SECONDS_BETWEEN_TABLES

    def _time_left(self, trainer: Trainer, *, amid_epoch: bool) -> str:
        """Estimate it from the time that this run has taken so far."""
        if self._start is None:
            return ""
        started, before, epochs_before = self._start
        config, run = trainer.run_config, trainer._run
        now, limits = time.monotonic(), []
        if config.max_num_train_steps is not None:
            num_updates = run.progress.num_updates
            limits.append((config.max_num_train_steps, num_updates, before, now))
        if config.num_update_steps_per_epoch is None:
            done = run.progress.epochs_done + (not amid_epoch)
            # Of whole epochs: the one under way is part of what is left.
            until = run.pace.started if amid_epoch else now
            limits.append((config.num_epochs, done, epochs_before, until))
        if any(done >= total for total, done, _, _ in limits):
            return ""
        left = [
            (until - started) * (total - done) / (done - before) - (now - until)
            for total, done, before, until in limits
            if done > before
        ]
        return duration(max(0.0, min(left))) if left else ""

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
    has_codes = progress.is_terminal(sys.stdout) and os.name != "nt"
    return has_codes and not os.environ.get("NO_COLOR")


def _is_train_metric(name: str) -> bool:
    return _TRAIN_WORD.search(name) is not None
