"""What the trials have in common: runs that go on by themselves, and their results."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from processes import Job
from scenario import Scenario, difference, fingerprint

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, TrainerCallback
from pytorch_accelerated.checkpoint import folder as folders

# A run of one epoch and one update.
SMALL = Scenario(
    num_epochs=1,
    num_samples=12,
    save_best=False,
    save_every_n_steps=None,
    ends_schedule=False,
)


class AtNth(TrainerCallback):
    """Does something in an event, at its n-th time.

    Args:
        event: The name of the event.
        act: Called with the trainer.
        count: At which time.
        is_last: Whether after all other callbacks.
    """

    def __init__(
        self,
        event: str,
        act: Callable[[Trainer], Any],
        count: int = 1,
        *,
        is_last: bool = False,
    ) -> None:
        self.left = count
        self.called_last = (event,) if is_last else ()

        def listen(self: AtNth, trainer: Trainer, **kwargs: Any) -> None:
            self.left -= 1
            if self.left == 0:
                act(trainer)

        setattr(self, event, MethodType(listen, self))


def raise_(error: BaseException) -> None:
    raise error


def finish(scenario: Scenario, folder: Path) -> Callable[[], None]:
    """Return a run to the end from wherever an earlier one was.

    It writes down its result, and exits with 143 if it was interrupted.
    """

    def run() -> None:
        trainer = scenario.run(folder, resume_from="auto")
        if trainer.interrupted:
            raise SystemExit(143)
        if trainer._accelerator.is_main_process:
            torch.save(fingerprint(trainer), folder / "result.part")
            os.replace(folder / "result.part", folder / "result.pt")

    return run


def train_another_epoch(trainer: Trainer, state: Path) -> None:
    """Go on from a state, so that what is saved next is newer than it."""
    trainer.train(
        trainer.train_dataset,
        trainer.run_config.num_epochs + 1,
        eval_dataset=trainer.eval_dataset,
        per_device_batch_size=trainer.run_config.train_per_device_batch_size,
        gradient_accumulation_steps=trainer.run_config.gradient_accumulation_steps,
        create_scheduler_fn=trainer.create_scheduler_fn,
        resume_from=state,
    )


def save_with(saving: SaveTrainingStateCallback, trainer: Trainer, name: str) -> None:
    """Save as a callback does that is one of the trainer's meanwhile."""
    trainer.callback_handler.add_callback(saving)
    try:
        saving._save(trainer, name)
    finally:
        trainer.callback_handler.callbacks.remove(saving)


def change_manifest(state: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write the manifest of a state anew, with something else in it."""
    path = state / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["checksum"] = folders._checksum_of(manifest)
    path.write_text(json.dumps(manifest))


def result_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "result.pt", weights_only=False)


def undisturbed(
    scenario: Scenario, folder: Path, num_processes: int = 1
) -> tuple[dict[str, Any], float]:
    """Return the fingerprint of a run that nothing happens to, and its seconds."""
    start = time.monotonic()
    job = Job(finish(scenario, folder), folder / "log", num_processes)
    assert job.wait_or_explain() is None
    return result_of(folder), time.monotonic() - start


def what_is_wrong_after(
    scenario: Scenario, folder: Path, expected: dict[str, Any], num_processes: int = 1
) -> str | None:
    """Run to the end what was disturbed; say how it differs from what was not."""
    job = Job(finish(scenario, folder), folder / "log", num_processes)
    return job.wait_or_explain() or difference(expected, result_of(folder))


def wait_until_it_writes(job: Job, folder: Path) -> None:
    """Wait until a run has begun, or has ended."""
    while not (folder / "states" / ".lock").exists() and not job.poll():
        time.sleep(0.002)
