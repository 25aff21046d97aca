"""The manifest of a checkpoint: what it holds, and the checksums that prove it."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch

from pytorch_accelerated.checkpoint._disk import flush, raise_if_out_of_resources
from pytorch_accelerated.checkpoint._files import CheckpointNotFoundError
from pytorch_accelerated.checkpoint._guards import check_plain_file, kind_if_not_plain
from pytorch_accelerated.checkpoint._storable import to_storable
from pytorch_accelerated.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
FORMAT = "pytorch-accelerated checkpoint"
FORMAT_VERSION = 1

Checksum = Literal["crc32", "sha256"]

_CHUNK_BYTES = 1 << 20
# Enough for 50,000 files. Python takes up to 24 times as much memory to read it.
_LARGEST_MANIFEST_BYTES = 1 << 23


class ForeignManifestError(CheckpointError):
    """The folder belongs to another program or to 0.1.61; nothing is wrong with it."""


def create_manifest(
    folder: Path,
    files: Iterable[str],
    progress: Mapping[str, Any],
    world_size: int,
    checksum: Checksum,
) -> dict[str, Any]:
    """Describe a complete folder of files.

    Args:
        folder: The folder.
        files: Paths of the files relative to it, with forward slashes.
        progress: How far the run was; see ``CheckpointWriter.commit``.
        world_size: Number of processes of the run.
        checksum: The kind of checksum of the files.
    """
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": _library_version(),
        "torch_version": str(torch.__version__),
        "saved_at": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "world_size": world_size,
        "progress": plain_json(progress),
        "files": {
            name: {
                "size": (folder / name).stat().st_size,
                "checksum": calculate_checksum(folder / name, checksum),
            }
            for name in files
        },
    }
    manifest["checksum"] = _own_checksum(manifest)
    return manifest


def write_manifest(manifest: Mapping[str, Any], folder: Path) -> None:
    """Write the manifest and flush it to disk; the last file of a checkpoint.

    Raises:
        CheckpointError: If it is larger than what would be read.
    """
    text = json.dumps(manifest, indent=1)
    if len(text) > _LARGEST_MANIFEST_BYTES:
        raise CheckpointError(
            f"The manifest of {folder} would have {len(text):,} bytes, and "
            f"{_LARGEST_MANIFEST_BYTES:,} are allowed. Write large things to a file of "
            "the checkpoint instead of its progress, and fewer files."
        )
    with open(folder / MANIFEST_NAME, "x", encoding="utf-8") as file:
        file.write(text)
        flush(file)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a folder; the files are not looked at.

    Raises:
        CheckpointNotFoundError: If there is no such folder.
        ForeignManifestError: If the folder is not a checkpoint of this library.
        CheckpointError: If the manifest is damaged or of a newer version.
    """
    path = folder / MANIFEST_NAME
    manifest = _parse(path)
    if manifest.get("format") != FORMAT and "format_version" not in manifest:
        raise ForeignManifestError(
            f"{folder} is not a checkpoint: its {MANIFEST_NAME} is of another program."
        )
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by a newer version (format {version}, this version "
            f"reads up to {FORMAT_VERSION}). Update pytorch-accelerated to load it."
        )
    if not _matches_its_checksum(manifest):
        raise CheckpointError(f"{path} is damaged: it does not match its checksum.")
    if not _is_well_formed(manifest):
        raise CheckpointError(f"{path} is damaged: it lacks what a manifest holds.")
    _check_names(path, manifest["files"])
    return manifest


def _parse(path: Path) -> dict[str, Any]:
    try:
        check_plain_file(path)
        if path.stat().st_size > _LARGEST_MANIFEST_BYTES:
            raise CheckpointError(f"{path} is damaged: it is too large to be true.")
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.parent.is_dir():
            raise CheckpointNotFoundError(
                f"There is no checkpoint folder {path.parent}."
            ) from error
        raise ForeignManifestError(
            f"{path.parent} is not a complete checkpoint: it has no {MANIFEST_NAME}, "
            "which is written last (version 0.1.61 wrote none)."
        ) from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise_if_out_of_resources(error, path)
        raise CheckpointError(
            f"{path} is damaged and cannot be read ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(manifest, dict):
        raise ForeignManifestError(
            f"{path.parent} is not a checkpoint: its {MANIFEST_NAME} is of another "
            "program."
        )
    return manifest


def _matches_its_checksum(manifest: Mapping[str, Any]) -> bool:
    try:
        return bool(manifest.get("checksum") == _own_checksum(manifest))
    except RecursionError:  # it is too deep to have been written
        return False


def _is_well_formed(manifest: Mapping[str, Any]) -> bool:
    return (
        isinstance(manifest.get("progress"), dict)
        and isinstance(manifest.get("library_version"), str)
        and isinstance(manifest.get("saved_at"), str)
        and isinstance(manifest.get("world_size"), int)
        and isinstance(manifest.get("files"), dict)
        and all(
            isinstance(entry, dict)
            and isinstance(entry.get("size"), int)
            and isinstance(entry.get("checksum"), str)
            for entry in manifest["files"].values()
        )
    )


def _check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse names that lead out of the folder: they can only be an attack."""
    for name in names:
        if "\0" in name or not _is_encodable(name):
            raise CheckpointError(
                f"{path} names the file {name!r}, and no file can have that name."
            )
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or "\\" in name or ":" in name or name[0] == "/":
            raise CheckpointError(
                f"{path} names the file {name!r}, which leads out of the checkpoint. "
                "Do not load anything from this folder."
            )


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def find_damage(
    folder: Path, manifest: Mapping[str, Any], *, checksums: bool = True
) -> str | None:
    """Say which file of a checkpoint is not as it was written, and how; else None."""
    for name, entry in manifest["files"].items():
        if (reason := _damage_of(folder, name, entry, checksums)) is not None:
            return f"{folder / name} {reason}"
    return None


def _damage_of(
    folder: Path, name: str, entry: Mapping[str, Any], checksums: bool
) -> str | None:
    path = folder / name
    try:
        if _has_link(folder, name):
            return "is a link, which a checkpoint never holds"
        if (kind := kind_if_not_plain(path)) is not None:
            return f"is {kind}"
        size = path.stat().st_size
        if size != entry["size"]:
            return f"has {size:,} bytes instead of {entry['size']:,}"
        kind, _, expected = entry["checksum"].partition(":")
        if checksums and calculate_checksum(path, kind) != f"{kind}:{expected}":
            return f"does not match its {kind} checksum"
    except FileNotFoundError:
        return "is missing"
    except (OSError, MemoryError) as error:
        raise_if_out_of_resources(error, path)
        return f"cannot be read ({error})"
    return None


def _has_link(folder: Path, name: str) -> bool:
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            return True
    return False


def calculate_checksum(path: Path, kind: str) -> str:
    """Return the checksum of a file as ``"<kind>:<hexadecimal digits>"``.

    Raises:
        CheckpointError: If the kind is unknown.
    """
    if kind not in _CHECKSUMS:
        raise CheckpointError(
            f"{path} has a checksum of the unknown kind {kind!r}; this version knows "
            f"{', '.join(_CHECKSUMS)}. Update pytorch-accelerated to load it."
        )
    with open(path, "rb") as file:
        return f"{kind}:{_CHECKSUMS[kind](iter(lambda: file.read(_CHUNK_BYTES), b''))}"


def _crc32(chunks: Iterable[bytes]) -> str:
    value = 0
    for chunk in chunks:
        value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def _sha256(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


_CHECKSUMS: dict[str, Callable[[Iterable[bytes]], str]] = {
    "crc32": _crc32,
    "sha256": _sha256,
}


def _own_checksum(manifest: Mapping[str, Any]) -> str:
    """Return the checksum of all but the checksum, whatever the white space."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"crc32:{zlib.crc32(text.encode()):08x}"


def plain_json(progress: Mapping[str, Any]) -> dict[str, Any]:
    """Return progress as it will be read back from JSON.

    Raises:
        TypeError: If it holds something that JSON cannot.
    """
    text = json.dumps(to_storable(progress, "progress"), default=_json_value)
    plain: dict[str, Any] = json.loads(text)
    return plain


def _json_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return value.item()
    if isinstance(value, set):
        return sorted(value, key=str)
    raise TypeError(
        f"progress holds a {type(value).__name__}; it may hold numbers, text, lists "
        "and dicts of them. Write larger things to a file of the checkpoint."
    )


def list_files(folder: Path) -> list[str]:
    """List the files in a folder and below, as sorted relative paths with slashes.

    Raises:
        CheckpointError: If there is a link among them.
    """
    found = []
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if (path := Path(root, name)).is_symlink():
                raise CheckpointError(
                    f"{path} is a link, which a checkpoint cannot hold. Copy the file."
                )
        found += [Path(root, name).relative_to(folder).as_posix() for name in files]
    return sorted(found)


def _library_version() -> str:
    # looked up, because the tools do not import the package that imports them
    package = sys.modules[__name__.partition(".")[0]]
    return str(getattr(package, "__version__", "unknown"))
