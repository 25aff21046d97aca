"""Keeps two runs from writing to one directory."""

from __future__ import annotations

import errno
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

from pytorch_accelerated.checkpoint._disk import (
    absolute,
    make_folder,
    write_errors_explained,
)
from pytorch_accelerated.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)

# By process, since those that are forked get no share, and file.
_HELD: dict[tuple[int, Path], list[DirectoryLock]] = {}


class DirectoryLock:
    """Says of a directory that a process writes to it, as long as the process lives.

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
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            CheckpointError: If another owner has it, or if the directory cannot be
                written to.
        """
        # The system would give a process the lock that it has already.
        if held := _HELD.get((os.getpid(), self.path)):
            if self in held:
                return
            if self.owner is None or self.owner != held[0].owner:
                raise self._refusal(f"{platform.node()} {os.getpid()}")
            self._descriptor = held[0]._descriptor
            held.append(self)
        while fcntl is not None and not self.is_held:
            with write_errors_explained(self.path):
                make_folder(self.path.parent)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            if not self._lock(descriptor):
                os.close(descriptor)
                return
            if _is_at(descriptor, self.path):
                self._descriptor = descriptor
                _HELD[os.getpid(), self.path] = [self]
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{platform.node()} {os.getpid()}".encode())
            else:  # its last owner has removed it in the meantime
                os.close(descriptor)

    def _lock(self, descriptor: int) -> bool:
        try:
            # Of this kind of lock, children that are forked get no share: a worker
            # that outlives its killed parent does not keep it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            process = _read_owner(descriptor)
            os.close(descriptor)
            raise self._refusal(process) from error
        return True

    def _refusal(self, process: str) -> CheckpointError:
        host, _, pid = process.rpartition(" ")
        return CheckpointError(
            f"Another run writes to {self.path.parent}: process {pid or '?'} on "
            f"{host or 'a machine that is not known'}. Wait until it has ended, or "
            "save to another folder."
        )

    def release(self) -> None:
        """Let others take the lock; does nothing if it is not held."""
        descriptor, self._descriptor = self._descriptor, None
        held = _HELD.get((os.getpid(), self.path), [])
        if self in held:
            held.remove(self)
        if descriptor is None or held:
            return
        _HELD.pop((os.getpid(), self.path), None)
        with suppress(OSError):  # an empty file that stays does no harm
            if _is_at(descriptor, self.path):
                self.path.unlink()
        os.close(descriptor)


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
