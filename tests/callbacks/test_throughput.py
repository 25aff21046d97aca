"""What is measured of a run, with a clock that the test sets forward."""

import time

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from pytorch_accelerated.callbacks import (
    LogMetricsCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    ThroughputCallback,
    TrainerCallback,
)
from pytorch_accelerated.errors import StopTrainingError
from pytorch_accelerated.trainer import Trainer


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


class Timed(Dataset):
    """Takes a second for a batch, whatever its size, in the loop that waits for it."""

    def __init__(self, clock, count=8):
        self.clock, self.count = clock, count

    def __len__(self):
        return self.count

    def __getitems__(self, indices):
        self.clock.now += 1.0
        return [(torch.ones(4), torch.zeros(4)) for _ in indices]


class Takes(Trainer):
    """Takes 3 seconds for a step, 50 for the third one, and 7 for one of evaluation."""

    with_items = True

    def calculate_train_batch_loss(self, batch):
        self.clock.now += 50.0 if self.num_steps % 4 == 2 else 3.0
        output = super().calculate_train_batch_loss(batch)
        items = torch.tensor(5) if self.with_items else None
        return {**output, "num_items_in_batch": items}

    def calculate_eval_batch_loss(self, batch):
        self.clock.now += 7.0
        return super().calculate_eval_batch_loss(batch)


def create(clock, callbacks, model=None, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, 4, bias=False) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Takes(model, nn.MSELoss(), optimizer, callbacks, **kwargs)
    trainer.clock = clock
    return trainer


def measured(trainer):
    history = trainer.run_history
    return {
        name.removeprefix("train_"): list(history.get_metric_values(name))
        for name in history.get_metric_names()
        if name.startswith("train_") and "loss" not in name
    }


def train(trainer, num_epochs=1, data=None, **kwargs):
    trainer.train(
        data or Timed(trainer.clock),
        num_epochs,
        per_device_batch_size=2,
        train_dataloader_kwargs={"num_workers": 0, "shuffle": False},
        eval_dataloader_kwargs={"num_workers": 0},
        **kwargs,
    )
    return measured(trainer)


def test_an_epoch_is_measured_and_said_in_one_line(clock, capsys):
    """4 steps: 1 s of waiting each, 3 of them take 3 s and one takes 50 s."""
    trainer = create(clock, [ThroughputCallback, LogMetricsCallback])
    found = train(trainer, 2)

    memory = found.pop("peak_memory_gib")
    assert 0.01 < memory[0] < 1000
    assert found == {
        "samples_per_second": [pytest.approx(8 / 63)] * 2,
        "items_per_second": [pytest.approx(20 / 63)] * 2,
        "data_wait_share": [pytest.approx(4 / 63)] * 2,
        "step_seconds_p50": [pytest.approx(4.0)] * 2,
        "step_seconds_p95": [pytest.approx(4 + 0.85 * 47)] * 2,
        "step_seconds_max": [pytest.approx(51.0)] * 2,
    }
    first, header, _, second, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["epoch", "train_loss", "lr", "samples/s", "time", "ETA"]
    assert first.startswith("samples per second 0.127, data wait share 0.0635, step")
    assert (
        first.count("items per second 0.317") == second.count("step seconds p50") == 1
    )

    trainer.with_items = False
    assert "items_per_second" not in train(trainer)


def test_evaluations_amid_the_epoch_are_not_counted(clock):
    class Evaluates(TrainerCallback):
        """With another one inside, called after the throughput is measured."""

        called_last = ("on_train_step_end",)

        def on_train_step_end(self, trainer, **kwargs):
            trainer.evaluate(Timed(clock, 2), 2, dataloader_kwargs={"num_workers": 0})

        def on_evaluation_run_start(self, trainer, **kwargs):
            clock.now += 11.0

    plain = train(create(clock, [ThroughputCallback]))
    callbacks = [StepBasedEvaluationCallback(2), ThroughputCallback, Evaluates]
    evaluated = train(create(clock, callbacks), eval_dataset=Timed(clock, 2))

    for found in (plain, evaluated):
        found.pop("peak_memory_gib")
    assert evaluated == plain


def test_what_other_callbacks_do_is_part_of_a_step_and_not_of_waiting(clock):
    class Slow(TrainerCallback):
        def on_train_step_start(self, trainer, **kwargs):
            clock.now += 10.0

        on_train_step_end = on_train_update_end = on_train_step_start

    found = train(create(clock, [ThroughputCallback, Slow]))
    assert found["data_wait_share"] == [pytest.approx(4 / (63 + 4 * 30))]
    assert found["step_seconds_max"] == [pytest.approx(51 + 30)]


def test_a_resumed_epoch_is_measured_from_where_it_goes_on(clock, tmp_path):
    callbacks = [SaveTrainingStateCallback(tmp_path, save_every_n_steps=3)]
    train(create(clock, callbacks), max_num_train_steps=3)
    trainer = create(clock, [ThroughputCallback])
    trainer.num_steps = 0
    found = train(trainer, resume_from=tmp_path / "step_3")

    assert found["samples_per_second"] == [pytest.approx(2 / 4)]
    assert found["data_wait_share"] == [pytest.approx(1 / 4)]


def test_epochs_of_a_loop_of_the_user_s_are_measured_one_by_one(clock):
    class OwnRun(Takes):
        def _run_training(self):
            self.clock.now += 5.0
            for _ in range(2):
                self._run_train_epoch(self._train_dataloader)

    trainer = create(clock, [ThroughputCallback])
    trainer.__class__ = OwnRun
    found = train(trainer, 2)
    assert found["samples_per_second"] == [pytest.approx(8 / 63)] * 2


def test_the_time_of_a_run_ends_with_it(clock, tmp_path):
    class Stops(TrainerCallback):
        def on_train_step_end(self, trainer, **kwargs):
            raise StopTrainingError

    trainer = create(clock, [Stops])
    train(trainer)
    clock.now += 1000.0
    assert trainer._run.pace.seconds == pytest.approx(4.0)


def test_the_use_of_the_device_follows_from_two_numbers(clock):
    callback = ThroughputCallback(peak_flops=1000.0, flops_per_sample=64.0)
    found = train(create(clock, [callback]))
    assert found["mfu"] == [pytest.approx(8 / 63 * 64 / 1000)]
    for arguments in ({"peak_flops": 1.0}, {"flops_per_sample": 1.0}):
        with pytest.raises(ValueError, match=r"Give both: .*summary\(batch\)"):
            ThroughputCallback(**arguments)


def test_nothing_is_read_from_the_device_within_a_step(clock, monkeypatch):
    """Items are added up as tensors, and read once."""
    reads = []
    item = torch.Tensor.__float__

    class Watched(torch.Tensor):
        def __float__(self):
            reads.append("float")
            return item(self)

        def __bool__(self):
            reads.append("bool")
            return True

    class Counts(Takes):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            return {**output, "num_items_in_batch": self.watched}

    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Counts(model, nn.MSELoss(), optimizer, [ThroughputCallback])
    trainer.clock, trainer.watched = clock, torch.tensor(5.0).as_subclass(Watched)
    monkeypatch.setattr(trainer, "_update_loss_tracker", lambda loss, items: None)
    found = train(trainer)
    assert found["items_per_second"] == [pytest.approx(20 / 63)]
    assert reads.count("bool") == 0
    assert reads.count("float") == 1
