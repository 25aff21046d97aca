"""Looking for a learning rate and a batch size, with runs that leave no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch.utils.data import IterableDataset

from pytorch_accelerated import checks, distributed, plotting
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.data import loaders
from pytorch_accelerated.errors import StopTrainingError
from pytorch_accelerated.means import LossTracker
from pytorch_accelerated.rehearsal import rehearsal

if TYPE_CHECKING:
    import numpy.typing as npt

    from pytorch_accelerated.trainer import Trainer

__all__ = [
    "LearningRateCurve",
    "TrainArguments",
    "find_batch_size",
    "find_learning_rate",
]

_FEWEST_UPDATES = 10
_UPDATES_BETWEEN_READS = 10


class TrainArguments(TypedDict, total=False):
    """What the finders pass on to ``train()``, so that their steps are those of a run.

    See :meth:`Trainer.train() <pytorch_accelerated.trainer.Trainer.train>`.
    """

    per_device_batch_size: int
    gradient_accumulation_steps: int
    gradient_clip_value: float | None
    gradient_clip_norm: float | None
    train_dataloader_kwargs: Mapping[str, Any] | None
    collate_fn: Callable[[list[Any]], Any] | None


@dataclass(frozen=True)
class LearningRateCurve:
    """The losses of a run whose learning rate grew from update to update.

    Attributes:
        learning_rates: That of each update, of the parameter group with the highest.
        losses: The loss of each update, the mean over all its samples, calculated
            before it; up to the one at which the loss had diverged.
        suggestion: The learning rate at which the smoothed loss fell fastest; None if
            there is nothing to go by.
        reason: Why there is no suggestion.
    """

    learning_rates: tuple[float, ...] = field(repr=False)
    losses: tuple[float, ...] = field(repr=False)
    suggestion: float | None = None
    reason: str = ""

    def plot(self, ax: Any = None) -> Any:
        """Draw the curve with matplotlib.

        Args:
            ax: The matplotlib axes to draw on; new ones if left out.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        if ax is None:
            ax = plotting.new_axes()
        smoothed = _smooth(self.losses)
        ax.plot(self.learning_rates, self.losses, alpha=0.4, label="loss of an update")
        ax.plot(self.learning_rates, smoothed, label="smoothed")
        if self.suggestion is not None:
            label = f"suggestion: {self.suggestion:.2g}"
            ax.axvline(self.suggestion, linestyle="--", color="black", label=label)
        # Single losses at the end, where it diverges, would hide the rest.
        ax.set_ylim(min(self.losses, default=0), max(smoothed, default=1))
        ax.set(xscale="log", xlabel="learning rate", ylabel="loss")
        ax.legend()
        return ax


def find_learning_rate(
    trainer: Trainer,
    dataset: Any,
    min_lr: float,
    max_lr: float,
    num_updates: int,
    arguments: TrainArguments,
) -> LearningRateCurve:
    """Do what the trainer's method of this name says."""
    method = "find_learning_rate()"
    checks.check_is_at_least("num_updates", num_updates, _FEWEST_UPDATES)
    if not 0 < min_lr < max_lr < math.inf:
        raise ValueError(
            "Learning rates are needed with 0 < min_lr < max_lr, got "
            f"min_lr={min_lr!r} and max_lr={max_lr!r}."
        )
    _check_arguments(method, arguments)
    groups = getattr(trainer.optimizer, "param_groups", ())
    if any(group.get("lr") is None for group in groups):
        raise ValueError(
            f"{method} sets the learning rate 'lr' of the optimizer's parameter groups,"
            f" but {type(trainer.optimizer).__name__} has one without."
        )
    rates = np.geomspace(min_lr, max_lr, num_updates).tolist()
    test = _RangeTest(rates)
    with rehearsal(trainer, method, dataset, test):
        # Overrides of train() may need both.
        trainer.train(
            dataset, num_updates, max_num_train_steps=num_updates, **arguments
        )
        losses = test.losses()
    return _curve_of(rates, losses)


def find_batch_size(
    trainer: Trainer,
    dataset: Any,
    max_batch_size: int | None,
    margin: float,
    arguments: TrainArguments,
) -> int:
    """Do what the trainer's method of this name says."""
    method = "find_batch_size()"
    _check_arguments(method, arguments)
    if isinstance(dataset, IterableDataset) or loaders.yields_batches(dataset):
        raise ValueError(
            f"{method} needs a dataset of known length, of which the trainer makes "
            f"batches itself, got a {type(dataset).__name__}."
        )
    if not trainer._engine.computes_alone:
        raise ValueError(f"{method} cannot be used with FSDP or DeepSpeed.")
    if max_batch_size is None and trainer.device.type == "cpu":
        raise ValueError(
            f"{method} needs a max_batch_size on a CPU, whose machine would end the "
            "process before it runs out of memory."
        )
    if not 0 <= margin < 1:
        raise ValueError(f"margin must be at least 0 and below 1, got {margin!r}.")
    loader_kwargs = dict(arguments.get("train_dataloader_kwargs") or {}, drop_last=True)
    loader_kwargs.pop("batch_size", None)
    # The second batch of an update finds the gradients of the first, the second update
    # the state of the optimizer; more would need no more memory.
    accumulation = min(arguments.get("gradient_accumulation_steps", 1), 2)

    def largest_up_to(size: int) -> int:
        """Train with batches of a size, halved as often as memory demands it."""
        trial: TrainArguments = {
            **arguments,
            "per_device_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "train_dataloader_kwargs": loader_kwargs,
        }
        trainer.train(
            dataset,
            num_epochs=2 * accumulation,
            max_num_train_steps=2,
            halve_batch_if_out_of_memory=True,
            **trial,
        )
        return trainer.run_config.train_per_device_batch_size or size

    most = max(1, len(dataset) // trainer._accelerator.num_processes)
    if max_batch_size is not None:
        most = min(most, max_batch_size)
    with rehearsal(trainer, method, dataset):
        first = min(arguments.get("per_device_batch_size", 8), most)
        tried = found = largest_up_to(first)
        if found < first:  # of which a divisor was found, as of 13 only 1
            most = first - 1
        while found == tried < most:
            tried = min(2 * tried, most)
            found = max(found, largest_up_to(tried))
    return max(1, int(found * (1 - margin)))


def _check_arguments(method: str, arguments: TrainArguments) -> None:
    known = list(TrainArguments.__annotations__)
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise TypeError(
            f"{method} got {', '.join(unknown)}. Of the arguments of train() it takes: "
            f"{', '.join(known)}."
        )


class _RangeTest(TrainerCallback):
    """Sets the learning rate of each update, and keeps its loss.

    Args:
        rates: Those of the updates.
    """

    def __init__(self, rates: list[float]) -> None:
        self._rates = rates
        self._updates: list[LossTracker] = []
        self._next = LossTracker()

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Note how the learning rates of the groups relate to each other."""
        self._groups = trainer.optimizer.param_groups  # type: ignore[union-attr]
        rates = [float(group["lr"]) for group in self._groups]
        self._shares = [rate / max(rates) if max(rates) else 1.0 for rate in rates]
        self._set_rate(self._rates[0])

    def on_train_step_end(
        self,
        trainer: Trainer,
        batch: Any,
        batch_output: Any,
        *,
        step: int = 0,
        **kwargs: Any,
    ) -> None:
        """Add a loss, and go on to the next learning rate if it ended an update.

        Raises:
            StopTrainingError: If the loss has diverged, or no update is applied.
        """
        run, num_due = trainer._run, len(self._rates)
        self._next.update(batch_output["loss"], run.items_of(batch_output, step)[0])
        num_updates = run.progress.num_updates
        if num_updates > len(self._updates):
            self._updates.append(self._next)
            self._next = LossTracker()
            if num_updates < num_due:
                self._set_rate(self._rates[num_updates])
            if num_updates % max(_UPDATES_BETWEEN_READS, num_due // 10) == 0:
                losses = self.losses()
                if _num_before_divergence(losses) < len(losses):
                    raise StopTrainingError
        # A scaled update of which the gradients overflow is not applied.
        if run.progress.num_steps > 2 * num_due * run.accumulation.steps_per_window:
            raise StopTrainingError

    def losses(self) -> list[float]:
        """Read the losses of the updates from the device. Collective."""
        totals = {str(n): each.totals() for n, each in enumerate(self._updates)}
        summed = distributed.sum_over_processes(totals).values()
        return [total / count if count else math.nan for total, count in summed]

    def _set_rate(self, rate: float) -> None:
        for group, share in zip(self._groups, self._shares, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate * share)
            else:
                group["lr"] = rate * share


def _width(losses: Sequence[float]) -> float:
    """Return the standard deviation of the Gaussian that losses are smoothed with."""
    return max(1.0, len(losses) / 30)


def _smooth(losses: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return losses averaged over their neighbours by a Gaussian."""
    places = np.arange(len(losses))
    distances = (places[:, None] - places) / _width(losses)
    weights = np.exp(-0.5 * distances**2)
    smoothed: npt.NDArray[np.float64] = weights @ losses / weights.sum(axis=1)
    return smoothed


def _num_before_divergence(losses: list[float]) -> int:
    """Return how many losses come before one that is not finite, or far too high."""
    finite = np.isfinite(losses)
    end = len(losses) if finite.all() else int(finite.argmin())
    if end == 0:
        return 0
    smoothed = _smooth(losses[:end])
    best = smoothed.min()
    is_too_high = smoothed > best + 3 * max(abs(best), abs(smoothed[0]))
    return int(is_too_high.argmax()) if is_too_high.any() else end


def _curve_of(rates: list[float], losses: list[float]) -> LearningRateCurve:
    """Return the curve up to where it diverged, with what it suggests.

    Args:
        rates: Those of all updates that were to be tried.
        losses: Those of the updates that were made.
    """
    losses = losses[: _num_before_divergence(losses)]
    tried = rates[: len(losses)]
    curve = partial(LearningRateCurve, tuple(tried), tuple(losses))
    if len(losses) < _FEWEST_UPDATES:
        reason = f"the loss diverged after {len(losses)} updates: lower min_lr"
        return curve(reason=reason)
    smoothed = _smooth(losses)
    until = slice(0, int(smoothed.argmin()) + 1)
    noise = float(np.std(losses[until] - smoothed[until]))
    if smoothed[0] - smoothed.min() <= 2 * noise:
        return curve(reason="the loss did not fall, beyond its noise")
    steepest = int(np.gradient(smoothed, np.log(tried))[until].argmin())
    if steepest >= len(rates) - 1 - 2 * _width(rates):
        return curve(reason="the loss fell fastest at the end: raise max_lr")
    return curve(suggestion=rates[steepest])
