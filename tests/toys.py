"""A model with one weight, whose losses can be worked out by hand, and small data.

With inputs of 1 and targets of 0 the loss is the square of the weight and its gradient
twice the weight. A learning rate of 0.25 then halves the weight at each update: after k
updates from 1 it is 0.5 ** k, and the loss 0.25 ** k.
"""

import torch
from accelerate.tracking import GeneralTracker
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.trainer import Trainer


def ones(count, inputs=1.0):
    """Return samples of the same input, and targets of 0."""
    return TensorDataset(torch.full((count, 1), inputs), torch.zeros(count, 1))


def noise(count, num_features=6, seed=1):
    """Return samples of random inputs and of one of three classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, num_features, generator=generator)
    return TensorDataset(inputs, torch.randint(3, (count,), generator=generator))


class Numbers(Dataset):
    """Samples whose inputs are 0, 1, 2, ...; they are not in memory, and may grow."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([float(index)]), torch.zeros(1)


class OneByOne(Dataset):
    """The samples of another dataset, which can only be fetched one at a time."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


class Stream(IterableDataset):
    """The samples of a dataset one after the other; nobody knows how many."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return (self.dataset[index] for index in range(len(self.dataset)))


def one_weight(weight=1.0):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, weight)
    return model


def seeded(create, seed=2):
    """Create a model that has the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create()


def create_trainer(
    callbacks=(),
    *,
    lr=0.25,
    model=None,
    trainer_class=Trainer,
    loss_func=nn.MSELoss(),  # noqa: B008
    optimizer=None,
    **kwargs,
):
    """Create a trainer of the model with one weight, or of another one."""
    model = one_weight() if model is None else model
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    return trainer_class(model, loss_func, optimizer, callbacks, **kwargs)


class At(TrainerCallback):
    """Calls functions at events, with what these are sent."""

    def __init__(self, **functions):
        vars(self).update(functions)


class Keeps(TrainerCallback):
    """Keeps what a function reads at an event."""

    def __init__(self, event, read):
        self.kept, self.read = [], read
        setattr(self, event, self._keep)

    def _keep(self, trainer, **kwargs):
        self.kept.append(self.read(trainer, **kwargs))


class Sent(GeneralTracker):
    """A tracker that keeps what it is sent, and the step of it."""

    name, tracker, requires_logging_directory = "sent", None, False

    def __init__(self):
        super().__init__()
        self.sent = []

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.sent.append((step, values))

    def finish(self):
        pass


def overriding(base=Trainer, **methods):
    """Return a subclass of a class of trainers that overrides methods."""
    return type("Own", (base,), methods)
