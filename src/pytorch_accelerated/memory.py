"""Going on with smaller batches when memory runs out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from pytorch_accelerated import checkpoint, distributed
from pytorch_accelerated.data import loaders
from pytorch_accelerated.diagnosis import is_out_of_memory
from pytorch_accelerated.engines import Engine
from pytorch_accelerated.means import Means
from pytorch_accelerated.run import Run
from pytorch_accelerated.state import ProcessState, RunProgress

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
        run: The run.
        model: The model, prepared for it.
        engine: What holds its gradients.

    Raises:
        ValueError: If batches of this run cannot be made smaller.
    """

    def __init__(self, run: Run, model: Any, engine: Engine) -> None:
        self._run = run
        self._model = model
        self._engine = engine
        self._is_alone = run.config.num_processes == 1
        self._start: _WindowStart | None = None
        self._check_is_possible()

    def repeat(self, trainer: Trainer, train_dl: Any) -> bool:
        """Train on the batches that are due, in the size that they turn out to need.

        Returns:
            Whether the updates are used up.
        """
        while True:
            with suppress(BatchesTooLargeError):
                return trainer._run_windows(train_dl)
            trainer.optimizer_zero_grad()
            trainer.print(self._shrink())
            trainer.run_history.current_step = self._run.progress.num_updates

    def attempt(self, forward_and_backward: Callable[[], Any], step: int) -> Any:
        """Do the passes of a batch, and average the gradients if it ends a window.

        Args:
            forward_and_backward: Does the passes.
            step: Number of the batch in the epoch, from 0.

        Returns:
            What the passes returned.

        Raises:
            BatchesTooLargeError: On all processes, if memory ran out on any of them and
                the window can be done again.
        """
        run = self._run
        if step % run.accumulation.steps_per_window == 0:
            self._start = self._start_of_window()
        can_shrink = self._start is not None and self._smaller_batch_size() is not None
        output, error, is_exhausted = None, None, False
        with self._engine.without_gradient_sync(self._model):
            try:
                output = forward_and_backward()
            except Exception as raised:
                if not is_out_of_memory(raised):
                    raise
                # An error that is kept would keep the graph with it.
                is_exhausted, error = True, None if can_shrink else raised
        if is_exhausted:
            run.accumulation.choose_without_batch()
        if not can_shrink:
            distributed.raise_on_all(error)
        elif distributed.agree(is_exhausted):
            raise BatchesTooLargeError
        if run.window is not None and run.window.is_complete and not self._is_alone:
            distributed.average_gradients(self._model.parameters())
            self._model.require_forward_param_sync = True
        return output

    def _shrink(self) -> str:
        """Go back to the start of the window, with smaller batches from there on.

        Returns:
            What is done, in words.
        """
        run, start, smaller = self._run, self._start, self._smaller_batch_size()
        config, layout = run.config, run.layout()
        assert start is not None
        assert smaller is not None
        assert layout is not None
        assert config.train_per_device_batch_size is not None
        accumulation = config.gradient_accumulation_steps * (
            config.train_per_device_batch_size // smaller
        )
        clear_device_cache(garbage_collection=True)
        run.progress = replace(
            start.progress,
            step=0,
            first_sample=layout.num_samples_done(start.progress) or 0,
        )
        run.publish_progress()
        run.means = start.means
        run.pending = ProcessState(random_states=start.random_states)
        for buffer, value in zip(self._model.buffers(), start.buffers, strict=True):
            buffer.copy_(value)
        run.train_dataloader.use_batch_size(smaller)
        run.config = replace(
            config,
            train_per_device_batch_size=smaller,
            gradient_accumulation_steps=accumulation,
            train_dl_kwargs={**(config.train_dl_kwargs or {}), "batch_size": smaller},
        )
        run.accumulation = replace(run.accumulation, steps_per_window=accumulation)
        self._start = None
        return (
            f"Memory was exhausted with batches of {config.train_per_device_batch_size}"
            f" samples: going on with {smaller}, and gradient_accumulation_steps="
            f"{accumulation}"
        )

    def _smaller_batch_size(self) -> int | None:
        """Return the largest that a window is a whole number of, None if there is none.

        It is half of the present one where that is even.
        """
        batch_size = self._run.config.train_per_device_batch_size
        assert batch_size is not None
        sizes = range(batch_size // 2, 0, -1)
        return next((size for size in sizes if batch_size % size == 0), None)

    def _start_of_window(self) -> _WindowStart:
        if not self._is_alone:
            # DDP would do it in the next forward pass, which not every process may
            # reach.
            distributed.same_on_all_processes(self._model.buffers())
            self._model.require_forward_param_sync = False
        return _WindowStart(
            progress=replace(self._run.progress),
            means=copy.deepcopy(self._run.means),
            random_states=checkpoint.get_random_states(),
            buffers=[buffer.clone() for buffer in self._model.buffers()],
        )

    def _check_is_possible(self) -> None:
        reason = ""
        if not isinstance(self._run.train_dataloader, loaders.PlannedLoader):
            reason = (
                "needs batches that the trainer makes itself: a map-style dataset, "
                "without a sampler or loader of yours, and no limit on the batches"
            )
        elif not self._engine.computes_alone:
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
    means: Means
    random_states: dict[str, Any]
    buffers: list[Tensor]
