"""Worker processes of data loaders: starting them, watching them, ending them."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

from torch.utils.data import get_worker_info

# After which a worker that is still at one batch says where it is, if the loader has no
# timeout; else it does so after this share of it.
_STUCK_SECONDS = 300.0
_STUCK_SHARE = 0.8

_TIMER_SETTINGS = 10  # within the time that a block may take


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


class StuckReport:
    """Prints the stack of this process to its standard error if a block takes too long.

    ::

        report = StuckReport(seconds=60)
        with report:
            load_a_batch()

    The timer of faulthandler, which does it, also goes off where code in C never comes
    back. Setting it takes longer than loading a small batch does. So it goes on from
    block to block, is set anew only now and then, and what it prints between two blocks
    goes nowhere.

    Where the standard error is no file, as in some notebooks, nothing is printed.

    Args:
        seconds: How long a block may take; the timer may be a tenth of it early.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._set_again_at = -math.inf
        # Descriptors: what the timer prints to, and what that stands for.
        self._output = self._error = self._nowhere = -1

    def __enter__(self) -> None:
        if time.monotonic() >= self._set_again_at:
            self._set_timer()
        if self._output >= 0:
            os.dup2(self._error, self._output, inheritable=False)

    def __exit__(self, *exception: object) -> None:
        if self._output >= 0:
            os.dup2(self._nowhere, self._output, inheritable=False)

    def _set_timer(self) -> None:
        self._set_again_at = math.inf
        with suppress(AttributeError, OSError, RuntimeError, ValueError):
            if self._output < 0:
                self._error = os.dup(sys.stderr.fileno())
                self._nowhere = os.open(os.devnull, os.O_WRONLY)
                self._output = os.dup(self._error)
            faulthandler.dump_traceback_later(self._seconds, file=self._output)
            self._set_again_at = time.monotonic() + self._seconds / _TIMER_SETTINGS


def report_before(timeout: float) -> StuckReport:
    """Return the report of a worker whose loader has a timeout, in seconds; 0: none."""
    return StuckReport(_STUCK_SHARE * timeout if timeout else _STUCK_SECONDS)
