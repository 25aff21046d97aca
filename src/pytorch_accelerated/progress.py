"""Where a run stands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Stage(Enum):
    """How far an epoch has come: the next thing to do in it."""

    TRAINING = "training"
    EVALUATION = "evaluation"
    EVALUATED = "evaluated"
    ENDED = "ended"


@dataclass
class RunProgress:
    """Where a run stands; saved with a training state so that it can go on from there.

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
        return (
            self.stage is Stage.TRAINING and self.step == 0 and self.first_sample == 0
        )

    def start_next_epoch(self) -> None:
        """Move on to the start of the next epoch."""
        self.epochs_done += 1
        self.stage = Stage.TRAINING
        self.step = 0
        self.first_sample = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the progress as plain values."""
        return {**asdict(self), "stage": self.stage.value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunProgress:
        """Make progress of what :meth:`to_dict` returned."""
        return cls(**{**values, "stage": Stage(values["stage"])})
