"""The errors that a caller of the library may want to catch.

::

    Exception
    ├── StopTrainingError                  ends a run in order
    │   ├── NonFiniteLossError             the loss became NaN or infinite
    │   └── TrainingInterruptedError       a signal asked the process to stop
    ├── CheckpointError                    a checkpoint could not be written or read
    ├── CallbackMethodNotImplementedError  kept for scripts that catch it, never raised
    └── UserWarning
        └── TrainingWarning                what is probably a mistake; the run goes on

Wrong arguments raise the built-in ``ValueError``, ``TypeError`` and ``KeyError``.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any


class StopTrainingError(Exception):
    """Raise this in a hook or a callback to end the run in order.

    The end events of the run are still called, and ``train()`` returns as if it had
    reached its last epoch. On several processes all of them stop together, at the end
    of the update under way.

    In a method of the step itself, such as ``calculate_train_batch_loss``, all
    processes have to raise it: the others would wait for the gradients of the one that
    did.

    Attributes:
        reaches_caller: Whether ``train()`` raises it once the run has ended in order.
    """

    reaches_caller: bool = False


class NonFiniteLossError(StopTrainingError):
    """The loss became NaN or infinite.

    The end events of the run are still called; then ``train()`` raises this error.
    """

    reaches_caller = True


class TrainingInterruptedError(StopTrainingError):
    """A signal asked the process to stop before the run was complete.

    The end events of the run are still called; then ``train()`` returns with
    ``trainer.interrupted`` set.
    """


class CheckpointError(Exception):
    """A checkpoint could not be written, found, or trusted.

    The message names the file and the reason.
    """


class CallbackMethodNotImplementedError(Exception):
    """Kept because scripts import it; the library no longer raises it.

    A callback without a method for an event is skipped, and an attribute that is
    missing inside a callback raises Python's own ``AttributeError``.
    """


class TrainingWarning(UserWarning):
    """Something that is probably a mistake, or that was asked for and is not done.

    All warnings of the library are of this category, so that one line silences them or
    makes them errors::

        warnings.simplefilter("ignore", TrainingWarning)
        warnings.simplefilter("error", TrainingWarning)
    """


_NOTES_ARE_SHOWN = sys.version_info >= (3, 11)

# Whose lines a user cannot change.
_BETWEEN = {"pytorch_accelerated", "accelerate", "contextlib", "functools", "torch"}


def warn(message: str) -> None:
    """Give a :class:`TrainingWarning` at the line of the user's that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _package_of(frame) in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, TrainingWarning, stacklevel=level)


def _package_of(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0]


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an error, also to one that is a frozen dataclass.

    Before Python 3.11 nothing shows notes: there it ends the message, if the error has
    no other arguments.
    """
    set_attribute(error, "__notes__", [*getattr(error, "__notes__", ()), note])
    if not _NOTES_ARE_SHOWN and [type(part) for part in error.args] in ([], [str]):
        set_attribute(error, "args", ("\n".join([*error.args, note]),))


def set_attribute(error: BaseException, name: str, value: Any) -> None:
    """Set an attribute of an error, also of one that is a frozen dataclass."""
    object.__setattr__(error, name, value)
