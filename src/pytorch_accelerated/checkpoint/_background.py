"""Writing while the caller goes on."""

from __future__ import annotations

import atexit
import mmap
import threading
from collections.abc import Callable

_MEMORY_OF_A_THREAD = 1 << 25


class BackgroundWriter:
    """Runs one write at a time on a thread of its own.

    An error is kept, and raised by the next :meth:`start` or :meth:`wait`. Python does
    not exit before a write has ended, unless it was abandoned.
    """

    def __init__(self) -> None:
        # A join that is interrupted takes a thread for ended: the event tells.
        self._write: tuple[threading.Event, threading.Thread] | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Run a write in the background, once the one before has ended.

        Args:
            write: What to run. It must not use anything that the caller changes.

        Raises:
            Exception: What the write before has raised; then this one is not started.
        """
        self.wait()
        ended = threading.Event()
        thread = threading.Thread(
            target=self._run, args=(write, ended), name="checkpoint writer", daemon=True
        )
        try:
            # Without this much, start() may wait for ever.
            mmap.mmap(-1, _MEMORY_OF_A_THREAD).close()
            thread.start()
        except (MemoryError, OSError, RuntimeError):  # the caller waits
            self._run(write, ended)
        else:
            self._write = ended, thread
            atexit.register(self.wait)

    def _run(self, write: Callable[[], object], ended: threading.Event) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error
        finally:
            ended.set()

    def wait(self) -> None:
        """Wait for the write to end, if there is one.

        Raises:
            Exception: What it has raised.
        """
        if self._write is not None:
            ended, thread = self._write
            ended.wait()
            thread.join()
            self.abandon()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def abandon(self) -> None:
        """Wait for the write no more; the exit of Python may cut it short."""
        self._write = None
        atexit.unregister(self.wait)
