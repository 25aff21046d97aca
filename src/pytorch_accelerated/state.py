"""What a run saves and takes up again: dataclasses, and their files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from pytorch_accelerated import checkpoint
from pytorch_accelerated.checkpoint.files import raise_if_out_of_resources
from pytorch_accelerated.checkpoint.folder import SAFETENSORS_NAME, TORCH_NAME
from pytorch_accelerated.errors import CheckpointError, warn
from pytorch_accelerated.window import WindowState

Stored = TypeVar("Stored")

_FILES = {
    "optimizer": "optimizer.bin",
    "scheduler": "scheduler.bin",
    "scaler": "scaler.pt",
    "metadata": "trainer_metadata.pt",
    "run": "run.pt",
    "processes": "processes.pt",
}
_PARTS = "parts"
_WEIGHTS = {SAFETENSORS_NAME, TORCH_NAME}


class Stage(Enum):
    """How far an epoch has come.

    What is next is its training, its evaluation, the step of a scheduler that goes by a
    metric of it, or nothing but events.
    """

    TRAINING = "training"
    EVALUATION = "evaluation"
    EVALUATED = "evaluated"
    ENDED = "ended"


@dataclass
class RunProgress:
    """Where a run stands.

    Args:
        epochs_done: Epochs of this run that are complete.
        stage: How far the current epoch has come.
        step: Training batches of this process that are done in the current epoch.
        first_sample: Samples of the current epoch that were done before its first
            batch, by a run with batches of another size.
        num_updates: Updates applied in this run.
        num_steps: Training batches of this process that are done in this run.
        num_samples_seen: Training samples that all processes have seen in this run.
    """

    epochs_done: int = 0
    stage: Stage = Stage.TRAINING
    step: int = 0
    first_sample: int = 0
    num_updates: int = 0
    num_steps: int = 0
    num_samples_seen: int = 0

    @property
    def is_at_epoch_start(self) -> bool:
        """Whether nothing of the current epoch is done."""
        return self.stage is Stage.TRAINING and not self.is_amid_epoch

    @property
    def is_amid_epoch(self) -> bool:
        """Whether some of the training of the current epoch is done."""
        return self.step > 0 or self.first_sample > 0

    @property
    def is_amid_steps(self) -> bool:
        """Whether some batches of the epoch are trained on, and others may be left."""
        return self.stage is Stage.TRAINING and self.step > 0

    def finish(self, stage: Stage) -> None:
        """Move on from a part of the epoch, if that is where the run stands."""
        if self.stage is stage:
            stages = list(Stage)
            self.stage = stages[stages.index(stage) + 1]

    def start_next_epoch(self) -> None:
        """Move on to the start of the next epoch."""
        self.epochs_done += 1
        self.stage = Stage.TRAINING
        self.step = self.first_sample = 0


@dataclass(frozen=True)
class BatchLayout:
    """How a run cuts an epoch into batches and windows.

    Args:
        num_samples: Samples of an epoch; None where batches are not the trainer's own.
        batch_size: Samples in a batch of one process, if known.
        num_processes: Number of processes.
        accumulation: Batches of one process in a window.
    """

    num_samples: int | None
    batch_size: int | None
    num_processes: int
    accumulation: int

    def num_samples_done(self, progress: RunProgress) -> int | None:
        """Return how many samples of the current epoch are done, if that is known."""
        if self.num_samples is None or self.batch_size is None:
            return None
        done = progress.step * self.batch_size * self.num_processes
        return min(progress.first_sample + done, self.num_samples)

    def differences(self, other: BatchLayout) -> str:
        """Say what another run has different from this one; "" for nothing."""
        words = {
            "batch_size": "batch size",
            "num_processes": "number of processes",
            "accumulation": "gradient accumulation",
        }
        return ", ".join(
            f"{text} {getattr(other, name)} instead of {getattr(self, name)}"
            for name, text in words.items()
            if getattr(self, name) != getattr(other, name)
        )


@dataclass
class RunState:
    """What all processes have in common, besides weights and the like.

    Args:
        progress: Where the run stands.
        layout: How it cuts its epochs; None if it was saved before any run.
        data_seed: The seed of the order of the data.
        num_runs: Runs of the trainer so far, which seeds follow from.
        learning_rates: Those of the last update; None before the first.
        run_id: Tells the states of this trainer's runs from those of others.
        callbacks: The states of the callbacks.
        run_history: The state of the history, if it has one.
    """

    progress: RunProgress
    layout: BatchLayout | None
    data_seed: int
    num_runs: int
    learning_rates: list[Any] | None = None
    run_id: str | None = None
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    run_history: dict[str, Any] | None = None


@dataclass
class ProcessState:
    """What a process has of its own.

    Args:
        random_states: Of all generators; None from other processes, whose random
            numbers have no meaning here.
        window: Of the window that is open.
        trackers: The sums of the epoch's losses and scalars.
        metrics: The states of the epoch's metrics.
        gradients: What has been accumulated in the window, by the names of weights.
        place: Where the loader stands, if it can tell and be set there.
        epoch_random_states: Those from which the order of the epoch may follow, where
            the loader is the user's.
        ahead_random_states: Those before a batch was fetched ahead.
    """

    random_states: Mapping[str, Any] | None = None
    window: WindowState = field(default_factory=WindowState)
    trackers: Mapping[str, dict[str, float]] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    place: Any = None
    epoch_random_states: dict[str, Any] | None = None
    ahead_random_states: dict[str, Any] | None = None


@dataclass
class TrainingState:
    """Everything that a run needs to go on: the contents of a checkpoint folder.

    Args:
        model: The state dict of the plain model.
        optimizer: The state dict of the optimizer, if there is one.
        scheduler: The state dict of the scheduler, if there is one.
        scaler: The state dict of the gradient scaler of fp16, if there is one.
        metadata: The epoch to go on with, and what the user saved beside it.
        run: What all processes have in common; None if 0.1.61 saved it.
        processes: What each process has of its own, as plain values until it is read.
        parts: A folder where processes have written their parts of a sharded model or
            optimizer, which are None here then.
    """

    model: Mapping[str, Any] | None
    optimizer: Mapping[str, Any] | None
    scheduler: Mapping[str, Any] | None
    scaler: Mapping[str, Any] | None
    metadata: Mapping[str, Any]
    run: RunState | None = None
    processes: Sequence[Any] = ()
    parts: str | None = None

    def snapshot(self) -> TrainingState:
        """Return a copy in the host's memory, which training does not change.

        Raises:
            TypeError: If it holds something that could not be loaded again safely.
            CheckpointError: If there is no memory for the copy.
        """
        try:
            return TrainingState(**checkpoint.to_storable(self, "state", copy=True))
        except (MemoryError, RuntimeError) as error:
            raise_if_out_of_resources(error, "Could not copy the training state")
            raise

    def write(self, path: str | os.PathLike[str], summary: Mapping[str, Any]) -> None:
        """Write a folder that is whole or absent.

        Args:
            path: The folder.
            summary: What its manifest says about the run.

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
                if (contents := getattr(self, name)) is not None:
                    writer.write(file, contents)
            writer.commit(summary, world_size=len(self.processes))

    def of_process(self, index: int, num_processes: int) -> ProcessState:
        """Return what a process takes over from those that were saved.

        Random states have no meaning for another number of processes. The sums of the
        losses do: they go to the first.
        """
        if num_processes == len(self.processes):
            own: ProcessState = self.processes[index]
            return own
        sums: dict[str, dict[str, float]] = {}
        for process in self.processes if index == 0 else ():
            for name, tracker in process.trackers.items():
                so_far = sums.setdefault(name, {})
                for key, value in tracker.items():
                    so_far[key] = so_far.get(key, 0.0) + value
        return ProcessState(trackers=sums)

    @classmethod
    def read(cls, saved: checkpoint.Checkpoint) -> TrainingState:
        """Read a folder, after checking that it is whole.

        Args:
            saved: Written by this library or, without a manifest, by 0.1.61.

        Raises:
            CheckpointError: If the folder is missing, damaged or not to be trusted.
        """
        if checkpoint.is_legacy_training_state(saved.path):
            return cls._read_legacy(saved.path)
        saved.verify()
        contents: dict[str, Any] = {
            name: saved.load(file)
            if file in saved.files or name in ("metadata", "run", "processes")
            else None
            for name, file in _FILES.items()
        }
        has_parts = any(name.startswith(f"{_PARTS}/") for name in saved.files)
        has_model = not has_parts or not _WEIGHTS.isdisjoint(saved.files)
        contents["model"] = saved.load_weights() if has_model else None
        contents["parts"] = str(saved.path / _PARTS) if has_parts else None
        try:
            return from_plain(cls, contents)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            files = " and ".join(_FILES[name] for name in ("run", "processes"))
            raise CheckpointError(
                f"{saved.path} is not a training state: {files} do not hold what "
                f"belongs there ({error!r}). Give a folder that save_training_state "
                "wrote."
            ) from error

    @classmethod
    def _read_legacy(cls, path: Path) -> TrainingState:
        contents = checkpoint.read_legacy_training_state(path)
        random_states = contents.pop("random_states")
        processes = range(max(random_states, default=-1) + 1)
        return cls(
            **contents,
            processes=[ProcessState(random_states.get(each)) for each in processes],
        )


# The dataclasses whose values these fields hold.
_STORED_AS: dict[str, Any] = {
    "progress": RunProgress,
    "layout": BatchLayout,
    "window": WindowState,
    "run": RunState,
    "processes": ProcessState,
}


def from_plain(kind: type[Stored], values: Mapping[str, Any]) -> Stored:
    """Make a dataclass of what has been stored of one, by this or an older version.

    What an older version did not save has its default.
    """
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    arguments = {name: value for name, value in values.items() if name in known}
    for name, inner in _STORED_AS.items():
        value = arguments.get(name)
        if isinstance(value, list):
            arguments[name] = [from_plain(inner, each) for each in value]
        elif value is not None:
            arguments[name] = from_plain(inner, value)
    if "stage" in arguments:
        arguments["stage"] = Stage(arguments["stage"])
    return kind(**arguments)


def find_place(
    progress: RunProgress, then: BatchLayout, now: BatchLayout
) -> RunProgress:
    """Return the progress from which a run goes on with the batches that it has now.

    Each sample of a shuffled epoch is still seen once: the place in the order is kept.
    A window of accumulation that was begun is begun again.

    Args:
        progress: Where the saved run stood.
        then: How it cut its epochs.
        now: How this run does.

    Raises:
        CheckpointError: If there is no such place.
    """
    if progress.is_amid_epoch and then.num_samples != now.num_samples:
        unknown = "an unknown number of"
        raise CheckpointError(
            "The run was saved in the middle of an epoch of "
            f"{then.num_samples or unknown} samples, and the training data has "
            f"{now.num_samples or unknown} samples now, so the place in it cannot be "
            "found. Resume with the same data, or from a state saved at the end of an "
            "epoch."
        )
    if not (differences := then.differences(now)):
        return progress
    if progress.is_amid_epoch and then.num_samples_done(progress) is None:
        raise CheckpointError(
            f"The run goes on with {differences}, in the middle of an epoch whose "
            "batches come from a loader or sampler of yours: its place cannot be "
            "found. Resume with the same, or from a state saved at the end of an epoch."
        )
    warn(
        f"The run goes on with {differences}. It keeps its place in the data, and each "
        "sample is seen once in an epoch; but batches, random numbers and the number "
        "of updates in an epoch, which a schedule may count on, are not those of the "
        "run that was saved."
    )
    if not progress.is_amid_epoch:
        return progress
    open_batches = progress.step % then.accumulation
    at_window = replace(progress, step=progress.step - open_batches)
    return replace(progress, step=0, first_sample=then.num_samples_done(at_window) or 0)
