from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from pytorch_accelerated.placeholders import TrainerPlaceholderValues
from pytorch_accelerated.schedulers import (
    CosineLrScheduler,
    SchedulerBase,
    WSDLrScheduler,
    plot_schedule,
    schedule_curve,
)

EPOCHS = TrainerPlaceholderValues.NUM_EPOCHS
UPDATES = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH


def test_schedulers_without_a_counter_are_drawn_too():
    class Halving(SchedulerBase):
        def get_updated_values(self, num_updates):
            return [value / 2**num_updates for value in self.base_lr_values]

    assert schedule_curve(Halving, 3, lr=0.4) == [0.4, 0.2, 0.1]


def test_placeholders_are_filled_in():
    factory = partial(OneCycleLR, max_lr=0.5, epochs=EPOCHS, steps_per_epoch=UPDATES)
    expected = schedule_curve(partial(OneCycleLR, max_lr=0.5, total_steps=6), 6)
    assert schedule_curve(factory, num_epochs=3, steps_per_epoch=2) == expected
    assert schedule_curve(factory, 6, num_epochs=9, steps_per_epoch=4) == expected
    assert schedule_curve(factory, 6, steps_per_epoch=4) == expected
    assert schedule_curve(factory, 6) == expected


def test_the_given_optimizer_is_followed_but_not_touched():
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    lr = torch.tensor(0.5)
    optimizer = torch.optim.Adam(
        [{"params": weights[0]}, {"params": weights[1], "lr": 0.2}], lr=lr
    )
    before = [dict(group) for group in optimizer.param_groups]

    factory = partial(WSDLrScheduler, total_steps=10, decay_phase_ratio=0.2)
    curve = schedule_curve(factory, 10, optimizer=optimizer, param_group=1)

    assert curve[:9] == [0.2] * 9
    assert curve[9] < 0.1
    assert [dict(group) for group in optimizer.param_groups] == before
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.5


def test_a_curve_without_length_is_an_error():
    with pytest.raises(ValueError, match="Give num_updates, or both num_epochs and"):
        schedule_curve(CosineLrScheduler.create_scheduler_fn(), num_epochs=3)


def test_a_schedule_that_depends_on_a_metric_has_no_curve():
    with pytest.raises(TypeError, match="The curve of a ReduceLROnPlateau cannot be"):
        schedule_curve(ReduceLROnPlateau, 3)


def test_a_line_is_drawn_for_each_group():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    optimizer = torch.optim.SGD([torch.ones(1)], lr=0.4)
    optimizer.add_param_group({"params": [torch.ones(1)], "lr": 0.2})

    ax = plot_schedule(
        WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0),
        num_epochs=2,
        steps_per_epoch=5,
        optimizer=optimizer,
        ax=figure.subplots(),
    )

    lines = ax.get_lines()
    assert [list(line.get_xdata()) for line in lines] == [list(range(10))] * 2
    assert [line.get_ydata()[0] for line in lines] == [0.4, 0.2]
    assert ax.get_xlabel() == "update"
    assert ax.get_ylabel() == "lr"
