"""Worker processes of data loaders: starting them, and ending them."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

from torch.utils.data import get_worker_info


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
        has_workers = getattr(loader, "_iterator", None) is not None
        with nullcontext() if has_workers else _ctrl_c_deferred():
            iterator = iter(loader)
            if not hasattr(iterator, "_shutdown_workers"):
                return iterator
            self._iterator = weakref.ref(iterator)
        return _naming_dead_workers(iterator)

    def stop_workers(self) -> None:
        """End the workers of the iteration."""
        iterator = self._iterator and self._iterator()
        if iterator is not None:
            with suppress(RuntimeError):  # one has died before
                iterator._shutdown_workers()


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
        ended = wait([worker.sentinel for worker in batches._workers], timeout=1)
        dead = [str(each.pid) for each in batches._workers if each.sentinel in ended]
        if not dead:
            raise
        raise RuntimeError(
            f"DataLoader worker (pid(s) {', '.join(dead)}) exited unexpectedly"
        ) from error
