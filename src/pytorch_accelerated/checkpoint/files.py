"""Single files: written whole or not at all, and read without running code."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import errno
import functools
import io
import os
import pickle
import re
import secrets
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from pytorch_accelerated import compat
from pytorch_accelerated.checkpoint.numpy_values import STAND_INS
from pytorch_accelerated.errors import CheckpointError

_HINTS = {
    errno.ENOSPC: "Free some space or save to another disk.",
    errno.EDQUOT: "The quota is used up: free some space or save to another disk.",
    errno.EROFS: "The file system is read-only: save to another folder.",
    errno.EACCES: "Check the permissions of the folder.",
    errno.EMFILE: "The process has too many open files (ulimit -n).",
    errno.ENOMEM: "The memory of the host, or what may be used of it, is exhausted.",
}
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray),
    *(torch.dtype, torch.device, torch.Size),
)
# torch's safe loader reads no number of more than 255 bytes.
_LARGEST_BITS = 2039

_START_OF_ARCHIVE = b"PK\x03\x04"
_IS_FOLDER = 0x10


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no file or folder of that name.

    Both ``except CheckpointError`` and ``except FileNotFoundError`` catch it.
    """


class NotStorableError(CheckpointError, TypeError):
    """Something could not be loaded from a checkpoint again safely.

    Both ``except CheckpointError`` and ``except TypeError`` catch it.
    """


class OutOfResourcesError(CheckpointError):
    """Something could not be read for a reason that has nothing to do with it."""


# ----------------------------------------------------------------------------- writing


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
    with replaced(path) as file:
        torch.save(storable, file)
    return path


@contextmanager
def replaced(path: Path) -> Iterator[SummedFile]:
    """Give a file to write that takes its place once it is whole, or not at all.

    Raises:
        CheckpointError: If it could not be written.
    """
    # Of a long name only a part is used: the temporary name must not be too long
    # where the name itself is not.
    temporary = path.with_name(f".{path.name[:32]}.tmp-{new_token()}")
    with write_errors_explained(path):
        make_folder(path.parent)
        try:
            with SummedFile(temporary) as file:
                yield file
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


class SummedFile(io.BufferedWriter):
    """A new file that knows the size and checksum of what was written to it.

    Leaving the ``with`` block brings it to the disk. torch is given this instead of a
    name, as it then lets the ``OSError`` of a failed write be found.

    Args:
        path: Where to create it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "xb"))
        self._size = self._crc = 0

    @property
    def entry(self) -> dict[str, Any]:
        """What the manifest of a checkpoint says about the file."""
        return {"size": self._size, "checksum": f"crc32:{self._crc:08x}"}

    def write(self, data: Any) -> int:
        """Write bytes."""
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        return super().write(data)

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        try:
            if kind is None:
                self.flush()
                os.fsync(self.fileno())
        finally:
            super().__exit__(kind, *rest)


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return the path with links and relative parts resolved, as it is now.

    A later change of the working directory then does not move a checkpoint, and a
    link is followed instead of being replaced by a file.
    """
    return Path(os.path.realpath(os.path.expanduser(path)))


def new_token() -> str:
    """Return a part of a name that nobody else uses."""
    return secrets.token_hex(8)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents so that they survive a loss of power."""
    if not folder.is_dir():
        if folder != folder.parent:
            make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:  # Windows cannot open a folder
        return
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems refuse it and order the operations themselves
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def write_errors_explained(path: Path) -> Iterator[None]:
    """Turn the many errors of a failed write into one that names path and cause.

    Raises:
        CheckpointError: For an ``OSError``, for the errors that torch raises instead of
            one, and where memory runs out.
    """
    handled_already = sys.exc_info()[1]
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        _raise_what_interrupted(error, handled_already)
        number = _errno_of(error)
        cause = f"{error}." if number is None else _in_words(number)
        raise CheckpointError(
            f"Could not write {path}: {cause} What was saved before is untouched."
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


def _in_words(number: int) -> str:
    return f"{os.strerror(number)} (errno {number}). {_HINTS.get(number, '')}".strip()


def _errno_of(error: BaseException | None) -> int | None:
    """Find the number of an error that torch or safetensors have made another of."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return errno.ENOMEM
        if found := re.search(r"\((?:os error )?(\d+)\)$", str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None


# ----------------------------------------------------------------------------- reading


def load_file(
    path: str | os.PathLike[str], *, mmap: bool = False, checksums: bool | None = None
) -> Any:
    """Load what :func:`save_file` (or ``torch.save``) wrote, to the CPU.

    Nothing in the file can run code: only tensors, plain values and numpy values of
    numbers are built, and tensors of classes that were registered with
    ``torch.serialization.add_safe_globals``; anything else is refused. So is what would
    take more memory than the size of the file: compressed entries, which ``torch.save``
    does not write, and tensors larger than their memory.

    Args:
        path: The file.
        mmap: Map the file into memory, so that only what is used of it is read.
        checksums: Whether to check the checksums that ``torch.save`` writes; by default
            unless ``mmap`` is asked for.

    Raises:
        CheckpointNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, needs code to be loaded, or if there is
            not enough memory for it.
    """
    path = absolute(path)
    with read_errors_explained(path):
        check_archive(path, checksums=not mmap if checksums is None else checksums)
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        _check_tensors(content, path, set())
    return content


@contextmanager
def read_errors_explained(path: Path) -> Iterator[None]:
    """Turn the errors of a failed read into one that names path and cause.

    A damaged file can make a reader fail in any way it likes.

    Raises:
        CheckpointNotFoundError: If there is no such file.
        OutOfResourcesError: If the process has no memory or open files left.
        CheckpointError: For all others.
    """
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            f"There is no file {path}. Check the path, or save a checkpoint first."
        ) from error
    except IsADirectoryError as error:
        raise CheckpointError(
            f"{path} is a folder. If it is a training state, go on from it with "
            "train(resume_from=...), or load its weights with load_model(...)."
        ) from error
    except pickle.UnpicklingError as error:
        # torch's own message is long and advises to load with weights_only=False; the
        # reason is behind this mark
        reason = str(error).rpartition("WeightsUnpickler error: ")[2]
        raise CheckpointError(
            f"Refused to load {path}: it is damaged or would run code while it is "
            f"loaded ({_first_line(reason)}). "
            "If you trust where it comes from, read it with "
            "torch.load(path, weights_only=False) and save it anew."
        ) from error
    except Exception as error:
        raise_if_out_of_resources(error, f"Could not read {path}, which may be whole")
        raise CheckpointError(
            f"Could not read {path}: it is damaged, incomplete, or of another kind "
            f"({type(error).__name__}: {_first_line(error)}). Load another checkpoint."
        ) from error


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def raise_if_out_of_resources(error: BaseException, what: str) -> None:
    """Tell a process without memory or open files left from a damaged file.

    Args:
        error: What was raised.
        what: In words, what could not be done.

    Raises:
        OutOfResourcesError: If that is the reason for the error.
    """
    number = _errno_of(error)
    if number in _OUT_OF_RESOURCES:
        raise OutOfResourcesError(f"{what}: {_in_words(number)}") from error


def list_folder(folder: Path) -> list[Path]:
    """Return what is in a folder, by name; nothing if there is none.

    Raises:
        CheckpointError: If it cannot be looked at.
    """
    with read_errors_explained(folder):
        return sorted(folder.iterdir()) if folder.is_dir() else []


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
        claimed = sum(entry.file_size for entry in entries)
        # An archive in an archive could have another table of contents for torch.
        starts = [entry.header_offset for entry in entries]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            reason = "is compressed, which torch.save never does, and might fill memory"
        elif claimed > path.stat().st_size or min(starts, default=0) > 0:
            reason = f"claims {claimed:,} bytes, more bytes than it has"
        # torch reads nothing of a folder, and takes what is in the memory for it.
        elif any(each.is_dir() or each.external_attr & _IS_FOLDER for each in entries):
            reason = "is damaged: a part of it is a folder"
        # torch can be told to leave checksums out, and writes zeros then.
        elif (
            checksums
            and any(entry.CRC for entry in entries)
            and (damaged := archive.testzip()) is not None
        ):
            reason = f"is damaged: {damaged} in it does not match its checksum"
        else:
            return
    raise CheckpointError(f"Refused to load {path}: it {reason}.")


def _check_tensors(value: Any, path: Path, seen: set[int]) -> None:
    """Refuse a tensor that shows the same few bytes as gigabytes of elements."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or compat.wraps_tensors(value):
            return
        claimed = value.numel() * value.element_size()
        held = 0 if value.is_meta else value.untyped_storage().nbytes()
        if claimed > held and not value.is_quantized:
            raise CheckpointError(
                f"Refused to load {path}: a tensor in it claims {claimed:,} bytes and "
                f"has {held:,}. If you trust where it comes from, read it with "
                "torch.load and save a clone() of the tensor."
            )
    elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
        seen.add(id(value))
        values = value.values() if isinstance(value, dict) else ()
        for member in (*value, *values):
            _check_tensors(member, path, seen)


# ------------------------------------------------------------------ what can be stored


def to_storable(obj: Any, what: str = "value", *, copy: bool = False) -> Any:
    """Convert nested values into tensors on the CPU and plain Python values.

    The result can be saved and loaded with ``torch.load(..., weights_only=True)``.

    ============================================ =======================================
    from                                         to
    ============================================ =======================================
    tensor, parameter                            tensor on the CPU (tied ones stay
                                                 tied)
    numpy number / array                         Python number / tensor (strings: list)
    ``Path``                                     ``str``
    ``datetime``, ``date``, ``time``             ISO 8601 text
    ``timedelta``                                seconds
    ``Enum``                                     its value
    dataclass                                    ``dict`` of its fields
    ``frozenset``                                ``set``
    named tuple                                  ``tuple``
    any other mapping                            ``dict`` (an ``OrderedDict`` stays one)
    ============================================ =======================================

    Args:
        obj: What to convert; it is not changed.
        what: What ``obj`` is called in an error message, e.g. ``"checkpoint_kwargs"``.
        copy: Copy tensors that are on the CPU already, so that the result is a
            snapshot that training does not change (needed for writing in the
            background).

    Raises:
        NotStorableError: A TypeError, for anything else; the message names the key and
            the type.
    """
    return _Converter(copy).convert_all(obj, what)


def check_storable(obj: Any, what: str) -> None:
    """Find out whether :func:`to_storable` would convert something, at little cost.

    Sharded tensors pass: they are put together before they are stored.

    Args:
        obj: What is to be stored.
        what: What it is called in an error message.

    Raises:
        NotStorableError: If it cannot be; the message names the key and the type.
    """
    _Checker(copy=False).convert_all(obj, what)


class _Converter:
    """Converts one structure; remembers tensors, so that tied ones stay tied."""

    def __init__(self, copy: bool) -> None:
        self._copy = copy
        self._known: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def convert_all(self, value: Any, what: str) -> Any:
        try:
            return self.convert(value, what)
        except RecursionError:
            raise NotStorableError(
                f"{what} contains itself, or is nested too deeply to be stored. Store "
                "something flatter."
            ) from None

    def convert(self, value: Any, what: str) -> Any:
        if type(value) in _PLAIN:
            if type(value) is int and value.bit_length() > _LARGEST_BITS:
                raise NotStorableError(
                    f"{what} is a number of {value.bit_length()} bits; up to "
                    f"{_LARGEST_BITS} can be loaded again. Store it as text."
                )
            return value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value)]
            return self._mapping({name: getattr(value, name) for name in names}, what)
        match value:
            case torch.Tensor():
                return self._tensor(value, what)
            case enum.Enum():
                return self.convert(value.value, what)
            case np.ndarray():
                return self._array(value, what)
            case np.generic() if not isinstance(value, np.longdouble | np.clongdouble):
                return self.convert(value.item(), what)
            case PurePath():
                return os.fspath(value)
            case datetime.timedelta():
                return value.total_seconds()
            case datetime.date() | datetime.time():
                return value.isoformat()
            case Mapping():
                return self._mapping(value, what)
            case tuple():
                return tuple(self._items(value, what))
            case list():
                return self._items(value, what)
            case set() | frozenset():
                return {self.convert(each, f"{what} item {each!r}") for each in value}
            # subclasses, such as a str with methods
            case int():
                return self.convert(int(value), what)
            case float():
                return float(value)
            case str():
                return str.__str__(value)
        raise NotStorableError(
            f"{what} is a {type(value).__module__}.{type(value).__qualname__}, which "
            "cannot be stored in a checkpoint: loading it would mean running code from "
            "the file. Store a tensor, a number, a str, or a list or dict of these "
            "instead (for an object: its state_dict() or vars())."
        )

    def _items(self, values: Any, what: str) -> list[Any]:
        return [self.convert(item, f"{what}[{i}]") for i, item in enumerate(values)]

    def _mapping(self, mapping: Mapping[Any, Any], what: str) -> dict[Any, Any]:
        kinds = (kind for kind in (OrderedDict, Counter) if isinstance(mapping, kind))
        converted: dict[Any, Any] = next(kinds, dict)()
        for key, value in mapping.items():
            where = f"{what}[{key!r}]"
            new_key = self.convert(key, f"the key {key!r} of {what}")
            if new_key in converted:
                raise NotStorableError(f"{where}: two keys are stored as {new_key!r}.")
            converted[new_key] = self.convert(value, where)
        # the versions of a model's modules, which torch hangs on its state dicts
        versions = compat.versions_in(mapping)
        if versions is not None and isinstance(converted, OrderedDict):
            versions = self.convert(versions, f"{what}._metadata")
            compat.set_versions(converted, versions)
        return converted

    def _array(self, array: np.ndarray[Any, Any], what: str) -> Any:
        native = array.astype(array.dtype.newbyteorder("="), order="C")
        try:
            return torch.from_numpy(native)
        except TypeError:  # text, dates and objects have no tensor
            return self.convert(array.tolist(), what)

    def _tensor(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        _refuse_if_unloadable(tensor, what)
        if compat.wraps_tensors(tensor):
            return self._wrapper(tensor, what)
        tensor = tensor.detach()
        if tensor.layout is not torch.strided or tensor.is_nested:
            return tensor.to("cpu", copy=self._copy)
        tensor = tensor.as_subclass(torch.Tensor).resolve_conj().resolve_neg()
        # Those without elements may be at one place, and are not tied.
        address = tensor.data_ptr() if tensor.numel() else id(tensor)
        place = (address, tensor.dtype, tensor.shape, tensor.stride())
        if place not in self._known:
            # Beside the tensor itself, so that nothing else comes to its place.
            self._known[place] = tensor, self._on_host(tensor)
        return self._known[place][1]

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        # Of a view, only what it shows is kept.
        is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
        copy = self._copy or (is_view and not tensor.is_quantized)
        return tensor.to("cpu", copy=copy)

    def _wrapper(self, tensor: Any, what: str) -> torch.Tensor:
        """Convert a tensor that is made of others, such as a quantized one."""
        names, context = tensor.__tensor_flatten__()
        inner = {n: self.convert(getattr(tensor, n), f"{what}.{n}") for n in names}
        plain: torch.Tensor = type(tensor).__tensor_unflatten__(
            inner, context, tensor.size(), tensor.stride()
        )
        return plain


class _Checker(_Converter):
    """Finds what cannot be stored, and copies no tensor for it."""

    def _tensor(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        if not hasattr(tensor, "full_tensor"):  # a sharded one is put together later
            _refuse_if_unloadable(tensor, what)
        return tensor


def _refuse_if_unloadable(tensor: torch.Tensor, what: str) -> None:
    kind = type(tensor)
    if is_lazy(tensor):
        reason = (
            "a parameter of a lazy module, which has no shape yet. Let the model see a "
            "batch first"
        )
    elif compat.wraps_tensors(tensor):
        is_sharded = hasattr(tensor, "full_tensor")
        if kind in torch.serialization.get_safe_globals() and not is_sharded:
            return
        reason = (
            f"a {kind.__qualname__}, which cannot be stored as it is. Store a plain "
            "tensor: full_tensor() of a sharded one, dequantize() of a quantized one. "
            "Or, if you trust its code, let torch load such tensors with "
            f"torch.serialization.add_safe_globals([{kind.__qualname__}])"
        )
    else:
        has_data = not (tensor.is_meta or tensor.is_mkldnn)
        if has_data and (tensor.is_quantized or _can_be_saved(tensor.dtype)):
            return
        reason = (
            f"a tensor of {tensor.dtype} with the layout {tensor.layout} on the device "
            f"{tensor.device}, which torch cannot save. Store one that has its data on "
            "the CPU: to_dense(), or its bytes: view(torch.uint8)"
        )
    raise NotStorableError(f"{what} is {reason}.")


@functools.cache
def _can_be_saved(dtype: torch.dtype) -> bool:
    try:
        torch.save(torch.empty(0, dtype=dtype), io.BytesIO())
    except KeyError:
        return False
    return True
