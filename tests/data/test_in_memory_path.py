"""Data in memory is fetched a batch at a time, with the results of one at a time."""

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Subset,
    TensorDataset,
    random_split,
)

from pytorch_accelerated.data import loaders
from pytorch_accelerated.data.fetching import InMemoryDataset

CPU = torch.device("cpu")


def batches_of(dataset, device=CPU, **kwargs):
    """Return the batches of two epochs, shuffled."""
    plain = DataLoader(dataset, batch_size=4, shuffle=True, **kwargs)
    loader = loaders.PlannedLoader(plain, device, seed=5)
    batches = []
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        batches += loader
    return batches


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert type(batch) is type(other)
        for tensor, same in zip(batch, other, strict=True):
            assert tensor.dtype == same.dtype
            assert tensor.is_contiguous() == same.is_contiguous()
            assert torch.equal(tensor, same)


def create_dataset(length=22):
    """Members of several types and shapes; the inputs are not contiguous."""
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(6, length, generator=generator).T,
        torch.randint(9, (length,), generator=generator),
        torch.rand(length, 2, 3, generator=generator).to(torch.bfloat16),
        torch.rand(length, generator=generator) > 0.5,
        torch.randn(length, 2, dtype=torch.complex64, generator=generator),
    )


def halves(dataset):
    generator = torch.Generator().manual_seed(4)
    return random_split(dataset, [0.6, 0.4], generator=generator)[0]


@pytest.mark.parametrize(
    "derive",
    [
        lambda dataset: dataset,
        lambda dataset: halves(halves(dataset)),
        lambda dataset: Subset(Subset(dataset, range(20, 0, -2)), [3, 0, 0, -1, 7]),
        lambda dataset: Subset(dataset, torch.tensor([7, 7, 2, 20])),
        lambda dataset: Subset(Subset(dataset, [-1, 0, 3, -22]), [-1, 2, -4, 1]),
    ],
    ids=["whole", "split twice", "reversed", "of a tensor", "from the end (found 104)"],
)
def test_batches_are_those_of_one_sample_at_a_time(one_by_one, monkeypatch, derive):
    dataset = derive(create_dataset())
    expected = batches_of(one_by_one(dataset))

    monkeypatch.setattr(TensorDataset, "__getitem__", None)  # no sample by itself
    assert_same(batches_of(dataset), expected)


def test_the_batches_do_not_share_memory_with_the_dataset():
    """A step that changes its batch in place must not change the data."""
    dataset = create_dataset()
    before = [tensor.clone() for tensor in dataset.tensors]
    for batch in batches_of(dataset):
        for tensor in batch:
            tensor.zero_()
    assert_same([dataset.tensors], [tuple(before)])


def test_workers_that_the_user_asks_for_are_used(monkeypatch):
    expected = batches_of(create_dataset())
    monkeypatch.setattr(InMemoryDataset, "batch", None)
    assert_same(batches_of(create_dataset(), num_workers=1), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_data_that_is_on_the_gpu_stays_there():
    on_host = create_dataset()
    on_gpu = TensorDataset(*(tensor.cuda() for tensor in on_host.tensors))
    device = torch.device("cuda")
    assert_same(batches_of(on_gpu, device), batches_of(on_host, device))
