import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytorch_accelerated.data import BatchPlan
from pytorch_accelerated.window import Accumulation, Window


class Process:
    """One of several simulated processes, whose parameter has a gradient of its own."""

    def __init__(self, window):
        self.window = window
        self.parameter = torch.zeros((), requires_grad=True)

    def back_propagate(self, gradient, step, num_items, *, are_samples=True):
        loss = self.parameter * gradient
        self.window.weigh(loss, step, num_items, are_samples=are_samples).backward()

    def close(self, step):
        self.window.close(step, [self.parameter])
        gradient = self.parameter.grad.item()
        self.parameter.grad = None
        return gradient


def alone(num_steps, plan=None, num_batches=None):
    window = Accumulation(num_steps)
    window.start_epoch(plan, len(plan) if plan is not None else num_batches)
    return Process(window)


def test_a_window_of_one_batch_leaves_the_loss_untouched():
    window = Accumulation(1)
    window.start_epoch(BatchPlan(10, 4), 3)
    loss = torch.ones(())

    assert window.weigh(loss, 0, 4, are_samples=True) is loss
    window.close(0, [])


def test_a_window_knows_its_batches_and_when_it_is_complete():
    window = Window(iter("abc"), 4, is_last=lambda step: step == 5)

    taken = [(step, batch, window.is_complete) for step, batch in window]

    assert taken == [(4, "a", False), (5, "b", True)]


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 50)), min_size=1, max_size=7),
    st.integers(1, 4),
)
def test_windows_of_unknown_size_give_the_mean_over_their_items(batches, num_steps):
    process = alone(num_steps)
    window = []
    for step, (gradient, num_items) in enumerate(batches):
        window.append((gradient, num_items))
        process.back_propagate(gradient, step, num_items)
        is_last = step == len(batches) - 1
        if is_last or (step + 1) % num_steps == 0:
            mean = sum(g * n for g, n in window) / sum(n for _, n in window)
            if num_steps == 1:
                mean = gradient
            assert math.isclose(process.close(step), mean, rel_tol=1e-5, abs_tol=1e-5)
            window = []


def test_a_window_without_any_item_has_a_gradient_of_zero():
    process = alone(2, BatchPlan(4, 2))
    for step in (0, 1):
        process.back_propagate(0.0, step, torch.tensor(0), are_samples=False)

    assert process.close(1) == 0.0


def test_items_that_appear_in_the_middle_of_a_run_are_refused():
    process = alone(2, BatchPlan(8, 2))
    process.back_propagate(1.0, 0, 2)

    with pytest.raises(ValueError, match=r"not for the first one of the run\. Return"):
        process.back_propagate(1.0, 1, torch.tensor(7), are_samples=False)


def test_losses_that_an_override_has_weighted_itself_are_left_alone():
    window = Accumulation(2)
    window.start_epoch(BatchPlan(8, 4), 2)
    parameter = torch.zeros((), requires_grad=True)
    parameter.grad = torch.tensor(3.0)

    window.close(1, [parameter])

    assert parameter.grad.item() == 3.0


def test_outside_of_an_epoch_of_the_trainer_a_loss_is_divided_by_the_steps():
    window = Accumulation(4)

    assert window.weigh(torch.tensor(6.0), 0, 5, are_samples=True).item() == 1.5


def test_a_window_can_be_saved_and_continued():
    first = alone(2, None)
    first.back_propagate(1.0, 0, 3)
    state = first.window.state

    second = alone(2, None)
    second.window.state = state
    second.parameter.grad = first.parameter.grad
    second.back_propagate(6.0, 1, 2)

    assert second.close(1) == pytest.approx((1 * 3 + 6 * 2) / 5)


@pytest.mark.parametrize(
    ("promised", "shares"),
    [(4, [1 / 3] * 3 + [1]), (9, [1 / 3] * 4), (2, [1 / 2] * 2 + [1 / 3] * 2)],
)
def test_a_length_that_is_exceeded_is_not_believed_found_70(promised, shares):
    """Where gradients cannot be corrected, it says how many steps a window has."""
    window = Accumulation(3, corrects_gradients=False)
    window.start_epoch(None, promised)
    loss = torch.ones(())

    weighted = [window.weigh(loss, step, 2, are_samples=True) for step in range(4)]

    assert torch.stack(weighted).tolist() == pytest.approx(shares)
