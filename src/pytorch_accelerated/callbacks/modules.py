"""Callbacks that change modules before a run: their device, their batch norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from pytorch_accelerated import compat
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class MoveModulesToDeviceCallback(TrainerCallback):
    """Moves the modules that are attributes of the trainer to its device.

    So metrics of torchmetrics and loss functions with buffers can simply be assigned in
    the constructor of a trainer. The model is left to the trainer, and properties are
    not evaluated.
    """

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Move the modules."""
        for name, value in _attributes_of(trainer).items():
            if isinstance(value, nn.Module) and name != "model":
                value.to(trainer.device)

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Move the modules."""
        self.on_training_run_start(trainer)


def _attributes_of(instance: object) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for cls in reversed(type(instance).__mro__):
        attributes.update(vars(cls))
    return attributes | vars(instance)


class ConvertSyncBatchNormCallback(TrainerCallback):
    """Lets batch norms use the statistics of all processes.

    Every batch norm of the model becomes a :class:`torch.nn.SyncBatchNorm`, if there
    are several processes. This happens when the trainer is created, before the model is
    wrapped for them.
    """

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Convert the batch norms of the model.

        Raises:
            ValueError: If the processes run on a CPU.
        """
        is_alone = trainer._accelerator.num_processes == 1
        if is_alone or not any(map(_is_unsynchronised, trainer.model.modules())):
            return
        if trainer.device.type == "cpu":
            raise ValueError(
                "ConvertSyncBatchNormCallback cannot be used on CPU processes: torch's "
                "SyncBatchNorm needs GPUs. Leave the callback out, or use a norm that "
                "does not depend on the batch, such as GroupNorm."
            )
        trainer.model = nn.SyncBatchNorm.convert_sync_batchnorm(  # type: ignore[no-untyped-call]
            trainer.model
        )

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Convert batch norms that have come since, or if it was added later."""
        self.on_init_end(trainer)


def _is_unsynchronised(module: nn.Module) -> bool:
    is_batch_norm = isinstance(module, compat.BatchNorm)
    return is_batch_norm and not isinstance(module, nn.SyncBatchNorm)
