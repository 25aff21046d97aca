"""Callbacks that change weights leave the same on two processes as on one."""

import pytest
import torch
from torch import nn
from toys import create_trainer, noise, ones, seeded

from pytorch_accelerated.callbacks import (
    SaveTrainingStateCallback,
    SwaCallback,
    UnfreezeCallback,
)
from pytorch_accelerated.finetuning import ModelFreezer


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def measure_batch_norms():
    """Train nothing, so that what differs is what each process has seen."""
    model = seeded(
        lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    )
    trainer = create_trainer(
        [SwaCallback(2)], model=model, lr=0.0, loss_func=nn.CrossEntropyLoss(), seed=0
    )
    trainer.train(noise(24), num_epochs=2, per_device_batch_size=3)
    return state_of(model)


def test_the_batch_norms_of_a_mean_see_the_data_of_all_processes(on_processes):
    alone = measure_batch_norms()

    for one_of_two in on_processes(2, measure_batch_norms):
        for name in ("1.running_mean", "1.running_var"):
            torch.testing.assert_close(one_of_two[name], alone[name])


def saved_states(folder):
    saving = SaveTrainingStateCallback(folder, save_every_n_steps=1)
    trainer = create_trainer([saving])
    trainer.train(ones(4), 1, per_device_batch_size=1)
    return [path.name for path in saving._saved_checkpoints]


def test_all_processes_know_the_states_of_their_run(on_processes, tmp_path):
    assert on_processes(2, saved_states, tmp_path) == [["step_1", "step_2"]] * 2


def unfreeze(num_processes, **kwargs):
    """Train four epochs, the last two with one more layer each."""
    model = seeded(
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    )
    freezer = ModelFreezer(model)
    freezer.freeze()
    trainer = create_trainer(
        [UnfreezeCallback(freezer, {3: -2, 4: 0})],
        model=model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        seed=0,
    )
    trainer.train(
        noise(24),
        num_epochs=4,
        per_device_batch_size=4 // num_processes,
        gradient_accumulation_steps=2,
        **kwargs,
    )
    return state_of(model)


@pytest.mark.parametrize("halve", [False, True])
def test_what_is_unfrozen_amid_a_run_is_trained_by_all_processes(on_processes, halve):
    """Also where batches may be halved."""
    alone = unfreeze(1)

    def on_one_of_two():
        return unfreeze(2, halve_batch_if_out_of_memory=halve)

    for one_of_two in on_processes(2, on_one_of_two):
        for name, tensor in alone.items():
            torch.testing.assert_close(one_of_two[name], tensor)
