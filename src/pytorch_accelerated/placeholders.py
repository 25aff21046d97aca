"""Stand-ins for lengths that are only known once a run has been prepared.

A scheduler has to know how many updates it is for, but the script that configures it
does not: that depends on the data, the batch size, the number of processes and the
gradient accumulation. The script puts a placeholder in the place of such a number,
and the trainer fills it in when it creates the scheduler::

    create_scheduler_fn = functools.partial(
        torch.optim.lr_scheduler.OneCycleLR,
        max_lr=0.1,
        epochs=TrainerPlaceholderValues.NUM_EPOCHS,
        steps_per_epoch=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
    )
"""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import partial
from numbers import Real
from typing import Any, Protocol

__all__ = [
    "PlaceholderArithmetic",
    "PlaceholderExpression",
    "PreparedRun",
    "TrainerPlaceholderValues",
    "replace_trainer_placeholder_values",
]

_OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "/": operator.truediv,
}


class PreparedRun(Protocol):
    """What placeholders are filled in from: a trainer, or anything with these three.

    ``run_config`` needs ``num_epochs``, ``num_update_steps_per_epoch`` and, where the
    run is limited, ``max_num_train_steps``.
    """

    run_config: Any
    _train_dataloader: Any
    _eval_dataloader: Any


class PlaceholderArithmetic:
    """Lets placeholders, numbers and expressions of both be combined freely."""

    @abstractmethod
    def evaluate(self, trainer: PreparedRun) -> Any:
        """Return the number that this stands for in the prepared run of ``trainer``."""

    def __add__(self, other: Any) -> Any:
        return _combine("+", self, other)

    def __radd__(self, other: Any) -> Any:
        return _combine("+", other, self)

    def __sub__(self, other: Any) -> Any:
        return _combine("-", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _combine("-", other, self)

    def __mul__(self, other: Any) -> Any:
        return _combine("*", self, other)

    def __rmul__(self, other: Any) -> Any:
        return _combine("*", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return _combine("//", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _combine("//", other, self)

    def __truediv__(self, other: Any) -> Any:
        return _combine("/", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _combine("/", other, self)


class TrainerPlaceholderValues(PlaceholderArithmetic, Enum):
    """A number of the coming run, to be put among the arguments of a scheduler.

    Placeholders can be combined with numbers and with each other by ``+``, ``-``,
    ``*``, ``/`` and ``//``; the result is a placeholder as well::

        num_warmup_steps = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH // 2

    Where ``max_num_train_steps`` ends the run before its last epoch is complete,
    ``NUM_EPOCHS`` is the number of epochs begun, but ``NUM_EPOCHS *
    NUM_UPDATE_STEPS_PER_EPOCH`` is exactly the number of updates of the run. Where
    the length of the training data is unknown, the run counts as one epoch of
    ``max_num_train_steps`` updates.
    """

    NUM_EPOCHS = "epochs of the run"
    NUM_UPDATE_STEPS_PER_EPOCH = "optimizer updates in an epoch"
    PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH = (
        "optimizer updates in an epoch, which every process takes part in"
    )
    TRAIN_DATALOADER_LEN = "training batches in an epoch on each process"
    EVAL_DATALOADER_LEN = "evaluation batches in an epoch on each process"

    @classmethod
    def placeholder_set(cls) -> set[str]:
        """Return the names of all placeholders."""
        return {placeholder.name for placeholder in cls}

    def evaluate(self, trainer: PreparedRun) -> int:
        """Return the number that this stands for in the prepared run of ``trainer``.

        Raises:
            ValueError: The length of the training data is unknown, and the run has no
                ``max_num_train_steps`` that could take its place.
            TypeError: The length of the evaluation data is asked for and there is none.
        """
        if self is TrainerPlaceholderValues.NUM_EPOCHS:
            return _num_epochs(trainer.run_config)
        if self is TrainerPlaceholderValues.TRAIN_DATALOADER_LEN:
            return _train_dataloader_length(trainer._train_dataloader)
        if self is TrainerPlaceholderValues.EVAL_DATALOADER_LEN:
            return _eval_dataloader_length(trainer._eval_dataloader)
        return _num_update_steps_per_epoch(trainer.run_config)


@dataclass(frozen=True, repr=False)
class PlaceholderExpression(PlaceholderArithmetic):
    """Placeholders combined by arithmetic, still to be filled in by the trainer.

    Made by calculating with members of `TrainerPlaceholderValues`, not by hand.
    """

    symbol: str
    left: Any
    right: Any

    @property
    def name(self) -> str:
        """Name of the placeholder inside; the whole expression if there are several."""
        names = {
            operand.name
            for operand in (self.left, self.right)
            if isinstance(operand, _PLACEHOLDERS)
        }
        return names.pop() if len(names) == 1 else repr(self)

    def evaluate(self, trainer: PreparedRun) -> Any:
        """Return the number that this stands for in the prepared run of ``trainer``."""
        left, right = _fill_in(self.left, trainer), _fill_in(self.right, trainer)
        return _OPERATORS[self.symbol](left, right)

    def __repr__(self) -> str:
        return f"{_operand_repr(self.left)} {self.symbol} {_operand_repr(self.right)}"


_PLACEHOLDERS = (TrainerPlaceholderValues, PlaceholderExpression)


def replace_trainer_placeholder_values(trainer: PreparedRun, instance: Any) -> Any:
    """Fill in the placeholders among the arguments of a ``functools.partial``.

    Keyword and positional arguments are filled in, also inside lists, tuples,
    dictionaries and further partials among them.

    Args:
        trainer: The trainer whose prepared run gives the values; any object with
            ``run_config``, ``_train_dataloader`` and ``_eval_dataloader`` will do.
        instance: The partial. Anything else is returned as it is.

    Returns:
        A new partial of the same function without placeholders.
    """
    return _fill_in(instance, trainer) if isinstance(instance, partial) else instance


def _fill_in(value: Any, trainer: PreparedRun) -> Any:
    if isinstance(value, _PLACEHOLDERS):
        return value.evaluate(trainer)
    if isinstance(value, partial):
        args = [_fill_in(argument, trainer) for argument in value.args]
        return partial(value.func, *args, **_fill_in(value.keywords, trainer))
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_fill_in(item, trainer) for item in value)
    # Subclasses may need other arguments to be built: they are left alone.
    if type(value) in (list, tuple):
        return type(value)(_fill_in(item, trainer) for item in value)
    if type(value) is dict:
        return {key: _fill_in(item, trainer) for key, item in value.items()}
    return value


def _combine(symbol: str, left: Any, right: Any) -> Any:
    for operand in (left, right):
        if not isinstance(operand, (*_PLACEHOLDERS, Real)):
            return NotImplemented
    return PlaceholderExpression(symbol, left, right)


def _operand_repr(operand: Any) -> str:
    if isinstance(operand, TrainerPlaceholderValues):
        return operand.name
    if isinstance(operand, PlaceholderExpression):
        return f"({operand!r})"
    return str(operand)


def _num_epochs(run_config: Any) -> int:
    num_epochs: int = run_config.num_epochs
    steps_per_epoch = run_config.num_update_steps_per_epoch
    limit = _update_limit(run_config)
    if limit is None:
        return num_epochs
    if steps_per_epoch is None:
        return 1
    if limit < num_epochs * steps_per_epoch:
        return _EpochsOfShortenedRun(Fraction(limit, steps_per_epoch))
    return num_epochs


def _num_update_steps_per_epoch(run_config: Any) -> int:
    steps_per_epoch: int | None = run_config.num_update_steps_per_epoch
    if steps_per_epoch is None:
        steps_per_epoch = _update_limit(run_config)
    if steps_per_epoch is None:
        raise ValueError(
            "The schedule asks for the number of updates in an epoch, but the length "
            "of the training data is unknown. Give train() max_num_train_steps, the "
            "number of updates of the run."
        )
    return steps_per_epoch


def _update_limit(run_config: Any) -> int | None:
    limit: int | None = getattr(run_config, "max_num_train_steps", None)
    return limit


def _train_dataloader_length(dataloader: Any) -> int:
    try:
        return len(dataloader)
    except TypeError as error:
        raise ValueError(
            "The schedule asks for TRAIN_DATALOADER_LEN, but the length of the "
            "training data is unknown. Use NUM_UPDATE_STEPS_PER_EPOCH instead, and "
            "give train() max_num_train_steps, the number of updates of the run."
        ) from error


def _eval_dataloader_length(dataloader: Any) -> int:
    try:
        return len(dataloader)
    except TypeError as error:
        reason = "there is none" if dataloader is None else "its length is unknown"
        raise TypeError(
            "The schedule asks for EVAL_DATALOADER_LEN, the number of evaluation "
            f"batches, but {reason}. Give train() an eval_dataset of known length, "
            "or leave the placeholder out."
        ) from error


class _EpochsOfShortenedRun(int):
    """Number of epochs of a run that a limit ends in the middle of one.

    Schedulers want an integer here (OneCycleLR refuses anything else), and multiply
    it by the updates in an epoch. With the number of epochs begun as that integer
    the schedule would be too long, and its end would never be trained with. So this
    compares, prints and indexes as the number of epochs begun, and calculates with
    the exact one, for instance 12/8: products are integers where they are whole,
    and sums with integers can be multiplied by the updates in an epoch again.
    """

    exact: Fraction

    def __new__(cls, exact: Fraction) -> _EpochsOfShortenedRun:
        epochs = super().__new__(cls, math.ceil(exact))
        epochs.exact = exact
        return epochs

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.exact,)

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, Real):
            return NotImplemented
        product: Any = self.exact * other
        return int(product) if product == int(product) else float(product)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return self.exact + other
        return _EpochsOfShortenedRun(self.exact + other)

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def __truediv__(self, other: Any) -> Any:
        return float(self.exact) / other

    __radd__ = __add__
    __rmul__ = __mul__
