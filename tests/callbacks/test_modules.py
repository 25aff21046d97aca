from types import SimpleNamespace

import torch
from torch import nn

from pytorch_accelerated.callbacks import (
    ConvertSyncBatchNormCallback,
    MoveModulesToDeviceCallback,
)
from pytorch_accelerated.trainer import Trainer


class Moved(nn.Module):
    """Says where it was last moved to."""

    device = None

    def to(self, device):
        self.device = device
        return self


class ModuleTrainer(Trainer):
    of_the_class = Moved()

    @property
    def broken(self):
        raise RuntimeError("must not be evaluated")

    @property
    def made(self):
        raise AssertionError("must not be evaluated")


def test_modules_of_the_trainer_are_moved_and_properties_left_alone(create_trainer):
    """Defect 52: a property that raised killed the run."""
    trainer = create_trainer(trainer_class=ModuleTrainer)
    trainer.metric, trainer.model, trainer.other = Moved(), Moved(), "no module"
    for event in ("on_training_run_start", "on_evaluation_run_start"):
        trainer.metric.device = trainer.of_the_class.device = None
        getattr(MoveModulesToDeviceCallback(), event)(trainer)
        assert trainer.metric.device == trainer.device
        assert trainer.of_the_class.device == trainer.device
        assert trainer.model.device is None


def trainer_of(num_processes, device, model=None):
    return SimpleNamespace(
        model=nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
        if model is None
        else model,
        device=torch.device(device),
        _accelerator=SimpleNamespace(num_processes=num_processes),
    )


def test_batch_norms_are_synchronised_when_there_are_several_processes():
    trainer = trainer_of(2, "cuda")
    parameters = list(trainer.model.parameters())
    ConvertSyncBatchNormCallback().on_init_end(trainer)
    assert isinstance(trainer.model[1], nn.SyncBatchNorm)
    # The optimizer has been given these.
    assert [id(p) for p in trainer.model.parameters()] == [id(p) for p in parameters]
    converted = trainer.model[1]
    ConvertSyncBatchNormCallback().on_training_run_start(trainer)
    assert trainer.model[1] is converted


def test_batch_norms_are_left_alone_in_one_process(create_trainer, samples):
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    trainer = create_trainer([ConvertSyncBatchNormCallback], model=model)
    trainer.train(samples(2), num_epochs=1)
    assert type(model[1]) is nn.BatchNorm1d


def test_a_model_without_batch_norms_is_left_alone_on_cpu_processes():
    model = nn.Linear(1, 1)
    trainer = trainer_of(2, "cpu", model)
    ConvertSyncBatchNormCallback().on_init_end(trainer)
    assert trainer.model is model
