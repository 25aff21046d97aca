"""The record of what a run was asked to do."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class TrainerRunConfig:
    """What a run was asked to do, and the arithmetic that follows from it.

    Created by the trainer at the start of each run and available as
    ``trainer.run_config`` from then on. During a run it only changes if batches are
    made smaller because memory ran out.

    Attributes:
        num_epochs: Epochs of this run, after a step limit has shortened it; where
            only that limit was given, and the length of the training data is unknown,
            the most that it can take.
        train_per_device_batch_size: Samples in a training batch of one process.
        train_dl_kwargs: The arguments that the training loader was made with.
        eval_per_device_batch_size: Samples in an evaluation batch of one process.
        eval_dl_kwargs: The arguments that the evaluation loader was made with.
        gradient_accumulation_steps: Batches of one process in an update.
        gradient_clip_value: Largest absolute value of a gradient element.
        train_total_batch_size: Samples in an update, over all processes.
        eval_total_batch_size: Samples in an evaluation step, over all processes.
        num_update_steps_per_epoch: Updates in a full epoch, the same on every
            process; None when the length of the training data is unknown.
        num_local_update_steps_per_epoch: The same number: an update counts once,
            whatever the number of processes.
        max_num_train_steps: Updates that the run makes, also without a limit; None for
            an evaluation. Where the length of the training data is unknown this is the
            limit, if any.
        is_local_process_zero: Whether this process is the first on its machine.
        is_world_process_zero: Whether this process is the first of the job.
        is_distributed: Whether the job has a distributed backend.
        mixed_precision: Accelerate's setting: "no", "fp16", "bf16" or "fp8".
        num_processes: Processes of the job.
        gradient_clip_norm: Largest total norm of the gradients of an update.
        seed: The seed that the trainer was given, if any.
        data_seed: The seed that the order of the training data is a function of, see
            :func:`pytorch_accelerated.data.epoch_order`.
    """

    num_epochs: int
    train_per_device_batch_size: int | None
    train_dl_kwargs: dict[str, Any] | None
    eval_per_device_batch_size: int | None
    eval_dl_kwargs: dict[str, Any] | None
    gradient_accumulation_steps: int
    gradient_clip_value: float | None
    train_total_batch_size: int | None
    eval_total_batch_size: int | None
    num_update_steps_per_epoch: int | None
    num_local_update_steps_per_epoch: int | None
    max_num_train_steps: int | None
    is_local_process_zero: bool
    is_world_process_zero: bool
    is_distributed: bool
    mixed_precision: str
    num_processes: int
    gradient_clip_norm: float | None = None
    seed: int | None = None
    data_seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a plain dictionary; loader arguments are copied."""
        return {
            field.name: dict(value) if isinstance(value, dict) else value
            for field in fields(self)
            for value in [getattr(self, field.name)]
        }

    def __getitem__(self, name: str) -> Any:
        """Read a field by its name, as in ``run_config["num_epochs"]``."""
        names = [field.name for field in fields(self)]
        if name not in names:
            raise KeyError(f"The run config has no field {name!r}; it has: {names}")
        return getattr(self, name)
