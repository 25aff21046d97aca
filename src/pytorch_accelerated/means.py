"""The losses and scalars of an epoch, as true means over all items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pytorch_accelerated import step_output
from pytorch_accelerated.step_output import NumItems

if TYPE_CHECKING:
    from pytorch_accelerated.metrics import EpochMetrics


class Means:
    """The means of what the steps of an epoch return, on this process.

    Args:
        metrics: What is to see the outputs themselves, if anything.

    Attributes:
        loss: That of the losses.
        scalars: Those of the other numbers, by their names.
        metrics: As given.
    """

    def __init__(self, metrics: EpochMetrics | None = None) -> None:
        self.metrics = metrics
        self.loss: LossTracker = LossTracker()
        self.scalars: dict[str, LossTracker] = {}

    def add_scalars(self, batch_output: Mapping[str, Any], num_items: NumItems) -> None:
        """Add the scalars of a batch, without waiting for the device.

        Args:
            batch_output: What the step returned.
            num_items: Items that its means are over.
        """
        for name, value in batch_output.items():
            if step_output.is_recorded(name, value):
                if name not in self.scalars:
                    self.scalars[name] = LossTracker()
                self.scalars[name].update(value, num_items)

    def totals(self) -> dict[str, tuple[float, float]]:
        """Return the sum over the items and their number for each name.

        Waits for the device once.
        """
        trackers = {"loss": self.loss, **self.scalars}
        sums = [each.total_loss for each in trackers.values()]
        sums += [each.running_count for each in trackers.values()]
        read = read_numbers(sums)
        both = zip(read[: len(trackers)], read[len(trackers) :], strict=True)
        return dict(zip(trackers, both, strict=True))

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the sums as plain numbers."""
        trackers = {"loss": self.loss, **self.scalars}
        return {name: tracker.state_dict() for name, tracker in trackers.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on from the sums that :meth:`state_dict` returned."""
        self.scalars = {name: LossTracker() for name in state if name != "loss"}
        for name, sums in state.items():
            (self.loss if name == "loss" else self.scalars[name]).load_state_dict(sums)


class LossTracker:
    """Keeps the mean of a loss over all samples (or tokens) seen since the last reset.

    Each batch's loss, a mean over its own samples, is weighted with their number, so
    that batches of unequal size count as they should::

        tracker = LossTracker()
        tracker.update(1.0, batch_size=3)
        tracker.update(5.0, batch_size=1)
        tracker.average  # (1.0 * 3 + 5.0 * 1) / (3 + 1) = 2.0

    Losses and sizes may be tensors on any device. They are then summed on that device
    and the host does not wait for them until the mean is read, so :meth:`update` may be
    called at every step. Sums are kept in float64, whatever the precision of the loss
    (float32 on devices without float64, such as Apple's ``mps``).

    Attributes:
        loss_value: The loss of the last batch, as it was given but without its graph.
        total_loss: The sum of loss times batch size: a float, or a tensor with no
            dimensions once a loss came as a tensor. It turns NaN or infinite as soon
            as a loss is, and stays so.
        running_count: The sum of the batch sizes, likewise.
    """

    loss_value: float | torch.Tensor
    total_loss: float | torch.Tensor
    running_count: float | torch.Tensor
    _average: float = math.nan  # the last that was read, as scripts for 0.1.61 know it

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all losses."""
        self.loss_value = 0.0
        self.total_loss = 0.0
        self.running_count = 0

    def update(
        self,
        loss_batch_value: float | torch.Tensor,
        batch_size: float | torch.Tensor = 1,
    ) -> None:
        """Add the loss of one batch, without waiting for the device.

        Args:
            loss_batch_value: The mean loss of the batch, a number or a tensor with no
                dimensions; no reference to its graph is kept.
            batch_size: How many samples (or tokens) the loss is the mean of, a number
                or a tensor with no dimensions. A batch of the number 0 adds nothing,
                even if its loss is NaN.
        """
        if isinstance(loss_batch_value, torch.Tensor):
            loss_batch_value = _without_dimensions(loss_batch_value.detach())
        self.loss_value = loss_batch_value

        if isinstance(batch_size, torch.Tensor):
            self._add_counted_on_device(loss_batch_value, batch_size.detach())
        elif batch_size == 0:
            return
        elif isinstance(loss_batch_value, torch.Tensor):
            total = self._total_on(loss_batch_value.device)
            # Type promotion makes torch multiply and add in the precision of `total`.
            total.add_(loss_batch_value, alpha=batch_size)
            self.running_count += batch_size
        elif isinstance(loss_batch_value, Mapping):
            raise TypeError(
                "The loss of a batch is one number, or one tensor with no dimensions; "
                f"got a {type(loss_batch_value).__name__}. Where there are several "
                "losses, return one, such as their sum, as 'loss' from "
                "calculate_train_batch_loss and calculate_eval_batch_loss."
            )
        else:
            self.total_loss += loss_batch_value * batch_size
            self.running_count += batch_size

    @property
    def average(self) -> float:
        """The mean loss so far, NaN before the first sample.

        Reading it waits for the device once, if the losses are on one.
        """
        total, count = self.totals()
        self._average = total / count if count else math.nan
        return self._average

    def totals(self) -> tuple[float, float]:
        """Return the sum of loss times batch size, and the sum of the batch sizes.

        Add both over the processes of a distributed run, in float64, and divide them
        for the mean of the whole run. Waits for the device once.
        """
        total, count = read_numbers([self.total_loss, self.running_count])
        return total, count

    def state_dict(self) -> dict[str, float]:
        """Return the two sums as plain numbers, from which tracking goes on exactly."""
        total, count = self.totals()
        return {"total_loss": total, "running_count": count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from the sums that :meth:`state_dict` returned."""
        self.reset()
        self.total_loss = state["total_loss"]
        self.running_count = state["running_count"]

    def _add_counted_on_device(
        self, loss: float | torch.Tensor, batch_size: torch.Tensor
    ) -> None:
        if not isinstance(loss, torch.Tensor):
            loss = _scalar_on(batch_size.device, loss)
        elif batch_size.device != loss.device:
            # Asynchronous towards the device only: the host may read what it gets.
            to_device = loss.device.type != "cpu"
            batch_size = batch_size.to(loss.device, non_blocking=to_device)
        # The mean over nothing, which is NaN, adds nothing.
        loss = loss.masked_fill(batch_size == 0, 0.0)
        self._total_on(loss.device).addcmul_(loss, batch_size)
        self.running_count = _scalar_on(loss.device, self.running_count)
        self.running_count.add_(batch_size)

    def _total_on(self, device: torch.device) -> torch.Tensor:
        total = self.total_loss
        if not isinstance(total, torch.Tensor) or total.device != device:
            total = self.total_loss = _scalar_on(device, total)
        return total


def read_numbers(values: Sequence[float | torch.Tensor]) -> list[float]:
    """Return numbers and 1-element tensors as numbers, waiting for the device once."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    devices = [tensor.device for tensor in tensors]
    device = max(devices, key=lambda each: each.type != "cpu", default=None)
    flat = [tensor.detach().reshape(()).to(device) for tensor in tensors]
    read = iter(torch.stack(flat).tolist() if flat else ())
    return [
        next(read) if isinstance(value, torch.Tensor) else float(value)
        for value in values
    ]


def _without_dimensions(loss: torch.Tensor) -> torch.Tensor:
    if loss.dim() == 0:
        return loss
    if loss.numel() != 1:
        raise ValueError(
            "The loss of a batch must be a single number, got a tensor of shape "
            f"{tuple(loss.shape)}. Reduce it to the mean over the batch."
        )
    return loss.reshape(())


def _scalar_on(device: torch.device, value: float | torch.Tensor) -> torch.Tensor:
    """Return a value as a tensor with no dimensions, itself if it is one already."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    # Not `torch.tensor`, which copies from the host and waits for the device. And not
    # an inference tensor, which could not be updated outside of inference mode.
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)
