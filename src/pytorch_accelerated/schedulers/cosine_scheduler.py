"""Cosine annealing with warm-up and cooldown."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch.optim import Optimizer

from pytorch_accelerated.errors import warn
from pytorch_accelerated.placeholders import TrainerPlaceholderValues
from pytorch_accelerated.schedulers.scheduler_base import (
    InvalidScheduleError,
    StatefulSchedulerBase,
    check_range,
    count_updates,
    warn_if_longer,
)


class CosineLrScheduler(StatefulSchedulerBase):
    """Anneals the learning rate along half a cosine, once per update.

    With T, W and C the updates of the whole schedule, of the warm-up and of the
    cooldown, b the learning rate of the parameter group, m the lowest one and s the
    one at the start of the warm-up, update n, counted from 0, trains with::

        n < W:           s + n * (b - s) / W
        W <= n < T - C:  m + (b - m) / 2 * (1 + cos(pi * (n - W)**k / (T - W - C)**k))
        n >= T - C:      m

    The annealing is that of `SGDR <https://arxiv.org/abs/1608.03983>`_ without
    restarts, and k is that of `k-decay <https://arxiv.org/abs/2004.05909>`_.

    Args:
        optimizer: The optimizer whose learning rates are annealed.
        total_num_epochs: Length of the schedule, warm-up and cooldown included.
        num_update_steps_per_epoch: Updates in an epoch.
        k_decay: Above 1 the learning rate stays high for longer, below 1 it falls
            earlier.
        lr_min: The lowest learning rate.
        min_lr_ratio: The lowest learning rate as a fraction of that of each group,
            instead of ``lr_min``.
        num_warmup_epochs: Epochs of linear warm-up; fractions are allowed.
        warmup_starting_lr: The learning rate that the warm-up starts from.
        warmup_starting_lr_ratio: The same as a fraction of that of each group,
            instead of ``warmup_starting_lr``.
        num_cooldown_epochs: Epochs at the lowest learning rate at the end.

    Raises:
        InvalidScheduleError: The schedule has no length, or a length or the lowest
            learning rate is negative.

    Warns:
        TrainingWarning: Warm-up and cooldown are longer than the schedule, or the
            lowest learning rate or the start of the warm-up is above that of a group.
    """

    # The learning rates at the start are those of the optimizer that the scheduler is
    # created for.
    _not_saved = ("optimizer", "base_lr_values", "param_group_field")

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_epochs: float,
        num_update_steps_per_epoch: int,
        k_decay: float = 1.0,
        lr_min: float = 1e-6,
        min_lr_ratio: float | None = None,
        num_warmup_epochs: float = 0,
        warmup_starting_lr: float = 1e-6,
        warmup_starting_lr_ratio: float | None = None,
        num_cooldown_epochs: float = 0,
    ) -> None:
        super().__init__(optimizer)
        self.total_iterations: float = count_updates(
            total_num_epochs, num_update_steps_per_epoch
        )
        self.warmup_iterations: float = num_warmup_epochs * num_update_steps_per_epoch
        self.num_cooldown_iterations: float = (
            num_cooldown_epochs * num_update_steps_per_epoch
        )
        self.k_decay = k_decay
        self.lr_min = lr_min
        self.lr_min_ratio = min_lr_ratio
        self.warmup_lr_init = warmup_starting_lr
        self.warmup_lr_ratio = warmup_starting_lr_ratio
        self._check_arguments()
        self._warn_of_what_is_hardly_meant()
        self.step_update(0)

    @classmethod
    def create_scheduler_fn(
        cls,
        total_num_epochs: Any = TrainerPlaceholderValues.NUM_EPOCHS,
        num_update_steps_per_epoch: Any = (
            TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH
        ),
        k_decay: float = 1.0,
        lr_min: float = 1e-6,
        min_lr_ratio: float | None = None,
        num_warmup_epochs: Any = 0,
        warmup_starting_lr: float = 1e-6,
        warmup_starting_lr_ratio: float | None = None,
        num_cooldown_epochs: Any = 0,
    ) -> partial[CosineLrScheduler]:
        """Return what `Trainer.train` takes as ``create_scheduler_fn``.

        The arguments are those of the class. By default the schedule is as long as
        the run; the trainer fills in the optimizer and the placeholders.
        """
        return partial(
            cls,
            total_num_epochs=total_num_epochs,
            num_update_steps_per_epoch=num_update_steps_per_epoch,
            k_decay=k_decay,
            lr_min=lr_min,
            min_lr_ratio=min_lr_ratio,
            num_warmup_epochs=num_warmup_epochs,
            warmup_starting_lr=warmup_starting_lr,
            warmup_starting_lr_ratio=warmup_starting_lr_ratio,
            num_cooldown_epochs=num_cooldown_epochs,
        )

    def get_updated_values(self, num_updates: int) -> list[float]:
        """Return the learning rate of each group at update ``num_updates``, from 0."""
        return [
            self._calculate_lr(base_lr, num_updates) for base_lr in self.base_lr_values
        ]

    def _calculate_lr(self, base_lr: float, num_updates: int) -> float:
        if num_updates < self.warmup_iterations:
            start = self._start_of_warmup(base_lr)
            return start + num_updates * (base_lr - start) / self.warmup_iterations

        lowest = self._lowest(base_lr)
        end = self.total_iterations - self.num_cooldown_iterations
        if num_updates >= end:
            return lowest
        progress = (num_updates - self.warmup_iterations) / (
            end - self.warmup_iterations
        )
        return lowest + 0.5 * (base_lr - lowest) * (
            1 + math.cos(math.pi * progress**self.k_decay)
        )

    def _lowest(self, base_lr: float) -> float:
        ratio = self.lr_min_ratio
        return self.lr_min if ratio is None else ratio * base_lr

    def _start_of_warmup(self, base_lr: float) -> float:
        ratio = self.warmup_lr_ratio
        return self.warmup_lr_init if ratio is None else ratio * base_lr

    def _check_arguments(self) -> None:
        if self.total_iterations <= 0:
            raise InvalidScheduleError(
                "total_num_epochs and num_update_steps_per_epoch must be above 0, but "
                f"their product is {self.total_iterations}."
            )
        check_range("lr_min", self.lr_min, 0)
        check_range("num_warmup_epochs", self.warmup_iterations, 0)
        check_range("num_cooldown_epochs", self.num_cooldown_iterations, 0)

    def _warn_of_what_is_hardly_meant(self) -> None:
        warn_if_longer(
            self.warmup_iterations + self.num_cooldown_iterations,
            self.total_iterations,
            "num_warmup_epochs or num_cooldown_epochs",
        )
        limits = [("lowest learning rate", self._lowest, "lr_min or min_lr_ratio")]
        if self.warmup_iterations > 0:
            start = "learning rate that the warm-up starts from"
            arguments = "warmup_starting_lr or warmup_starting_lr_ratio"
            limits.append((start, self._start_of_warmup, arguments))
        for name, calculate, arguments in limits:
            above = [lr for lr in self.base_lr_values if calculate(lr) > lr]
            if above:
                warn(
                    f"The {name} is {calculate(above[0]):g}, above that of the "
                    f"optimizer, {above[0]:g}. Set {arguments} to less."
                )
