"""Fetching the samples of a batch, under random numbers of the batch's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

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

from pytorch_accelerated import compat
from pytorch_accelerated.data.order import SeededBatch
from pytorch_accelerated.errors import add_note


class _Generator(NamedTuple):
    """One of the global generators of the host that a dataset may draw from."""

    seed: Callable[[int], Any]
    get_state: Callable[[], Any]
    set_state: Callable[[Any], Any]


_TORCH = _Generator(
    torch.default_generator.manual_seed,
    torch.default_generator.get_state,
    torch.default_generator.set_state,
)
_PYTHON = _Generator(random.seed, random.getstate, random.setstate)
_NUMPY = _Generator(
    lambda seed: np.random.seed(seed % 2**32), np.random.get_state, np.random.set_state
)


class seeded:
    """Seeds the generators of the host in a block, and puts them back after it."""

    def __init__(
        self, seed: int, generators: Iterable[_Generator] = (_TORCH, _PYTHON, _NUMPY)
    ) -> None:
        self._seed, self._generators = seed, list(generators)

    def __enter__(self) -> None:
        self._before = [generator.get_state() for generator in self._generators]
        for generator in self._generators:
            generator.seed(self._seed)

    def __exit__(self, *error: object) -> None:
        for generator, state in zip(self._generators, self._before, strict=True):
            generator.set_state(state)


def seed_everything(seed: int) -> None:
    """Seed the global generators of python, numpy and torch in this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class BatchDataset(Dataset[Any]):
    """Fetches and collates a whole batch under random numbers of the batch's own.

    In the main process the random states stay as they are. Saving and restoring
    python's and numpy's generators costs more than fetching a small batch. So only
    torch's is always seeded; the other two are from the moment at which a batch is seen
    to draw from them, which is looked for in the first batch of every epoch. If one of
    them has moved by the next epoch, for whatever reason, it is seeded from then on: a
    later batch may have drawn from it.

    Args:
        dataset: The map-style dataset.
        collate_fn: Makes a batch of a list of samples.

    Attributes:
        is_first: Whether the next batch is the first of an epoch.
    """

    def __init__(self, dataset: Any, collate_fn: Any) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        is_default = compat.is_default_collate(collate_fn)
        self._collate_here = _collate_here if is_default else collate_fn
        self._fetches_whole_batches = hasattr(dataset, "__getitems__")
        self.is_first: bool = True
        self._drawn_from = [_TORCH]
        self._before_epoch: list[tuple[_Generator, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker that is not forked is sent, where all is seeded."""
        return {**vars(self), "_drawn_from": [], "_before_epoch": []}

    def __getitems__(self, batch: SeededBatch) -> Any:
        if get_worker_info() is None:
            return self.fetch_here(batch)
        seed_everything(batch.seed)
        return self.collate_fn(self._fetch(batch.indices))

    def fetch_here(self, batch: SeededBatch) -> Any:
        """Fetch in the main process, whose random state stays as it is."""
        if not self.is_first:
            with seeded(batch.seed, self._drawn_from):
                return self._collate_here(self._fetch(batch.indices))
        self.is_first = False
        self._note_draws_since(self._before_epoch)
        self._before_epoch = _states()
        with seeded(batch.seed):
            before = _states()
            collated = self._collate_here(self._fetch(batch.indices))
            self._note_draws_since(before)
        return collated

    def _note_draws_since(self, states: list[tuple[_Generator, Any]]) -> None:
        for generator, state in states:
            if generator not in self._drawn_from and not all(
                map(np.array_equal, generator.get_state(), state)
            ):
                self._drawn_from.append(generator)

    def _fetch(self, indices: list[int]) -> Any:
        dataset = self.dataset
        if self._fetches_whole_batches:
            return dataset.__getitems__(indices)
        samples: list[Any] = []
        try:
            for index in indices:
                samples.append(dataset[index])  # noqa: PERF401 (an error counts them)
        except Exception as error:
            add_note(error, f"Raised by sample {indices[len(samples)]}.")
            raise
        return samples


def _states() -> list[tuple[_Generator, Any]]:
    return [(generator, generator.get_state()) for generator in (_PYTHON, _NUMPY)]


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
    is_strided = type(value) is Tensor and value.layout is torch.strided
    return is_strided and not value.is_nested


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
        tensors = dataset.tensors if type(dataset) is TensorDataset else ()
        if (
            len({tensor.device for tensor in tensors}) != 1
            or any(type(tensor) is not Tensor for tensor in tensors)
            or not compat.is_default_collate(loader.collate_fn)
        ):
            return None
        if index is not None:  # which may count from the end
            index = torch.where(index < 0, index + len(dataset), index)
        return cls(tensors, index)

    def rows(self, order: Tensor) -> Tensor:
        """Return the entries of the tensors that an order of the samples stands for."""
        rows = order if self.index is None else self.index[order]
        return rows.to(self.tensors[0].device)

    def batch(self, rows: Tensor) -> list[Tensor]:
        """Return what fetching the samples one by one and collating them gives."""
        return [tensor.index_select(0, rows) for tensor in self.tensors]
