"""Data that several processes share, where the batches are not the trainer's own.

From map-style data the trainer makes batches by a plan (see
:class:`~pytorch_accelerated.data.BatchPlan`). Here are the other kinds: a sampler or a
batch sampler of the user's, a ready loader, and a stream. A step takes as many
neighbouring batches as there are processes, the first process the first of them, and
what is left at the end is shared as evenly as it goes. So every sample counts once.

A process without a sample in the last step has one that another process has too, so
that it takes part in what the processes compute together. In training that batch has no
weight; in evaluation it is emptied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info
from torch.utils.data.datapipes.datapipe import IterDataPipe
from torch.utils.data.graph import traverse_dps
from torch.utils.data.graph_settings import get_all_graph_pipes

from pytorch_accelerated import distributed
from pytorch_accelerated.data.fetching import seeded
from pytorch_accelerated.data.loaders import (
    DeviceLoader,
    length_of,
    with_parts,
)
from pytorch_accelerated.data.order import Share, derive_seed, share_bounds

# That are taken from a sampler which may have no end.
_STEPS_AT_A_TIME = 256

# Stages of webdataset's pipelines after which each process has what is its own.
_SPLITTING_STAGES = {"split_by_node", "ResampledShards"}


def is_split_by_process(loader: Any) -> bool:
    """Say whether what a loader yields belongs to this process alone.

    It does where a sampler has ``num_replicas`` and ``rank``, as torch's
    ``DistributedSampler``; where a stream is split as torch's data pipes, ``datasets``
    and webdataset do it; and where the loader, its sampler or its dataset has an
    attribute ``is_split_by_process`` that is true.

    Args:
        loader: A ``DataLoader`` or another iterable of batches.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = (
        loader,
        getattr(loader, "dataset", None),
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    return any(_says_so(part) or _is_split_stream(part) for part in parts)


def _says_so(part: Any) -> bool:
    is_distributed_sampler = hasattr(part, "num_replicas") and hasattr(part, "rank")
    return is_distributed_sampler or getattr(part, "is_split_by_process", None) is True


def _is_split_stream(stream: Any) -> bool:
    if isinstance(stream, IterDataPipe):
        pipes = get_all_graph_pipes(traverse_dps(stream))
        return any(callable(getattr(pipe, "apply_sharding", None)) for pipe in pipes)
    stages = getattr(stream, "pipeline", None)
    if isinstance(stages, list) and any(_is_splitting_stage(each) for each in stages):
        return True
    # Set by datasets.distributed.split_dataset_by_node().
    return getattr(stream, "_distributed", None) is not None


def _is_splitting_stage(stage: Any) -> bool:
    name = getattr(stage, "__name__", type(stage).__name__)
    # The first stage of a WebLoader is a DataLoader.
    return name in _SPLITTING_STAGES or _is_split_stream(
        getattr(stage, "dataset", None)
    )


class SharedLoader(DeviceLoader):
    """Yields this process's share of the batches of a loader, on the device.

    Args:
        loader: A ``DataLoader`` that is the same on all processes.
        device: Where the batches go.
        seed: The data seed of the run.
        num_processes: Number of processes.
        process_index: Which of them this is.
        is_evaluation: Whether a batch that only keeps company is emptied.

    Raises:
        ValueError: If the batches come ready, so that the last ones cannot be shared.
    """

    def __init__(
        self,
        loader: Any,
        device: torch.device,
        seed: int,
        num_processes: int,
        process_index: int,
        *,
        is_evaluation: bool = False,
    ) -> None:
        super().__init__(loader, device)
        self._is_evaluation = is_evaluation
        is_torchs = isinstance(loader, DataLoader)
        is_stream = is_torchs and isinstance(loader.dataset, IterableDataset)
        if not is_torchs or (is_stream and loader.batch_size is None):
            kind = type(loader.dataset if is_torchs else loader).__name__
            kind += " with batch_size=None" if is_torchs else ""
            raise ValueError(
                f"Batches that come ready, from a {kind}, cannot be shared by "
                f"{num_processes} processes. Pass a dataset of samples, or a "
                "DataLoader that makes the batches. If what each process is given "
                "belongs to it alone, and all have the same number of batches, say "
                "so: set the attribute is_split_by_process = True on it or on its "
                "dataset."
            )
        source: type[SharedStream | SharedBatches]
        source = SharedStream if is_stream else SharedBatches
        self._source = source(loader, num_processes, process_index)
        self._seed, self._epoch = seed, 1
        self._iterable: DataLoader[Any] = with_parts(
            loader, **self._source.parts_of_loader()
        )
        if self._keeps_place is loader:
            self._keeps_place = self._iterable

    def __len__(self) -> int:
        """Return the number of batches of this process; TypeError if it is unknown."""
        return len(self._iterable)

    def share_of(self, step: int) -> Share:
        """Return what this process has of a step that has been loaded."""
        return self._source.share_of(step)

    def use_data_seed(self, seed: int) -> None:
        """Let random numbers of a stream follow from another seed."""
        self._seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Tell the number of the epoch, from 1, to what wants to know it."""
        super().set_epoch(epoch)
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of this process, on the device."""
        self._source.start(self._seed, self._epoch, self._num_fetched)
        return super().__iter__()

    def _unpacked(self, batches: Iterator[Any], first_step: int) -> Iterator[Any]:
        for step, batch in enumerate(batches, first_step):
            if isinstance(batch, _OfLastStep):
                self._source.shares[step] = batch.share
                batch = batch.content
            if self._is_evaluation and self.share_of(step).is_filler:
                batch = emptied(batch)
            yield batch


class SharedBatches(Sampler[Any]):
    """The share of one process in the batches that a sampler of the user's makes.

    The main process takes them from the sampler and tells the others, since a sampler
    may draw from a generator that differs between them: all of an epoch at its start,
    or, of a sampler without a length, which may have no end, some at a time.

    Args:
        loader: The loader with the sampler.
        num_processes: Number of processes.
        process_index: Which of them this is.

    Attributes:
        shares: What this process has of each step of the epoch.
    """

    def __init__(
        self, loader: DataLoader[Any], num_processes: int, process_index: int
    ) -> None:
        self._makes_batches = loader.batch_sampler is not None
        self._batches: Any = (
            loader.batch_sampler if self._makes_batches else loader.sampler
        )
        self._num_processes = num_processes
        self._process_index = process_index
        self._drop_last = bool(getattr(self._batches, "drop_last", False))
        self._own: Iterator[list[Any]] = iter(())
        self.shares: dict[int, Share] = {}

    def parts_of_loader(self) -> dict[str, Any]:
        """Return what takes the place of parts of the loader, by their names."""
        return {"batch_sampler" if self._makes_batches else "sampler": self}

    def __len__(self) -> int:
        """Return the number of batches of this process, by what the sampler says."""
        whole, rest = divmod(len(self._batches), self._num_processes)
        return whole if self._drop_last or rest == 0 else whole + 1

    def start(self, seed: int, epoch: int, first_step: int) -> None:
        """Take the first batches of an epoch from the sampler. Collective.

        The order is the sampler's, whatever the seed.

        Raises:
            ValueError: If they are no lists of indices.
        """
        self.shares = {}
        batches = self._own_batches()
        # The first one now, before others draw from the same generator.
        self._own = chain([*islice(batches, 1)], batches)

    def _own_batches(self) -> Iterator[list[Any]]:
        undrawn, each, step = (b for b in self._batches), self._num_processes, 0
        has_length = length_of(self._batches) is not None
        number = None if has_length else _STEPS_AT_A_TIME * each
        while True:
            batches = self._draw(islice(undrawn, number))
            for first in range(0, len(batches), each):
                group = batches[first : first + each]
                if len(group) < each:
                    if self._drop_last:
                        return
                    indices = [*chain(*group)]
                    bounds = [share_bounds(len(indices), each, p) for p in range(each)]
                    group = [indices[first:last] for first, last in bounds]
                own = group[self._process_index]
                self.shares[step] = Share(sum(map(len, group)), is_filler=not own)
                yield own or next(batch for batch in group if batch)[-1:]
                step += 1
            if number is None or len(batches) < number:
                return

    def _draw(self, undrawn: Iterator[Any]) -> list[list[Any]]:
        batches: list[list[Any]] = []
        error: Exception | None = None
        if self._process_index == 0:
            try:
                batches = [self._checked(batch) for batch in undrawn]
            except Exception as raised:
                error = raised
        distributed.raise_on_all(error)
        return distributed.object_from_main_process(batches)

    def _checked(self, batch: Any) -> list[Any]:
        if not isinstance(batch, (list, tuple)):
            raise ValueError(
                "A DataLoader with batch_size=None cannot be shared by "
                f"{self._num_processes} processes unless its sampler yields lists of "
                f"indices, got {batch!r}. Pass a batch_sampler, or a batch_size."
            )
        return list(batch)

    def share_of(self, step: int) -> Share:
        """Return what this process has of a step."""
        return self.shares[step]

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield the indices of each batch of this process."""
        return self._own


class _OfLastStep(NamedTuple):
    """A sample or a batch of a step that is not full, on its way from a worker."""

    content: Any
    share: Share


class SharedStream(IterableDataset[Any]):
    """The share of one process in the samples of a stream, which it reads whole.

    All processes have to read the same: the random numbers that the stream draws from
    the global generators follow from the seed, the epoch and the step, and the
    generators are left as they were.

    Args:
        loader: The loader with the stream.
        num_processes: Number of processes.
        process_index: Which of them this is.

    Attributes:
        shares: What this process has of the steps that are not full, once loaded.
    """

    def __init__(
        self, loader: DataLoader[Any], num_processes: int, process_index: int
    ) -> None:
        assert loader.batch_size is not None
        self._stream: Any = loader.dataset
        self._collate = loader.collate_fn
        self._step_size = loader.batch_size * num_processes
        self._drop_last = loader.drop_last
        self._num_processes = num_processes
        self._process_index = process_index
        self.shares: dict[int, Share] = {}
        # Seed, epoch and first step of the iteration, which workers that are kept for
        # several epochs have to see too.
        self._place = torch.zeros(3, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def parts_of_loader(self) -> dict[str, Any]:
        """Return what takes the place of parts of the loader, by their names."""
        return {"dataset": self, "collate_fn": partial(_collate, self._collate)}

    def __len__(self) -> int:
        """Return the number of samples of this process; TypeError if it is unknown."""
        whole, rest = divmod(len(self._stream), self._step_size)
        first, last = self._bounds(self._step_size)
        own = whole * (last - first)
        if self._drop_last:
            return own
        first, last = self._bounds(rest)
        return own + (max(last - first, 1) if rest else 0)

    def start(self, seed: int, epoch: int, first_step: int) -> None:
        """Let the next iteration begin at a step, where the stream has been set."""
        self._place.copy_(torch.tensor([seed, epoch, first_step]))
        self.shares = {}

    def share_of(self, step: int) -> Share:
        """Return what this process has of a step that has been loaded."""
        return self.shares.get(step, Share(self._step_size, is_filler=False))

    def _bounds(self, num_samples: int) -> tuple[int, int]:
        return share_bounds(num_samples, self._num_processes, self._process_index)

    def __iter__(self) -> Iterator[Any]:
        """Yield the samples of this process."""
        for samples in self._steps():
            first, last = self._bounds(len(samples))
            if len(samples) == self._step_size:
                yield from samples[first:last]
            elif not self._drop_last:
                share = Share(len(samples), is_filler=first == last)
                own = samples[first:last] or samples[-1:]
                yield from (_OfLastStep(sample, share) for sample in own)

    def _steps(self) -> Iterator[list[Any]]:
        worker = get_worker_info()
        seed, epoch, step = self._place.tolist()
        place = (seed, epoch, 0 if worker is None else worker.id)
        with seeded(derive_seed(*place, step)):
            # islice would ask the stream of a user for its iterator again each time.
            stream = (sample for sample in self._stream)
        while True:
            with seeded(derive_seed(*place, step)):
                samples = list(islice(stream, self._step_size))
            if samples:
                yield samples
            if len(samples) < self._step_size:
                return
            step += 1


def _collate(collate_fn: Callable[[Any], Any], samples: Any) -> Any:
    """Make a batch; one of the samples of a step that is not full says so."""
    first = samples[0]
    if not isinstance(first, _OfLastStep):
        return collate_fn(samples)
    return _OfLastStep(collate_fn([each.content for each in samples]), first.share)


def emptied(batch: Any) -> Any:
    """Return a batch of one sample without that sample.

    Args:
        batch: A nested structure of tensors, and of lists with a member for the sample.
    """
    if isinstance(batch, Tensor):
        return batch[:0] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {name: emptied(member) for name, member in batch.items()}
    if isinstance(batch, (list, tuple)):
        members = [] if _is_the_sample(batch) else [emptied(each) for each in batch]
        is_named = hasattr(batch, "_make")
        return type(batch)(*members) if is_named else type(batch)(members)
    return batch


def _is_the_sample(members: Any) -> bool:
    """Say whether a list has a member for each sample, and not one for each column."""
    if len(members) != 1:
        return False
    (member,) = members
    is_column = isinstance(member, Tensor) and member.shape[:1] == (1,)
    return not is_column and not isinstance(member, (list, tuple))
