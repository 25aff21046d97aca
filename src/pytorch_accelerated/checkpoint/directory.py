"""A directory of checkpoints: who may write to it, which is the newest, which go."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytorch_accelerated.checkpoint.files import (
    OutOfResourcesError,
    absolute,
    list_folder,
    make_folder,
    write_errors_explained,
)
from pytorch_accelerated.checkpoint.folder import (
    LEFTOVER,
    Checkpoint,
    NoCheckpointError,
    remove_folder,
    retire,
)
from pytorch_accelerated.errors import CheckpointError, warn

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)

# By process, since those that are forked get no share, and file.
_HELD: dict[tuple[int, Path], list[DirectoryLock]] = {}


class DirectoryLock:
    """Says of a directory that a process writes to it, as long as the process lives.

    What writers that were killed have left there is removed when the lock is taken:
    nobody else writes then, so it is dead.

    The operating system keeps the lock, so a killed process leaves none behind, and it
    holds for other machines where the file system passes locks on. Where there are no
    locks nothing is locked.

    Args:
        directory: Created if it is missing.
        owner: Locks of one process that name the same owner share the lock: the last
            that is released frees it. Any other lock is refused.
    """

    def __init__(
        self, directory: str | os.PathLike[str], owner: str | None = None
    ) -> None:
        self.path: Path = absolute(directory) / ".lock"
        self.owner = owner
        self._descriptor = -1

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            CheckpointError: If another owner has it, or if the directory cannot be
                written to.
        """
        # The system would give a process the lock that it has already.
        held = _HELD.setdefault((os.getpid(), self.path), [])
        if self in held:
            return
        if held:
            if self.owner is None or self.owner != held[0].owner:
                raise self._refusal(_this_process())
            self._descriptor = held[0]._descriptor
            held.append(self)
        elif (descriptor := self._lock()) is not None:
            self._descriptor = descriptor
            held.append(self)
            clean_leftovers(self.path.parent)

    def _lock(self) -> int | None:
        with write_errors_explained(self.path):
            make_folder(self.path.parent)
            while fcntl is not None:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    # Of this kind of lock, children that are forked get no share: a
                    # worker that outlives its killed parent does not keep it.
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    process = _read_owner(descriptor)
                    os.close(descriptor)
                    if error.errno in _NO_LOCKS:
                        return None
                    raise self._refusal(process) from error
                if _is_at(descriptor, self.path):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, _this_process().encode())
                    return descriptor
                os.close(descriptor)  # its last owner has removed it in the meantime
        return None

    def _refusal(self, process: str) -> CheckpointError:
        host, _, pid = process.rpartition(" ")
        return CheckpointError(
            f"Another run writes to {self.path.parent}: process {pid or '?'} on "
            f"{host or 'a machine that is not known'}. Wait until it has ended, or "
            "save to another folder."
        )

    def release(self) -> None:
        """Let others take the lock; does nothing if it is not held."""
        held = _HELD.get((os.getpid(), self.path), [])
        if self in held:
            held.remove(self)
            if not held:
                with suppress(OSError):  # an empty file that stays does no harm
                    if _is_at(self._descriptor, self.path):
                        self.path.unlink()
                os.close(self._descriptor)


def _this_process() -> str:
    return f"{platform.node()} {os.getpid()}"


def _read_owner(descriptor: int) -> str:
    """Return what the owner of a lock has written, which may have got it just now."""
    for _ in range(50):
        if owner := os.pread(descriptor, 300, 0).decode(errors="replace"):
            return owner
        time.sleep(0.01)
    return ""


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def clean_leftovers(directory: str | os.PathLike[str]) -> None:
    """Remove what writers left in a directory when they were killed.

    A checkpoint that was moved aside by a replacement which never finished gets its
    name back. Only names that this library makes are touched. Nobody may write to the
    directory meanwhile: :class:`DirectoryLock` calls this.

    Args:
        directory: Where checkpoints are kept; it need not exist.
    """
    for entry in list_folder(absolute(directory)):
        found = LEFTOVER.fullmatch(entry.name)
        if found is None or entry.is_symlink():
            continue
        if found["kind"] == "old":
            final = entry.with_name(found["name"])
            if final.exists():
                retire(entry, final)
            else:
                os.rename(entry, final)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()


def list_checkpoints(directory: str | os.PathLike[str]) -> list[Checkpoint]:
    """List the checkpoints of a directory, in order of run and ``num_updates``.

    Only those whose manifest can be read; their files are not verified. The time when
    a file was written plays no part: clocks jump and copies get new times.

    Args:
        directory: Where checkpoints are kept; it need not exist.
    """
    return _oldest_first(directory, tell=False)


def newest(*directories: str | os.PathLike[str]) -> Checkpoint | None:
    """Return the whole checkpoint with the most updates; None if there is none.

    If several runs wrote to the directories, it is one of the run that started last.
    For every broken one that might be newer a warning names the file and the reason.

    Args:
        directories: Where checkpoints are kept; the newest of all is returned.
    """
    for each in reversed(_oldest_first(*directories, tell=True)):
        if _is_fine(each, Checkpoint.verify, tell=True):
            return each
    return None


def _oldest_first(*directories: str | os.PathLike[str], tell: bool) -> list[Checkpoint]:
    entries = (each for one in directories for each in list_folder(absolute(one)))
    folders = (each for each in entries if each.is_dir() and not each.is_symlink())
    candidates = (Checkpoint(each) for each in folders if not _is_leftover(each))
    readable = (each for each in candidates if _is_fine(each, _order, tell))
    return sorted(readable, key=_order)


def _is_leftover(folder: Path) -> bool:
    found = LEFTOVER.fullmatch(folder.name)
    return found is not None and (
        found["kind"] != "old" or folder.with_name(found["name"]).exists()
    )


def _is_fine(
    checkpoint: Checkpoint, look: Callable[[Checkpoint], object], tell: bool
) -> bool:
    """Say whether a checkpoint can be looked at in some way, or tell why not."""
    try:
        look(checkpoint)
    except OutOfResourcesError:
        raise
    except CheckpointError as error:
        if tell and not isinstance(error, NoCheckpointError):
            warn(f"The checkpoint {checkpoint.path} is passed over: {error}")
        return False
    return True


def _order(checkpoint: Checkpoint) -> tuple[int, int, Any, str]:
    epoch = checkpoint.progress.get("epoch", -1)
    return checkpoint.run_number, checkpoint.num_updates, epoch, checkpoint.path.name


def prune(checkpoints: Iterable[Checkpoint]) -> None:
    """Delete checkpoints; a warning names each that cannot be deleted.

    Args:
        checkpoints: Those to delete, such as ``list_checkpoints(directory)[:-3]``.
    """
    for each in checkpoints:
        try:
            remove_folder(each.path)
        except OSError as error:  # noqa: PERF203 (each one on its own)
            warn(f"The old training state {each.path} could not be deleted ({error}).")
