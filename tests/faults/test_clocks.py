"""The wall clock may jump: nothing that is saved, chosen or shown depends on it."""

import os
import random
import re
import time

import pytest
from scenario import Scenario, difference, fingerprint

from pytorch_accelerated import checkpoint
from pytorch_accelerated.callbacks import (
    ProgressBarCallback,
    TrainerCallback,
    progress,
)

DAY = 24 * 60 * 60
SECONDS_OF_A_STEP = 0.01
NEGATIVE_OR_HOURS = r"-\d+:|-\d+ samples|\d+:\d\d:\d\d"


class Jump(TrainerCallback):
    """Sets the clock after the fifth update, and takes some time for each step."""

    def __init__(self, patch, seconds):
        self.patch, self.seconds = patch, seconds

    def on_train_step_start(self, trainer, **kwargs):
        time.sleep(SECONDS_OF_A_STEP)

    def on_train_update_end(self, trainer, num_updates, **kwargs):
        if num_updates == 5:
            clock = time.time
            for name in ("time.time", "tqdm.std.time"):
                self.patch.setattr(name, lambda: clock() + self.seconds)


@pytest.mark.fault("the wall clock jumps by a day, and files have other times")
@pytest.mark.parametrize("days", [1, -1])
# By minutes, each update is due, for it takes longer; by hours, none is.
@pytest.mark.parametrize("minutes", [None, SECONDS_OF_A_STEP / 60, 60])
def test_a_jump_of_the_wall_clock_changes_nothing(
    minutes, days, tmp_path, trials, monkeypatch, capsys
):
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    scenario = Scenario(
        save_every_n_steps=2 if minutes is None else None,
        save_kwargs=(("save_at_end", False), ("save_every_n_minutes", minutes)),
    )

    def run(name, days):
        with monkeypatch.context() as patch:
            jump = Jump(patch, days * DAY)
            jumping = scenario.with_(callbacks=(ProgressBarCallback(), jump))
            trainer = jumping.run(tmp_path / name)
        return fingerprint(trainer), names_in(tmp_path / name / "states")

    expected = run("undisturbed", 0)
    capsys.readouterr()
    trials.add(difference(expected, run("jumped", days)))
    bars = capsys.readouterr().err
    assert "epoch 1/" in bars
    assert not re.search(NEGATIVE_OR_HOURS, bars), bars

    states = tmp_path / "jumped" / "states"
    newest = checkpoint.newest(states).path
    for path in [*states.rglob("*"), *states.iterdir()]:
        when = time.time() + random.uniform(-DAY, DAY)
        os.utime(path, (when, when))
    assert names_in(states) == expected[1]
    assert checkpoint.newest(states).path == newest


def names_in(states):
    return [state.path.name for state in checkpoint.list_checkpoints(states)]
