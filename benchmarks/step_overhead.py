"""What one training step costs through the trainer, against the loop written by hand.

The work is small on purpose, so that everything around it shows: a multi-layer
perceptron (784-128-64-10), batches of 32 from a ``TensorDataset`` in memory, SGD with
momentum, one torch thread, no progress bar, no evaluation. Both loops run in turn in
one process, and whole epochs are timed, the creation of the loader's iterator and the
reading of the epoch's loss included. The loop by hand records no loss at all.

    python benchmarks/step_overhead.py
"""

import argparse
import statistics
import time

import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrainerCallback

BATCH_SIZE = 32


def create_dataset(num_batches: int) -> TensorDataset:
    """Return random images with random labels."""
    num_samples = num_batches * BATCH_SIZE
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_samples, 784, generator=generator)
    labels = torch.randint(10, (num_samples,), generator=generator)
    return TensorDataset(images, labels)


def create_model_and_optimizer() -> tuple[nn.Module, optim.Optimizer]:
    """Return the same model each time, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    return model, optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def time_epochs_by_hand(dataset: TensorDataset, num_epochs: int) -> list[float]:
    """Return the seconds that each epoch of the plain PyTorch loop takes."""
    model, optimizer = create_model_and_optimizer()
    loss_func = nn.CrossEntropyLoss()
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True)
    seconds = []
    model.train()
    for _ in range(num_epochs):
        start = time.perf_counter()
        for images, labels in loader:
            loss = loss_func(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds


class EpochTimer(TrainerCallback):
    """Time each training epoch, from its start event to its end event."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: object) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: object) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self.start)


def time_epochs_of_trainer(dataset: TensorDataset, num_epochs: int) -> list[float]:
    """Return the seconds that each epoch of the trainer takes."""
    model, optimizer = create_model_and_optimizer()
    timer = EpochTimer()
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=[timer])
    trainer.train(dataset, num_epochs=num_epochs, per_device_batch_size=BATCH_SIZE)
    return timer.seconds


def main() -> None:
    """Run both loops in turn and print the medians and their ratio."""
    parser = argparse.ArgumentParser(description="Measure the overhead of a step.")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=2, help="per repeat")
    parser.add_argument("--batches", type=int, default=300, help="per epoch")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    dataset = create_dataset(arguments.batches)
    by_hand: list[float] = []
    through_trainer: list[float] = []
    time_epochs_by_hand(dataset, 1)  # warm up both once, untimed
    time_epochs_of_trainer(dataset, 1)
    for _ in range(arguments.repeats):
        by_hand += time_epochs_by_hand(dataset, arguments.epochs)
        through_trainer += time_epochs_of_trainer(dataset, arguments.epochs)

    print(f"torch {torch.__version__}, 1 thread, {len(by_hand)} epochs of each loop")
    median_by_hand = statistics.median(by_hand)
    for name, seconds in (("by hand", by_hand), ("trainer", through_trainer)):
        median = statistics.median(seconds)
        step = median / arguments.batches * 1e6
        fastest = min(seconds) / arguments.batches * 1e6
        ratio = median / median_by_hand
        print(
            f"{name:8}  median {step:7.1f} us a step   fastest {fastest:7.1f} us   "
            f"ratio of medians {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
