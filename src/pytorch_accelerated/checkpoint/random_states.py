"""The state of every global random generator of a process, as tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pytorch_accelerated.checkpoint.files import to_storable
from pytorch_accelerated.errors import CheckpointError, warn


def get_random_states() -> dict[str, Any]:
    """Return the random states of this process: python, numpy, torch, accelerators.

    The result holds tensors and plain values only. Every process has its own states,
    so every process saves its own. The generators of an accelerator are included once
    it has been used by this process.
    """
    states = describe_states(
        random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    )
    kind = _used_kind()
    if kind is not None:
        module = torch.get_device_module(kind)
        saved: dict[str, Any] = {"type": kind, "current": 0}
        if hasattr(module, "get_rng_state_all"):
            saved["current"] = torch.accelerator.current_device_index()
            saved["states"] = module.get_rng_state_all()
        else:
            saved["states"] = [module.get_rng_state()]
        states["accelerator"] = saved
    return states


def describe_states(
    python: tuple[Any, ...], numpy: Mapping[str, Any], of_torch: torch.Tensor
) -> dict[str, Any]:
    """Return states of generators as tensors and plain values."""
    version, words, gauss = python
    words = torch.tensor(words, dtype=torch.int64)
    return {
        "python": {"version": version, "words": words, "gauss": gauss},
        "numpy": to_storable(numpy),
        "torch": of_torch,
    }


def _used_kind() -> str | None:
    """Name the kind of accelerator that this process has used, e.g. ``"cuda"``.

    Asking an unused one for its states would start it, which takes memory on it and
    forbids to fork afterwards.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return None
    module = torch.get_device_module(accelerator.type)
    is_started = getattr(module, "is_initialized", lambda: True)()
    return accelerator.type if is_started else None


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set the random states of this process to what :func:`get_random_states` returned.

    If the accelerators are not the same as then (another kind or another number), a
    warning says what could not be restored; the rest is restored.

    Raises:
        CheckpointError: If a state is missing or damaged. What comes before it in the
            order python, numpy, torch, accelerator has then been set.
    """
    try:
        python, numpy = states["python"], states["numpy"]
        words = tuple(python["words"].tolist())
        random.setstate((python["version"], words, python["gauss"]))
        inner = {**numpy["state"], "key": numpy["state"]["key"].numpy()}
        np.random.set_state({**numpy, "state": inner})
        torch.set_rng_state(states["torch"].cpu())
        if states.get("accelerator") is not None:
            _restore_devices(states["accelerator"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            "The random states cannot be restored: they are not what "
            f"get_random_states() returns ({type(error).__name__}: {error})."
        ) from error


def _restore_devices(saved: Mapping[str, Any]) -> None:
    kind, states = saved["type"], saved["states"]
    available = torch.accelerator.current_accelerator(check_available=True)
    here = "cpu" if available is None else available.type
    count = torch.accelerator.device_count()
    if here == kind:
        module = torch.get_device_module(here)
        if count == len(states) and hasattr(module, "set_rng_state_all"):
            module.set_rng_state_all(states)
        else:  # the process keeps the stream of the device that it worked on
            module.set_rng_state(states[saved["current"]])
    if (here, count) != (kind, len(states)):
        warn(
            f"The random states of the accelerators were taken on {len(states)} of the "
            f"kind {kind}, this process runs on {count} of the kind {here}: at most "
            "that of the current one is restored. Training goes on, but random numbers "
            "drawn on accelerators differ from those of the saved run."
        )
