"""A model with one weight, whose losses can be worked out by hand, and small data.

With inputs of 1 and targets of 0 the loss is the square of the weight and its gradient
twice the weight. A learning rate of 0.25 then halves the weight at each update: after k
updates from 1 it is 0.5 ** k, and the loss 0.25 ** k.
"""

import signal

import hypothesis
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from pytorch_accelerated.tracking import RunHistory
from pytorch_accelerated.trainer import Trainer

# Machines are shared: how long an example takes says nothing.
hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard():
    """Also by a suite in the background of a shell, which lets it be ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class OneByOne(Dataset):
    """The samples of another dataset, which can only be fetched one at a time."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


@pytest.fixture
def samples():
    """Create a dataset of inputs of 1 and targets of 0."""

    def create(count):
        return TensorDataset(torch.ones(count, 1), torch.zeros(count, 1))

    return create


@pytest.fixture
def create_trainer():
    """Create a trainer of the model with one weight, or of another one."""

    def create(callbacks=(), *, lr=0.25, model=None, trainer_class=Trainer, **kwargs):
        if model is None:
            model = nn.Linear(1, 1, bias=False)
            nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        return trainer_class(model, nn.MSELoss(), optimizer, callbacks, **kwargs)

    return create


@pytest.fixture
def noise():
    """Create a dataset of random inputs (6 features) and classes (3)."""

    def create(count):
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(count, 6, generator=generator)
        return TensorDataset(inputs, torch.randint(3, (count,), generator=generator))

    return create


@pytest.fixture
def create_classifier():
    """Create a small network for the random data, always with the same weights."""

    def create(dropout=0.0):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return nn.Sequential(
                nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)
            )

    return create


@pytest.fixture
def one_by_one():
    """Make the samples of a dataset available only one at a time."""
    return OneByOne


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
