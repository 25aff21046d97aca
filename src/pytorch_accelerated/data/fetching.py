"""Fetching the samples of a batch, under random numbers of the batch's own."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

from pytorch_accelerated.data.order import SeededIndices
from pytorch_accelerated.errors import add_note


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


class BatchDataset(Dataset[Any]):
    """Fetches and collates a whole batch under the batch's own random seed."""

    def __init__(self, dataset: Any, collate_fn: Any) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self._collate_here = _collate_here if is_as_usual(collate_fn) else collate_fn
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


def is_as_usual(collate_fn: Any) -> bool:
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
        if type(dataset) is not TensorDataset or not is_as_usual(loader.collate_fn):
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


def seed_everything(seed: int) -> None:
    """Seed the global generators of python, numpy and torch in this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
