"""Ending runs that a search for hyperparameters has no more hope for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.callbacks.best import check_watch_metric, latest_value
from pytorch_accelerated.errors import StopTrainingError

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class OptunaPruningCallback(TrainerCallback):
    """Reports a metric of each epoch to a trial of Optuna, and ends those it prunes.

    A pruned run ends in order, like one that was stopped early; then ``train()`` raises
    ``optuna.TrialPruned``, which the study expects::

        def objective(trial):
            trainer = ...
            trainer.callback_handler.add_callback(OptunaPruningCallback(trial))
            history = trainer.train(...)
            return history.get_latest_metric("eval_loss_epoch")

    On several processes the main one reports, and all of them raise the error.

    Args:
        trial: The trial. On several processes, that of the main one; others may give
            None.
        metric: The name of the metric in the run history. Whether more is better is the
            direction of the study.
    """

    def __init__(self, trial: Any, metric: str = "eval_loss_epoch") -> None:
        self.trial = trial
        self.metric = metric

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that the metric can be reported."""
        check_watch_metric(trainer, self.metric)

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Report the metric.

        Raises:
            StopTrainingError: If the trial is pruned; an ``optuna.TrialPruned`` too.
        """
        epoch = trainer.run_history.current_epoch
        error, is_pruned = None, False
        if trainer._accelerator.is_main_process:
            try:
                value = float(latest_value(trainer, self.metric))
                # Pruners count steps from 0.
                self.trial.report(value, step=epoch - 1)
                is_pruned = self.trial.should_prune()
            except Exception as its_error:
                error = its_error
        trainer.raise_on_all(error)
        if trainer.agree(is_pruned):
            raise _trial_pruned()(
                f"Pruned by Optuna after epoch {epoch}, for its {self.metric}"
            )


def _trial_pruned() -> type[StopTrainingError]:
    """Return an error that ends a run in order, and is one of Optuna's as well."""
    kinds = (StopTrainingError, importlib.import_module("optuna").TrialPruned)
    return type("TrialPruned", kinds, {"reaches_caller": True})
