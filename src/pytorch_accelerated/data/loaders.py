"""The loaders that a trainer iterates over, and what may be given in their place."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, TypeGuard

import torch
from accelerate.utils import find_batch_size, send_to_device
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from pytorch_accelerated import compat
from pytorch_accelerated.data.fetching import BatchDataset, InMemoryDataset
from pytorch_accelerated.data.order import (
    BatchPlan,
    PlannedBatchSampler,
    Share,
    derive_seed,
)
from pytorch_accelerated.data.workers import (
    AUTO_NUM_WORKERS,
    LastIteration,
    worker_init_fn,
)
from pytorch_accelerated.errors import warn
from pytorch_accelerated.pace import Pace

# One to know which is the last, one to copy to the device, and the present one.
_MOST_FETCHED_AHEAD = 4

LIMIT_BATCHES_ENV_VAR = "PT_ACC_LIMIT_BATCHES"


def yields_batches(data: Any) -> TypeGuard[Iterable[Any]]:
    """Say whether this is a ready loader and not a dataset.

    Besides torch's loaders these are other iterables from which no single sample can be
    taken, such as the loader of timm that normalises images on the device.
    """
    return isinstance(data, DataLoader) or (
        isinstance(data, Iterable)
        and not isinstance(data, Dataset)
        and not hasattr(data, "__getitem__")
    )


def is_plain(loader: Any) -> bool:
    """Say whether a loader has a map-style dataset and no sampler of the user's."""
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and isinstance(loader.dataset, Sized)
        and type(loader.batch_sampler) is BatchSampler
        and loader.batch_sampler.sampler is loader.sampler
        and loader.generator is None
        and (type(loader.sampler) is SequentialSampler or _is_shuffled(loader))
    )


def _is_shuffled(loader: DataLoader[Any]) -> bool:
    sampler = loader.sampler
    return (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.generator is None
        and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )


def generators_of(loader: Any) -> list[torch.Generator]:
    """Return the random generators of its own that a loader takes its order from.

    They are those of the user.
    """
    names = ("sampler", "batch_sampler")
    parts = (loader, *(getattr(loader, name, None) for name in names))
    found = [getattr(part, "generator", None) for part in parts]
    unique = {id(each): each for each in found if isinstance(each, torch.Generator)}
    return list(unique.values())


def with_parts(loader: DataLoader[Any], **parts: Any) -> DataLoader[Any]:
    """Return a loader as it is, but for some of its parts, and in order."""
    if loader.num_workers and not getattr(loader, "in_order", True):
        warn(
            "in_order=False is not followed: the batches of a run come in the order "
            "that its place in an epoch is known by."
        )
    changed = copy.copy(loader)
    vars(changed).update(parts, in_order=True)
    compat.forget_iterator(changed)
    return changed


class _OnDevice:
    """What the loaders of a trainer have in common.

    Attributes that they do not have are those of the loader that they were made from.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self._iteration = LastIteration()

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet, while this is copied or unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)


class PlannedLoader(_OnDevice):
    """The loader that the trainer iterates over in place of a plain ``DataLoader``.

    It yields the same samples, in an order that is a function of (seed, epoch); shares
    them between processes; gives every batch random numbers of its own; moves it to the
    device; and takes whole batches by indexing where the data is in memory. Attributes
    that it does not have are those of the ``DataLoader`` it was made from.

    Args:
        loader: The plain loader (see :func:`is_plain`).
        device: Where the batches go.
        seed: The data seed of the run.
        num_processes: Number of processes that share the samples.
        process_index: Which of them this is.
        even: Spread the samples evenly, as evaluation needs (see :class:`BatchPlan`).
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        device: torch.device,
        seed: int,
        *,
        num_processes: int = 1,
        process_index: int = 0,
        even: bool = False,
    ) -> None:
        super().__init__(loader, device)
        assert isinstance(loader.dataset, Sized)
        assert loader.batch_size is not None
        plan = BatchPlan(
            len(loader.dataset),
            loader.batch_size,
            num_processes,
            loader.drop_last,
            even,
        )
        is_shuffled = type(loader.sampler) is RandomSampler
        self.batch_sampler: PlannedBatchSampler = PlannedBatchSampler(
            plan, process_index, seed, is_shuffled
        )
        self._batches = BatchDataset(loader.dataset, loader.collate_fn)
        self._loader = with_parts(
            loader,
            dataset=self._batches,
            batch_sampler=self.batch_sampler,
            collate_fn=_as_it_is,
            # A generator of its own: without one, each epoch would draw a number from
            # the global generator, which belongs to the model.
            generator=torch.Generator().manual_seed(derive_seed(seed)),
        )

    @property
    def plan(self) -> BatchPlan:
        """Which samples make up each batch of the epoch."""
        return self.batch_sampler.plan

    @property
    def is_exact(self) -> bool:
        """Whether no collate function can make a batch smaller than planned."""
        return compat.is_default_collate(self.loader.collate_fn)

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch of this process."""
        return len(self.plan)

    def set_epoch(self, epoch: int, first_step: int = 0, first_sample: int = 0) -> None:
        """Choose the epoch that the next iteration yields.

        An epoch that begins has as many samples as the dataset has now.

        Args:
            epoch: Number of the epoch, from 1.
            first_step: Batches at the start of the epoch to leave out, unloaded.
            first_sample: Where in the order of the epoch the first batch starts.
        """
        self.batch_sampler.plan = replace(self.plan, first=first_sample)
        self.batch_sampler.epoch = epoch
        self.batch_sampler.first_step = first_step
        self._follow_dataset()

    def share_of(self, step: int) -> Share:
        """Return what this process has of a step."""
        num_own = self.plan.size(step, self.batch_sampler.process_index)
        return Share(self.plan.window_size(step, step), is_filler=num_own == 0)

    def use_data_seed(self, seed: int) -> None:
        """Let the order and the random numbers follow from another seed."""
        self.batch_sampler.seed = seed

    def use_batch_size(self, batch_size: int) -> None:
        """Make batches of another size of the same samples, from the next iteration."""
        self.stop_workers()
        self.batch_sampler.plan = self.plan.with_batch_size(batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of this process that are due in the chosen epoch."""
        self._follow_dataset()
        return to_device(self._iterate(), self.device)

    def _iterate(self) -> Iterator[Any]:
        loader = self.loader
        in_memory = None if loader.num_workers else InMemoryDataset.of(loader)
        if in_memory is not None:
            return self._in_memory_batches(in_memory)
        self._batches.is_first = True
        if loader.num_workers == 0 and not loader.pin_memory:
            # What the loader would do, without what it spends on each batch.
            return map(self._batches.fetch_here, self.batch_sampler)
        return self._iteration.of(self._loader)

    def _in_memory_batches(self, data: InMemoryDataset) -> Iterator[list[Tensor]]:
        is_here = data.tensors[0].device.type == "cpu"
        pin = self.loader.pin_memory and is_here and self.device.type != "cpu"
        rows = data.rows(self.batch_sampler.order())
        for _, first, last in self.batch_sampler.positions():
            batch = data.batch(rows[first:last])
            yield [tensor.pin_memory() for tensor in batch] if pin else batch

    def stop_workers(self) -> None:
        """End worker processes that were kept for another epoch, or by an error."""
        self._iteration.stop_workers()
        compat.forget_iterator(self._loader)

    def _follow_dataset(self) -> None:
        """Plan for the length that the dataset has now, unless amid an epoch."""
        if self.batch_sampler.first_step == 0 and self.plan.first == 0:
            self.batch_sampler.plan = replace(self.plan, length=len(self.dataset))


def _as_it_is(batch: Any) -> Any:
    return batch


class DeviceLoader(_OnDevice):
    """Moves the batches of any iterable to the device, and changes nothing else.

    Args:
        loader: Anything that yields batches; its length may be unknown.
        device: Where the batches go.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        super().__init__(loader, device)
        self._iterable = loader
        # A loader such as torchdata's, or a stream that is read in this process.
        keepers: list[Any] = [loader]
        dataset = getattr(loader, "dataset", None)
        if isinstance(dataset, IterableDataset) and not getattr(
            loader, "num_workers", 0
        ):
            keepers.append(dataset)
        self._keeps_place: Any = next(filter(_has_state, keepers), None)
        self._places: dict[int, Any] = {}
        self._num_fetched = 0

    def place_after(self, num_batches: int) -> Any:
        """Return the state of the loader or stream after some batches of this epoch.

        None if neither has a ``state_dict()`` and a ``load_state_dict()``.
        """
        return self._places.get(num_batches)

    def go_to(self, place: Any, num_batches: int) -> None:
        """Let the next iteration start from what :meth:`place_after` returned."""
        self._keeps_place.load_state_dict(place)
        self._num_fetched = num_batches

    def set_epoch(self, epoch: int) -> None:
        """Tell the number of the epoch, from 1, to what wants to know it."""
        names = ("sampler", "batch_sampler", "dataset")
        parts: list[Any] = [getattr(self.loader, name, None) for name in names]
        for part in (self.loader, *parts):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the length of the iterable; TypeError if it has none."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches, on the device."""
        first_step, self._num_fetched = self._num_fetched, 0
        batches = self._unpacked(self._iteration.of(self._iterable), first_step)
        if self._keeps_place is not None:
            batches = self._noting_places(batches, first_step)
        return to_device(batches, self.device)

    def _unpacked(self, batches: Iterator[Any], first_step: int) -> Iterator[Any]:
        return batches

    def _noting_places(self, batches: Iterator[Any], first_step: int) -> Iterator[Any]:
        for number, batch in enumerate(batches, first_step + 1):
            # Batches are fetched ahead, so the place to save is an earlier one.
            self._places[number] = self._keeps_place.state_dict()
            self._places.pop(number - _MOST_FETCHED_AHEAD, None)
            yield batch

    def stop_workers(self) -> None:
        """End worker processes that an error keeps, unless they are for all epochs."""
        if not getattr(self.loader, "persistent_workers", False):
            self._iteration.stop_workers()


def _has_state(part: Any) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


def to_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield the batches on the device.

    On an accelerator the next batch is fetched and its copy started before the present
    one is yielded, so that copying overlaps with computing.
    """
    # Started here, not at the first batch: a resumed run counts on it.
    iterator = iter(batches)
    return iterator if device.type == "cpu" else _one_ahead(iterator, device)


def _one_ahead(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    moved: list[Any] = []
    for batch in batches:
        moved.append(send_to_device(batch, device, non_blocking=True))
        if len(moved) == 2:
            yield moved.pop(0)
    yield from moved


_NO_MORE = object()


class LookAhead(Iterator[Any]):
    """Batches of which it can be said whether there are more.

    Args:
        batches: The batches; one of them is fetched ahead where it is asked.
        pace: What notes how long they are waited for.
    """

    def __init__(self, batches: Iterator[Any], pace: Pace) -> None:
        self._batches = batches
        self._pace = pace
        self._ahead: list[Any] = []

    def __next__(self) -> Any:
        """Return the next batch."""
        if self.is_exhausted():
            raise StopIteration
        return self._ahead.pop()

    def is_exhausted(self) -> bool:
        """Say whether there is no other batch."""
        if not self._ahead:
            pace, start = self._pace, time.monotonic()
            # Not islice, which would ask the loader for its iterator each time.
            batch = next(self._batches, _NO_MORE)
            self._ahead = [] if batch is _NO_MORE else [batch]
            pace.waited += time.monotonic() - start
            pace.num_batches += len(self._ahead)
        return not self._ahead


def length_of(loader: Any) -> int | None:
    """Return the number of batches of a loader, or None where it is unknown."""
    try:
        return len(loader)
    except TypeError:
        return None


def num_samples_in(batch: Any) -> int:
    """Return the length of the first tensor in a batch, 0 if it begins with none."""
    with suppress(TypeError, ValueError, IndexError):
        return find_batch_size(batch) or 0
    return 0


def plan_of(loader: Any) -> BatchPlan | None:
    """Return the plan that the batches of a loader follow, None if it is not ours.

    Only then is the length of the loader more than a promise of somebody else's.
    """
    plan = getattr(loader, "plan", None)
    return plan if isinstance(plan, BatchPlan) else None


class DataLoaderSlice:
    """The first batches of a loader.

    Attributes that it does not have are those of the loader.

    Args:
        dl: The loader.
        slice_size: Batches to take.
    """

    def __init__(self, dl: Any, slice_size: int) -> None:
        self.dl = dl
        self.slice_size = slice_size

    def __getattr__(self, name: str) -> Any:
        if name == "dl":
            raise AttributeError(name)
        return getattr(self.dl, name)

    def __len__(self) -> int:
        """Return the number of batches, which may be less than the slice's size."""
        length = length_of(self.dl)
        return self.slice_size if length is None else min(self.slice_size, length)

    def __iter__(self) -> Iterator[Any]:
        """Yield the first batches of the loader, and fetch no others."""
        return islice(self.dl, self.slice_size)


class LimitBatches:
    """Limits the loaders of every trainer that is created inside a ``with`` block.

    ::

        with LimitBatches(3):
            trainer = Trainer(...)   # trains and evaluates on three batches an epoch

    Args:
        num_batches: Batches of each loader to use.
    """

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches
        self._outer: list[str | None] = []

    def __enter__(self) -> LimitBatches:
        """Set the environment variable that a trainer reads when it is created."""
        self._outer.append(os.environ.get(LIMIT_BATCHES_ENV_VAR))
        os.environ[LIMIT_BATCHES_ENV_VAR] = str(self.num_batches)
        return self

    def __exit__(self, *exception: object) -> None:
        """Put back what the variable was before."""
        outer = self._outer.pop()
        if outer is None:
            os.environ.pop(LIMIT_BATCHES_ENV_VAR, None)
        else:
            os.environ[LIMIT_BATCHES_ENV_VAR] = outer


def batch_limit_from_environment() -> int | None:
    """Return the limit that ``PT_ACC_LIMIT_BATCHES`` sets, or None.

    Raises:
        ValueError: If it is neither a whole number nor "none".
    """
    value = os.environ.get(LIMIT_BATCHES_ENV_VAR, "none")
    if value.strip().lower() == "none":
        return None
    try:
        return int(value)
    except ValueError:
        raise ValueError(
            f"The environment variable {LIMIT_BATCHES_ENV_VAR} must be a number of "
            f"batches or 'none', got {value!r}."
        ) from None


def remove_padding(padded_tensor: Tensor, pad_value: float) -> Tensor:
    """Drop the entries along the first dimension that hold nothing but padding.

    Args:
        padded_tensor: A tensor of any shape with at least one dimension.
        pad_value: The padding; NaN is recognised too.

    Returns:
        The other entries, in their order.
    """
    if pad_value != pad_value:
        is_padding = torch.isnan(padded_tensor)
    else:
        is_padding = padded_tensor == pad_value
    if is_padding.dim() > 1:
        is_padding = is_padding.flatten(1).all(dim=1)
    return padded_tensor[~is_padding]


def default_dl_kwargs(batch_size: int, *, shuffle: bool) -> dict[str, Any]:
    """Return the arguments of a loader that the user did not give."""
    return {
        "shuffle": shuffle,
        "pin_memory": torch.cuda.is_available(),
        "batch_size": batch_size,
        "num_workers": AUTO_NUM_WORKERS,
        "worker_init_fn": worker_init_fn,
    }


def merge_dl_kwargs(
    dataset: Any, defaults: Mapping[str, Any], given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Let the given arguments win, and drop the defaults that they rule out."""
    given = dict(given or {})
    ruled_out: set[str] = set()
    if given.get("sampler") is not None or isinstance(dataset, IterableDataset):
        ruled_out.add("shuffle")
    if given.get("batch_sampler") is not None:
        ruled_out.update(("shuffle", "batch_size"))
    return {
        **{name: value for name, value in defaults.items() if name not in ruled_out},
        **given,
    }


def batch_size_of_loader(
    loader: Any, kwargs: Mapping[str, Any] | None, default: int
) -> int | None:
    """Return the batch size of a loader, None if there is no loader."""
    if loader is None:
        return None
    batch_size = (kwargs or {}).get("batch_size", getattr(loader, "batch_size", None))
    return default if batch_size is None else batch_size
