"""Going on with smaller batches when memory runs out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from pytorch_accelerated import checkpoint, data, distributed
from pytorch_accelerated.diagnosis import is_out_of_memory
from pytorch_accelerated.progress import RunProgress
from pytorch_accelerated.tracking import LossTracker

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class BatchesTooLargeError(Exception):
    """The batches of a window do not fit into the memory of one of the processes."""


class BatchShrinker:
    """Does a window again, with smaller batches, when memory runs out in it.

    More batches then make up an update, so that the updates of the run stay what they
    were. What the steps of a window change besides gradients is copied when it starts:
    buffers, random states, sums of losses.

    With several processes, each keeps its gradients to itself until all agree that none
    has run out of memory: one that left alone would be waited for forever. So gradients
    are averaged after the last backward pass of a window and not during it.

    Args:
        trainer: The trainer, prepared for a run.

    Raises:
        ValueError: If batches of this run cannot be made smaller.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._model: Any = trainer.model
        self._is_alone = trainer._accelerator.num_processes == 1
        self._start: _WindowStart | None = None
        self._check_is_possible()

    def attempt(
        self, forward_and_backward: Callable[[], Any], step: int, closes_window: bool
    ) -> Any:
        """Do the passes of a batch, and average the gradients if it ends a window.

        Args:
            forward_and_backward: Does the passes.
            step: Number of the batch in the epoch, from 0.
            closes_window: Whether an update follows.

        Returns:
            What the passes returned.

        Raises:
            BatchesTooLargeError: On all processes, if memory ran out on any of them and
                the window can be done again.
        """
        trainer = self._trainer
        if step % trainer._window.num_steps == 0:
            self._start = self._start_of_window()
        can_shrink = self._start is not None and self._smaller_batch_size() is not None
        output, error, is_exhausted = None, None, False
        with trainer._without_gradient_sync():
            try:
                output = forward_and_backward()
            except Exception as raised:
                if not is_out_of_memory(raised):
                    raise
                # An error that is kept would keep the graph with it.
                is_exhausted, error = True, None if can_shrink else raised
        if is_exhausted:
            trainer._window.choose_without_batch()
        if not can_shrink:
            trainer.raise_on_all(error)
        elif trainer.agree(is_exhausted):
            raise BatchesTooLargeError
        if closes_window and not self._is_alone:
            distributed.average_gradients(self._model.parameters())
            self._model.require_forward_param_sync = True
        return output

    def shrink(self) -> None:
        """Go back to the start of the window, with smaller batches from there on."""
        trainer, start = self._trainer, self._start
        smaller = self._smaller_batch_size()
        assert start is not None
        assert smaller is not None
        config = trainer.run_config
        assert config.train_per_device_batch_size is not None
        accumulation = config.gradient_accumulation_steps * (
            config.train_per_device_batch_size // smaller
        )
        trainer.print(
            f"Memory was exhausted with batches of {config.train_per_device_batch_size}"
            f" samples: going on with {smaller}, and gradient_accumulation_steps="
            f"{accumulation}"
        )
        trainer.optimizer_zero_grad()
        clear_device_cache(garbage_collection=True)

        trainer._progress = replace(
            start.progress,
            step=0,
            first_sample=trainer._batch_layout().num_samples_done(start.progress) or 0,
        )
        trainer._publish_progress()
        trainer._loss_tracker, trainer._scalar_trackers = start.trackers
        trainer._resume_state["random_states"] = start.random_states
        for buffer, value in zip(self._model.buffers(), start.buffers, strict=True):
            buffer.copy_(value)

        trainer._train_dataloader.use_batch_size(smaller)
        trainer.run_config = replace(
            config,
            train_per_device_batch_size=smaller,
            gradient_accumulation_steps=accumulation,
            train_dl_kwargs={**(config.train_dl_kwargs or {}), "batch_size": smaller},
        )
        trainer._window = trainer._create_window()
        self._start = None

    def _smaller_batch_size(self) -> int | None:
        """Return the largest that a window is a whole number of, None if there is none.

        It is half of the present one where that is even.
        """
        batch_size = self._trainer.run_config.train_per_device_batch_size
        assert batch_size is not None
        sizes = range(batch_size // 2, 0, -1)
        return next((size for size in sizes if batch_size % size == 0), None)

    def _start_of_window(self) -> _WindowStart:
        trainer = self._trainer
        if not self._is_alone:
            # DDP would do it in the next forward pass, which not every process may
            # reach.
            distributed.same_on_all_processes(self._model.buffers())
            self._model.require_forward_param_sync = False
        return _WindowStart(
            progress=replace(trainer._progress),
            trackers=copy.deepcopy((trainer._loss_tracker, trainer._scalar_trackers)),
            random_states=checkpoint.get_random_states(),
            buffers=[buffer.clone() for buffer in self._model.buffers()],
        )

    def _check_is_possible(self) -> None:
        trainer = self._trainer
        reason = ""
        if not isinstance(trainer._train_dataloader, data.PlannedLoader):
            reason = (
                "needs batches that the trainer makes itself: a map-style dataset, "
                "without a sampler or loader of yours, and no limit on the batches"
            )
        elif not trainer._engine.computes_alone:
            reason = (
                "cannot work with FSDP or DeepSpeed, whose processes need each other "
                "in the middle of a pass"
            )
        elif not self._is_alone and any(
            isinstance(module, nn.SyncBatchNorm) for module in self._model.modules()
        ):
            reason = (
                "cannot work with SyncBatchNorm, whose processes need each other in "
                "the middle of a pass"
            )
        if reason:
            raise ValueError(f"halve_batch_if_out_of_memory {reason}.")


@dataclass
class _WindowStart:
    """What the steps of a window change, besides gradients, as it was before them."""

    progress: RunProgress
    trackers: tuple[LossTracker, dict[str, LossTracker]]
    random_states: dict[str, Any]
    buffers: list[Tensor]
