"""Batches that are a function of (seed, epoch, batch), whoever loads them.

The order of the samples, their split over processes, and the random numbers that the
dataset draws do not depend on the number of workers, on prefetching, or on where a run
was interrupted. The pieces:

* :func:`epoch_order` and :func:`derive_seed`: the order and the seeds, as plain
  functions, so that a loop written by hand can reproduce a run;
* :class:`BatchPlan`: which samples make up each batch of each process;
* :class:`PlannedLoader`: the loader the trainer iterates over in place of a plain
  ``DataLoader``;
* :class:`DeviceLoader`: moves the batches of any other iterable to the device.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from accelerate.utils import find_batch_size, send_to_device
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

from pytorch_accelerated import workers
from pytorch_accelerated.errors import add_note


class _AutoNumWorkers(int):
    """Stands for "measure what is best" among a loader's arguments."""


AUTO_NUM_WORKERS = _AutoNumWorkers(0)

# What it takes to get a batch from a worker process, with room for a slow machine.
HAND_OVER_SECONDS = 2e-3

# What may never end, such as waiting for a thread that a fork has left behind.
_MEASURING_SECONDS = 10.0

# One to know which is the last, one to copy to the device, and the present one.
_MOST_FETCHED_AHEAD = 4

LIMIT_BATCHES_ENV_VAR = "PT_ACC_LIMIT_BATCHES"


def derive_seed(*values: int) -> int:
    """Return a seed between 0 and 2**63 - 1 that is a function of all the values.

    Nearby values give unrelated seeds (SplitMix64; Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", 2014).
    """
    return _mix(0, *values) >> 1


def _mix(state: int, *values: int) -> int:
    mask = (1 << 64) - 1
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which a shuffled epoch visits the samples of a dataset.

    A loop written by hand that takes its batches from this order, one after the other,
    sees the batches of ``Trainer(seed=seed).train(...)``.

    Args:
        length: Number of samples in the dataset.
        seed: The data seed of the run, ``trainer.run_config.data_seed``.
        epoch: Number of the epoch in the run history, from 1.

    Returns:
        A permutation of ``range(length)``, shape ``(length,)``, int64.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    return torch.randperm(length, generator=generator)


class Share(NamedTuple):
    """What a process has of a step.

    Args:
        total: Samples of all processes in the step.
        is_filler: Whether this process has a batch only to keep the others company.
    """

    total: int
    is_filler: bool


@dataclass(frozen=True)
class BatchPlan:
    """Says which positions of an epoch's order form each batch of each process.

    Every process gets the same number of batches, so no collective can hang, and the
    batches of one step are neighbours in the order: the first process has the first.

    In training, a step takes ``num_processes * batch_size`` samples, as one process
    with that batch size would; the last one shares what is left. When fewer samples
    than processes are left, some processes have none (see :meth:`is_filler`).

    With ``even``, as in evaluation, the samples are spread so that the sizes of all
    batches differ by at most one, and none is empty.

    Args:
        length: Number of samples.
        batch_size: Samples in a batch of one process.
        num_processes: Number of processes.
        drop_last: Leave out the last step if it has fewer samples than the others.
        even: Spread the samples evenly; has no effect in a single process.
        first: Position of the first sample: those before it are left out, because a
            resumed run has seen them in other batches. Not for ``even``.
        past_last: Position after the last sample, if the last ones are left out.

    Raises:
        ValueError: If ``even`` is asked for and there are too few samples to give every
            process one in each step.
    """

    length: int
    batch_size: int
    num_processes: int = 1
    drop_last: bool = False
    even: bool = False
    first: int = 0
    past_last: int | None = None

    def __post_init__(self) -> None:
        slots = len(self) * self.num_processes
        if self._is_spread and self.length < slots:
            raise ValueError(
                f"{self.length} samples cannot be split into {len(self)} batches of up "
                f"to {self.batch_size} on each of {self.num_processes} processes "
                f"without an empty one: at least {slots} samples are needed. Use a "
                "larger batch size or fewer processes."
            )

    @cached_property
    def _is_spread(self) -> bool:
        return self.even and self.num_processes > 1

    @cached_property
    def _step_size(self) -> int:
        return self.batch_size * self.num_processes

    @cached_property
    def _end(self) -> int:
        return self.length if self.past_last is None else self.past_last

    def with_batch_size(self, batch_size: int) -> BatchPlan:
        """Return a plan for the same samples in batches of another size."""
        end = len(replace(self, first=0)) * self._step_size if self.drop_last else None
        return replace(self, batch_size=batch_size, past_last=end)

    def __len__(self) -> int:
        """Return the number of steps, which is the number of batches of a process."""
        whole, rest = divmod(self._end - self.first, self._step_size)
        return whole if self.drop_last or rest == 0 else whole + 1

    def bounds(self, step: int, process: int) -> tuple[int, int]:
        """Return the positions ``(first, past_last)`` of a process's batch."""
        if self._is_spread:
            total = len(self) * self._step_size if self.drop_last else self.length
            slots, slot = len(self) * self.num_processes, step * self.num_processes
            return share_bounds(total, slots, slot + process)
        start = self.first + step * self._step_size
        size = min(self._step_size, self._end - start)
        if self.num_processes == 1:
            return start, start + size
        first, last = share_bounds(size, self.num_processes, process)
        return start + first, start + last

    def size(self, step: int, process: int) -> int:
        """Return the number of samples in a process's batch."""
        first, last = self.bounds(step, process)
        return last - first

    def window_size(self, first_step: int, last_step: int) -> int:
        """Return the number of samples of all processes in the steps, both included."""
        return (
            self.bounds(last_step, self.num_processes - 1)[1]
            - (self.bounds(first_step, 0)[0])
        )

    def is_filler(self, step: int, process: int) -> bool:
        """Say whether a process has no sample of its own in this step.

        It is given one that another process has too, so that it takes part in the
        collectives; the trainer gives that batch no weight.
        """
        return self.size(step, process) == 0


def share_bounds(total: int, parts: int, part: int) -> tuple[int, int]:
    """Return ``(first, past_last)`` of one of ``parts`` neighbouring, even shares.

    Their sizes differ by at most one, and the first ones are the larger ones.
    """
    size, larger = divmod(total, parts)
    first = part * size + min(part, larger)
    return first, first + size + (part < larger)


class SeededIndices(list[int]):
    """The indices of a batch, with the seed that its random numbers come from."""

    def __init__(self, indices: Iterable[int], seed: int) -> None:
        super().__init__(indices)
        self.seed = seed

    def __reduce__(self) -> tuple[Any, ...]:
        return SeededIndices, (list(self), self.seed)


class PlannedBatchSampler(Sampler[SeededIndices]):
    """Yields the batches of one process, as a plan and a seed say.

    Args:
        plan: Which positions form which batch.
        process_index: The process whose batches are yielded.
        seed: The data seed of the run.
        shuffle: Whether the order is :func:`epoch_order` or that of the dataset.
    """

    def __init__(
        self, plan: BatchPlan, process_index: int, seed: int, shuffle: bool
    ) -> None:
        self.plan: BatchPlan = plan
        self.process_index = process_index
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 1
        self.first_step = 0

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return len(self.plan)

    def order(self) -> Tensor:
        """Return the order of the current epoch, shape ``(length,)``, int64."""
        if self.shuffle:
            return epoch_order(self.plan.length, self.seed, self.epoch)
        return torch.arange(self.plan.length)

    def positions(self) -> Iterator[tuple[int, int, int]]:
        """Yield ``(step, first, past_last)`` for each batch that is still due.

        The last two are positions in :meth:`order`.
        """
        for step in range(self.first_step, len(self.plan)):
            first, last = self.plan.bounds(step, self.process_index)
            if first == last:
                first, last = self.plan.length - 1, self.plan.length
            yield step, first, last

    def __iter__(self) -> Iterator[SeededIndices]:
        """Yield the indices of each batch, with the batch's seed."""
        order = self.order().tolist()
        # The seed is derive_seed(seed, epoch, step, process), begun once an epoch. If
        # steps are counted from a later sample, that comes between epoch and step.
        first = self.plan.first
        of_epoch = _mix(0, self.seed, self.epoch, *([first] if first else []))
        for step, first, last in self.positions():
            seed = _mix(of_epoch, step, self.process_index) >> 1
            yield SeededIndices(order[first:last], seed)


class _RandomState:
    """Gives a batch its own random numbers, and leaves the process's as they were.

    Saving and restoring python's and numpy's generators costs more than fetching a
    small batch. So only torch's generator is always seeded; the other two are from the
    moment at which a batch is seen to draw from them, which is looked for in the first
    batch of every epoch. If one of them has moved by the next epoch, for whatever
    reason, it is seeded from then on: a later batch may have drawn from it.
    """

    def __init__(self) -> None:
        self.uses_python = False
        self.uses_numpy = False
        self._python_left: Any = None
        self._numpy_left: Any = None

    def fetch(self, fetch: Any, indices: SeededIndices, *, is_first: bool) -> Any:
        seed = indices.seed
        if is_first:
            self._look_for_draws_of_later_batches()
        seed_python = self.uses_python or is_first
        seed_numpy = self.uses_numpy or is_first
        generator = torch.default_generator
        torch_before = generator.get_state()
        python_before = random.getstate() if seed_python else None
        numpy_before = np.random.get_state() if seed_numpy else None
        try:
            generator.manual_seed(seed)
            if python_before is not None:
                random.seed(seed)
                python_seeded = random.getstate() if is_first else None
            if numpy_before is not None:
                np.random.seed(seed % 2**32)
                numpy_seeded = np.random.get_state() if is_first else None
            batch = fetch(indices)
            if is_first:
                self.uses_python |= random.getstate() != python_seeded
                self.uses_numpy |= not _same_numpy_state(numpy_seeded)
            return batch
        finally:
            generator.set_state(torch_before)
            if python_before is not None:
                random.setstate(python_before)
            if numpy_before is not None:
                np.random.set_state(numpy_before)

    def _look_for_draws_of_later_batches(self) -> None:
        if self._python_left is not None:
            self.uses_python |= random.getstate() != self._python_left
            self.uses_numpy |= not _same_numpy_state(self._numpy_left)
        self._python_left, self._numpy_left = random.getstate(), np.random.get_state()


def _same_numpy_state(state: Any) -> bool:
    now: Any = np.random.get_state()
    return now[2:] == state[2:] and bool(np.array_equal(now[1], state[1]))


class _BatchDataset(Dataset[Any]):
    """Fetches and collates a whole batch under the batch's own random seed."""

    def __init__(self, dataset: Any, collate_fn: Any) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self._collate_here = _collate_here if _is_as_usual(collate_fn) else collate_fn
        self.is_first = True
        self._fetches_whole_batches = hasattr(dataset, "__getitems__")
        self._random_state = _RandomState()

    def __getitems__(self, indices: SeededIndices) -> Any:
        if get_worker_info() is None:
            return self.fetch_here(indices)
        seed_everything(indices.seed)
        return self.collate_fn(self._fetch(indices))

    def fetch_here(self, indices: SeededIndices) -> Any:
        """Fetch in the main process, whose random state stays as it is."""
        is_first, self.is_first = self.is_first, False
        return self._random_state.fetch(self._batch, indices, is_first=is_first)

    def _batch(self, indices: list[int]) -> Any:
        return self._collate_here(self._fetch(indices))

    def _fetch(self, indices: list[int]) -> Any:
        dataset = self.dataset
        if self._fetches_whole_batches:
            return dataset.__getitems__(list(indices))
        samples: list[Any] = []
        try:
            for index in indices:
                samples.append(dataset[index])  # noqa: PERF401 (an error counts them)
        except Exception as error:
            add_note(error, f"Raised by sample {indices[len(samples)]}.")
            raise
        return samples


def _is_as_usual(collate_fn: Any) -> bool:
    """Say whether this is torch's default, unchanged for tuples and for tensors."""
    return (
        collate_fn is default_collate
        and tuple not in default_collate_fn_map
        and default_collate_fn_map.get(Tensor) is collate_tensor_fn
    )


def _collate_here(samples: Any) -> Any:
    """Do what ``default_collate`` does in the main process.

    It takes a tuple of tensors, the most frequent sample, for one of the rarest, and
    spends several microseconds on finding out.
    """
    if type(samples[0]) is not tuple:
        return default_collate(samples)
    try:
        columns: list[Any] = list(zip(*samples, strict=True))
    except (TypeError, ValueError):
        return default_collate(samples)  # which says what is wrong
    return [
        torch.stack(column) if _is_dense(column[0]) else default_collate(column)
        for column in columns
    ]


def _is_dense(value: Any) -> bool:
    return (
        type(value) is Tensor and value.layout is torch.strided and not value.is_nested
    )


def seed_everything(seed: int) -> None:
    """Seed the global generators of python, numpy and torch in this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class InMemoryDataset:
    """Tensors from which whole batches can be taken by indexing.

    Args:
        tensors: The tensors of a ``TensorDataset``; all have the same length.
        index: Which of their entries the dataset holds, or None for all in order.
    """

    tensors: tuple[Tensor, ...]
    index: Tensor | None

    @classmethod
    def of(cls, loader: DataLoader[Any]) -> InMemoryDataset | None:
        """Return the loader's data as tensors, or None if it is anything else.

        It must be a ``TensorDataset``, or (nested) ``Subset`` of one, with the default
        collate function. Subclasses may do anything and are left alone.
        """
        dataset: Any = loader.dataset
        index = None
        while type(dataset) is Subset:
            subset = torch.as_tensor(dataset.indices, dtype=torch.int64)
            index = subset if index is None else subset[index]
            dataset = dataset.dataset
        if type(dataset) is not TensorDataset or not _is_as_usual(loader.collate_fn):
            return None
        if any(type(tensor) is not Tensor for tensor in dataset.tensors):
            return None
        if len({tensor.device for tensor in dataset.tensors}) != 1:
            return None
        if index is not None:  # which may count from the end
            index = torch.where(index < 0, index + len(dataset), index)
        return cls(dataset.tensors, index)

    def rows(self, order: Tensor) -> Tensor:
        """Return the entries of the tensors that an order of the samples stands for."""
        rows = order if self.index is None else self.index[order]
        return rows.to(self.tensors[0].device)

    def batch(self, rows: Tensor) -> list[Tensor]:
        """Return what fetching the samples one by one and collating them gives."""
        return [tensor.index_select(0, rows) for tensor in self.tensors]


def is_loader(data: Any) -> TypeGuard[DataLoader[Any]]:
    """Say whether this is a loader of torch."""
    return isinstance(data, DataLoader)


def yields_batches(data: Any) -> TypeGuard[Iterable[Any]]:
    """Say whether this is a ready loader and not a dataset.

    Besides torch's loaders these are other iterables from which no single sample can be
    taken, such as the loader of timm that normalises images on the device.
    """
    return is_loader(data) or (
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
        and (
            type(loader.sampler) is SequentialSampler
            or (
                type(loader.sampler) is RandomSampler
                and not loader.sampler.replacement
                and loader.sampler._num_samples is None
                and loader.sampler.generator is None
            )
        )
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


class PlannedLoader:
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
        assert isinstance(loader.dataset, Sized)
        assert loader.batch_size is not None
        self.loader = loader
        self.device = device
        self._plan_at_start = BatchPlan(
            len(loader.dataset),
            loader.batch_size,
            num_processes,
            loader.drop_last,
            even,
        )
        self.batch_sampler: PlannedBatchSampler = PlannedBatchSampler(
            self._plan_at_start,
            process_index,
            seed,
            type(loader.sampler) is RandomSampler,
        )
        self._batches = _BatchDataset(loader.dataset, loader.collate_fn)
        self._loader = self._rebuild(loader)
        self._iteration = workers.LastIteration()

    def _rebuild(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        has_workers = loader.num_workers > 0
        return DataLoader(
            self._batches,
            batch_sampler=self.batch_sampler,
            collate_fn=_as_it_is,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            # A generator of its own: without one, each epoch would draw a number from
            # the global generator, which belongs to the model.
            generator=torch.Generator().manual_seed(
                derive_seed(self.batch_sampler.seed)
            ),
            prefetch_factor=loader.prefetch_factor if has_workers else None,
            persistent_workers=loader.persistent_workers,
        )

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    @property
    def plan(self) -> BatchPlan:
        """Which samples make up each batch of the epoch."""
        return self.batch_sampler.plan

    @property
    def is_exact(self) -> bool:
        """Whether no collate function can make a batch smaller than planned."""
        return _is_as_usual(self.loader.collate_fn)

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
        return Share(
            self.plan.window_size(step, step),
            self.plan.is_filler(step, self.batch_sampler.process_index),
        )

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
        in_memory = self._data_in_memory()
        if in_memory is not None:
            return to_device(self._in_memory_batches(in_memory), self.device)
        self._batches.is_first = True
        if self.loader.num_workers == 0 and not self.loader.pin_memory:
            # What the loader would do, without what it spends on each batch.
            here = map(self._batches.fetch_here, self.batch_sampler)
            return to_device(here, self.device)
        return to_device(self._iteration.of(self._loader), self.device)

    @property
    def is_in_memory(self) -> bool:
        """Whether whole batches are taken by indexing."""
        return self._data_in_memory() is not None

    def seconds_per_batch(self) -> float:
        """Measure how long it takes to load the first batch in this process."""
        indices = SeededIndices(range(self.plan.bounds(0, 0)[1]), seed=0)
        seconds = []
        for _ in range(2):  # the first includes what is done only once
            start = time.perf_counter()
            self._batches.fetch_here(indices)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def stop_workers(self) -> None:
        """End worker processes that were kept for another epoch, or by an error."""
        self._iteration.stop_workers()
        self._loader._iterator = None

    def _follow_dataset(self) -> None:
        """Plan for the length that the dataset has now, unless amid an epoch."""
        if self.batch_sampler.first_step == 0 and self.plan.first == 0:
            plan = replace(self._plan_at_start, length=len(self.dataset))
            self.batch_sampler.plan = plan.with_batch_size(self.plan.batch_size)

    def _data_in_memory(self) -> InMemoryDataset | None:
        return None if self.loader.num_workers else InMemoryDataset.of(self.loader)

    def _in_memory_batches(self, data: InMemoryDataset) -> Iterator[list[Tensor]]:
        is_here = data.tensors[0].device.type == "cpu"
        pin = self.loader.pin_memory and is_here and self.device.type != "cpu"
        rows = data.rows(self.batch_sampler.order())
        for _, first, last in self.batch_sampler.positions():
            batch = data.batch(rows[first:last])
            yield [tensor.pin_memory() for tensor in batch] if pin else batch


class DeviceLoader:
    """Moves the batches of any iterable to the device, and changes nothing else.

    Args:
        loader: Anything that yields batches; its length may be unknown.
        device: Where the batches go.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader = self._iterable = loader
        self.device = device
        # A loader such as torchdata's, or a stream that is read in this process.
        dataset = getattr(loader, "dataset", None)
        is_stream = isinstance(dataset, IterableDataset)
        in_process = getattr(loader, "num_workers", 0) == 0
        self._keeps_place: Any = next(
            (
                each
                for each in (loader, dataset if is_stream and in_process else None)
                if hasattr(each, "state_dict") and hasattr(each, "load_state_dict")
            ),
            None,
        )
        self._places: dict[int, Any] = {}
        self._num_fetched = 0
        self._iteration = workers.LastIteration()

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

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        """Return the length of the iterable; TypeError if it has none."""
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches, on the device."""
        return to_device(self._fetched(self._iteration.of(self._iterable)), self.device)

    def _fetched(self, batches: Iterator[Any]) -> Iterator[Any]:
        return batches if self._keeps_place is None else self._noting_places(batches)

    def stop_workers(self) -> None:
        """End worker processes that an error keeps, unless they are for all epochs."""
        if not getattr(self.loader, "persistent_workers", False):
            self._iteration.stop_workers()

    def _noting_places(self, batches: Iterator[Any]) -> Iterator[Any]:
        first, self._num_fetched = self._num_fetched + 1, 0
        for number, batch in enumerate(batches, first):
            # Batches are fetched ahead, so the place to save is an earlier one.
            self._places[number] = self._keeps_place.state_dict()
            self._places.pop(number - _MOST_FETCHED_AHEAD, None)
            yield batch


def to_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield the batches on the device.

    On an accelerator the next batch is fetched and its copy started before the present
    one is yielded, so that copying overlaps with computing.
    """
    if device.type == "cpu":
        return iter(batches)
    # Started here, not at the first batch: a resumed run counts on it.
    return _one_ahead(iter(batches), device)


def _one_ahead(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    moved = (send_to_device(batch, device, non_blocking=True) for batch in batches)
    for batch, _ in mark_last(moved):
        yield batch


def mark_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each batch with whether it is the last, by fetching one batch ahead."""
    iterator = iter(batches)
    try:
        batch = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield batch, False
        batch = following
    yield batch, True


class LookAhead(Iterator[Any]):
    """Batches of which it can be said whether there are more.

    Args:
        batches: The batches; one of them is fetched ahead where it is asked.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self._ahead: list[Any] = []

    def __next__(self) -> Any:
        """Return the next batch."""
        return self._ahead.pop() if self._ahead else next(self._batches)

    def is_exhausted(self) -> bool:
        """Say whether there is no other batch."""
        if not self._ahead:
            self._ahead = list(islice(self._batches, 1))
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
        first = zip(range(self.slice_size), self.dl, strict=False)
        return (batch for _, batch in first)


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


def worker_init_fn(worker_id: int) -> int:
    """Seed python's and numpy's generators in a loader's worker from torch's.

    torch's own seed differs from worker to worker and from epoch to epoch and follows
    from the loader's generator, so a run can be repeated.

    Returns:
        The seed that was used.
    """
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)
    return seed


_ARGUMENTS_FOR_WORKERS = (
    "multiprocessing_context",
    "persistent_workers",
    "prefetch_factor",
    "timeout",
)


def _seconds_in_a_worker(dataset: Any, collate_fn: Any, indices: list[int]) -> float:
    """Measure in a forked process how long it takes to fetch and collate a batch.

    Starting and ending a loader with a worker would take several times as long.

    Raises:
        Exception: If the process cannot be started, or does not come so far in time.
    """
    context = torch.multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(
        target=_send_seconds,
        args=(sender, _BatchDataset(dataset, collate_fn), indices),
        daemon=True,
    )
    worker.start()
    sender.close()
    # Its end, which takes longer than the measurement, is not waited for.
    with receiver:
        if not receiver.poll(_MEASURING_SECONDS):
            worker.kill()
            worker.join()
            raise TimeoutError
        return float(receiver.recv())


def _send_seconds(sender: Any, batches: _BatchDataset, indices: list[int]) -> None:
    """Send how many seconds it takes to fetch and collate a batch.

    The least of a few trials counts: the first includes what is done only once, and
    any may be held up by what else the machine does.
    """
    torch.set_num_threads(1)  # as in a worker of a loader; others do not survive a fork
    seconds: list[float] = []
    # Of an error the run will tell.
    with suppress(Exception):
        while len(seconds) < 2 or (
            len(seconds) < 5 and min(seconds) > HAND_OVER_SECONDS and sum(seconds) < 0.1
        ):
            start = time.perf_counter()
            batches.fetch_here(SeededIndices(indices, seed=0))
            seconds.append(time.perf_counter() - start)
        sender.send(min(seconds))


def are_processes_forked() -> bool:
    """Say whether new processes are forked, and do not start with the user's script.

    Asked in the usual way, torch would take the default for chosen.
    """
    chosen = torch.multiprocessing.get_start_method(allow_none=True)
    return (chosen or torch.multiprocessing.get_all_start_methods()[0]) == "fork"


def choose_num_workers(
    dataset: Any, arguments: Mapping[str, Any], num_local_processes: int = 1
) -> int:
    """Return how many worker processes a loader of this dataset is better off with.

    Handing a batch over from a worker costs about a millisecond, so a dataset whose
    batches are fetched faster than that is better read in the main process. The time is
    taken in a worker of its own: a dataset that opens its files at the first access
    must not do so in the main process, whose open files all workers would then share.
    Where processes are not forked, it would run the user's script first: there, and
    where a batch is not had in seconds, the answer is 0.

    Args:
        dataset: A map-style dataset with a length; anything else gets 0 workers.
        arguments: The other arguments of the loader. Those that only make sense with
            workers ask for some.
        num_local_processes: Training processes that share this machine's cores.

    Returns:
        0, or as many as this process's share of the cores, at most 8.
    """
    most = min(8, usable_cores() // num_local_processes)
    if any(arguments.get(name) for name in _ARGUMENTS_FOR_WORKERS):
        return max(most, 1)
    batch_size = arguments.get("batch_size") or 1
    collate_fn = arguments.get("collate_fn")
    length = length_of(dataset)
    if most == 0 or not length or isinstance(dataset, IterableDataset):
        return 0
    if not are_processes_forked():
        return 0
    if InMemoryDataset.of(DataLoader(dataset, collate_fn=collate_fn)) is not None:
        return 0
    indices = list(range(min(batch_size, length)))
    try:
        seconds = _seconds_in_a_worker(dataset, collate_fn or default_collate, indices)
    except Exception:
        return 0  # the dataset fails: the run will show how, with its own traceback
    return most if seconds > HAND_OVER_SECONDS else 0


def usable_cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
