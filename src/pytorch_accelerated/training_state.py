"""The files of a training state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pytorch_accelerated import checkpoint

_FILES = {
    "optimizer": "optimizer.bin",
    "scheduler": "scheduler.bin",
    "scaler": "scaler.pt",
    "metadata": "trainer_metadata.pt",
    "run": "run.pt",
}


@dataclass
class TrainingState:
    """Everything that a run needs to go on: the contents of a checkpoint folder.

    Args:
        model: The state dict of the plain model.
        optimizer: The state dict of the optimizer, if there is one.
        scheduler: The state dict of the scheduler, if there is one.
        scaler: The state dict of the gradient scaler of fp16, if there is one.
        metadata: The epoch to go on with, and what the user saved beside it.
        run: Where the run stands, its history, and the states of its callbacks; empty
            if it was saved by 0.1.61.
        random_states: The random states of this process, if they were saved for it.
    """

    model: Mapping[str, Any]
    optimizer: Mapping[str, Any] | None
    scheduler: Mapping[str, Any] | None
    scaler: Mapping[str, Any] | None
    metadata: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict)
    random_states: Mapping[str, Any] | None = None

    def write(self, writer: checkpoint.CheckpointWriter) -> None:
        """Write what all processes have in common."""
        writer.write_weights(self.model)
        for name, file in _FILES.items():
            if getattr(self, name) is not None:
                writer.write(file, getattr(self, name))

    @staticmethod
    def write_random_states(writer: checkpoint.CheckpointWriter, process: int) -> None:
        """Write the present random states of a process."""
        writer.write(_random_states_file(process), checkpoint.get_random_states())

    @classmethod
    def read(cls, folder: str | os.PathLike[str], process: int) -> TrainingState:
        """Read a folder, after checking that it is whole.

        Args:
            folder: Written by this library or, without a manifest, by 0.1.61.
            process: Index of the process whose random states are read.

        Raises:
            CheckpointError: If the folder is missing, damaged or not to be trusted.
        """
        if checkpoint.is_legacy_training_state(folder):
            legacy = checkpoint.read_legacy_training_state(folder)
            return cls(
                model=legacy.model,
                optimizer=legacy.optimizer,
                scheduler=legacy.scheduler,
                scaler=legacy.scaler,
                metadata=legacy.metadata,
                random_states=legacy.random_states.get(process),
            )
        saved = checkpoint.Checkpoint(folder)
        saved.verify()
        files = {**_FILES, "random_states": _random_states_file(process)}
        contents: dict[str, Any] = {
            name: saved.load(file) if file in saved.files else None
            for name, file in files.items()
        }
        return cls(model=saved.load_weights(), **contents)


def _random_states_file(process: int) -> str:
    return f"random_states_{process}.pt"
