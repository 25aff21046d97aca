"""What the tasks beside this file share: real handwritten digits, and a small network.

The same as in the quick start; nothing is downloaded.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset, random_split

from pytorch_accelerated import Trainer

DIGITS_FILE = Path(__file__).parents[1] / "data" / "digits.npz"


def load_digits():
    """Return 1,257 digits to train on, 180 to validate, 360 to test.

    An image has the shape (1, 8, 8) and values from 0 to 1. The parts are the same in
    each run and on each process.
    """
    with np.load(DIGITS_FILE) as digits:
        images, labels = digits["images"], digits["labels"]
    images = torch.from_numpy(images).float().div(16).unsqueeze(1)
    dataset = TensorDataset(images, torch.from_numpy(labels).long())
    generator = torch.Generator().manual_seed(0)
    return random_split(dataset, [1257, 180, 360], generator)


def create_model(num_channels=16, num_outputs=10):
    return nn.Sequential(
        nn.Conv2d(1, num_channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(num_channels, 2 * num_channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * num_channels * 4 * 4, num_outputs),
    )


def accuracy(predictions, targets):
    """Return the fraction of samples whose greatest output is the right one."""
    return (predictions.argmax(dim=1) == targets).float().mean()


def train_classifier(model, dataset, num_epochs):
    """Train a network that another one is then to learn from, or be judged by."""
    trainer = Trainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3),
        seed=0,
    )
    trainer.train(dataset, num_epochs, per_device_batch_size=32)
    return model
