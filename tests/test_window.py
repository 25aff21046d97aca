"""Parts of a window that no run on one CPU shows; promises/ has the rest."""

import pytest
import torch

from pytorch_accelerated.data import BatchPlan
from pytorch_accelerated.window import Accumulation


def test_items_that_appear_in_the_middle_of_a_run_are_refused():
    window = Accumulation(2)
    window.start_epoch(BatchPlan(8, 2), 4)
    window.weigh(torch.ones(()), 0, 2, are_samples=True)

    with pytest.raises(ValueError, match=r"not for the first one of the run\. Return"):
        window.weigh(torch.ones(()), 1, torch.tensor(7), are_samples=False)


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
