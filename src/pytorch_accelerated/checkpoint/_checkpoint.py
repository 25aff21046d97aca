"""Reads, verifies, compares and deletes checkpoint folders."""

from __future__ import annotations

import math
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pytorch_accelerated.checkpoint._disk import (
    LEFTOVER,
    OutOfResourcesError,
    absolute,
    list_folder,
    remove_folder,
)
from pytorch_accelerated.checkpoint._files import CheckpointNotFoundError, read_file
from pytorch_accelerated.checkpoint._manifest import (
    MANIFEST_NAME,
    ForeignManifestError,
    find_damage,
    read_manifest,
)
from pytorch_accelerated.checkpoint._weights import (
    SAFETENSORS_NAME,
    TORCH_NAME,
    read_weights,
)
from pytorch_accelerated.errors import CheckpointError, warn


class Checkpoint:
    """A checkpoint folder that ``CheckpointWriter`` wrote.

    Creating one reads nothing; the manifest is read when it is first needed. Verify
    before loading::

        checkpoint = Checkpoint("checkpoints/step_100")
        checkpoint.verify()
        model.load_state_dict(checkpoint.load_weights())

    Args:
        path: The folder. If a kill interrupted its replacement, the checkpoint that was
            about to be replaced is found under this name too.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = _set_aside(absolute(path))
        # set once every checksum was right, so that prune need not look again
        self.is_known_whole: bool = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """The content of the manifest.

        Raises:
            CheckpointError: If there is none, or if it is damaged, of a newer version,
                or names files outside of the folder.
        """
        return read_manifest(self.path)

    @property
    def progress(self) -> Mapping[str, Any]:
        """What was given to ``commit``, such as ``num_updates`` and ``metrics``."""
        progress: Mapping[str, Any] = self.manifest["progress"]
        return progress

    @property
    def num_updates(self) -> int:
        """Number of updates before it was saved; -1 if that was not recorded."""
        number = self.progress.get("num_updates")
        return number if isinstance(number, int) else -1

    @property
    def run_number(self) -> int:
        """Number of the run that wrote it, among those that wrote to its directory.

        A run that was started, or resumed, later has a greater one; 0 if that was not
        recorded.
        """
        number = self.progress.get("run_number")
        return number if isinstance(number, int) else 0

    @property
    def run_id(self) -> str | None:
        """What tells the run that wrote it from others; None if not recorded.

        A run that is resumed, and further runs of one trainer, have the same.
        """
        run_id = self.progress.get("run_id")
        return run_id if isinstance(run_id, str) else None

    @property
    def saved_by(self) -> list[str]:
        """The identities of the callbacks of its run that saved it, if any did."""
        saved_by = self.progress.get("saved_by")
        return saved_by if isinstance(saved_by, list) else []

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics at the time, as given to ``CheckpointWriter.commit``.

        What is no number, or a larger one than a float can be, is left out.
        """
        metrics = self.progress.get("metrics")
        return {
            name: value
            for name, value in (metrics.items() if isinstance(metrics, dict) else ())
            if isinstance(value, float)
            or (isinstance(value, int) and abs(value) <= sys.float_info.max)
        }

    @property
    def world_size(self) -> int:
        """Number of processes that wrote it."""
        world_size: int = self.manifest["world_size"]
        return world_size

    @property
    def files(self) -> list[str]:
        """Names of its files, relative, without the manifest."""
        return list(self.manifest["files"])

    @property
    def num_bytes(self) -> int:
        """Size of its files in bytes."""
        return sum(entry["size"] for entry in self.manifest["files"].values())

    def why_broken(self, *, checksums: bool = True) -> str | None:
        """Say what is wrong with the checkpoint; None if it is whole.

        Args:
            checksums: Read every file and compare its checksum. False only compares
                sizes, which takes no time and misses changed bytes.

        Raises:
            CheckpointError: If that cannot be said, because the process has no memory
                or open files left.
        """
        try:
            damage = find_damage(self.path, self.manifest, checksums=checksums)
        except OutOfResourcesError:
            raise
        except CheckpointError as error:
            return str(error)
        self.is_known_whole = damage is None and (checksums or self.is_known_whole)
        return damage

    def is_whole(self) -> bool:
        """Say whether every file is as it was written."""
        return self.why_broken() is None

    def verify(self) -> None:
        """Check that every file is as it was written.

        Raises:
            CheckpointError: If one is not; the message names the file and the reason.
        """
        _ = self.manifest  # raises its own kind of error
        if (reason := self.why_broken()) is not None:
            raise CheckpointError(
                f"The checkpoint {self.path} is damaged: {reason}. Load another one."
            )

    def has(self, name: str) -> bool:
        """Say whether the checkpoint holds a file of this name."""
        return name in self.manifest["files"]

    def file(self, name: str) -> Path:
        """Return the path of one of its files.

        Raises:
            CheckpointNotFoundError: If the manifest does not list it.
        """
        if not self.has(name):
            raise CheckpointNotFoundError(
                f"The checkpoint {self.path} has no file {name!r}; it has "
                f"{', '.join(self.files) or 'none'}."
            )
        path = self.path / name
        if path.resolve() != path:
            raise CheckpointError(
                f"{path} is a link, which a checkpoint never holds. Do not load it."
            )
        return path

    def load(self, name: str) -> Any:
        """Load a file that ``CheckpointWriter.write`` wrote; see :func:`load_file`."""
        return read_file(self.file(name), checksums=not self.is_known_whole)

    def load_weights(self, subfolder: str = "") -> OrderedDict[str, Any]:
        """Load what ``CheckpointWriter.write_weights`` wrote, to the CPU."""
        prefix = f"{subfolder}/" if subfolder else ""
        is_safetensors = self.has(prefix + SAFETENSORS_NAME)
        name = prefix + (SAFETENSORS_NAME if is_safetensors else TORCH_NAME)
        return read_weights(self.file(name), checksums=not self.is_known_whole)


def _set_aside(path: Path) -> Path:
    """Find the checkpoint of a name whose replacement was interrupted."""
    if path.exists() or not path.parent.is_dir():
        return path
    for entry in sorted(path.parent.iterdir()):
        found = LEFTOVER.fullmatch(entry.name)
        if found and found["kind"] == "old" and found["name"] == path.name:
            return entry
    return path


def scan(
    directory: str | os.PathLike[str],
) -> tuple[list[Checkpoint], list[tuple[Path, str]]]:
    """Return the checkpoints of a directory, oldest first, and what is unreadable.

    Of the second kind are folders with a damaged manifest, and folders with weights
    but without a manifest. Everything else in the directory is ignored.
    """
    directory = absolute(directory)
    checkpoints, unreadable = [], []
    for folder in list_folder(directory):
        if not _may_be_checkpoint(folder):
            continue
        checkpoint = Checkpoint(folder)
        try:
            _ = checkpoint.manifest
        except ForeignManifestError as error:
            if not (folder / MANIFEST_NAME).exists() and _has_weights(folder):
                unreadable.append((folder, str(error)))
        except OutOfResourcesError:
            raise
        except CheckpointError as error:
            unreadable.append((folder, str(error)))
        else:
            checkpoints.append(checkpoint)
    return sorted(checkpoints, key=_order), unreadable


def _may_be_checkpoint(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    found = LEFTOVER.fullmatch(folder.name)
    if found is None:
        return True
    return found["kind"] == "old" and not folder.with_name(found["name"]).exists()


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in (SAFETENSORS_NAME, TORCH_NAME))


def _order(checkpoint: Checkpoint) -> tuple[int, int, float, str]:
    epoch = checkpoint.progress.get("epoch")
    epoch = epoch if isinstance(epoch, int | float) else -1
    name = checkpoint.path.name
    return checkpoint.run_number, checkpoint.num_updates, epoch, name


def list_checkpoints(directory: str | os.PathLike[str]) -> list[Checkpoint]:
    """List the checkpoints of a directory, in order of run and ``num_updates``.

    Only those whose manifest can be read; their files are not verified. The time when
    a file was written plays no part: clocks jump and copies get new times.

    Args:
        directory: Where checkpoints are kept; it need not exist.
    """
    return scan(directory)[0]


def newest(
    directory: str | os.PathLike[str], *more: str | os.PathLike[str]
) -> Checkpoint | None:
    """Return the whole checkpoint with the most updates; None if there is none.

    If several runs wrote to the directory, it is one of the run that started last.
    For every broken one that might be newer a warning names the file and the reason.

    Args:
        directory: Where checkpoints are kept.
        more: Other such directories; the newest of all is returned.
    """
    found: list[Checkpoint] = []
    for each in (directory, *more):
        checkpoints, unreadable = scan(each)
        found += checkpoints
        for folder, reason in unreadable:
            _warn_passed_over(folder, reason)
    return _first_whole(sorted(found, key=_order, reverse=True))


def best(
    directory: str | os.PathLike[str], metric: str, greater_is_better: bool = False
) -> Checkpoint | None:
    """Return the whole checkpoint with the best metric; None if there is none.

    Among equals the oldest wins. One without the metric, or where it is not finite, is
    never the best. For every broken one that would be better a warning names the file
    and the reason.

    Raises:
        KeyError: If there are checkpoints but none of them has the metric.
    """
    checkpoints = list_checkpoints(directory)
    if checkpoints and not any(metric in each.metrics for each in checkpoints):
        known = sorted({name for each in checkpoints for name in each.metrics})
        raise KeyError(
            f"No checkpoint in {os.fspath(directory)} has the metric {metric!r}; "
            f"recorded are: {', '.join(known) or 'none'}."
        )
    return _first_whole(_best_first(checkpoints, metric, greater_is_better))


def _best_first(
    checkpoints: Iterable[Checkpoint], metric: str, greater_is_better: bool
) -> list[Checkpoint]:
    measured = [
        each
        for each in checkpoints
        if math.isfinite(each.metrics.get(metric, math.nan))
    ]
    sign = -1 if greater_is_better else 1
    return sorted(measured, key=lambda each: sign * each.metrics[metric])


def _first_whole(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    for checkpoint in checkpoints:
        reason = checkpoint.why_broken()
        if reason is None:
            return checkpoint
        _warn_passed_over(checkpoint.path, reason)
    return None


def _warn_passed_over(folder: Path, reason: str) -> None:
    warn(f"The checkpoint {folder} is passed over: {reason.rstrip('.')}.")


def prune(
    directory: str | os.PathLike[str],
    keep_last: int,
    *,
    keep_best: int = 0,
    metric: str | None = None,
    greater_is_better: bool = False,
    protect: Iterable[Checkpoint | str | os.PathLike[str]] = (),
    only: Callable[[Checkpoint], bool] | None = None,
) -> list[Path]:
    """Delete old checkpoints, oldest first.

    Only complete checkpoints of this library are counted and deleted; other files are
    left alone, and so are broken checkpoints. Nothing is deleted unless one of those
    that stay is known to be whole: they are verified, newest first, until one is.

    Args:
        directory: Where checkpoints are kept.
        keep_last: How many of the newest stay; at least 1.
        keep_best: How many of the best by ``metric`` stay besides.
        metric: Name of the metric; needed if ``keep_best`` is not 0.
        greater_is_better: Whether the largest value of the metric is the best.
        protect: Checkpoints or paths that stay besides. If the one that ``commit`` just
            returned is among them, nothing needs to be verified again.
        only: Takes a checkpoint and says whether it may be counted and deleted, e.g.
            to leave those of another run alone. None means all.

    Returns:
        The paths that were deleted.
    """
    if keep_last < 1:
        raise ValueError(
            f"keep_last must be at least 1, got {keep_last}: the newest checkpoint is "
            "what a run resumes from."
        )
    if keep_best and metric is None:
        raise ValueError(
            f"keep_best={keep_best} needs metric, the name of what to compare."
        )
    candidates = [
        checkpoint
        for checkpoint in list_checkpoints(directory)
        if checkpoint.why_broken(checksums=False) is None
        and (only is None or only(checkpoint))
    ]
    protected = [c if isinstance(c, Checkpoint) else Checkpoint(c) for c in protect]
    keep = [*candidates[-keep_last:], *protected]
    if metric is not None:
        keep += _best_first(candidates, metric, greater_is_better)[:keep_best]
    paths = {checkpoint.path for checkpoint in keep}
    doomed = [each for each in candidates if each.path not in paths]
    staying = [each for each in reversed(candidates) if each.path in paths]
    if not doomed or not _one_is_whole([*staying, *protected]):
        return []
    return [each.path for each in doomed if _delete(each)]


def _one_is_whole(checkpoints: list[Checkpoint]) -> bool:
    if any(checkpoint.is_known_whole for checkpoint in checkpoints):
        return True
    reasons = []
    for checkpoint in checkpoints:
        reason = checkpoint.why_broken()
        if reason is None:
            return True
        reasons.append(reason)
    warn(
        "No old checkpoint was deleted, because none of those that should stay is "
        f"whole: {'; '.join(reasons)}."
    )
    return False


def _delete(checkpoint: Checkpoint) -> bool:
    try:
        remove_folder(checkpoint.path)
    except OSError as error:
        warn(f"The old checkpoint {checkpoint.path} could not be deleted ({error}).")
        return False
    return True
