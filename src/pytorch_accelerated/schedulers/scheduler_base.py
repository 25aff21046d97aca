"""What all schedulers of the library share: where values come from and go to."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.optim import Optimizer

from pytorch_accelerated.errors import warn


class InvalidScheduleError(ValueError, AssertionError):
    """An argument of a scheduler is out of its range.

    It is a `ValueError`, and also the `AssertionError` that earlier versions raised.
    """


class SchedulerBase(ABC):
    """Sets a field of an optimizer's parameter groups as a function of the updates.

    The values at the start are kept in each group as ``initial_<field>``, as torch's
    own schedulers do. A scheduler created later for the same optimizer starts from
    there too, unless the field has been set by hand in between: then it starts from
    the value that was set.

    Args:
        optimizer: The optimizer whose parameter groups are changed.
        param_group_field: The field to set in each group: ``"lr"``,
            ``"weight_decay"``, ``"momentum"`` or any other that holds a number.

    Attributes:
        base_lr_values: The value of the field at the start, one for each group.

    Raises:
        KeyError: A parameter group has no such field.
    """

    # Attributes that the state leaves out.
    _not_saved: tuple[str, ...] = ("optimizer",)

    def __init__(self, optimizer: Optimizer, param_group_field: str = "lr") -> None:
        self.optimizer = optimizer
        self.param_group_field = param_group_field
        self.base_lr_values: list[float] = []
        self._adopt_new_groups()
        self._update_param_groups(self.base_lr_values)

    @abstractmethod
    def get_updated_values(self, num_updates: int) -> Any:
        """Return the value that update ``num_updates``, counted from 0, trains with.

        Returns:
            One number for all parameter groups; a sequence, array or tensor with one
            number for each group, in their order; or None to leave them as they are.
        """

    def step_update(self, num_updates: int) -> None:
        """Set the values for update ``num_updates``, counted from 0.

        Raises:
            ValueError: `get_updated_values` returned more or fewer values than there
                are parameter groups.
        """
        self._adopt_new_groups()
        values = self.get_updated_values(num_updates)
        if values is not None:
            self._update_param_groups(values)

    def get_last_lr(self) -> list[float]:
        """Return the present value of the scheduled field of each parameter group."""
        return [
            float(group[self.param_group_field])
            for group in self.optimizer.param_groups
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is needed to continue: all but the optimizer."""
        kept = vars(self).keys() - {*self._not_saved}
        return {name: value for name, value in vars(self).items() if name in kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state returned by `state_dict`.

        Load the state of the optimizer first: that overwrites the scheduled values.
        """
        vars(self).update(state_dict)

    def _adopt_new_groups(self) -> None:
        """Find base values for groups that `Optimizer.add_param_group` has added."""
        new_groups = self.optimizer.param_groups[len(self.base_lr_values) :]
        if new_groups:
            new_values = [_base_value(g, self.param_group_field) for g in new_groups]
            self.base_lr_values = [*self.base_lr_values, *new_values]

    def _update_param_groups(self, values: Any) -> None:
        groups = self.optimizer.param_groups
        numbers = _one_number_per_group(values, len(groups), type(self).__name__)
        for group, number in zip(groups, numbers, strict=True):
            present = group[self.param_group_field]
            if isinstance(present, torch.Tensor):
                # A compiled or captured optimizer step reads this very tensor.
                present.fill_(number)
            else:
                group[self.param_group_field] = number
            group[_memory_of(self.param_group_field)] = number


class StatefulSchedulerBase(SchedulerBase):
    """A scheduler that counts the updates itself.

    A subclass only has to define `get_updated_values`. Call `step` before each
    update: the first call sets the values for update 0, the next those for update 1.
    (The trainer calls it once before the first update and then after every update,
    which amounts to the same.)

    Args:
        optimizer: The optimizer whose parameter groups are changed.
        param_group_field: The field to set in each group.

    Example::

        class HalveEvery(StatefulSchedulerBase):
            def __init__(self, optimizer, num_updates):
                super().__init__(optimizer)
                self.period = num_updates

            def get_updated_values(self, num_updates):
                factor = 0.5 ** (num_updates // self.period)
                return [factor * lr for lr in self.base_lr_values]
    """

    def __init__(self, optimizer: Optimizer, param_group_field: str = "lr") -> None:
        super().__init__(optimizer, param_group_field)
        self._num_updates = -1

    def step(self) -> None:
        """Set the values for the next update."""
        self._num_updates += 1
        self.step_update(self._num_updates)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is needed to continue, all but the optimizer.

        The number of the update that the present values are for is saved as
        ``num_updates``: -1 before the first `step`.
        """
        state = super().state_dict()
        state["num_updates"] = state.pop("_num_updates")
        return state

    def load_state_dict(self, scheduler_state_dict: dict[str, Any]) -> None:
        """Continue from a state returned by `state_dict`.

        The values that belong to the restored position are set at once. Load the
        state of the optimizer first: that overwrites the scheduled values.
        """
        state = dict(scheduler_state_dict)
        if "num_updates" in state:
            state["_num_updates"] = state.pop("num_updates")
        super().load_state_dict(state)
        if self._num_updates >= 0:
            self.step_update(self._num_updates)


def check_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """Raise InvalidScheduleError unless a value lies between two others."""
    if not least <= value <= most:
        is_open = most == math.inf
        limits = f"{least} or more" if is_open else f"between {least} and {most}"
        raise InvalidScheduleError(f"{name} must be {limits}, got {value}.")


def count_updates(num_epochs: float, num_update_steps_per_epoch: int) -> float:
    """Return the updates in so many epochs, without the rounding error of 1/49 * 49."""
    num_updates = num_epochs * num_update_steps_per_epoch
    nearest = round(num_updates)
    return nearest if math.isclose(num_updates, nearest) else num_updates


def warn_if_longer(taken: float, total_updates: float, arguments: str) -> None:
    """Warn of a warm-up and a cooldown that leave no update between them."""
    if taken > total_updates:
        warn(
            f"Warm-up and cooldown take {taken:g} updates, but the schedule has "
            f"{total_updates:g}, so there is nothing between them. Lower {arguments}, "
            "or train for longer."
        )


def start_schedule(scheduler: Any) -> None:
    """Apply the first value of a scheduler whose counter starts before it."""
    if isinstance(scheduler, StatefulSchedulerBase) and scheduler._num_updates < 0:
        scheduler.step()


def remember_scheduled_values(optimizer: Optimizer) -> None:
    """Note that the learning rates were left by a scheduler, not set by the user.

    The schedulers of the library do so themselves. Call it after a schedule of
    another library has ended, so that the next scheduler of this one starts from
    ``initial_lr`` again, and not from the value at the end of that schedule.
    """
    for group in optimizer.param_groups:
        if "lr" in group:
            group[_memory_of("lr")] = float(group["lr"])


def forget_start_if_set_by_hand(optimizer: Optimizer) -> None:
    """Let the next scheduler start from a value that the user has set since the last.

    torch's schedulers start from ``initial_lr`` as long as a group has it. Those of
    this library find out by themselves.
    """
    for group in optimizer.param_groups:
        if _was_set_by_hand(group, "lr"):
            group.pop("initial_lr", None)


def _memory_of(field: str) -> str:
    return f"last_scheduled_{field}"


def _base_value(group: dict[str, Any], field: str) -> float:
    """Return the value to start from, and keep it in the group as the initial one."""
    if field not in group:
        known = ", ".join(sorted(group.keys() - {"params"}))
        raise KeyError(
            f"A parameter group of the optimizer has no field {field!r} to schedule; "
            f"it has: {known}."
        )
    initial_field = f"initial_{field}"
    if initial_field not in group or _was_set_by_hand(group, field):
        group[initial_field] = float(group[field])
    return float(group[initial_field])


def _was_set_by_hand(group: dict[str, Any], field: str) -> bool:
    last_scheduled = group.get(_memory_of(field))
    if last_scheduled is None:
        return False
    # Values held in float32 tensors come back rounded.
    return not math.isclose(float(group[field]), last_scheduled, rel_tol=1e-6)


def _one_number_per_group(values: Any, num_groups: int, scheduler: str) -> list[float]:
    numbers: list[float] | float = torch.as_tensor(values, dtype=torch.float64).tolist()
    if isinstance(numbers, float):
        return [numbers] * num_groups
    if len(numbers) != num_groups:
        raise ValueError(
            f"{scheduler}.get_updated_values returned {len(numbers)} values, but the "
            f"optimizer has {num_groups} parameter groups. Return one value for each "
            "group, or a single number for all of them."
        )
    return numbers
