"""Single checkpoint files: written whole or not at all, and read without code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pytorch_accelerated.checkpoint._disk import (
    absolute,
    raise_if_out_of_resources,
    replacing,
    write_errors_explained,
)
from pytorch_accelerated.checkpoint._guards import check_archive, check_content
from pytorch_accelerated.checkpoint._numpy_values import STAND_INS, with_numpy_values
from pytorch_accelerated.checkpoint._storable import to_storable
from pytorch_accelerated.errors import CheckpointError


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no file or folder of that name.

    Both ``except CheckpointError`` and ``except FileNotFoundError`` catch it.
    """


def save_file(obj: Mapping[Any, Any], path: str | os.PathLike[str]) -> Path:
    """Save a mapping to one file, so that it can be loaded without running code.

    The file is written beside ``path``, flushed to disk and then renamed: a kill, a
    full disk or a loss of power leaves the old file as it was. Missing parent folders
    are created. If ``path`` is a link, the file that it points to is replaced.

    Args:
        obj: What to save: tensors, plain values, and what :func:`to_storable` converts.
        path: Where to save it.

    Returns:
        The absolute path of the file.

    Raises:
        TypeError: If ``obj`` holds something that could not be loaded safely again;
            the message names its key.
        CheckpointError: If the file could not be written.
    """
    path = absolute(path)
    storable = to_storable(obj, path.name)
    with write_errors_explained(path), replacing(path) as temporary:
        write_storable(storable, temporary)
    return path


def write_storable(storable: Any, path: Path) -> None:
    """Write what :func:`to_storable` returned; neither atomic nor flushed."""
    had_checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # those of the entries are checked
    try:
        with open(path, "wb") as file:
            # An open file, not its name: torch then lets the OSError be found.
            torch.save(storable, file)
    finally:
        torch.serialization.set_crc32_options(had_checksums)


def load_file(path: str | os.PathLike[str], *, mmap: bool = False) -> Any:
    """Load what :func:`save_file` (or ``torch.save``) wrote, to the CPU.

    Nothing in the file can run code: only tensors, plain values and numpy arrays of
    numbers are built, and tensors of classes that were registered with
    ``torch.serialization.add_safe_globals``; anything else is refused. So is what would
    take more memory than the size of the file: compressed entries, which ``torch.save``
    does not write, and tensors larger than their memory.

    The checksums that ``torch.save`` writes are checked.

    Args:
        path: The file.
        mmap: Map the file into memory, so that only what is used of it is read. No
            checksum is checked then.

    Raises:
        CheckpointNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, needs code to be loaded, or if there is
            not enough memory for it.
    """
    return read_file(absolute(path), mmap=mmap, checksums=not mmap)


def read_file(path: Path, *, mmap: bool = False, checksums: bool = True) -> Any:
    """Load a file as :func:`load_file` does.

    Args:
        path: The file.
        mmap: Map it into memory.
        checksums: Whether its checksums are checked; not needed if those of a manifest
            were.
    """
    try:
        check_archive(path, checksums=checksums)
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        check_content(content, path)
        return with_numpy_values(content)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            f"There is no file {path}. Check the path, or save a checkpoint first."
        ) from error
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except Exception as error:
        raise_if_out_of_resources(error, path)
        # A damaged file can make the reader fail in any way it likes.
        raise CheckpointError(
            f"Could not read {path}: it is damaged, incomplete, or not a file of "
            f"torch.save ({type(error).__name__}: {_first_line(error)}). "
            "Load another checkpoint."
        ) from error


def _refused(path: Path, error: Exception) -> CheckpointError:
    # torch's own message is long and advises to load with weights_only=False; the
    # reason is behind this mark
    reason = str(error).rpartition("WeightsUnpickler error: ")[2]
    return CheckpointError(
        f"Refused to load {path}: it is damaged or would run code while it is loaded "
        f"({_first_line(reason)}). "
        "If you trust where it comes from, read it with "
        "torch.load(path, weights_only=False) and save it anew."
    )


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
