"""Writing while the caller goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable


class BackgroundWriter:
    """Runs one write at a time on a thread of its own.

    An error is kept, and raised by the next :meth:`start` or :meth:`wait`. Python does
    not exit before a write has ended.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Run a write in the background, once the one before has ended.

        Args:
            write: What to run. It must not use anything that the caller changes.

        Raises:
            Exception: What the write before has raised; then this one is not started.
        """
        self.wait()
        self._thread = threading.Thread(
            target=self._run, args=(write,), name="checkpoint writer"
        )
        self._thread.start()

    def _run(self, write: Callable[[], object]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait for the write to end, if there is one.

        Raises:
            Exception: What it has raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
