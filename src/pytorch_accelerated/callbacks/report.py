"""A page about a run, in one file."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import accelerate
import torch

from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data
from pytorch_accelerated.callbacks.tracker import flat, settings_of
from pytorch_accelerated.checkpoint.files import absolute, replaced
from pytorch_accelerated.console import Table, brief, duration, labels_of, rate
from pytorch_accelerated.errors import warn
from pytorch_accelerated.tracking import (
    EVALUATION_PREFIX,
    INTERMEDIATE_PREFIX,
    MetricRecord,
    RunHistory,
    best_of,
    is_number,
    records_of,
)

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_TEMPLATE = Path(__file__).with_name("report.template.html")
_GIT = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
_GIT_SECONDS = 2.0
# Between epochs at most this part of the time goes into writing.
_SHARE_OF_TIME = 0.02

# What tells apart the curves of one chart.
_ROLE = re.compile(rf"^{INTERMEDIATE_PREFIX}|(?<![A-Za-z])(train|eval)_|_epoch$")
_ROLES = ("intermediate", "train", "eval")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 200, 66, 16, 8, 20
_MAX_POINTS = 500


class ReportCallback(TrainerCallback):
    """Writes a page about each training run: a single file, to be read in a browser.

    It has a chart of each metric, a table of the epochs, what the run was asked to do,
    where it ran, the commit of the code, where checkpoints are, and the warnings that
    were given meanwhile. It needs no network, and fits phones and dark screens.

    It is written after epochs, at most a fiftieth of the time, and at the end, also of
    a run that fails. ``evaluate()`` after the run adds its metrics. If the page cannot
    be written, that is warned of once, and the run goes on.

    Args:
        path: The file. Missing folders are created. Further runs of the trainer have a
            number at the end of the name.
        title: The title of the page, by default made of the name of the model.
    """

    called_first: tuple[str, ...] = ("on_training_run_start",)
    called_last: tuple[str, ...] = (
        "on_training_run_epoch_end",
        "on_training_run_end",
        "on_evaluation_run_end",
    )
    may_stop_alone = False

    path: str | os.PathLike[str] = "report.html"
    title: str | None = None

    _number: int = 0
    _status: str = ""
    _environment: Mapping[str, Any] = MappingProxyType({})
    _paces: Mapping[int, dict[str, str]] = MappingProxyType({})
    _warnings: Mapping[str, int] = MappingProxyType({})
    _shows_warnings: tuple[Any, Any] | None = None
    _next_write: float = 0.0
    _has_failed: bool = False

    def __init__(
        self, path: str | os.PathLike[str] = "report.html", title: str | None = None
    ) -> None:
        self.path, self.title = path, title

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        self._stop_listening()
        self._number += 1
        self._paces, self._warnings = {}, {}
        self._environment, self._has_failed = {}, False

    # ------------------------------------------------------------------- the events

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen for warnings, and write the page."""
        self._status = "running"
        if trainer._accelerator.is_main_process:
            self._listen()
        self._write(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Note the pace, and write the page unless that would take too much time."""
        run, epoch = trainer._run, trainer.run_history.current_epoch
        pace = {
            "samples/s": rate(run.samples_per_second),
            "time": duration(run.pace.elapsed),
        }
        self._paces = {**self._paces, epoch: pace}
        if time.monotonic() >= self._next_write:
            self._write(trainer)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Write the page."""
        stopped_by = trainer._run.stopped_by
        if getattr(stopped_by, "reaches_caller", False):
            self._status = f"failed: {type(stopped_by).__name__}: {stopped_by}"
        elif self._status == "running":  # and no other error has ended the run
            early = "interrupted" if trainer.interrupted else "stopped early"
            self._status = early if stopped_by else "finished"
        self._stop_listening()
        self._write(trainer)

    @event_with_data
    def on_exception(
        self, trainer: Trainer, *, exception: Any = None, **kwargs: Any
    ) -> None:
        """Write the page."""
        if trainer._run.is_training:
            self._status = f"failed: {type(exception).__name__}: {exception}"
            self._stop_listening()
            self._write(trainer)

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Write the page again, if it is of a training run that is over."""
        if self._number and not trainer._run.training.is_under_way:
            self._write(trainer)

    # ------------------------------------------------------------------- the warnings

    def _listen(self) -> None:
        """Note the warnings that are shown, and let them be shown as before."""
        show = warnings.showwarning

        def note_and_show(
            message: Any, category: Any, *args: Any, **kwargs: Any
        ) -> None:
            text = f"{category.__name__}: {message}"
            if self._shows_warnings and self._shows_warnings[0] is note_and_show:
                number = self._warnings.get(text, 0) + 1
                self._warnings = {**self._warnings, text: number}
            show(message, category, *args, **kwargs)

        warnings.showwarning = note_and_show
        self._shows_warnings = note_and_show, show

    def _stop_listening(self) -> None:
        if self._shows_warnings is not None:
            ours, before = self._shows_warnings
            if warnings.showwarning is ours:
                warnings.showwarning = before
            self._shows_warnings = None

    # ------------------------------------------------------------------------ writing

    def _write(self, trainer: Trainer) -> None:
        """Write the page beside its place, and move it there."""
        if not trainer._accelerator.is_main_process:
            return
        start = time.monotonic()
        try:
            self._environment = self._environment or environment_of(trainer)
            path, page = absolute(self.path), self._page(trainer)
            number = f"_{self._number}" if self._number > 1 else ""
            with replaced(path.with_stem(path.stem + number)) as file:
                file.write(page.encode())
        except Exception as error:
            if not self._has_failed:
                self._has_failed = True
                warn(f"The report of the run could not be written: {error}")
        now = time.monotonic()
        self._next_write = now + (now - start) / _SHARE_OF_TIME

    def _page(self, trainer: Trainer) -> str:
        settings, history = dict(flat(settings_of(trainer))), trainer.run_history
        settings["callbacks"] = ", ".join(trainer.callback_handler.callback_list)
        progress, names = trainer._run.training.progress, history.get_metric_names()
        evaluated = [name for name in names if EVALUATION_PREFIX in name]
        values = (list(history.get_metric_values(name))[-1] for name in evaluated)
        sections = {
            "Curves": "".join(_charts(history)),
            "Evaluation": _facts(zip(evaluated, map(brief, values), strict=True)),
            "Epochs": _epochs(history, self._paces),
            "Warnings": _facts((f"{n} x", text) for text, n in self._warnings.items()),
            "Checkpoints": _facts(_checkpoints(trainer)),
            "Configuration": _facts(settings.items()),
            "Environment": _facts(self._environment.items()),
        }
        total = settings.get("max_num_train_steps", "?")
        return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
            title=escape(self.title or f"Training of {settings['model']}"),
            kind=self._status.partition(":")[0],
            status=escape(self._status),
            counts=f"after {progress.num_updates} of {total} updates, with "
            f"{progress.num_samples_seen:,} samples; "
            f"written {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}",
            sections="\n".join(
                f"<section class={name.lower()}><h2>{name}</h2>{content}</section>"
                for name, content in sections.items()
                if content
            ),
        )


def environment_of(trainer: Trainer) -> dict[str, Any]:
    """Return where a run takes place: versions, machine, and the commit of the code."""
    device, commit = trainer.device, "unknown"
    with suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(
            _GIT, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        ).stdout.strip()
    is_gpu = device.type == "cuda"
    return {
        "command": " ".join(sys.argv),
        "git commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "pytorch-accelerated": sys.modules["pytorch_accelerated"].__version__,
        "system": platform.platform(),
        "processor": f"{platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch",
        "device": torch.cuda.get_device_name(device) if is_gpu else device,
        "processes": trainer._accelerator.num_processes,
    }


def _checkpoints(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Yield where the callbacks have saved, and the last training state."""
    for callback in trainer.callback_handler:
        for attribute in ("save_path", "save_dir"):
            path = getattr(callback, attribute, None)
            if path is not None and os.path.exists(path):
                yield type(callback).__name__, os.path.abspath(path)
    if trainer.last_checkpoint is not None:
        yield "last training state", trainer.last_checkpoint


def _facts(facts: Iterable[tuple[str, Any]]) -> str:
    """Return names and values as a table; nothing if there are none."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in facts
    )
    return rows and f"<table class=facts>{rows}</table>"


def _records(history: RunHistory, name: str) -> list[MetricRecord]:
    """Return the numbers of a metric; where no step is known, they are counted."""
    records = [r for r in records_of(history, name) if is_number(r.value)]
    return [
        record if record.step is not None else record._replace(epoch=n, step=n)
        for n, record in enumerate(records, 1)
    ]


def _epochs(history: RunHistory, paces: Mapping[int, Mapping[str, str]]) -> str:
    """Return a table with a row for each epoch."""
    rows: dict[int, dict[str, Any]] = defaultdict(dict)
    best, table = {}, Table()
    for name in history.get_metric_names():
        records = [r for r in _records(history, name) if r.epoch is not None]
        if not name.startswith(INTERMEDIATE_PREFIX):
            best[name] = best_of(records)
            for record in records:
                rows[record.epoch or 1][name] = record
    labels = labels_of(dict.fromkeys(best))
    for epoch, records_by_name in sorted(rows.items()):
        row = {name: r for name, r in records_by_name.items() if name in labels}
        cells = {labels[name]: record.value for name, record in row.items()}
        stars = [labels[name] for name, record in row.items() if record is best[name]]
        table.add({"epoch": str(epoch), **cells, **paces.get(epoch, {})}, stars)
    return table.to_html() if rows else ""


def _charts(history: RunHistory) -> Iterator[str]:
    """Yield a chart for each metric, with those of training and evaluation in one."""
    groups: dict[str, list[list[MetricRecord]]] = defaultdict(list)
    names = history.get_metric_names()
    for name in sorted(names, key=lambda n: ("loss" not in n, "train" not in n)):
        records = _records(history, name)
        if records and EVALUATION_PREFIX not in name:
            groups[_ROLE.sub("", name)].append(records)
    for title, curves in groups.items():
        yield chart(title, curves)


def chart(title: str, curves: Iterable[Sequence[MetricRecord]]) -> str:
    """Return curves of metrics over the updates, as a figure of HTML.

    Args:
        title: What they are of.
        curves: For each metric its records. There are gaps where a value is no finite
            number.
    """
    finite = [r for records in curves for r in records if _is_finite(r)]
    left, right = _range_of([record.step or 0 for record in finite])
    low, high = _range_of([record.value for record in finite])
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return round(_LEFT + across * width, 1), round(_TOP + (1 - up) * height, 1)

    drawing, legend = "", ""
    for share in (0, 0.5, 1) if finite else ():
        x, y = left + share * (right - left), low + share * (high - low)
        across, down = place(x, y)
        drawing += f'<path class=grid d="M{_LEFT} {down}h{width}"/>'
        drawing += f"<text x={_LEFT - 6} y={down} dy=4 class=y>{y:.3g}</text>"
        drawing += f"<text x={across} y={_HEIGHT - 4} class=x>{x:,.0f}</text>"
    for records in curves:
        name, last, path = records[0].name, records[-1], ""
        role = next((role for role in _ROLES if role in name), "other")
        some = [*records[: -1 : len(records) // _MAX_POINTS + 1], last]
        for is_drawn, stretch in groupby(some, _is_finite):
            if is_drawn:
                places = [place(record.step or 0, record.value) for record in stretch]
                # A line of no length is a dot, for a value between two gaps.
                path += "M{} {}h0".format(*places[0])
                path += "".join(f"L{across} {down}" for across, down in places[1:])
        best = best_of(records)
        drawing += f'<path class="curve {role}" d="{path}"/>'
        legend += f"<div><i class={role}></i>{escape(name)} <b>{brief(last.value)}</b>"
        legend += f" best {brief(best.value)}" if best else ""
        legend += f" at {best.step:,}" if best and best.step is not None else ""
        legend += "</div>"
    return (
        f"<figure><h3>{escape(title)}</h3><svg viewBox='0 0 {_WIDTH} {_HEIGHT}' "
        f"role=img aria-label='{escape(title)}'>{drawing}</svg>"
        f"<figcaption>{legend}</figcaption></figure>"
    )


def _is_finite(record: MetricRecord) -> bool:
    return math.isfinite(record.value)


def _range_of(numbers: Sequence[float]) -> tuple[float, float]:
    """Return the least and the greatest number, or what is around a single one."""
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    room = abs(low) / 10 or 1.0
    return (low, high) if high > low else (low - room, high + room)
