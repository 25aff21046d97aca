import os
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from pytorch_accelerated import data, distributed, ema, utils
from pytorch_accelerated.data import loaders
from pytorch_accelerated.utils import (
    LIMIT_BATCHES_ENV_VAR,
    DataLoaderSlice,
    LimitBatches,
    remove_padding,
    worker_init_fn,
)


def test_utils_only_passes_on_what_lives_in_other_modules():
    homes = (data, distributed, ema)

    for name in utils.__all__:
        assert any(
            getattr(utils, name) is getattr(home, name, None) for home in homes
        ), name


# --- limits


def test_limit_batches_sets_and_restores_the_environment(monkeypatch):
    """Defect 38: nested limits failed, and the value of the user was deleted."""
    monkeypatch.delenv(LIMIT_BATCHES_ENV_VAR, raising=False)
    outer = LimitBatches(5)

    with outer, outer:
        assert outer.num_batches == 5
        with pytest.raises(RuntimeError), LimitBatches(2):
            raise RuntimeError(os.environ[LIMIT_BATCHES_ENV_VAR])
        assert loaders.batch_limit_from_environment() == 5
    assert LIMIT_BATCHES_ENV_VAR not in os.environ

    monkeypatch.setenv(LIMIT_BATCHES_ENV_VAR, "None")
    with outer:
        assert loaders.batch_limit_from_environment() == 5
    assert loaders.batch_limit_from_environment() is None
    assert os.environ[LIMIT_BATCHES_ENV_VAR] == "None"


def test_a_limit_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv(LIMIT_BATCHES_ENV_VAR, "few")
    with pytest.raises(ValueError, match=r"number of\s+batches or 'none', got 'few'"):
        loaders.batch_limit_from_environment()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


@pytest.mark.parametrize(
    ("dataset", "size", "expected"),
    [(range(10), 2, 2), (range(3), 5, 3), (Stream(), 2, 2)],
)
def test_a_slice_is_as_long_as_what_it_yields(dataset, size, expected):
    """Defect 38: the length of a slice was its size, however short the loader."""
    loader = DataLoaderSlice(DataLoader(dataset, batch_size=1), size)

    assert len(loader) == len(list(loader)) == expected
    assert len(list(loader)) == expected  # and again
    assert loader.slice_size == size


def test_a_slice_fetches_nothing_else_and_has_the_attributes_of_its_loader():
    """Defect 38: slices hid the sampler and the dataset."""
    fetched = []

    class Notes(list):
        def __getitem__(self, index):
            fetched.append(index)
            return super().__getitem__(index)

    loader = DataLoader(Notes(range(4)), batch_size=1)
    part = DataLoaderSlice(loader, 2)

    assert [batch.item() for batch in part] == fetched == [0, 1]
    assert part.dl is loader
    assert part.dataset is loader.dataset
    with pytest.raises(AttributeError, match="nothing"):
        part.nothing  # noqa: B018


# --- workers


def test_a_worker_is_seeded_from_what_torch_has_given_it():
    """Defect 11: it took a new seed from the operating system."""

    def numbers():
        with torch.random.fork_rng():
            torch.manual_seed(2**40 + 3)
            seed = worker_init_fn(0)
            return seed, random.random(), np.random.rand(), torch.rand(()).item()

    states = random.getstate(), np.random.get_state()
    first, second = numbers(), numbers()
    random.setstate(states[0])
    np.random.set_state(states[1])

    assert first == second
    assert first[0] == 3  # numpy takes 32 bits


# --- padding


@pytest.mark.parametrize("padding", [-2.0, 0.0, float("nan"), float("inf")])
def test_rows_of_padding_are_removed(padding):
    """Defect 53: padding with NaN was never removed."""
    rows = torch.tensor([[1.0, 2.0], [padding, padding], [padding, 3.0]])

    kept = remove_padding(rows, padding)

    torch.testing.assert_close(kept, rows[[0, 2]], equal_nan=True)
    assert remove_padding(rows[:0], padding).shape == (0, 2)
    assert remove_padding(torch.tensor([1.0, padding]), padding).shape == (1,)
