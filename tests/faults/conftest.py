"""Counts the trials of each fault, for the table in docs/reliability.md."""

import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parent))

# A release runs more trials than a change does.
TRIALS_FACTOR = float(os.environ.get("FAULT_TRIALS", "1"))
# Where to write the table, if anywhere.
TABLE_FILE = os.environ.get("FAULT_TABLE")
START, END = "<!-- trials: start -->\n", "<!-- trials: end -->\n"


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(title): the row of the table of trials")


@pytest.fixture(autouse=True)
def _fresh_accelerator_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def _everything_is_imported(tmp_path_factory):
    """Train once, so that what is imported late need not be by each forked process."""
    from scenario import Scenario

    Scenario(num_epochs=1, num_samples=12).run(tmp_path_factory.mktemp("warm"))


class Trials:
    """Counts the trials of a test and collects what went wrong in them."""

    def __init__(self):
        self.number = 0
        self.failures = []

    @staticmethod
    def count(number):
        return max(1, round(number * TRIALS_FACTOR))

    def add(self, failure):
        """Count one trial; ``failure`` says what went wrong in it, if anything."""
        self.number += 1
        if failure:
            self.failures.append(f"trial {self.number}: {failure}")


@pytest.fixture
def trials(request):
    """Collects the trials of a test, which fails at its end if one of them did."""
    collected = Trials()
    yield collected
    if collected.number == 0 and request.node.was_skipped:
        return
    title = request.node.get_closest_marker("fault").args[0]
    request.node.user_properties.append(
        ("fault", (title, collected.number, len(collected.failures)))
    )
    assert collected.number > 0
    assert not collected.failures, "\n".join(collected.failures[:5])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.was_skipped = report.skipped
    return report


def pytest_terminal_summary(terminalreporter):
    rows = defaultdict(lambda: [0, 0])
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "teardown":
                continue
            for name, value in report.user_properties:
                if name == "fault":
                    title, number, failures = value
                    rows[title][0] += number
                    rows[title][1] += failures
    if not rows:
        return
    lines = ["| fault | trials | failures |", "|---|---:|---:|"]
    lines += [f"| {title} | {n} | {bad} |" for title, (n, bad) in sorted(rows.items())]
    terminalreporter.write_line("")
    for line in lines:
        terminalreporter.write_line(line)
    if TABLE_FILE:
        before, _, rest = Path(TABLE_FILE).read_text().partition(START)
        _, _, after = rest.partition(END)
        table = "\n".join(lines) + "\n"
        Path(TABLE_FILE).write_text(before + START + table + END + after)
