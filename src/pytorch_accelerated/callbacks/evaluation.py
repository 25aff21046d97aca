"""Evaluations amid an epoch, and shorter ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class StepBasedEvaluationCallback(TrainerCallback):
    """Evaluates the model every n steps, between two steps of a training epoch.

    Steps are counted over the whole run: with n = 100, after step 100, 200 and so on,
    whatever the length of an epoch. Callbacks hear of the evaluation with
    ``is_intermediate=True``. Its loss is recorded as ``intermediate_eval_loss``, and
    other metrics have ``intermediate_`` before their name too, so that they do not mix
    with those of whole epochs; the run history knows the update of each value.

    Args:
        eval_every_n_steps: Steps (batches of a process) between evaluations, at least
            1.
    """

    _num_steps: int = 0

    def __init__(self, eval_every_n_steps: int) -> None:
        if eval_every_n_steps < 1:
            raise ValueError(
                f"eval_every_n_steps must be at least 1, got {eval_every_n_steps}."
            )
        self.eval_every_n_steps = eval_every_n_steps

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        self._num_steps = 0

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that there is something to evaluate on.

        Raises:
            ValueError: If there is not.
        """
        if trainer.eval_dataset is None:
            raise ValueError(
                "StepBasedEvaluationCallback needs an eval_dataset, and train() was "
                "given none. Pass one, or leave the callback out."
            )

    @event_with_data
    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any
    ) -> None:
        """Evaluate if it is time to."""
        self._num_steps += 1
        if self._num_steps % self.eval_every_n_steps == 0:
            trainer._run_eval_epoch(trainer._eval_dataloader, is_intermediate=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps since the run was started for the first time."""
        return {"num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue to count."""
        self._num_steps = state["num_steps"]


class LimitEvalStepsCallback(TrainerCallback):
    """Ends evaluations after some batches.

    List it before a :class:`ProgressBarCallback`, so that the bar knows.

    Args:
        num_eval_steps: Batches of all processes together; each does its share, at
            least one.
        limit_intermediate_only: Whether to leave evaluations at the end of an epoch,
            and those of ``evaluate()``, as they are.
    """

    def __init__(
        self, num_eval_steps: int, limit_intermediate_only: bool = True
    ) -> None:
        if num_eval_steps < 1:
            raise ValueError(
                f"num_eval_steps must be at least 1, got {num_eval_steps}."
            )
        self.num_eval_steps = num_eval_steps
        self.limit_intermediate_only = limit_intermediate_only

    @event_with_data
    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Set the limit; the trainer puts it back when the evaluation is over."""
        if kwargs.get("is_intermediate", False) or not self.limit_intermediate_only:
            share = self.num_eval_steps // trainer._accelerator.num_processes
            trainer.eval_batch_limit = max(1, share)
