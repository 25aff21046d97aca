"""Worker processes of data loaders: how many, seeding them, and ending them."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    default_collate,
    get_worker_info,
)

from pytorch_accelerated import compat
from pytorch_accelerated.data.fetching import BatchDataset, InMemoryDataset
from pytorch_accelerated.data.order import SeededBatch


class _AutoNumWorkers(int):
    """Stands for "measure what is best" among a loader's arguments."""


AUTO_NUM_WORKERS = _AutoNumWorkers(0)

# What it takes to get a batch from a worker process, with room for a slow machine.
HAND_OVER_SECONDS = 2e-3

# What may never end, such as waiting for a thread that a fork has left behind.
_MEASURING_SECONDS = 10.0

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
        args=(sender, BatchDataset(dataset, collate_fn), indices),
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


def _send_seconds(sender: Any, batches: BatchDataset, indices: list[int]) -> None:
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
            batches.fetch_here(SeededBatch(indices, seed=0))
            seconds.append(time.perf_counter() - start)
        sender.send(min(seconds))


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
    length = len(dataset) if hasattr(dataset, "__len__") else 0
    is_stream = isinstance(dataset, IterableDataset)
    if most == 0 or length == 0 or is_stream or not are_processes_forked():
        return 0
    collate_fn = arguments.get("collate_fn")
    if InMemoryDataset.of(DataLoader(dataset, collate_fn=collate_fn)) is not None:
        return 0
    indices = list(range(min(arguments.get("batch_size") or 1, length)))
    try:
        seconds = _seconds_in_a_worker(dataset, collate_fn or default_collate, indices)
    except Exception:
        return 0  # the dataset fails: the run will show how, with its own traceback
    return most if seconds > HAND_OVER_SECONDS else 0


def are_processes_forked() -> bool:
    """Say whether new processes are forked, and do not start with the user's script."""
    # Asked in the usual way, torch would take its default for chosen.
    chosen = torch.multiprocessing.get_start_method(allow_none=True)
    return (chosen or torch.multiprocessing.get_all_start_methods()[0]) == "fork"


def usable_cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


class LastIteration:
    """Remembers the last iteration over a loader whose workers may have to be ended.

    The traceback of an error keeps an iteration, and with it the workers, for as long
    as the error itself is kept, for instance by a notebook.
    """

    def __init__(self) -> None:
        self._iterator: Any = None

    def of(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Start an iteration."""
        self._iterator = None
        if not getattr(loader, "num_workers", 0):
            return iter(loader)
        with _ctrl_c_deferred():
            iterator = iter(loader)
            if not compat.has_workers(iterator):
                return iterator
            self._iterator = weakref.ref(iterator)
        return _naming_dead_workers(iterator)

    def stop_workers(self) -> None:
        """End the workers of the iteration."""
        iterator = self._iterator and self._iterator()
        if iterator is not None:
            compat.stop_workers(iterator)


@contextmanager
def _ctrl_c_deferred() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block, in which processes are started.

    Python may lose it where it forks, and torch the workers that it has started so far.
    Pressed once more, it does not wait.
    """
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not callable(before) or not is_main:
        yield
        return
    process = os.getpid()
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        is_worker = os.getpid() != process
        if is_worker and get_worker_info() is None:
            os._exit(0)  # torch would say that one that is just starting has failed
        if is_worker or received:
            before(number, frame)
        received.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)


def _naming_dead_workers(batches: Any) -> Iterator[Any]:
    """Yield batches from workers; raise the error of torch if one dies.

    If it dies while a batch is taken over from it, torch may raise what comes of that.
    """
    try:
        yield from batches
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        workers = compat.workers_of(batches)
        ended = wait([worker.sentinel for worker in workers], timeout=1)
        dead = [str(worker.pid) for worker in workers if worker.sentinel in ended]
        if not dead:
            raise
        raise RuntimeError(
            f"DataLoader worker (pid(s) {', '.join(dead)}) exited unexpectedly"
        ) from error
