import pickle

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from pytorch_accelerated.schedulers import (
    CosineLrScheduler,
    SchedulerBase,
    StatefulSchedulerBase,
    WSDLrScheduler,
)
from pytorch_accelerated.schedulers.scheduler_base import remember_scheduled_values


def create_optimizer(*lrs, **settings):
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs]
    return torch.optim.SGD(groups, **settings)


def get_lrs(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


class Returning(SchedulerBase):
    """Returns what it is told to."""

    values = None

    def get_updated_values(self, num_updates):
        return self.values


class MilestoneLrScheduler(StatefulSchedulerBase):
    """Defines no more than the values."""

    def __init__(self, optimizer, gamma=0.5, milestones=(2, 4), field="lr"):
        super().__init__(optimizer, param_group_field=field)
        self.gamma = gamma
        self.milestones = milestones

    def get_updated_values(self, num_updates):
        passed = sum(num_updates >= milestone for milestone in self.milestones)
        return [value * self.gamma**passed for value in self.base_lr_values]


def test_the_default_state_continues_the_schedule():
    original = MilestoneLrScheduler(create_optimizer(0.8))
    for _ in range(3):
        original.step()
    state = pickle.loads(pickle.dumps(original.state_dict()))
    assert state["num_updates"] == 2
    assert "optimizer" not in state

    optimizer = create_optimizer(0.8)
    restored = MilestoneLrScheduler(optimizer, gamma=0.1, milestones=(1,))
    restored.load_state_dict(state)

    assert get_lrs(optimizer) == [0.4], "set at once, for the update that comes next"
    restored.step()
    restored.step()
    assert get_lrs(optimizer) == [0.2]


def test_any_field_can_be_scheduled():
    optimizer = create_optimizer(0.1, weight_decay=0.4)
    scheduler = MilestoneLrScheduler(optimizer, field="weight_decay")
    for _ in range(3):
        scheduler.step()
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == 0.2
    assert group["initial_weight_decay"] == 0.4
    assert group["lr"] == 0.1
    assert scheduler.get_last_lr() == [0.2]


def test_a_missing_field_is_an_error_that_lists_the_fields():
    with pytest.raises(KeyError, match=r"no field 'lrr' to schedule; it has: .*lr, "):
        MilestoneLrScheduler(create_optimizer(0.1), field="lrr")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (0.3, [0.3, 0.3]),
        (np.float64(0.3), [0.3, 0.3]),
        (np.array(0.3), [0.3, 0.3]),
        (torch.tensor(0.5), [0.5, 0.5]),
        ([0.3, 0.4], [0.3, 0.4]),
        ((0.3, 0.4), [0.3, 0.4]),
        (np.array([0.3, 0.4]), [0.3, 0.4]),
        (torch.tensor([0.5, 0.25]), [0.5, 0.25]),
        ([torch.tensor(0.5), np.float32(0.25)], [0.5, 0.25]),
        (None, [0.1, 0.2]),
    ],
    ids=str,
)
def test_each_group_gets_its_own_number(values, expected):
    """Defect 35: an array was assigned whole to every group."""
    optimizer = create_optimizer(0.1, 0.2)
    scheduler = Returning(optimizer)
    scheduler.values = values

    scheduler.step_update(0)

    assert get_lrs(optimizer) == expected
    assert [type(lr) for lr in get_lrs(optimizer)] == [float, float]
    assert scheduler.get_last_lr() == expected


@pytest.mark.parametrize("values", [[0.3], [0.3] * 3, np.ones(1), torch.ones(3)])
def test_a_wrong_number_of_values_is_an_error(values):
    """Defect 35: a list that was too short left groups as they were."""
    scheduler = Returning(create_optimizer(0.1, 0.2))
    scheduler.values = values
    message = rf"Returning.*returned {len(values)} values.* 2 parameter groups"
    with pytest.raises(ValueError, match=message):
        scheduler.step_update(0)


def test_a_learning_rate_held_in_a_tensor_is_changed_in_place():
    lr = torch.tensor(0.8)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=lr)
    scheduler = MilestoneLrScheduler(optimizer, gamma=0.3)
    for _ in range(3):
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.24)

    assert MilestoneLrScheduler(optimizer).base_lr_values == pytest.approx([0.8])


def test_the_start_survives_saving_and_loading_the_optimizer():
    optimizer = create_optimizer(0.8)
    earlier = MilestoneLrScheduler(optimizer)
    for _ in range(6):
        earlier.step()

    loaded = create_optimizer(0.3)
    loaded.load_state_dict(optimizer.state_dict())
    assert MilestoneLrScheduler(loaded).base_lr_values == [0.8]

    loaded.load_state_dict(optimizer.state_dict())
    set_lr(loaded, 0.05)
    assert MilestoneLrScheduler(loaded).base_lr_values == [0.05]


def test_values_left_by_a_scheduler_of_torch_can_be_told_from_those_of_the_user():
    optimizer = create_optimizer(0.8)
    MilestoneLrScheduler(optimizer)
    torch_scheduler = StepLR(optimizer, step_size=1)
    optimizer.step()
    torch_scheduler.step()
    assert get_lrs(optimizer) == pytest.approx([0.08])

    remember_scheduled_values(optimizer)

    assert MilestoneLrScheduler(optimizer).base_lr_values == [0.8]


@pytest.mark.parametrize(
    "create",
    [
        MilestoneLrScheduler,
        lambda optimizer: CosineLrScheduler(optimizer, 1, 10),
        lambda optimizer: WSDLrScheduler(optimizer, total_steps=10),
    ],
)
def test_a_group_added_later_joins_the_schedule(create):
    optimizer = create_optimizer(0.8)
    scheduler = create(optimizer)
    for _ in range(3):
        scheduler.step()

    optimizer.add_param_group(
        {"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.4}
    )
    scheduler.step()

    first, added = get_lrs(optimizer)
    assert added == pytest.approx(first / 2, rel=1e-5)
    assert scheduler.base_lr_values == [0.8, 0.4]
