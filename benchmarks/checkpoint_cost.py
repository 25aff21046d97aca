"""What a checkpoint costs: the time that the training loop waits, and bytes on disk.

Compares ``save_training_state`` (written at once, and in the background) with
``Accelerator.save_state`` and a bare ``torch.save`` of the same weights and optimizer,
none of which brings the files to the disk or survives a kill. Each is timed in turn, so
that a busy machine slows all of them.

``python benchmarks/checkpoint_cost.py [MILLIONS OF WEIGHTS] [REPEATS]``
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer


def create_trainer(millions: float) -> Trainer:
    """Return a trainer that has made one update, so that Adam has its moments."""
    width = round((millions * 1e6 / 4) ** 0.5)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))
    trainer = Trainer(
        model, nn.MSELoss(), torch.optim.AdamW(model.parameters()), callbacks=None
    )
    data = TensorDataset(torch.randn(2, width), torch.randn(2, width))
    trainer.train(data, num_epochs=1)
    return trainer


def create_writers(
    trainer: Trainer, folder: Path
) -> dict[str, tuple[Callable[[], object], Callable[[], object], Path]]:
    """Return by name: what the loop waits for, what follows, and where it goes."""
    accelerator = trainer._accelerator
    model, optimizer = accelerator.prepare(trainer.model, trainer.optimizer)

    def save_with_torch() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, folder / "torch")

    def nothing() -> None:
        pass

    return {
        "save_training_state": (
            lambda: trainer.save_training_state(folder / "sync"),
            nothing,
            folder / "sync",
        ),
        "save_training_state, asynchronous": (
            lambda: trainer.save_training_state(folder / "async", asynchronous=True),
            trainer.finish_saving,
            folder / "async",
        ),
        "accelerate save_state": (
            lambda: accelerator.save_state(str(folder / "accelerate")),
            nothing,
            folder / "accelerate",
        ),
        "torch.save": (save_with_torch, nothing, folder / "torch"),
    }


def main(millions: float = 10.0, repeats: int = 7) -> None:
    """Print the table."""
    trainer = create_trainer(millions)
    with tempfile.TemporaryDirectory() as name:
        writers = create_writers(trainer, Path(name))
        waits: dict[str, list[float]] = {name: [] for name in writers}
        totals: dict[str, list[float]] = {name: [] for name in writers}
        for _ in range(repeats):
            for what, (save, finish, _) in writers.items():
                start = time.perf_counter()
                save()
                waits[what].append(time.perf_counter() - start)
                finish()
                totals[what].append(time.perf_counter() - start)
        print(f"{millions:g} million weights with AdamW, median of {repeats}:\n")
        print("| writer | the loop waits | until complete | bytes |")
        print("|---|---:|---:|---:|")
        for what, (_, _, path) in writers.items():
            files = [path] if path.is_file() else [*path.rglob("*")]
            size = sum(file.stat().st_size for file in files if file.is_file())
            wait, total = (statistics.median(t[what]) for t in (waits, totals))
            print(f"| {what} | {wait:.3f} s | {total:.3f} s | {size:,} |")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(*(kind(value) for kind, value in zip((float, int), arguments, strict=False)))
