"""What a checkpoint costs: how long the training loop waits, and bytes on the disk.

    make bench-checkpoints
    python benchmarks/checkpoint_cost.py --millions 100 --rounds 5
    python benchmarks/checkpoint_cost.py --quick

Compares ``save_training_state``, at once and in the background, with
``Accelerator.save_state`` and ``torch.save`` of the same weights and optimizer. The two
last do not wait for the disk; once more, ``torch.save`` is followed by ``fsync``, as
ours does with each file. All take turns, round after round, and each finds a disk that
has written what the one before it left.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tables import write_between_marks
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


@dataclass
class Writer:
    """A way to save, and what it was measured at.

    Args:
        save: Saves to a path, which does not exist; the loop waits until it returns.
        finish: Waits until all is written.
    """

    save: Callable[[Path], Any]
    finish: Callable[[], Any] = lambda: None
    waits: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    num_bytes: int = 0

    def measure(self, path: Path) -> None:
        """Save once, and remove it again."""
        os.sync()
        start = time.perf_counter()
        self.save(path)
        self.waits.append(time.perf_counter() - start)
        self.finish()
        self.totals.append(time.perf_counter() - start)
        self.num_bytes = size_of(path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    files = [path, *path.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


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


def create_writers(trainer: Trainer) -> dict[str, Writer]:
    """Return the ways to save the model and the optimizer of a trainer."""
    accelerator = trainer._accelerator
    model, optimizer = accelerator.prepare(trainer.model, trainer.optimizer)

    def save_with_torch(path: Path) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, path)

    def save_with_torch_to_the_disk(path: Path) -> None:
        save_with_torch(path)
        with path.open("rb") as file:
            os.fsync(file.fileno())

    return {
        "`save_training_state`": Writer(trainer.save_training_state),
        "`save_training_state`, asynchronous": Writer(
            lambda path: trainer.save_training_state(path, asynchronous=True),
            trainer.finish_saving,
        ),
        "`Accelerator.save_state`": Writer(
            lambda path: accelerator.save_state(str(path))
        ),
        "`torch.save`": Writer(save_with_torch),
        "`torch.save` and `fsync`": Writer(save_with_torch_to_the_disk),
    }


def create_table(writers: dict[str, Writer], millions: float) -> str:
    """Return what was measured as a table in Markdown."""
    num_rounds = len(next(iter(writers.values())).waits)
    rows = [
        f"{millions:g} million weights with AdamW, the median of {num_rounds} rounds "
        "with the quarters around it:",
        "",
        "| | the loop waits | until it is complete | bytes |",
        "|---|---|---|---|",
    ]
    rows += [
        f"| {name} | {in_milliseconds(writer.waits)} | "
        f"{in_milliseconds(writer.totals)} | {writer.num_bytes:,} |"
        for name, writer in writers.items()
    ]
    return "\n".join(rows)


def in_milliseconds(seconds: list[float]) -> str:
    """Return the median and the quarters around it."""
    low, median, high = (1e3 * quarter for quarter in statistics.quantiles(seconds))
    return f"{median:,.0f} ms ({low:,.0f} to {high:,.0f})"


def main() -> None:
    """Measure, print the table, and put it into the documentation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=float, default=10.0, help="of weights")
    parser.add_argument("--rounds", type=int, default=9, help="at least 2")
    parser.add_argument(
        "--quick", action="store_true", help="little work, no table in the docs"
    )
    options = parser.parse_args()
    if options.quick:
        options.millions, options.rounds = 0.1, 2
    writers = create_writers(create_trainer(options.millions))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, options.rounds):
            names = list(writers)
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                writers[name].measure(Path(folder) / "saved")
            if number < 0:  # the first time imports, and makes folders
                for writer in writers.values():
                    writer.waits.clear()
                    writer.totals.clear()
    table = create_table(writers, options.millions)
    print(table)
    if not options.quick:
        write_between_marks(PAGE, "checkpoints", table)


if __name__ == "__main__":
    main()
