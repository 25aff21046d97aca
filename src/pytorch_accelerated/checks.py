"""Cheap checks of what a run was asked to do, before anything has changed.

What makes no run is refused. What is only probably an oversight, and would go unnoticed
for the whole run, is warned of where nothing that is meant looks the same.
"""

from __future__ import annotations

import gc
import inspect
import numbers
import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from pytorch_accelerated.arguments import closest
from pytorch_accelerated.callbacks import CallbackHandler, TrainerCallback
from pytorch_accelerated.data.loaders import batch_size_of_loader, length_of
from pytorch_accelerated.errors import warn
from pytorch_accelerated.modes import warn_of_sleeping_submodules
from pytorch_accelerated.step_output import check_loss

if TYPE_CHECKING:
    from pytorch_accelerated.run import Run
    from pytorch_accelerated.trainer import Trainer

_NUM_NAMES_SHOWN = 3

# How the methods end that the trainer calls. Those that a user calls are no models for
# misspelt names: a user's own may well be named alike (save_checkpoints).
_ENDINGS = ("_start", "_end", "_loss", "_step", "_grad", "_dataloader", "_scheduler")

# How alike a name must be to one that is called. Methods of a trainer may be called by
# the user, and be named alike on purpose (create_test_dataloader).
_LIKE_AN_EVENT = 0.8
_LIKE_A_METHOD = 0.9

# What other libraries call it.
_OTHER_NAMES = {
    "on_epoch_end": "on_training_run_epoch_end",
    "on_train_batch_end": "on_train_step_end",
    "on_train_start": "on_training_run_start",
    "on_train_end": "on_training_run_end",
    "training_step": "calculate_train_batch_loss",
    "train_step": "calculate_train_batch_loss",
    "compute_loss": "calculate_train_batch_loss",
    "calculate_train_loss": "calculate_train_batch_loss",
    "validation_step": "calculate_eval_batch_loss",
    "eval_step": "calculate_eval_batch_loss",
}

_looked_at: weakref.WeakSet[type] = weakref.WeakSet()


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
    if create_scheduler_fn is not None and not callable(create_scheduler_fn):
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


def whole_number(name: str, value: Any) -> int:
    """Return any kind of whole number as one of Python; raise TypeError for others."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}.") from None


def check_dataset_is_given(dataset: Any) -> None:
    """Raise ValueError if there is no dataset to make a training loader of."""
    if dataset is None:
        raise ValueError(
            "train() needs a train_dataset or a DataLoader, got None. Only an override "
            "of create_train_dataloader can do without."
        )


def check_size_of_dataset(dataset: Any, name: str, num_processes: int = 1) -> None:
    """Raise ValueError if a dataset is known to have fewer samples than processes."""
    # Iterable datasets may have a length that is only an estimate.
    length = None if isinstance(dataset, IterableDataset) else length_of(dataset)
    if length == 0:
        raise ValueError(f"{name} is empty: there is nothing to take a batch from.")
    is_too_small = length is not None and length < num_processes
    if is_too_small and not isinstance(dataset, DataLoader):
        raise ValueError(
            f"{name} has {length} samples for {num_processes} processes: some would "
            "have nothing to train on. Start fewer processes."
        )


def check_optimizer(model: Any, optimizer: Any) -> None:
    """Raise ValueError if the optimizer has no parameter of the model to train."""
    if optimizer is None:
        raise ValueError(
            "train() needs an optimizer; the trainer was created with None."
        )
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {optimizer!r:.80}. Create "
            "it: for example torch.optim.AdamW(model.parameters(), lr=1e-3)."
        )
    if not isinstance(model, nn.Module):
        return
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            "No parameter of the model requires a gradient: there is nothing to train. "
            "Unfreeze some of them, for example with ModelFreezer(model).unfreeze()."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, parameters)):
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


def warn_of_untrained_parameters(trainer: Trainer) -> None:
    """Warn of parameters that require gradients, and that no optimizer holds."""
    model = trainer.get_model(keep_torch_compile=False)
    if not isinstance(model, nn.Module):
        return
    wanting = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    _strike_out(wanting, [trainer.optimizer])
    if wanting:
        # A second optimizer may be kept anywhere: in a callback, or inside the first.
        everything = gc.get_objects()
        _strike_out(wanting, (o for o in everything if issubclass(type(o), Optimizer)))
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


def _strike_out(wanting: dict[int, str], optimizers: Iterable[Any]) -> None:
    for optimizer in optimizers:
        for group in getattr(optimizer, "param_groups", ()):
            for parameter in group["params"]:
                wanting.pop(id(parameter), None)


def warn_of_misspelt_names(trainer: Trainer) -> None:
    """Warn of methods that nobody calls, named almost like one that is called.

    Each class is looked at once. What the user's own classes mention is called by them.
    """
    classes = {type(each) for each in (trainer, *trainer.callback_handler)}
    new = classes.difference(_looked_at)
    if not new:
        return
    _looked_at.update(new)
    own = {each: list(_members(each, of_library=False)) for each in classes}
    mentioned = {
        word
        for members in own.values()
        for _, member in members
        for word in _words_in(_code_of(member))
    }
    library = dict(_members(type(trainer), of_library=True))
    steps = {name for name in library if name.endswith(_ENDINGS)}
    has_own_events = (
        type(trainer.callback_handler) is not CallbackHandler
        or "call_event" in mentioned
    )
    events = set(dir(TrainerCallback))
    for each in {type(trainer)} & new if has_own_events else new:
        is_trainer = each is type(trainer)
        called, start = (steps, "") if is_trainer else (events, "on_")
        names = {
            name
            for name, member in own[each]
            if name.startswith(start) and name[0] != "_" and inspect.isroutine(member)
        }
        for name in sorted(names - called - mentioned):
            cutoff = _LIKE_A_METHOD if is_trainer else _LIKE_AN_EVENT
            other = _OTHER_NAMES.get(name)
            meant = closest(other or name, called, cutoff) or other
            if meant is not None and meant not in names:
                warn(
                    f"{each.__name__}.{name} is not what the trainer calls. Did you "
                    f"mean {meant}?"
                )


def _members(a_class: type, *, of_library: bool) -> Iterator[tuple[str, Any]]:
    """Yield what a class has from the library, or what it has from its user."""
    for each in a_class.__mro__:
        is_of_library = each.__module__.partition(".")[0] == "pytorch_accelerated"
        if each is not object and is_of_library == of_library:
            yield from vars(each).items()


def _code_of(member: Any) -> CodeType | None:
    function = inspect.unwrap(getattr(member, "__func__", member))
    return getattr(getattr(function, "fget", function), "__code__", None)


def _words_in(code: CodeType | None) -> Iterator[str]:
    """Yield the names and strings in code: what it calls, or tells others to."""
    if code is None:
        return
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _words_in(constant)


def check_can_train(trainer: Trainer, run: Run) -> None:
    """Check what a training run is asked to do.

    Raises:
        ValueError: If the arguments cannot make a run.
        TypeError: If one of them is something else than what is meant.
    """
    limit, model, optimizer = run.max_num_train_steps, trainer.model, trainer.optimizer
    if trainer._run.is_under_way and trainer._run.is_iterated:
        raise RuntimeError(
            "train() was called while predictions are iterated over, and would change "
            "the model between two batches. Go through them to the end, or close() "
            "what iterate_predictions() returned."
        )
    if run.num_epochs is not None:
        check_is_at_least("num_epochs", run.num_epochs, 0)
    elif limit is None:
        raise ValueError(
            "train() was given neither num_epochs nor max_num_train_steps, so nothing "
            "would end the run. Give one of them, or both."
        )
    check_is_at_least("gradient_accumulation_steps", run.gradient_accumulation_steps, 1)
    if limit is not None:
        check_is_at_least("max_num_train_steps", limit, 1)
    check_clipping(run.gradient_clip_value, run.gradient_clip_norm)
    check_scheduler_fn(run.create_scheduler_fn)
    num_processes = trainer._accelerator.num_processes
    check_size_of_dataset(run.train_dataset, "train_dataset", num_processes)
    if not trainer._engine.knows(model):
        check_optimizer(model, optimizer)
    if not overrides(trainer, "optimizer_step", "_run_train_epoch", "_run_training"):
        check_optimizer_needs_no_closure(optimizer)
    batch_size = batch_size_of_loader(
        run.train_dataset, run.train_dataloader_kwargs, run.batch_size
    )
    trainer._engine.check(run, batch_size)
    check_size_of_dataset(run.eval_dataset, "eval_dataset")
    if trainer._num_runs == 0 and optimizer is not None:
        warn_of_sleeping_submodules(model, optimizer)


def check_can_evaluate(run: Run) -> None:
    """Raise ValueError if there is nothing to evaluate on."""
    if run.eval_dataset is None:
        raise ValueError("A dataset or a DataLoader is needed, got None.")
    check_size_of_dataset(run.eval_dataset, "dataset")


def check_first_step(trainer: Trainer, batch_output: Any) -> None:
    """Check what can only be known at the first step of a run."""
    check_loss(batch_output, needs_graph=not overrides(trainer, "backward_step"))
    if not overrides(trainer, "optimizer_step"):
        check_optimizer_is_in_training_mode(trainer.optimizer)


def overrides(trainer: Trainer, *methods: str) -> bool:
    """Say whether any of these methods of a trainer is the user's own."""
    ours = "pytorch_accelerated.trainer"
    return any(
        getattr(getattr(trainer, name), "__module__", None) != ours for name in methods
    )


def warn_of_oversights(trainer: Trainer) -> None:
    """Warn of what would go unnoticed for a whole run."""
    # DeepSpeed holds copies of the parameters, not those of the model.
    if not trainer._engine.owns_gradients:
        warn_of_untrained_parameters(trainer)
    warn_of_misspelt_names(trainer)


def check_updates_are_counted(trainer: Trainer) -> None:
    """Say what an epoch that made no update means for what counts updates.

    Raises:
        ValueError: If only a number of updates would end the run, and none will come.
    """
    run, scaler = trainer._run, trainer._accelerator.scaler
    # fp16 skips updates until its scale is small enough, which 1 always should be.
    is_hopeless = scaler is not None and scaler.get_scale() < 1
    if run.num_epochs is None and (run.progress.step == 0 or is_hopeless):
        raise ValueError(
            "An epoch made no update that the trainer could count, so that "
            f"max_num_train_steps={run.max_num_train_steps} would never be reached. "
            "Give num_epochs, which ends the run in any case."
        )
    _warn_of_uncounted_updates(trainer)


def _warn_of_uncounted_updates(trainer: Trainer) -> None:
    run, event = trainer._run, "on_train_update_end"
    if run.progress.epochs_done > 0 or not overrides(trainer, "_run_train_epoch"):
        return
    ignored = [
        f"{type(getattr(listener, '__self__', listener)).__name__}.{event}"
        for listener in trainer.callback_handler.listeners(event)
    ]
    if run.max_num_train_steps is not None:
        ignored.insert(0, f"max_num_train_steps={run.max_num_train_steps}")
    if ignored:
        warn(
            "Your _run_train_epoch made no update that the trainer could count, so "
            f"these are not followed: {', '.join(ignored)}. Call "
            "super()._run_train_epoch(train_dl) for the loop and override the "
            "methods of a step, or return True to end the run."
        )
