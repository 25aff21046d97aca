"""Limiting a run to a few batches, to try it out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.data import DataLoaderSlice

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class LimitBatchesCallback(TrainerCallback):
    """Limits each epoch, of training and of evaluation, to its first batches.

    Trainers that are created inside :class:`~pytorch_accelerated.utils.LimitBatches`,
    or while ``PT_ACC_LIMIT_BATCHES`` is set, have one.

    Args:
        num_batches: Batches of each loader to use on each process, at least 1.
    """

    def __init__(self, num_batches: int) -> None:
        if num_batches < 1:
            raise ValueError(f"num_batches must be at least 1, got {num_batches}.")
        self.num_batches = num_batches

    def limit(self, trainer: Trainer) -> None:
        """Replace the loaders of the trainer by their first batches.

        The trainer calls this as soon as the loaders exist, so that schedules are as
        long as the run.
        """
        for name in ("_train_dataloader", "_eval_dataloader"):
            loader = getattr(trainer, name)
            if loader is not None:
                setattr(trainer, name, DataLoaderSlice(loader, self.num_batches))
