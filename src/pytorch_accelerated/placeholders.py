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
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import partial, partialmethod
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import OneCycleLR

_OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "/": operator.truediv,
}


class PlaceholderArithmetic:
    """Lets placeholders, numbers and expressions of both be combined freely."""

    def _combine(self, symbol: str, is_right: bool, other: Any) -> Any:
        if not isinstance(other, _OPERANDS):
            return NotImplemented
        left, right = (other, self) if is_right else (self, other)
        return PlaceholderExpression(symbol, left, right)

    __add__: Any = partialmethod(_combine, "+", False)
    __radd__: Any = partialmethod(_combine, "+", True)
    __sub__: Any = partialmethod(_combine, "-", False)
    __rsub__: Any = partialmethod(_combine, "-", True)
    __mul__: Any = partialmethod(_combine, "*", False)
    __rmul__: Any = partialmethod(_combine, "*", True)
    __floordiv__: Any = partialmethod(_combine, "//", False)
    __rfloordiv__: Any = partialmethod(_combine, "//", True)
    __truediv__: Any = partialmethod(_combine, "/", False)
    __rtruediv__: Any = partialmethod(_combine, "/", True)


_OPERANDS = (PlaceholderArithmetic, Real)


class TrainerPlaceholderValues(PlaceholderArithmetic, Enum):
    """A number of the coming run, to be put among the arguments of a scheduler.

    Placeholders can be combined with numbers and with each other by ``+``, ``-``,
    ``*``, ``/`` and ``//``; the result is a placeholder as well::

        num_warmup_steps = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH // 2

    Expressions are calculated in fractions (0.3 is three tenths) and rounded at the
    end: to an integer if the result is whole, else to a float.

    Where ``max_num_train_steps`` ends the run before its last epoch is complete,
    ``NUM_EPOCHS`` alone is the number of epochs begun. In an expression it is the
    exact number, such as 12/8, so that ``NUM_EPOCHS * NUM_UPDATE_STEPS_PER_EPOCH`` is
    the number of updates of the run. It is also exact, a float, where an argument
    beside it is the length of an epoch, since a scheduler may multiply the two itself.
    (``OneCycleLR``, which takes whole epochs only, is told that the run is one epoch.)
    Where the length of the training data is unknown, the run counts as one epoch of
    ``max_num_train_steps`` updates. Without a limit, it is an error to ask for the
    length of an epoch then.
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


_LENGTHS_OF_AN_EPOCH = (
    TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
    TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH,
    TrainerPlaceholderValues.TRAIN_DATALOADER_LEN,
)


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
            if isinstance(operand, (TrainerPlaceholderValues, PlaceholderExpression))
        }
        return names.pop() if len(names) == 1 else repr(self)

    def __repr__(self) -> str:
        left, right = (
            operand.name if isinstance(operand, TrainerPlaceholderValues) else operand
            for operand in (self.left, self.right)
        )
        return f"({left} {self.symbol} {right})"


def replace_trainer_placeholder_values(trainer: Any, instance: Any) -> Any:
    """Fill in the placeholders among the arguments of a ``functools.partial``.

    Keyword and positional arguments are filled in, also inside lists, tuples,
    dictionaries and further partials among them. What holds no placeholder is passed
    on as it is, not copied.

    Args:
        trainer: The trainer whose prepared run gives the values; any object with
            ``run_config``, ``_train_dataloader`` and ``_eval_dataloader`` will do. The
            run config needs ``num_epochs``, ``num_update_steps_per_epoch`` and, where
            the run is limited, ``max_num_train_steps``.
        instance: The partial. Anything else is returned as it is.

    Returns:
        A partial of the same function without placeholders.
    """
    return _fill_in(instance, trainer) if isinstance(instance, partial) else instance


def _fill_in(value: Any, trainer: Any) -> Any:
    if isinstance(value, TrainerPlaceholderValues):
        return math.ceil(_exact(value, trainer))
    if isinstance(value, PlaceholderExpression):
        number = _exact(value, trainer)
        return int(number) if number.denominator == 1 else float(number)
    if not _has_placeholders(value):
        return value
    if isinstance(value, partial):
        call = _with_the_true_length(value)
        args, keywords = _fill_in(call.args, trainer), _fill_in(call.keywords, trainer)
        return partial(call.func, *args, **keywords)
    if isinstance(value, dict):
        return {key: _fill_in(member, trainer) for key, member in value.items()}
    return type(value)(_fill_in(member, trainer) for member in value)


def _has_placeholders(value: Any) -> bool:
    return isinstance(value, PlaceholderArithmetic) or any(
        _has_placeholders(member) for member in _members_of(value)
    )


def _members_of(value: Any) -> Iterable[Any]:
    if isinstance(value, partial):
        return (*value.args, *value.keywords.values())
    # Subclasses may need other arguments to be built: they are left alone.
    if type(value) is dict:
        return value.values()
    return value if type(value) in (list, tuple) else ()


def _with_the_true_length(call: partial[Any]) -> partial[Any]:
    """Return a call whose epochs, times the length of one, are those of the run."""
    args, keywords = call.args, call.keywords
    if isinstance(call.func, type) and issubclass(call.func, OneCycleLR):
        epochs, steps = keywords.get("epochs"), keywords.get("steps_per_epoch")
        if isinstance(epochs, PlaceholderArithmetic) and steps is not None:
            total = 0 - (epochs * steps // -1)  # rounded up to a whole number
            keywords = {**keywords, "epochs": 1, "steps_per_epoch": total}
    elif any(
        member is length
        for member in _members_of(call)
        for length in _LENGTHS_OF_AN_EPOCH
    ):
        args = tuple(_exact_epochs(argument) for argument in args)
        keywords = {name: _exact_epochs(value) for name, value in keywords.items()}
    return partial(call.func, *args, **keywords)


def _exact_epochs(argument: Any) -> Any:
    # Only alone are they rounded up.
    return argument * 1 if argument is TrainerPlaceholderValues.NUM_EPOCHS else argument


def _exact(operand: Any, trainer: Any) -> Fraction:
    """Return what an operand of an expression stands for, not rounded."""
    if isinstance(operand, PlaceholderExpression):
        calculate = _OPERATORS[operand.symbol]
        left, right = _exact(operand.left, trainer), _exact(operand.right, trainer)
        return Fraction(calculate(left, right))
    if isinstance(operand, TrainerPlaceholderValues):
        return _exact_value(operand, trainer)
    # As it was written: the float 0.3 itself is less, and 0.3 * 10 // 1 would be 2.
    return Fraction(str(operand))


def _exact_value(placeholder: TrainerPlaceholderValues, trainer: Any) -> Fraction:
    if placeholder is TrainerPlaceholderValues.TRAIN_DATALOADER_LEN:
        return _length(trainer._train_dataloader, placeholder)
    if placeholder is TrainerPlaceholderValues.EVAL_DATALOADER_LEN:
        return _length(trainer._eval_dataloader, placeholder)
    limit = getattr(trainer.run_config, "max_num_train_steps", None)
    # Data of unknown length count as one epoch of all updates.
    num_updates = trainer.run_config.num_update_steps_per_epoch or limit
    if placeholder is TrainerPlaceholderValues.NUM_EPOCHS:
        num_epochs = Fraction(str(trainer.run_config.num_epochs))
        return min(num_epochs, Fraction(limit, num_updates)) if limit else num_epochs
    if num_updates is None:
        raise ValueError(
            "The schedule asks for the number of updates in an epoch, but the length "
            "of the training data is unknown. Give train() max_num_train_steps, the "
            "number of updates of the run."
        )
    return Fraction(num_updates)


def _length(loader: Any, placeholder: TrainerPlaceholderValues) -> Fraction:
    try:
        return Fraction(len(loader))
    except TypeError:
        reason = "there are none" if loader is None else "their number is unknown"
        raise TypeError(
            f"The schedule asks for {placeholder.name}, the {placeholder.value}, but "
            f"{reason}. Give train() data of known length, or let the schedule use "
            "NUM_UPDATE_STEPS_PER_EPOCH, for which max_num_train_steps is enough."
        ) from None
