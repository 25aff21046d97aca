"""What is probably an oversight of the user's, and would go unnoticed for a whole run.

Both looks are taken once a run has started, cost nothing in its loop, and warn only
where nothing that is meant looks the same.
"""

from __future__ import annotations

import difflib
import inspect
import weakref
from collections.abc import Collection, Iterator, Mapping
from types import CodeType
from typing import TYPE_CHECKING, Any

from torch import nn

from pytorch_accelerated.callbacks import CallbackHandler, TrainerCallback
from pytorch_accelerated.errors import warn

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_NUM_NAMES_SHOWN = 3

# Containers with more members than this hold data, not optimizers.
_MANY = 100

# How alike a name must be to one that is called. Methods of a trainer may be called by
# the user, and be named alike on purpose (create_test_dataloader).
_LIKE_AN_EVENT = 0.8
_LIKE_A_METHOD = 0.9

# What the trainer calls. The rest of its methods are called by the user, whose own
# may well be named alike (save_checkpoints).
METHODS_CALLED = frozenset(
    (
        "training_run_start",
        "train_epoch_start",
        "calculate_train_batch_loss",
        "backward_step",
        "optimizer_step",
        "scheduler_step",
        "optimizer_zero_grad",
        "train_epoch_end",
        "eval_epoch_start",
        "calculate_eval_batch_loss",
        "calculate_predictions",
        "eval_epoch_end",
        "training_run_epoch_end",
        "training_run_end",
        "evaluation_run_start",
        "evaluation_run_end",
        "create_train_dataloader",
        "create_eval_dataloader",
        "get_default_train_dl_kwargs",
        "get_default_eval_dl_kwargs",
        "create_scheduler",
    )
)

# What other libraries call it.
_OTHER_EVENTS = {
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_begin": "on_train_epoch_start",
    "on_epoch_end": "on_training_run_epoch_end",
    "on_step_begin": "on_train_step_start",
    "on_step_end": "on_train_step_end",
    "on_batch_end": "on_train_step_end",
    "on_train_batch_start": "on_train_step_start",
    "on_train_batch_end": "on_train_step_end",
    "on_validation_batch_end": "on_eval_step_end",
    "on_validation_epoch_start": "on_eval_epoch_start",
    "on_validation_epoch_end": "on_eval_epoch_end",
    "on_validation_end": "on_eval_epoch_end",
    "on_train_start": "on_training_run_start",
    "on_train_begin": "on_training_run_start",
    "on_train_end": "on_training_run_end",
    "on_fit_start": "on_training_run_start",
    "on_fit_end": "on_training_run_end",
}
_OTHER_METHODS = {
    "training_step": "calculate_train_batch_loss",
    "train_step": "calculate_train_batch_loss",
    "compute_loss": "calculate_train_batch_loss",
    "calculate_train_loss": "calculate_train_batch_loss",
    "validation_step": "calculate_eval_batch_loss",
    "eval_step": "calculate_eval_batch_loss",
    "calculate_eval_loss": "calculate_eval_batch_loss",
    "predict_step": "calculate_predictions",
}

_looked_at: weakref.WeakSet[type] = weakref.WeakSet()


def warn_of_untrained_parameters(trainer: Trainer) -> None:
    """Warn of parameters that require gradients, and that no optimizer holds.

    Optimizers of a subclass or of a callback count, whatever their attribute is called.
    """
    model = trainer.get_model(keep_torch_compile=False)
    if not isinstance(model, nn.Module):
        return
    wanting = {
        id(parameter): name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    for held in _parameters_in(trainer.optimizer):
        wanting.pop(id(held), None)
    if not wanting:
        return
    for owner in (trainer, *trainer.callback_handler):
        for attribute in getattr(owner, "__dict__", {}).values():
            for held in _parameters_in(attribute, depth=2):
                wanting.pop(id(held), None)
    if wanting:
        names = [name.replace("_orig_mod.", "") for name in wanting.values()]
        rest = ", ..." if len(names) > _NUM_NAMES_SHOWN else ""
        warn(
            "No optimizer holds these parameters of the model, which require "
            f"gradients and will not be trained: {', '.join(names[:_NUM_NAMES_SHOWN])}"
            f"{rest} ({len(names)} in all). Was the optimizer created before a part "
            "of the model was replaced? Create it from the parameters that the model "
            "has now. If they are to stay as they are, freeze them with "
            "requires_grad_(False), which saves the time for their gradients too."
        )


def _parameters_in(thing: Any, depth: int = 3) -> Iterator[Any]:
    """Yield what optimizers hold, in a container or inside other optimizers."""
    members: Collection[Any] = ()
    if isinstance(thing, Mapping):
        members = thing.values()
    elif isinstance(thing, (list, tuple)):
        members = thing
    elif hasattr(thing, "param_groups"):
        for group in thing.param_groups:
            yield from group["params"]
        members = getattr(thing, "__dict__", {}).values()
    if depth and len(members) <= _MANY:
        for member in members:
            yield from _parameters_in(member, depth - 1)


def warn_of_misspelt_names(trainer: Trainer) -> None:
    """Warn of methods that nobody calls, named almost like one that is called.

    Each class is looked at once. What the user's own classes mention is called by them.
    """
    callbacks = list(trainer.callback_handler)
    classes = {type(each) for each in (trainer, *callbacks)}
    new = classes.difference(_looked_at)
    if not new:
        return
    mentioned = {word for each in classes for word in _words_in(each)}
    has_own_events = type(trainer.callback_handler) is not CallbackHandler or (
        not mentioned.isdisjoint(("call_event", "_call_event", "_notify"))
    )
    for each in new:
        _looked_at.add(each)
        own = _own_methods(each) - mentioned
        if each is type(trainer):
            _warn_of_methods(each, own)
        elif not has_own_events:
            _warn_of_events(each, own)


def _warn_of_methods(trainer_class: type, own: set[str]) -> None:
    missing = METHODS_CALLED - _own_methods(trainer_class)
    for name in sorted(own - METHODS_CALLED):
        meant = _OTHER_METHODS.get(name)
        if hasattr(TrainerCallback, name):
            meant = name.removeprefix("on_")  # an event, which callbacks hear of
        meant = meant or _closest(name, METHODS_CALLED, _LIKE_A_METHOD)
        if meant in missing:
            warn(
                f"{trainer_class.__name__}.{name} is not what the trainer calls. Did "
                f"you mean {meant}, which it calls?"
            )


def _warn_of_events(callback_class: type, own: set[str]) -> None:
    events = {name for name in dir(TrainerCallback) if name.startswith("on_")}
    for name in sorted(own - events):
        if not name.startswith("on_"):
            continue
        meant = _OTHER_EVENTS.get(name) or _closest(name, events, _LIKE_AN_EVENT)
        if meant is not None and meant not in _own_methods(callback_class):
            warn(
                f"{callback_class.__name__}.{name} is no event of the trainer. Did you "
                f"mean {meant}?"
            )


def _closest(name: str, names: Collection[str], cutoff: float) -> str | None:
    found = difflib.get_close_matches(name, sorted(names), n=1, cutoff=cutoff)
    return found[0] if found else None


def _own_classes(a_class: type) -> list[type]:
    """Return the class and those of its bases that are not the library's."""
    return [
        each
        for each in a_class.__mro__
        if each.__module__.partition(".")[0] != "pytorch_accelerated"
        and each is not object
    ]


def _own_methods(a_class: type) -> set[str]:
    """Return the public methods that a class has from its user, not the library."""
    return {
        name
        for each in _own_classes(a_class)
        for name, value in vars(each).items()
        if name[0] != "_" and inspect.isroutine(value)
    }


def _words_in(a_class: type) -> Iterator[str]:
    """Yield the names and strings in the code of a class's own methods."""
    for each in _own_classes(a_class):
        for value in vars(each).values():
            function = inspect.unwrap(getattr(value, "__func__", value))
            code = getattr(getattr(function, "fget", function), "__code__", None)
            if code is not None:
                yield from _words_in_code(code)


def _words_in_code(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _words_in_code(constant)
