"""Refuses files that would take more memory or time than there is in them."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pytorch_accelerated.errors import CheckpointError

# Far more than states have, and less than Python's own functions can follow.
DEEPEST_NESTING = 100
_MOST_VALUES = 10**8
_IS_FOLDER = 0x10
_START_OF_ARCHIVE = b"PK\x03\x04"


def check_plain_file(path: Path) -> None:
    """Refuse links, which may lead anywhere, and pipes, which may never end.

    Raises:
        CheckpointError: If it is anything but a file.
        OSError: If there is none.
    """
    if (kind := kind_if_not_plain(path)) is not None:
        raise CheckpointError(
            f"{path} is {kind}, which a checkpoint never holds. Do not load it."
        )


def kind_if_not_plain(path: Path) -> str | None:
    """Say what a path leads to if it is not a file: "a link" or "no plain file"."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "a link"
    return None if stat.S_ISREG(mode) else "no plain file"


def check_archive(path: Path, *, checksums: bool = True) -> None:
    """Refuse an archive that is damaged, or unpacks to more than the file holds.

    ``torch.save`` writes each entry as it is, once. Reading a compressed one would take
    up to a thousand times the size of the file.

    Args:
        path: The file.
        checksums: Whether to read all of it and compare the checksums of the entries.

    Raises:
        CheckpointError: If an entry is compressed, if entries overlap, or if one does
            not match its checksum.
        zipfile.BadZipFile: If the archive is damaged.
    """
    with open(path, "rb") as file:
        if file.read(len(_START_OF_ARCHIVE)) != _START_OF_ARCHIVE:
            return  # torch reads it in the format from before there were archives
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"Refused to load {path}: {entry.filename} in it is compressed, which "
                "torch.save never does, and might fill the memory."
            )
        # torch reads nothing of a folder, and takes what is in the memory for it.
        if entry.is_dir() or entry.external_attr & _IS_FOLDER:
            raise CheckpointError(
                f"{path} is damaged: {entry.filename} in it is a folder. Load another "
                "checkpoint."
            )
    claimed, size = sum(entry.file_size for entry in entries), path.stat().st_size
    # An archive in an archive could have another table of contents for torch.
    if claimed > size or min((entry.header_offset for entry in entries), default=0):
        raise CheckpointError(
            f"Refused to load {path}: its entries claim {claimed:,} bytes, more bytes "
            f"than the {size:,} of the file, or do not start where it does."
        )
    # torch can be told to leave them out, and writes zeros then.
    if checksums and any(entry.CRC for entry in entries):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(
                f"{path} is damaged: {damaged} in it does not match its checksum. Load "
                "another checkpoint."
            )


def check_content(content: Any, path: Path) -> None:
    """Refuse content that is small in memory and endless to walk through or to copy.

    Raises:
        CheckpointError: If it is nested too deeply, if it holds itself, if it holds
            the same parts over and over, or tensors larger than their memory.
    """
    try:
        num_values, height = _measure(content, DEEPEST_NESTING, {})
    except _LargerThanItsMemoryError as error:
        raise CheckpointError(f"Refused to load {path}: {error}.") from None
    if height > DEEPEST_NESTING:
        raise CheckpointError(
            f"Refused to load {path}: its values are nested more than "
            f"{DEEPEST_NESTING} levels deep, or hold themselves."
        )
    if num_values > _MOST_VALUES:
        raise CheckpointError(
            f"Refused to load {path}: it holds the same values again and again, more "
            f"than {_MOST_VALUES:,} values in all."
        )


def _measure(
    value: Any, levels_left: int, known: dict[int, tuple[int, int]]
) -> tuple[int, int]:
    """Count the values in a container, shared ones each time, and its levels."""
    if isinstance(value, torch.Tensor):
        _check_memory(value)
    if not isinstance(value, dict | list | tuple | set):
        return 1, 0
    if levels_left < 0:
        return 1, 1  # those above add up to more than there may be
    if id(value) not in known:
        known[id(value)] = 1, DEEPEST_NESTING  # what is found if it holds itself
        num_values, height = 1, 0
        for member in value:
            below = [member, value[member]] if isinstance(value, dict) else [member]
            for each in below:
                more, levels = _measure(each, levels_left - 1, known)
                num_values, height = num_values + more, max(height, levels)
        known[id(value)] = num_values, height + 1
    return known[id(value)]


class _LargerThanItsMemoryError(Exception):
    """A tensor has more elements than there are in memory."""


def _check_memory(tensor: torch.Tensor) -> None:
    """Refuse a tensor that shows the same few bytes as gigabytes of elements."""
    parts = _parts_of(tensor)
    for part in parts:
        _check_memory(part)
    if parts or tensor.is_nested:
        return
    claimed = tensor.numel() * tensor.element_size()
    if tensor.is_quantized:
        claimed //= 4  # as many elements may share a byte
    held = 0 if tensor.is_meta else tensor.untyped_storage().nbytes()
    if claimed > held:
        raise _LargerThanItsMemoryError(
            f"a tensor in it claims {claimed:,} bytes and has {held:,}. If you trust "
            "where it comes from, read it with torch.load and save a clone() of the "
            "tensor"
        )


def _parts_of(tensor: Any) -> list[torch.Tensor]:
    if is_traceable_wrapper_subclass(tensor):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []
