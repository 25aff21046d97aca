"""Metrics, hyper-parameters and plots of a run in Weights & Biases, without an account.

    pip install 'pytorch-accelerated[wandb]'

With ``WANDB_MODE=offline`` the run is written to the folder ``wandb``, and ``wandb
sync`` uploads it whenever you want. Leave it out to see the run while it goes on. Other
trackers have other names: ``TrackerCallback("tensorboard")``, "mlflow", "trackio".
"""

import os

import torch
from torch import nn

from digits import accuracy, create_model, load_digits
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrackerCallback, get_default_callbacks


def main(num_epochs=5):
    os.environ.setdefault("WANDB_MODE", "offline")
    torch.manual_seed(0)
    train_dataset, validation_dataset, test_dataset = load_digits()
    model = create_model()
    tracking = TrackerCallback(
        "wandb", project="digits", config={"lr": 2e-3}, every_n_updates=10
    )

    trainer = Trainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3),
        callbacks=[*get_default_callbacks(), tracking],
        metrics={"accuracy": accuracy},
        seed=0,
    )
    trainer.train(
        train_dataset, num_epochs, validation_dataset, per_device_batch_size=32
    )
    metrics = trainer.evaluate(test_dataset, per_device_batch_size=64)

    trainer.print(f"\n{metrics['evaluation_accuracy']:.1%} of unseen digits are right")
    trainer.print("To upload the run: wandb sync wandb/offline-run-*")
    return metrics["evaluation_accuracy"]


if __name__ == "__main__":
    main()
