"""Checkpoint folders: written whole or not at all, and verified when they are read."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from pytorch_accelerated import compat
from pytorch_accelerated.checkpoint.files import (
    CheckpointNotFoundError,
    NotStorableError,
    SummedFile,
    absolute,
    list_folder,
    load_file,
    make_folder,
    new_token,
    read_errors_explained,
    replaced,
    sync,
    to_storable,
    write_errors_explained,
)
from pytorch_accelerated.errors import CheckpointError, warn

MANIFEST_NAME = "manifest.json"
SAFETENSORS_NAME = "model.safetensors"
TORCH_NAME = "pytorch_model.bin"
# What is left by a writer that was killed.
LEFTOVER = re.compile(
    r"(?:(?P<name>.+)\.(?P<kind>tmp|old)|\.trash)-[0-9a-f]{16}", re.DOTALL
)

_FORMAT = "pytorch-accelerated checkpoint"
_FORMAT_VERSION = 1
_CHUNK_BYTES = 1 << 20

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
# Texts in the header of a safetensors file, which no weight may be named like.
_VERSIONS_KEY = "_metadata"
_RESERVED_NAMES = {"format", _VERSIONS_KEY, "_checksum", "__metadata__"}

# What DistributedDataParallel, torch.compile and activation checkpointing add to names.
_INNER = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")
_WRAPPERS = re.compile(rf"^(module\.)+|{_INNER.pattern}")


class NoCheckpointError(CheckpointError):
    """The folder belongs to another program; nothing is wrong with it."""


# ----------------------------------------------------------------------------- writing


class CheckpointWriter:
    """Writes one checkpoint folder: whole or absent, whatever happens meanwhile.

    The files go into a temporary folder beside the final one; ``commit`` flushes them
    to disk, writes the manifest with their checksums last, and gives the folder its
    final name. A checkpoint of that name is replaced only then::

        with CheckpointWriter("checkpoints/step_100") as writer:
            writer.write_weights(model.state_dict())
            writer.write("optimizer.pt", optimizer.state_dict())
            writer.commit({"num_updates": 100, "epoch": 2})

    Leaving the ``with`` block without ``commit`` removes the temporary folder.

    Args:
        path: The final folder. Missing parents are created.

    Attributes:
        folder: The temporary folder; files may also be put into it by other means.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = absolute(path)
        self.folder: Path = _sibling(self.path, "tmp")
        self._entries: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> CheckpointWriter:
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
        with write_errors_explained(self.path):
            make_folder(self.path.parent)
            self.folder.mkdir()
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, name: str, obj: Any) -> None:
        """Write one file that :meth:`Checkpoint.load` reads.

        Args:
            name: Name of the file, or relative path with forward slashes.
            obj: What to write; see :func:`to_storable`.

        Raises:
            TypeError: If ``obj`` holds something that could not be loaded safely.
            CheckpointError: If the file could not be written.
        """
        storable = to_storable(obj, name)
        with self._new_file(name) as file:
            torch.save(storable, file)

    def write_weights(self, state_dict: Mapping[str, Any]) -> None:
        """Write the weights of a model, as ``model.safetensors``.

        Tied weights are stored once and are tied again when they are loaded. What the
        safetensors format cannot hold (values that are not tensors, such as the extra
        state of a module, and rare dtypes) goes into ``pytorch_model.bin`` instead, in
        torch's format, which is loaded as safely. So does everything in a folder whose
        name is not UTF-8, which safetensors cannot open.

        Args:
            state_dict: What ``model.state_dict()`` returns.

        Raises:
            TypeError: If a value could not be loaded safely again.
            CheckpointError: If the file could not be written.
        """
        state = to_storable(state_dict, "state_dict")
        # safetensors opens no file whose name is no text.
        is_text = str(self.path).encode(errors="ignore") == os.fsencode(self.path)
        if is_text and all(map(_can_hold, state.items())):
            with self._new_file(SAFETENSORS_NAME) as file:
                _write_safetensors(state, file)
        else:
            self.write(TORCH_NAME, state)

    @contextmanager
    def _new_file(self, name: str) -> Iterator[SummedFile]:
        path = self.folder / name
        with write_errors_explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with SummedFile(path) as file:
                yield file
        self._entries[name] = file.entry

    def commit(self, progress: Mapping[str, Any], world_size: int = 1) -> Checkpoint:
        """Make the checkpoint complete and give it its name.

        Args:
            progress: How far the run was, in what JSON can hold. ``run_number`` and
                ``num_updates`` order checkpoints; ``metrics`` is a mapping from name
                to number.
            world_size: Number of processes of the run.

        Raises:
            CheckpointError: If it failed; what was there before is untouched.
        """
        with write_errors_explained(self.path):
            self._take_in_other_files()
            manifest = {
                "format": _FORMAT,
                "format_version": _FORMAT_VERSION,
                "library_version": _library_version(),
                "torch_version": str(torch.__version__),
                "saved_at": datetime.datetime.now(datetime.timezone.utc).isoformat(),
                "world_size": world_size,
                "progress": json.loads(json.dumps(dict(progress), default=float)),
                "files": dict(sorted(self._entries.items())),
            }
            manifest["checksum"] = _checksum_of(manifest)
            with SummedFile(self.folder / MANIFEST_NAME) as file:
                file.write(json.dumps(manifest, indent=1).encode())
            sync(self.folder)
            self._publish()
        return Checkpoint(self.path)

    def _take_in_other_files(self) -> None:
        """Flush folders and what was written by other means, and measure the latter."""
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if name not in self._entries:
                sync(path)
                if path.is_file():
                    self._entries[name] = {
                        "size": path.stat().st_size,
                        "checksum": calculate_checksum(path),
                    }

    def _publish(self) -> None:
        old = _sibling(self.path, "old") if self.path.is_dir() else None
        if old is not None:
            # A folder cannot be replaced in one operation. Until the next one is done,
            # the old checkpoint has a name under which it is found as well.
            os.rename(self.path, old)
        os.rename(self.folder, self.path)
        sync(self.path.parent)
        if old is not None:
            retire(old, self.path)


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}-{new_token()}")


def _library_version() -> str:
    # looked up, because the tools do not import the package that imports them
    package = sys.modules[__name__.partition(".")[0]]
    return str(getattr(package, "__version__", "unknown"))


def retire(old: Path, new: Path) -> None:
    """Remove a replaced folder, but move files that are not the library's to the new.

    Failing is no reason to stop a run: the new checkpoint is complete.
    """
    try:
        ours = {MANIFEST_NAME}
        with suppress(CheckpointError):
            ours |= {name.split("/")[0] for name in Checkpoint(old).files}
        for entry in list(old.iterdir()):
            if entry.name not in ours and not (new / entry.name).exists():
                os.rename(entry, new / entry.name)
        remove_folder(old)
    except OSError as error:
        warn(
            f"{new} is complete, but what it replaces could not be removed from {old} "
            f"({error})."
        )


def remove_folder(folder: Path) -> None:
    """Remove a folder such that a kill cannot leave half of it under its name."""
    trash = folder.with_name(f".trash-{new_token()}")
    os.rename(folder, trash)
    shutil.rmtree(trash)


class BackgroundWriter:
    """Runs one write at a time on a thread of its own.

    An error is kept, and raised by the next :meth:`start` or :meth:`wait`. Python does
    not exit before a write has ended.
    """

    def __init__(self) -> None:
        self._write: futures.Future[object] | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Run a write in the background, once the one before has ended.

        Args:
            write: What to run. It must not use anything that the caller changes.

        Raises:
            Exception: What the write before has raised; then this one is not started.
        """
        self.wait()
        thread = futures.ThreadPoolExecutor(1, "checkpoint writer")
        try:
            self._write = thread.submit(write)
        except RuntimeError:  # no thread can be started: the caller waits
            write()
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Wait for the write to end, if there is one.

        Raises:
            Exception: What it has raised.
        """
        if self._write is not None:
            futures.wait([self._write])
            write, self._write = self._write, None
            write.result()


# ----------------------------------------------------------------------------- reading


class Checkpoint:
    """A checkpoint folder that ``CheckpointWriter`` wrote.

    Creating one reads nothing. Its manifest is read when it is first needed, and all
    files are verified once, before the first is loaded::

        checkpoint = Checkpoint("checkpoints/step_100")
        model.load_state_dict(checkpoint.load_weights())

    Args:
        path: The folder. If a kill interrupted its replacement, the checkpoint that was
            about to be replaced is found under this name too.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = _set_aside(absolute(path))
        self._is_verified = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @cached_property
    def manifest(self) -> Any:
        """The content of the manifest.

        Raises:
            CheckpointError: If there is none, or if it is damaged or of a newer
                version.
        """
        return _read_manifest(self.path)

    @property
    def progress(self) -> dict[str, Any]:
        """What was given to ``commit``, such as ``num_updates`` and ``metrics``."""
        progress: dict[str, Any] = self.manifest["progress"]
        return progress

    @property
    def num_updates(self) -> int:
        """Number of updates before it was saved; -1 if that was not recorded."""
        return int(self.progress.get("num_updates", -1))

    @property
    def run_number(self) -> int:
        """Number of the run that wrote it, among those that wrote to its directory.

        A run that was started, or resumed, later has a greater one; 0 if that was not
        recorded.
        """
        return int(self.progress.get("run_number", 0))

    @property
    def run_id(self) -> str | None:
        """What tells the run that wrote it from others; None if not recorded.

        A run that is resumed, and further runs of one trainer, have the same.
        """
        return self.progress.get("run_id")

    @property
    def saved_by(self) -> list[str]:
        """The identities of the callbacks of its run that saved it, if any did."""
        return list(self.progress.get("saved_by", ()))

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics at the time, as given to ``CheckpointWriter.commit``."""
        return dict(self.progress.get("metrics", {}))

    @property
    def files(self) -> list[str]:
        """Names of its files, relative, without the manifest."""
        return list(self.manifest["files"])

    def verify(self) -> None:
        """Check, once, that every file is as it was written.

        Raises:
            CheckpointError: If one is not, with the name of the file and the reason; or
                if that cannot be said, because the process has no memory or open files
                left.
        """
        for name, entry in () if self._is_verified else self.manifest["files"].items():
            with read_errors_explained(self.path / name):
                if (reason := _damage_of(self.path, name, entry)) is not None:
                    raise CheckpointError(
                        f"{self.path}/{name} {reason}. The checkpoint is damaged: load "
                        "another one."
                    )
        self._is_verified = True

    def load(self, name: str) -> Any:
        """Load a file that ``CheckpointWriter.write`` wrote, to the CPU."""
        return load_file(self._verified(name), checksums=False)

    def load_weights(self) -> OrderedDict[str, Any]:
        """Load what ``CheckpointWriter.write_weights`` wrote, to the CPU."""
        name = SAFETENSORS_NAME if SAFETENSORS_NAME in self.files else TORCH_NAME
        return read_weights(self._verified(name), checksums=False)

    def _verified(self, name: str) -> Path:
        if name not in self.files:
            raise CheckpointNotFoundError(
                f"The checkpoint {self.path} has no file {name!r}; it has "
                f"{', '.join(self.files) or 'none'}."
            )
        self.verify()
        return self.path / name


def _set_aside(path: Path) -> Path:
    """Find the checkpoint of a name whose replacement was interrupted."""
    for entry in () if path.exists() else list_folder(path.parent):
        found = LEFTOVER.fullmatch(entry.name)
        if found and found["kind"] == "old" and found["name"] == path.name:
            return entry
    return path


def _read_manifest(folder: Path) -> Any:
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"There is no checkpoint folder {folder}.")
    if not os.path.lexists(path):
        names = sorted(each.parent.name for each in folder.glob(f"*/{MANIFEST_NAME}"))
        within = f" But it holds some: give one of {', '.join(names)}." if names else ""
        has_weights = any((folder / n).exists() for n in (SAFETENSORS_NAME, TORCH_NAME))
        raise (CheckpointError if has_weights else NoCheckpointError)(
            f"{folder} is not a complete checkpoint: it has no {MANIFEST_NAME}, which "
            f"is written last (version 0.1.61 wrote none).{within}"
        )
    with read_errors_explained(path):
        if path.is_symlink() or not path.is_file():
            raise ValueError("it is a link, or no plain file")
        manifest = json.loads(path.read_bytes())
        if manifest.get("format") != _FORMAT and "format_version" not in manifest:
            raise NoCheckpointError(
                f"{folder} is not a checkpoint: its {MANIFEST_NAME} is of another "
                "program."
            )
        if manifest["format_version"] > _FORMAT_VERSION:
            raise CheckpointError(
                f"{path} was written by a newer version (format "
                f"{manifest['format_version']}, this version reads up to "
                f"{_FORMAT_VERSION}). Update pytorch-accelerated to load it."
            )
        if manifest["checksum"] != _checksum_of(manifest):
            raise ValueError("it does not match its checksum")
        for part in ("files", "progress"):
            manifest[part] = dict(manifest[part])
    return manifest


def _checksum_of(manifest: Mapping[str, Any]) -> str:
    """Return the checksum of all but the checksum, whatever the white space."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"crc32:{zlib.crc32(text.encode()):08x}"


def _damage_of(folder: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    path = folder / name
    if path.resolve() != path or folder not in path.parents:
        return "is a link or leads out of the checkpoint"
    if not path.is_file():
        return "is no plain file" if path.exists() else "is missing"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"has {size:,} bytes instead of {entry['size']:,}"
    if calculate_checksum(path) != entry["checksum"]:
        return f"does not match its {entry['checksum'].partition(':')[0]} checksum"
    return None


def calculate_checksum(path: Path) -> str:
    """Return the checksum of a file as the manifest has it."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return f"crc32:{value:08x}"


# ----------------------------------------------------------------------------- weights


def _can_hold(item: tuple[str, Any]) -> bool:
    """Say whether a safetensors file can hold a weight."""
    name, value = item
    return (
        type(value) is torch.Tensor
        and value.layout is torch.strided
        and value.dtype in _DTYPES
        and name not in _RESERVED_NAMES
    )


def _write_safetensors(state: Mapping[str, torch.Tensor], file: SummedFile) -> None:
    """Write weights in the format of https://github.com/huggingface/safetensors.

    A name that is left out because its tensor is there under another name is put into
    the header with that name, as safetensors' own ``save_model`` does.
    """
    texts = {"format": "pt"}
    names: dict[torch.Tensor, str] = {}
    for name, tensor in state.items():
        if tensor in names:
            texts[name] = names[tensor]
        else:
            names[tensor] = name
    versions = compat.versions_in(state)
    if versions is not None:
        texts[_VERSIONS_KEY] = json.dumps(versions)
    header: dict[str, Any] = {"__metadata__": texts}
    end = 0
    # The largest kind of number first: each then lies at a multiple of its size.
    ordered = sorted(names, key=lambda tensor: -tensor.element_size())
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[names[tensor]] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in ordered:
        file.write(tensor.reshape(-1).view(torch.uint8).numpy())


def save_weights(state_dict: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Save the weights of a model to one file of safetensors, whole or not at all.

    Tied weights are stored once.

    Args:
        state_dict: What ``model.state_dict()`` returned.
        path: Where to save them.

    Returns:
        The absolute path of the file.

    Raises:
        NotStorableError: If safetensors cannot hold one of them; the message names it.
        CheckpointError: If the file could not be written.
    """
    path = absolute(path)
    state = to_storable(state_dict, path.name)
    for name, value in state.items():
        if not _can_hold((name, value)):
            raise NotStorableError(
                f"A file of safetensors cannot hold {name}, which is "
                f"{getattr(value, 'dtype', type(value).__name__)}. Save to a name that "
                "ends in .pt."
            )
    with replaced(path) as file:
        _write_safetensors(state, file)
    return path


def read_weights(path: Path, *, checksums: bool = True) -> OrderedDict[str, Any]:
    """Load weights that this library, Accelerate or transformers has written.

    Weights that were tied are tied again; other writers leave all but one name of tied
    weights out.

    Args:
        path: A file of safetensors or ``torch.save``.
        checksums: Whether the checksums of the latter are checked.

    Raises:
        CheckpointNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, or needs code to be loaded.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    state = load_file(path, checksums=checksums)
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__} instead of a state dict. Load "
            "another checkpoint."
        )
    return OrderedDict(state)


def _read_safetensors(path: Path) -> OrderedDict[str, Any]:
    with read_errors_explained(path):
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            texts = file.metadata() or {}
            state = OrderedDict((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (not a mapping)
        for name, first_name in texts.items():
            if name not in _RESERVED_NAMES and first_name in state:
                state[name] = state[first_name]
        if _VERSIONS_KEY in texts:
            versions = OrderedDict(json.loads(texts[_VERSIONS_KEY]))
            if not all(isinstance(each, dict) for each in versions.values()):
                raise ValueError("the versions of the modules in it are none")
            compat.set_versions(state, versions)
    return state


def fit_to_model(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    source: str | os.PathLike[str] = "The state dict",
) -> Mapping[str, Any]:
    """Return a state dict with the names that the model uses for its weights.

    ``DistributedDataParallel`` puts ``module.`` before each name, ``torch.compile``
    puts ``_orig_mod.`` in them; they are removed or added as the model needs. Names of
    tied weights that the file leaves out are added where the model ties them.

    Args:
        model: The model that is to load it.
        state_dict: What a model's ``state_dict()`` returned.
        source: What it is called in an error message.

    Raises:
        CheckpointError: If it does not fit the model. The first few weights that are
            missing, unexpected or of another shape are named.
    """
    expected = model.state_dict()
    given = state_dict
    if given.keys() != expected.keys():
        given = _renamed(model, state_dict, expected)
    other_shapes = [
        f"{name} is {tuple(given[name].shape)} in the checkpoint and "
        f"{tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if isinstance(tensor, torch.Tensor)
        and not nn.parameter.is_lazy(tensor)
        and isinstance(given.get(name), torch.Tensor)
        and given[name].shape != tensor.shape
    ]
    reasons = {
        "missing in the checkpoint": [name for name in expected if name not in given],
        "not in the model": [name for name in given if name not in expected],
        "of another shape": other_shapes,
    }
    if any(reasons.values()):
        mismatch = "; ".join(_first_few(*each) for each in reasons.items() if each[1])
        raise CheckpointError(f"{source} does not fit the model: {mismatch}")
    return given


def _renamed(
    model: nn.Module, state_dict: Mapping[str, Any], expected: Iterable[str]
) -> Mapping[str, Any]:
    names = {_plain(name): name for name in expected}
    renamed = OrderedDict((names.get(_plain(k), k), v) for k, v in state_dict.items())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {id(parameters[k]): v for k, v in renamed.items() if k in parameters}
    for name, parameter in parameters.items():
        if id(parameter) in tied:
            renamed.setdefault(name, tied[id(parameter)])
    versions = compat.versions_in(state_dict)
    if versions is not None:
        modules = {_plain(f"{name}."): name for name, _ in model.named_modules()}
        by_name = ((modules.get(_plain(f"{k}."), k), v) for k, v in versions.items())
        compat.set_versions(renamed, OrderedDict(by_name))
    return renamed


def without_wrappers(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state dict with the names that its weights have in plain modules."""
    plain = OrderedDict((_INNER.sub("", k), v) for k, v in state_dict.items())
    return state_dict if plain.keys() == state_dict.keys() else plain


def _plain(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _first_few(what: str, items: list[str], limit: int = 3) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{what}: {', '.join(items[:limit])}{more}"
