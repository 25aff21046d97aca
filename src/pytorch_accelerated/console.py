"""How a run looks: rows of metrics in columns, for a terminal, a file or a notebook.

Nothing here knows of trainers: a :class:`Table` is given rows and returns text.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from html import escape
from typing import Any

from pytorch_accelerated.tracking import (
    EVALUATION_PREFIX,
    INTERMEDIATE_PREFIX,
    is_number,
)

# Columns that are not metrics, and their least widths.
_AROUND = {"epoch": 5, "lr": 9, "samples/s": 9, "time": 5, "ETA": 5}
_WIDTH_OF_NUMBER = 9  # 0.0001234, 1.234e-05
_LONGEST_LABEL = 24

_BOLD, _GREEN, _PLAIN = "\033[1m", "\033[1;32m", "\033[0m"


class Table:
    """Rows of metrics in columns, the epoch first, the times last.

    The best value of a metric so far is marked with a star. Metrics that do not fit,
    names that are long and values that are no numbers follow below their row, as
    ``name=value``. When columns come or grow, the header is written again.

    Args:
        expected: The metrics that are to come, and which have their columns from the
            start.
        epoch_width: Characters of the longest entry in the first column.
    """

    def __init__(self, expected: Iterable[str] = (), epoch_width: int = 0) -> None:
        self._widths = {**_AROUND, "epoch": max(_AROUND["epoch"], epoch_width)}
        self._rows: list[dict[str, str]] = []
        self._header = ""
        for name in expected:
            self._make_room(name)

    def add(self, row: Mapping[str, Any], best: Collection[str] = ()) -> None:
        """Add a row.

        Args:
            row: The values of metrics by their labels, and of ``epoch``, ``lr``,
                ``samples/s``, ``time`` and ``ETA``, each of which may be missing.
            best: The labels of those that are the best so far.
        """
        for name, value in row.items():
            if name in _AROUND or is_number(value):
                self._make_room(name, brief(value))
        self._rows.append({n: brief(row[n]) + "*" * (n in best) for n in row})

    def lines(self, width: int, *, is_styled: bool = False) -> list[str]:
        """Return the last row, and the header before it if it has changed.

        Args:
            width: Characters of a line.
            is_styled: Whether the header is bold and the best values are green.
        """
        row, widths = self._rows[-1], self._widths
        columns = self._columns(width)
        header = "  ".join(name.rjust(widths[name]) for name in columns)
        cells = [(widths[name], row.get(name, "")) for name in columns]
        # The star of one column has its place before the next one.
        texts = [t.rjust(w + t.endswith("*")).ljust(w + 1) for w, t in cells]
        lines = [" ".join(texts).rstrip()]
        left = row.keys() - columns - _AROUND.keys()  # these are not worth a line
        if rest := [f"{n}={text}" for n, text in row.items() if text and n in left]:
            lines += _grid(rest, width)
        if is_styled:
            lines = [
                re.sub(r"\S+\*", rf"{_GREEN}\g<0>{_PLAIN}", line) for line in lines
            ]
        if header != self._header:
            self._header = header
            lines.insert(0, f"{_BOLD}{header}{_PLAIN}" if is_styled else header)
        return lines

    def to_html(self) -> str:
        """Return all rows as a table of HTML, with all columns that have an entry."""
        used = {name: "" for row in self._rows for name in row if row[name]}
        names = [n for n in self._in_order({**self._widths, **used}) if n in used]
        lines = ["".join(f"<th>{escape(name)}&nbsp;</th>" for name in names)]
        for row in self._rows:
            cells = [escape(row.get(name, "")) for name in names]
            bold = [f"<b>{c}</b>" if c.endswith("*") else f"{c}&nbsp;" for c in cells]
            lines.append("".join(f"<td>{cell}</td>" for cell in bold))
        style = "text-align: right; font-family: monospace"
        rows = "".join(f"<tr>{line}</tr>" for line in lines)
        return (
            f'<div style="overflow-x: auto"><table style="{style}">{rows}</table></div>'
        )

    def _make_room(self, name: str, text: str = "") -> None:
        if len(name) <= _LONGEST_LABEL:
            width = self._widths.get(name, _WIDTH_OF_NUMBER)
            self._widths[name] = max(width, len(name), len(text))

    def _columns(self, width: int) -> list[str]:
        """Return those that fit, by their importance, in the order of the table."""
        metrics = [name for name in self._widths if name not in _AROUND]
        ranked = [*metrics[:2], "time", "ETA", *metrics[2:4], "lr", "samples/s"]
        chosen, left = {"epoch"}, width - self._widths["epoch"]
        for name in (*ranked, *metrics[4:]):
            if left > self._widths[name] + 1:
                chosen.add(name)
                left -= self._widths[name] + 2
        return [name for name in self._in_order(self._widths) if name in chosen]

    @staticmethod
    def _in_order(names: Iterable[str]) -> list[str]:
        metrics = [name for name in names if name not in _AROUND]
        return ["epoch", *metrics, *list(_AROUND)[1:]]


def labels_of(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the labels of the metrics that are shown, by their names.

    They lack what the place in the table says already, so that evaluations amid epochs
    and at their end share their columns. The numbers of a dictionary are metrics of
    their own, so it is left out; so is the last mean of an interval of training, where
    that of the epoch is there.
    """
    metrics = {
        name: value
        for name, value in metrics.items()
        if not isinstance(value, Mapping)
        and not (name.startswith("train_") and f"{name}_epoch" in metrics)
    }
    labels: dict[str, str] = {}
    for name in metrics:
        label = name.removesuffix("_epoch")
        for prefix in (INTERMEDIATE_PREFIX, EVALUATION_PREFIX):
            label = label.replace(prefix, "", 1)
        taken = {*labels.values(), *_AROUND}
        if label in taken.union(metrics.keys() - {name}):
            label = name
        while label in taken:
            label += "_"
        labels[name] = label
    return labels


def brief(value: Any) -> str:
    """Return a value for a line: four digits of a number, and not all of an array."""
    if is_number(value):
        number = value.item() if hasattr(value, "item") else value
        if isinstance(number, int) and abs(number) < 1_000_000:
            return str(int(number))
        with suppress(OverflowError):
            return f"{number:#.4g}".rstrip(".")
    if getattr(value, "shape", ()):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if hasattr(value, "__len__") and not isinstance(value, str):
        with suppress(TypeError):
            return f"{type(value).__name__} of {len(value)}"
    return textwrap.shorten(str(value), 40, placeholder=" ...")


def rate(number: float) -> str:
    """Return how often something happens in a second: "1,234", "12.3" or "0.05"."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """Return a time as "0.05s", "12.3s", "1:05" or "2:01:05"."""
    if seconds < 0.995:
        return f"{seconds:.2f}s"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def in_lines(title: str, values: Mapping[str, Any], width: int) -> str:
    """Return names and values behind a title, in as many lines as they need."""
    text = "  ".join([title, *(f"{n}={brief(value)}" for n, value in values.items())])
    return textwrap.fill(
        text,
        max(width, 20),
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _grid(texts: list[str], width: int) -> list[str]:
    """Return lines of texts, each below one of the line before."""
    longest = max(len(text.rstrip("*")) for text in texts) + 2
    num = max(1, (width - 3) // longest)
    starts = range(0, len(texts), num)
    rows = ["".join(t.ljust(longest) for t in texts[i : i + num]) for i in starts]
    return [f"    {row}".rstrip() for row in rows]
