"""Counts the trials of each fault, for the table in docs/reliability.md."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parent))

# A release runs more trials than a change does.
TRIALS_FACTOR = float(os.environ.get("FAULT_TRIALS", "1"))
# Where to write the table, if anywhere.
TABLE_FILE = os.environ.get("FAULT_TABLE")


@pytest.fixture(autouse=True)
def _fresh_accelerator_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def _warm_accelerate():
    """Let Accelerate import what it imports late, once, before anything is forked."""
    Accelerator(cpu=True)


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
    fault = request.node.get_closest_marker("fault")
    title = fault.args[0] if fault else request.node.name
    request.node.user_properties.append(
        ("fault", (title, collected.number, len(collected.failures)))
    )
    assert collected.number > 0
    assert not collected.failures, "\n".join(collected.failures[:5])
