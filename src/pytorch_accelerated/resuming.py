"""Finding the place in the data from which a resumed run goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from pytorch_accelerated.errors import CheckpointError, warn
from pytorch_accelerated.progress import RunProgress


@dataclass(frozen=True)
class BatchLayout:
    """How a run cuts an epoch into batches and windows.

    Args:
        num_samples: Samples of an epoch; None where batches are not the trainer's own.
        batch_size: Samples in a batch of one process, if known.
        num_processes: Number of processes.
        accumulation: Batches of one process in a window.
    """

    num_samples: int | None
    batch_size: int | None
    num_processes: int
    accumulation: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def num_samples_done(self, progress: RunProgress) -> int | None:
        """Return how many samples of the current epoch are done, if that is known."""
        if self.num_samples is None or self.batch_size is None:
            return None
        done = progress.step * self.batch_size * self.num_processes
        return min(progress.first_sample + done, self.num_samples)

    def differences(self, other: BatchLayout) -> str:
        """Say what another run has different from this one; "" for nothing."""
        words = {
            "batch_size": "batch size",
            "num_processes": "number of processes",
            "accumulation": "gradient accumulation",
        }
        return ", ".join(
            f"{text} {getattr(other, name)} instead of {getattr(self, name)}"
            for name, text in words.items()
            if getattr(self, name) != getattr(other, name)
        )


def count_updates_left(
    progress: RunProgress, layout: BatchLayout, num_epochs: int
) -> int:
    """Return how many updates are left of a run whose batches are the trainer's own.

    Args:
        progress: Where it stands.
        layout: How it cuts its epochs.
        num_epochs: Its epochs, those that are done included.
    """
    assert layout.num_samples is not None
    assert layout.batch_size is not None
    in_update = layout.batch_size * layout.num_processes * layout.accumulation
    whole = math.ceil(layout.num_samples / in_update)
    left = layout.num_samples - (layout.num_samples_done(progress) or 0)
    epochs = num_epochs - progress.epochs_done
    return math.ceil(left / in_update) + whole * (epochs - 1) if epochs > 0 else 0


def find_place(
    progress: RunProgress, then: BatchLayout, now: BatchLayout
) -> RunProgress:
    """Return the progress from which a run goes on with the batches that it has now.

    Each sample of a shuffled epoch is still seen once: the place in the order is kept.
    A window of accumulation that was begun is begun again.

    Args:
        progress: Where the saved run stood.
        then: How it cut its epochs.
        now: How this run does.

    Raises:
        CheckpointError: If there is no such place.
    """
    is_amid_epoch = progress.step > 0 or progress.first_sample > 0
    if is_amid_epoch and then.num_samples != now.num_samples:
        raise CheckpointError(
            "The run was saved in the middle of an epoch of "
            f"{_count(then.num_samples)}, and the training data has "
            f"{_count(now.num_samples)} now, so the place in it cannot be found. "
            "Resume with the same data, or from a state saved at the end of an epoch."
        )
    if not (differences := then.differences(now)):
        return progress
    samples_done = then.num_samples_done(progress)
    if is_amid_epoch and samples_done is None:
        raise CheckpointError(
            f"The run goes on with {differences}, in the middle of an epoch whose "
            "batches come from a loader or sampler of yours: its place cannot be "
            "found. Resume with the same, or from a state saved at the end of an epoch."
        )
    warn(
        f"The run goes on with {differences}. It keeps its place in the data, and each "
        "sample is seen once in an epoch; but batches, random numbers and the number "
        "of updates in an epoch, which a schedule may count on, are not those of the "
        "run that was saved."
    )
    if not is_amid_epoch:
        return progress
    open_batches = progress.step % then.accumulation
    at_window = replace(progress, step=progress.step - open_batches)
    return replace(progress, step=0, first_sample=then.num_samples_done(at_window) or 0)


def check_schedule_is_long_enough(scheduler: Any, num_updates: int) -> None:
    """Refuse a schedule that would raise an error in the middle of the run.

    Args:
        scheduler: The scheduler, in the state that was saved.
        num_updates: Updates that the run will have made at its end.

    Raises:
        CheckpointError: If it cannot be stepped that often.
    """
    total_steps = getattr(scheduler, "total_steps", None)
    if isinstance(total_steps, int) and num_updates > total_steps:
        raise CheckpointError(
            f"The {type(scheduler).__name__} of the saved run ends after {total_steps} "
            f"updates, and with the epochs and batches that the run has now it would "
            f"make {num_updates}. Resume with the same, or use a schedule that stays "
            "at its last value, such as those of this library."
        )


def _count(num_samples: int | None) -> str:
    return (
        "an unknown number of samples"
        if num_samples is None
        else f"{num_samples} samples"
    )


def skip_batches(batches: Iterator[Any], number: int, loader: Any) -> None:
    """Take the batches that are done from a loader that cannot leave them out itself.

    Args:
        batches: The iterator of the loader.
        number: How many.
        loader: The loader, for the message.
    """
    if number == 0:
        return
    is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
    warn(
        f"To find its place, the run loads {number} batches again that it has trained "
        "on. "
        + (
            "A dataset or loader with state_dict() and load_state_dict() would be set "
            "there at once."
            if is_stream
            else "The loader or sampler is yours: whether they are the same batches "
            "depends on its order being the same in each run."
        )
    )
    for _ in range(number):
        next(batches, None)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what has been accumulated on the weights of a model, by their names."""
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def set_gradients(model: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Put gradients back on the weights that they belong to."""
    for name, parameter in model.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter)
