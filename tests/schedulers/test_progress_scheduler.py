import math

import pytest
import torch
from toys import Keeps, create_trainer, ones

from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.errors import TrainingWarning
from pytorch_accelerated.placeholders import TrainerPlaceholderValues as Run
from pytorch_accelerated.schedulers import (
    InvalidScheduleError,
    ProgressLrScheduler,
    plot_schedule,
    schedule_curve,
)


def curve(*args, epochs=1, updates=10, lr=1.0, **kwargs):
    create = ProgressLrScheduler.create_scheduler_fn(*args, **kwargs)
    return schedule_curve(create, num_epochs=epochs, steps_per_epoch=updates, lr=lr)


def test_a_line_falls_from_the_whole_learning_rate_as_torchs_own_does():
    falling = curve("linear", lr=0.5)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)

    assert falling[0] == 0.5
    assert falling == pytest.approx([0.05 * n for n in range(10, 0, -1)])
    for power in (1.0, 2.0, 0.5):
        theirs = schedule_curve(
            lambda o, p=power: torch.optim.lr_scheduler.PolynomialLR(o, 10, power=p),
            10,
            optimizer=optimizer,
        )
        assert curve("polynomial", lr=0.5, power=power) == pytest.approx(theirs)


def test_warmup_and_cooldown_frame_the_shape_and_meet_it_without_a_jump():
    """20 updates: 4 rise from a tenth, 10 stay, 6 fall in a line to a tenth."""
    values = curve(
        "constant", epochs=2, warmup=4, cooldown=0.3, end=0.1, warmup_start=0.1
    )

    assert values[:4] == pytest.approx([0.1, 0.325, 0.55, 0.775])
    assert values[4:15] == [1.0] * 11
    assert values[15:] == pytest.approx([1.0 - 0.15 * n for n in range(1, 6)])


def test_a_shape_that_has_reached_the_end_stays_there_in_the_cooldown():
    values = curve("linear", cooldown=5, end=0.2)

    assert values == pytest.approx([1.0, 0.84, 0.68, 0.52, 0.36] + [0.2] * 5)


def test_the_inverse_square_root_is_that_of_the_updates_done_since_the_warmup():
    values = curve("inverse_sqrt", updates=100, warmup=9, cooldown=0.2, warmup_start=0)

    assert values[:9] == pytest.approx([n / 9 for n in range(9)])
    assert values[9:80] == pytest.approx([math.sqrt(9 / n) for n in range(9, 80)])
    last = math.sqrt(9 / 80)
    assert values[80:] == pytest.approx([last * (1 - n / 20) for n in range(20)])


def test_a_shape_may_be_a_function_and_lengths_placeholders():
    create = ProgressLrScheduler.create_scheduler_fn(
        lambda progress: 1 + progress, warmup=Run.NUM_UPDATE_STEPS_PER_EPOCH
    )
    values = schedule_curve(create, num_epochs=3, steps_per_epoch=5, lr=2.0)

    assert values[5:] == pytest.approx([2 + 0.2 * n for n in range(10)])
    assert len(plot_schedule(create, num_epochs=3, steps_per_epoch=5).lines) == 1


def test_what_cannot_be_a_schedule_is_refused_and_what_is_hardly_meant_warned_of():
    with pytest.raises(InvalidScheduleError, match=r"'cosine'. Take one of constant, "):
        curve("cosine")
    with pytest.raises(InvalidScheduleError, match="needs a warmup above 0"):
        curve("inverse_sqrt")
    with pytest.raises(InvalidScheduleError, match="cooldown must be 0 or more, got"):
        curve("linear", cooldown=-0.1)
    with pytest.warns(TrainingWarning, match="14 updates, but the schedule has 10"):
        values = curve("linear", warmup=8, cooldown=6)
    assert values[7] == pytest.approx(0.001 + 0.999 * 7 / 8)


def test_before_the_first_update_the_value_is_its_own_and_after_the_last_the_end():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    scheduler = ProgressLrScheduler(
        optimizer, "constant", 10, warmup=2, cooldown=5, end=0.25, warmup_start=0.5
    )
    assert scheduler.get_last_lr() == [1.0]

    scheduler.step_update(25)

    assert scheduler.get_last_lr() == [0.5]


def test_a_run_trains_with_the_curve_also_one_that_is_resumed(tmp_path):
    create = ProgressLrScheduler.create_scheduler_fn(
        lambda progress: 1 - progress**2, warmup=0.25
    )

    def rates_of(*callbacks, **kwargs):
        rates = Keeps("on_train_update_end", lambda trainer, **_: trainer.last_lr[0])
        create_trainer([rates, *callbacks], lr=0.1).train(
            ones(4),
            num_epochs=2,
            per_device_batch_size=1,
            create_scheduler_fn=create,
            **kwargs,
        )
        return rates.kept

    whole = rates_of(SaveTrainingStateCallback(tmp_path, save_every_n_steps=3))

    expected = [0.0001, 0.05005] + [0.1 * (1 - (n / 6) ** 2) for n in range(6)]
    assert whole == pytest.approx(expected)
    assert rates_of(resume_from=tmp_path / "step_3") == whole[3:]
