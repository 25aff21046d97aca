"""Writes checkpoint folders that are whole or absent, and tidies up after kills."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pytorch_accelerated.checkpoint._checkpoint import Checkpoint
from pytorch_accelerated.checkpoint._disk import (
    LEFTOVER,
    TOKEN_PATTERN,
    absolute,
    make_folder,
    new_token,
    remove_folder,
    sync_file,
    sync_folder,
    write_errors_explained,
    writer_is_dead,
)
from pytorch_accelerated.checkpoint._files import write_storable
from pytorch_accelerated.checkpoint._legacy import is_legacy_file
from pytorch_accelerated.checkpoint._manifest import (
    MANIFEST_NAME,
    Checksum,
    create_manifest,
    list_files,
    read_manifest,
    write_manifest,
)
from pytorch_accelerated.checkpoint._storable import to_storable
from pytorch_accelerated.checkpoint._weights import write_weights
from pytorch_accelerated.errors import CheckpointError, warn


class CheckpointWriter:
    """Writes one checkpoint folder: whole or absent, whatever happens meanwhile.

    The files go into a temporary folder beside the final one; ``commit`` flushes them
    to disk, writes the manifest with their checksums last, and gives the folder its
    final name. A checkpoint of that name is replaced only then.

    In one process::

        with CheckpointWriter("checkpoints/step_100") as writer:
            writer.write_weights(model.state_dict())
            writer.write("optimizer.pt", optimizer.state_dict())
            writer.commit({"num_updates": 100, "epoch": 2})

    Leaving the ``with`` block without ``commit`` removes the temporary folder.

    On several processes that share a disk, all use one ``token``: the main process
    makes it and sends it to the others, calls ``begin()``, and lets them pass a
    barrier; every process writes its files; after a second barrier the main process
    calls ``commit`` (or ``abort`` if any of them failed). Where every machine has its
    own disk, the first process of each machine does what the main process does here.

    Args:
        path: The final folder. Missing parents are created.
        token: What :func:`new_token` returned on the main process; None makes one.
        checksum: ``"crc32"`` finds any accidental damage; ``"sha256"`` is slower and
            also proves that the files are those that a published manifest names.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        token: str | None = None,
        checksum: Checksum = "crc32",
    ) -> None:
        if token is not None and not re.fullmatch(TOKEN_PATTERN, token):
            raise ValueError(f"token must come from new_token(), got {token!r}.")
        self.path: Path = absolute(path)
        self.token: str = token or new_token()
        self._checksum: Checksum = checksum

    @property
    def folder(self) -> Path:
        """The temporary folder; files may also be written into it by other means."""
        return self._sibling("tmp")

    def begin(self) -> None:
        """Create the temporary folder (main process).

        Raises:
            CheckpointError: If that is impossible, or if the final folder cannot be
                replaced because it is a file or the working directory.
        """
        with write_errors_explained(self.path):
            self._check_replaceable()
            make_folder(self.path.parent)
            self.folder.mkdir()

    def _check_replaceable(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(
                f"{self.path} is a file; a checkpoint is a folder. Choose another name."
            )
        here = Path.cwd()
        if self.path == here or self.path in here.parents:
            raise CheckpointError(
                f"{self.path} holds the working directory ({here}), so it cannot be "
                "replaced by a checkpoint. Choose a folder in it."
            )

    def write(self, name: str, obj: Any) -> None:
        """Write one file that :meth:`Checkpoint.load` reads (any process).

        Args:
            name: Name of the file, or relative path with forward slashes.
            obj: What to write; see :func:`to_storable`.

        Raises:
            TypeError: If ``obj`` holds something that could not be loaded safely.
            CheckpointError: If the file could not be written.
        """
        path = self._inside(name)
        storable = to_storable(obj, name)
        with write_errors_explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_storable(storable, path)
            sync_file(path)

    def write_weights(self, state_dict: Mapping[str, Any], subfolder: str = "") -> None:
        """Write the weights of a model with :func:`save_weights` (any process).

        Args:
            state_dict: What ``model.state_dict()`` returns.
            subfolder: Where in the checkpoint; needed for a second model.
        """
        folder = self._inside(subfolder) if subfolder else self.folder
        write_weights(state_dict, folder, checksum=False)

    def commit(self, progress: Mapping[str, Any], world_size: int = 1) -> Checkpoint:
        """Make the checkpoint complete and give it its name (main process).

        All files must have been written: call it after a barrier.

        Args:
            progress: How far the run was. ``num_updates`` orders checkpoints; ``epoch``
                and ``metrics`` (a mapping from name to number, read by :func:`best`)
                are shown; anything that JSON can hold may be added.
            world_size: Number of processes that wrote it.

        Raises:
            CheckpointError: If it failed; what was there before is untouched.
        """
        with write_errors_explained(self.path):
            files = list_files(self.folder)
            for name in files:
                sync_file(self.folder / name)
            manifest = create_manifest(
                self.folder, files, progress, world_size, self._checksum
            )
            write_manifest(manifest, self.folder)
            for root, _, _ in os.walk(self.folder):
                sync_folder(Path(root))
            self._publish()
        checkpoint = Checkpoint(self.path)
        checkpoint.is_known_whole = True
        return checkpoint

    def _publish(self) -> None:
        old = self._sibling("old")
        replaced = False
        try:
            if self.path.is_dir():
                # A folder cannot be replaced in one operation. A kill before the next
                # one leaves the old checkpoint under a name that is still found.
                os.rename(self.path, old)
                replaced = True
            os.rename(self.folder, self.path)
        except BaseException:
            if replaced and not self.path.exists():
                os.rename(old, self.path)
            raise
        sync_folder(self.path.parent)
        if replaced:
            _retire(old, self.path)

    def abort(self) -> None:
        """Remove the temporary folder, if there is one; never raises an OSError."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> CheckpointWriter:
        self.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abort()

    def _sibling(self, kind: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{kind}-{self.token}")

    def _inside(self, name: str) -> Path:
        path = self.folder / name
        if os.path.normpath(path) != str(path) or self.folder not in path.parents:
            raise ValueError(
                f"{name!r} must be a relative path inside the checkpoint, "
                "such as 'optimizer.pt' or 'ema/weights.pt'."
            )
        if name == MANIFEST_NAME:
            raise ValueError(f"{name!r} is the name of the manifest; choose another.")
        return path


def clean_leftovers(
    directory: str | os.PathLike[str], *, other_machines: bool = False
) -> list[Path]:
    """Remove what writers left in a directory when they were killed.

    Only names that this library makes are touched, and only if the process that made
    them no longer runs. A checkpoint that was moved aside by a replacement which never
    finished gets its name back.

    Args:
        directory: Where checkpoints are kept; it need not exist.
        other_machines: Also remove what processes of other machines and containers
            left, which cannot be seen to run from here. True is right when no other
            job writes to the directory, for instance after a job was moved.

    Returns:
        The leftovers that were removed or renamed.
    """
    directory = absolute(directory)
    cleaned = []
    for entry in sorted(directory.iterdir()) if directory.is_dir() else []:
        found = LEFTOVER.fullmatch(entry.name)
        if found is None or entry.is_symlink():
            continue
        if writer_is_dead(found, other_machines=other_machines):
            with suppress(FileNotFoundError):  # another process was faster
                _clean(entry, found)
                cleaned.append(entry)
    return cleaned


def _clean(entry: Path, found: re.Match[str]) -> None:
    if found["kind"] == "old":
        final = entry.with_name(found["name"])
        if final.exists():
            _retire(entry, final)
        else:
            os.rename(entry, final)
    elif entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink()


def _retire(old: Path, new: Path) -> None:
    """Remove a replaced folder, but move files that are not the library's to the new.

    Failing is no reason to stop a run: the new checkpoint is complete.
    """
    try:
        ours = _own_entries(old)
        for entry in list(old.iterdir()):
            if entry.name not in ours and not (new / entry.name).exists():
                os.rename(entry, new / entry.name)
        remove_folder(old)
    except OSError as error:
        warn(
            f"{new} is complete, but what it replaces could not be removed from {old} "
            f"({error})."
        )


def _own_entries(folder: Path) -> set[str]:
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        legacy = {entry.name for entry in folder.iterdir() if is_legacy_file(entry)}
        return {MANIFEST_NAME, *legacy}
    return {MANIFEST_NAME, *(name.split("/")[0] for name in manifest["files"])}
