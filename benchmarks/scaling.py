"""Checks the model of step time in docs/scaling.md against two processes.

Run it with ``torchrun --standalone --nproc_per_node 2 benchmarks/scaling.py``. For each
size of model it measures the step of one process alone, the time that an all-reduce of
as many bytes as the gradients takes, and the step with both, in turns; and prints the
medians beside what the model says.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrainerCallback

WIDTHS = (256, 1024, 2048)
BATCH_SIZE = 32
NUM_ROUNDS = 5
STEPS_IN_ROUND = 8


class Clock(TrainerCallback):
    """Notes when each update has ended."""

    may_stop_alone = False

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_update_end(self, trainer: Trainer, **kwargs: object) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())


def create_trainer(width: int, clock: Clock) -> Trainer:
    """Create a trainer of a network whose size goes with the square of its width."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4)]
    model = nn.Sequential(*layers, nn.Linear(width, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    return Trainer(model, nn.MSELoss(), optimizer, callbacks=[clock], seed=1)


def times_of(action: Callable[[], None]) -> list[float]:
    """Return the seconds that each of several calls takes."""
    torch.distributed.barrier()
    times = []
    for _ in range(STEPS_IN_ROUND):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return times


def measure(width: int) -> tuple[int, dict[str, float]]:
    """Return the bytes of the gradients, and the median times of what a step does."""
    clock = Clock()
    trainer = create_trainer(width, clock)
    model, optimizer = trainer.model, trainer.optimizer
    inputs = torch.randn(BATCH_SIZE, width)
    targets = inputs.sum(dim=1, keepdim=True)
    gradients = torch.zeros(sum(p.numel() for p in model.parameters()))
    many = (STEPS_IN_ROUND + 2) * trainer._accelerator.num_processes
    data = TensorDataset(inputs.repeat(many, 1), targets.repeat(many, 1))

    def step_alone() -> None:
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    def reduce() -> None:
        torch.distributed.all_reduce(gradients)

    seconds: dict[str, list[float]] = {"alone": [], "all-reduce": [], "together": []}
    for _ in range(NUM_ROUNDS):
        seconds["alone"] += times_of(step_alone)
        seconds["all-reduce"] += times_of(reduce)
        clock.times.clear()
        trainer.train(data, num_epochs=1, per_device_batch_size=BATCH_SIZE)
        # DDP plans its buckets anew after the first step.
        steps = [b - a for a, b in itertools.pairwise(clock.times)]
        seconds["together"] += steps[1:]
    size = gradients.numel() * gradients.element_size()
    return size, {name: statistics.median(each) for name, each in seconds.items()}


def main() -> None:
    """Print a line for each size."""
    for width in WIDTHS:
        size, seconds = measure(width)
        alone, reduce = seconds["alone"], seconds["all-reduce"]
        if torch.distributed.get_rank() == 0:
            print(
                f"{size / 1e6:7.1f} MB of gradients  alone {alone * 1e3:7.1f} ms  "
                f"all-reduce {reduce * 1e3:7.1f} ms  "
                f"model {max(alone, reduce) * 1e3:.1f} to {(alone + reduce) * 1e3:.1f} "
                f"ms  measured {seconds['together'] * 1e3:7.1f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
