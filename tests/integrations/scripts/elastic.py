"""A script that goes on where it was, however often it is started."""

import os
import signal
import sys
from pathlib import Path

import torch
from sharded_cases import create_data, create_model
from torch import nn

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, TrainerCallback


class KillsOneProcess(TrainerCallback):
    """As a machine that fails: once, in the middle of an epoch, without a word."""

    def __init__(self, marker, at_update):
        self.marker = marker
        self.at_update = at_update

    def on_train_update_end(self, trainer, num_updates, **kwargs):
        is_due = num_updates == self.at_update and not self.marker.exists()
        if is_due and os.environ["RANK"] == "1":
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder, kill_at_update):
    model = create_model()
    trainer = Trainer(
        model,
        loss_func=nn.MSELoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.02),
        callbacks=[
            SaveTrainingStateCallback(
                save_dir=folder / "states", save_every_n_steps=2, max_checkpoints=2
            ),
            KillsOneProcess(folder / "was_killed", kill_at_update),
        ],
        seed=3,
    )
    history = trainer.train(
        create_data(),
        num_epochs=3,
        per_device_batch_size=2,
        resume_from="auto",
    )
    if trainer._accelerator.is_main_process:
        torch.save(model.state_dict(), folder / "weights.bin")
        losses = list(history.get_metric_values("train_loss_epoch"))
        torch.save(losses, folder / "losses.bin")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
