"""The private names of torch and Accelerate that are used, each with the reason.

A new version of either may change them without a word: ``tests/test_compat.py`` has a
test for each that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

if TYPE_CHECKING:  # what needs torch alone imports this module too
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

# ----------------------------------------------------------------------------- torch

# Tensors that hold others, such as quantized ones: their parts have to be stored.
wraps_tensors = is_traceable_wrapper_subclass

# One kernel for many tensors, as torch's own optimizers and clipping use them.
foreach_lerp_: Callable[..., None] = torch._foreach_lerp_
foreach_mul_: Callable[..., None] = torch._foreach_mul_

# The common bases of all layers that behave differently in evaluation.
BatchNorm = _BatchNorm
Norm = _NormBase
Dropout = _DropoutNd


def is_default_collate(collate_fn: Any) -> bool:
    """Say whether this is torch's default, unchanged for tuples and for tensors.

    Users may tell the default what to do with other types, in this mapping.
    """
    return (
        collate_fn is default_collate
        and tuple not in default_collate_fn_map
        and default_collate_fn_map.get(Tensor) is collate_tensor_fn
    )


def has_workers(batches: Any) -> bool:
    """Say whether an iterator of a loader has worker processes.

    torch keeps them, and the method that ends them, to itself.
    """
    return hasattr(batches, "_shutdown_workers")


def workers_of(batches: Any) -> list[Any]:
    """Return the worker processes of an iterator."""
    workers: list[Any] = batches._workers
    return workers


def stop_workers(batches: Any) -> None:
    """End the worker processes of an iterator; without it they live as long as it."""
    with suppress(RuntimeError):  # one has died before
        batches._shutdown_workers()


def forget_iterator(loader: Any) -> None:
    """Let a loader with persistent workers start new ones."""
    loader._iterator = None


def without_compilation(model: Any) -> Any:
    """Return the model that a compiled one was made from, else the model itself."""
    return getattr(model, "_orig_mod", model)


def timeout_of(group: Any) -> timedelta | None:
    """Return how long the user lets processes wait for each other, if it is known.

    It is given to the group of all processes and cannot be asked back.
    """
    device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    for candidate in (device, torch.device("cpu")):
        with suppress(RuntimeError, AttributeError):
            timeout: timedelta = group._get_backend(candidate).options._timeout
            return timeout
    return None


def offset_of_part(tensor: Any) -> list[int]:
    """Return where in the whole the part of a sharded tensor begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return list(offset)


def versions_in(state_dict: Mapping[str, Any]) -> Any:
    """Return the versions of a model's modules, which torch hangs on its state dict."""
    return getattr(state_dict, "_metadata", None)


def set_versions(state_dict: Mapping[str, Any], versions: Any) -> None:
    """Hang the versions of a model's modules on a state dict."""
    state_dict._metadata = versions  # type: ignore[attr-defined]


# ------------------------------------------------------------------------ Accelerate

# What Accelerate sets on a model that it prepares, and leaves there.
MARKS = ("forward", "_original_forward", "_is_accelerate_prepared")


def remember_prepared(
    accelerator: Accelerator, model: nn.Module, optimizer: Any = None
) -> None:
    """Let an accelerator take a model and an optimizer for those that it prepared."""
    accelerator._models = [model]
    if optimizer is not None:
        accelerator._optimizers = [optimizer]


def forget_prepared(accelerator: Accelerator) -> None:
    """Drop the accelerator's references to the objects of a finished run.

    ``Accelerator.free_memory`` does this too, at the price of a garbage collection that
    takes longer than a short run.
    """
    for registry in ("_models", "_optimizers", "_schedulers", "_dataloaders"):
        setattr(accelerator, registry, [])


def set_sync_gradients(accelerator: Accelerator, *, syncs: bool) -> None:
    """Tell DeepSpeed whether the batch under way closes a window.

    Accelerate has a public way only for windows of its own counting.
    """
    accelerator.gradient_state._set_sync_gradients(syncs)


def shared_state(state: type[AcceleratorState]) -> dict[str, Any]:
    """Return what all accelerators of the process share; empty before the first.

    Only there can the precision of the process, "_mixed_precision", be changed.
    """
    shared: dict[str, Any] = state._shared_state
    return shared
