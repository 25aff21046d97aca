import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytorch_accelerated.errors import TrainingWarning
from pytorch_accelerated.schedulers import WSDLrScheduler
from pytorch_accelerated.schedulers.wsd_scheduler import estimate_checkpoint_steps

FLOOR = 1e-6
A_LONG_WARMUP = "ignore:The warm-up of"


def create_optimizer(*lrs):
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr}
        for lr in lrs or (0.1,)
    ]
    return torch.optim.SGD(groups, lr=0.1)


def run_schedule(scheduler, num_updates):
    """Return the learning rate of the first group that each update trains with."""
    curve = []
    for _ in range(num_updates):
        scheduler.step()
        curve.append(scheduler.optimizer.param_groups[0]["lr"])
    return curve


def curve_of(num_updates, **settings):
    return run_schedule(WSDLrScheduler(create_optimizer(), **settings), num_updates)


def sqrt_decay(t, base=0.1, r=FLOOR):
    return base * (r + (1 - r) * (1 - math.sqrt(t)))


def harmonic_decay(t, base=0.1, r=FLOOR):
    return base / (t / r + (1 - t))


def period(start, end, decay_steps, pre_decay_step):
    return {
        "period_start": start,
        "period_end": end,
        "decay_steps": decay_steps,
        "pre_decay_step": pre_decay_step,
    }


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("inverse_sqrt", [True, False])
@pytest.mark.parametrize(
    ("num_checkpoints", "ends"),
    [(1, [200]), (2, [100, 200]), (3, [50, 100, 200]), (4, [25, 50, 100, 200])],
)
def test_each_period_decays_before_its_checkpoint(num_checkpoints, ends, inverse_sqrt):
    """Defect 2: the second half of two checkpoints trained at the floor.

    Found 95: so did the first update of each period but the first.
    """
    curve = curve_of(
        201,
        total_steps=200,
        num_checkpoints=num_checkpoints,
        decay_phase_ratio=0.2,
        use_inverse_sqrt_decay=inverse_sqrt,
        lr_min=0.01,
    )
    decay = sqrt_decay if inverse_sqrt else harmonic_decay
    expected = [0.1] * 201
    for start, end in zip([0, *ends], ends, strict=False):
        d = (end - start) // 5
        for i in range(d):
            expected[end - d + i] = decay(i / d, r=0.01)
    expected[200] = 0.001
    assert curve == pytest.approx(expected, rel=1e-9)


def test_warmup_rises_linearly_to_the_stable_value():
    optimizer = create_optimizer()
    scheduler = WSDLrScheduler(
        optimizer, total_steps=50, num_warmup_steps=5, warmup_starting_lr=0.05
    )
    assert optimizer.param_groups[0]["lr"] == 0.05
    curve = run_schedule(scheduler, 50)
    decay = [sqrt_decay(i / 5) for i in range(5)]
    expected = [0.05, 0.06, 0.07, 0.08, 0.09] + [0.1] * 40 + decay
    assert curve == pytest.approx(expected, rel=1e-12)


def test_warmup_left_to_the_scheduler_is_one_percent():
    """Other WSD: the documentation said 10%."""
    scheduler = WSDLrScheduler(
        create_optimizer(), total_steps=2_950, num_warmup_steps=None
    )
    assert scheduler.num_warmup_steps == 29


@pytest.mark.parametrize(
    ("total", "num_checkpoints", "expected"),
    [
        (100_000, 1, [100_000]),
        (100_000, 2, [50_000, 100_000]),
        (200_000, 3, [50_000, 100_000, 200_000]),
        (200_000, 4, [25_000, 50_000, 100_000, 200_000]),
        (7, 3, [1, 3, 7]),
        (3, 4, [1, 3]),
        (2, 2, [1, 2]),
        (1, 3, [1]),
    ],
)
def test_each_checkpoint_comes_half_way_to_the_next(total, num_checkpoints, expected):
    """Defect 2: 2 gave [25%, 50%], 4 gave three, and tiny lengths [0, 0]."""
    assert estimate_checkpoint_steps(total, num_checkpoints) == expected
    scheduler = WSDLrScheduler(
        create_optimizer(), total_steps=total, num_checkpoints=num_checkpoints
    )
    assert scheduler.get_checkpoint_steps() == expected
    assert scheduler.checkpoint_steps == expected


def test_the_decay_info_tells_where_each_period_starts_decays_and_ends():
    scheduler = WSDLrScheduler(
        create_optimizer(), total_steps=200, num_checkpoints=2, decay_phase_ratio=0.15
    )
    first, second = period(0, 100, 15, 85), period(100, 200, 15, 185)
    assert scheduler.get_decay_info() == [first, second]
    assert scheduler.checkpoint_decay_info == [first, second]
    assert scheduler.get_phase_info(0) == first
    assert scheduler.get_phase_info(100) == first
    assert scheduler.get_phase_info(101) == second
    assert scheduler.get_phase_info(300) == second
    assert scheduler.get_updated_values(250) == [0.1 * FLOOR], "after the end"
    assert scheduler.get_updated_values(85) == [0.1], "the state before the decay"
    assert scheduler.get_updated_values(86)[0] < 0.1


def test_the_present_position_can_be_read():
    scheduler = WSDLrScheduler(
        create_optimizer(), total_steps=20, num_checkpoints=2, decay_phase_ratio=0.2
    )
    assert scheduler.get_current_step() == -1
    assert scheduler.get_current_phase_info()["period_end"] == 10
    run_schedule(scheduler, 12)
    assert scheduler.get_current_step() == 11
    assert scheduler.get_current_phase_info()["period_end"] == 20
    assert scheduler._get_checkpoint_info(11) == (10, 1)
    assert scheduler._get_checkpoint_info(10) == (10, 10)
    scheduler._get_checkpoint_info.cache_clear()


@pytest.mark.parametrize("inverse_sqrt", [True, False])
def test_a_decay_of_no_update_and_one_to_zero_are_no_divisions_by_zero(inverse_sqrt):
    """Other WSD: both were."""
    settings = {"use_inverse_sqrt_decay": inverse_sqrt}
    curve = curve_of(9, total_steps=8, num_checkpoints=2, **settings)
    assert curve == [0.1] * 8 + [0.1 * FLOOR]

    curve = curve_of(11, total_steps=10, decay_phase_ratio=0.3, lr_min=0, **settings)
    assert curve[:8] == [0.1] * 8
    assert curve[10] == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "length of the schedule is missing. Give total_steps, or both"),
        ({"num_epochs": 3}, "length of the schedule is missing"),
        (
            {"num_epochs": 3, "num_update_steps_per_epoch": 8, "total_steps": 24},
            "not all three",
        ),
        ({"total_steps": 0}, "updates of the schedule must be 1 or more, got 0"),
        ({"num_epochs": 0, "num_update_steps_per_epoch": 8}, "1 or more, got 0"),
        ({"total_steps": 9, "decay_phase_ratio": 1.1}, "between 0 and 1, got 1.1"),
        ({"total_steps": 9, "decay_phase_ratio": -0.1}, "between 0 and 1, got -0.1"),
        ({"total_steps": 9, "lr_min": -1}, "lr_min, .* 0 and 1, got -1"),
        ({"total_steps": 9, "lr_min": 2}, "a fraction .* between 0 and 1, got 2"),
        ({"total_steps": 9, "num_checkpoints": 0}, "must be 1 or more, got 0"),
        ({"total_steps": 9, "num_warmup_steps": -2}, "must be 0 or more, got -2"),
        (
            {"total_steps": 9, "decay_phase_ratio": 0.4, "num_checkpoints": 2},
            "at most 1/3 with several checkpoints, got 0.4",
        ),
        (
            {"total_steps": 9, "num_warmup_steps": 1, "warmup_starting_lr": 0.2},
            "warmup_starting_lr is 0.2, above .* 0.1. Lower it",
        ),
    ],
)
def test_arguments_out_of_range_are_errors(settings, message):
    """Other WSD: no length was a TypeError about None."""
    with pytest.raises(ValueError, match=message) as caught:
        WSDLrScheduler(create_optimizer(), **settings)
    assert isinstance(caught.value, AssertionError), "as in 0.1.61"


@pytest.mark.parametrize(
    ("num_checkpoints", "warmup", "end"), [(1, 30, 20), (1, 20, 20), (3, 5, 5)]
)
def test_a_warmup_that_leaves_nothing_to_decay_is_warned_of_found_95(
    num_checkpoints, warmup, end
):
    settings = {"total_steps": 20, "num_checkpoints": num_checkpoints}
    with pytest.warns(
        TrainingWarning,
        match=rf"warm-up of {warmup} updates .* after {end}, .* a shorter warm-up",
    ):
        WSDLrScheduler(create_optimizer(), num_warmup_steps=warmup, **settings)
    WSDLrScheduler(create_optimizer(), num_warmup_steps=end - 1, **settings)
    WSDLrScheduler(
        create_optimizer(),
        num_warmup_steps=warmup,
        is_continuation_from_checkpoint=True,
        **settings,
    )


any_settings = st.fixed_dictionaries(
    {
        "total_steps": st.integers(1, 60),
        "num_warmup_steps": st.none() | st.integers(0, 70),
        "decay_phase_ratio": st.floats(0, 1 / 3),
        "lr_min": st.floats(0, 1),
        "warmup_starting_lr": st.floats(0, 0.1),
        "use_inverse_sqrt_decay": st.booleans(),
        "num_checkpoints": st.integers(1, 8),
    }
)


@pytest.mark.filterwarnings(A_LONG_WARMUP)
@given(settings=any_settings, stop=st.integers(0, 60))
def test_a_saved_schedule_goes_on_as_if_never_interrupted(settings, stop):
    """Defect 3: every resumed schedule started again."""
    total = settings["total_steps"]
    stop = min(stop, total)
    whole = curve_of(total + 1, **settings)

    original = WSDLrScheduler(create_optimizer(), **settings)
    run_schedule(original, stop)
    optimizer = create_optimizer()
    restored = WSDLrScheduler(optimizer, total_steps=5)
    restored.load_state_dict(saved_and_loaded(original.state_dict()))

    if stop:
        assert optimizer.param_groups[0]["lr"] == whole[stop - 1]
    assert run_schedule(restored, total + 1 - stop) == whole[stop:]


def state_of_0_1_61():
    """Return what version 0.1.61 saved for two checkpoints: without the position."""
    return {
        "param_group_field": "lr",
        "base_lr_values": [0.1],
        "num_epochs": None,
        "num_update_steps_per_epoch": None,
        "total_steps": 100,
        "num_warmup_steps": 10,
        "decay_phase_ratio": 0.2,
        "lr_min": 0.01,
        "warmup_starting_lr": 1e-6,
        "use_inverse_sqrt_decay": True,
        "num_checkpoints": 2,
        "is_continuation_from_checkpoint": False,
        "checkpoint_steps": [25, 50],
        "checkpoint_decay_info": [period(0, 25, 5, 20), period(25, 50, 5, 45)],
        "previous_checkpoint_step": None,
    }


def test_a_state_without_position_is_loaded_with_a_warning():
    scheduler = WSDLrScheduler(create_optimizer(), total_steps=30)
    run_schedule(scheduler, 4)
    with pytest.warns(UserWarning, match="goes on from update 3"):
        scheduler.load_state_dict(state_of_0_1_61())
    assert scheduler.total_steps == 100
    assert scheduler.checkpoint_steps == [50, 100], "and not those of defect 2"
    assert scheduler.get_current_step() == 3


def test_a_continuation_starts_at_the_stable_value_without_warmup():
    """Defect 3: loading a state switched the continuation off."""
    scheduler = WSDLrScheduler(
        create_optimizer(),
        total_steps=40,
        num_warmup_steps=5,
        is_continuation_from_checkpoint=True,
    )
    scheduler.load_state_dict(state_of_0_1_61())

    assert scheduler.is_continuation_from_checkpoint is True
    assert scheduler.total_steps == 40
    assert scheduler.decay_phase_ratio == 0.2
    assert scheduler.checkpoint_steps == [20, 40]
    assert scheduler.previous_checkpoint_step is None
    assert scheduler.get_updated_values(0) == scheduler.base_lr_values == [0.1]
    decay = [sqrt_decay(i / 4, r=0.01) for i in range(5)]
    expected = [0.1] * 16 + decay[:4] + [0.1] * 16 + decay
    assert run_schedule(scheduler, 41) == pytest.approx(expected)


@pytest.mark.parametrize("stop", [90, 100])
def test_a_continuation_starts_again_from_any_checkpoint_of_another_run(stop):
    """Defect 49: its first update had the decayed learning rate."""
    original = WSDLrScheduler(create_optimizer(), total_steps=100)
    run_schedule(original, stop + 1)

    optimizer = create_optimizer()
    scheduler = WSDLrScheduler(
        optimizer, total_steps=100, is_continuation_from_checkpoint=True
    )
    scheduler.step()
    optimizer.load_state_dict(original.optimizer.state_dict())
    scheduler.load_state_dict(original.state_dict())

    assert optimizer.param_groups[0]["lr"] == 0.1, "for the first update"
    rest = run_schedule(scheduler, 99)
    assert rest[:89] == [0.1] * 89
    assert rest[98] == pytest.approx(sqrt_decay(0.9))


def test_a_continuation_of_another_length_is_another_run():
    """Found, section G: at update 31 of 40, the run of 100 would have gone on."""
    short, long = (
        WSDLrScheduler(
            create_optimizer(), total_steps=total, is_continuation_from_checkpoint=True
        )
        for total in (40, 100)
    )
    run_schedule(short, 31)
    long.load_state_dict(short.state_dict())
    assert long.get_current_step() == -1
    assert run_schedule(long, 100)[89:92] == [
        0.1,
        0.1,
        pytest.approx(sqrt_decay(0.1)),
    ]


def test_a_continuation_accepts_an_incomplete_state():
    scheduler = WSDLrScheduler(
        create_optimizer(), total_steps=40, is_continuation_from_checkpoint=True
    )
    scheduler.load_state_dict({"decay_phase_ratio": 0.25})
    assert scheduler.get_decay_info()[0]["pre_decay_step"] == 30
    assert scheduler.get_updated_values(0) == [0.1]


@given(stop=st.integers(0, 40))
def test_an_interrupted_continuation_goes_on_where_it_stopped(stop):
    settings = {"total_steps": 40, "is_continuation_from_checkpoint": True}
    whole = curve_of(41, **settings)
    original = WSDLrScheduler(create_optimizer(), **settings)
    run_schedule(original, stop)

    restored = WSDLrScheduler(create_optimizer(), **settings)
    restored.load_state_dict(saved_and_loaded(original.state_dict()))
    assert run_schedule(restored, 41 - stop) == whole[stop:]

    restored.restart()
    assert restored.optimizer.param_groups[0]["lr"] == whole[0]
    assert run_schedule(restored, 40) == whole[1:]
