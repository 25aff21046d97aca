"""What was probably meant by an argument that there is not."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Names of other libraries that are not spelt like those of this one.
_OTHER_NAMES = {
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "ckpt_path": "resume_from",
    "compute_metrics": "metrics",
    "criterion": "loss_func",
    "dirpath": "save_dir",
    "epochs": "num_epochs",
    "filepath": "save_path",
    "max_grad_norm": "gradient_clip_norm",
    "log_with": "accelerator_kwargs",
    "min_delta": "early_stopping_threshold",
    "mixed_precision": "accelerator_kwargs",
    "mode": "greater_is_better",
    "monitor": "watch_metric",
    "patience": "early_stopping_patience",
    "save_top_k": "keep_best",
    "save_total_limit": "max_checkpoints",
    "train_dataloader": "train_dataset",
    "train_loader": "train_dataset",
    "val_dataloader": "eval_dataset",
    "val_loader": "eval_dataset",
}

# How alike an argument of the function itself must be to be meant rather than one, of
# the very name, of another function.
_ALIKE = 0.7

# Those of all functions that name what was meant, without self.
_parameters: dict[str, list[str]] = {}


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that is most like this one; None if none is like it."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=cutoff)
    return near[0] if near else None


def names_what_was_meant(
    func: Callable[Parameters, Result],
) -> Callable[Parameters, Result]:
    """Let a function that is given an unknown argument name the one that was meant."""
    name = func.__qualname__.removesuffix(".__init__")
    known = _parameters[name] = list(inspect.signature(func).parameters)[1:]

    @functools.wraps(func)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        for argument in kwargs:
            if argument not in known:
                raise TypeError(
                    f"{name}() got an unexpected keyword argument {argument!r}. "
                    f"{_advice(name, argument)}"
                )
        return func(*args, **kwargs)

    return wrapper


def _advice(name: str, argument: str) -> str:
    """Say what was probably meant by an argument that a function does not have."""
    meant, known = _OTHER_NAMES.get(argument, argument), _parameters[name]
    near = closest(meant, known, _ALIKE)
    if near is None:
        for owner, parameters in _parameters.items():
            if meant in parameters:
                return f"Did you mean {meant}, an argument of {owner}()?"
        near = closest(meant, known)
    return f"Did you mean {near}?" if near else f"It takes: {', '.join(known)}."
