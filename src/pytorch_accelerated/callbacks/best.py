"""Watching a metric: what the callbacks that look for the best epoch share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.errors import warn
from pytorch_accelerated.tracking import (
    INTERMEDIATE_PREFIX,
    is_greater_better,
    is_number,
)

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class BestSoFar:
    """Says when a metric is better than everything before it.

    The first finite value counts as better; NaN and infinite values never do.

    Args:
        greater_is_better: Whether a greater value is better, as for an accuracy.
        threshold: A value must be better than the best by more than this.
        value: The best value so far.

    Attributes:
        value: The best value so far, None before the first finite one.
    """

    def __init__(
        self,
        *,
        greater_is_better: bool = False,
        threshold: float = 0.0,
        value: float | None = None,
    ) -> None:
        self.greater_is_better = greater_is_better
        self.threshold = threshold
        self.value = value

    def is_beaten_by(self, value: Any) -> bool:
        """Say whether a number, NumPy scalar or tensor of one element is better."""
        number = float(value)
        if not math.isfinite(number):
            return False
        if self.value is None:
            return True
        gain = number - self.value if self.greater_is_better else self.value - number
        return gain > self.threshold

    def update(self, value: Any) -> bool:
        """Keep the value if it is better, and say whether it was."""
        if not self.is_beaten_by(value):
            return False
        self.value = float(value)
        return True


def is_of_intermediate_evaluations(metric: str) -> bool:
    """Say whether a metric is recorded amid epochs, and not at their end."""
    return metric.startswith(INTERMEDIATE_PREFIX)


def latest_value(trainer: Trainer, metric: str) -> Any:
    """Return the newest value of a metric in the run history.

    Raises:
        ValueError: If it has not been recorded; the message lists what has been.
        TypeError: If the value is not one number.
    """
    known = trainer.run_history.get_metric_names()
    if metric not in known:
        raise ValueError(
            f"watch_metric={metric!r} has not been recorded by the end of epoch "
            f"{trainer.run_history.current_epoch}; recorded so far: "
            f"{', '.join(sorted(known)) or 'nothing'}."
        )
    value = list(trainer.run_history.get_metric_values(metric))[-1]
    if not is_number(value):
        raise TypeError(
            f"watch_metric={metric!r} must be one number to be compared, and is a "
            f"{type(value).__name__}. The numbers of a dictionary are metrics of their "
            f"own, '{metric}_<key>'; recorded so far: {', '.join(sorted(known))}."
        )
    return value


def check_watch_metric(
    trainer: Trainer, metric: str, *, greater_is_better: bool | None = None
) -> None:
    """Refuse, before the run, to watch the evaluation loss without an evaluation.

    Raises:
        ValueError: If there is no evaluation dataset to get the metric from.

    Warns:
        TrainingWarning: If the name of the metric says that the other way is better.
    """
    named = is_greater_better(metric)
    if None not in (named, greater_is_better) and named != greater_is_better:
        warn(
            f"{metric} is watched with greater_is_better={greater_is_better}, so its "
            f"{'greatest' if greater_is_better else 'least'} value counts as the best. "
            f"If that is not meant, pass greater_is_better={not greater_is_better}."
        )
    if trainer.eval_dataset is None and metric == "eval_loss_epoch":
        raise ValueError(
            f"watch_metric={metric!r} needs an eval_dataset, and train() was given "
            "none. Pass one, or watch 'train_loss_epoch'."
        )


def decided_by_main_process(trainer: Trainer, decision: bool) -> bool:
    """Return the decision of the main process on all of them. Collective.

    A metric may differ between processes, and those that decide otherwise than the
    rest would wait for it forever.
    """
    return trainer.agree(decision and trainer._accelerator.is_main_process)
