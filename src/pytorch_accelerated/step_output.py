"""What a step is given, and what it returns."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

# A number of items: of a batch it may be a 0-dim tensor, which is never read in a step.
NumItems = int | float | Tensor

# What the dictionary that a step returns holds besides scalars to be recorded.
RESERVED = frozenset(("loss", "model_outputs", "batch_size", "num_items_in_batch"))


def num_items_of(batch_output: Mapping[str, Any]) -> NumItems:
    """Return how many items the loss of a batch is a mean over."""
    num_items = batch_output.get("num_items_in_batch")
    if num_items is None:
        num_items = batch_output["batch_size"]
    return num_items  # type: ignore[no-any-return]


def is_recorded(name: str, value: Any) -> bool:
    """Say whether a member of a step's output is averaged over the epoch and recorded.

    The names of numbers that a step returns for its own use start with an underscore.
    """
    is_of_own_use = isinstance(name, str) and name.startswith("_")
    return name not in RESERVED and not is_of_own_use and is_scalar(value)


def is_scalar(value: Any) -> bool:
    """Say whether a member of a step's output can be averaged over the epoch."""
    if isinstance(value, Tensor):
        return value.dim() == 0
    return isinstance(value, numbers.Real)


def inputs_and_targets_of(batch: Any, loss_func: Any) -> tuple[Any, Any]:
    """Take a batch apart for the default step, or say why it cannot be done."""
    is_pair = False
    with suppress(KeyError, IndexError, TypeError):
        # The rows of a tensor are samples.
        is_pair = not isinstance(batch, Tensor) and isinstance(batch[1], Tensor)
    if is_pair and loss_func is None:
        raise ValueError(
            "loss_func is None, and the batch is not a mapping whose members could "
            "be passed to a model that returns its loss. Pass a loss_func, or "
            "override calculate_train_batch_loss and calculate_eval_batch_loss."
        )
    if is_pair and isinstance(loss_func, type):
        name = loss_func.__name__
        raise TypeError(
            f"loss_func must be an instance, got the class {name}. Create it: "
            f"{name}(...)."
        )
    if is_pair:
        return batch[0], batch[1]
    raise TypeError(
        "The default step takes batches of (inputs, targets), where targets is a "
        f"tensor; got {describe_batch(batch)}. Override calculate_train_batch_loss and "
        "calculate_eval_batch_loss to use it, or pass loss_func=None for a model that "
        "takes the members of a mapping and returns a loss. Of two tensors, "
        "TensorDataset(inputs, targets) makes a dataset of pairs."
    )


def loss_of(outputs: Any) -> Any:
    """Return the loss that a model has calculated itself."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    loss = getattr(outputs, "loss", None) if loss is None else loss
    if loss is None:
        raise ValueError(
            "loss_func is None, but the model's outputs have no loss; got "
            f"{type(outputs).__name__}. Transformers models return one if the batch "
            "has 'labels'. Otherwise pass a loss_func, or override "
            "calculate_train_batch_loss and calculate_eval_batch_loss."
        )
    return loss


def batch_size_of(batch: Mapping[str, Any]) -> int:
    """Return the number of samples in a batch of named tensors."""
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
    raise ValueError(
        "The batch has no tensor whose first dimension tells its size; got "
        f"{describe_batch(batch)}. Override calculate_train_batch_loss and "
        "calculate_eval_batch_loss, and return batch_size."
    )


def describe_batch(batch: Any) -> str:
    """Say in a few words what a batch is, for an error message."""
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with the keys {list(batch)}"
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, (list, tuple)):
        members = ", ".join(type(member).__name__ for member in batch[:5])
        return f"a {type(batch).__name__} of length {len(batch)} ({members})"
    return f"a {type(batch).__name__}"


def check_loss(batch_output: Any, *, needs_graph: bool = True) -> None:
    """Check what the first step of a run returned.

    Args:
        batch_output: What it returned.
        needs_graph: Whether the trainer is to back-propagate the loss.
    """
    advice = (
        "calculate_train_batch_loss must return a dictionary with 'loss', a scalar "
        "with a graph, and 'batch_size'"
    )
    if not isinstance(batch_output, Mapping):
        raise TypeError(f"{advice}; got {type(batch_output).__name__}.")
    missing = [key for key in ("loss", "batch_size") if key not in batch_output]
    if missing:
        raise KeyError(f"{advice}; {missing} not among {list(batch_output)}.")
    loss = batch_output["loss"]
    if not isinstance(loss, Tensor):
        what_to_do = (
            " Return one tensor as 'loss', such as the sum of these; they are recorded "
            "too if they are returned beside it."
            if isinstance(loss, Mapping)
            else ""
        )
        raise TypeError(f"{advice}; the loss is {describe_batch(loss)}.{what_to_do}")
    if loss.numel() != 1:
        raise ValueError(
            f"{advice}; the loss has shape {tuple(loss.shape)}. Reduce it to a "
            "mean over the batch, for example with reduction='mean'."
        )
    if needs_graph and not loss.requires_grad:
        raise ValueError(
            f"{advice}; the loss has no graph. Was it detached, turned into a number, "
            "or computed under no_grad? "
            "If the step updates the weights itself, override backward_step and "
            "optimizer_step to do nothing."
        )
