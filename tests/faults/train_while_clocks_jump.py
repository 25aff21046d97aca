"""Trains while the wall clock jumps, with clock_jumps.so preloaded.

``python train_while_clocks_jump.py FOLDER`` prints a line of JSON for each trial: what
went wrong, or null.
"""

import contextlib
import ctypes
import io
import json
import os
import random
import re
import sys
import time
from pathlib import Path

from scenario import Scenario, difference, fingerprint

from pytorch_accelerated import checkpoint
from pytorch_accelerated.callbacks import (
    ProgressBarCallback,
    TrainerCallback,
    progress,
)

DAY = 24 * 60 * 60
SECONDS_OF_A_STEP = 0.01
# By minutes, each update is due, for it takes longer; by hours, none is.
SAVED_WHEN = {
    "by steps": {"save_every_n_steps": 2},
    "by minutes": {"save_every_n_minutes": SECONDS_OF_A_STEP / 60},
    "by hours": {"save_every_n_minutes": 60},
}


class Jump(TrainerCallback):
    """Sets the clock after the fifth update, and takes some time for each step."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_train_step_start(self, trainer, **kwargs):
        time.sleep(SECONDS_OF_A_STEP)

    def on_train_update_end(self, trainer, num_updates, **kwargs):
        if num_updates == 5:
            before = time.time()
            ctypes.CDLL(os.environ["LD_PRELOAD"]).clock_jump(
                ctypes.c_long(self.seconds)
            )
            assert abs(time.time() - before - self.seconds) < 60


def main(folder: Path) -> None:
    progress.is_terminal = lambda stream: True  # as in a terminal
    for when, settings in SAVED_WHEN.items():
        settings = {"save_every_n_steps": None, "save_at_end": False, **settings}
        scenario = Scenario(
            save_every_n_steps=settings.pop("save_every_n_steps"),
            save_kwargs=tuple(settings.items()),
        )
        undisturbed = folder / when / "undisturbed"
        still = scenario.with_(callbacks=(Jump(0),))
        expected = fingerprint(still.run(undisturbed))
        for days in (1, -1):
            wrong = trial(scenario, folder / when, days, expected)
            text = json.dumps(wrong and f"{when}, {days} days: {wrong}")
            sys.stdout.write(f"{text}\n")


def trial(scenario: Scenario, folder: Path, days: int, expected) -> str | None:
    jumped = folder / f"{days} days"
    jumping = scenario.with_(callbacks=(ProgressBarCallback(), Jump(days * DAY)))
    with contextlib.redirect_stderr(io.StringIO()) as bars:
        trainer = jumping.run(jumped)
    if wrong := difference(expected, fingerprint(trainer)):
        return wrong
    names = [names_in(each / "states") for each in (folder / "undisturbed", jumped)]
    if names[0] != names[1]:
        return f"{names[1]} are saved instead of {names[0]}"
    if "epoch 1/" not in bars.getvalue() or re.search(
        r"-\d+:|-\d+ samples|\d+:\d\d:\d\d", bars.getvalue()
    ):
        return f"the bars show {bars.getvalue()}"
    return mix_times(jumped / "states")


def names_in(states: Path) -> list[str]:
    return [state.path.name for state in checkpoint.list_checkpoints(states)]


def mix_times(states: Path) -> str | None:
    """Give all files and folders other times, and see that it does not matter."""
    before = names_in(states), checkpoint.newest(states).path
    for path in [*states.rglob("*"), *states.iterdir()]:
        when = time.time() + random.uniform(-DAY, DAY)
        os.utime(path, (when, when))
    after = names_in(states), checkpoint.newest(states).path
    return None if before == after else f"{before} becomes {after}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
