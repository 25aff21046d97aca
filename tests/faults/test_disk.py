"""Kills and errors at every file operation of a save; disks that are full or gone."""

import json
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import shims
from runs import AtNth
from scenario import Scenario, difference, fingerprint

from pytorch_accelerated import checkpoint
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.errors import CheckpointError


@pytest.mark.fault("fault at each file operation of a save: kill, disk full, I/O error")
@pytest.mark.parametrize("mode", ["kill", "no space", "io error"])
def test_a_fault_at_every_file_operation_of_a_save(mode, tmp_path, trials):
    shim = shims.build("file_faults", tmp_path)
    for line in shims.run_with(shim, "save_under_faults.py", tmp_path, mode):
        trials.add(json.loads(line))
    assert trials.number > 80


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
        if f" {point} " in Path("/proc/mounts").read_text():
            subprocess.run(["umount", point], check=True)


class FillDisk(TrainerCallback):
    """Fills the disk whenever a state is about to be saved, from one update to another.

    Not before: what is deleted once the one before is complete would make room again.
    """

    def __init__(self, folder, full_from, full_until=10**9):
        self.file = folder / "something large"
        self.full_from, self.full_until = full_from, full_until

    def on_before_save(self, trainer, **kwargs):
        if self.full_from <= trainer.num_updates < self.full_until:
            with open(self.file, "ab", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass

    def on_train_update_end(self, trainer, num_updates, **kwargs):
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
    with pytest.warns(
        UserWarning, match=r"(?s)goes on.*No space left.*Free some space"
    ):
        trainer = filling.run(disk)
    names = names_in(disk / "states")
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
    assert checkpoint.newest(disk / "states").num_updates == 3
    trainer.save_training_state(tmp_path / "elsewhere")
    checkpoint.Checkpoint(tmp_path / "elsewhere").verify()
    trials.add(None)


@pytest.mark.fault("directory read-only or removed, also in the middle of a run")
def test_a_read_only_folder_is_named_before_the_first_step(mounted, tmp_path, trials):
    (tmp_path / "states").mkdir()
    make_read_only(mounted, tmp_path / "states")
    trainer = Scenario().create_trainer(tmp_path)
    with pytest.raises(CheckpointError, match=r"/states.*read-only"):
        Scenario().run(tmp_path, trainer=trainer)
    assert trainer.num_updates == 0
    trials.add(None)


@pytest.mark.fault("directory read-only or removed, also in the middle of a run")
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("on_save_error", ["warn", "raise"])
def test_a_folder_may_become_read_only_in_the_middle_of_a_run(
    on_save_error, asynchronous, mounted, tmp_path, trials
):
    states = tmp_path / "run" / "states"

    class Remount(TrainerCallback):
        def on_train_update_end(self, trainer, num_updates, **kwargs):
            if num_updates in (5, 8):
                with suppress(CheckpointError):  # it is not busy with the folder then
                    trainer.finish_saving()
            if num_updates == 5:
                make_read_only(mounted, states)
            elif num_updates == 8:
                subprocess.run(["umount", states], check=True)

    scenario = Scenario(
        save_best=False,
        save_kwargs=(("on_save_error", on_save_error), ("asynchronous", asynchronous)),
    )
    expected = fingerprint(scenario.run(tmp_path / "undisturbed"))
    remounting = scenario.with_(callbacks=(Remount,))
    states.mkdir(parents=True)
    names = {"step_1", "step_2", "step_3", "step_4", "epoch_1"}
    if on_save_error == "raise":
        with pytest.raises(CheckpointError, match=r"run/states.*read-only"):
            remounting.run(tmp_path / "run")
        subprocess.run(["umount", states], check=True)
    else:
        with pytest.warns(UserWarning, match=r"(?s)goes on.*run/states.*read-only"):
            trainer = remounting.run(tmp_path / "run")
        trials.add(difference(expected["weights"], trainer.model.state_dict()))
        names |= {"step_8", "epoch_2", "step_9", "step_10", "step_11", "step_12"}
        names |= {"epoch_3", "final"}
    trials.add(difference(sorted(names), sorted(names_in(states))))
    resumed = scenario.run(tmp_path / "run", resume_from="auto")
    trials.add(difference(expected, fingerprint(resumed)))


def names_in(states):
    return {state.path.name for state in checkpoint.list_checkpoints(states)}


def make_read_only(mounted, folder):
    mounted(folder, "--bind", str(folder))
    subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)


@pytest.mark.fault("directory read-only or removed, also in the middle of a run")
def test_a_removed_folder_is_created_again(tmp_path, trials):
    states = tmp_path / "states"
    remove = AtNth("on_train_update_end", lambda _: shutil.rmtree(states), count=5)
    Scenario(callbacks=(remove,)).run(tmp_path)
    names = names_in(tmp_path / "states")
    assert {"step_5", "final"} <= names
    assert "step_4" not in names
    trials.add(None)
