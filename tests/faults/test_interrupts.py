"""Ctrl-C at any instant: the run ends at once, in order, and can be gone on with."""

import multiprocessing
import os
import random
import signal
import subprocess
import time
from functools import partial

import pytest
import torch
from processes import FAULTS, Job, python
from runs import undisturbed, wait_until_it_writes, what_is_wrong_after
from scenario import Scenario
from toys import At

from pytorch_accelerated import checkpoint
from pytorch_accelerated.callbacks import (
    PreemptionCallback,
    ProgressBarCallback,
)
from pytorch_accelerated.checkpoint.files import SummedFile
from pytorch_accelerated.errors import CheckpointError

SCENARIO = Scenario(save_every_n_steps=1, max_checkpoints=2)
ASYNCHRONOUS = (("asynchronous", True),)


def run_until_interrupted(scenario, folder):
    """Run; if Ctrl-C ends it, check that everything is left in order."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    bars, heard = ProgressBarCallback(), []
    listening = At(
        on_training_run_end=lambda trainer, **kwargs: heard.append("end"),
        on_exception=lambda trainer, exception, **kwargs: heard.append(type(exception)),
    )
    scenario = scenario.with_(callbacks=(PreemptionCallback, bars, listening))
    trainer = scenario.create_trainer(folder)
    try:
        scenario.run(folder, trainer=trainer)
    except KeyboardInterrupt:
        # Within the last event of a run, some have heard of it.
        assert heard[:1] in ([KeyboardInterrupt], ["end"])
        assert bars.pbar is None
        assert bars.eval_pbar is None
        assert signal.getsignal(signal.SIGTERM) == before
        assert type(trainer.model) is torch.nn.Sequential
        assert not (folder / "states" / ".lock").exists()
    else:
        return
    assert multiprocessing.active_children() == []
    raise KeyboardInterrupt


@pytest.mark.fault("Ctrl-C at a random instant")
@pytest.mark.parametrize(
    ("scenario", "number"),
    [
        pytest.param(SCENARIO, 8, id="saving at once"),
        pytest.param(
            SCENARIO.with_(save_kwargs=ASYNCHRONOUS), 6, id="saving in the background"
        ),
        pytest.param(SCENARIO.with_(num_workers=2), 6, id="with workers"),
    ],
)
def test_ctrl_c_at_random_instants(scenario, number, tmp_path, trials):
    expected, seconds = undisturbed(scenario, tmp_path / "undisturbed")
    for trial in range(trials.count(number)):
        folder = tmp_path / f"trial {trial}"
        run = partial(run_until_interrupted, scenario, folder)
        job = Job(run, folder / "log", own_group=True)
        wait_until_it_writes(job, folder)
        time.sleep(random.uniform(0, 0.9 * seconds))
        job.interrupt()
        trials.add(what_is_wrong(job, scenario, folder, expected))


def what_is_wrong(job, scenario, folder, expected):
    (code,) = job.wait(30)
    printed = job.log.read_text()
    if code not in (0, 130) or "AssertionError" in printed:
        return f"exit code {code}: {printed[-3000:]}"
    if text := job.wait_for_group():
        return text
    return what_is_wrong_after(scenario, folder, expected)


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), RuntimeError("DataLoader worker (pid 7) is killed")],
    ids=repr,
)
def test_ctrl_c_amid_a_write_is_not_taken_for_an_error_of_it(
    error, tmp_path, monkeypatch
):
    write = SummedFile.write

    def interrupted(self, data):
        if self.tell() > 0:
            raise error
        return write(self, data)

    monkeypatch.setattr(SummedFile, "write", interrupted)
    with pytest.raises(type(error)) as caught:
        checkpoint.save_file({"a": 1}, tmp_path / "file.pt")
    assert caught.value is error


def test_an_error_of_a_write_after_ctrl_c_is_one(tmp_path):
    def save():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            checkpoint.save_file({"a": 1}, tmp_path)

    with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
        save()
    assert "Could not write" in str(caught.value)


@pytest.fixture
def script(tmp_path):
    """Start a script that writes for some time, and end it after the test."""
    started = []

    def start(seconds):
        command, env = python(FAULTS / "interrupt_script.py", tmp_path, seconds)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=env, text=True, **pipes))
        return started[0]

    yield start
    started[0].kill()
    started[0].communicate()


def interrupt_after(line, process, delay=0):
    for printed in process.stdout:
        if printed == f"{line}\n":
            break
    time.sleep(delay)
    process.send_signal(signal.SIGINT)


@pytest.mark.fault("Ctrl-C, and its exit code")
# None but the first; a second one while a callback cleans up, and after it.
@pytest.mark.parametrize("second_after", [None, 0, 1])
def test_ctrl_c_waits_for_a_state_that_is_being_written(second_after, script, trials):
    process = script(seconds=1 if second_after is None else 4)
    interrupt_after("writing", process)
    expected = ["cleaning up", "written", "train() has ended"]
    if second_after is not None:
        interrupt_after("cleaning up", process, second_after)
        expected = ["train() has ended", "written"]  # whichever comes first
    printed, errors = process.communicate(timeout=30)
    lines = printed.splitlines()
    assert (lines if second_after is None else sorted(lines)) == expected
    assert errors.endswith("\nKeyboardInterrupt\n")
    # What a shell makes 130 of.
    trials.add(process.returncode != -signal.SIGINT and f"{process.returncode}")


def test_python_waits_for_a_write_before_it_exits(tmp_path):
    script = (
        "import sys, time, pathlib\n"
        "from pytorch_accelerated.checkpoint import BackgroundWriter\n"
        "write = lambda: (time.sleep(1), pathlib.Path(sys.argv[1]).touch())\n"
        "BackgroundWriter().start(write)"
    )
    command, environment = python("-c", script, tmp_path / "written")
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert (tmp_path / "written").exists()


def test_a_wait_that_is_interrupted_can_be_gone_on_with():
    def interrupt_then_write():
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        written.append(True)

    written = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    writer = checkpoint.BackgroundWriter()
    try:
        writer.start(interrupt_then_write)
        with pytest.raises(KeyboardInterrupt):
            writer.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not written
    writer.wait()
    assert written
