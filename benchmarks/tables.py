"""Figures from measurements, tables from figures, and the page that shows them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plan import BASELINE, OURS, WORKLOADS

# More columns than this do not fit on a page.
COLUMNS = 6


def summarise(
    answers: dict[int, dict[str, Any]], by_hand: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """Return the median ratio to the loop by hand, its quarters, and the rest.

    Args:
        answers: What a contender was measured at, by the number of the round.
        by_hand: The same of the loop by hand.
    """
    for answer in answers.values():
        if "error" in answer:
            return answer
    ratios = [
        answer["seconds"] / by_hand[number]["seconds"]
        for number, answer in answers.items()
    ]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    median = statistics.median(answer["seconds"] for answer in answers.values())
    steps = next(iter(answers.values()))["steps"]
    peaks = [answer.get("peak_bytes") for answer in answers.values()]
    return {
        "ratio": statistics.median(ratios),
        "quarters": [low, high],
        "seconds": median,
        "microseconds_a_step": median / steps * 1e6,
        "difference": max(answer["difference"] for answer in answers.values()),
        "ratios": ratios,
        "peak_bytes": None if None in peaks else statistics.median(peaks),
    }


class Notes:
    """What is to be said below a table, each thing once."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, str], list[str]] = {}

    def add(self, name: str, workload: str, text: str) -> None:
        """Add what is to be said of a contender at a workload."""
        self._places.setdefault((name, text), []).append(f"({workload})")

    def lines(self) -> list[str]:
        """Return the notes as a list in Markdown."""
        return [
            f"- {name} {', '.join(places)}: {text}"
            for (name, text), places in self._places.items()
        ]


def create_table(results: dict[str, Any]) -> str:
    """Return the times, compared with the loop by hand, as tables in Markdown."""
    notes = Notes()

    def cell(name: str, workload: str, figures: dict[str, Any]) -> str:
        low, high = figures["quarters"]
        text = f"{figures['ratio']:.2f} ({low:.2f} to {high:.2f})"
        if figures["difference"] > WORKLOADS[workload].tolerance:
            text += " \\*"
            notes.add(
                name,
                workload,
                "\\* ends with other parameters or results than the loop by hand; the "
                f"largest difference is {figures['difference']:.1e}",
            )
        return text

    def last_cell(workload: str, figures: dict[str, Any]) -> str:
        if WORKLOADS[workload].in_whole_processes:
            return f"{figures['seconds']:.2f} s"
        return f"{figures['microseconds_a_step']:,.0f} µs"

    workloads = [name for name in results["workloads"] if WORKLOADS[name].has_time]
    rows = _rows(results, workloads, cell, notes)
    tables = _split(
        workloads, rows, ("*by hand: a process or a step*", last_cell), results
    )
    return "\n".join([_introduction(results), "", *tables, *notes.lines()])


def create_memory_table(results: dict[str, Any]) -> str:
    """Return the peak memory, compared with the loop by hand, as a table in Markdown.

    It is empty if no memory was measured.
    """

    def cell(name: str, workload: str, figures: dict[str, Any]) -> str:
        by_hand = results["workloads"][workload][BASELINE]["peak_bytes"]
        return f"{figures['peak_bytes'] / by_hand:.3f}"

    def last_cell(workload: str, figures: dict[str, Any]) -> str:
        return f"{figures['peak_bytes'] / 1e6:,.1f} MB"

    workloads = [
        workload
        for workload, figures in results["workloads"].items()
        if WORKLOADS[workload].has_memory and figures[BASELINE].get("peak_bytes")
    ]
    notes = Notes()
    rows = _rows(results, workloads, cell, notes)
    tables = _split(workloads, rows, ("*by hand*", last_cell), results)
    return "\n".join([*tables, *notes.lines()]).rstrip()


def _rows(
    results: dict[str, Any],
    workloads: list[str],
    cell: Callable[[str, str, dict[str, Any]], str],
    notes: Notes,
) -> dict[str, list[str]]:
    """Return the cells of each contender; what was not measured is "-" and noted."""
    rows: dict[str, list[str]] = {}
    for name in results["contenders"]:
        rows[name] = []
        for workload in workloads:
            figures = results["workloads"][workload].get(name, {})
            error = results["skipped"].get(name) or figures.get("error")
            if error:
                notes.add(name, workload, error)
            text = "-" if error else cell(name, workload, figures)
            is_ours = name == OURS and not error
            rows[name].append(f"**{text}**" if is_ours else text)
    return rows


def _split(
    workloads: list[str],
    rows: dict[str, list[str]],
    last: tuple[str, Callable[[str, dict[str, Any]], str]],
    results: dict[str, Any],
) -> list[str]:
    """Return the lines of tables that are not too wide, each followed by a gap."""
    title, last_cell = last
    lines = []
    for first in range(0, len(workloads), COLUMNS):
        shown = slice(first, first + COLUMNS)
        part = workloads[shown]
        last_cells = [
            last_cell(workload, results["workloads"][workload][BASELINE])
            for workload in part
        ]
        lines += [
            _line("", [f"({workload})" for workload in part]),
            "|---" * (len(part) + 1) + "|",
            *(_line(name, cells[shown]) for name, cells in rows.items()),
            _line(title, last_cells),
            "",
        ]
    return lines


def _line(title: str, cells: list[str]) -> str:
    return f"| {title} | " + " | ".join(cells) + " |"


def _introduction(results: dict[str, Any]) -> str:
    rounds = sorted({WORKLOADS[w].rounds for w in results["workloads"]})
    rounds = [results["rounds"]] if results["rounds"] else rounds
    return (
        f"{results['date']}, torch {results['torch']}, {results['device']}, "
        f"{results['machine']}, Python {results['python']}, "
        f"{results['minutes']:.0f} minutes: the median of up to {rounds[-1]} rounds, "
        "with the quarters around it."
    )


def write_between_marks(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of this name on a page.

    Raises:
        ValueError: If the page has no such marks.
    """
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    contents = page.read_text(encoding="utf-8")
    before, found_start, rest = contents.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise ValueError(f"{page} needs the lines {start} and {end}, in this order.")
    page.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
