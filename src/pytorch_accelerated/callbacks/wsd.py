"""Checkpoints at the turning points of a warm-up, stable, decay schedule."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data
from pytorch_accelerated.checkpoint.files import absolute

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class WSDCheckpointCallback(TrainerCallback):
    """Saves what a :class:`~pytorch_accelerated.schedulers.WSDLrScheduler` leads to.

    Before each decay a training state, ``checkpoint_<n>_wsd_pre_decay``, from which the
    run can be continued at full learning rate; after each decay the trained model,
    ``checkpoint_<n>_wsd_post_decay.pt``. n is the number of updates completed in the
    schedule of this run.

    Args:
        save_dir: The folder for them, created when the first is saved.
        save_optimizer: Whether the file after a decay has the optimizer's state.
        save_scheduler: Whether the file after a decay has the scheduler's state.
        initial_checkpoint: Either of them, of an earlier run, to start this run from.

    Attributes:
        last_checkpoint_step: The number of updates at which this run was last saved, or
            started.
    """

    # Before the best weights are loaded.
    called_first: tuple[str, ...] = ("on_training_run_end",)
    called_last: tuple[str, ...] = ("on_train_step_end",)

    checkpoint_steps: Sequence[int] = ()
    decay_phase_ratio: float | None = None
    decay_info: Sequence[dict[str, int]] = ()
    last_checkpoint_step: int | None = None
    _updates_before_schedule: int = 0

    def __init__(
        self,
        save_dir: str | Path = "checkpoints",
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        initial_checkpoint: str | Path | None = None,
    ) -> None:
        self.save_dir: Path = Path(save_dir)
        self.save_optimizer = save_optimizer
        self.save_scheduler = save_scheduler
        self.initial_checkpoint = initial_checkpoint

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        self.save_dir = absolute(self.save_dir)
        self.decay_info = ()
        self.last_checkpoint_step = None

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Load the initial checkpoint and learn the turning points of the schedule.

        Raises:
            ValueError: If the trainer has no scheduler with checkpoints.
            FileNotFoundError: If there is no such initial checkpoint.
        """
        if not hasattr(trainer.scheduler, "get_checkpoint_steps"):
            raise ValueError(
                "WSDCheckpointCallback needs a WSDLrScheduler, got "
                f"{type(trainer.scheduler).__name__}. Pass "
                "create_scheduler_fn=WSDLrScheduler.create_scheduler_fn() to train(), "
                "or leave the callback out."
            )
        # A run that goes on from a state of its own is past its initial checkpoint.
        if self.initial_checkpoint is not None and not trainer.is_resumed:
            self._load_initial_checkpoint(trainer, Path(self.initial_checkpoint))
        self._learn_turning_points(trainer)

    def _learn_turning_points(self, trainer: Trainer) -> None:
        scheduler = trainer.scheduler
        self.checkpoint_steps = list(scheduler.get_checkpoint_steps())
        self.decay_phase_ratio = scheduler.decay_phase_ratio
        self.decay_info = list(scheduler.get_decay_info())
        updates_in_schedule = max(scheduler.get_current_step(), 0)
        self._updates_before_schedule = (trainer.num_updates or 0) - updates_in_schedule
        if self.last_checkpoint_step is None:
            self.last_checkpoint_step = updates_in_schedule

    def _load_initial_checkpoint(self, trainer: Trainer, path: Path) -> None:
        if path.is_dir():
            trainer.load_training_state(str(path))
        elif path.is_file():
            trainer.load_checkpoint(str(path))
        else:
            raise FileNotFoundError(
                f"There is no initial_checkpoint {path}. Expected a folder "
                "checkpoint_<n>_wsd_pre_decay or a file "
                "checkpoint_<n>_wsd_post_decay.pt of an earlier run."
            )
        scheduler = trainer.scheduler
        if scheduler.is_continuation_from_checkpoint:
            scheduler.restart()
        else:
            # With the optimizer came the learning rate that the earlier run ended at.
            scheduler.step_update(max(scheduler.get_current_step(), 0))

    @event_with_data
    def on_train_step_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save if this step has brought the schedule to a turning point."""
        if not self.decay_info:
            self._learn_turning_points(trainer)
        self._save_if_due(trainer)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save if the run has ended where a decay does."""
        if not trainer.has_failed:
            self._save_if_due(trainer)

    def _updates_in_schedule(self, trainer: Trainer) -> int:
        if isinstance(trainer.num_updates, int):
            return trainer.num_updates - self._updates_before_schedule
        # Called by hand in a loop that steps the scheduler afterwards.
        step: int = trainer.scheduler.get_current_step()
        return step + 1

    def _save_if_due(self, trainer: Trainer) -> None:
        step = self._updates_in_schedule(trainer)
        if step == self.last_checkpoint_step:
            return
        path = str(self.save_dir / f"checkpoint_{step}_")
        about = {
            "step": step,
            "total_steps": trainer.run_config.max_num_train_steps,
            "decay_fraction": self.decay_phase_ratio,
            "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        }
        if step in (period["pre_decay_step"] for period in self.decay_info):
            trainer.save_training_state(
                f"{path}wsd_pre_decay",
                checkpoint_kwargs={**about, "checkpoint_type": "wsd_pre_decay"},
            )
            self.last_checkpoint_step = step
        if step in (period["period_end"] for period in self.decay_info):
            trainer.save_checkpoint(
                f"{path}wsd_post_decay.pt",
                save_optimizer=self.save_optimizer,
                save_scheduler=self.save_scheduler,
                checkpoint_kwargs={**about, "checkpoint_type": "wsd_post_decay"},
            )
            self.last_checkpoint_step = step

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates at which this run was last saved."""
        return {"last_checkpoint_step": self.last_checkpoint_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.last_checkpoint_step = state["last_checkpoint_step"]
