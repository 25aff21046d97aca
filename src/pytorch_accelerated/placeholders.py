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
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import partial
from numbers import Rational, Real
from typing import TYPE_CHECKING, Any, Protocol

from torch.optim.lr_scheduler import OneCycleLR

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

    @abstractmethod
    def _evaluate_exactly(self, trainer: PreparedRun) -> Fraction:
        """Return the number without rounding."""

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

    Expressions are calculated in fractions (0.3 is three tenths) and rounded at the
    end: to an integer if the result is whole and no operand was a float, else to a
    float.

    Where ``max_num_train_steps`` ends the run before its last epoch is complete,
    ``NUM_EPOCHS`` alone is the number of epochs begun. In an expression it is the
    exact number, such as 12/8, so that ``NUM_EPOCHS * NUM_UPDATE_STEPS_PER_EPOCH`` is
    the number of updates of the run. It is also exact, a float, where an argument
    beside it is the length of an epoch, since a scheduler may multiply the two itself.
    (``OneCycleLR``, which takes whole epochs only, is told that the run is one epoch.)
    Where the length of the training data is unknown, the run counts as one epoch of
    ``max_num_train_steps`` updates.
    """

    if TYPE_CHECKING:  # they pass for the numbers that they stand for
        NUM_EPOCHS: Any
        NUM_UPDATE_STEPS_PER_EPOCH: Any
        PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH: Any
        TRAIN_DATALOADER_LEN: Any
        EVAL_DATALOADER_LEN: Any
    else:
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
        return math.ceil(self._evaluate_exactly(trainer))

    def _evaluate_exactly(self, trainer: PreparedRun) -> Fraction:
        if self is TrainerPlaceholderValues.NUM_EPOCHS:
            return _num_epochs(trainer.run_config)
        if self is TrainerPlaceholderValues.TRAIN_DATALOADER_LEN:
            return Fraction(_train_dataloader_length(trainer._train_dataloader))
        if self is TrainerPlaceholderValues.EVAL_DATALOADER_LEN:
            return Fraction(_eval_dataloader_length(trainer._eval_dataloader))
        return Fraction(_num_update_steps_per_epoch(trainer.run_config))


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

    def evaluate(self, trainer: PreparedRun) -> int | float:
        """Return the number that this stands for in the prepared run of ``trainer``."""
        number = self._evaluate_exactly(trainer)
        is_whole = number.denominator == 1 and not self._has_floats
        return int(number) if is_whole else float(number)

    def _evaluate_exactly(self, trainer: PreparedRun) -> Fraction:
        calculate = _OPERATORS[self.symbol]
        return Fraction(
            calculate(_exact(self.left, trainer), _exact(self.right, trainer))
        )

    @property
    def _has_floats(self) -> bool:
        return any(
            operand._has_floats
            if isinstance(operand, PlaceholderExpression)
            else not isinstance(operand, (TrainerPlaceholderValues, Rational))
            for operand in (self.left, self.right)
        )

    def __repr__(self) -> str:
        return f"{_operand_repr(self.left)} {self.symbol} {_operand_repr(self.right)}"


_PLACEHOLDERS = (TrainerPlaceholderValues, PlaceholderExpression)

_LENGTHS_OF_AN_EPOCH = (
    TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
    TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH,
    TrainerPlaceholderValues.TRAIN_DATALOADER_LEN,
)


def replace_trainer_placeholder_values(trainer: PreparedRun, instance: Any) -> Any:
    """Fill in the placeholders among the arguments of a ``functools.partial``.

    Keyword and positional arguments are filled in, also inside lists, tuples,
    dictionaries and further partials among them. What holds no placeholder is passed
    on as it is, not copied.

    Args:
        trainer: The trainer whose prepared run gives the values; any object with
            ``run_config``, ``_train_dataloader`` and ``_eval_dataloader`` will do.
        instance: The partial. Anything else is returned as it is.

    Returns:
        A partial of the same function without placeholders.
    """
    return _fill_in(instance, trainer) if isinstance(instance, partial) else instance


def _fill_in(value: Any, trainer: PreparedRun) -> Any:
    if isinstance(value, _PLACEHOLDERS):
        return value.evaluate(trainer)
    if not _has_placeholders(value):
        return value
    if isinstance(value, partial):
        args, keywords = _with_the_true_length(value)
        return partial(
            value.func, *_fill_in(args, trainer), **_fill_in(keywords, trainer)
        )
    if isinstance(value, dict):
        return {key: _fill_in(item, trainer) for key, item in value.items()}
    filled = [_fill_in(item, trainer) for item in value]
    return value._make(filled) if hasattr(value, "_make") else type(value)(filled)


def _has_placeholders(value: Any) -> bool:
    return isinstance(value, _PLACEHOLDERS) or any(
        _has_placeholders(member) for member in _members_of(value)
    )


def _members_of(value: Any) -> Iterable[Any]:
    if isinstance(value, partial):
        return (*value.args, *value.keywords.values())
    # Subclasses may need other arguments to be built: they are left alone.
    if type(value) is dict:
        return value.values()
    is_namedtuple = isinstance(value, tuple) and hasattr(value, "_make")
    return value if type(value) in (list, tuple) or is_namedtuple else ()


def _with_the_true_length(call: partial[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments whose epochs, times the length of one, are those of the run."""
    args, keywords = call.args, call.keywords
    if isinstance(call.func, type) and issubclass(call.func, OneCycleLR):
        epochs, steps = keywords.get("epochs"), keywords.get("steps_per_epoch")
        if isinstance(epochs, _PLACEHOLDERS) and steps is not None:
            total = 0 - (epochs * steps // -1)  # rounded up to a whole number
            keywords = {**keywords, "epochs": 1, "steps_per_epoch": total}
    elif any(
        member is length
        for member in _members_of(call)
        for length in _LENGTHS_OF_AN_EPOCH
    ):
        args = tuple(_exact_epochs(argument) for argument in args)
        keywords = {name: _exact_epochs(value) for name, value in keywords.items()}
    return args, keywords


def _exact_epochs(argument: Any) -> Any:
    return argument * 1 if argument is TrainerPlaceholderValues.NUM_EPOCHS else argument


def _combine(symbol: str, left: Any, right: Any) -> Any:
    for operand in (left, right):
        if not isinstance(operand, (*_PLACEHOLDERS, Real)):
            return NotImplemented
    return PlaceholderExpression(symbol, left, right)


def _exact(operand: Any, trainer: PreparedRun) -> Fraction:
    if isinstance(operand, _PLACEHOLDERS):
        return operand._evaluate_exactly(trainer)
    return _as_fraction(operand)


def _as_fraction(number: Any) -> Fraction:
    if isinstance(number, Rational):
        # Those of numpy are integers that overflow.
        return Fraction(int(number.numerator), int(number.denominator))
    # As it was written: the float 0.3 itself is less, and 0.3 * 10 // 1 would be 2.
    return Fraction(str(number))


def _operand_repr(operand: Any) -> str:
    if isinstance(operand, TrainerPlaceholderValues):
        return operand.name
    if isinstance(operand, PlaceholderExpression):
        return f"({operand!r})"
    return str(operand)


def _num_epochs(run_config: Any) -> Fraction:
    num_epochs = _as_fraction(run_config.num_epochs)
    steps_per_epoch = run_config.num_update_steps_per_epoch
    limit = _update_limit(run_config)
    if limit is None:
        return num_epochs
    if steps_per_epoch is None:
        return Fraction(1)
    return min(num_epochs, _as_fraction(limit) / _as_fraction(steps_per_epoch))


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
