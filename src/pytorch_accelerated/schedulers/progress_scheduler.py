"""Learning rates as a function of how much of a run is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

from torch.optim import Optimizer

from pytorch_accelerated.placeholders import TrainerPlaceholderValues as Run
from pytorch_accelerated.schedulers.scheduler_base import (
    InvalidScheduleError,
    StatefulSchedulerBase,
    check_range,
    count_updates,
    warn_if_longer,
)

NamedShape: TypeAlias = Literal["constant", "linear", "polynomial", "inverse_sqrt"]
Shape: TypeAlias = NamedShape | Callable[[float], float]


class ProgressLrScheduler(StatefulSchedulerBase):
    """Sets the learning rate to a shape that is drawn over the whole run.

    With T, W and C the updates of the schedule, of the warm-up and of the cooldown, b
    the learning rate of the parameter group, s the ``warmup_start``, e the ``end``, and
    p = (n - W) / (T - W - C), update n, counted from 0, trains with::

        n < W:           b * (s + n * (1 - s) / W)
        W <= n < T - C:  b * shape(p)
        n >= T - C:      b * (shape(1) + (n - T + C) * (e - shape(1)) / C)

    and with ``b * e``, or ``b * shape(1)`` where there is no cooldown, from update T
    on. The shapes that have a name are::

        "constant":      1
        "linear":        e + (1 - e) * (1 - p)
        "polynomial":    e + (1 - e) * (1 - p) ** power
        "inverse_sqrt":  sqrt(W / n)

    Args:
        optimizer: The optimizer whose learning rates are set.
        shape: The name of a shape, or a function of the progress p from 0 to 1 that
            returns the fraction of the learning rate to train with.
        total_updates: The length of the schedule, warm-up and cooldown included.
        warmup: Updates of linear warm-up; below 1, the fraction of the schedule that
            they make up.
        cooldown: Updates, or the fraction, over which the learning rate goes in a line
            from where the shape has led to ``end``.
        end: Where the schedule ends, as a fraction of the learning rate.
        warmup_start: Where the warm-up starts, as a fraction of the learning rate.
        power: That of the polynomial.

    Raises:
        InvalidScheduleError: There is no shape of this name, or an argument is out of
            its range.

    Warns:
        TrainingWarning: Warm-up and cooldown are longer than the schedule.
    """

    # A function cannot be stored, and the learning rates at the start are those of the
    # optimizer that the scheduler is created for.
    _not_saved = ("optimizer", "base_lr_values", "param_group_field", "shape")

    def __init__(
        self,
        optimizer: Optimizer,
        shape: Shape,
        total_updates: int,
        *,
        warmup: float = 0,
        cooldown: float = 0,
        end: float = 0.0,
        warmup_start: float = 1e-3,
        power: float = 2.0,
    ) -> None:
        super().__init__(optimizer)
        check_range("total_updates", total_updates, 1)
        check_range("end", end, 0)
        self.shape: Shape = shape
        self.total_updates = total_updates
        self.warmup: float = _updates("warmup", warmup, total_updates)
        self.cooldown: float = _updates("cooldown", cooldown, total_updates)
        self.end = end
        self.warmup_start = warmup_start
        self.power = power
        names = get_args(NamedShape)
        if not callable(shape) and shape not in names:
            raise InvalidScheduleError(
                f"There is no shape {shape!r}. Take one of {', '.join(names)}, or a "
                "function of the progress from 0 to 1."
            )
        if shape == "inverse_sqrt" and self.warmup == 0:
            raise InvalidScheduleError("inverse_sqrt needs a warmup above 0 updates.")
        warn_if_longer(self.warmup + self.cooldown, total_updates, "warmup or cooldown")
        self.step_update(0)

    @classmethod
    def create_scheduler_fn(
        cls,
        shape: Shape,
        total_updates: Any = Run.NUM_EPOCHS * Run.NUM_UPDATE_STEPS_PER_EPOCH,
        **kwargs: Any,
    ) -> partial[ProgressLrScheduler]:
        """Return what `Trainer.train` takes as ``create_scheduler_fn``.

        The arguments are those of the class, and may be placeholders. By default the
        schedule is as long as the run; the trainer fills in the rest.
        """
        return partial(cls, shape=shape, total_updates=total_updates, **kwargs)

    def get_updated_values(self, num_updates: int) -> list[float]:
        """Return the learning rate of each group at update ``num_updates``, from 0."""
        factor = self._factor(num_updates)
        return [factor * base_lr for base_lr in self.base_lr_values]

    def _factor(self, num_updates: int) -> float:
        if num_updates < self.warmup:
            done = num_updates / self.warmup
            return self.warmup_start + done * (1 - self.warmup_start)
        start_of_cooldown = self.total_updates - self.cooldown
        if num_updates < start_of_cooldown:
            length = start_of_cooldown - self.warmup
            return self._shape_at((num_updates - self.warmup) / length)
        last = self._shape_at(1.0)
        if self.cooldown == 0:
            return last
        done = (num_updates - start_of_cooldown) / self.cooldown
        return last + min(done, 1.0) * (self.end - last)

    def _shape_at(self, progress: float) -> float:
        if callable(self.shape):
            return float(self.shape(progress))
        if self.shape == "constant":
            return 1.0
        if self.shape == "inverse_sqrt":
            length = self.total_updates - self.cooldown - self.warmup
            return math.sqrt(self.warmup / (self.warmup + progress * max(length, 0)))
        power = 1.0 if self.shape == "linear" else self.power
        return self.end + (1 - self.end) * math.pow(1 - progress, power)


def _updates(name: str, number: float, total_updates: int) -> float:
    """Return a number of updates, which below 1 is a fraction of them all."""
    check_range(name, number, 0)
    return count_updates(number, total_updates) if number < 1 else number
