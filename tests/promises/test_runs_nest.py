"""An evaluation amid a run leaves that run as if nothing had happened (found 62)."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from toys import Keeps, create_trainer, noise, seeded

from pytorch_accelerated.callbacks import (
    ModelEmaCallback,
    TrainerCallback,
)
from pytorch_accelerated.schedulers import CosineLrScheduler


def evaluate(trainer):
    trainer.evaluate(noise(10, seed=2), per_device_batch_size=2)


def evaluate_the_same(trainer):
    trainer._run_eval_epoch(trainer._eval_dataloader, is_intermediate=True)


def evaluate_a_loader(trainer):
    """Its sampler draws from the global generator."""
    data = noise(10, seed=2)
    sampler = RandomSampler(data, replacement=True)
    trainer.evaluate(DataLoader(data, batch_size=5, sampler=sampler))


def predict(trainer):
    trainer.predict(noise(10, seed=2), collate_fn=lambda samples: samples[0][0][None])


def evaluate_within_an_evaluation(trainer):
    class Nested(TrainerCallback):
        def on_eval_step_end(self, trainer, batch, batch_output, **kwargs):
            predict(trainer)

    callbacks = trainer.callback_handler.callbacks
    callbacks.append(Nested())
    evaluate(trainer)
    callbacks.pop()


class At(TrainerCallback):
    """Does something in an event, but not in those that this itself calls."""

    def __init__(self, event, action):
        self.action, self.is_acting = action, False
        setattr(self, event, self.act)

    def act(self, trainer, **kwargs):
        if not self.is_acting:
            self.is_acting = True
            self.action(trainer)
            self.is_acting = False


def read_run(trainer, **kwargs):
    """Return what other callbacks may read of a run."""
    lengths = len(trainer._train_dataloader), len(trainer._eval_dataloader)
    return trainer.run_config.to_dict(), lengths, len(trainer.eval_dataset)


def train(callbacks=()):
    model = seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)
        )
    )
    keeps = Keeps("on_training_run_epoch_end", read_run)
    trainer = create_trainer(
        [*callbacks, keeps],
        model=model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.05),
        seed=5,
    )
    trainer.train(
        noise(22),
        2,
        eval_dataset=noise(6, seed=3),
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_clip_norm=0.1,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(),
    )
    metrics = [
        record[:4]
        for record in trainer.run_history.records()
        if not record[0].startswith(("evaluation_", "intermediate_"))
    ]
    return {
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": trainer.optimizer.state_dict(),
        "modes": [module.training for module in trainer.model.modules()],
        "metrics": metrics,
        "seen": keeps.kept,
        "counts": (trainer.num_updates, trainer.num_steps, trainer.num_samples_seen),
        "random": torch.get_rng_state(),
        "dataset": len(trainer.eval_dataset),
    }


def assert_same(run, other):
    for name in ("model", "optimizer"):
        torch.testing.assert_close(run[name], other[name], rtol=0, atol=0)
    for name in ("modes", "metrics", "seen", "counts", "dataset"):
        assert run[name] == other[name], name
    assert torch.equal(run["random"], other["random"])


EVENTS = [
    "on_training_run_start",
    "on_train_epoch_start",
    "on_train_step_start",
    "on_train_update_end",
    "on_train_step_end",
    "on_train_epoch_end",
    "on_eval_epoch_start",
    "on_eval_step_start",
    "on_eval_step_end",
    "on_eval_epoch_end",
    "on_training_run_epoch_end",
    "on_training_run_end",
]


ACTIONS = [evaluate, evaluate_the_same, predict]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("action", ACTIONS)
def test_a_run_goes_on_bit_for_bit_after_an_evaluation_from_a_callback(event, action):
    assert_same(train([At(event, action)]), train())


@pytest.mark.parametrize("action", [evaluate_a_loader, evaluate_within_an_evaluation])
@pytest.mark.parametrize("event", ["on_train_step_end", "on_train_epoch_end"])
def test_so_it_does_whatever_the_evaluation_draws_or_nests(event, action):
    assert_same(train([At(event, action)]), train())


def test_an_evaluation_that_fails_leaves_the_run_as_it_was():
    def fail(trainer):
        with pytest.raises(TypeError):
            trainer.evaluate(TensorDataset(torch.ones(2, 6)))

    assert_same(train([At("on_train_step_end", fail)]), train())


def train_in_all_ways():
    return train(), [train([At(*way)]) for way in itertools.product(EVENTS, ACTIONS)]


@pytest.mark.slow
def test_so_it_does_on_two_processes(on_processes):
    for plain, runs in on_processes(2, train_in_all_ways):
        for run in runs:
            assert_same(run, plain)


def test_the_average_of_the_weights_is_not_evaluated_on_other_data(tmp_path):
    def run(callbacks):
        ema = ModelEmaCallback(decay=0.9, save_path=tmp_path / "ema.pt")
        return train([ema, *callbacks])

    assert_same(run([At("on_train_epoch_end", evaluate)]), run([]))
