import copy
import operator
import pickle
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import OneCycleLR

from pytorch_accelerated.placeholders import (
    TrainerPlaceholderValues,
    replace_trainer_placeholder_values,
)

EPOCHS = TrainerPlaceholderValues.NUM_EPOCHS
UPDATES = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH
LOCAL_UPDATES = TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH
TRAIN_LEN = TrainerPlaceholderValues.TRAIN_DATALOADER_LEN
EVAL_LEN = TrainerPlaceholderValues.EVAL_DATALOADER_LEN

SYMBOLS = ["add", "sub", "mul", "floordiv", "truediv"]


def prepared_run(num_epochs=3, updates=8, limit=None, train_len=16, eval_len=5):
    return SimpleNamespace(
        run_config=SimpleNamespace(
            num_epochs=num_epochs,
            num_update_steps_per_epoch=updates,
            max_num_train_steps=limit,
        ),
        _train_dataloader=range(train_len),
        _eval_dataloader=range(eval_len),
    )


def filled_in(value, run=None):
    replaced = replace_trainer_placeholder_values(
        run or prepared_run(), partial(dict, value=value)
    )
    return replaced.keywords["value"]


def test_each_placeholder_stands_for_its_number():
    assert filled_in(EPOCHS) == 3
    assert filled_in(UPDATES) == filled_in(LOCAL_UPDATES) == 8  # defect 1
    assert filled_in(TRAIN_LEN) == 16
    assert filled_in(EVAL_LEN) == 5


# A run of 3 epochs of 8 updates, or 1.5 epochs of them.
WHOLE, LIMITED = None, 12


@pytest.mark.parametrize(
    ("expression", "limit", "expected"),
    [
        (UPDATES + 2, WHOLE, 10),
        (10 - UPDATES, WHOLE, 2),
        (17 // UPDATES, WHOLE, 2),
        (4 / UPDATES, WHOLE, 0.5),
        (0.5 * UPDATES, WHOLE, 4),
        (2 * EPOCHS * UPDATES // 5, WHOLE, 9),
        (TRAIN_LEN // UPDATES - EPOCHS / 2, WHOLE, 0.5),
        (EPOCHS, LIMITED, 2),  # the second one is begun
        (EPOCHS * 0.1 * UPDATES, LIMITED, 1.2),
        (EPOCHS * 0.5 * UPDATES, LIMITED, 6),
        (np.int64(8) * EPOCHS, LIMITED, 12),
        (np.float32(0.5) * EPOCHS, LIMITED, 0.75),
        (EPOCHS - 1, LIMITED, 0.5),
        ((EPOCHS - 1) * UPDATES, LIMITED, 4),
        (8 / EPOCHS, LIMITED, 16 / 3),
        (EPOCHS // 2 * 8, LIMITED, 0),
        (Fraction(2, 3) * EPOCHS, LIMITED, 1),
    ],
    ids=repr,
)
def test_placeholders_calculate_with_numbers_and_each_other(
    expression, limit, expected
):
    """Defect 36: all but ``placeholder * x`` and ``placeholder + x`` failed.

    Found 74: the side of an operand decided whether limited epochs were 1.5 or 2.
    """
    result = filled_in(expression, prepared_run(limit=limit))
    assert result == expected
    assert type(result) is type(expected)


def test_an_expression_survives_pickling_and_copying():
    """Defect 36: products could not be pickled."""
    expression = 2 * EPOCHS * UPDATES - 1
    for twin in (pickle.loads(pickle.dumps(expression)), copy.deepcopy(expression)):
        assert twin == expression
        assert filled_in(twin) == 47


def test_an_expression_of_one_placeholder_keeps_its_name():
    assert (EPOCHS * 2).name == "NUM_EPOCHS"
    assert (1 + EPOCHS * 2 - 3).name == "NUM_EPOCHS"
    assert (EPOCHS * UPDATES).name == "(NUM_EPOCHS * NUM_UPDATE_STEPS_PER_EPOCH)"


def test_text_is_no_operand():
    """Defect 36: text was joined to the expression and executed."""
    with pytest.raises(TypeError):
        UPDATES * "__import__('os').getcwd()"


def test_a_foreign_object_with_the_name_of_a_placeholder_is_left_alone():
    """Defect 36: whatever had such a ``name`` was evaluated."""
    foreign = SimpleNamespace(name="NUM_EPOCHS")
    assert filled_in(foreign) is foreign


def test_positional_and_nested_placeholders_are_filled_in():
    """Defect 36: only keywords at the top were."""
    inner = partial(dict, length=UPDATES)
    outer = partial(
        dict,
        [("a", EPOCHS), ("b", (UPDATES, 1))],
        inner=inner,
        mapping={"c": [EPOCHS * 2]},
    )

    filled = replace_trainer_placeholder_values(prepared_run(), outer)

    assert filled.func is dict
    assert filled.args == ([("a", 3), ("b", (8, 1))],)
    assert filled.keywords["inner"].keywords == {"length": 8}
    assert filled.keywords["mapping"] == {"c": [6]}
    assert inner.keywords == {"length": UPDATES}, "the given partial was changed"


@pytest.mark.parametrize("instance", [dict, None, 3, EPOCHS, [EPOCHS]])
def test_what_is_not_a_partial_is_returned_as_it_is(instance):
    assert replace_trainer_placeholder_values(prepared_run(), instance) is instance


def test_run_configs_without_a_limit_are_understood():
    run = prepared_run()
    del run.run_config.max_num_train_steps
    assert filled_in(EPOCHS * UPDATES, run) == 24


def test_only_the_result_is_rounded():
    """Found 74: 0.3 is three tenths, and 29% of 100 is 29."""
    assert filled_in(0.3 * UPDATES // 1, prepared_run(updates=10)) == 3.0
    assert filled_in(0.29 * UPDATES, prepared_run(updates=100)) == 29.0
    assert filled_in(UPDATES / 3 * 3, prepared_run(updates=49)) == 49


numbers = (
    st.integers(-20, 20)
    | st.integers(-20, 20).map(np.int64)
    | st.fractions(-20, 20, max_denominator=20)
    | st.integers(-80, 80).map(lambda quarters: quarters / 4)
)


@given(
    operands=st.lists(numbers | st.just(EPOCHS) | st.just(UPDATES), max_size=6),
    symbols=st.lists(st.tuples(st.sampled_from(SYMBOLS), st.booleans()), min_size=6),
    limit=st.integers(1, 100),
)
def test_an_expression_is_calculated_in_fractions(operands, symbols, limit):
    """Found 74."""
    run = prepared_run(num_epochs=9, updates=7, limit=limit)
    values = {EPOCHS: min(Fraction(limit, 7), Fraction(9)), UPDATES: Fraction(7)}
    expression, expected = EPOCHS, values[EPOCHS]
    for operand, (symbol, is_left) in zip(operands, symbols, strict=False):
        number = values[operand] if operand in (EPOCHS, UPDATES) else Fraction(operand)
        if symbol in ("truediv", "floordiv") and not (expected if is_left else number):
            continue  # by zero
        calculate = getattr(operator, symbol)
        sides = (operand, expression) if is_left else (expression, operand)
        expression = calculate(*sides)
        sides = (number, expected) if is_left else (expected, number)
        expected = Fraction(calculate(*sides))
    if expression is not EPOCHS:
        assert filled_in(expression, run) == float(expected)


def filled_in_pair(run, **more):
    replaced = replace_trainer_placeholder_values(
        run, partial(dict, epochs=EPOCHS, steps=UPDATES, **more)
    )
    return replaced.keywords["epochs"], replaced.keywords["steps"]


@given(
    epochs=st.integers(1, 20),
    updates=st.integers(1, 10_000),
    limit=st.integers(1, 200_000),
)
def test_epochs_times_updates_is_the_shorter_of_both_limits(epochs, updates, limit):
    """Found 74: it took a subclass of int."""
    run = prepared_run(num_epochs=epochs, updates=updates, limit=limit)
    true_length = min(limit, epochs * updates)

    length = filled_in(EPOCHS * UPDATES, run)
    assert length == true_length
    assert type(length) is int

    num_epochs, steps = filled_in_pair(run)
    assert steps == updates, "an epoch stays an epoch"
    assert num_epochs * steps == pytest.approx(true_length, rel=1e-15)
    assert type(num_epochs) is (float if true_length % updates else int)


@pytest.mark.parametrize("length", [UPDATES, LOCAL_UPDATES, TRAIN_LEN])
def test_epochs_beside_the_length_of_one_are_exact(length):
    """Found 74: a scheduler may multiply the two itself."""
    factory = partial(dict, epochs=EPOCHS, length=length)
    run = prepared_run(limit=12)
    filled = replace_trainer_placeholder_values(run, partial(dict, inner=factory))
    assert filled.keywords["inner"].keywords["epochs"] == 1.5
    assert filled_in_pair(prepared_run()) == (3, 8)


@pytest.mark.parametrize(
    ("epochs", "length"), [(EPOCHS, 12), (EPOCHS - 1, 4), (2 * EPOCHS, 24)], ids=repr
)
def test_one_cycle_ends_with_a_limited_run(epochs, length):
    """Defect 58, for a scheduler of torch that insists on integers."""

    class Mine(OneCycleLR):
        pass

    run = prepared_run(limit=12)
    for scheduler_class in (OneCycleLR, Mine):
        factory = partial(
            scheduler_class, max_lr=0.1, epochs=epochs, steps_per_epoch=UPDATES
        )
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], momentum=0.9)
        scheduler = replace_trainer_placeholder_values(run, factory)(optimizer)
        assert scheduler.total_steps == length


def test_containers_without_placeholders_stay_those_of_the_user():
    """Found 79: a record handed to a scheduler stayed empty."""
    record, numbers, pair, inner = {}, [], (record_of := [], 1), partial(dict, a=[])
    outer = partial(
        dict,
        {"lists": [record_of]},
        record=record,
        mixed=[EPOCHS, numbers, {"pair": pair}],
        inner=inner,
    )
    filled = replace_trainer_placeholder_values(prepared_run(), outer)
    assert filled.args[0] is outer.args[0]
    assert filled.keywords["record"] is record
    assert filled.keywords["inner"] is inner
    mixed = filled.keywords["mixed"]
    assert mixed == [3, numbers, {"pair": pair}]
    assert mixed[1] is numbers
    assert mixed[2]["pair"] is pair
    assert outer.keywords["mixed"][0] is EPOCHS, "the given list was changed"


def test_a_stream_of_unknown_length_counts_as_one_epoch_of_the_limit():
    run = prepared_run(num_epochs=5, updates=None, limit=30)
    assert filled_in(EPOCHS, run) == 1
    assert filled_in(UPDATES, run) == filled_in(LOCAL_UPDATES, run) == 30


@pytest.mark.parametrize("expression", [UPDATES, LOCAL_UPDATES, EPOCHS * UPDATES])
def test_a_stream_of_unknown_length_without_a_limit_is_an_error(expression):
    with pytest.raises(ValueError, match=r"unknown\. Give train\(\) max_num_train"):
        filled_in(expression, prepared_run(updates=None))


@pytest.mark.parametrize(
    ("loader", "length", "reason"),
    [
        ("_train_dataloader", TRAIN_LEN, "their number is unknown"),
        ("_eval_dataloader", EVAL_LEN, "their number is unknown"),
        ("_eval_dataloader", EVAL_LEN, "there are none"),
    ],
)
def test_batches_that_cannot_be_counted_are_an_error(loader, length, reason):
    run = prepared_run(updates=None, limit=30)
    setattr(run, loader, None if reason == "there are none" else iter([]))
    with pytest.raises(TypeError, match=f"{length.name}, .*but {reason}. Give train"):
        filled_in(length, run)


def test_one_cycle_takes_a_length_that_is_not_whole_rounded_up():
    """5 of 8 updates an epoch are 5/8 of it, so 10 of 16 batches: a third are 3 1/3."""
    schedule = partial(
        OneCycleLR,
        max_lr=0.1,
        epochs=TrainerPlaceholderValues.NUM_EPOCHS,
        steps_per_epoch=TrainerPlaceholderValues.TRAIN_DATALOADER_LEN / 3,
    )
    filled = filled_in(schedule, prepared_run(updates=8, limit=5))
    assert filled.keywords["epochs"] * filled.keywords["steps_per_epoch"] == 4
