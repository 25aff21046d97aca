"""How long a run is, what it counts, and how it evaluates."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from toys import At, Stream, noise, ones, overriding

from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.schedulers import StatefulSchedulerBase
from pytorch_accelerated.trainer import Trainer


class CountsUpdates(TrainerCallback):
    """Keeps the number of updates of each epoch."""

    def __init__(self):
        self.updates = []

    def on_train_epoch_start(self, trainer, **kwargs):
        self.updates.append(0)

    def on_train_update_end(self, trainer, **kwargs):
        self.updates[-1] += 1


@pytest.fixture
def counter():
    return CountsUpdates()


@pytest.fixture
def train(create_trainer, samples, counter):
    """Train on 4 batches in an epoch."""

    def train(num_epochs=2, trainer=None, **kwargs):
        trainer = trainer or create_trainer([counter])
        trainer.train(samples(8), num_epochs, per_device_batch_size=2, **kwargs)
        return trainer

    return train


# --- counts


def test_counts_in_the_events_of_a_step_are_those_of_what_is_done(
    create_trainer, train
):
    expected = {
        "on_train_step_start": [(0, 0, 0), (0, 1, 2), (1, 2, 4), (1, 3, 6)],
        "on_train_update_end": [(1, 2, 4), (2, 4, 8)],
        "on_train_step_end": [(0, 1, 2), (1, 2, 4), (1, 3, 6), (2, 4, 8)],
    }
    counts = {event: [] for event in expected}

    def noting(event):
        return lambda trainer, **_: counts[event].append(
            (trainer.num_updates, trainer.num_steps, trainer.num_samples_seen)
        )

    notes = At(**{event: noting(event) for event in expected})
    train(1, create_trainer([notes]), gradient_accumulation_steps=2)

    assert counts == expected


def test_no_epochs_make_a_run_without_training(train, counter):
    trainer = train(num_epochs=0)

    assert counter.updates == []
    assert trainer.num_updates == 0
    assert trainer.model.weight.item() == 1.0


# --- limits


def test_the_limit_is_announced(train, capsys):
    train(3, max_num_train_steps=5)

    assert "after 5 updates, as max_num_train_steps asks" in capsys.readouterr().out


def test_the_run_config_says_what_the_run_does(train, samples):
    """The counts in it are checked in promises/test_counting.py."""
    config = train(
        3,
        gradient_accumulation_steps=3,
        eval_dataset=samples(5),
        eval_per_device_batch_size=5,
        gradient_clip_norm=2.0,
    ).run_config

    assert config.train_per_device_batch_size == 2
    assert config.train_total_batch_size == 6
    assert config.eval_per_device_batch_size == config.eval_total_batch_size == 5
    assert config.gradient_clip_norm == 2.0
    assert config.gradient_clip_value is None
    assert config.num_processes == 1
    assert not config.is_distributed
    assert config.mixed_precision == "no"


def test_a_plateau_of_the_evaluation_loss_is_that_of_training_without_a_dataset(
    train, create_trainer
):
    trainer = create_trainer(loss_func=lambda outputs, _: outputs.mean() * 0 + 1.0)
    create = partial(ReduceLROnPlateau, factor=0.5, patience=0)
    train(4, trainer, create_scheduler_fn=create)

    # The first epoch sets the mark, and each later one is no better.
    assert trainer.optimizer.param_groups[0]["lr"] == 0.25 * 0.5**3


# --- evaluation


def test_evaluate_has_names_of_its_own_and_is_no_epoch(create_trainer, samples):
    """Found 97 and 115: its values were those of epoch 3 of 2, among the epochs'."""
    epochs = []

    class Accuracy(Trainer):
        def eval_epoch_end(self):
            epochs.append(self.run_history.current_epoch)
            self.run_history.update_metric("accuracy", len(epochs) / 4)
            self.run_history.update_metric("evaluation_f1", 0.5)

        def calculate_eval_batch_loss(self, batch):
            return {**super().calculate_eval_batch_loss(batch), "error": 0.125}

    trainer = create_trainer(trainer_class=Accuracy)
    history = trainer.train(samples(1), num_epochs=2, eval_dataset=samples(1))
    history.delete_metric("evaluation_f1")

    metrics = trainer.evaluate(samples(1))

    assert metrics == {
        "evaluation_loss": 0.25**2,
        "evaluation_error": 0.125,
        "evaluation_accuracy": 0.75,
        "evaluation_f1": 0.5,
    }
    assert [(r.value, r.epoch) for r in history.records("accuracy")] == [
        (0.25, 1),
        (0.5, 2),
    ]
    [record] = history.records("evaluation_accuracy")
    assert (record.value, record.epoch, record.step) == (0.75, None, 2)
    assert epochs == [1, 2, 1]
    assert history.current_epoch == 3
    assert history.metric_name_prefix == ""


def test_a_script_reads_what_evaluate_recorded_by_its_plain_name(
    create_trainer, samples
):
    """Found 97: under 0.1.61 evaluate() left nothing else to be read."""

    class Accuracy(Trainer):
        value = 0.5

        def eval_epoch_end(self):
            self.run_history.update_metric("accuracy", self.value)

    trainer = create_trainer(trainer_class=Accuracy)
    history = trainer.train(samples(1), 1, eval_dataset=samples(1))
    trainer.value = 0.75
    trainer.evaluate(samples(1))
    assert history.get_latest_metric("accuracy") == 0.75
    assert history.get_metric_values("accuracy") == [0.5]
    trainer.value = 0.625
    trainer.train(samples(1), 1, eval_dataset=samples(1), reset_run_history=False)
    assert history.get_latest_metric("accuracy") == 0.625


def test_numbers_with_an_underscore_are_not_recorded(create_trainer, samples):
    """Found 114: what a step returned for its own use became a metric."""

    def own_use(self, batch):
        output = Trainer.calculate_train_batch_loss(self, batch)
        return {**output, "_image_id": 7, "accuracy": 0.5}

    own = overriding(calculate_train_batch_loss=own_use)
    history = create_trainer(trainer_class=own).train(samples(1), num_epochs=1)
    assert history.get_metric_names() == {"train_loss_epoch", "train_accuracy_epoch"}


# --- data of other kinds


def test_the_last_window_of_a_stream_is_scaled_by_what_it_holds(
    create_trainer, counter
):
    """Defect 26: also where nobody knows that it is the last."""
    trainer = create_trainer([counter])

    trainer.train(
        Stream(ones(7)),
        num_epochs=1,
        per_device_batch_size=2,
        gradient_accumulation_steps=3,
    )

    assert counter.updates == [2]  # of 6 samples and of 1
    assert trainer.model.weight.item() == pytest.approx(0.25, rel=1e-6)


def test_an_empty_stream_is_an_error(create_trainer):
    """Defect 59: without a batch, a loss of NaN was recorded silently."""
    with pytest.raises(ValueError, match="yielded no batch"):
        create_trainer().train(Stream(ones(0)), num_epochs=1)


def test_any_iterable_of_batches_can_come_from_an_override(create_trainer, counter):
    """Defect 37: an iterable without the attributes of a DataLoader failed."""

    def own_loader(self, batch_size, train_dl_kwargs=None):
        return [(torch.ones(2, 1), torch.zeros(2, 1))] * 3

    own = overriding(create_train_dataloader=own_loader)
    trainer = create_trainer([counter], trainer_class=own)
    trainer.train(None, num_epochs=2, gradient_accumulation_steps=2)

    assert counter.updates == [2, 2]
    assert trainer.model.weight.item() == 0.5**4
    assert trainer.run_config.train_per_device_batch_size == 8


# --- what is unusual, and works


def test_a_seed_may_be_a_number_of_numpy_found_104(create_trainer, create_classifier):
    def train(seed):
        trainer = create_trainer(
            model=create_classifier(), loss_func=nn.CrossEntropyLoss(), seed=seed
        )
        trainer.train(noise(8), 1, per_device_batch_size=2)
        assert trainer.seed == 3
        return trainer.model[0].weight

    assert torch.equal(train(np.int64(3)), train(3))
    with pytest.raises(TypeError, match=r"seed must be a whole number, got 0\.5"):
        create_trainer(seed=0.5)


class SignDescent(torch.optim.Optimizer):
    """Moves each weight by a fixed step; its groups have no ``lr``."""

    def __init__(self, parameters):
        super().__init__(parameters, {"stride": 0.25})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["stride"] * parameter.grad.sign()


class HalvesStride(StatefulSchedulerBase):
    def __init__(self, optimizer):
        super().__init__(optimizer, "stride")

    def get_updated_values(self, num_updates):
        return 0.25 * 0.5**num_updates


def test_an_optimizer_need_not_have_a_learning_rate_found_104(create_trainer, samples):
    trainer = create_trainer()
    trainer.optimizer = SignDescent(trainer.model.parameters())

    trainer.train(samples(2), num_epochs=2, create_scheduler_fn=HalvesStride)
    assert trainer.model.weight.item() == 1 - 0.25 - 0.125

    trainer.train(samples(2), num_epochs=1, create_scheduler_fn=HalvesStride)
    assert trainer.model.weight.item() == 1 - 0.25 - 0.125 - 0.25


@dataclass(frozen=True)
class FrozenError(Exception):
    code: int


@pytest.mark.parametrize("method", ["train", "evaluate"])
def test_an_error_that_cannot_be_written_to_is_raised_as_it_is_found_104(
    create_trainer, samples, capsys, method
):
    def fail(outputs, targets):
        raise FrozenError(3)

    trainer = create_trainer()
    trainer.loss_func = fail
    arguments = (1,) if method == "train" else ()

    with pytest.raises(FrozenError) as caught:
        getattr(trainer, method)(samples(2), *arguments)

    assert caught.value.code == 3
    assert "FrozenInstanceError" not in capsys.readouterr().out
    assert "The run ended in epoch 1" in caught.value.__notes__[0]


def test_an_evaluation_after_a_run_that_could_not_start(create_trainer, samples):
    trainer = create_trainer()
    with pytest.raises(ValueError, match="no batches"):
        trainer.train(samples(4), 1, train_dataloader_kwargs={"drop_last": True})

    assert trainer.evaluate(samples(4)) == {"evaluation_loss": 1.0}
