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


class DirectoryLock:
    """Says of a directory that a process writes to it, as long as the process lives.

    The operating system keeps the lock, so a killed process leaves none behind, and it
    holds for other machines where the file system passes locks on. Where there are no
    locks nothing is locked.

    Args:
        directory: Created if it is missing.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path: Path = absolute(directory) / ".lock"
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            CheckpointError: If another process has it, or if the directory cannot be
                written to.
        """
        while fcntl is not None and not self.is_held:
            with write_errors_explained(self.path):
                make_folder(self.path.parent)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            if not self._lock(descriptor):
                os.close(descriptor)
                return
            if _is_at(descriptor, self.path):
                self._descriptor = descriptor
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
            host, _, pid = _read_owner(descriptor).rpartition(" ")
            os.close(descriptor)
            raise CheckpointError(
                f"Another run writes to {self.path.parent}: process {pid or '?'} on "
                f"{host or 'a machine that is not known'}. Wait until it has ended, or "
                "save to another folder."
            ) from error
        return True

    def release(self) -> None:
        """Let others take the lock; does nothing if it is not held."""
        if self._descriptor is not None:
            with suppress(OSError):  # an empty file that stays does no harm
                if _is_at(self._descriptor, self.path):
                    self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None


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
