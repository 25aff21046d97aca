"""kill -9 at random instants: the next run finishes with the very same weights."""

import random
import signal
import time

import pytest
from processes import Job
from runs import finish, undisturbed, what_is_wrong_after
from scenario import Scenario

SCENARIO = Scenario(num_epochs=3, save_every_n_steps=2, max_checkpoints=2)
ASYNCHRONOUS = {"save_kwargs": (("asynchronous", True),)}


def kill_once(scenario, folder, expected, seconds, num_processes):
    """Kill a run after some time, finish it in new processes; say what is wrong."""
    job = Job(finish(scenario, folder), folder / "log", num_processes)
    time.sleep(seconds)
    victim = random.randrange(num_processes)
    job.kill(signal.SIGKILL, rank=victim)
    time.sleep(0.2)  # what a launcher takes to notice
    job.kill(signal.SIGKILL)
    job.wait()
    (folder / "result.pt").unlink(missing_ok=True)
    return what_is_wrong_after(scenario, folder, expected, num_processes)


ONE = pytest.mark.fault("kill -9 at a random instant, one process")
OF_TWO = pytest.mark.fault("kill -9 at a random instant, one of two processes")
LOADS_AGAIN = pytest.mark.filterwarnings("ignore:To find its place")
SAVE_EACH = {"save_every_n_steps": 1, "max_checkpoints": 1, **ASYNCHRONOUS}


@pytest.mark.parametrize(
    ("num_processes", "number", "changes"),
    [
        pytest.param(1, 100, {}, marks=ONE),
        pytest.param(1, 100, {"num_workers": 2}, marks=ONE),
        pytest.param(1, 20, SAVE_EACH, marks=ONE),
        pytest.param(2, 20, {}, marks=OF_TWO),
        pytest.param(2, 5, {"num_workers": 2}, marks=OF_TWO),
        pytest.param(2, 5, {"precision": "bf16"}, marks=OF_TWO),
        pytest.param(2, 5, {"saves_in_windows": True}, marks=OF_TWO),
        pytest.param(2, 5, ASYNCHRONOUS, marks=OF_TWO),
        pytest.param(2, 5, {"own_loader": True}, marks=[OF_TWO, LOADS_AGAIN]),
    ],
    ids=str,
)
def test_kill_9_at_random_instants(num_processes, number, changes, tmp_path, trials):
    scenario = SCENARIO.with_(**changes)
    expected, seconds = undisturbed(scenario, tmp_path / "undisturbed", num_processes)
    for trial in range(trials.count(number)):
        folder = tmp_path / f"trial {trial}"
        delay = random.uniform(0.0, seconds)
        trials.add(kill_once(scenario, folder, expected, delay, num_processes))
