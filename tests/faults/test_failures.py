"""Processes that die, code that raises, losses that are no numbers, Ctrl-C."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import Job
from runs import finish, result_of, undisturbed
from scenario import Augmented, Scenario, difference, fingerprint

from pytorch_accelerated import checkpoint
from pytorch_accelerated.callbacks import (
    PreemptionCallback,
    ProgressBarCallback,
    TrainerCallback,
)
from pytorch_accelerated.errors import NonFiniteLossError

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"


class Raise(TrainerCallback):
    """Raises an error in an event, at its n-th time."""

    def __init__(self, event, error, count=1):
        self.left = count

        def act(trainer, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise error

        setattr(self, event, act)


# --------------------------------------------------------------- processes that die


@pytest.mark.fault("one of two processes dies")
def test_the_other_process_ends_with_an_error_and_a_new_run_goes_on(tmp_path, trials):
    scenario = Scenario(num_epochs=6)
    expected, seconds = undisturbed(scenario, tmp_path / "undisturbed", 2)
    for number in range(trials.count(5)):
        folder = tmp_path / f"trial {number}"
        job = Job(finish(scenario, folder), folder / "log", 2)
        while not (folder / "states" / "step_2").exists():
            time.sleep(0.002)
        time.sleep(random.uniform(0, seconds / 3))
        victim = number % 2
        job.kill(signal.SIGKILL, rank=victim)
        codes = job.wait(60)
        assert codes[victim] == -signal.SIGKILL, "the trial is too late"
        if codes[1 - victim] != 1:
            trials.add(f"exit codes {codes}")
            continue
        again = Job(finish(scenario, folder), folder / "log", 2)
        text = again.wait_or_explain()
        trials.add(text or difference(expected, result_of(folder)))


@pytest.mark.fault("one of two processes dies under torchrun --max-restarts")
def test_torchrun_starts_again_and_the_run_goes_on(tmp_path, trials):
    expected, _ = undisturbed(Scenario(), tmp_path / "undisturbed", 2)
    for number in range(trials.count(2)):
        folder = tmp_path / f"trial {number}"
        folder.mkdir()
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc_per_node", "2", "--max_restarts", "2"),
                *(HERE / "train_script.py", folder, str(2 + number)),
            ],
            env={
                **os.environ,
                "PYTHONPATH": f"{SOURCE}{os.pathsep}{HERE}",
                "OMP_NUM_THREADS": "1",
                # Without it torch's restarts on one machine hang now and then.
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            },
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert (folder / "has died").exists(), done.stderr[-2000:]
        if done.returncode:
            trials.add(done.stderr[-2000:])
        else:
            trials.add(difference(expected, result_of(folder)))


class KillsWorker(Augmented):
    """Kills the process that reads a sample, unless that is the main one."""

    def __init__(self, num_samples, main, how):
        super().__init__(num_samples)
        self.main, self.how = main, how

    def __getitem__(self, index):
        if index == 5 and os.getpid() != self.main:
            if isinstance(self.how, Exception):
                raise self.how
            os.kill(os.getpid(), self.how)
        return super().__getitem__(index)


@pytest.mark.fault("a loader's worker dies, a dataset, callback or hook raises")
@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        (signal.SIGKILL, RuntimeError, "killed by signal: Killed"),
        (signal.SIGSEGV, RuntimeError, "Segmentation fault"),
        (OSError("bad sample"), OSError, "bad sample"),
    ],
)
def test_a_worker_that_dies_ends_the_run_with_an_error(
    how, error, text, tmp_path, trials
):
    class WithKiller(Scenario):
        def train_dataset(self):
            return KillsWorker(self.num_samples, os.getpid(), how)

    scenario = WithKiller(num_workers=2)
    trainer = scenario.create_trainer(tmp_path)
    with pytest.raises(error, match=text) as caught:
        scenario.run(tmp_path, trainer=trainer)
    assert "The run ended in epoch 1 (training)" in notes_of(caught.value)
    assert type(trainer.model) is torch.nn.Sequential
    trials.add(None)


def notes_of(error):
    if sys.version_info < (3, 11):
        pytest.skip("errors have notes from Python 3.11")
    return "\n".join(error.__notes__)


# ----------------------------------------------------------------- code that raises

EVENTS = [
    "on_training_run_start",
    "on_train_epoch_start",
    "on_train_step_start",
    "on_train_update_end",
    "on_train_step_end",
    "on_train_epoch_end",
    "on_eval_epoch_start",
    "on_eval_step_start",
    "on_eval_step_end",
    "on_eval_epoch_end",
    "on_training_run_epoch_end",
    "on_training_run_end",
    "on_before_save",
]


@pytest.mark.fault("a loader's worker dies, a dataset, callback or hook raises")
@pytest.mark.parametrize("error", [OSError("broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("event", EVENTS)
def test_an_error_in_any_event_leaves_everything_in_order(
    event, error, tmp_path, trials
):
    bars = ProgressBarCallback()
    ended = []

    class End(TrainerCallback):
        def on_training_run_end(self, trainer, **kwargs):
            ended.append("end")

        def on_exception(self, trainer, exception, **kwargs):
            ended.append(exception)

    callbacks = (PreemptionCallback, bars, End, Raise(event, error))
    scenario = Scenario(callbacks=callbacks)
    trainer = scenario.create_trainer(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(type(error)) as caught:
        scenario.run(tmp_path, trainer=trainer)
    assert caught.value is error
    assert ended.count(error) == 1
    assert ended.count("end") == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert bars.pbar is None
    assert type(trainer.model) is torch.nn.Sequential
    assert not (tmp_path / "states" / ".lock").exists()
    # What was saved before can be resumed, and the trainer can be used again.
    resumed = Scenario().run(tmp_path, resume_from="auto")
    assert resumed.run_history.current_epoch == 4
    scenario.run(tmp_path, trainer=trainer)
    trials.add(None)


class ExhaustMemory(TrainerCallback):
    def on_train_step_start(self, trainer, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_lack_of_memory_says_what_to_try(tmp_path):
    scenario = Scenario(callbacks=(ExhaustMemory,))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        scenario.run(tmp_path)
    notes = notes_of(caught.value)
    assert "batches of 4 samples" in notes
    assert "per_device_batch_size=2 and gradient_accumulation_steps=6" in notes


# ----------------------------------------------------------- losses that are no numbers


class SpoilWeights(TrainerCallback):
    """Makes the weights of one process infinite, and so its loss from then on."""

    def __init__(self, num_updates, process):
        self.num_updates, self.process = num_updates, process

    def on_train_step_start(self, trainer, **kwargs):
        is_here = trainer._accelerator.process_index == self.process
        if is_here and trainer.num_updates == self.num_updates:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(float("inf"))


def state_is_finite(folder):
    for state in checkpoint.list_checkpoints(folder / "states"):
        weights = state.load_weights()
        if not all(torch.isfinite(each).all() for each in weights.values()):
            return False
    for name in ("best.pt", "ema.pt"):
        if (folder / name).exists():
            weights = checkpoint.load_file(folder / name)["model_state_dict"]
            if not all(torch.isfinite(each).all() for each in weights.values()):
                return False
    return True


@pytest.mark.fault("the loss becomes NaN, on one process or on one of two")
@pytest.mark.parametrize(("num_processes", "process"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("num_updates", [3, 6])
def test_nothing_is_saved_of_a_run_whose_loss_is_not_finite(
    num_updates, num_processes, process, tmp_path, trials
):
    spoiling = SpoilWeights(num_updates, process)
    scenario = Scenario(callbacks=(spoiling,), save_every_n_steps=2)
    if num_processes == 2:
        scenario = scenario.with_(num_epochs=6, patience=9)

    def run():
        try:
            scenario.run(tmp_path)
        except NonFiniteLossError:
            raise SystemExit(7) from None

    job = Job(run, tmp_path / "log", num_processes)
    codes = job.wait(60)
    if codes != [7] * num_processes:
        trials.add(f"exit codes {codes}: {job.log.read_text()[-2000:]}")
    elif not state_is_finite(tmp_path):
        trials.add("something that is not finite was saved")
    else:
        newest = checkpoint.newest(tmp_path / "states")
        late = newest is not None and newest.num_updates > num_updates
        trials.add(f"{newest} was saved" if late else None)


# ----------------------------------------------------------- writing in the background


def test_a_run_that_writes_in_the_background_saves_the_same(tmp_path):
    scenario = Scenario(max_checkpoints=2)
    asynchronous = scenario.with_(save_kwargs=(("asynchronous", True),))
    expected = fingerprint(scenario.run(tmp_path / "at once"))
    assert (
        difference(expected, fingerprint(asynchronous.run(tmp_path / "later"))) is None
    )
    names = [
        [state.path.name for state in checkpoint.list_checkpoints(folder / "states")]
        for folder in (tmp_path / "at once", tmp_path / "later")
    ]
    assert names[0] == names[1] == ["step_12", "epoch_3", "final"]
    resumed = scenario.run(
        tmp_path / "again", resume_from=tmp_path / "later" / "states" / "step_12"
    )
    assert difference(expected, fingerprint(resumed)) is None


@pytest.mark.fault("kill -9 at a random instant, writing in the background")
def test_kill_9_while_writing_in_the_background(tmp_path, trials):
    scenario = Scenario(
        max_checkpoints=1,
        save_every_n_steps=1,
        save_kwargs=(("asynchronous", True),),
    )
    expected, seconds = undisturbed(scenario, tmp_path / "undisturbed")
    for number in range(trials.count(20)):
        folder = tmp_path / f"trial {number}"
        job = Job(finish(scenario, folder), folder / "log")
        time.sleep(random.uniform(0, seconds))
        job.kill(signal.SIGKILL)
        job.wait()
        again = Job(finish(scenario, folder), folder / "log")
        text = again.wait_or_explain()
        trials.add(text or difference(expected, result_of(folder)))
