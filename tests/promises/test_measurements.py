"""Diagnoses of a run on several processes, and what they leave as it is."""

import os
import time

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated.callbacks import (
    ProfilerCallback,
    StepBasedEvaluationCallback,
    ThroughputCallback,
)
from pytorch_accelerated.trainer import Trainer

INPUTS = torch.arange(44.0).reshape(11, 4) / 44
DATA = TensorDataset(INPUTS, INPUTS)


class Tokens(Trainer):
    def calculate_train_batch_loss(self, batch):
        if self._accelerator.process_index == 1:
            time.sleep(0.02)  # the slowest process says how long a step takes
        output = super().calculate_train_batch_loss(batch)
        return {**output, "num_items_in_batch": torch.tensor(3 * len(batch[0]))}


def train(folder, callbacks):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Tokens(model, nn.MSELoss(), optimizer, callbacks, seed=1)
    trainer.train(DATA, 2, DATA, per_device_batch_size=2)
    history = trainer.run_history
    return {
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "table": getattr(callbacks[-1], "table", None) if callbacks else None,
        **{
            name: history.get_latest_metric(name) for name in history.get_metric_names()
        },
    }


def compare(folder):
    plain = train(folder, [])
    callbacks = [
        StepBasedEvaluationCallback(2),
        ThroughputCallback(peak_flops=1e9, flops_per_sample=64),
        ProfilerCallback(folder / "main", wait=0),
    ]
    measured = train(folder, callbacks)
    everywhere = ProfilerCallback(folder / "all", all_processes=True)
    train(folder, [everywhere])
    return {
        "same": torch.equal(plain["weights"], measured["weights"]),
        "tables": [measured["table"] is not None, everywhere.table is not None],
        "metrics": {name: v for name, v in measured.items() if name[:6] == "train_"},
    }


def test_processes_say_the_same_of_their_job_and_its_numbers_do_not_move(
    on_processes, tmp_path
):
    first, second = on_processes(2, compare, tmp_path)
    assert first["same"]
    assert second["same"]
    assert first["tables"] == [True, True]
    assert second["tables"] == [False, True]
    assert first["metrics"] == second["metrics"]
    metrics = first["metrics"]
    assert metrics["train_step_seconds_p50"] > 0.02
    samples = metrics["train_samples_per_second"]
    assert metrics["train_items_per_second"] == pytest.approx(3 * samples)
    assert abs(metrics["train_mfu"] / (samples * 64 / 2e9) - 1) < 1e-6
    assert [len(os.listdir(tmp_path / name)) for name in ("main", "all")] == [1, 2]
