"""What is transparent in a single process; several are tested in promises/."""

from unittest import mock

import pytest
import torch
from accelerate import Accelerator, PartialState
from torch import nn

from pytorch_accelerated import distributed
from pytorch_accelerated.errors import StopTrainingError
from pytorch_accelerated.utils import (
    local_process_zero_first,
    local_process_zero_only,
    world_process_zero_only,
)

DECORATORS = [
    local_process_zero_only,
    world_process_zero_only,
    local_process_zero_first,
]


@pytest.mark.parametrize("decorator", DECORATORS)
def test_decorators_are_transparent_in_one_process(decorator):
    @decorator
    def add(number, other=1):
        """Add two numbers."""
        return number + other

    assert add(2, other=3) == 5
    assert add.__name__ == "add"
    assert add.__doc__ == "Add two numbers."


@pytest.mark.parametrize("decorator", DECORATORS)
def test_others_need_not_wait_for_a_process_whose_function_has_failed(decorator):
    """Defect 51: the barrier was skipped, and the other processes waited forever."""

    @decorator
    def fail():
        raise OSError("disk full")

    with (
        mock.patch.object(PartialState, "wait_for_everyone") as barrier,
        pytest.raises(OSError, match="disk full"),
    ):
        fail()

    barrier.assert_called_once_with()


@pytest.mark.parametrize(
    ("decorator", "which", "result"),
    [
        (local_process_zero_only, "is_local_main_process", None),
        (world_process_zero_only, "is_main_process", None),
        (local_process_zero_first, "is_local_main_process", "done"),
    ],
)
def test_other_processes_wait_for_the_first(decorator, which, result):
    """local_process_zero_first runs on them too, but only after the barrier."""
    order = []

    @decorator
    def work():
        order.append("work")
        return "done"

    with (
        mock.patch.object(
            PartialState, which, new_callable=mock.PropertyMock, return_value=False
        ),
        mock.patch.object(
            PartialState, "wait_for_everyone", side_effect=lambda: order.append("wait")
        ),
    ):
        assert work() == result

    assert order == ["wait", "work"][: 1 if result is None else 2]


def test_one_process_agrees_with_itself():
    assert distributed.agree(True) is True
    assert distributed.agree(False) is False
    assert distributed.largest(2.5) == 2.5
    assert distributed.object_from_main_process({"a": 1}) == {"a": 1}


def test_an_error_is_raised_and_none_is_not():
    distributed.raise_on_all(None)

    with pytest.raises(StopTrainingError, match="enough"):
        distributed.raise_on_all(StopTrainingError("enough"))


def test_gathering_in_one_process_returns_what_it_is_given():
    """Defect 53: dictionaries failed with an AttributeError."""
    tensors = {"a": torch.ones(2, 3), "b": [torch.zeros(0), (torch.tensor(4.0),)]}

    torch.testing.assert_close(distributed.gather_uneven(tensors), tensors)


def test_gathering_anything_but_tensors_is_refused():
    with pytest.raises(TypeError):
        distributed.gather_uneven({"name": "a string"})


def test_sums_in_one_process_are_those_of_the_process():
    assert distributed.sum_over_processes({"loss": (3.0, 2.0)}) == {"loss": (3.0, 2.0)}


def test_a_prepared_model_comes_back_plain():
    """Defect 57: the model handed back kept the autocast forward of Accelerate."""
    model = nn.Linear(1, 1)
    before = set(vars(model))
    prepared = distributed.PreparedModel(model)
    model.forward = lambda inputs: inputs
    model._original_forward = model.forward
    model._is_accelerate_prepared = True

    prepared.restore()

    assert set(vars(model)) == before


def test_training_in_one_process_needs_nothing_of_accelerate_s_wrappers():
    assert distributed.is_plain(Accelerator())
