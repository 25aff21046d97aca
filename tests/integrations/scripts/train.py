"""A user's script: nothing in it knows how it is launched.

The main process writes the weights, and each process where it was.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer


def create_data(num_samples=26):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_samples, 6, generator=generator)
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))


def create_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def train(folder, *, total_batch_size=4, **accelerator_kwargs):
    """Train with batches of the same samples, however many processes share them."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    model = create_model()
    trainer = Trainer(
        model,
        loss_func=nn.MSELoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        callbacks=(),
        seed=3,
        accelerator_kwargs=accelerator_kwargs,
    )
    history = trainer.train(
        create_data(),
        num_epochs=2,
        eval_dataset=create_data(10),
        per_device_batch_size=total_batch_size // num_processes,
    )
    accelerator = trainer._accelerator
    where = {
        "num_processes": accelerator.num_processes,
        "process_index": accelerator.process_index,
        "is_main": accelerator.is_main_process,
        "precision": accelerator.mixed_precision,
        "eval_loss": history.get_latest_metric("eval_loss_epoch"),
    }
    folder = Path(folder)
    (folder / f"process_{accelerator.process_index}.json").write_text(json.dumps(where))
    if accelerator.is_main_process:
        torch.save(model.state_dict(), folder / "weights.bin")


if __name__ == "__main__":
    train(sys.argv[1])
