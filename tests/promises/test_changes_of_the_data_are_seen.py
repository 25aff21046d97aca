"""R11: what a callback does to the data is seen by the next epoch, by all loaders."""

import os
from itertools import chain
from operator import add

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.data import LimitBatches
from pytorch_accelerated.data.loaders import PlannedLoader
from pytorch_accelerated.errors import CheckpointError, StopTrainingError
from pytorch_accelerated.trainer import Trainer

WORKERS = [0, 1, 2]


class Scaled(Dataset):
    """Four samples, each of which is the scale."""

    scale = 1.0

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((1,), self.scale), torch.zeros(1)


class Growing(Dataset):
    """The samples 0, 1, 2, ..."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.full((1,), float(index)), torch.zeros(1)


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


class AtEachEpoch(TrainerCallback):
    """Does something with the number of the epoch when it starts."""

    def __init__(self, act):
        self.act = act

    def on_train_epoch_start(self, trainer, **kwargs):
        self.act(trainer.run_history.current_epoch)


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


def create_trainer(act, lr=0.0, **kwargs):
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return KeepsInputs(model, nn.MSELoss(), optimizer, [AtEachEpoch(act)], **kwargs)


def samples(epochs):
    return [sorted(chain.from_iterable(batches)) for batches in epochs]


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("is_ready", [False, True])
def test_what_a_callback_sets_on_the_dataset_is_seen(num_workers, is_ready):
    """Found 71: workers that were kept had a copy of the first epoch."""
    dataset, loader = Scaled(), {"num_workers": num_workers}
    arguments = {"train_dataloader_kwargs": loader, "eval_dataloader_kwargs": loader}
    data = dataset
    if is_ready:
        data, arguments = DataLoader(dataset, 2, **loader), {}
    trainer = create_trainer(lambda epoch: setattr(dataset, "scale", float(epoch)))

    trainer.train(data, 3, eval_dataset=data, per_device_batch_size=2, **arguments)

    assert samples(trainer.trained) == [[1.0] * 4, [2.0] * 4, [3.0] * 4]
    assert samples(trainer.evaluated) == [[1.0] * 4, [2.0] * 4, [3.0] * 4]


class Pids(Scaled):
    def __getitem__(self, index):
        return torch.full((1,), float(os.getpid())), torch.zeros(1)


@pytest.mark.parametrize(
    ("arguments", "number"), [({}, 2), ({"persistent_workers": True}, 1)]
)
def test_workers_are_kept_if_the_user_says_so(arguments, number):
    trainer = create_trainer(lambda epoch: None)

    trainer.train(Pids(), 2, train_dataloader_kwargs={"num_workers": 1, **arguments})

    assert len({pid for epoch in trainer.trained for (pid, *_) in epoch}) == number


def test_other_tensors_of_a_dataset_in_memory_are_seen():
    """Found 71: they were those of the start of the run."""
    dataset = in_memory(2)

    def replace(epoch):
        dataset.tensors = (torch.full((2, 1), float(epoch)), dataset.tensors[1])

    trainer = create_trainer(replace)
    trainer.train(dataset, 2, eval_dataset=Subset(dataset, [0]))

    assert samples(trainer.trained) == [[1.0, 1.0], [2.0, 2.0]]
    assert samples(trainer.evaluated) == [[1.0], [2.0]]


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("create", [Growing, in_memory])
@pytest.mark.parametrize("lengths", [[4, 8, 12], [12, 5, 8]])
def test_a_dataset_that_grows_or_shrinks_is_trained_whole(num_workers, create, lengths):
    """Found 71: each epoch had the batches of the first."""
    dataset = create(lengths[0])
    trainer = create_trainer(
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


class Ones(Growing):
    def __getitem__(self, index):
        return torch.ones(1), torch.zeros(1)


def test_the_windows_of_accumulation_follow_the_length_of_the_epoch():
    """By hand: each update halves the weight; with 4, 8 and 12 samples in batches of 4,
    two of them in a window, there are 1, 1 and 2."""
    dataset = Ones(4)
    trainer = create_trainer(lambda epoch: change_length(dataset, 4 * epoch), lr=0.25)

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
    dataset = Growing(4)
    with LimitBatches(2):
        trainer = create_trainer(lambda epoch: change_length(dataset, 4 * epoch))

    trainer.train(dataset, 3, per_device_batch_size=4)

    assert trainer.num_batches == [1, 2, 2]


class StopsAndSaves(TrainerCallback):
    """Saves and ends the run in the middle of the second epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_update_end(self, trainer, num_updates, **kwargs):
        if num_updates == 2:
            trainer.save_training_state(self.folder)
            raise StopTrainingError("enough")


def test_a_run_goes_on_in_the_epoch_of_a_dataset_that_has_grown(tmp_path):
    def train(callbacks, length, **kwargs):
        dataset = Growing(length)
        trainer = create_trainer(
            lambda epoch: change_length(dataset, 4 * epoch), lr=1e-3, seed=1
        )
        trainer.callback_handler.add_callbacks(callbacks)
        trainer.train(dataset, 3, per_device_batch_size=4, **kwargs)
        return trainer

    state = tmp_path / "state"
    expected = train([], 4)
    train([StopsAndSaves(state)], 4)

    with pytest.raises(CheckpointError, match=r"epoch of 8 samples.*has 4 samples"):
        train([], 4, resume_from=state)
    resumed = train([], 8, resume_from=state)

    assert resumed.trained == [expected.trained[1][1:], expected.trained[2]]
    assert resumed.model.weight.item() == expected.model.weight.item()


def test_drop_last_and_smaller_batches_are_those_of_the_length_of_the_epoch():
    dataset = Growing(9)
    loader = PlannedLoader(
        DataLoader(dataset, 4, drop_last=True), torch.device("cpu"), seed=0
    )
    loader.use_batch_size(2)
    assert [batch[0].sum().item() for batch in loader] == [0 + 1, 2 + 3, 4 + 5, 6 + 7]

    dataset.length = 6
    loader.set_epoch(2)

    assert [batch[0].sum().item() for batch in loader] == [0 + 1, 2 + 3]


def grow_on_processes():
    dataset = Growing(4)
    lengths = [4, 7, 10]
    trainer = create_trainer(
        lambda epoch: change_length(dataset, lengths[epoch - 1]), seed=1
    )
    trainer.train(
        dataset,
        3,
        eval_dataset=dataset,
        per_device_batch_size=2,
        gradient_accumulation_steps=2,
    )
    return trainer.trained, trainer.evaluated, trainer.num_samples_seen


def test_two_processes_share_a_dataset_that_grows(on_processes):
    first, second = on_processes(2, grow_on_processes)

    for one, other in zip(first[:2], second[:2], strict=True):
        assert [len(batches) for batches in one] == [len(batches) for batches in other]
        assert samples(map(add, one, other)) == [
            list(range(length)) for length in (4, 7, 10)
        ]
    assert first[2] == second[2] == 4 + 7 + 10
