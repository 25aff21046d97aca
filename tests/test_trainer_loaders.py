"""The loaders that a trainer makes, and what the user may say about them."""

from unittest import mock

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    TensorDataset,
)

from pytorch_accelerated import trainer as trainer_module
from pytorch_accelerated.callbacks import LimitBatchesCallback, TrainerCallback
from pytorch_accelerated.trainer import Trainer
from pytorch_accelerated.utils import (
    worker_init_fn,
)


@pytest.fixture
def numbered():
    """Create a dataset whose inputs are 0, 1, 2, ..."""

    def create(count):
        inputs = torch.arange(count, dtype=torch.float32).reshape(-1, 1)
        return TensorDataset(inputs, torch.zeros(count, 1))

    return create


class KeepsInputs(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.inputs = []

    def calculate_train_batch_loss(self, batch):
        self.inputs.append(batch[0].flatten().tolist())
        return super().calculate_train_batch_loss(batch)


@pytest.fixture
def inputs_of_a_run(create_trainer, numbered):
    """Return the inputs of each batch of a run on 6 samples."""

    def train(num_epochs=1, seed=None, dataset=None, **kwargs):
        trainer = create_trainer(lr=0.0, trainer_class=KeepsInputs, seed=seed)
        trainer.train(dataset or numbered(6), num_epochs, **kwargs)
        return trainer.inputs

    return train


# --- arguments of a loader


def test_the_trainer_calls_data_loader_with_the_documented_arguments(
    create_trainer, numbered
):
    train_set, eval_set = numbered(4), numbered(2)
    with mock.patch.object(
        trainer_module, "DataLoader", wraps=trainer_module.DataLoader
    ) as loader:
        create_trainer().train(
            train_set, 1, eval_dataset=eval_set, per_device_batch_size=3
        )

    common = {
        "collate_fn": None,
        "pin_memory": torch.cuda.is_available(),
        "batch_size": 3,
        "num_workers": 0,
        "worker_init_fn": worker_init_fn,
    }
    assert [call.args for call in loader.call_args_list] == [(), ()]
    assert [call.kwargs for call in loader.call_args_list] == [
        {"dataset": train_set, "shuffle": True, **common},
        {"dataset": eval_set, "shuffle": False, **common},
    ]


def test_a_batch_size_among_the_loader_arguments_wins(create_trainer, numbered):
    trainer = create_trainer()
    trainer.train(
        numbered(6),
        1,
        eval_dataset=numbered(6),
        per_device_batch_size=4,
        train_dataloader_kwargs={"batch_size": 3},
        eval_dataloader_kwargs={"batch_size": 2},
    )

    assert trainer.run_config.train_per_device_batch_size == 3
    assert trainer.run_config.eval_per_device_batch_size == 2
    assert trainer.run_config.num_update_steps_per_epoch == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"sampler": [5, 0, 3], "batch_size": 2}, [[5.0, 0.0], [3.0]]),
        # Defect 37: it was refused because of the default batch size.
        ({"batch_sampler": [[1, 4], [2], [0, 3]]}, [[1.0, 4.0], [2.0], [0.0, 3.0]]),
    ],
)
def test_the_order_of_the_user_s_sampler_is_used_as_it_is(
    inputs_of_a_run, arguments, expected
):
    assert inputs_of_a_run(train_dataloader_kwargs=arguments) == expected


def test_a_sampler_that_can_be_told_the_epoch_is_told(inputs_of_a_run):
    class ByEpoch(Sampler):
        def __init__(self):
            self.epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __len__(self):
            return 2

        def __iter__(self):
            return iter([self.epoch, 0])

    assert inputs_of_a_run(
        num_epochs=2, train_dataloader_kwargs={"sampler": ByEpoch()}
    ) == [[1.0, 0.0], [2.0, 0.0]]


def test_a_sampler_may_yield_anything_that_the_dataset_understands(create_trainer):
    class BySize(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, key):
            _index, size = key
            return torch.full((1,), float(size)), torch.zeros(1)

    trainer = create_trainer(lr=0.0, trainer_class=KeepsInputs)
    trainer.train(
        BySize(),
        1,
        train_dataloader_kwargs={
            "batch_sampler": BatchSampler([(0, 7), (1, 9)], 2, drop_last=False)
        },
    )

    assert trainer.inputs == [[7.0, 9.0]]


class Batches:
    """A loader of another library: no single sample can be taken from it."""

    def __iter__(self):
        for first in (0.0, 2.0, 4.0):
            inputs = torch.tensor([[first], [first + 1]])
            yield inputs, torch.zeros(2, 1)

    def __len__(self):
        return 3


class OwnIterator(Batches):
    """Starts again each time it is asked for its iterator, which it is itself."""

    def __iter__(self):
        self.rest = list(super().__iter__())
        return self

    def __next__(self):
        if not self.rest:
            raise StopIteration
        return self.rest.pop(0)


@pytest.mark.parametrize("loader", [Batches, OwnIterator])
def test_any_iterable_of_batches_is_a_ready_loader(create_trainer, loader):
    trainer = create_trainer(trainer_class=KeepsInputs, lr=0.0)

    trainer.summary(loader())
    trainer.inputs = []
    trainer.train(loader(), num_epochs=2, eval_dataset=loader())

    assert trainer.inputs == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]] * 2
    # The mean of 0, 1, 4, 9, 16 and 25.
    assert trainer.run_history.get_metric_values("eval_loss_epoch") == [55 / 6] * 2


class MakesBatches(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.full((2, 1), float(index)), torch.zeros(2, 1)


class StreamsBatches(IterableDataset):
    def __iter__(self):
        return map(MakesBatches().__getitem__, range(3))


@pytest.mark.parametrize(
    ("dataset", "order"), [(MakesBatches(), {"shuffle": False}), (StreamsBatches(), {})]
)
def test_batches_made_by_the_dataset_are_used_as_they_are(
    create_trainer, dataset, order
):
    """Defect 37: batch_size=None failed with an AttributeError."""
    trainer = create_trainer(lr=0.0, trainer_class=KeepsInputs)
    history = trainer.train(
        dataset,
        1,
        eval_dataset=dataset,
        train_dataloader_kwargs={"batch_size": None, **order},
        eval_dataloader_kwargs={"batch_size": None},
    )

    assert trainer.inputs == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert history.get_latest_metric("eval_loss_epoch") == 5 / 3
    assert trainer.num_samples_seen == 6


def ragged(samples):
    inputs = torch.cat([torch.ones(1, 1) for _ in samples])
    return inputs, torch.zeros(len(samples), 1)


class Ragged(Dataset):
    """Samples that torch's default function cannot make a batch of."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.ones(index + 1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"collate_fn": ragged},
        {
            "train_dataloader_kwargs": {"collate_fn": ragged},
            "eval_dataloader_kwargs": {"collate_fn": ragged},
        },
    ],
)
def test_a_collate_function_may_be_an_argument_of_train_or_of_the_loader(
    create_trainer, arguments
):
    """Defect 37: collate_fn among the loader arguments was a TypeError."""
    trainer = create_trainer()

    trainer.train(Ragged(), 1, eval_dataset=Ragged(), **arguments)

    assert trainer.model.weight.item() == 0.5


def test_defaults_may_be_replaced_by_an_override(create_trainer, numbered):
    """Defect 37: an override without "shuffle" failed together with a sampler."""

    class Own(KeepsInputs):
        def get_default_train_dl_kwargs(self, batch_size):
            return {"batch_size": batch_size}

        def get_default_eval_dl_kwargs(self, batch_size):
            return {"batch_size": 1}

    trainer = create_trainer(lr=0.0, trainer_class=Own)
    trainer.train(
        numbered(4),
        1,
        eval_dataset=numbered(2),
        per_device_batch_size=3,
        train_dataloader_kwargs={"sampler": [3, 1]},
    )

    assert trainer.inputs == [[3.0, 1.0]]
    assert trainer.run_config.eval_per_device_batch_size == 1


# --- what the run config says


def test_a_run_knows_nothing_of_the_loaders_of_an_earlier_one(create_trainer, numbered):
    """Defect 42: the loader, the arguments and the counts of an earlier call stayed."""
    trainer = create_trainer(lr=0.0, trainer_class=KeepsInputs)
    trainer.train(numbered(6), 1, eval_dataset=numbered(6), per_device_batch_size=3)
    trainer.inputs.clear()

    trainer.train(DataLoader(numbered(4), batch_size=2, sampler=[3, 1, 0, 2]), 1)

    assert trainer.inputs == [[3.0, 1.0], [0.0, 2.0]]  # used as it is
    assert trainer._eval_dataloader is None
    config = trainer.run_config
    assert (config.train_dl_kwargs, config.eval_dl_kwargs) == (None, None)
    assert config.train_per_device_batch_size == 2
    assert config.eval_per_device_batch_size is None

    trainer.evaluate(DataLoader(numbered(6), batch_size=4))

    config = trainer.run_config
    assert trainer._train_dataloader is None
    assert config.train_per_device_batch_size is None
    assert config.eval_per_device_batch_size == 4
    assert not config.max_num_train_steps


# --- lengths that are wrong


class Promises:
    """A loader that says that it has another number of batches than it yields."""

    def __init__(self, promised, num_batches):
        self.promised, self.num_batches, self.num_fetched = promised, num_batches, 0

    def __len__(self):
        return self.promised

    def __iter__(self):
        for _ in range(self.num_batches):
            self.num_fetched += 1
            yield torch.ones(1, 1), torch.zeros(1, 1)


@pytest.mark.parametrize("callbacks", [(), (LimitBatchesCallback(100),)])
@pytest.mark.parametrize(("promised", "actual"), [(8, 6), (6, 8), (8, 7), (1, 5)])
def test_every_batch_of_a_loader_counts_whatever_its_length_says_found_70(
    create_trainer, callbacks, promised, actual
):
    """The weight halves at each of two updates in an epoch."""
    trainer = create_trainer(callbacks)
    trainer.train(Promises(promised, actual), 2, gradient_accumulation_steps=4)

    assert trainer.num_updates == 4
    assert trainer.num_steps == 2 * actual
    assert trainer.model.weight.item() == pytest.approx(0.5**4)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_limit_fetches_no_batch_beyond_it_found_70(create_trainer, accumulation):
    loader = Promises(8, 8)
    trainer = create_trainer([LimitBatchesCallback(4)])
    trainer.train(loader, 1, gradient_accumulation_steps=accumulation)

    assert loader.num_fetched == 4
    assert trainer.num_updates == -(-4 // accumulation)


def test_no_batch_is_fetched_before_the_update_of_a_whole_window_found_70(
    create_trainer,
):
    """A state that is saved there has what has been trained on, and no more."""
    fetched = []

    class Notes(TrainerCallback):
        def on_train_update_end(self, trainer, **kwargs):
            fetched.append(loader.num_fetched)

    loader = Promises(8, 7)
    create_trainer([Notes]).train(loader, 1, gradient_accumulation_steps=3)

    assert fetched == [3, 6, 7]
