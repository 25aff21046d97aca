"""The files of a training state."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pytorch_accelerated import checkpoint
from pytorch_accelerated.checkpoint._disk import raise_if_out_of_resources
from pytorch_accelerated.errors import CheckpointError

_FILES = {
    "optimizer": "optimizer.bin",
    "scheduler": "scheduler.bin",
    "scaler": "scaler.pt",
    "metadata": "trainer_metadata.pt",
    "run": "run.pt",
    "processes": "processes.pt",
}
_PARTS = "parts"
_WEIGHTS = {"model.safetensors", "pytorch_model.bin"}


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
        processes: What each process has of its own, such as its random states.
        parts: A folder where processes have written their parts of a sharded model or
            optimizer, which are None here then.
    """

    model: Mapping[str, Any] | None
    optimizer: Mapping[str, Any] | None
    scheduler: Mapping[str, Any] | None
    scaler: Mapping[str, Any] | None
    metadata: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict)
    processes: Sequence[Mapping[str, Any]] = ()
    parts: str | None = None

    def snapshot(self) -> TrainingState:
        """Return a copy in the host's memory, which training does not change.

        Raises:
            TypeError: If it holds something that could not be loaded again safely.
            CheckpointError: If there is no memory for the copy.
        """
        contents = {each.name: getattr(self, each.name) for each in fields(self)}
        try:
            return TrainingState(**checkpoint.to_storable(contents, "state", copy=True))
        except (MemoryError, RuntimeError) as error:
            raise_if_out_of_resources(error, "Could not copy the training state")
            raise

    def write(self, path: str | os.PathLike[str], progress: Mapping[str, Any]) -> None:
        """Write a folder that is whole or absent.

        Args:
            path: The folder.
            progress: What its manifest says about the run.

        Raises:
            TypeError: If it holds something that could not be loaded again safely.
            CheckpointError: If it could not be written.
        """
        with checkpoint.CheckpointWriter(path) as writer:
            if self.model is not None:
                writer.write_weights(self.model)
            if self.parts is not None:
                os.rename(self.parts, writer.folder / _PARTS)
            for name, file in _FILES.items():
                if getattr(self, name) is not None:
                    writer.write(file, getattr(self, name))
            writer.commit(progress, world_size=len(self.processes))

    def of_process(self, index: int, num_processes: int) -> dict[str, Any]:
        """Return what a process takes over from those that were saved.

        Random states have no meaning for another number of processes. The sums of the
        losses do: they go to the first.
        """
        if num_processes == len(self.processes):
            return dict(self.processes[index])
        if index > 0:
            return {}
        sums: dict[str, dict[str, float]] = {}
        for process in self.processes:
            for name, tracker in process.get("trackers", {}).items():
                so_far = sums.setdefault(name, {})
                for key, value in tracker.items():
                    so_far[key] = so_far.get(key, 0.0) + value
        return {"trackers": sums}

    @classmethod
    def read(
        cls,
        folder: str | os.PathLike[str] | checkpoint.Checkpoint,
        *,
        allow_pickle: bool = False,
    ) -> TrainingState:
        """Read a folder, after checking that it is whole.

        Args:
            folder: Written by this library or, without a manifest, by 0.1.61. One that
                has been found whole already is not checked again.
            allow_pickle: Read parts of a state of 0.1.61 that run code to be loaded.

        Raises:
            CheckpointError: If the folder is missing, damaged or not to be trusted.
        """
        saved = (
            folder
            if isinstance(folder, checkpoint.Checkpoint)
            else checkpoint.Checkpoint(folder)
        )
        if checkpoint.is_legacy_training_state(saved.path):
            legacy = checkpoint.read_legacy_training_state(
                saved.path, allow_pickle=allow_pickle
            )
            random_states = legacy.random_states
            return cls(
                model=legacy.model,
                optimizer=legacy.optimizer,
                scheduler=legacy.scheduler,
                scaler=legacy.scaler,
                metadata=legacy.metadata,
                processes=[
                    {"random_states": random_states.get(process)}
                    for process in range(max(random_states, default=-1) + 1)
                ],
            )
        if not saved.is_known_whole:
            saved.verify()
        contents: dict[str, Any] = {
            name: saved.load(file) if file in saved.files else None
            for name, file in _FILES.items()
        }
        for name, content in contents.items():
            kind = list if name == "processes" else dict
            if content is None and name in ("metadata", "run", "processes"):
                raise CheckpointError(
                    f"{saved.path} is not a training state: it has no {_FILES[name]}. "
                    "Give a folder that save_training_state wrote."
                )
            if content is not None and not isinstance(content, kind):
                raise CheckpointError(
                    f"{saved.path} is not a training state: {_FILES[name]} holds a "
                    f"{type(content).__name__} instead of a {kind.__name__}."
                )
        has_parts = any(name.startswith(f"{_PARTS}/") for name in saved.files)
        has_model = not has_parts or not _WEIGHTS.isdisjoint(saved.files)
        return cls(
            model=saved.load_weights() if has_model else None,
            parts=str(saved.path / _PARTS) if has_parts else None,
            **contents,
        )
