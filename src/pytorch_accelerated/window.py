"""Which batches make an update, and how their losses weigh.

A *window* is the batches, on all processes, whose gradients make up one update. The
gradient of the mean loss over all its items is the sum over its batches of
``gradient(mean loss of the batch) * items of the batch / items of the window``. Data
parallel training averages over processes instead of adding up, so each batch is
weighted with ``num_processes`` times that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_accelerated import compat, distributed
from pytorch_accelerated.data import BatchPlan
from pytorch_accelerated.errors import warn
from pytorch_accelerated.step_output import NumItems


@dataclass
class WindowState:
    """What a run needs to know to go on in the middle of a window.

    Args:
        items: Items of the batches of this process so far.
        counts_items: Whether items must be counted; None before the first batch.
        unit: The items that count as 1 in a weight, where they are counted. A power of
            two, so that dividing by it rounds nothing.
    """

    items: NumItems = 0
    counts_items: bool | None = None
    unit: float = 1.0


@dataclass(eq=False)
class Window:
    """The batches of this process that make up an update.

    Iterating over it yields the number of each batch in its epoch, from 0, and the
    batch.

    Args:
        batches: Where they come from.
        step: The number of the next one.
        is_last: Says of a batch that has been taken, by its number, whether it is the
            last one of the window.
        is_complete: Whether the batch that was yielded last is the last one; known
            before the passes of that batch.
    """

    batches: Iterator[Any]
    step: int
    is_last: Callable[[int], bool]
    is_complete: bool = False

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        while not self.is_complete:
            step, batch = self.step, next(self.batches)
            self.step += 1
            self.is_complete = self.is_last(step)
            yield step, batch


@dataclass(eq=False)
class Accumulation:
    """Weights the losses of windows so that their updates are those of large batches.

    Where the sizes of all batches are known ahead, each loss is weighted before it is
    back-propagated and that is all; with one batch in a window it stays untouched.
    Where they are not known, or a loss is a mean over something other than samples
    (tokens, boxes), a loss is weighted with ``items / unit``, where the unit is the
    same for all batches, and the gradients are corrected once the window's items are
    counted.

    Args:
        steps_per_window: Batches of one process in a full window.
        num_processes: Processes whose gradients are averaged.
        process_index: Which of them this is.
        corrects_gradients: Whether gradients can be changed before the update. If not,
            and items must be counted, each step counts as much as the others of its
            window.
    """

    steps_per_window: int
    num_processes: int = 1
    process_index: int = 0
    corrects_gradients: bool = True

    def __post_init__(self) -> None:
        self.state: WindowState = WindowState()
        self._is_one_batch = self.steps_per_window == 1 and self.num_processes == 1
        self._plan: BatchPlan | None = None
        self._is_exact = True
        self._num_batches: int | None = None
        self._is_in_epoch = False
        self._has_warned = False

    def start_epoch(
        self, plan: BatchPlan | None, num_batches: int | None, *, is_exact: bool = True
    ) -> None:
        """Tell the sizes of the batches to come.

        Args:
            plan: The sizes of all batches on all processes, if known.
            num_batches: Batches of this process in the epoch, if known. Without a plan,
                this may turn out to be wrong.
            is_exact: Whether no batch can be smaller than planned.
        """
        self._plan = plan
        self._is_exact = is_exact
        self._num_batches = num_batches
        self._is_in_epoch = True

    def weigh(
        self, loss: Tensor, step: int, num_items: NumItems, *, are_samples: bool
    ) -> Tensor:
        """Return the loss to back-propagate for a batch.

        Args:
            loss: Mean loss over the batch's items, 0-dim.
            step: Number of the batch in the epoch, from 0.
            num_items: Items that the loss is a mean over.
            are_samples: Whether the items are samples, whose number is known ahead.

        Raises:
            ValueError: If items other than samples appear in the middle of a run.
        """
        if self._is_one_batch:
            return loss
        if not self._is_in_epoch:
            # An override of the epoch, which will not close the window either.
            return loss / self.steps_per_window
        if self.state.counts_items is None:
            self._choose_whether_to_count(step, num_items, are_samples)
        if not are_samples and not self.state.counts_items:
            raise ValueError(
                "num_items_in_batch was returned for this batch but not for the first "
                "one of the run. Return it for every batch, on every process."
            )
        if self.state.counts_items and not self.corrects_gradients:
            return loss * self._weight_of_equal_steps(step, num_items)
        self.state.items = self.state.items + num_items
        weight = num_items / self._unit_of(step)
        if isinstance(weight, float) and weight == 1.0:
            return loss
        return loss * weight

    def choose_without_batch(self) -> None:
        """Take part in what the first batch of a run decides, without having one.

        The other processes wait for this one in :meth:`weigh`.
        """
        if self.state.counts_items is None and not self._is_one_batch:
            self._choose_together(must_count=0.0, num_items=0.0)

    def close(self, step: int, parameters: Iterable[Tensor]) -> None:
        """Bring the gradients of a window to the mean over all its items.

        Args:
            step: Number of the batch that closed the window.
            parameters: The parameters whose gradients were accumulated.
        """
        # An override of the step may have weighted the losses itself.
        if self._is_one_batch or self.state.counts_items is None:
            return
        if self.state.counts_items and not self.corrects_gradients:
            return
        factor = self._correction(step)
        self.state.items = 0
        if isinstance(factor, float) and factor == 1.0:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            compat.foreach_mul_([distributed.own_part(g) for g in gradients], factor)

    def _choose_whether_to_count(
        self, step: int, num_items: NumItems, are_samples: bool
    ) -> None:
        must_count = (
            not are_samples
            or self._plan is None
            or (self.num_processes > 1 and not self._is_exact)
            or num_items != self._plan.size(step, self.process_index)
        )
        self._choose_together(float(must_count), float(num_items))

    def _choose_together(self, must_count: float, num_items: float) -> None:
        self.state.counts_items = distributed.largest(must_count) > 0
        if self.state.counts_items:
            items = max(1.0, distributed.largest(num_items))
            self.state.unit = 2.0 ** round(math.log2(items * self.steps_per_window))

    def _unit_of(self, step: int) -> float:
        if self.state.counts_items:
            return self.state.unit
        return self._planned_items(step) / self.num_processes

    def _weight_of_equal_steps(self, step: int, num_items: NumItems) -> Tensor:
        """Return the weight of a batch, where all steps of a window count the same."""
        total = distributed.add_up(torch.as_tensor(num_items, dtype=torch.float64))
        first, last = self._window_around(step)
        share = num_items * self.num_processes / (total + (total == 0))
        return share / (last - first + 1)

    def _planned_items(self, step: int) -> int:
        assert self._plan is not None
        return self._plan.window_size(*self._window_around(step))

    def _window_around(self, step: int) -> tuple[int, int]:
        first = step - step % self.steps_per_window
        past_last = first + self.steps_per_window
        if self._num_batches is not None and step < self._num_batches:
            past_last = min(past_last, self._num_batches)
        return first, past_last - 1

    def _correction(self, step: int) -> float | Tensor:
        if self.state.counts_items:
            total = _in_double_precision(self.state.items)
            if self.num_processes > 1:
                total = distributed.add_up(torch.as_tensor(total, dtype=torch.float64))
            # A window without items has no gradient: any factor will do.
            return self.state.unit * self.num_processes / (total + (total == 0))
        if self.num_processes == 1:
            return self._planned_items(step) / max(self.state.items, 1)
        self._warn_of_other_sizes(step)
        return 1.0

    def _warn_of_other_sizes(self, step: int) -> None:
        assert self._plan is not None
        first, last = self._window_around(step)
        planned = sum(
            self._plan.size(number, self.process_index)
            for number in range(first, last + 1)
        )
        if self.state.items != planned and not self._has_warned:
            self._has_warned = True
            warn(
                f"The batches up to step {step} had {self.state.items} samples where "
                f"the sampler gave {planned}; they are weighted as if they had all. "
                "Return num_items_in_batch for every batch to have the true number "
                "counted."
            )


def parameters_of(model: nn.Module, optimizer: Any) -> Iterator[Tensor]:
    """Yield the parameters of a model and of its optimizer, each once."""
    of_optimizer = (p for group in optimizer.param_groups for p in group["params"])
    yield from dict.fromkeys(chain(model.parameters(), of_optimizer))


def _in_double_precision(number: NumItems) -> float | Tensor:
    if not isinstance(number, Tensor):
        return float(number)
    return number.to(torch.float32 if number.device.type == "mps" else torch.float64)
