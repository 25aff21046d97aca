"""What a run recorded: the history of its metrics and the running mean of a loss."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import math
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pytorch_accelerated.means import LossTracker as LossTracker

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

INTERMEDIATE_PREFIX = "intermediate_"
EVALUATION_PREFIX = "evaluation_"

# Words of the names of metrics.
_SMALL_IS_BETTER = (
    "loss error err mse rmse mae mape smape msle rmsle nll wer cer mer ter perplexity "
    "ppl brier ece fid kid lpips divergence kl distance hamming entropy"
)
_GREAT_IS_BETTER = (
    "accuracy acc f1 fbeta precision recall sensitivity specificity auc auroc auprc ap "
    "map ar mar ndcg mrr hit iou miou jaccard dice r2 mcc kappa matthews pearson "
    "spearman kendall correlation corrcoef bleu rouge meteor psnr ssim snr top "
    "exact"
)

# A value and its origin are added together. Of the module, since histories are copied.
_LOCK = threading.RLock()


class RunHistory(ABC):
    """The interface through which a trainer records metrics, for your own storage.

    Subclass it to keep metrics elsewhere, for instance in a database;
    :class:`InMemoryRunHistory` is what a trainer uses by default. Only the abstract
    members must be written; the others have a working default.

    Attributes:
        current_step: The number of updates completed. The trainer assigns it before
            it records anything.
    """

    current_step: int = 0

    @abstractmethod
    def get_metric_names(self) -> AbstractSet[str]:
        """Return the names of all metrics recorded so far."""

    @abstractmethod
    def get_metric_values(self, metric_name: str) -> Iterable[Any]:
        """Return all values of a metric, oldest first."""

    @abstractmethod
    def get_latest_metric(self, metric_name: str) -> Any:
        """Return the newest value of a metric.

        Raises:
            ValueError: If nothing has been recorded under this name.
        """

    @abstractmethod
    def set_metric_name_prefix(self, prefix: str = "") -> None:
        """Put ``prefix`` before the names of all metrics recorded from now on."""

    @property
    @abstractmethod
    def metric_name_prefix(self) -> str:
        """The text put before the name of each metric that is recorded."""

    @abstractmethod
    def update_metric(self, metric_name: str, metric_value: Any) -> None:
        """Record a value of a metric, under its name with the prefix before it."""

    @abstractmethod
    def delete_metric(self, metric_name: str) -> None:
        """Forget all values of a metric, named as it was when it was recorded."""

    @property
    @abstractmethod
    def current_epoch(self) -> int:
        """The number of the epoch under way; the first one is 1."""

    @abstractmethod
    def _increment_epoch(self) -> None:
        """Called by the trainer once an epoch is finished."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all metrics and start again at epoch 1."""

    def _set_epoch(self, epoch: int) -> None:
        """Called by the trainer on resume, with the number of the next epoch.

        This default only moves forward, because going back with :meth:`reset` would
        lose the metrics recorded so far.
        """
        for _ in range(epoch - self.current_epoch):
            self._increment_epoch()

    def prefixed(self, prefix: str) -> AbstractContextManager[None]:
        """Record metrics with another prefix inside a ``with`` block.

        The prefix from before comes back at the end of the block, also when the
        block raises::

            with run_history.prefixed("ema_model_"):
                run_history.update_metric("accuracy", 0.9)  # ema_model_accuracy
        """
        return _Prefixed(self, prefix)

    def _evaluation(self) -> _Evaluation:
        """Used by the trainer around ``evaluate()``, which is no epoch of a run."""
        return _Evaluation(self, self.metric_name_prefix + EVALUATION_PREFIX)

    def state_dict(self) -> dict[str, Any]:
        """Return what a training state keeps of this history, as plain values.

        This default keeps the epoch and the step. Override it, together with
        :meth:`load_state_dict`, if the metrics are not stored elsewhere anyway.
        """
        return {"current_epoch": self.current_epoch, "current_step": self.current_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state returned by :meth:`state_dict`."""
        self.current_step = state["current_step"]
        self._set_epoch(state["current_epoch"])


class _Prefixed(AbstractContextManager[None]):
    """Records with another prefix, until it is left."""

    def __init__(self, history: RunHistory, prefix: str) -> None:
        self._history, self._prefix = history, prefix

    def __enter__(self) -> None:
        self._prefix_before = self._history.metric_name_prefix
        self._history.set_metric_name_prefix(self._prefix)

    def __exit__(self, *error: object) -> None:
        self._history.set_metric_name_prefix(self._prefix_before)


class _Evaluation(_Prefixed):
    """Names start with ``evaluation_``, and the epoch is 1 meanwhile.

    Attributes:
        recorded: The last value of each metric that has been recorded meanwhile.
    """

    recorded: dict[str, Any]

    def __enter__(self) -> None:
        super().__enter__()
        self._values_before = count_values(self._history)
        self._epoch_before = self._history.current_epoch
        self._history._set_epoch(1)

    def __exit__(self, *error: object) -> None:
        super().__exit__()
        self._history._set_epoch(self._epoch_before)
        self.recorded = {
            name: list(self._history.get_metric_values(name))[-1]
            for name, number in count_values(self._history).items()
            if number > self._values_before.get(name, 0)
        }


def count_values(history: RunHistory) -> dict[str, int]:
    """Return how many values of each metric there are, in the order of recording."""
    if type(history) is InMemoryRunHistory:  # amid a long run, copies would take longer
        return {name: len(history._metrics[name]) for name in history._names()}
    names = history.get_metric_names()
    if isinstance(names, set | frozenset):  # their order changes from run to run
        names = dict.fromkeys(sorted(names)).keys()
    return {name: len(list(history.get_metric_values(name))) for name in names}


class MetricRecord(NamedTuple):
    """One value of a metric, and when it was recorded.

    Attributes:
        name: The name of the metric, with its prefix.
        value: The recorded value.
        epoch: The epoch under way at the time; the first one is 1. None for what
            ``evaluate()`` recorded, which is no epoch.
        step: The number of updates completed at the time.
        unix_time: The time of recording, in seconds since 1970-01-01 UTC.

    The last three are None for values that did not come through ``update_metric``.
    """

    name: str
    value: Any
    epoch: int | None
    step: int | None
    unix_time: float | None


# When a value was recorded: the last three fields of its record.
_Origin = tuple[int | None, int | None, float | None]


class InMemoryRunHistory(RunHistory):
    """Keeps the metrics of a run in memory, each value with its epoch, step and time.

    Example::

        history = trainer.train(dataset, num_epochs=2)
        history.get_metric_values("train_loss_epoch")   # [0.61, 0.42]
        history.get_latest_metric("train_loss_epoch")   # 0.42
        history.records("train_loss_epoch")[0].step     # 235
        history.save_jsonl("metrics.jsonl")
        history.to_pandas().pivot(index="epoch", columns="name", values="value")

    Names keep the order in which they were first recorded. Everything that is returned
    is a copy, so changing it does not change the history.
    """

    def __init__(self) -> None:
        self._current_epoch = 1
        self._prefix = ""
        # Scripts extend these lists directly, hence the list made on first access and
        # the origins beside the values, which may lag behind: see `_origins_of`.
        self._metrics: defaultdict[str, list[Any]] = defaultdict(list)
        self._origins: dict[str, list[_Origin]] = {}
        # Metrics whose newest value is one of `evaluate()`: where it is.
        self._evaluated: dict[str, str] = {}

    def __repr__(self) -> str:
        names = ", ".join(self._names()) or "nothing recorded"
        return (
            f"{type(self).__name__}(epoch {self._current_epoch}, update "
            f"{self.current_step}: {names})"
        )

    def get_metric_names(self) -> AbstractSet[str]:
        """Return the names of all metrics, in the order of their first recording.

        The result compares equal to a ``set`` of the same names.
        """
        return dict.fromkeys(self._names()).keys()

    def get_metric_values(self, metric_name: str) -> list[Any]:
        """Return all values of a metric, oldest first; empty if there are none."""
        return list(self._metrics.get(metric_name, ()))

    def get_latest_metric(self, metric_name: str) -> Any:
        """Return the newest value of a metric.

        After ``evaluate()`` that is the one which it recorded, also by the name without
        ``evaluation_``.

        Raises:
            ValueError: If nothing has been recorded under this name.
        """
        name = self._evaluated.get(metric_name, metric_name)
        values = self._metrics.get(name)
        if not values:
            raise ValueError(
                f"{self._no_metric_named(metric_name)} Metrics appear once the epoch "
                "that records them has ended."
            )
        return values[-1]

    def set_metric_name_prefix(self, prefix: str = "") -> None:
        """Put ``prefix`` before the names of metrics recorded or deleted from now on.

        Reading is not affected: there, names are given in full.
        """
        self._prefix = prefix

    @property
    def metric_name_prefix(self) -> str:
        """The text put before the name of each metric that is recorded or deleted."""
        return self._prefix

    def update_metric(self, metric_name: str, metric_value: Any) -> None:
        """Record a value of a metric, under its name with the prefix before it.

        Args:
            metric_name: The name of the metric, without the prefix.
            metric_value: A number; a NumPy scalar or a tensor with one element becomes
                a Python number that still answers ``item()``. Reading a tensor waits
                for the device. Anything else is kept as it is, larger tensors on the
                CPU; and each number in a dictionary is recorded as a metric of its own
                too, ``<name>_<key>``.
        """
        name = self._full_name(metric_name)
        outer_prefix = self._prefix.removesuffix(EVALUATION_PREFIX)
        plain_name = name.removeprefix(self._prefix)
        is_evaluation = outer_prefix != self._prefix
        epoch = None if is_evaluation else self._current_epoch
        value = _without_device(metric_value)
        with _LOCK:
            self._add(name, value, (epoch, self.current_step, time.time()))
            self._evaluated.pop(name, None)
            if is_evaluation:
                self._evaluated[outer_prefix + plain_name] = name
        if isinstance(value, Mapping):
            for key, member in value.items():
                if is_number(member):
                    self.update_metric(f"{plain_name}_{key}", member)

    def delete_metric(self, metric_name: str) -> None:
        """Forget all values of a metric.

        Args:
            metric_name: The name as it was given to :meth:`update_metric`: the prefix,
                if one is set, is put before it.

        Raises:
            KeyError: If nothing has been recorded under this name.
        """
        name = self._full_name(metric_name)
        if not self._metrics.get(name):
            raise KeyError(self._no_metric_named(name))
        with _LOCK:
            del self._metrics[name]
            self._origins.pop(name, None)
        self._evaluated = {k: v for k, v in self._evaluated.items() if v != name}

    @property
    def current_epoch(self) -> int:
        """The number of the epoch under way; the first one is 1."""
        return self._current_epoch

    def _increment_epoch(self) -> None:
        self._current_epoch += 1

    def _set_epoch(self, epoch: int) -> None:
        self._current_epoch = epoch

    def reset(self) -> None:
        """Forget all metrics and start again at epoch 1, step 0; keep the prefix."""
        self._metrics.clear()
        self._origins.clear()
        self._evaluated.clear()
        self._current_epoch = 1
        self.current_step = 0

    def records(
        self, name: str | None = None, *, skip: Mapping[str, int] | None = None
    ) -> list[MetricRecord]:
        """Return the values with the epoch, step and time of each.

        Args:
            name: The metric to return, oldest value first. By default all metrics, one
                after the other in the order of their names.
            skip: How many values of a metric to leave out, the oldest ones.
        """
        skip = skip or {}
        with _LOCK:
            return [
                MetricRecord(metric, value, *origin)
                for metric in self._names()
                if name in (None, metric)
                for value, origin in zip(
                    self._metrics[metric][skip.get(metric, 0) :],
                    self._origins_of(metric)[skip.get(metric, 0) :],
                    strict=True,
                )
            ]

    def to_dict(self) -> dict[str, Any]:
        """Return the whole history as dictionaries, lists, strings and numbers.

        :meth:`from_dict` makes an equal history of it, to the last bit of each number;
        tensors and arrays come back as nested lists. Values that are none of these,
        such as figures, are left out.

        Returns:
            The counters, the prefix, and under ``"metrics"`` for each name the columns
            ``value``, ``epoch``, ``step`` and ``unix_time``.
        """
        return {
            "current_epoch": self._current_epoch,
            "current_step": self.current_step,
            "metric_name_prefix": self._prefix,
            "metrics": {name: self._columns(name) for name in self._names()},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> InMemoryRunHistory:
        """Make a history from what :meth:`to_dict` returned."""
        history = cls()
        history.load_state_dict(dict(state))
        return history

    def state_dict(self) -> dict[str, Any]:
        """Return the whole history, as :meth:`to_dict` does."""
        return self.to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the whole history by what :meth:`state_dict` returned.

        Raises:
            KeyError: If the state lacks an entry; the history is then as before.
        """
        columns = state["metrics"]
        values = {name: list(columns[name]["value"]) for name in columns}
        origins = {
            name: list(zip(of["epoch"], of["step"], of["unix_time"], strict=True))
            for name, of in columns.items()
        }
        epoch, step = state["current_epoch"], state["current_step"]
        prefix = state["metric_name_prefix"]
        self.reset()
        self._metrics.update(values)
        self._origins.update(origins)
        self._current_epoch, self._prefix = epoch, prefix
        self.current_step: int = step

    def save_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write the history to a file of JSON lines, one recorded value a line.

        Numbers keep all their digits; NaN and infinity are written as ``NaN`` and
        ``Infinity``, which Python reads back and strict JSON readers refuse. Missing
        parent folders are made, and a file that is there already is replaced once the
        new one is whole. What it holds of values that are no numbers is as in
        :meth:`to_dict`.
        """
        write_records(self.records(), path)

    @classmethod
    def load_jsonl(cls, path: str | os.PathLike[str]) -> InMemoryRunHistory:
        """Read a history from a file that :meth:`save_jsonl` wrote.

        The file holds values only. So the history comes back without a prefix, at the
        last epoch and step that a value was recorded in; use :meth:`to_dict` where a
        run is to continue exactly.
        """
        history = cls()
        with open(path, encoding="utf-8") as file:
            for line in filter(str.strip, file):
                try:
                    record = MetricRecord(**json.loads(line))
                except (TypeError, ValueError) as error:
                    raise ValueError(
                        f"{path} has a line that is no record in JSON: {line[:60]!r}. "
                        "A .csv file is read with pandas.read_csv()."
                    ) from error
                history._add(record.name, record.value, record[2:])
                history._current_epoch = max(history._current_epoch, record.epoch or 1)
                history.current_step = max(history.current_step, record.step or 0)
        return history

    def to_pandas(self) -> pd.DataFrame:
        """Return the records of numbers as a table with a column for each field.

        Raises:
            ImportError: If pandas is not installed.
        """
        import pandas as pd

        table: pd.DataFrame = pd.DataFrame(
            numbers_of(self), columns=list(MetricRecord._fields)
        )
        return table

    def plot(self, *metrics: str) -> Figure:
        """Draw the values that are numbers.

        Those of training and evaluation share axes: ``train_loss_epoch``,
        ``eval_loss_epoch`` and ``intermediate_eval_loss`` are three lines under "loss".

        Args:
            *metrics: What to draw: names of metrics, or of axes such as "loss". By
                default everything.

        Returns:
            The figure, to be saved with ``savefig("run.png")``.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there is nothing to draw, or no metric of a given name.
        """
        return compare_histories({"": self}, metrics=metrics)

    def summary(self) -> HistorySummary:
        """Return the last and the best value of each metric, by its name.

        ``print(history.summary())`` shows a table;
        ``history.summary()["eval_loss_epoch"].best.epoch`` is the best epoch.
        """
        by_name: defaultdict[str, list[MetricRecord]] = defaultdict(list)
        for record in numbers_of(self):
            by_name[record.name].append(record)
        return HistorySummary(
            {name: MetricSummary(of[-1], best_of(of)) for name, of in by_name.items()}
        )

    def _names(self) -> list[str]:
        return [name for name, values in self._metrics.items() if values]

    def _full_name(self, metric_name: str) -> str:
        if self._prefix.endswith(EVALUATION_PREFIX):
            metric_name = metric_name.removeprefix(EVALUATION_PREFIX)
        return self._prefix + metric_name

    def _no_metric_named(self, name: str) -> str:
        known = ", ".join(self._names()) or "nothing"
        return f"No metric named {name!r} in the run history; recorded so far: {known}."

    def _columns(self, name: str) -> dict[str, list[Any]]:
        records = _plain_records(self.records(name))
        return {
            column: [getattr(record, column) for record in records]
            for column in MetricRecord._fields[1:]
        }

    def _origins_of(self, name: str) -> list[_Origin]:
        """Return the origins of a metric's values, as many as there are values."""
        num_values = len(self._metrics.get(name, ()))
        origins = self._origins.setdefault(name, [])
        del origins[num_values:]
        origins.extend([(None, None, None)] * (num_values - len(origins)))
        return origins

    def _add(self, name: str, value: Any, origin: _Origin) -> None:
        origins = self._origins_of(name)
        self._metrics[name].append(value)
        origins.append(origin)


class MetricSummary(NamedTuple):
    """What became of a metric.

    Attributes:
        last: Its newest value.
        best: Its best one; None if its name does not say whether greater is better, see
            :func:`is_greater_better`, and if no value is finite.
    """

    last: MetricRecord
    best: MetricRecord | None


class HistorySummary(dict[str, MetricSummary]):
    """The :class:`MetricSummary` of each metric, by its name; shown as a table."""

    def __repr__(self) -> str:
        """Return a table of the metrics."""
        rows = [["metric", "last", "best", "epoch", "update"]]
        for name, (last, best) in self.items():
            row = [name, f"{last.value:.6g}"]
            if best is not None:
                row += [f"{best.value:.6g}", str(best.epoch or ""), str(best.step)]
            rows.append(row + [""] * (len(rows[0]) - len(row)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows
        )


def compare_histories(
    histories: Mapping[str, Any] | Iterable[Any],
    names: Iterable[str] | None = None,
    *,
    metrics: str | Iterable[str] = (),
) -> Figure:
    """Draw the metrics of several runs over each other.

    Args:
        histories: Histories, or paths of files of JSON lines; a list of them, or a
            dictionary by the names of the runs.
        names: The names of the runs in a list; by default those of the files, or
            numbers from 1.
        metrics: What to draw, as for :meth:`InMemoryRunHistory.plot`.

    Returns:
        The figure, with a colour for each run.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw, or no metric of a given name.
    """
    from pytorch_accelerated.plotting import draw

    if not isinstance(histories, Mapping):
        runs = list(histories)
        names = names or [str(run) if _is_path(run) else "" for run in runs]
        numbered = zip(names, runs, strict=True)
        histories = {
            name or f"run {n}": run for n, (name, run) in enumerate(numbered, 1)
        }
    load = InMemoryRunHistory.load_jsonl
    read = {
        name: load(run) if _is_path(run) else run for name, run in histories.items()
    }
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    return draw({name: numbers_of(run) for name, run in read.items()}, metrics)


def _is_path(run: Any) -> bool:
    return isinstance(run, str | os.PathLike)


def numbers_of(history: InMemoryRunHistory) -> list[MetricRecord]:
    """Return the records whose values are numbers."""
    return [record for record in history.records() if is_number(record.value)]


def records_of(
    history: RunHistory, name: str | None = None, skip: Mapping[str, int] | None = None
) -> list[MetricRecord]:
    """Return the records of any history; others than ours know no step and no epoch.

    Args:
        history: The history.
        name: The metric to return, by default all of them.
        skip: How many values of a metric to leave out, the oldest ones.
    """
    if isinstance(history, InMemoryRunHistory):
        return history.records(name, skip=skip)
    skip = skip or {}
    return [
        MetricRecord(metric, value, None, None, None)
        for metric in history.get_metric_names()
        if name in (None, metric)
        for value in list(history.get_metric_values(metric))[skip.get(metric, 0) :]
    ]


def best_of(records: Sequence[MetricRecord]) -> MetricRecord | None:
    """Return the best record of a metric, the first of equal ones.

    None if no value is finite, or nobody knows which way is better.
    """
    finite = [record for record in records if math.isfinite(record.value)]
    greater = is_greater_better(finite[0].name) if finite else None
    if greater is None:
        return None
    return (max if greater else min)(finite, key=lambda record: record.value)


def write_records(
    records: Iterable[MetricRecord],
    path: str | os.PathLike[str],
    *,
    append: bool = False,
) -> None:
    """Write records to a file, as CSV if its name ends in ``.csv``, else as JSON lines.

    Args:
        records: Those whose values cannot be written are left out.
        path: The file; missing folders are made. One that is there already is replaced
            once the new one is whole.
        append: Whether to write to the end of the file instead.
    """
    file, lines = Path(os.path.realpath(path)), io.StringIO()
    table = csv.DictWriter(lines, MetricRecord._fields, lineterminator="\n")
    if file.suffix == ".csv" and not append:
        table.writeheader()
    for record in _plain_records(records):
        if file.suffix == ".csv":
            table.writerow(record._asdict())
        else:
            lines.write(json.dumps(record._asdict()) + "\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    if append:
        with open(file, "a", encoding="utf-8") as end:
            end.write(lines.getvalue())
        return
    temporary = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(lines.getvalue(), encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _plain_records(records: Iterable[MetricRecord]) -> list[MetricRecord]:
    """Return the records that can be written, with what they hold in plain values."""
    return [
        record._replace(value=plain)
        for record in records
        if _is_plain(plain := _plain(record.value))
    ]


class _Float(float):
    """A number that was recorded as a tensor, and is asked for its ``item()``."""

    def item(self) -> float:
        return float(self)


class _Int(int):
    """A whole number that was recorded as a tensor."""

    def item(self) -> int:
        return int(self)


def is_number(value: Any) -> bool:
    """Say whether the value of a metric is one number, and not an array or the like."""
    return _number_in(value) is not None


def is_greater_better(name: str) -> bool | None:
    """Say by its name whether a greater value of a metric is better, None if unknown.

    Prefixes and suffixes do not matter, nor how words are joined: ``eval_loss_epoch``,
    ``ema_model_eval_MulticlassAccuracy_epoch``. A word for what should be small wins.
    """
    words = re.findall(r"[A-Z]?[a-z]+\d*|[A-Z]+\d*(?![a-z])", name)
    known = {word.lower() for word in words}
    known |= {word.rstrip("0123456789") for word in known}
    if not known.isdisjoint(_SMALL_IS_BETTER.split()):
        return False
    return None if known.isdisjoint(_GREAT_IS_BETTER.split()) else True


def _number_in(value: Any) -> float | None:
    """Return a value as a Python int or float, or None if it is not one number."""
    if hasattr(value, "item"):
        # Arrays and tensors of several elements refuse `item()`, each in its own way.
        with contextlib.suppress(ValueError, RuntimeError):
            value = value.item()
    if isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, float) else None


def _without_device(value: Any) -> Any:
    """Return a number as a Python number, and a copy of the rest, on the CPU."""
    number = _number_in(value)
    if number is not None:
        if not hasattr(value, "item"):
            return number
        return _Int(number) if isinstance(number, int) else _Float(number)
    if isinstance(value, Mapping):
        return {key: _without_device(member) for key, member in value.items()}
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    is_array = isinstance(value, list) or hasattr(value, "__array__")
    return copy.copy(value) if is_array else value


def _plain(value: Any) -> Any:
    """Return numbers without ``item()``, and tensors and arrays as nested lists."""
    number = _number_in(value)
    if number is not None:
        return number
    if isinstance(value, Mapping):
        return {str(key): _plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(member) for member in value.values())
    if isinstance(value, list):
        return all(_is_plain(member) for member in value)
    return value is None or isinstance(value, (int, float, str))
