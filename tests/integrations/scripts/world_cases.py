"""Worlds in which processes differ, and settings that cannot work."""

import os
import time

import torch
from sharded_cases import (
    SaveOnce,
    WithoutDropout,
    create_data,
    create_model,
    train,
    weights,
)
from torch import nn
from torch.utils.data import Dataset

from pytorch_accelerated.callbacks import ConvertSyncBatchNormCallback

PROCESS = int(os.environ.get("RANK", "0"))
NUM_PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def create_trainer(model=None, callbacks=(), trainer_class=WithoutDropout, **kwargs):
    model = model or create_model()
    return trainer_class(
        model,
        loss_func=nn.MSELoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        callbacks=callbacks,
        seed=3,
        accelerator_kwargs=kwargs,
    )


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def train_on(dataset, **kwargs):
    trainer = create_trainer()
    arguments = {"per_device_batch_size": 4 // NUM_PROCESSES, **kwargs}
    history = trainer.train(dataset, num_epochs=2, **arguments)
    return {
        "weights": weights(trainer),
        "num_updates": trainer.num_updates,
        "losses": list(history.get_metric_values("train_loss_epoch")),
        "num_samples": trainer.num_samples_seen,
    }


def uneven(folder):
    return train_on(create_data(27))


def incomplete_batches_dropped(folder):
    return train_on(create_data(27), train_dataloader_kwargs={"drop_last": True})


class Slow(Dataset):
    """Takes its time on one of the processes."""

    def __init__(self):
        self.dataset = create_data(26)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if PROCESS == 1:
            time.sleep(0.02)
        return self.dataset[index]


def steady(folder):
    return train_on(create_data(26))


def slow(folder):
    return train_on(Slow())


def batch_norm(folder):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    return error_of(
        lambda: train(create_trainer(model, [ConvertSyncBatchNormCallback]))
    )


def too_little_data(folder):
    return {
        "train": error_of(lambda: train_on(create_data(1))),
        "evaluate": error_of(lambda: create_trainer().evaluate(create_data(1))),
        "all dropped": error_of(
            lambda: train_on(
                create_data(1), train_dataloader_kwargs={"drop_last": True}
            )
        ),
    }


def low_precision(folder):
    model = create_model()
    trainer = create_trainer(model, mixed_precision="bf16")
    train(trainer)
    outputs = model(create_data().tensors[0])
    return {
        "weights": weights(trainer),
        "outputs": outputs.dtype,
        "is_plain": "forward" not in vars(model) and trainer.model is model,
        "weights_dtype": model[0].weight.dtype,
    }


def full_precision(folder):
    trainer = create_trainer()
    train(trainer)
    return {"weights": weights(trainer)}


def saved(folder):
    trainer = create_trainer(callbacks=[SaveOnce(folder / "state", 9)])
    train(trainer)
    return {"weights": weights(trainer)}


def resumed_alone(folder):
    """On one process, what two have begun."""
    trainer = create_trainer()
    train(trainer, resume_from=folder / "state")
    return {"weights": weights(trainer)}


def missing_state(folder):
    return error_of(lambda: train(create_trainer(), resume_from=folder / "nowhere"))
