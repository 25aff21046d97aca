"""Where each microsecond of a training step goes, against the loop written by hand.

The work is a tiny perceptron (784-128-64-10, batches of 32, SGD with momentum, one
thread). One part after the other is taken out of the trainer's step, or put into the
loop by hand; all variants run in turn, in rounds, and processor time is measured, of
which the least over the rounds is taken: it is what the part costs on a machine that
does nothing else. Differences below some 5 us are noise.

    python benchmarks/profile_step.py --rounds 60
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from workloads import Job, _mlp_job

from pytorch_accelerated import Trainer
from pytorch_accelerated.data.loaders import PlannedLoader
from pytorch_accelerated.trainer import DEFAULT_CALLBACKS

NUM_STEPS = 200


def nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a part that is taken out."""


class TimedTrainer(Trainer):
    """Measures the processor time of the steps of an epoch."""

    def _run_windows(self, train_dl: Any) -> bool:
        start = time.process_time()
        is_over = super()._run_windows(train_dl)
        self.seconds = time.process_time() - start
        return is_over


def with_trainer(job: Job, callbacks: Iterable[Any] = (), without: str = "") -> float:
    """Return the seconds that the steps take, without one of their parts."""
    trainer = TimedTrainer(job.model, job.loss_func, job.optimizer, callbacks)
    package = "pytorch_accelerated."
    with (
        mock.patch(package + without, nothing) if without else contextlib.nullcontext(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        trainer.train(
            job.dataset,
            num_epochs=1,
            per_device_batch_size=job.batch_size,
            train_dataloader_kwargs={"num_workers": 0},
        )
    return trainer.seconds


def by_hand(job: Job, batches: Iterable[Any]) -> float:
    """Return the seconds that the loop by hand takes over some batches."""
    model, optimizer, loss_func = job.model, job.optimizer, job.loss_func
    start = time.process_time()
    for inputs, targets in batches:
        loss = loss_func(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - start


def loader(job: Job) -> DataLoader:
    """Return the loader of the loop by hand."""
    return DataLoader(job.dataset, job.batch_size, shuffle=True)


def planned(job: Job) -> PlannedLoader:
    """Return the loader of the trainer."""
    return PlannedLoader(loader(job), torch.device("cpu"), seed=0)


def create_variants(*, one_by_one: bool) -> dict[str, Callable[[], float]]:
    """Return what is measured, by its name."""

    def job() -> Job:
        return _mlp_job(NUM_STEPS, one_by_one=one_by_one)

    def hand(create_batches: Callable[[Job], Iterable[Any]]) -> Callable[[], float]:
        def measure() -> float:
            work = job()
            return by_hand(work, create_batches(work))

        return measure

    return {
        "by hand": hand(loader),
        "by hand, batches made beforehand": hand(lambda job: list(loader(job))),
        "by hand, with the trainer's loader": hand(planned),
        "trainer": lambda: with_trainer(job()),
        "trainer, no loss recorded": lambda: with_trainer(
            job(), without="trainer.Trainer._update_loss_tracker"
        ),
        "trainer, no scalars looked for": lambda: with_trainer(
            job(), without="means.Means.add_scalars"
        ),
        "trainer, no events": lambda: with_trainer(job(), without="events.tell"),
        "trainer, default callbacks": lambda: with_trainer(job(), DEFAULT_CALLBACKS),
    }


def main() -> None:
    """Print a table for data in memory and one for data read sample by sample."""
    parser = argparse.ArgumentParser(description="Profile a training step.")
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for one_by_one in (False, True):
        variants = create_variants(one_by_one=one_by_one)
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name in random.sample(list(variants), len(variants)):
                seconds[name].append(variants[name]())
        base = min(seconds["by hand"])
        print("sample by sample" if one_by_one else "data in memory")
        for name, measured in seconds.items():
            least = min(measured)
            step, more = (1e6 * value / NUM_STEPS for value in (least, least - base))
            print(f"  {name:36} {step:7.1f} us a step  {more:+7.1f}")


if __name__ == "__main__":
    main()
