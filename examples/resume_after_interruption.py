"""Interrupt a run, start the script again, and end with the same weights.

    python examples/resume_after_interruption.py --max-updates 100   # "crashes" there
    python examples/resume_after_interruption.py                     # goes on

Look at ``resume_from="auto"``: the first start finds no training state and begins
afresh; every later one takes the newest whole state and goes on from its batch, with
the same order of the data, learning rate and random numbers. A run that was never
interrupted ends with the same weights, bit for bit.
"""

import argparse

import torch
from torch import nn, optim

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    SaveTrainingStateCallback,
    StopTrainingError,
    TrainerCallback,
    get_default_callbacks,
)
from pytorch_accelerated.schedulers import CosineLrScheduler
from quickstart import create_model, load_digits


class InterruptAfter(TrainerCallback):
    """Stands for a power cut, or for a job that may run no longer."""

    def __init__(self, max_updates):
        self.max_updates = max_updates

    def on_train_step_end(self, trainer, **kwargs):
        if trainer.num_updates == self.max_updates:
            raise StopTrainingError(f"Interrupted after {self.max_updates} updates")


def main(save_dir="training_states", num_epochs=5, max_updates=None):
    torch.manual_seed(0)
    model = create_model()
    trainer = Trainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optim.AdamW(model.parameters(), lr=2e-3),
        callbacks=[
            *get_default_callbacks(),
            SaveTrainingStateCallback(
                save_dir, save_every_n_steps=20, save_at_end=False, max_checkpoints=2
            ),
            InterruptAfter(max_updates),
        ],
        seed=0,
    )
    trainer.train(
        load_digits(),
        num_epochs=num_epochs,
        per_device_batch_size=32,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(),
        resume_from="auto",
    )
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save-dir", default="training_states")
    parser.add_argument("--max-updates", type=int)
    arguments = parser.parse_args()
    main(save_dir=arguments.save_dir, max_updates=arguments.max_updates)
