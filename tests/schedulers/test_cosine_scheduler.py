"""Arguments and states; promises/test_schedules_end_right.py has a curve of a run."""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytorch_accelerated.errors import TrainingWarning
from pytorch_accelerated.schedulers import CosineLrScheduler


def create_optimizer(*lrs):
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs]
    return torch.optim.SGD(groups or [torch.nn.Parameter(torch.ones(1))], lr=0.1)


def run_schedule(scheduler, num_updates):
    """Return the learning rates of all groups that each update trains with."""
    curve = []
    for _ in range(num_updates):
        scheduler.step()
        curve.append([group["lr"] for group in scheduler.optimizer.param_groups])
    return curve


def curve_of_one_group(num_updates, *args, lr=0.1, **kwargs):
    scheduler = CosineLrScheduler(create_optimizer(lr), *args, **kwargs)
    return [lr for (lr,) in run_schedule(scheduler, num_updates)]


def half_cosine(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))


def test_k_decay_raises_the_progress_to_its_power():
    curve = curve_of_one_group(10, 10, 1, k_decay=3.0, num_warmup_epochs=2, lr_min=0.0)
    expected = [0.1 * half_cosine((n - 2) ** 3 / 8**3) for n in range(2, 10)]
    assert curve[2:] == pytest.approx(expected, rel=1e-9)


def test_ratios_are_taken_of_the_learning_rate_of_each_group():
    """Defect 19: a warm-up that was a ratio rose above the peak."""
    scheduler = CosineLrScheduler(
        create_optimizer(0.1, 0.02),
        4,
        2,
        min_lr_ratio=0.1,
        num_warmup_epochs=1,
        warmup_starting_lr_ratio=0.5,
        num_cooldown_epochs=1,
    )
    curve = run_schedule(scheduler, 8)
    shape = [0.5, 0.75] + [0.1 + 0.9 * half_cosine(n / 4) for n in range(4)]
    expected = [[0.1 * s, 0.02 * s] for s in [*shape, 0.1, 0.1]]
    assert curve == [pytest.approx(lrs, rel=1e-12) for lrs in expected]


@given(stop=st.integers(0, 30), warmup=st.integers(0, 4), cooldown=st.integers(0, 4))
def test_a_saved_schedule_goes_on_as_if_never_interrupted(stop, warmup, cooldown):
    settings = {"num_warmup_epochs": warmup, "num_cooldown_epochs": cooldown}
    whole = curve_of_one_group(30, 10, 3, **settings)

    original = CosineLrScheduler(create_optimizer(0.1), 10, 3, **settings)
    run_schedule(original, stop)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)

    optimizer = create_optimizer(0.1)
    restored = CosineLrScheduler(optimizer, 1, 1)
    restored.load_state_dict(torch.load(file, weights_only=True))

    if stop:
        assert optimizer.param_groups[0]["lr"] == whole[stop - 1]
    rest = [lr for (lr,) in run_schedule(restored, 30 - stop)]
    assert rest == whole[stop:]


def test_the_state_has_the_names_that_scripts_read():
    scheduler = CosineLrScheduler(
        create_optimizer(0.1),
        10,
        4,
        k_decay=2.0,
        lr_min=0.01,
        min_lr_ratio=0.2,
        num_warmup_epochs=1,
        warmup_starting_lr=0.03,
        warmup_starting_lr_ratio=0.4,
        num_cooldown_epochs=2,
    )
    run_schedule(scheduler, 6)
    assert scheduler.state_dict() == {
        "total_iterations": 40,
        "lr_min_ratio": 0.2,
        "lr_min": 0.01,
        "warmup_iterations": 4,
        "warmup_lr_init": 0.03,
        "warmup_lr_ratio": 0.4,
        "k_decay": 2.0,
        "num_cooldown_iterations": 8,
        "num_updates": 5,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_num_epochs": 0}, "must be above 0, but their product is 0"),
        ({"num_update_steps_per_epoch": -1}, "their product is -3"),
        ({"lr_min": -0.1}, "lr_min must be 0 or more, got -"),
        ({"num_warmup_epochs": -1}, "num_warmup_epochs must be 0 or more, got -"),
        ({"num_cooldown_epochs": -1}, "num_cooldown_epochs must be 0 or more, got -"),
    ],
)
def test_arguments_out_of_range_are_errors(settings, message):
    arguments = {"total_num_epochs": 3, "num_update_steps_per_epoch": 4, **settings}
    with pytest.raises(ValueError, match=message) as caught:
        CosineLrScheduler(create_optimizer(0.1), **arguments)
    assert isinstance(caught.value, AssertionError), "as in 0.1.61"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_warmup_epochs": 4}, "take 16 updates, .* has 12, .* Lower num_warmup"),
        (
            {"num_warmup_epochs": 2, "num_cooldown_epochs": 1.5},
            "take 14 updates, .* has 12",
        ),
        ({"lr_min": 0.2}, "lowest learning rate is 0.2, above .* 0.1. Set lr_min"),
        ({"min_lr_ratio": 3}, "lowest learning rate is 0.3, above .* min_lr_ratio"),
        (
            {"num_warmup_epochs": 1, "warmup_starting_lr": 0.2},
            "warm-up starts from is 0.2, above .* 0.1. Set warmup_starting_lr",
        ),
        (
            {"num_warmup_epochs": 1, "warmup_starting_lr_ratio": 5},
            "warm-up starts from is 0.5, above .* warmup_starting_lr_ratio",
        ),
    ],
)
def test_what_is_hardly_meant_is_warned_of_found_95(settings, message):
    arguments = {"total_num_epochs": 3, "num_update_steps_per_epoch": 4, **settings}
    with pytest.warns(TrainingWarning, match=message) as warned:
        CosineLrScheduler(create_optimizer(0.1), **arguments)
    assert len(warned) == 1
