"""Reporting the metrics of a run."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data
from pytorch_accelerated.tracking import count_values

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

# "train_loss_epoch", "TRAIN_loss", "ema_model_train_loss", "training/accuracy"; not
# "constrained".
_TRAIN_WORD = re.compile(
    r"(?<![A-Za-z])([Tt]rain(ing)?(?![a-z])|TRAIN(ING)?(?![A-Za-z]))"
)


class LogMetricsCallback(TrainerCallback):
    """Prints the metrics as they are recorded.

    Those with the word "train" in their name are logged at the end of the training
    epoch, the others at the end of the evaluation, and what is recorded later at the
    end of the whole epoch: each value once, in the order of recording.

    Override :meth:`log_metrics` to send them elsewhere::

        class LogToMLflow(LogMetricsCallback):
            def log_metrics(self, trainer, metrics):
                if trainer.run_config.is_world_process_zero:
                    mlflow.log_metrics(metrics, step=trainer.run_history.current_epoch)
    """

    _num_logged: Mapping[str, int] = MappingProxyType({})

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        self._num_logged = count_values(trainer.run_history)

    def log_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Print one line for each metric; the method to override.

        Called on all processes.

        Args:
            trainer: The trainer.
            metrics: Names and values, at least one. A value is what was recorded: a
                number, or whatever else was given to ``update_metric``.
        """
        for name, value in metrics.items():
            trainer.print(f"{name}: {_briefly(value)}")

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Leave out what earlier runs have recorded."""
        self._num_logged = count_values(trainer.run_history)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log the new training metrics."""
        names = [name for name in self._new_names(trainer) if _is_train_metric(name)]
        self._log_latest_metrics(trainer, names)

    @event_with_data
    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log the other new metrics."""
        names = self._new_names(trainer)
        self._log_latest_metrics(
            trainer, [name for name in names if not _is_train_metric(name)]
        )

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log what has been recorded since."""
        self._log_latest_metrics(trainer, self._new_names(trainer))

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log what has been recorded since."""
        self._log_latest_metrics(trainer, self._new_names(trainer))

    def _new_names(self, trainer: Trainer) -> list[str]:
        return [
            name
            for name, count in count_values(trainer.run_history).items()
            if count and count != self._num_logged.get(name, 0)
        ]

    def _log_latest_metrics(self, trainer: Trainer, names: Iterable[str]) -> None:
        metrics = self._get_latest_metrics(trainer, names)
        counts = count_values(trainer.run_history)
        self._num_logged = {**self._num_logged, **{n: counts[n] for n in metrics}}
        if metrics:
            self.log_metrics(trainer, metrics)

    def _get_latest_metrics(
        self, trainer: Trainer, names: Iterable[str]
    ) -> dict[str, Any]:
        history = trainer.run_history
        return {name: list(history.get_metric_values(name))[-1] for name in names}


def _briefly(value: Any) -> str:
    """Return a value for a line: not all elements of an array."""
    if getattr(value, "shape", ()):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    return textwrap.shorten(str(value), 80, placeholder=" ...")


def _is_train_metric(name: str) -> bool:
    return _TRAIN_WORD.search(name) is not None
