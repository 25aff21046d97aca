"""kill -9 at random instants: the next run finishes with the very same weights."""

import random
import signal
import time

import pytest
from processes import Job
from runs import finish, result_of, undisturbed
from scenario import Scenario, difference

SCENARIO = Scenario(num_epochs=3, save_every_n_steps=2, max_checkpoints=2)
ASYNCHRONOUS = {"save_kwargs": (("asynchronous", True),)}


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
@pytest.mark.parametrize(
    ("scenario", "number"),
    [
        pytest.param(SCENARIO, 100, id="as it is"),
        pytest.param(SCENARIO.with_(num_workers=2), 100, id="2 workers"),
        pytest.param(
            SCENARIO.with_(save_every_n_steps=1, max_checkpoints=1, **ASYNCHRONOUS),
            20,
            id="asynchronous",
        ),
    ],
)
def test_kill_9_at_random_instants(scenario, number, tmp_path, trials):
    expected, seconds = undisturbed(scenario, tmp_path / "undisturbed")
    for trial in range(trials.count(number)):
        folder = tmp_path / f"trial {trial}"
        delay = random.uniform(0.0, seconds)
        trials.add(kill_once(scenario, folder, expected, delay))


@pytest.mark.fault("kill -9 at a random instant, one of two processes")
@pytest.mark.parametrize(
    ("scenario", "number"),
    [
        pytest.param(SCENARIO, 20, id="as it is"),
        pytest.param(SCENARIO.with_(num_workers=2), 5, id="2 workers"),
        pytest.param(SCENARIO.with_(precision="bf16"), 5, id="bf16"),
        pytest.param(SCENARIO.with_(saves_in_windows=True), 5, id="in windows"),
        pytest.param(SCENARIO.with_(**ASYNCHRONOUS), 5, id="asynchronous"),
        pytest.param(
            *(SCENARIO.with_(own_loader=True), 5),
            id="own loader",
            marks=pytest.mark.filterwarnings("ignore:To find its place"),
        ),
    ],
)
def test_kill_9_of_one_of_two_processes(scenario, number, tmp_path, trials):
    expected, seconds = undisturbed(scenario, tmp_path / "undisturbed", 2)
    for trial in range(trials.count(number)):
        folder = tmp_path / f"trial {trial}"
        delay = random.uniform(0.0, seconds)
        trials.add(kill_once(scenario, folder, expected, delay, 2))
