"""The toys of ``toys.py`` as fixtures, and what all tests need."""

import signal
import sys
from datetime import timedelta
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import nn

from pytorch_accelerated.tracking import RunHistory

sys.path.insert(0, str(Path(__file__).parent))

import toys

# Machines are shared: how long an example takes says nothing.
hypothesis.settings.register_profile(
    "unhurried",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard():
    """Also by a suite in the background of a shell, which lets it be ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def samples():
    """Create a dataset of inputs of 1 and targets of 0."""
    return toys.ones


@pytest.fixture
def create_trainer():
    """Create a trainer of the model with one weight, or of another one."""
    return toys.create_trainer


@pytest.fixture
def noise():
    """Create a dataset of random inputs (6 features) and classes (3)."""
    return toys.noise


@pytest.fixture
def create_classifier():
    """Create a small network for the random data, always with the same weights."""

    def create(dropout=0.0):
        return toys.seeded(
            lambda: nn.Sequential(
                nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)
            )
        )

    return create


@pytest.fixture
def one_by_one():
    """Make the samples of a dataset available only one at a time."""
    return toys.OneByOne


class OwnHistory(RunHistory):
    """Has the methods that the published version asked for, and no other."""

    def __init__(self):
        self.metrics = {}
        self.epoch = 1
        self.prefix = ""

    def get_metric_names(self):
        return self.metrics.keys()

    def get_metric_values(self, name):
        return self.metrics[name]

    def get_latest_metric(self, name):
        return self.metrics[name][-1]

    def set_metric_name_prefix(self, prefix=""):
        self.prefix = prefix

    @property
    def metric_name_prefix(self):
        return self.prefix

    def update_metric(self, name, value):
        self.metrics.setdefault(self.prefix + name, []).append(value)

    def delete_metric(self, name):
        del self.metrics[name]

    @property
    def current_epoch(self):
        return self.epoch

    def _increment_epoch(self):
        self.epoch += 1

    def reset(self):
        self.metrics = {}
        self.epoch = 1


@pytest.fixture
def own_history():
    """Return a history that a user has written for 0.1.61."""
    return OwnHistory


@pytest.fixture
def process_group(tmp_path):
    """A job of one process."""
    timeout = timedelta(seconds=77)
    torch.distributed.init_process_group(
        "gloo", f"file://{tmp_path}/store", timeout, world_size=1, rank=0
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()
