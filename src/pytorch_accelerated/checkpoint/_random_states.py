"""The state of every global random generator of a process, as tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pytorch_accelerated.checkpoint._storable import to_storable
from pytorch_accelerated.errors import CheckpointError, warn


def get_random_states() -> dict[str, Any]:
    """Return the random states of this process: python, numpy, torch, accelerators.

    The result holds tensors and plain values only. Every process has its own states,
    so every process saves its own. The generators of an accelerator are included once
    it has been used by this process.
    """
    version, words, gauss = random.getstate()
    states = {
        "python": {
            "version": version,
            "words": torch.tensor(words, dtype=torch.int64),
            "gauss": gauss,
        },
        "numpy": to_storable(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
    }
    devices = _used_devices()
    if devices is not None:
        states["accelerator"] = devices
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set the random states of this process to what :func:`get_random_states` returned.

    If the accelerators are not the same as then (another kind or another number), a
    warning says what could not be restored; the rest is restored.

    Raises:
        CheckpointError: If a state is missing or damaged. What comes before it in the
            order python, numpy, torch, accelerator has then been set.
    """
    try:
        python = states["python"]
        random.setstate(
            (python["version"], tuple(python["words"].tolist()), python["gauss"])
        )
        np.random.set_state(_with_arrays(states["numpy"]))
        torch.set_rng_state(states["torch"].cpu())
        _restore_devices(states.get("accelerator"))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            "The random states cannot be restored: they are not what "
            f"get_random_states() returns ({type(error).__name__}: {error})."
        ) from error


def _with_arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the tensors of a numpy state back into arrays."""
    return {
        key: _with_arrays(value)
        if isinstance(value, Mapping)
        else value.numpy()
        if isinstance(value, torch.Tensor)
        else value
        for key, value in state.items()
    }


def _used_devices() -> dict[str, Any] | None:
    kind = _used_kind()
    if kind is None:
        return None
    module = torch.get_device_module(kind)
    if not hasattr(module, "get_rng_state_all"):
        return {"type": kind, "current": 0, "states": [module.get_rng_state()]}
    return {
        "type": kind,
        "current": torch.accelerator.current_device_index(),
        "states": module.get_rng_state_all(),
    }


def _used_kind() -> str | None:
    """Name the kind of accelerator that this process has used, e.g. ``"cuda"``.

    Asking an unused one for its states would start it, which takes memory on it and
    forbids to fork afterwards.
    """
    if not torch.accelerator.is_available():
        return None
    kind = torch.accelerator.current_accelerator()
    assert kind is not None, "there is an accelerator if one is available"
    is_started = getattr(torch.get_device_module(kind.type), "is_initialized", None)
    return kind.type if is_started is None or is_started() else None


def _restore_devices(saved: Mapping[str, Any] | None) -> None:
    if saved is None:
        return
    available = torch.accelerator.current_accelerator(check_available=True)
    if available is None or available.type != saved["type"]:
        here = "cpu" if available is None else available.type
        _warn(f"were taken on {saved['type']}, this process runs on {here}")
        return
    module = torch.get_device_module(available.type)
    if not hasattr(module, "set_rng_state_all"):
        module.set_rng_state(saved["states"][0])
        return
    count = torch.accelerator.device_count()
    if count == len(saved["states"]):
        module.set_rng_state_all(saved["states"])
        return
    # The process keeps the stream of the device that it worked on.
    module.set_rng_state(saved["states"][saved["current"]])
    _warn(
        f"were taken with {len(saved['states'])} {available.type} devices, here are "
        f"{count}; only the one of the current device was restored"
    )


def _warn(reason: str) -> None:
    warn(
        f"The random states of the accelerators {reason}. Training goes on, but random "
        "numbers drawn on the accelerator differ from those of the saved run."
    )
