"""Open files, the size of files, memory and shared memory run out; nothing leaks."""

import ctypes
import gc
import json
import os
import resource
import shutil
import subprocess
import tempfile
import threading
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from processes import Job, memory_taken
from runs import SMALL, train_another_epoch
from scenario import difference
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer, checkpoint
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, TrainerCallback
from pytorch_accelerated.errors import CheckpointError
from pytorch_accelerated.state import TrainingState

LIMITS = "limits of open files, file sizes, memory and shared memory"
MEGABYTE = 2**20


@contextmanager
def limited(kind, soft):
    """Lower a limit of this process meanwhile."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextmanager
def files_left(number):
    """Let this process open no more than a number of files."""
    taken = []
    with limited(resource.RLIMIT_NOFILE, 256):
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(number):
            os.close(taken.pop())
        try:
            yield
        finally:
            for descriptor in taken:
                os.close(descriptor)


def memory_left(megabytes):
    """Let this process take no more than some memory besides what it has."""
    gc.collect()
    return limited(resource.RLIMIT_AS, memory_taken() + megabytes * MEGABYTE)


def try_limit(trainer, folder, limit, reason):
    """Save and load under a limit; yield what went wrong."""
    name, expected = "step_1", read(folder / "step_1")
    for asynchronous in (False, True):
        with limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a replaced one may stay
            error = attempt(save, trainer, folder / "step_2", asynchronous)
        yield what_is_wrong_with(error, reason)
        if error is None:
            name, expected = "step_2", read(folder / "step_2")
    with limit():
        newest = attempt(checkpoint.newest, folder)
        state = attempt(read, folder / name)
    if isinstance(newest, checkpoint.Checkpoint):
        yield None if newest.path.name == name else f"{newest} is taken, not {name}"
    else:
        yield what_is_wrong_with(newest or ValueError("nothing is found"), reason)
    if isinstance(state, dict):
        yield difference(expected, state)
    else:
        yield what_is_wrong_with(state, reason)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if checkpoint.newest(folder).path.name != name:
            yield f"{name} is damaged"


def read(path):
    return checkpoint.to_storable(TrainingState.read(checkpoint.Checkpoint(path)))


def save(trainer, path, asynchronous):
    trainer.save_training_state(path, asynchronous=asynchronous)
    trainer.finish_saving()


def attempt(function, *args):
    try:
        return function(*args)
    except Exception as error:
        return error


def what_is_wrong_with(error, reason):
    if error is None or (isinstance(error, CheckpointError) and reason in str(error)):
        return None
    return f"{type(error).__name__}: {error}"


def try_limits(trials, trainer, folder, limits, reason):
    """Save and load under each limit, in a process of its own, which may die of it."""
    older = folder / "step_1"
    trainer.save_training_state(older)
    train_another_epoch(trainer, older)
    for number, limit in enumerate(limits):
        states = folder / f"{number}" / "states"
        shutil.copytree(older, states / "step_1")

        def run(states=states, limit=limit):
            wrong = [*try_limit(trainer, states, limit, reason)]
            assert not any(wrong), wrong

        job = Job(run, folder / f"{number}" / "log")
        wrong = job.wait_or_explain()
        # The process has ended by now.
        checkpoint.clean_leftovers(states)
        left = {path.name for path in states.iterdir()} - {"step_1", "step_2"}
        trials.add(wrong or (f"{left} are left" if left else None))


SIZES = (0, 10, 1000, 2000, 5000, 10_000, 50_000)
NO_MORE_FILES = [lambda n=n: files_left(n) for n in range(8)]
NO_LARGER_FILES = [lambda n=n: limited(resource.RLIMIT_FSIZE, n) for n in SIZES]


@pytest.mark.fault(LIMITS)
@pytest.mark.parametrize(
    ("limits", "number"),
    [(NO_MORE_FILES, 24), (NO_LARGER_FILES, 27)],
    ids=["open files", "file sizes"],
)
def test_files_run_out_or_may_not_grow_larger(limits, number, tmp_path, trials):
    trainer = SMALL.run(tmp_path / "run")
    try_limits(trials, trainer, tmp_path, limits, f"(errno {number})")


@pytest.mark.fault(LIMITS)
@pytest.mark.parametrize("is_known", [False, True])
def test_what_cannot_be_read_for_want_of_open_files_is_not_taken_for_damaged(
    is_known, tmp_path, trials
):
    """It would be passed over by "auto", and the run would start afresh."""
    SMALL.run(tmp_path)
    found = checkpoint.Checkpoint(tmp_path / "states" / "final")
    assert not is_known or found.num_updates == 1  # its manifest is read now
    with files_left(0), pytest.raises(CheckpointError, match=r"may be whole.*errno 24"):
        found.verify()
    trials.add(None)


@pytest.mark.fault(LIMITS)
def test_the_memory_of_the_host_runs_out(tmp_path, trials):
    """In the middle of a save, of the copy for one in the background, and of a load."""
    limits = [lambda n=n: memory_left(n) for n in (1, 2, 5, 9, 12, 20, 30, 45)]
    trainer = create_trainer(torch.nn.Linear(1400, 1400), [])  # 8 MB, and 16 of Adam
    sample = torch.zeros(2, 1400)
    trainer.train(TensorDataset(sample, sample), num_epochs=1)
    try_limits(trials, trainer, tmp_path, limits, "(errno 12)")


def create_trainer(model, callbacks):
    return Trainer(
        model,
        torch.nn.MSELoss(),
        torch.optim.Adam(model.parameters()),
        callbacks=callbacks,
        accelerator_kwargs={"cpu": True},
    )


@pytest.mark.fault(LIMITS)
def test_shared_memory_is_full(tmp_path, trials):
    """Workers put batches there; a small one is mounted for one process to see."""
    new_mounts, refused = 0x00020000, 77

    def run():
        libc = ctypes.CDLL(None, use_errno=True)
        mounts = [
            ["mount", "--make-rprivate", "/"],
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"],
        ]
        if libc.unshare(new_mounts) or any(map(subprocess.call, mounts)):
            raise SystemExit(refused)
        states = tmp_path / "states"
        saving = SaveTrainingStateCallback(states, save_every_n_steps=1)
        trainer = create_trainer(torch.nn.Linear(1000, 1), [saving])
        dataset = TensorDataset(torch.zeros(40, 1000), torch.zeros(40, 1))
        trainer.train(dataset, 1, per_device_batch_size=4)
        # what is a bus error in an older torch
        message = r"shared memory\(shm\).*No space left|Bus error"
        with pytest.raises(RuntimeError, match=message) as raised:
            trainer.train(
                dataset, 1, per_device_batch_size=20, train_dataloader_kwargs=ONE_WORKER
            )
        assert any("/dev/shm" in note for note in raised.value.__notes__)
        assert checkpoint.newest(states).num_updates == 10

    job = Job(run, tmp_path / "log")
    if job.wait() == [refused]:
        pytest.skip("may not mount another /dev/shm")
    trials.add(job.wait_or_explain())


# ------------------------------------------------------------------------------ leaks

ONE_WORKER = {"num_workers": 1}


class Fail(TrainerCallback):
    """Raises an error in one of the events, or makes a save fail."""

    def __init__(self, how, folder):
        self.how, self.folder = how, folder

    def on_train_step_end(self, trainer, **kwargs):
        if self.how == "step":
            raise ValueError("on purpose")
        if self.how == "save":
            (self.folder / "states" / "epoch_1").write_text("in the way")

    def on_training_run_end(self, trainer, **kwargs):
        if self.how == "end":
            raise ValueError("on purpose")


FAILURES = (None, None, "step", None, "save", None, "end")


def train_once(number, folder):
    """Train one of many short runs: with workers, in the background, with errors."""
    failure = FAILURES[number % len(FAILURES)]
    scenario = SMALL.with_(
        save_every_n_steps=1,
        max_checkpoints=1,
        num_workers=int(number % 5 == 4),
        callbacks=() if failure is None else (Fail(failure, folder),),
        save_kwargs=(("asynchronous", number % 3 == 0), ("on_save_error", "raise")),
    )
    try:
        scenario.run(folder)
    except (ValueError, CheckpointError):
        assert failure is not None
        return
    assert failure is None


def held():
    """Count what this process holds of what the machine has only so much of."""
    gc.collect()
    tasks = list(Path("/proc/self/task").iterdir())
    children = [(task / "children").read_text().split() for task in tasks]
    return {
        "open files": sorted(
            os.readlink(path).partition(":")[0]
            for path in Path("/proc/self/fd").iterdir()
            if path.exists() or path.is_symlink()
        ),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "threads of the system": len(tasks),
        "processes": sum(map(len, children)),
        "temporary files": sorted(os.listdir(tempfile.gettempdir())),
        "shared memory": len(os.listdir("/dev/shm")),
    }


@pytest.mark.fault("leaks over 200 short runs: files, threads, processes")
def test_nothing_leaks_over_200_short_runs(tmp_path, trials):
    num_runs, num_warm = trials.count(200), 15

    def run():
        # Short, because workers bind sockets below it, whose paths have a limit.
        tempfile.tempdir = os.environ["TMPDIR"] = short
        found = []
        for number in range(num_warm + num_runs):
            folder = tmp_path / f"{number}"
            train_once(number, folder)
            left = [path.name for path in (folder / "states").glob(".*")]
            left += [path.name for path in folder.rglob("*.tmp-*")]
            if number >= num_warm:
                found.append(f"{left} is left" if left else None)
            elif number == num_warm - 1:
                before = held()
        found.append(difference(before, held()))
        (tmp_path / "found").write_text(json.dumps(found))

    with tempfile.TemporaryDirectory() as short:
        job = Job(run, tmp_path / "log")
        assert job.wait_or_explain(seconds=400) is None
    for failure in json.loads((tmp_path / "found").read_text()):
        trials.add(failure)
