"""Data in memory is fetched a batch at a time, with the results of one at a time."""

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset, default_collate, random_split

from pytorch_accelerated import data
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.trainer import Trainer


class KeepsBatches(TrainerCallback):
    def __init__(self):
        self.train_batches = []
        self.eval_batches = []

    def on_train_step_end(self, trainer, batch, batch_output, **kwargs):
        self.train_batches.append(batch)

    def on_eval_step_end(self, trainer, batch, batch_output, **kwargs):
        self.eval_batches.append(batch)


class FirstMember(nn.Module):
    """Takes inputs of any type and any number of further members of a batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return self.weight * inputs.float().sum(1)


class OneMember(Trainer):
    def calculate_train_batch_loss(self, batch):
        outputs = self.model(batch[0])
        return {
            "loss": outputs.mean(),
            "model_outputs": outputs,
            "batch_size": len(batch[0]),
        }

    calculate_eval_batch_loss = calculate_train_batch_loss


def run(dataset, *, num_epochs=2, **kwargs):
    model = FirstMember()
    kept = KeepsBatches()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = OneMember(model, None, optimizer, [kept], seed=5)
    no_workers = {"num_workers": 0, **kwargs.pop("loader", {})}
    trainer.train(
        dataset,
        num_epochs,
        eval_dataset=dataset,
        per_device_batch_size=4,
        train_dataloader_kwargs=no_workers,
        eval_dataloader_kwargs=no_workers,
        **kwargs,
    )
    return kept.train_batches, kept.eval_batches, model.weight.item()


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert type(batch) is type(other)
        assert len(batch) == len(other)
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
        lambda dataset: TensorDataset(dataset.tensors[0]),
        halves,
        lambda dataset: halves(halves(dataset)),
        lambda dataset: Subset(Subset(dataset, range(20, 0, -2)), [3, 0, 0, -1, 7]),
        lambda dataset: Subset(dataset, torch.tensor([7, 7, 2, 20])),
        lambda dataset: Subset(Subset(dataset, [-1, 0, 3, -22]), [-1, 2, -4, 1]),
    ],
    ids=[
        "whole",
        "one member",
        "split",
        "split twice",
        "reversed and repeated",
        "of a tensor",
        "from the end (found 104)",
    ],
)
def test_training_and_evaluation_are_those_of_one_sample_at_a_time(
    one_by_one, monkeypatch, derive
):
    dataset = derive(create_dataset())
    train_batches, eval_batches, weight = run(dataset)
    fetched = []
    monkeypatch.setattr(
        data.InMemoryDataset, "batch", lambda *args: fetched.append(args)
    )

    expected = run(one_by_one(dataset))

    assert not fetched
    assert_same(train_batches, expected[0])
    assert_same(eval_batches, expected[1])
    assert weight == expected[2]


def test_no_sample_is_fetched_by_itself(monkeypatch):
    def fail(dataset, index):
        raise AssertionError("fetched one sample")

    monkeypatch.setattr(TensorDataset, "__getitem__", fail)
    train_batches, eval_batches, _ = run(halves(create_dataset()))

    assert len(train_batches) == len(eval_batches) == 2 * 4


@pytest.mark.parametrize("where", ["train", "loader"])
def test_a_collate_function_of_the_user_is_given_the_samples(where):
    sizes = []

    def collate(samples):
        sizes.append(len(samples))
        return default_collate(samples)

    given = {"collate_fn": collate}
    options = given if where == "train" else {"loader": given}
    run(create_dataset(), num_epochs=1, **options)

    assert sizes == 2 * [4, 4, 4, 4, 4, 2]


def test_a_dataset_that_overrides_how_a_sample_is_fetched_is_asked_for_each():
    class Doubled(TensorDataset):
        def __getitem__(self, index):
            return tuple(2 * member for member in super().__getitem__(index))

    inputs = torch.arange(8.0).reshape(8, 1)
    train_batches, eval_batches, _ = run(Doubled(inputs), num_epochs=1)

    for batches in (train_batches, eval_batches):
        seen = torch.cat([batch[0] for batch in batches])
        assert torch.equal(seen.sort(dim=0).values, 2 * inputs)


def test_the_batches_do_not_share_memory_with_the_dataset():
    """A step that changes its batch in place must not change the data."""
    dataset = create_dataset()
    before = [tensor.clone() for tensor in dataset.tensors]
    train_batches, eval_batches, _ = run(dataset, num_epochs=1)

    for batch in train_batches + eval_batches:
        for tensor in batch:
            tensor.zero_()

    for tensor, same in zip(dataset.tensors, before, strict=True):
        assert torch.equal(tensor, same)


def test_workers_that_the_user_asks_for_are_used(monkeypatch):
    def fail(*args):
        raise AssertionError("fetched in the main process")

    monkeypatch.setattr(data.InMemoryDataset, "batch", fail)
    here = run(create_dataset(), num_epochs=1, loader={"num_workers": 1})

    monkeypatch.undo()
    assert_same(here[0], run(create_dataset(), num_epochs=1)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_data_that_is_on_the_gpu_stays_there():
    on_host = create_dataset()
    on_gpu = TensorDataset(*(tensor.cuda() for tensor in on_host.tensors))

    assert_same(run(on_gpu)[0], run(on_host)[0])
