"""Reads the training states that version 0.1.61 wrote through Accelerate."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pytorch_accelerated.checkpoint._disk import (
    absolute,
    list_folder,
    raise_if_out_of_resources,
)
from pytorch_accelerated.checkpoint._files import CheckpointNotFoundError, load_file
from pytorch_accelerated.checkpoint._guards import check_archive
from pytorch_accelerated.checkpoint._manifest import MANIFEST_NAME
from pytorch_accelerated.checkpoint._storable import to_storable
from pytorch_accelerated.checkpoint._weights import (
    SAFETENSORS_NAME,
    TORCH_NAME,
    load_weights,
)
from pytorch_accelerated.errors import CheckpointError, warn

_OPTIMIZER = "optimizer.bin"
_SCALER = "scaler.pt"
_METADATA = "trainer_metadata.pt"
_SCHEDULER = re.compile(r"custom_checkpoint_(\d+)\.pkl")
_RANDOM_STATES = re.compile(r"random_states_(\d+)\.pkl")


@dataclass(frozen=True)
class LegacyTrainingState:
    """What a training state of 0.1.61 holds; None where a file is not there.

    ``random_states`` maps the index of a process to what :func:`set_random_states`
    takes. ``skipped`` maps the name of each file that was not read to the reason.
    """

    model: Mapping[str, Any]
    optimizer: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    scaler: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    random_states: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


def is_legacy_training_state(folder: str | os.PathLike[str]) -> bool:
    """Say whether a folder looks like a training state of 0.1.61.

    Accelerate always wrote the random states there, and under names that this version
    does not use; so a checkpoint of this version without its manifest is not taken
    for one.
    """
    folder = absolute(folder)
    names = {path.name for path in list_folder(folder)}
    return (
        MANIFEST_NAME not in names
        and not names.isdisjoint({SAFETENSORS_NAME, TORCH_NAME})
        and any(_RANDOM_STATES.fullmatch(name) for name in names)
    )


def is_legacy_file(path: Path) -> bool:
    """Say whether a file has a name that 0.1.61 gave to a part of a training state."""
    names = (SAFETENSORS_NAME, TORCH_NAME, _OPTIMIZER, _SCALER, _METADATA)
    return path.name in names or any(
        pattern.fullmatch(path.name) for pattern in (_SCHEDULER, _RANDOM_STATES)
    )


def read_legacy_training_state(
    folder: str | os.PathLike[str], *, allow_pickle: bool = False
) -> LegacyTrainingState:
    """Read a training state that ``save_training_state`` of 0.1.61 wrote.

    Args:
        folder: The folder. It has no manifest: nothing tells whether it is complete.
        allow_pickle: Read files that run code while they are loaded. True only for
            files that you wrote yourself.

    Raises:
        CheckpointNotFoundError: If the folder has no weights.
        CheckpointError: If the weights, the optimizer's state, the scaler's state or
            the metadata cannot be read. For the scheduler's and the random states
            there is a warning instead, and ``skipped`` names them.
    """
    folder = absolute(folder)
    reader = _Reader(folder, allow_pickle)
    scheduler_files = reader.numbered(_SCHEDULER)
    return LegacyTrainingState(
        model=reader.read_weights(),
        optimizer=reader.read_if_there(_OPTIMIZER),
        # 0.1.61 added the scheduler anew at each save: the last is the latest
        scheduler=reader.read_or_skip(scheduler_files[max(scheduler_files)])
        if scheduler_files
        else None,
        scaler=reader.read_if_there(_SCALER),
        metadata=reader.read_if_there(_METADATA) or {},
        random_states={
            rank: states
            for rank, name in reader.numbered(_RANDOM_STATES).items()
            if (states := reader.read_or_skip(name, _convert_random_states)) is not None
        },
        skipped=reader.skipped,
    )


class _Reader:
    def __init__(self, folder: Path, allow_pickle: bool) -> None:
        self.skipped: dict[str, str] = {}
        self._folder = folder
        self._load: Callable[[Path], Any] = _unpickle if allow_pickle else load_file

    def numbered(self, pattern: re.Pattern[str]) -> dict[int, str]:
        names = sorted(path.name for path in self._folder.glob("*"))
        found = (pattern.fullmatch(name) for name in names)
        return {int(match[1]): match[0] for match in found if match}

    def read_weights(self) -> Mapping[str, Any]:
        if (self._folder / SAFETENSORS_NAME).exists():
            return load_weights(self._folder)
        weights: Mapping[str, Any] | None = self.read_if_there(TORCH_NAME)
        if weights is None:
            raise CheckpointNotFoundError(
                f"{self._folder} is not a training state: it has neither "
                f"{SAFETENSORS_NAME} nor {TORCH_NAME}."
            )
        return weights

    def read_if_there(self, name: str) -> Any:
        path = self._folder / name
        return self._load(path) if path.exists() else None

    def read_or_skip(
        self, name: str, convert: Callable[[Any], Any] = lambda content: content
    ) -> Any:
        try:
            return convert(self._load(self._folder / name))
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            self.skipped[name] = str(error)
            warn(
                f"{self._folder / name} was skipped: {error} "
                "If you wrote the file yourself, allow_pickle=True reads it."
            )
            return None


def _unpickle(path: Path) -> Any:
    try:
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise_if_out_of_resources(error, path)
        raise CheckpointError(f"Could not read {path}: {error}.") from error


def _convert_random_states(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Turn what Accelerate saved into what ``set_random_states`` takes."""
    version, words, gauss = saved["random_state"]
    _, key, position, has_gauss, numpy_gauss = saved["numpy_random_seed"]
    states = {
        "python": {
            "version": version,
            "words": torch.tensor(words, dtype=torch.int64),
            "gauss": gauss,
        },
        "numpy": {
            "bit_generator": "MT19937",
            "state": {
                "key": to_storable(np.asarray(key)),
                "pos": position,
            },
            "has_gauss": has_gauss,
            "gauss": numpy_gauss,
        },
        "torch": saved["torch_manual_seed"],
    }
    if "torch_cuda_manual_seed" in saved:
        states["accelerator"] = {
            "type": "cuda",
            "current": 0,
            "states": saved["torch_cuda_manual_seed"],
        }
    return states
