"""Kills and errors at every file operation of a save; disks that are full or gone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Job
from scenario import Scenario, difference, fingerprint

from pytorch_accelerated import checkpoint
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.errors import CheckpointError

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """Compile what makes file operations fail."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("needs Linux and gcc, to make file operations fail")
    library = tmp_path_factory.mktemp("shim") / "file_faults.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "file_faults.c"]
    subprocess.run([*command, "-ldl"], check=True)
    return library


@pytest.mark.fault("fault at each file operation of a save: kill, disk full, I/O error")
@pytest.mark.parametrize("mode", ["kill", "no space", "io error"])
def test_a_fault_at_every_file_operation_of_a_save(mode, shim, tmp_path, trials):
    done = subprocess.run(
        [sys.executable, HERE / "save_under_faults.py", tmp_path, mode],
        env={
            **os.environ,
            "LD_PRELOAD": str(shim),
            "PYTHONPATH": f"{SOURCE}{os.pathsep}{HERE}",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # What the training run before the faults prints is not JSON.
    for line in done.stdout.splitlines():
        if line == "null" or line.startswith('"'):
            failure = json.loads(line)
            trials.add(failure and f"{failure} {done.stderr[-1000:]}")
    assert trials.number > 40


@pytest.fixture
def mounted(tmp_path):
    """Mount something, or skip where that is not allowed; unmount it in the end."""
    points = []

    def mount(point, *arguments):
        point.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", *arguments, point], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
        points.append(point)
        return point

    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    yield mount
    for point in reversed(points):
        subprocess.run(["umount", point], check=True)


class FillDisk(TrainerCallback):
    """Fills the disk after some updates, and makes room again some updates later."""

    def __init__(self, folder, full_from, full_until=10**9):
        self.file = folder / "something large"
        self.full_from, self.full_until = full_from, full_until

    def on_train_update_end(self, trainer, num_updates, **kwargs):
        if self.full_from <= num_updates < self.full_until:
            with open(self.file, "ab", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        if num_updates == self.full_until:
            self.file.unlink()


@pytest.mark.fault("full disk (a small tmpfs)")
def test_a_full_disk_is_warned_of_and_saving_goes_on_once_there_is_room(
    mounted, tmp_path, trials
):
    disk = mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    scenario = Scenario(max_checkpoints=3)
    expected = fingerprint(scenario.run(tmp_path / "roomy"))

    filling = scenario.with_(callbacks=(FillDisk(disk, 4, 7),))
    filling = filling.with_(save_best=False)
    with pytest.warns(UserWarning, match=r"(?s)goes on.*No space left.*bytes are free"):
        trainer = filling.run(disk)
    names = {state.path.name for state in checkpoint.list_checkpoints(disk / "states")}
    trials.add(None if names == {"step_11", "step_12", "epoch_3", "final"} else names)
    trials.add(difference(expected["weights"], trainer.model.state_dict()))


@pytest.mark.fault("full disk (a small tmpfs)")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_ends_the_run_if_that_is_asked_for(
    asynchronous, mounted, tmp_path, trials
):
    disk = mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    scenario = Scenario(
        max_checkpoints=2,
        save_best=False,
        callbacks=(FillDisk(disk, 4),),
        save_kwargs=(("on_save_error", "raise"), ("asynchronous", asynchronous)),
    )
    trainer = scenario.create_trainer(disk)
    with pytest.raises(CheckpointError, match="No space left"):
        scenario.run(disk, trainer=trainer)
    # The run before it can be resumed, and what is in memory can be used.
    (disk / "something large").unlink()
    newest = checkpoint.newest(disk / "states").num_updates
    if asynchronous:
        # The third may have been on its way when the disk filled up, and deleting the
        # first may have made room for a fourth.
        assert newest >= 2
    else:
        assert newest == 3
    trainer.save_training_state(tmp_path / "elsewhere")
    checkpoint.Checkpoint(tmp_path / "elsewhere").verify()
    trials.add(None)


@pytest.mark.fault("directory read-only, removed, or with an unusual name")
def test_a_read_only_folder_is_named_before_the_first_step(mounted, tmp_path, trials):
    (tmp_path / "disk" / "states").mkdir(parents=True)
    disk = mounted(tmp_path / "disk", "--bind", str(tmp_path / "disk"))
    subprocess.run(["mount", "-o", "remount,ro,bind", disk], check=True)
    trainer = Scenario().create_trainer(disk)
    with pytest.raises(CheckpointError, match=r"disk/states.*read-only"):
        Scenario().run(disk, trainer=trainer)
    assert trainer.num_updates == 0
    trials.add(None)


@pytest.mark.fault("directory read-only, removed, or with an unusual name")
def test_a_removed_folder_is_created_again(tmp_path, trials):
    class RemoveFolder(TrainerCallback):
        def on_train_update_end(self, trainer, num_updates, **kwargs):
            if num_updates == 5:
                shutil.rmtree(tmp_path / "states")

    Scenario(callbacks=(RemoveFolder,)).run(tmp_path)
    names = {
        state.path.name for state in checkpoint.list_checkpoints(tmp_path / "states")
    }
    assert {"step_5", "final"} <= names
    assert "step_4" not in names
    trials.add(None)


@pytest.mark.fault("directory read-only, removed, or with an unusual name")
@pytest.mark.parametrize(
    "name", ["a b", "größe 猫 🦆", 'it\'s "quoted" $HOME', "x" * 200, "line\nbreak"]
)
def test_folders_may_have_any_name(name, tmp_path, trials, monkeypatch):
    scenario = Scenario(num_epochs=2)
    expected = fingerprint(scenario.run(tmp_path / "plain"))
    monkeypatch.chdir(tmp_path)  # and may be relative
    scenario.run(Path(name))
    shutil.rmtree(Path(name) / "states" / "final")
    shutil.rmtree(Path(name) / "states" / "epoch_2")
    resumed = scenario.run(Path(name), resume_from="auto")
    trials.add(difference(expected, fingerprint(resumed)))


@pytest.mark.fault("two runs in one directory")
def test_a_second_run_in_a_folder_is_refused_while_the_first_one_runs(tmp_path, trials):
    scenario = Scenario(num_epochs=1)

    class SecondRun(TrainerCallback):
        def on_train_epoch_start(self, trainer, **kwargs):
            job = Job(lambda: scenario.run(tmp_path) and None, tmp_path / "log")
            assert job.wait() == [1]

    scenario.with_(callbacks=(SecondRun,)).run(tmp_path)
    log = (tmp_path / "log").read_text()
    assert f"Another run writes to {tmp_path}" in log
    assert f"process {os.getpid()} on" in log
    assert not (tmp_path / "states" / ".lock").exists()
    scenario.run(tmp_path)  # there is nobody now
    trials.add(None)
