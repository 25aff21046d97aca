"""kill -9 at random instants: the next run finishes with the very same weights."""

import random
import signal
import time

import pytest
from processes import Job
from runs import finish, result_of, undisturbed
from scenario import Scenario, difference

SCENARIO = Scenario(num_epochs=3, save_every_n_steps=2, max_checkpoints=2)


def kill_once(scenario, folder, expected, seconds, num_processes=1):
    """Kill a run after some time, finish it in new processes; say what is wrong."""
    job = Job(finish(scenario, folder), folder / "log", num_processes)
    time.sleep(seconds)
    victim = random.randrange(num_processes)
    job.kill(signal.SIGKILL, rank=victim)
    time.sleep(0.2)  # what a launcher takes to notice
    job.kill(signal.SIGKILL)
    job.wait()
    (folder / "result.pt").unlink(missing_ok=True)
    job = Job(finish(scenario, folder), folder / "log", num_processes)
    if text := job.wait_or_explain():
        return text
    return difference(expected, result_of(folder))


@pytest.mark.fault("kill -9 at a random instant, one process")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_kill_9_at_random_instants(num_workers, tmp_path, trials):
    scenario = SCENARIO.with_(num_workers=num_workers)
    expected, seconds = undisturbed(scenario, tmp_path / "undisturbed")
    for number in range(trials.count(100)):
        folder = tmp_path / f"trial {number}"
        delay = random.uniform(0.0, seconds)
        trials.add(kill_once(scenario, folder, expected, delay))


@pytest.mark.fault("kill -9 at a random instant, one of two processes")
def test_kill_9_of_one_of_two_processes(tmp_path, trials):
    expected, seconds = undisturbed(SCENARIO, tmp_path / "undisturbed", 2)
    for number in range(trials.count(20)):
        folder = tmp_path / f"trial {number}"
        delay = random.uniform(0.0, seconds)
        trials.add(kill_once(SCENARIO, folder, expected, delay, 2))
