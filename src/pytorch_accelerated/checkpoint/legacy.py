"""Training states that version 0.1.61 wrote, with Accelerate."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pytorch_accelerated.checkpoint.files import (
    CheckpointNotFoundError,
    absolute,
    list_folder,
    load_file,
)
from pytorch_accelerated.checkpoint.folder import (
    MANIFEST_NAME,
    SAFETENSORS_NAME,
    TORCH_NAME,
    read_weights,
)
from pytorch_accelerated.checkpoint.random_states import describe_states
from pytorch_accelerated.errors import CheckpointError, warn

_SCHEDULER = re.compile(r"custom_checkpoint_(\d+)\.pkl")
_RANDOM_STATES = re.compile(r"random_states_(\d+)\.pkl")


def is_legacy_training_state(folder: str | os.PathLike[str]) -> bool:
    """Say whether a folder looks like a training state of 0.1.61.

    Accelerate always wrote the random states there, and under names that this version
    does not use; so a checkpoint of this version without its manifest is not taken
    for one.
    """
    names = {path.name for path in list_folder(absolute(folder))}
    return (
        MANIFEST_NAME not in names
        and not names.isdisjoint({SAFETENSORS_NAME, TORCH_NAME})
        and any(map(_RANDOM_STATES.fullmatch, names))
    )


def read_legacy_training_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a training state that ``save_training_state`` of 0.1.61 wrote.

    Args:
        folder: The folder. It has no manifest: nothing tells whether it is complete.

    Returns:
        The states of the ``model``, the ``optimizer``, the ``scheduler`` and the
        ``scaler``, each None if it is not there; the ``metadata``; and
        ``random_states``, a mapping from the index of a process to what
        :func:`set_random_states` takes.

    Raises:
        CheckpointNotFoundError: If the folder has no weights.
        CheckpointError: If the weights, the optimizer's state, the scaler's state or
            the metadata cannot be read. Of the scheduler's and the random states a
            warning says that they were skipped.
    """
    folder = absolute(folder)
    if (folder / SAFETENSORS_NAME).exists():
        model: Any = read_weights(folder / SAFETENSORS_NAME)
    else:
        model = _read_if_there(folder / TORCH_NAME)
    if model is None:
        raise CheckpointNotFoundError(
            f"{folder} is not a training state: it has neither {SAFETENSORS_NAME} nor "
            f"{TORCH_NAME}."
        )
    # 0.1.61 added the scheduler anew at each save: the last is the latest
    *_, scheduler = None, *_numbered(folder, _SCHEDULER).values()
    return {
        "model": model,
        "optimizer": _read_if_there(folder / "optimizer.bin"),
        "scheduler": None if scheduler is None else _read_or_skip(scheduler, dict),
        "scaler": _read_if_there(folder / "scaler.pt"),
        "metadata": _read_if_there(folder / "trainer_metadata.pt") or {},
        "random_states": {
            process: _read_or_skip(path, _convert_random_states)
            for process, path in _numbered(folder, _RANDOM_STATES).items()
        },
    }


def _read_if_there(path: Path) -> Any:
    return load_file(path) if path.exists() else None


def _read_or_skip(path: Path, convert: Callable[[Any], Any]) -> Any:
    try:
        return convert(load_file(path))
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        warn(f"{path} was skipped: {error}")
        return None


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Return the files with a number in their name, the smallest first."""
    matches = (pattern.fullmatch(path.name) for path in list_folder(folder))
    found = {int(match[1]): folder / match[0] for match in matches if match}
    return dict(sorted(found.items()))


def _convert_random_states(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Turn what Accelerate saved into what ``set_random_states`` takes."""
    numpy = np.random.RandomState()
    numpy.set_state(saved["numpy_random_seed"])
    states = describe_states(
        saved["random_state"],
        numpy.get_state(legacy=False),
        saved["torch_manual_seed"],
    )
    if "torch_cuda_manual_seed" in saved:
        states["accelerator"] = {
            "type": "cuda",
            "current": 0,
            "states": saved["torch_cuda_manual_seed"],
        }
    return states
