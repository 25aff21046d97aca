"""File operations that survive a kill at any instant, and who a leftover belongs to.

Nothing here knows what a checkpoint is: atomic replacement, flushing to disk, clear
errors, and the names of temporary files and folders.
"""

from __future__ import annotations

import errno
import functools
import os
import platform
import re
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from pytorch_accelerated.errors import CheckpointError

TOKEN_PATTERN = r"(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{8}"
LEFTOVER = re.compile(
    rf"(?:(?P<name>.+)\.(?P<kind>tmp|old)|\.trash)-{TOKEN_PATTERN}", re.DOTALL
)

_HINTS = {
    errno.ENOSPC: "Free some space or save to another disk.",
    errno.EDQUOT: "The quota is used up: free some space or save to another disk.",
    errno.EFBIG: "The file would exceed the largest size allowed here (ulimit -f).",
    errno.EROFS: "The file system is read-only: save to another folder.",
    errno.EACCES: "Check the permissions of the folder.",
    errno.EPERM: "Check the permissions of the folder.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOENT: "A folder on the way to it has vanished.",
    errno.ENOTDIR: "A part of the path is a file, not a folder.",
    errno.EISDIR: "There is a folder of that name.",
    errno.EEXIST: "A file of that name is in the way.",
    errno.EMFILE: "The process has too many open files (ulimit -n).",
    errno.ENFILE: "The machine has too many open files.",
    errno.ENOMEM: "The memory of the host, or what may be used of it, is exhausted.",
}


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return the path with links and relative parts resolved, as it is now.

    A later change of the working directory then does not move a checkpoint, and a
    link is followed instead of being replaced by a file.
    """
    return Path(os.path.realpath(os.path.expanduser(path)))


def new_token() -> str:
    """Return a name part that no other writer uses and that tells who is writing.

    It holds the machine, the process id, the time the process started, and a random
    part, so that the name alone of a leftover tells whether its writer still runs.
    """
    pid = os.getpid()
    return f"{_machine()}-{pid}-{_start_of(pid)}-{secrets.token_hex(4)}"


def writer_is_dead(token: re.Match[str], *, other_machines: bool = False) -> bool:
    """Say whether the process that made a token no longer runs.

    Args:
        token: A match of :data:`TOKEN_PATTERN`.
        other_machines: The answer for a process of another machine or container,
            which cannot be looked at from here.
    """
    if token["machine"] != _machine():
        return other_machines
    pid = int(token["pid"])
    if token["start"] != _start_of(pid):
        return True
    if os.name == "nt":  # signal 0 means Ctrl-C there
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


@functools.cache  # also where no file can be opened any more
def _machine() -> str:
    """Name this machine since its boot, and the container in it, in 8 hex digits."""
    parts = [platform.node()]
    with suppress(OSError):
        # A container has a new host name at each start and shares the boot id, so
        # process ids may only be compared within one name space of processes.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        parts = [boot, os.readlink("/proc/self/ns/pid")]
    return f"{zlib.crc32('|'.join(parts).encode()):08x}"


def _start_of(pid: int) -> str:
    """Return when a process started, in ticks since boot; 0 where that is unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "0"
    return stat.rpartition(")")[2].split()[19]


class OutOfResourcesError(CheckpointError):
    """Something could not be read for a reason that has nothing to do with it."""


def raise_if_out_of_resources(error: BaseException, what: Path | str) -> None:
    """Tell a process without memory or open files left from a damaged file.

    Args:
        error: What was raised.
        what: The file that could not be read, or in words what could not be done.

    Raises:
        OutOfResourcesError: If that is the reason for the error.
    """
    number = _errno_of(error)
    if number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        if isinstance(what, Path):
            what = f"Could not read {what}, which may be whole"
        raise OutOfResourcesError(
            f"{what}: {os.strerror(number)} (errno {number}). {_HINTS[number]}"
        ) from error


def list_folder(folder: Path) -> list[Path]:
    """Return what is in a folder, by name; nothing if there is none.

    Raises:
        CheckpointError: If it cannot be looked at.
    """
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise_if_out_of_resources(error, folder)
        raise CheckpointError(f"Could not list {folder} ({error}).") from error


@contextmanager
def write_errors_explained(path: Path) -> Iterator[None]:
    """Turn the many errors of a failed write into one that names path and cause.

    Raises:
        CheckpointError: For an ``OSError``, for the errors that torch and safetensors
            raise instead of one, and where memory runs out.
    """
    handled_already = sys.exc_info()[1]
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, MemoryError) as error:
        _raise_what_interrupted(error, handled_already)
        raise CheckpointError(
            f"Could not write {path}: {_cause(error, path)} "
            "What was saved before is untouched."
        ) from error


def _raise_what_interrupted(
    error: BaseException | None, handled_already: BaseException | None
) -> None:
    """Raise Ctrl-C and the like instead of what torch has made of them.

    They come wherever the main thread happens to be, as does torch's own error when a
    worker of a loader has died.
    """
    while error is not None and error is not handled_already:
        if not isinstance(error, Exception) or "DataLoader worker" in str(error):
            raise error
        error = error.__cause__ or error.__context__


def _cause(error: BaseException, path: Path) -> str:
    number = _errno_of(error)
    if number is None:
        return f"{error}."
    parts = [f"{os.strerror(number)} (errno {number})."]
    if number in (errno.ENOSPC, errno.EDQUOT):
        parts.append(_space_left(path))
    parts.append(_HINTS.get(number, ""))
    return " ".join(part for part in parts if part)


def _errno_of(error: BaseException | None) -> int | None:
    """Find the error number, which torch and safetensors hide.

    torch raises a ``RuntimeError`` while it handles the ``OSError``; both torch and
    safetensors may have the number only in their text.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return errno.ENOMEM
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return int(found[1])
        for number in errno.errorcode:
            if f"{os.strerror(number)} ({number})" in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None


def _space_left(path: Path) -> str:
    for folder in path.parents:
        with suppress(OSError):
            return f"{shutil.disk_usage(folder).free:,} bytes are free."
    return ""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling that takes the place of ``path`` if the block succeeds.

    Whoever reads ``path`` finds the old file or the complete new one, also after a
    kill or a loss of power. If the block fails, the temporary file is removed.
    """
    make_folder(path.parent)
    # Of a long name only a part is used: the temporary name must not be too long
    # where the name itself is not.
    temporary = path.with_name(f".{path.name[:32]}.tmp-{new_token()}")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents so that they survive a loss of power."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
        if folder == folder.parent:
            break
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder such that a kill cannot leave half of it under its name."""
    trash = folder.with_name(f".trash-{new_token()}")
    os.rename(folder, trash)
    shutil.rmtree(trash)


def flush(file: IO[Any]) -> None:
    """Bring what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Bring what was written to a file to the disk."""
    # Windows flushes only what is open for writing; elsewhere a read-only file
    # must be flushed too.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder (new, renamed, removed files) to the disk."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems refuse it and order the operations themselves
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
