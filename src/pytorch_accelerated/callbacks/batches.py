"""Limiting a run to a few batches, to try it out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
        long as the run. Doing it again changes nothing.
        """
        trainer._train_dataloader = self._first_batches(trainer._train_dataloader)
        trainer._eval_dataloader = self._first_batches(trainer._eval_dataloader)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Limit the loaders."""
        self.limit(trainer)

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Limit the loaders."""
        self.limit(trainer)

    def _first_batches(self, loader: Any) -> Any:
        is_limited = (
            isinstance(loader, DataLoaderSlice)
            and loader.slice_size <= self.num_batches
        )
        if loader is None or is_limited:
            return loader
        return DataLoaderSlice(loader, self.num_batches)
