"""R9, R25: what several processes do with samplers, loaders and streams of the user's.

That each sample counts once is shown by ``test_uses.py``. Here, too, each sample is its
own number, so what was seen is what the steps were given.
"""

import itertools
import random
from itertools import chain

import pytest
import torch
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, IterableDataset, Sampler
from toys import Numbers, Stream, create_trainer

from pytorch_accelerated.data.sharing import emptied
from pytorch_accelerated.trainer import Trainer


class ShuffledStream(Stream):
    """Shuffles with the global generators, as most streams do."""

    def __iter__(self):
        numbers, count = list(range(len(self.dataset))), len(self.dataset)
        random.shuffle(numbers)
        offset = int(torch.randint(count, ()))
        yield from (self.dataset[(number + offset) % count] for number in numbers)


class GlobalOrder(Sampler):
    """Draws its order from torch's global generator."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        yield from torch.randperm(self.count).tolist()


class KeepsNumbers(Trainer):
    """Its model is one weight, and the loss of a number is the weight times it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.trained = []

    def calculate_train_batch_loss(self, batch):
        numbers = batch[0]
        self.trained.append([int(number) for number in numbers.flatten()])
        return {"loss": self.model(numbers).mean(), "batch_size": len(numbers)}


def seen(**kwargs):
    return create_trainer(trainer_class=KeepsNumbers, lr=1e-3, **kwargs)


@pytest.mark.parametrize("loader_kwargs", [None, {"num_workers": 1}])
def test_two_processes_accumulate_what_one_does_on_a_stream_found_65(
    loader_kwargs, on_processes
):
    def train(batch_size):
        trainer = seen()
        history = trainer.train(
            Stream(Numbers(11)),
            1,
            per_device_batch_size=batch_size,
            train_dataloader_kwargs=loader_kwargs,
            gradient_accumulation_steps=2,
        )
        loss = history.get_latest_metric("train_loss_epoch")
        return trainer.model.weight.item(), loss, trainer.num_samples_seen

    alone = train(4)
    for process in on_processes(2, train, 2):
        assert process == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(
    ("data", "kwargs"),
    [(Numbers(11), {"sampler": GlobalOrder(11)}), (Stream(Numbers(11)), {})],
    ids=["sampler", "stream"],
)
def test_a_last_step_that_is_not_full_can_be_left_out(data, kwargs, on_processes):
    def leave_out():
        trainer = seen(seed=5)
        loader = {**kwargs, "drop_last": True}
        trainer.train(data, 1, per_device_batch_size=2, train_dataloader_kwargs=loader)
        return trainer.trained

    first, second = on_processes(2, leave_out)
    assert [len(batch) for batch in first + second] == [2] * 4
    assert len(set(chain(*first, *second))) == 8


# --------------------------------------------------------------------------- refused


def error_of(call):
    with pytest.raises((ValueError, RuntimeError)) as raised:
        call()
    return str(raised.value)


class StreamOfBatches(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(8.0).reshape(4, 2, 1))


def test_what_cannot_be_shared_is_refused_found_65_66(on_processes):
    """A stream of ready batches, samples that no one batches, another way to share."""

    def refused():
        config = DataLoaderConfiguration(dispatch_batches=True)
        batches = DataLoader(StreamOfBatches(), batch_size=None)
        single_samples = DataLoader(Numbers(8), batch_size=None)
        return [
            error_of(lambda: seen().train(batches, 1)),
            error_of(lambda: seen().train(single_samples, 1)),
            error_of(lambda: seen(accelerator_kwargs={"dataloader_config": config})),
        ]

    for batches, single_samples, setting in on_processes(2, refused):
        assert "is_split_by_process = True" in batches
        assert "Pass a batch_sampler" in single_samples
        assert "dispatch_batches=True" in setting
        assert "divide the batch size by the number of processes, 2" in setting


class FailsOnMainProcess(GlobalOrder):
    def __iter__(self):
        raise LookupError("no order today")


def test_a_sampler_that_fails_ends_the_run_on_all_processes(on_processes):
    def train():
        kwargs = {"sampler": FailsOnMainProcess(8)}
        with pytest.raises(Exception, match="no order today") as raised:
            seen().train(Numbers(8), 1, train_dataloader_kwargs=kwargs)
        return type(raised.value).__name__

    assert on_processes(2, train) == ["LookupError", "RuntimeError"]


def test_the_batch_of_a_process_without_a_sample_is_empty():
    batch = {
        "images": [torch.zeros(3, 4, 4)],
        "boxes": torch.zeros(1, 5),
        "names": ["a"],
        "scale": torch.tensor(2.0),
    }
    empty = emptied(batch)
    assert empty["images"] == []
    assert empty["boxes"].shape == (0, 5)
    assert empty["names"] == []
    assert empty["scale"] == 2
    assert [len(column) for column in emptied([torch.ones(1, 2)])] == [0]
    columns = emptied((torch.ones(1, 2), ["a"]))
    assert isinstance(columns, tuple)
    assert [len(column) for column in columns] == [0, 0]


# ------------------------------------------------------------- without end, or kept on


class Endless(Sampler):
    """Yields 0, 1, 2, ... and starts again after 99, for ever."""

    def __iter__(self):
        return (number % 100 for number in itertools.count())


def test_a_sampler_without_end_is_drawn_from_as_needed(on_processes, monkeypatch):
    monkeypatch.setattr("pytorch_accelerated.data.sharing._STEPS_AT_A_TIME", 3)

    def train():
        trainer = seen()
        trainer.train(
            Numbers(100),
            1,
            per_device_batch_size=2,
            max_num_train_steps=5,
            train_dataloader_kwargs={"sampler": Endless()},
        )
        return trainer.trained

    first, second = on_processes(2, train)
    assert first == [[0, 1], [4, 5], [8, 9], [12, 13], [16, 17]]
    assert second == [[2, 3], [6, 7], [10, 11], [14, 15], [18, 19]]


def test_workers_that_are_kept_draw_other_numbers_in_each_epoch(on_processes):
    def train():
        trainer = seen()
        kwargs = {"num_workers": 1, "persistent_workers": True}
        trainer.train(
            ShuffledStream(Numbers(8)),
            2,
            per_device_batch_size=2,
            train_dataloader_kwargs=kwargs,
        )
        return trainer.trained

    first, second = on_processes(2, train)
    for epoch in (slice(0, 2), slice(2, 4)):
        assert sorted(chain(*first[epoch], *second[epoch])) == list(range(8))
    assert first[:2] != first[2:]
