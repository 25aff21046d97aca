"""R11: what a callback does to the data is seen by the next epoch, by all loaders."""

import os
from itertools import chain
from operator import add

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset
from toys import At, Numbers, create_trainer

from pytorch_accelerated.data import LimitBatches
from pytorch_accelerated.data.loaders import PlannedLoader
from pytorch_accelerated.errors import CheckpointError, StopTrainingError
from pytorch_accelerated.trainer import Trainer

WORKERS = [0, 1, 2]


class Constant(Numbers):
    """Samples that are all the same number; `set` makes it another one."""

    value = 1.0

    def __getitem__(self, index):
        return torch.full((1,), self.value), torch.zeros(1)


def in_memory(length):
    """Create a dataset of the same samples in memory."""
    return TensorDataset(
        torch.arange(float(length)).reshape(-1, 1), torch.zeros(length, 1)
    )


def change_length(dataset, length):
    if isinstance(dataset, TensorDataset):
        dataset.tensors = in_memory(length).tensors
    else:
        dataset.length = length


class KeepsInputs(Trainer):
    """Keeps the inputs of each epoch, batch by batch, and of each evaluation."""

    def train_epoch_start(self):
        super().train_epoch_start()
        self.trained = [*getattr(self, "trained", []), []]

    def eval_epoch_start(self):
        super().eval_epoch_start()
        self.evaluated = [*getattr(self, "evaluated", []), []]

    def calculate_train_batch_loss(self, batch):
        self.trained[-1].append(batch[0].flatten().tolist())
        return super().calculate_train_batch_loss(batch)

    def calculate_eval_batch_loss(self, batch):
        self.evaluated[-1].append(batch[0].flatten().tolist())
        return super().calculate_eval_batch_loss(batch)

    @property
    def num_batches(self):
        return [len(batches) for batches in self.trained]


def at_each_epoch(act, lr=0.0, **kwargs):
    """Create a trainer that does something with the number of an epoch at its start."""
    acts = At(
        on_train_epoch_start=lambda trainer, **_: act(trainer.run_history.current_epoch)
    )
    return create_trainer([acts], lr=lr, trainer_class=KeepsInputs, **kwargs)


def samples(epochs):
    return [sorted(chain.from_iterable(batches)) for batches in epochs]


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("is_ready", [False, True])
def test_what_a_callback_sets_on_the_dataset_is_seen(num_workers, is_ready):
    """Found 71: workers that were kept had a copy of the first epoch."""
    dataset, loader = Constant(4), {"num_workers": num_workers}
    arguments = {"train_dataloader_kwargs": loader, "eval_dataloader_kwargs": loader}
    data = dataset
    if is_ready:
        data, arguments = DataLoader(dataset, 2, **loader), {}
    trainer = at_each_epoch(lambda epoch: setattr(dataset, "value", float(epoch)))

    trainer.train(data, 3, eval_dataset=data, per_device_batch_size=2, **arguments)

    assert samples(trainer.trained) == [[1.0] * 4, [2.0] * 4, [3.0] * 4]
    assert samples(trainer.evaluated) == [[1.0] * 4, [2.0] * 4, [3.0] * 4]


class Pids(Constant):
    def __getitem__(self, index):
        return torch.full((1,), float(os.getpid())), torch.zeros(1)


@pytest.mark.parametrize(
    ("arguments", "number"), [({}, 2), ({"persistent_workers": True}, 1)]
)
def test_workers_are_kept_if_the_user_says_so(arguments, number):
    trainer = at_each_epoch(lambda epoch: None)

    trainer.train(Pids(4), 2, train_dataloader_kwargs={"num_workers": 1, **arguments})

    assert len({pid for epoch in trainer.trained for (pid, *_) in epoch}) == number


def test_other_tensors_of_a_dataset_in_memory_are_seen():
    """Found 71: they were those of the start of the run."""
    dataset = in_memory(2)

    def replace(epoch):
        dataset.tensors = (torch.full((2, 1), float(epoch)), dataset.tensors[1])

    trainer = at_each_epoch(replace)
    trainer.train(dataset, 2, eval_dataset=Subset(dataset, [0]))

    assert samples(trainer.trained) == [[1.0, 1.0], [2.0, 2.0]]
    assert samples(trainer.evaluated) == [[1.0], [2.0]]


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("create", [Numbers, in_memory])
@pytest.mark.parametrize("lengths", [[4, 8, 12], [12, 5, 8]])
def test_a_dataset_that_grows_or_shrinks_is_trained_whole(num_workers, create, lengths):
    """Found 71: each epoch had the batches of the first."""
    dataset = create(lengths[0])
    trainer = at_each_epoch(
        lambda epoch: change_length(dataset, lengths[epoch - 1]), seed=1
    )
    loader = {"num_workers": num_workers}

    trainer.train(
        dataset,
        3,
        eval_dataset=dataset,
        per_device_batch_size=4,
        train_dataloader_kwargs=loader,
        eval_dataloader_kwargs=loader,
    )

    expected = [[float(index) for index in range(length)] for length in lengths]
    assert samples(trainer.trained) == expected
    assert samples(trainer.evaluated) == expected
    assert trainer.num_batches == [-(-length // 4) for length in lengths]
    assert trainer.num_samples_seen == sum(lengths)
    assert trainer.num_updates == sum(trainer.num_batches)


def test_the_windows_of_accumulation_follow_the_length_of_the_epoch():
    """By hand: each update halves the weight; with 4, 8 and 12 samples in batches of 4,
    two of them in a window, there are 1, 1 and 2."""
    dataset = Constant(4)
    trainer = at_each_epoch(lambda epoch: change_length(dataset, 4 * epoch), lr=0.25)

    history = trainer.train(
        dataset, 3, per_device_batch_size=4, gradient_accumulation_steps=2
    )

    assert trainer.num_updates == 4
    assert trainer.model.weight.item() == 0.5**4
    # The last epoch: twice a loss of 0.5 ** 4, once of 0.5 ** 6.
    assert history.get_metric_values("train_loss_epoch") == [
        1.0,
        0.25,
        (2 * 0.25**2 + 0.25**3) / 3,
    ]


def test_a_limit_on_the_batches_holds_while_the_dataset_grows():
    dataset = Numbers(4)
    with LimitBatches(2):
        trainer = at_each_epoch(lambda epoch: change_length(dataset, 4 * epoch))

    trainer.train(dataset, 3, per_device_batch_size=4)

    assert trainer.num_batches == [1, 2, 2]


def test_a_run_goes_on_in_the_epoch_of_a_dataset_that_has_grown(tmp_path):
    def train(callbacks, length, **kwargs):
        dataset = Numbers(length)
        trainer = at_each_epoch(
            lambda epoch: change_length(dataset, 4 * epoch), lr=1e-3, seed=1
        )
        trainer.callback_handler.add_callbacks(callbacks)
        trainer.train(dataset, 3, per_device_batch_size=4, **kwargs)
        return trainer

    def stop(trainer, num_updates, **kwargs):
        if num_updates == 2:  # in the middle of the second epoch
            trainer.save_training_state(state)
            raise StopTrainingError("enough")

    state = tmp_path / "state"
    expected = train([], 4)
    train([At(on_train_update_end=stop)], 4)

    with pytest.raises(CheckpointError, match=r"epoch of 8 samples.*has 4 samples"):
        train([], 4, resume_from=state)
    resumed = train([], 8, resume_from=state)

    assert resumed.trained == [expected.trained[1][1:], expected.trained[2]]
    assert resumed.model.weight.item() == expected.model.weight.item()


def test_drop_last_and_smaller_batches_are_those_of_the_length_of_the_epoch():
    dataset = Numbers(9)
    loader = PlannedLoader(
        DataLoader(dataset, 4, drop_last=True), torch.device("cpu"), seed=0
    )
    loader.use_batch_size(2)
    assert [batch[0].sum().item() for batch in loader] == [0 + 1, 2 + 3, 4 + 5, 6 + 7]

    dataset.length = 6
    loader.set_epoch(2)

    assert [batch[0].sum().item() for batch in loader] == [0 + 1, 2 + 3]


def test_two_processes_share_a_dataset_that_grows(on_processes):
    def grow():
        dataset, lengths = Numbers(4), [4, 7, 10]
        trainer = at_each_epoch(
            lambda epoch: change_length(dataset, lengths[epoch - 1]), seed=1
        )
        windows = {"per_device_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer.train(dataset, 3, eval_dataset=dataset, **windows)
        return trainer.trained, trainer.evaluated, trainer.num_samples_seen

    first, second = on_processes(2, grow)

    for one, other in zip(first[:2], second[:2], strict=True):
        assert [len(batches) for batches in one] == [len(batches) for batches in other]
        assert samples(map(add, one, other)) == [
            list(range(length)) for length in (4, 7, 10)
        ]
    assert first[2] == second[2] == 4 + 7 + 10
