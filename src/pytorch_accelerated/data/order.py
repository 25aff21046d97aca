"""The order of the samples, and their split over processes, as plain functions.

Nothing here loads anything: a loop written by hand can reproduce a run with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler


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
    than processes are left, some processes have none. They are given a sample that
    another process has too, so that they take part in the collectives; the trainer
    gives such a batch no weight.

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
        first_batch_size: The batch size that says what is left out with ``drop_last``,
            if the batches have become smaller since.

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
    first_batch_size: int | None = None

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
        if not self.drop_last or self.first_batch_size is None:
            return self.length
        return self.length - self.length % (self.first_batch_size * self.num_processes)

    def with_batch_size(self, batch_size: int) -> BatchPlan:
        """Return a plan for the same samples in batches of another size."""
        first_batch_size = self.first_batch_size or self.batch_size
        return replace(self, batch_size=batch_size, first_batch_size=first_batch_size)

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


def share_bounds(total: int, parts: int, part: int) -> tuple[int, int]:
    """Return ``(first, past_last)`` of one of ``parts`` neighbouring, even shares.

    Their sizes differ by at most one, and the first ones are the larger ones.
    """
    size, larger = divmod(total, parts)
    first = part * size + min(part, larger)
    return first, first + size + (part < larger)


class SeededBatch(NamedTuple):
    """The indices of a batch, and the seed that its random numbers come from."""

    indices: list[int]
    seed: int


@dataclass(eq=False)
class PlannedBatchSampler(Sampler[SeededBatch]):
    """Yields the batches of one process, as a plan and a seed say.

    Args:
        plan: Which positions form which batch.
        process_index: The process whose batches are yielded.
        seed: The data seed of the run.
        shuffle: Whether the order is :func:`epoch_order` or that of the dataset.
        epoch: Number of the epoch, from 1.
        first_step: The first batch that is yielded.
    """

    plan: BatchPlan
    process_index: int
    seed: int
    shuffle: bool
    epoch: int = 1
    first_step: int = 0

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

    def __iter__(self) -> Iterator[SeededBatch]:
        """Yield the indices of each batch, with the batch's seed."""
        order = self.order().tolist()
        # The seed is derive_seed(seed, epoch, step, process), begun once an epoch. If
        # steps are counted from a later sample, that comes between epoch and step.
        first = self.plan.first
        of_epoch = _mix(0, self.seed, self.epoch, *([first] if first else []))
        for step, first, last in self.positions():
            seed = _mix(of_epoch, step, self.process_index) >> 1
            yield SeededBatch(order[first:last], seed)
