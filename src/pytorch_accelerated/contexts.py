"""Context managers that an error passes through unchanged, whatever it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import ParamSpec, TypeVar, cast

Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")


def contextmanager(
    func: Callable[Parameters, Iterator[Value]],
) -> Callable[Parameters, AbstractContextManager[Value]]:
    """Make a context manager of a function that yields once.

    That of contextlib sets an attribute of each error that passes. Where the error is a
    frozen dataclass, which has been made of what a user raised, that fails, and the
    ``FrozenInstanceError`` takes its place.
    """

    @functools.wraps(func)
    def create(
        *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> AbstractContextManager[Value]:
        return _Context(cast("Generator[Value, None, None]", func(*args, **kwargs)))

    return create


class _Context(AbstractContextManager[Value]):
    def __init__(self, steps: Generator[Value, None, None]) -> None:
        self._steps = steps

    def __enter__(self) -> Value:
        return next(self._steps)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is None:
            next(self._steps, None)
            return False
        try:
            self._steps.throw(error)
        except StopIteration:
            return True
        except BaseException as raised:
            # Python replaces a StopIteration that leaves a generator.
            is_same = raised is error or (
                isinstance(error, StopIteration) and raised.__cause__ is error
            )
            if not is_same:
                raise
            error.with_traceback(traceback)
        return False
