"""A loss of power at any instant of a save leaves the old state or the new one."""

import shutil
import warnings

import crashes
import pytest
import shims
from scenario import difference

from pytorch_accelerated import checkpoint
from pytorch_accelerated.state import TrainingState


def read_state(folder):
    """Return what a run would go on from, once leftovers are cleaned, and its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is broken may be passed over
        found = checkpoint.newest(folder)
        checkpoint.clean_leftovers(folder)
        newest = checkpoint.newest(folder)
    assert (found is None) == (newest is None)
    return (
        None if newest is None else checkpoint.to_storable(TrainingState.read(newest))
    )


def read_file(folder):
    checkpoint.clean_leftovers(folder)
    return checkpoint.load_file(folder / "best.pt")


def what_is_wrong(folder, read, allowed):
    try:
        found = read(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if found is None:
        return "nothing is found"
    if all(difference(each, found) for each in allowed):
        return "another one is found"
    left = {path.name for path in folder.iterdir()}
    return None if left <= {"step_1", "step_2", "best.pt"} else f"{left} are left"


@pytest.mark.fault("loss of power at each file operation of a save")
def test_a_loss_of_power_leaves_the_old_or_the_new_state(tmp_path, trials):
    """Each state is tried that a crash may leave if only what is flushed is sure."""
    file_log = shims.build("file_log", tmp_path)
    readers = {"prune": read_state, "replace": read_state, "file": read_file}
    shims.run_with(file_log, "record_a_save.py", tmp_path, *readers)
    for kind, read in readers.items():
        before = trials.number
        try_each_crash(tmp_path / kind, read, trials)
        assert trials.number > before + 10


def try_each_crash(folder, read, trials):
    log = crashes.Log(folder / "live", folder / "before", folder / "log")
    everything = len(log.operations)
    # Nothing has happened that is not in the log.
    assert log.tree(everything) == crashes.read_tree(folder / "live")
    old, new = read(folder / "before"), read(folder / "live")
    assert difference(old, new)
    seen = set()
    for length in range(everything + 1):
        is_saved = log.is_after("saved", length)
        for tree in log.states(length, trials.count(8)):
            key = (is_saved, tuple(tree.items()))
            if key in seen:
                continue
            seen.add(key)
            crashes.write_tree(tree, folder / "crashed")
            allowed = [new] if is_saved else [old, new]
            wrong = what_is_wrong(folder / "crashed", read, allowed)
            trials.add(
                wrong
                and f"{folder.name} after {length} operations: {wrong}, from "
                f"{list(tree)}"
            )
            shutil.rmtree(folder / "crashed")
