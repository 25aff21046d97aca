"""Cheap checks of what a run was asked to do, before anything has changed."""

from __future__ import annotations

import inspect
import numbers
import operator
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset

from pytorch_accelerated.data import length_of
from pytorch_accelerated.schedulers.scheduler_base import SchedulerBase


def check_is_at_least(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless the value is a whole number of at least ``least``."""
    if not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(
            f"{name} must be a whole number of at least {least}, got {value!r}."
        )


def check_clipping(value: float | None, norm: float | None) -> None:
    """Raise ValueError if there are two limits for the gradients, or a wrong one."""
    if value is not None and norm is not None:
        raise ValueError(
            f"Both gradient_clip_value={value} and gradient_clip_norm={norm} were "
            "given; choose one of them."
        )
    for name, limit in (("gradient_clip_value", value), ("gradient_clip_norm", norm)):
        if limit is not None and not limit > 0:
            raise ValueError(
                f"{name} must be greater than 0, got {limit}. To train without "
                "clipping, leave it out."
            )


def check_scheduler_fn(create_scheduler_fn: Any) -> None:
    """Raise TypeError if a scheduler was given in place of what makes one."""
    is_scheduler = isinstance(create_scheduler_fn, (LRScheduler, SchedulerBase))
    if is_scheduler or not (
        create_scheduler_fn is None or callable(create_scheduler_fn)
    ):
        name = type(create_scheduler_fn).__name__
        raise TypeError(
            "create_scheduler_fn must be a function that makes a scheduler from the "
            f"optimizer, got a {name}. Pass functools.partial({name}, ...) with all "
            "its arguments but the optimizer."
        )


def check_needs_only_optimizer(create_scheduler_fn: Any) -> None:
    """Raise TypeError if a scheduler cannot be made from the optimizer alone."""
    try:
        inspect.signature(create_scheduler_fn).bind(None)
    except TypeError as error:
        function = getattr(create_scheduler_fn, "func", create_scheduler_fn)
        name = getattr(function, "__name__", repr(function))
        raise TypeError(
            f"create_scheduler_fn is called with the optimizer alone, and {name} "
            f"cannot be: {error}. Give it the rest: functools.partial({name}, ...)."
        ) from None
    except ValueError:
        pass  # builtins may have no signature that could be looked at


def check_accelerator_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for what would be accepted by Accelerate, and do nothing."""
    if kwargs.get("log_with") is not None:
        raise ValueError(
            f"log_with={kwargs['log_with']!r} was given for Accelerate, but the "
            "trainer sends nothing to its trackers. Leave it out, and log in a "
            "callback: a LogMetricsCallback whose log_metrics(trainer, metrics) you "
            "override is given all metrics."
        )


def whole_number(name: str, value: Any) -> int:
    """Return any kind of whole number as one of Python; raise TypeError for others."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}.") from None


def check_is_instance(name: str, value: Any) -> None:
    """Raise TypeError if a class was given where an instance of it is due."""
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be an instance, got the class {value.__name__}. Create it: "
            f"{value.__name__}(...)."
        )


def check_dataset_is_given(dataset: Any) -> None:
    """Raise ValueError if there is no dataset to make a training loader of."""
    if dataset is None:
        raise ValueError(
            "train() needs a train_dataset or a DataLoader, got None. Only an override "
            "of create_train_dataloader can do without."
        )


def check_dataset_is_not_empty(dataset: Any, name: str) -> None:
    """Raise ValueError if a dataset is known to have no samples."""
    # Iterable datasets may have a length that is only an estimate.
    if not isinstance(dataset, IterableDataset) and length_of(dataset) == 0:
        raise ValueError(f"{name} is empty: there is nothing to take a batch from.")


def check_dataset_serves_all(dataset: Any, num_processes: int) -> None:
    """Raise ValueError if there are more processes than samples to train on."""
    num_samples = None if isinstance(dataset, IterableDataset) else length_of(dataset)
    if isinstance(dataset, DataLoader) or num_samples is None:
        return
    if num_samples < num_processes:
        raise ValueError(
            f"train_dataset has {num_samples} samples for {num_processes} processes: "
            "some would have nothing to train on. Start fewer processes."
        )


def check_optimizer(model: Any, optimizer: Any) -> None:
    """Raise ValueError if the optimizer has no parameter of the model to train."""
    if optimizer is None:
        raise ValueError(
            "train() needs an optimizer; the trainer was created with None."
        )
    check_is_instance("optimizer", optimizer)
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, got a "
            f"{type(optimizer).__name__}. Create it: for example "
            "torch.optim.AdamW(model.parameters(), lr=1e-3)."
        )
    if not isinstance(model, nn.Module):
        return
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            "No parameter of the model requires a gradient: there is nothing to train. "
            "Unfreeze some of them, for example with ModelFreezer(model).unfreeze()."
        )
    own = {id(parameter) for parameter in parameters}
    if not any(
        id(p) in own for group in optimizer.param_groups for p in group["params"]
    ):
        raise ValueError(
            "The optimizer holds no parameter of the model. Create it from the "
            "parameters of this model: it may have been made for a copy or before the "
            "model was replaced."
        )


def check_optimizer_needs_no_closure(optimizer: Any) -> None:
    """Raise ValueError if the optimizer has to calculate the loss itself."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} calculates the loss itself, several times in "
            "an update, with a closure that the trainer does not have. Take another "
            "optimizer, or override optimizer_step to pass one to self.optimizer.step."
        )


def check_optimizer_is_in_training_mode(optimizer: Any) -> None:
    """Raise ValueError if the optimizer has modes, and nobody has set that to train."""
    # As those of the package schedulefree do.
    if any(group.get("train_mode") is False for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} has other weights for training than for "
            "evaluation, and is not in training mode. Override the trainer to call "
            "self.optimizer.train() in train_epoch_start, and self.optimizer.eval() in "
            "eval_epoch_start and training_run_end, each after super()."
        )


def check_no_loader_arguments(
    kwargs: Mapping[str, Any] | None, collate_fn: Any
) -> None:
    """Raise ValueError if a ready loader came with arguments for making one."""
    given = sorted(kwargs or {}) + (["collate_fn"] if collate_fn is not None else [])
    if given:
        raise ValueError(
            "A ready DataLoader is used as it is, but loader arguments were given "
            f"too: {given}. Give them to the DataLoader, or pass its dataset instead."
        )
