import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data._utils.collate import default_collate_fn_map

from pytorch_accelerated.data import loaders
from pytorch_accelerated.data.fetching import InMemoryDataset
from pytorch_accelerated.data.loaders import PlannedLoader

CPU = torch.device("cpu")


# --- planned loaders


class Augmented(Dataset):
    """Adds random numbers of three generators to its samples."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(())


def planned(dataset, seed=3, **kwargs):
    arguments = {"batch_size": 4, "shuffle": True, **kwargs}
    return PlannedLoader(DataLoader(dataset, **arguments), CPU, seed)


def batches_of(loader, epoch, first_step=0):
    loader.set_epoch(epoch, first_step)
    return list(loader)


def assert_same_batches(some, others):
    assert len(some) == len(others)
    for batch, other in zip(some, others, strict=True):
        assert all(map(torch.equal, batch, other))


def test_an_epoch_can_be_started_at_any_batch():
    loader = planned(Augmented(13))
    whole = batches_of(loader, 5)

    for first_step in range(len(whole) + 1):
        rest = batches_of(planned(Augmented(13)), 5, first_step)
        assert_same_batches(whole[first_step:], rest)


def test_batches_that_are_left_out_are_not_loaded():
    loaded = []

    class Notes(Augmented):
        def __getitem__(self, index):
            loaded.append(index)
            return index

    loader = planned(Notes(12), shuffle=False)
    batches_of(loader, 1, first_step=2)

    assert loaded == [8, 9, 10, 11]


def test_random_states_are_put_back_also_where_a_sample_cannot_be_loaded():
    class Broken(Augmented):
        def __getitem__(self, index):
            random.random()
            raise OSError("no such file")

    before = random.getstate()
    with pytest.raises(OSError, match="no such file"):
        batches_of(planned(Broken(3)), 1)

    assert random.getstate() == before


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(torch.ones(3)), collate_fn=list),
        DataLoader(type("Own", (TensorDataset,), {})(torch.ones(3))),
        DataLoader(type("Own", (Subset,), {})(TensorDataset(torch.ones(3)), [0])),
        DataLoader(TensorDataset(torch.nn.Parameter(torch.ones(3)))),
    ],
)
def test_what_may_do_something_of_its_own_is_not_taken_for_data_in_memory(loader):
    assert InMemoryDataset.of(loader) is None


def test_a_planned_loader_has_the_attributes_of_the_loader():
    """Scripts read .dataset, .device and len() of the trainer's loaders."""
    dataset = Augmented(10)
    loader = planned(dataset)

    assert loader.dataset is dataset
    assert loader.device == CPU
    assert loader.batch_size == 4
    assert len(loader) == 3
    assert not hasattr(loader, "no_such_attribute")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, True),
        ({"shuffle": True}, True),
        ({"drop_last": True}, True),
        ({"sampler": RandomSampler(range(5), replacement=True)}, False),
        ({"sampler": RandomSampler(range(5), num_samples=3)}, False),
        ({"sampler": WeightedRandomSampler([1.0] * 5, 5)}, False),
        ({"sampler": [0, 1, 2]}, False),
        ({"batch_sampler": [[0, 1], [2]]}, False),
        ({"batch_sampler": BatchSampler([2, 0], 2, drop_last=False)}, False),
        ({"batch_size": None}, False),
        ({"shuffle": True, "generator": torch.Generator()}, False),
        ({"dataset": Stream()}, False),
    ],
)
def test_a_loader_with_a_sampler_of_the_user_is_not_plain(arguments, expected):
    loader = DataLoader(**{"dataset": range(5), **arguments})

    assert loaders.is_plain(loader) is expected


# --- arguments


def test_both_sampler_and_shuffle_of_the_user_are_left_for_torch_to_refuse():
    merged = loaders.merge_dl_kwargs(range(3), {}, {"sampler": [0], "shuffle": True})

    with pytest.raises(ValueError, match="mutually exclusive"):
        DataLoader(range(3), **merged)


# --- small things


def test_on_an_accelerator_one_batch_is_fetched_ahead():
    fetched = []

    def batches():
        for number in range(3):
            fetched.append(number)
            yield torch.ones(number)

    on_device = loaders.to_device(batches(), torch.device("meta"))
    assert fetched == []
    for length, ahead in ((0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2])):
        batch = next(on_device)
        assert (batch.device.type, batch.shape) == ("meta", (length,))
        assert fetched == ahead
    assert list(on_device) == []


MEMBERS = {
    "tensor": lambda number: torch.full((2, 3), number + 0.5),
    "label": torch.tensor,
    "bfloat16": lambda number: torch.ones(2, dtype=torch.bfloat16) * number,
    "parameter": lambda number: torch.nn.Parameter(torch.ones(2) * number),
    "array": lambda number: np.full(2, number),
    "int": int,
    "float": float,
    "text": str,
    "pair": lambda number: (torch.ones(2) * number, number),
    "list": lambda number: [torch.ones(1) * number],
    "mapping": lambda number: {"x": torch.ones(1) * number},
}
SAMPLES = {
    "tuple": tuple,
    "list": list,
    "mapping": lambda members: dict(enumerate(members)),
    "alone": lambda members: members[0],
}


class Made(Dataset):
    """Makes samples of some kind, whose members are of some kinds."""

    def __init__(self, length, sample, members):
        self.length = length
        self.sample, self.members = SAMPLES[sample], [MEMBERS[name] for name in members]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.sample([make(index) for make in self.members])


def equal(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return equal(list(one.items()), list(other.items()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@given(
    st.integers(1, 5),
    st.sampled_from(sorted(SAMPLES)),
    st.lists(st.sampled_from(sorted(MEMBERS)), min_size=1, max_size=3),
)
def test_batches_are_those_of_torch_whatever_the_samples_are(length, sample, members):
    dataset = Made(length, sample, members)
    (expected,) = DataLoader(dataset, batch_size=length)
    (batch,) = planned(dataset, batch_size=length, shuffle=False)
    assert equal(batch, expected)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.nested.nested_tensor([torch.ones(1)])


@pytest.mark.parametrize(
    "samples",
    [
        [(torch.ones(1), 1), (torch.ones(1),)],
        [(torch.ones(2), 1), (torch.ones(3), 1)],
        [(torch.ones(1), 1), (1, 1)],
        [(torch.ones(1), 1), None],
        [(object(), 1), (object(), 1)],
        [(torch.ones(1).to_sparse(), 1)] * 2,
        [(nested(), 1)] * 2,
    ],
)
def test_samples_that_do_not_fit_together_are_refused_as_by_torch(samples):
    with pytest.raises((RuntimeError, TypeError)) as expected:
        list(DataLoader(samples, batch_size=2))
    with pytest.raises(expected.type) as raised:
        list(planned(samples, batch_size=2, shuffle=False))
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("kind", [tuple, torch.Tensor])
@pytest.mark.parametrize(
    "dataset",
    [Made(2, "tuple", ["tensor", "int"]), TensorDataset(torch.ones(2), torch.ones(2))],
)
def test_what_the_user_has_told_torch_to_do_with_samples_is_done(
    monkeypatch, kind, dataset
):
    def as_they_are(samples, *, collate_fn_map):
        return ("as they are", list(samples))

    monkeypatch.setitem(default_collate_fn_map, kind, as_they_are)
    (expected,) = DataLoader(dataset, batch_size=2)
    loader = planned(dataset, batch_size=2, shuffle=False)
    (batch,) = loader
    assert "as they are" in str(batch)
    assert not loader.is_exact
    assert equal(batch, expected)
