"""Several runs in one folder, and files in it that belong to others."""

import fcntl
import os
import shutil
import signal
import socket
import sys
import time
import types
import warnings
from functools import partial

import pytest
import torch
from processes import Job
from runs import SMALL, AtNth, change_manifest, raise_
from scenario import difference, fingerprint

from pytorch_accelerated import checkpoint
from pytorch_accelerated.callbacks import TrainerCallback, checkpointing
from pytorch_accelerated.checkpoint import directory
from pytorch_accelerated.errors import CheckpointError

SEVERAL_RUNS = "several runs in one folder, locks of dead processes"
FOREIGN_FILES = "foreign files in the folder"
TWO_UPDATES = SMALL.with_(num_samples=24, save_every_n_steps=1, max_checkpoints=1)


class WaitForOthers(TrainerCallback):
    """Keeps the one run that may write alive until the others have been refused."""

    def __init__(self, folder, num_others):
        self.folder, self.num_others = folder, num_others

    def on_train_epoch_start(self, trainer, **kwargs):
        deadline = time.monotonic() + 20
        while len(list(self.folder.glob("refused *"))) < self.num_others:
            assert time.monotonic() < deadline
            time.sleep(0.002)


def start_together(folder, num_runs):
    """Start runs at one moment; say what is wrong with what they leave."""

    def run(number):
        while time.monotonic() < start:
            time.sleep(0.001)
        scenario = TWO_UPDATES.with_(
            seed=number, callbacks=(WaitForOthers(folder, num_runs - 1),)
        )
        try:
            scenario.run(folder)
        except CheckpointError as error:
            (folder / f"refused {number}").write_text(str(error))
            raise SystemExit(7) from None

    start = time.monotonic() + 0.03
    jobs = [Job(lambda n=n: run(n), folder / f"log {n}") for n in range(num_runs)]
    codes = [job.wait()[0] for job in jobs]
    if sorted(codes) != [0] + [7] * (num_runs - 1):
        return f"exit codes {codes}"
    winner = codes.index(0)
    if not all(
        f"Another run writes to {folder}/states: process {jobs[winner].pids[0]} on"
        in refused.read_text()
        for refused in folder.glob("refused *")
    ):
        return "a refusal names another process"
    alone = folder / "alone"
    TWO_UPDATES.with_(seed=winner).run(alone)
    names = [each.path.name for each in checkpoint.list_checkpoints(alone / "states")]
    left = sorted(path.name for path in (folder / "states").iterdir())
    if left != sorted(names):
        return f"{left} are left instead of {names}"
    return next(filter(None, (compare(alone, folder, name) for name in names)), None)


def compare(one, other, name):
    weights = [
        checkpoint.Checkpoint(each / "states" / name).load_weights()
        for each in (one, other)
    ]
    return difference(*weights)


@pytest.mark.fault(SEVERAL_RUNS)
def test_of_runs_that_start_together_one_writes_and_the_others_are_refused(
    tmp_path, trials
):
    for number in range(trials.count(21)):
        trials.add(start_together(tmp_path / f"{number}", 2 + number % 7))


@pytest.mark.fault(SEVERAL_RUNS)
@pytest.mark.parametrize("named", ["dead", "alive", "on another machine"])
def test_the_lock_of_a_killed_run_stops_nobody(named, tmp_path, trials):
    """Whatever process it names: its number may have been given to another since."""

    def die(trainer):
        assert trainer.num_updates == 1
        os.kill(os.getpid(), signal.SIGKILL)

    steps = TWO_UPDATES.accumulation
    at_update = AtNth("on_train_step_end", die, steps, is_last=True)
    dying = TWO_UPDATES.with_(callbacks=(at_update,))
    job = Job(lambda: dying.run(tmp_path) and None, tmp_path / "log")
    assert job.wait() == [-signal.SIGKILL]
    lock = tmp_path / "states" / ".lock"
    assert lock.read_text() == f"{os.uname().nodename} {job.pids[0]}"
    if named == "alive":
        lock.write_text(f"{os.uname().nodename} {os.getpid()}")
    elif named == "on another machine":
        lock.write_text("elsewhere 1")
    expected = fingerprint(TWO_UPDATES.run(tmp_path / "undisturbed"))
    resumed = TWO_UPDATES.run(tmp_path, resume_from="auto")
    trials.add(difference(expected, fingerprint(resumed)))
    assert not lock.exists()


@pytest.mark.fault(SEVERAL_RUNS)
@pytest.mark.parametrize("kind", ["ours", "before there were identities"])
def test_states_that_others_keep_in_the_folder_are_not_deleted(kind, tmp_path, trials):
    """found 83: whatever their names, and whoever has written them."""
    other = tmp_path / "other"
    TWO_UPDATES.with_(max_checkpoints=None).run(other)
    source = other / "states" / "step_1"
    if kind != "ours":
        change_manifest(source, forget_who_saved_it)
    states = tmp_path / "states"
    names = ("mine", "step_1 of another run", "run_2/step_1", "step_x", "step_9")
    for name in names:
        shutil.copytree(source, states / name)
    before = contents(states)
    overwriting = TWO_UPDATES.with_(save_kwargs=(("overwrite", True),))
    overwriting.run(tmp_path)
    overwriting.run(tmp_path)
    TWO_UPDATES.with_(num_epochs=2).run(tmp_path, resume_from=states / "final")
    after = contents(states)
    lost = [path for path in before if after.get(path) != before[path]]
    trials.add(lost and f"{lost} are lost")
    with pytest.raises(CheckpointError, match="states of another run"):
        TWO_UPDATES.run(tmp_path)
    assert contents(states) == after


def forget_who_saved_it(manifest):
    for key in ("run_id", "saved_by"):
        del manifest["progress"][key]


@pytest.mark.fault(SEVERAL_RUNS)
def test_only_the_main_process_deletes(tmp_path, trials):
    """Defect 41: all processes deleted the same directory at once."""

    def train():
        removed = []
        prune = checkpointing.prune
        checkpointing.prune = lambda *args: (removed.append(args), prune(*args))
        trainer = TWO_UPDATES.with_(num_epochs=3).run(tmp_path)
        is_main = trainer._accelerator.is_main_process
        assert bool(removed) == is_main, removed
        left = {path.name for path in (tmp_path / "states").iterdir()}
        assert left == {"epoch_3", "final"}

    trials.add(Job(train, tmp_path / "log", 2).wait_or_explain())


@pytest.mark.fault(SEVERAL_RUNS)
def test_the_folder_is_free_again_after_a_run_that_failed(tmp_path, trials):
    """On two processes, where no event of the end follows the error."""

    fail = AtNth("on_train_epoch_end", lambda _: raise_(RuntimeError("broken")))

    def train():
        with pytest.raises(RuntimeError, match="broken"):
            TWO_UPDATES.with_(callbacks=(fail,)).run(tmp_path)
        torch.distributed.barrier()
        assert not (tmp_path / "states" / ".lock").exists()

    trials.add(Job(train, tmp_path / "log", 2).wait_or_explain())


@pytest.mark.fault(SEVERAL_RUNS)
@pytest.mark.parametrize("owner", [None, "one"])
def test_two_locks_of_a_process_share_it_only_where_they_are_to_found_94(
    owner, tmp_path, trials
):
    """found 94: both succeeded, and releasing one freed the other."""
    one, other = (checkpoint.DirectoryLock(tmp_path, owner) for _ in range(2))

    def is_free():
        return Job(checkpoint.DirectoryLock(tmp_path, owner).acquire, log).wait() == [0]

    log = tmp_path / "log"
    one.acquire()
    one.acquire()
    if owner is None:
        with pytest.raises(CheckpointError, match=rf"writes to.*process {os.getpid()}"):
            other.acquire()
    else:
        other.acquire()
        with pytest.raises(CheckpointError, match="Another run writes to"):
            checkpoint.DirectoryLock(tmp_path, "another").acquire()
        one.release()
    assert not is_free()
    other.release()
    one.release()
    trials.add(None if is_free() else "it is kept")


@pytest.mark.fault(SEVERAL_RUNS)
def test_a_lock_on_a_file_that_its_last_owner_has_removed_is_none(
    tmp_path, trials, monkeypatch
):
    """It would keep nobody out: others would lock the file that is there now."""

    tries = []

    def lockf(descriptor, *args):
        tries.append(descriptor)
        if len(tries) == 1:  # the last owner ends between open and lock
            lock.path.unlink()
        fcntl.lockf(descriptor, *args)

    lock = checkpoint.DirectoryLock(tmp_path)
    late = types.SimpleNamespace(**{**vars(fcntl), "lockf": lockf})
    monkeypatch.setattr(directory, "fcntl", late)
    lock.acquire()
    monkeypatch.undo()
    assert len(tries) == 2
    job = Job(checkpoint.DirectoryLock(tmp_path).acquire, tmp_path / "log")
    trials.add(None if job.wait() == [1] else "another process has it too")
    lock.release()


# ---------------------------------------------------------------------- foreign files


def a_folder(path, file="file", content="mine"):
    path.mkdir()
    (path / file).write_text(content)


def a_link(path):
    a_folder(path.parents[1] / "target")
    path.symlink_to(path.parents[1] / "target")


def a_socket(path):
    os.chdir(path.parent)  # its path may not be long
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path.name)
    listener.close()


def a_file(path):
    path.write_text("mine")


FOREIGN = {
    **dict.fromkeys(("notes.txt", "epoch_1.tmp", "step_2", ".trash"), a_file),
    **dict.fromkeys(("step_2.tmp-mine", ".trash-mine", "model.safetensors"), a_folder),
    # of another program
    "extension": partial(a_folder, file="manifest.json", content='{"name": "theirs"}'),
    "epoch_7": a_link,
    "latest": a_link,
    "loop": lambda path: path.symlink_to(path),
    "step_9": lambda path: path.symlink_to("nothing"),
    "pipe": os.mkfifo,
    "socket": a_socket,
}


def contents(folder):
    """Return what is in a folder, by path, without following links."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = path.read_bytes()
        else:
            found[str(path)] = path.lstat().st_mode
    return found


@pytest.mark.fault(FOREIGN_FILES)
@pytest.mark.parametrize("name", FOREIGN)
def test_what_belongs_to_others_is_left_alone(name, tmp_path, trials):
    """It is not opened either: a run that opened a pipe would wait for ever."""
    states = tmp_path / "states"
    states.mkdir()

    def train():
        warnings.simplefilter("ignore")  # that a file is in the way
        FOREIGN[name](states / name)
        before = contents(states)
        opened = []
        sys.addaudithook(
            lambda event, args: event == "open" and opened.append(str(args[0]))
        )
        TWO_UPDATES.run(tmp_path, resume_from="auto")
        TWO_UPDATES.with_(num_epochs=2).run(tmp_path, resume_from="auto")
        place = str(states / name)
        parsed = [path for path in opened if f"{path}/".startswith(f"{place}/")]
        # Of a folder it has to be found out what it is.
        assert set(parsed) <= {f"{place}/manifest.json"}
        assert before.items() <= contents(states).items()
        assert (states / "final").is_dir()

    job = Job(train, tmp_path / "log")
    trials.add(job.wait_or_explain())


@pytest.mark.fault(FOREIGN_FILES)
@pytest.mark.parametrize("name", ["step_7", "latest"])
def test_a_link_to_a_state_of_another_run_is_not_followed(name, tmp_path, trials):
    """Not to go on from it, nor to count or delete it."""
    other, mine = tmp_path / "other", tmp_path / "mine"
    TWO_UPDATES.with_(num_epochs=3).run(other)
    (mine / "states").mkdir(parents=True)
    (mine / "states" / name).symlink_to(other / "states" / "final")
    before = contents(tmp_path)
    expected = fingerprint(TWO_UPDATES.run(tmp_path / "alone"))
    trials.add(
        difference(expected, fingerprint(TWO_UPDATES.run(mine, resume_from="auto")))
    )
    lost = before.items() - contents(tmp_path).items()
    trials.add(lost and f"{lost} are lost")
