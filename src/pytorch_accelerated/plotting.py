"""Drawing what runs have recorded, with matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pytorch_accelerated.tracking import MetricRecord

    # The values of one metric of one run.
    Line = list[MetricRecord]

# The rest of a name is that of the axes.
_PARTS = re.compile(r"(^|_)(ema_model|intermediate|eval|evaluation|train)(?=_)|_epoch$")

_MOST_COLUMNS = 3
_MOST_MARKS = 60


def draw(
    runs: Mapping[str, Sequence[MetricRecord]], metrics: Sequence[str] = ()
) -> Figure:
    """Draw the metrics of runs, those of one kind in the same axes.

    Args:
        runs: The records of each run, which are numbers, by its name.
        metrics: Names of metrics or of axes; by default everything is drawn.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw, or nothing of a given name.
    """
    with _matplotlib_needed():
        from matplotlib.figure import Figure

    class Shown(Figure):
        """A figure that a notebook shows, without any global state of pyplot's."""

        def _repr_png_(self) -> bytes:
            self.savefig(image := io.BytesIO(), format="png")
            return image.getvalue()

    panels = _panels_of(runs, metrics)
    num_columns = min(len(panels), _MOST_COLUMNS)
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Shown(figsize=(4.8 * num_columns, 3.4 * num_rows), layout="constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(num_rows, num_columns, place, title=title)
        axes.grid(alpha=0.3)
        x_label = _x_of(lines)
        axes.set_xlabel("update" if x_label == "step" else x_label)
        axes.locator_params("x", integer=True, min_n_ticks=1)
        for (run, name), records in lines.items():
            is_long, is_point = len(records) > _MOST_MARKS, "evaluation_" in name
            style = "--" if "train" in name else ":" if "intermediate" in name else "-"
            axes.plot(
                [getattr(each, x_label, n) for n, each in enumerate(records, 1)],
                [record.value for record in records],
                linestyle="" if is_point else style,
                marker="x" if is_point else "" if is_long else ".",
                color=f"C{list(runs).index(run)}" if len(runs) > 1 else None,
                label=f"{run} {name}".strip(),
            )
        axes.legend(fontsize="small")
    return figure


def new_axes() -> Axes:
    """Return empty axes, in a figure of pyplot's.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    with _matplotlib_needed():
        from matplotlib import pyplot
    return pyplot.subplots()[1]


@contextmanager
def _matplotlib_needed() -> Iterator[None]:
    """Let an import that fails say what to install."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            "Plots are drawn with matplotlib: pip install 'pytorch-accelerated[plot]'."
        ) from error


def _panels_of(
    runs: Mapping[str, Sequence[MetricRecord]], metrics: Sequence[str]
) -> dict[str, dict[tuple[str, str], Line]]:
    """Return what is in each axes, by its title: a line for a run and a metric."""
    panels: dict[str, dict[tuple[str, str], Line]] = {}
    known: dict[str, None] = {}
    for run, records in runs.items():
        for record in records:
            title = _PARTS.sub("", record.name).strip("_") or record.name
            known.update({title: None, record.name: None})
            if not metrics or title in metrics or record.name in metrics:
                lines = panels.setdefault(title, {})
                lines.setdefault((run, record.name), []).append(record)
    unknown = [metric for metric in metrics if metric not in known]
    if unknown or not known:
        raise ValueError(
            f"There is nothing to plot: {', '.join(unknown) or 'a number'} has not "
            f"been recorded; recorded so far: {', '.join(known) or 'nothing'}. Metrics "
            "appear once the epoch that records them has ended."
        )
    return panels


def _x_of(lines: Mapping[tuple[str, str], Line]) -> str:
    """Return the field of the records that tells best where to draw them."""
    epochs = [[record.epoch for record in line] for line in lines.values()]
    if all(_rises(line) and len(line) == len({*line}) for line in epochs):
        return "epoch"
    steps = [[record.step for record in line] for line in lines.values()]
    if all(map(_rises, steps)) and any(line[-1] for line in steps):
        return "step"
    return "number"  # a script recorded them itself, or runs follow each other


def _rises(places: list[int | None]) -> bool:
    known = [place for place in places if place is not None]
    return len(known) == len(places) and known == sorted(known)
