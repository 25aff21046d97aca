"""The errors that a caller of the library may want to catch.

::

    Exception
    ├── StopTrainingError                  ends a run in order
    │   └── NonFiniteLossError             the loss became NaN or infinite
    ├── CheckpointError                    a checkpoint could not be written or read
    └── CallbackMethodNotImplementedError  kept for scripts that catch it, never raised

Wrong arguments raise the built-in ``ValueError``, ``TypeError`` and ``KeyError``.
"""

from __future__ import annotations


class StopTrainingError(Exception):
    """Raise this in a hook or a callback to end the run in order.

    The end events of the run are still called, and ``train()`` returns as if it had
    reached its last epoch. On several processes all of them stop together, at the end
    of the update under way.

    In a method of the step itself, such as ``calculate_train_batch_loss``, all
    processes have to raise it: the others would wait for the gradients of the one that
    did.
    """


class NonFiniteLossError(StopTrainingError):
    """The loss became NaN or infinite.

    The end events of the run are still called; then ``train()`` raises this error.
    """


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
