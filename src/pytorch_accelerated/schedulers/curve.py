"""The whole curve of a schedule, before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pytorch_accelerated import plotting
from pytorch_accelerated.placeholders import replace_trainer_placeholder_values
from pytorch_accelerated.schedulers.scheduler_base import (
    SchedulerBase,
    StatefulSchedulerBase,
)

__all__ = ["plot_schedule", "schedule_curve"]


def schedule_curve(
    create_scheduler: Callable[..., Any],
    num_updates: int | None = None,
    *,
    num_epochs: int | None = None,
    steps_per_epoch: int | None = None,
    optimizer: Optimizer | None = None,
    lr: float = 0.1,
    param_group: int = 0,
    param_group_field: str = "lr",
) -> list[float]:
    """Return the value that each update of a run would train with.

    The scheduler is created for a stand-in, so no optimizer and no model is touched.

    Args:
        create_scheduler: What `Trainer.train` takes as ``create_scheduler_fn``: a
            function of the optimizer, or a partial with placeholders, which returns a
            scheduler of the library or one of torch.
        num_updates: The length of the run in updates; ``num_epochs *
            steps_per_epoch`` if left out. If it is shorter than that, the run is cut
            short as by ``max_num_train_steps``.
        num_epochs: What ``NUM_EPOCHS`` stands for.
        steps_per_epoch: Updates in an epoch, which the placeholders for the updates
            and for the batches in an epoch stand for.
        optimizer: Take the parameter groups and defaults of this optimizer. If left
            out, there is one group with the learning rate ``lr``.
        lr: The learning rate to start from where no optimizer is given.
        param_group: Index of the parameter group to follow.
        param_group_field: The field of the group to follow.

    Returns:
        One value for each of the ``num_updates`` updates.

    Raises:
        ValueError: Neither the number of updates nor both other lengths are given.
        TypeError: What ``create_scheduler`` returned is not a scheduler whose curve is
            known before training.

    Example::

        curve = schedule_curve(
            CosineLrScheduler.create_scheduler_fn(), num_epochs=3, steps_per_epoch=100
        )
    """
    if num_updates is None:
        if num_epochs is None or steps_per_epoch is None:
            raise ValueError(
                "The length of the run is missing. Give num_updates, or both "
                "num_epochs and steps_per_epoch."
            )
        num_updates = num_epochs * steps_per_epoch

    stand_in = _create_stand_in(optimizer, lr)
    run = _create_run(num_updates, num_epochs, steps_per_epoch)
    scheduler = replace_trainer_placeholder_values(run, create_scheduler)(stand_in)
    group = stand_in.param_groups[param_group]

    values = []
    for update in range(num_updates):
        _prepare_update(scheduler, update, stand_in)
        values.append(float(group[param_group_field]))
    return values


def plot_schedule(
    create_scheduler: Callable[..., Any],
    num_updates: int | None = None,
    *,
    optimizer: Optimizer | None = None,
    param_group_field: str = "lr",
    ax: Any = None,
    **curve_kwargs: Any,
) -> Any:
    """Draw the curve of a schedule with matplotlib, a line for each parameter group.

    Args:
        create_scheduler: As in `schedule_curve`.
        num_updates: As in `schedule_curve`.
        optimizer: As in `schedule_curve`.
        param_group_field: As in `schedule_curve`.
        ax: The matplotlib axes to draw on; new ones if left out.
        **curve_kwargs: Further arguments of `schedule_curve`.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if ax is None:
        ax = plotting.new_axes()
    num_groups = 1 if optimizer is None else len(optimizer.param_groups)
    for param_group in range(num_groups):
        curve = schedule_curve(
            create_scheduler,
            num_updates,
            optimizer=optimizer,
            param_group=param_group,
            param_group_field=param_group_field,
            **curve_kwargs,
        )
        ax.plot(range(len(curve)), curve, label=f"group {param_group}")
    ax.set_xlabel("update")
    ax.set_ylabel(param_group_field)
    if num_groups > 1:
        ax.legend()
    return ax


class _StandInOptimizer(Optimizer):
    """Has parameter groups for a scheduler to change, and nothing to train."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing. Torch's schedulers check that it is called."""


def _create_stand_in(optimizer: Optimizer | None, lr: float) -> Optimizer:
    if optimizer is None:
        # OneCycleLR and CyclicLR look for a momentum to change as well.
        optimizer = torch.optim.SGD([torch.zeros(1)], lr, momentum=0.9)
    # Copied in depth, as a learning rate may be a tensor that is changed in place.
    groups = [
        copy.deepcopy({**group, "params": [torch.zeros(1)]})
        for group in optimizer.param_groups
    ]
    return _StandInOptimizer(groups, dict(optimizer.defaults))


def _create_run(
    num_updates: int, num_epochs: int | None, steps_per_epoch: int | None
) -> Any:
    """Return what placeholders are filled in from."""
    run_config = SimpleNamespace(
        num_epochs=num_epochs or num_updates,  # each has one, and they end the run
        num_update_steps_per_epoch=steps_per_epoch,
        max_num_train_steps=num_updates,
    )
    return SimpleNamespace(
        run_config=run_config,
        _train_dataloader=range(steps_per_epoch or num_updates),
        _eval_dataloader=None,
    )


def _prepare_update(scheduler: Any, update: int, optimizer: Optimizer) -> None:
    if isinstance(scheduler, StatefulSchedulerBase):
        scheduler.step()
    elif isinstance(scheduler, SchedulerBase):
        scheduler.step_update(update)
    elif isinstance(scheduler, LRScheduler) and not isinstance(
        scheduler, ReduceLROnPlateau
    ):
        # Torch's schedulers set the values for the first update when created.
        if update > 0:
            optimizer.step()
            scheduler.step()
    else:
        raise TypeError(
            f"The curve of a {type(scheduler).__name__} cannot be drawn before "
            "training. create_scheduler has to return a scheduler of "
            "pytorch_accelerated or of torch.optim.lr_scheduler that does not depend "
            "on a metric."
        )
