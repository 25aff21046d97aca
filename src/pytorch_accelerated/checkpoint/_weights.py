"""The weights of a model in one file that other libraries can read too."""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pytorch_accelerated.checkpoint._disk import (
    absolute,
    raise_if_out_of_resources,
    replacing,
    write_errors_explained,
)
from pytorch_accelerated.checkpoint._files import (
    CheckpointNotFoundError,
    read_file,
    write_storable,
)
from pytorch_accelerated.checkpoint._storable import to_storable
from pytorch_accelerated.errors import CheckpointError

_BUFFER_BYTES = 1 << 23

SAFETENSORS_NAME = "model.safetensors"
TORCH_NAME = "pytorch_model.bin"

# what DistributedDataParallel, torch.compile and activation checkpointing add to names
_OUTER_PREFIX = "module."
_INNER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.")

# texts in the header of a file, which no weight may be named like
_FORMAT_KEY = "format"
_VERSIONS_KEY = "_metadata"
_CHECKSUM_KEY = "_checksum"
_RESERVED_NAMES = {_FORMAT_KEY, _VERSIONS_KEY, _CHECKSUM_KEY, "__metadata__"}
_DTYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
}


def save_weights(state_dict: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Save the state dict of a model in a folder, as ``model.safetensors``.

    Tied weights are stored once and are tied again by :func:`load_weights`. What the
    safetensors format cannot hold exactly (values that are not tensors, such as the
    extra state of a module; partly overlapping tensors; rare dtypes) goes into
    ``pytorch_model.bin`` instead, in torch's format, which is loaded as safely. So does
    everything in a folder whose name is not UTF-8, which safetensors cannot open.

    Args:
        state_dict: What ``model.state_dict()`` returns.
        folder: The folder to write into; created if it is missing.

    Returns:
        The path of the file. A file of the other format in the folder is removed.

    Raises:
        TypeError: If a value could not be loaded safely again.
        CheckpointError: If the file could not be written.
    """
    return write_weights(state_dict, absolute(folder), checksum=True)


def write_weights(
    state_dict: Mapping[str, Any], folder: Path, *, checksum: bool
) -> Path:
    """Save weights as :func:`save_weights` does.

    Args:
        state_dict: What ``model.state_dict()`` returns.
        folder: Where to.
        checksum: Whether the file is to hold its checksum, as it must where no manifest
            does.
    """
    state = to_storable(state_dict, "state_dict")
    content = _as_safetensors(state) if _is_text(folder) else None
    name, other = SAFETENSORS_NAME, TORCH_NAME
    if content is None:
        name, other = other, name
    path = folder / name
    with write_errors_explained(path):
        with replacing(path) as temporary:
            if content is None:
                write_storable(state, temporary)
            else:
                tensors, header = content
                if checksum:
                    header[_CHECKSUM_KEY] = _checksum(tensors, header)
                _write_safetensors(tensors, header, temporary)
        (folder / other).unlink(missing_ok=True)
    return path


def load_weights(folder: str | os.PathLike[str]) -> OrderedDict[str, Any]:
    """Load the state dict that is stored in a folder, to the CPU.

    Reads ``model.safetensors`` or ``pytorch_model.bin``, also those that Accelerate or
    transformers wrote. Weights that :func:`save_weights` found tied are tied again;
    other writers leave all but one name of tied weights out. Checksums that
    :func:`save_weights` or ``torch.save`` wrote are checked.

    Args:
        folder: The folder, or one of these files itself.

    Raises:
        CheckpointNotFoundError: If there is neither of the two files.
        CheckpointError: If the file is damaged, or needs code to be loaded.
    """
    return read_weights(absolute(folder))


def read_weights(folder: Path, *, checksums: bool = True) -> OrderedDict[str, Any]:
    """Load weights as :func:`load_weights` does.

    Args:
        folder: The folder or file.
        checksums: Whether the checksum in the file is checked; not needed if that of a
            manifest was.
    """
    if folder.is_dir():
        path = folder / SAFETENSORS_NAME
        if not path.exists():
            path = folder / TORCH_NAME
    else:
        path = folder
    if not path.exists():
        raise CheckpointNotFoundError(
            f"There are no weights in {folder}: expected {SAFETENSORS_NAME} or "
            f"{TORCH_NAME}."
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path, checksums)
    state = read_file(path, checksums=checksums)
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__} instead of a state dict. Load "
            "another checkpoint."
        )
    return OrderedDict(state)


def _is_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_safetensors(
    state: Mapping[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Return the tensors to write and the header's texts; None if they cannot hold it.

    A name that is left out because its tensor is there under another name is put into
    the header with that name, as safetensors' own ``save_model`` does.
    """
    header = {_FORMAT_KEY: "pt"}
    tensors: dict[str, torch.Tensor] = {}
    first_names: dict[tuple[Any, ...] | None, str] = {}
    for name, tensor in state.items():
        if not _can_hold(tensor) or name in _RESERVED_NAMES:
            return None
        first_name = first_names.setdefault(_place(tensor), name)
        if first_name == name or tensor.numel() == 0:
            tensors[name] = tensor
        else:
            header[name] = first_name
    if _overlap(tensors):
        return None
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        header[_VERSIONS_KEY] = json.dumps(versions)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, header


def _can_hold(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.dtype in _DTYPES
    )


def _place(tensor: Any) -> tuple[Any, ...] | None:
    """Return what two names of one and the same tensor have in common.

    None for what has no place in memory that could tell.
    """
    if (
        not isinstance(tensor, torch.Tensor)
        or nn.parameter.is_lazy(tensor)
        or tensor.layout is not torch.strided
        or tensor.is_nested
        or is_traceable_wrapper_subclass(tensor)
    ):
        return None
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _overlap(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Say whether two of the tensors have memory in common."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + _span(tensor))
        for tensor in tensors.values()
        if tensor.numel()
    )
    return any(following[0] < span[1] for span, following in itertools.pairwise(spans))


def _span(tensor: torch.Tensor) -> int:
    """Return the number of bytes from the first to the last element."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((n - 1) * step for n, step in steps)) * tensor.element_size()


def _checksum(tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> str:
    """Return the checksum of all that a file holds, in whatever order."""
    names = sorted(tensors)
    kinds = [(name, str(tensors[name].dtype), *tensors[name].shape) for name in names]
    value = zlib.crc32(json.dumps([sorted(header.items()), kinds]).encode())
    for name in names:
        content: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(content, value)
    return f"crc32:{value:08x}"


def _write_safetensors(
    tensors: dict[str, torch.Tensor], header: dict[str, str], path: Path
) -> None:
    # Without memory for its buffer, safetensors would end the process.
    bytearray(_BUFFER_BYTES)
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(tensors, path, metadata=header)
    # safetensors makes files that only their owner can read
    path.chmod(mode)


def _read_safetensors(path: Path, checksums: bool) -> OrderedDict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            state = OrderedDict((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (not a mapping)
        expected = header.pop(_CHECKSUM_KEY, None)
        if checksums and expected not in (None, _checksum(state, header)):
            raise ValueError("it does not match its checksum")
        for name, first_name in header.items():
            if name not in _RESERVED_NAMES and first_name in state:
                state[name] = state[first_name]
        if _VERSIONS_KEY in header:
            state._metadata = _read_versions(header[_VERSIONS_KEY])  # type: ignore[attr-defined]
    except Exception as error:
        raise_if_out_of_resources(error, path)
        # A damaged file can make the reader fail in any way it likes.
        raise CheckpointError(
            f"Could not read {path}: it is damaged, incomplete, or not a safetensors "
            f"file ({type(error).__name__}: {error}). Load another checkpoint."
        ) from error
    return state


def _read_versions(text: str) -> OrderedDict[str, dict[str, Any]]:
    versions = OrderedDict(json.loads(text))
    if not all(isinstance(each, dict) for each in versions.values()):
        raise ValueError("the versions of the modules in it are none")
    return versions


def fit_to_model(model: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state dict with the names that the model uses for its weights.

    ``DistributedDataParallel`` puts ``module.`` before each name, ``torch.compile``
    puts ``_orig_mod.`` in them; they are removed or added as the model needs. Names of
    tied weights that the file leaves out are added where the model ties them. What
    does not fit is left as it is, for :func:`explain_mismatch` to name.
    """
    expected = model.state_dict()
    if state_dict.keys() == expected.keys():
        return state_dict
    fitted = _renamed(model, expected, state_dict)
    by_place = {_place(v): fitted[k] for k, v in expected.items() if k in fitted}
    by_place.pop(None, None)
    for name, tensor in expected.items():
        if name not in fitted and _place(tensor) in by_place:
            fitted[name] = by_place[_place(tensor)]
    return fitted if fitted.keys() == expected.keys() else state_dict


def _renamed(
    model: nn.Module, expected: Mapping[str, Any], state_dict: Mapping[str, Any]
) -> OrderedDict[str, Any]:
    names = {_plain_name(name): name for name in expected}
    state = OrderedDict(
        (names.get(_plain_name(name), name), value)
        for name, value in state_dict.items()
    )
    versions = getattr(state_dict, "_metadata", None)
    if versions is not None:
        modules = {_plain_name(f"{name}."): name for name, _ in model.named_modules()}
        state._metadata = OrderedDict(  # type: ignore[attr-defined]
            (modules.get(_plain_name(f"{name}."), name), value)
            for name, value in versions.items()
        )
    return state


def _plain_name(name: str) -> str:
    for prefix in _INNER_PREFIXES:
        name = name.replace(prefix, "")
    while name.startswith(_OUTER_PREFIX):
        name = name.removeprefix(_OUTER_PREFIX)
    return name.removeprefix(".")


def explain_mismatch(model: nn.Module, state_dict: Mapping[str, Any]) -> str | None:
    """Say why a state dict does not fit a model; None if it fits.

    Names the first few weights that are missing, unexpected, or of another shape.
    Names are compared as :func:`fit_to_model` would change them.
    """
    expected = model.state_dict()
    given = fit_to_model(model, state_dict)
    reasons = [
        _first_few(
            "missing in the checkpoint", [k for k in expected if k not in given]
        ),
        _first_few("not in the model", [k for k in given if k not in expected]),
        _first_few("of another shape", _other_shapes(expected, given)),
    ]
    return "; ".join(reason for reason in reasons if reason) or None


def _other_shapes(expected: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {tuple(given[name].shape)} in the checkpoint and "
        f"{tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if isinstance(tensor, torch.Tensor)
        and not nn.parameter.is_lazy(tensor)
        and isinstance(given.get(name), torch.Tensor)
        and given[name].shape != tensor.shape
    ]


def _first_few(what: str, items: list[str], limit: int = 3) -> str:
    if not items:
        return ""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{what}: {', '.join(items[:limit])}{more}"
