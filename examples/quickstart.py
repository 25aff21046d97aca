"""Train a small network on real handwritten digits, from nothing to a test accuracy.

    python examples/quickstart.py

Takes well under a minute on a laptop's CPU and downloads nothing: the digits are in
``examples/data``. The same file runs on several processes or GPUs with
``accelerate launch examples/quickstart.py`` or ``torchrun``.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn, optim
from torch.utils.data import TensorDataset, random_split

from pytorch_accelerated import Trainer
from pytorch_accelerated.schedulers import CosineLrScheduler

DIGITS_FILE = Path(__file__).parent / "data" / "digits.npz"


def load_digits():
    """Return the 1,797 images, scaled to 0..1, of shape (1, 8, 8), and their labels."""
    with np.load(DIGITS_FILE) as digits:
        images, labels = digits["images"], digits["labels"]
    images = torch.from_numpy(images).float().div(16).unsqueeze(1)
    return TensorDataset(images, torch.from_numpy(labels).long())


def create_model():
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


class DigitsTrainer(Trainer):
    """A trainer whose evaluations also record the accuracy."""

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        predictions = output["model_outputs"].argmax(dim=1)
        # Every further number in the dictionary is averaged over the samples.
        output["accuracy"] = (predictions == batch[1]).float().mean()
        return output


def main(num_epochs=15):
    torch.manual_seed(0)
    train_dataset, validation_dataset, test_dataset = random_split(
        load_digits(), [1257, 180, 360]
    )

    model = create_model()
    optimizer = optim.AdamW(model.parameters(), lr=2e-3)

    trainer = DigitsTrainer(
        model=model, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer
    )
    trainer.train(
        train_dataset=train_dataset,
        num_epochs=num_epochs,
        eval_dataset=validation_dataset,
        per_device_batch_size=32,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(),
    )
    metrics = trainer.evaluate(dataset=test_dataset, per_device_batch_size=64)

    accuracy = metrics["evaluation_accuracy"]
    trainer.print(f"\nAccuracy on {len(test_dataset)} unseen digits: {accuracy:.2%}")
    return metrics


if __name__ == "__main__":
    main()
