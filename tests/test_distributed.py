"""What is transparent in a single process; several are tested in promises/."""

from unittest import mock

import pytest
from accelerate import Accelerator, PartialState

from pytorch_accelerated import distributed
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


def test_training_in_one_process_needs_nothing_of_accelerate_s_wrappers():
    assert distributed.is_plain_torch(Accelerator())
