"""Warm-up, stable phase and decay, with checkpoints to continue from."""

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
)

_TAKEN_FROM_THE_CONTINUED_RUN = (
    "base_lr_values",
    "decay_phase_ratio",
    "lr_min",
    "num_checkpoints",
    "use_inverse_sqrt_decay",
)


class WSDLrScheduler(StatefulSchedulerBase):
    """Keeps the learning rate stable, and lets it decay before each checkpoint.

    The schedule is cut into periods that end with a checkpoint each, see
    `estimate_checkpoint_steps`. Of the p updates of a period, the last
    ``d = int(p * decay_phase_ratio)`` decay. With b the learning rate of the
    parameter group, r the ``lr_min`` and t = 0, 1/d, 2/d ... over those updates, they
    train with::

        b * (r + (1 - r) * (1 - sqrt(t)))   with use_inverse_sqrt_decay
        b / (t / r + (1 - t))               without

    and all others with b, also the first of the next period. After the last period the
    value is ``b * r``. In the warm-up of w updates, update n, counted from 0, trains
    with ``s + n / w * (b - s)``.

    The method is that of `MiniCPM <https://arxiv.org/abs/2404.06395>`_ and, with
    several checkpoints, of `WSD-S <https://arxiv.org/abs/2410.05192>`_; the first
    decay is the "1-sqrt" of `Hägele et al. <https://arxiv.org/abs/2405.18392>`_.

    Args:
        optimizer: The optimizer whose learning rates are set.
        num_epochs: Epochs of the schedule; give them together with
            ``num_update_steps_per_epoch``, or give ``total_steps``.
        num_update_steps_per_epoch: Updates in an epoch.
        total_steps: Updates of the schedule.
        num_warmup_steps: Updates of linear warm-up. None is 1% of the schedule.
        decay_phase_ratio: The fraction of each period that decays, at most 1/3 with
            several checkpoints.
        lr_min: The learning rate that each decay leads to, as a fraction of that of
            the group.
        warmup_starting_lr: The learning rate that the warm-up starts from.
        use_inverse_sqrt_decay: Which of the two decays to use.
        num_checkpoints: The number of checkpoints, and of periods.
        is_continuation_from_checkpoint: The run continues the training of another
            one from its checkpoint. There is no warm-up, and a state that is loaded
            gives the form of the schedule, which starts again from update 0 with the
            length given here.

    Attributes:
        checkpoint_steps: The updates after which the periods end.
        checkpoint_decay_info: What `get_decay_info` returns.
        previous_checkpoint_step: Always None; part of states of earlier versions.

    Raises:
        InvalidScheduleError: The length is missing or given twice, or an argument is
            out of its range.

    Warns:
        TrainingWarning: The warm-up is as long as the first period or longer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_epochs: float | None = None,
        num_update_steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        num_warmup_steps: float | None = 0,
        decay_phase_ratio: float = 0.1,
        lr_min: float = 1e-6,
        warmup_starting_lr: float = 1e-6,
        use_inverse_sqrt_decay: bool = True,
        num_checkpoints: int = 1,
        is_continuation_from_checkpoint: bool = False,
    ) -> None:
        super().__init__(optimizer)
        self.total_steps: int = _find_total_steps(
            num_epochs, num_update_steps_per_epoch, total_steps
        )
        self.num_epochs = num_epochs
        self.num_update_steps_per_epoch = num_update_steps_per_epoch
        self.num_warmup_steps: int = (
            self.total_steps // 100
            if num_warmup_steps is None
            else int(num_warmup_steps)
        )
        self.decay_phase_ratio = decay_phase_ratio
        self.lr_min = lr_min
        self.warmup_starting_lr = warmup_starting_lr
        self.use_inverse_sqrt_decay = use_inverse_sqrt_decay
        self.num_checkpoints = num_checkpoints
        self.is_continuation_from_checkpoint = is_continuation_from_checkpoint
        self.previous_checkpoint_step: None = None
        self._check_arguments()
        self._plan_checkpoints()
        self._warn_of_a_warmup_without_decay()
        self.step_update(0)

    @classmethod
    def create_scheduler_fn(
        cls,
        total_num_epochs: Any = TrainerPlaceholderValues.NUM_EPOCHS,
        num_update_steps_per_epoch: Any = (
            TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH
        ),
        num_warmup_epochs: Any = None,
        decay_phase_ratio: float = 0.1,
        lr_min: float = 1e-6,
        warmup_starting_lr: float = 1e-6,
        use_inverse_sqrt_decay: bool = True,
        num_checkpoints: int = 1,
        is_continuation_from_checkpoint: bool = False,
    ) -> partial[WSDLrScheduler]:
        """Return what `Trainer.train` takes as ``create_scheduler_fn``.

        The arguments are those of the class, with epochs of warm-up (fractions are
        allowed, None is 1% of the schedule) in the place of updates. By default the
        schedule is as long as the run; the trainer fills in the optimizer and the
        placeholders.
        """
        num_warmup_steps = (
            None
            if num_warmup_epochs is None
            else num_warmup_epochs * num_update_steps_per_epoch
        )
        return partial(
            cls,
            num_epochs=total_num_epochs,
            num_update_steps_per_epoch=num_update_steps_per_epoch,
            num_warmup_steps=num_warmup_steps,
            decay_phase_ratio=decay_phase_ratio,
            lr_min=lr_min,
            warmup_starting_lr=warmup_starting_lr,
            use_inverse_sqrt_decay=use_inverse_sqrt_decay,
            num_checkpoints=num_checkpoints,
            is_continuation_from_checkpoint=is_continuation_from_checkpoint,
        )

    def get_updated_values(self, num_updates: int) -> list[float]:
        """Return the learning rate of each group at update ``num_updates``, from 0."""
        if self._is_in_warmup(num_updates):
            start = self.warmup_starting_lr
            progress = num_updates / self.num_warmup_steps
            return [start + progress * (b - start) for b in self.base_lr_values]
        factor = self._decay_factor(num_updates)
        return [factor * base_lr for base_lr in self.base_lr_values]

    def get_checkpoint_steps(self) -> list[int]:
        """Return the numbers of completed updates at which a checkpoint is due."""
        return self.checkpoint_steps

    def get_decay_info(self) -> list[dict[str, int]]:
        """Return where each period starts, begins to decay and ends.

        Returns:
            A dictionary for each period with ``period_start``, ``period_end``,
            ``decay_steps``, and ``pre_decay_step``, where the decay begins, all
            counted in completed updates.
        """
        return self.checkpoint_decay_info

    def get_phase_info(self, num_updates: int) -> dict[str, int]:
        """Return the entry of `get_decay_info` for the period of ``num_updates``.

        The end of a period belongs to it; after the last period, its entry is
        returned.
        """
        for info in self.checkpoint_decay_info:
            if num_updates <= info["period_end"]:
                return info
        return self.checkpoint_decay_info[-1]

    def get_current_step(self) -> int:
        """Return which update the present values are for; -1 before the first step."""
        return self._num_updates

    def get_current_phase_info(self) -> dict[str, int]:
        """Return the entry of `get_decay_info` for the present period."""
        return self.get_phase_info(self._num_updates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state returned by `state_dict`.

        A scheduler created with ``is_continuation_from_checkpoint`` takes only the
        form of the schedule from the state of another run: learning rates, decay and
        number of checkpoints. It keeps its own length and starts from update 0,
        without warm-up. (The state of a continuation of the same length is taken to
        be its own: then it goes on where that one stopped. `restart` starts it again.)

        States of version 0.1.61 hold no position. They are loaded with a warning, and
        the position stays as it is.
        """
        if self.is_continuation_from_checkpoint and not self._is_own(state_dict):
            for name in _TAKEN_FROM_THE_CONTINUED_RUN:
                setattr(self, name, state_dict.get(name, getattr(self, name)))
            self._plan_checkpoints()
            self.restart()
            return
        if "num_updates" not in state_dict:
            warn(
                "This state of a WSDLrScheduler does not say how many updates were "
                "done (version 0.1.61 did not save it), so the schedule goes on from "
                f"update {max(self._num_updates, 0)}."
            )
        super().load_state_dict(state_dict)
        self._plan_checkpoints()

    def restart(self) -> None:
        """Go back to update 0, and set the values that it trains with."""
        # Not yet stepped, it stays so: the first step is still to come.
        self._num_updates = min(self._num_updates, 0)
        self.step_update(0)

    def _is_own(self, state_dict: dict[str, Any]) -> bool:
        return (
            state_dict.get("is_continuation_from_checkpoint") is True
            and state_dict.get("total_steps") == self.total_steps
            and "num_updates" in state_dict
        )

    def _plan_checkpoints(self) -> None:
        self.checkpoint_steps: list[int] = estimate_checkpoint_steps(
            self.total_steps, self.num_checkpoints
        )
        starts = [0, *self.checkpoint_steps[:-1]]
        self.checkpoint_decay_info: list[dict[str, int]] = [
            self._describe_period(start, end)
            for start, end in zip(starts, self.checkpoint_steps, strict=True)
        ]

    def _describe_period(self, start: int, end: int) -> dict[str, int]:
        decay_steps = int((end - start) * self.decay_phase_ratio)
        return {
            "period_start": start,
            "period_end": end,
            "decay_steps": decay_steps,
            "pre_decay_step": end - decay_steps,
        }

    def _is_in_warmup(self, num_updates: int) -> bool:
        return (
            num_updates < self.num_warmup_steps
            and not self.is_continuation_from_checkpoint
        )

    def _get_checkpoint_info(self, num_updates: int) -> tuple[int, int]:
        """Return the length of the period of ``num_updates``, and the offset in it.

        Not used here; scripts call it, and its `cache_clear`.
        """
        info = self.get_phase_info(num_updates)
        start = info["period_start"]
        return info["period_end"] - start, num_updates - start

    # There is nothing to clear: a period is looked up in no time.
    _get_checkpoint_info.cache_clear = lambda: None  # type: ignore[attr-defined]

    def _decay_factor(self, num_updates: int) -> float:
        if num_updates >= self.total_steps:
            return self.lr_min
        # A checkpoint ends a period: the update after it is the first of the next.
        info = self.get_phase_info(num_updates + 1)
        num_decayed = num_updates - info["pre_decay_step"]
        if num_decayed <= 0:
            return 1.0
        t = num_decayed / info["decay_steps"]
        if self.use_inverse_sqrt_decay:
            return self.lr_min + (1 - self.lr_min) * (1 - math.sqrt(t))
        # 1 / (t / lr_min + (1 - t)), in a form that lr_min = 0 does not break
        return self.lr_min / (t + (1 - t) * self.lr_min)

    def _check_arguments(self) -> None:
        check_range("decay_phase_ratio", self.decay_phase_ratio, 0, 1)
        check_range("num_checkpoints", self.num_checkpoints, 1)
        check_range("lr_min, a fraction of the learning rate,", self.lr_min, 0, 1)
        check_range("num_warmup_steps", self.num_warmup_steps, 0)
        if self.num_checkpoints > 1 and self.decay_phase_ratio > 1 / 3:
            raise InvalidScheduleError(
                "decay_phase_ratio must be at most 1/3 with several checkpoints, got "
                f"{self.decay_phase_ratio}: the periods would mostly decay."
            )
        highest_lr = max(self.base_lr_values)
        if self._is_in_warmup(0) and self.warmup_starting_lr > highest_lr:
            raise InvalidScheduleError(
                f"warmup_starting_lr is {self.warmup_starting_lr}, above the highest "
                f"learning rate of the optimizer, {highest_lr}. Lower it, or set "
                "num_warmup_steps=0."
            )

    def _warn_of_a_warmup_without_decay(self) -> None:
        first_end = self.checkpoint_steps[0]
        if self._is_in_warmup(first_end - 1):
            warn(
                f"The warm-up of {self.num_warmup_steps} updates covers the first "
                f"period, which ends with a checkpoint after {first_end}, so that "
                "nothing decays before it. Use a shorter warm-up or fewer "
                "checkpoints, or train for longer."
            )


def estimate_checkpoint_steps(total_steps: int, num_checkpoints: int = 3) -> list[int]:
    """Return after how many updates each checkpoint of a schedule is due.

    The last one is due at the end, and each of the others half way to the next: for
    200,000 updates and 3 checkpoints, after 50,000, 100,000 and 200,000. A schedule
    too short for so many checkpoints has fewer.
    """
    halvings = [total_steps // 2**k for k in reversed(range(num_checkpoints))]
    return [step for step in halvings if step > 0]


def _find_total_steps(
    num_epochs: float | None,
    num_update_steps_per_epoch: int | None,
    total_steps: float | None,
) -> int:
    if num_epochs is not None and num_update_steps_per_epoch is not None:
        if total_steps is not None:
            raise InvalidScheduleError(
                "Give either total_steps, or num_epochs and "
                "num_update_steps_per_epoch, not all three."
            )
        total_steps = count_updates(num_epochs, num_update_steps_per_epoch)
    if total_steps is None:
        raise InvalidScheduleError(
            "The length of the schedule is missing. Give total_steps, or both "
            "num_epochs and num_update_steps_per_epoch."
        )
    check_range("The updates of the schedule", int(total_steps), 1)
    return int(total_steps)
