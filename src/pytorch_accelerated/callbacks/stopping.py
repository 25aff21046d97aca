"""Callbacks that end a run: no more progress, or a loss that is no number."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pytorch_accelerated.arguments import names_what_was_meant
from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data
from pytorch_accelerated.callbacks.best import (
    BestSoFar,
    check_watch_metric,
    decided_by_main_process,
    is_of_intermediate_evaluations,
    latest_value,
)
from pytorch_accelerated.console import brief
from pytorch_accelerated.errors import NonFiniteLossError, StopTrainingError
from pytorch_accelerated.step_output import NumItems, num_items_of

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


_SECONDS_BETWEEN_LOOKS = 1.0


class EarlyStoppingCallback(TrainerCallback):
    """Stops training once a metric has not improved for some epochs.

    The decision is that of the main process, so that all processes stop together.
    Callbacks listed after this one still see the epoch that it stops at. A metric of
    the evaluations amid epochs, such as ``intermediate_eval_loss``, is compared after
    each of them, and patience is then counted in evaluations.

    Args:
        early_stopping_patience: Epochs in a row without improvement to stop after, at
            least 1.
        early_stopping_threshold: An epoch counts as an improvement if the metric is
            better by more than this, in the metric's own unit, than at the last
            improvement. With 0 any improvement counts.
        watch_metric: The name of the metric in the run history.
        greater_is_better: Whether a greater value of the metric is better.
        reset_on_train: Whether each call of ``train()`` starts to count anew. A run
            that is resumed continues to count in any case.

    Attributes:
        best_metric: The value at the last improvement, None before the first.
        early_stopping_patience_counter: Epochs in a row without improvement.
    """

    best_metric: float | None = None
    early_stopping_patience_counter: int = 0

    @names_what_was_meant
    def __init__(
        self,
        early_stopping_patience: int = 1,
        early_stopping_threshold: float = 0.0,
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool = False,
        reset_on_train: bool = True,
    ) -> None:
        if early_stopping_patience < 1:
            raise ValueError(
                "early_stopping_patience must be at least 1 epoch, got "
                f"{early_stopping_patience}. To switch early stopping off, leave the "
                "callback out."
            )
        if early_stopping_threshold < 0:
            raise ValueError(
                "early_stopping_threshold must not be negative, got "
                f"{early_stopping_threshold}. With 0 any improvement counts."
            )
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.watch_metric = watch_metric
        self.greater_is_better = greater_is_better
        self.reset_on_train = reset_on_train

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        if self.reset_on_train:
            self.best_metric = None
            self.early_stopping_patience_counter = 0

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that the metric can be watched, and whether the run is over already.

        Raises:
            StopTrainingError: If the run that is resumed had been stopped here.
        """
        check_watch_metric(
            trainer, self.watch_metric, greater_is_better=self.greater_is_better
        )
        if trainer.is_resumed:
            self._stop_if_patience_is_over(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Compare the epoch with the best one.

        Raises:
            StopTrainingError: If there was no improvement for too long.
        """
        if not is_of_intermediate_evaluations(self.watch_metric):
            self._compare(trainer)

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Compare an evaluation amid the epoch, if its metric is watched.

        Raises:
            StopTrainingError: If there was no improvement for too long.
        """
        if kwargs.get("is_intermediate", False) and is_of_intermediate_evaluations(
            self.watch_metric
        ):
            self._compare(trainer)

    def _compare(self, trainer: Trainer) -> None:
        best = BestSoFar(
            greater_is_better=self.greater_is_better,
            threshold=self.early_stopping_threshold,
            value=self.best_metric,
        )
        value = float(latest_value(trainer, self.watch_metric))
        if best.update(value):
            if self.best_metric is not None:
                gain = abs(value - self.best_metric)
                trainer.print(
                    f"{self.watch_metric} improved by {brief(gain)} to {brief(value)}"
                )
            self.best_metric = value
            self.early_stopping_patience_counter = 0
        else:
            self.early_stopping_patience_counter += 1
            trainer.print(
                f"{self.watch_metric} has not improved on {brief(self.best_metric)} "
                f"for {self.early_stopping_patience_counter} of "
                f"{self.early_stopping_patience} {self._unit}s"
            )
        self._stop_if_patience_is_over(trainer)

    @property
    def _unit(self) -> str:
        is_amid_epoch = is_of_intermediate_evaluations(self.watch_metric)
        return "evaluation" if is_amid_epoch else "epoch"

    def _stop_if_patience_is_over(self, trainer: Trainer) -> None:
        counter = self.early_stopping_patience_counter
        is_over = counter >= self.early_stopping_patience
        if decided_by_main_process(trainer, is_over):
            plural = "" if counter == 1 else "s"
            raise StopTrainingError(
                f"Stopping early: {self.watch_metric} has not improved on "
                f"{brief(self.best_metric)} for {counter} {self._unit}{plural}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the number of epochs without improvement."""
        return {
            "best_metric": self.best_metric,
            "early_stopping_patience_counter": self.early_stopping_patience_counter,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue to count from a state returned by :meth:`state_dict`."""
        self.best_metric = state["best_metric"]
        self.early_stopping_patience_counter = state["early_stopping_patience_counter"]


class TerminateOnNaNCallback(TrainerCallback):
    """Stops the run, on all processes together, when a loss is NaN or infinite.

    After the end events of the run, ``train()`` or ``evaluate()`` raises the
    :class:`~pytorch_accelerated.errors.NonFiniteLossError`, which names the epoch, the
    step, the learning rate and the last checkpoint. Nothing is saved in between. A loss
    that is a mean over no items has no weight, and may be anything.

    A step does not wait for the device: the losses are collected there and looked at
    once a second, at the end of each epoch, and before anything is saved.

    Attributes:
        triggered: Whether a loss of the present or last run was not finite.
    """

    may_stop_alone = False
    # Before others evaluate the weights of the step.
    called_first: tuple[str, ...] = ("on_train_step_end",)
    # After the others have ended the run, which must not save anything.
    called_last: tuple[str, ...] = ("on_training_run_end", "on_evaluation_run_end")

    triggered: bool = False
    _error: NonFiniteLossError | None = None
    _next_look: float = 0.0  # at the first step
    _steps_between_looks: int = 1
    _steps_to_look: int = 1

    @cached_property
    def _collected(self) -> list[_Loss]:
        return []

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        self.triggered = False
        self._next_look = 0.0
        self._steps_between_looks = self._steps_to_look = 1
        self._let_go()

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start without a bad loss."""
        self.triggered = False

    @event_with_data
    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any
    ) -> None:
        """Collect the loss, and look at those collected if it is time to.

        Raises:
            NonFiniteLossError: If one of them is not finite.
        """
        self._collect(batch_output, "training", kwargs.get("step"))
        if self._is_time_to_look(trainer):
            trainer.raise_on_all(self._find_error(trainer))
            self._next_look = time.monotonic() + _SECONDS_BETWEEN_LOOKS

    def _is_time_to_look(self, trainer: Trainer) -> bool:
        """Say whether about a second has passed, at the same step on all processes."""
        if trainer._accelerator.num_processes == 1:
            return time.monotonic() >= self._next_look
        self._steps_to_look -= 1
        if self._steps_to_look > 0:
            return False
        # Clocks differ, so the processes agree on how many steps make up a second.
        steps = self._steps_between_looks
        has_passed = trainer.agree(time.monotonic() >= self._next_look)
        self._steps_between_looks = max(1, steps // 2) if has_passed else steps * 2
        self._steps_to_look = self._steps_between_looks
        return True

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the losses that are left of the epoch."""
        self._look(trainer)

    @event_with_data
    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the training losses so far: a bad one shows in the evaluation too."""
        self._look(trainer)

    @event_with_data
    def on_eval_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any
    ) -> None:
        """Collect the loss; it is looked at when the evaluation ends."""
        self._collect(batch_output, "evaluation")

    @event_with_data
    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the losses of the evaluation."""
        self._look(trainer)

    def on_before_save(self, trainer: Trainer, **kwargs: Any) -> None:
        """Refuse to save anything of a run with a loss that is not finite. Collective.

        Raises:
            NonFiniteLossError: If there was such a loss, on any process.
        """
        # Not by raising on one process alone: the others would wait for it in the save.
        error = self._error or self._find_error(trainer)
        if trainer.agree(error is not None):
            raise error or NonFiniteLossError(
                "Nothing is saved: the loss on another process is NaN or infinite."
            )

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Let go of the losses; saving is up to the user again."""
        self._let_go()

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Let go of the losses; saving is up to the user again."""
        self._let_go()

    def check_for_nan_after_batch(
        self, batch_output: Mapping[str, Any], step: int | None = None
    ) -> None:
        """Look at one batch at once, which waits for the device.

        Args:
            batch_output: A dictionary with the ``loss``, a tensor or a number.
            step: The number of the batch, for the message.

        Raises:
            NonFiniteLossError: If the loss is not finite.
        """
        if _first_bad([_Loss.of(batch_output, "", 0)]) is not None:
            self.triggered = True
            where = "" if step is None else f" at step {step}"
            raise NonFiniteLossError(f"The loss is NaN or infinite{where}.")

    def _collect(
        self, batch_output: Mapping[str, Any], phase: str, step: int | None = None
    ) -> None:
        number = len(self._collected) if step is None else step
        self._collected.append(_Loss.of(batch_output, phase, number))

    def _look(self, trainer: Trainer) -> None:
        if error := self._find_error(trainer):
            raise error

    def _find_error(self, trainer: Trainer) -> NonFiniteLossError | None:
        """Look at the losses collected, and let go of them."""
        bad = _first_bad(self._collected)
        self._collected.clear()
        if bad is None:
            return None
        self.triggered = True
        self._error = NonFiniteLossError(_describe(trainer, bad))
        return self._error

    def _let_go(self) -> None:
        self._error = None
        self._collected.clear()


class _Loss(NamedTuple):
    """The loss of a step, where it is: not yet read from the device."""

    value: Tensor
    num_items: NumItems
    phase: str
    step: int

    @classmethod
    def of(cls, batch_output: Mapping[str, Any], phase: str, step: int) -> _Loss:
        loss = batch_output["loss"]
        if not isinstance(loss, Tensor):
            loss = torch.tensor(float(loss))
        elif loss.dim() > 0:
            # NaN if any element is NaN or infinite, else 0.
            loss = (loss.detach() * 0).sum()
        return cls(
            loss.detach(), num_items_of({"batch_size": 1, **batch_output}), phase, step
        )


def _first_bad(losses: Sequence[_Loss]) -> _Loss | None:
    """Return the first loss that is not finite. Waits for the device once."""
    if not losses:
        return None
    device = losses[-1].value.device
    values = torch.stack([loss.value.to(device) for loss in losses])
    for loss, is_finite in zip(losses, torch.isfinite(values).tolist(), strict=True):
        # How many items a batch has is only read where it matters.
        if not is_finite and loss.num_items != 0:
            return loss
    return None


def _describe(trainer: Trainer, loss: _Loss) -> str:
    groups = [] if trainer.optimizer is None else trainer.optimizer.param_groups
    rates = sorted({float(group["lr"]) for group in groups if "lr" in group})
    checkpoint = getattr(trainer, "last_checkpoint", None)
    return (
        f"The {loss.phase} loss became NaN or infinite in epoch "
        f"{trainer.run_history.current_epoch}, at step {loss.step} (counted from 0). "
        f"Learning rate: {', '.join(f'{rate:g}' for rate in rates) or 'none'}. "
        f"Last checkpoint: {checkpoint or 'none'}. "
        "Try a lower learning rate or clipping, and look for bad samples in the data."
    )
