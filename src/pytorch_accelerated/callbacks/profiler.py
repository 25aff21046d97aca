"""A trace of some steps, to see where their time goes."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import profiler

from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_NUM_ROWS = 15


class ProfilerCallback(TrainerCallback):
    """Profiles some steps of each training run with ``torch.profiler``.

    Writes a trace that https://ui.perfetto.dev and TensorBoard show, and prints a table
    of the most expensive operations. The steps profiled are slower than others, those
    after them are not. If the run ends amid them, what there is of them is written.

    Args:
        output_dir: The folder for the traces, one file for each process that is
            profiled.
        wait: Steps that are left out first, in which much is done only once.
        warmup: Steps that are profiled and thrown away, before it counts.
        active: Steps in the trace.
        all_processes: Whether all processes are profiled, or the main one alone.
        **kwargs: What else ``torch.profiler.profile`` takes, such as
            ``profile_memory=True`` or ``with_stack=True``.

    Attributes:
        table: The most expensive operations, as text; None if none were profiled.
    """

    called_last: tuple[str, ...] = ("on_train_step_end",)
    may_stop_alone = False

    output_dir: str | os.PathLike[str] = "profile"
    wait: int = 1
    warmup: int = 1
    active: int = 3
    all_processes: bool = False
    table: str | None = None
    _kwargs: Any = ()
    _profiler: Any = None

    def __init__(
        self,
        output_dir: str | os.PathLike[str] = "profile",
        wait: int = 1,
        warmup: int = 1,
        active: int = 3,
        *,
        all_processes: bool = False,
        **kwargs: Any,
    ) -> None:
        if min(wait, warmup, active - 1) < 0:
            raise ValueError(
                "wait and warmup must be at least 0 and active at least 1, got "
                f"wait={wait}, warmup={warmup}, active={active}."
            )
        self.output_dir = output_dir
        self.wait = wait
        self.warmup = warmup
        self.active = active
        self.all_processes = all_processes
        self._kwargs = kwargs

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start the profiler."""
        self.table = None
        if self.all_processes or trainer._accelerator.is_main_process:
            self._profiler = profiler.profile(
                schedule=profiler.schedule(
                    wait=self.wait, warmup=self.warmup, active=self.active, repeat=1
                ),
                on_trace_ready=partial(self._write, trainer),
                **dict(self._kwargs),
            )
            self._call(trainer, "start")

    @event_with_data
    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Go on to the next step, or end."""
        self._call(trainer, "step")
        if self.table is not None:
            self._stop(trainer)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """End. If the run is over amid the steps, what there is of them is written."""
        self._stop(trainer)

    @event_with_data
    def on_exception(self, trainer: Trainer, **kwargs: Any) -> None:
        """Write what there is, unless this is an evaluation amid the run."""
        if trainer._run.is_training:
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        self._call(trainer, "stop")
        if self._profiler is not None and self.table is None:
            trainer.print("The run ended before the steps to be profiled")
        self._profiler = None

    def _call(self, trainer: Trainer, method: str) -> None:
        """Call the profiler, if there is one; the run goes on if that fails."""
        try:
            if self._profiler is not None:
                getattr(self._profiler, method)()
        except Exception as error:
            self._profiler = None
            trainer.print(f"The run goes on without the profiler: {error!r}")

    def _write(self, trainer: Trainer, profile: Any) -> None:
        name = f"process_{trainer._accelerator.process_index}"
        time = f"self_{profile.use_device or 'cpu'}_time_total"
        self.table = profile.key_averages().table(sort_by=time, row_limit=_NUM_ROWS)
        profiler.tensorboard_trace_handler(str(self.output_dir), name, True)(profile)
        trainer.print(
            f"{self.table}\nTrace in {self.output_dir}: open it in "
            "https://ui.perfetto.dev or TensorBoard"
        )
