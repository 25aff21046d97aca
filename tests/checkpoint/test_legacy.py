"""What 0.1.61 wrote is read without running code from it; see also test_golden.py."""

import datetime
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_checkpoints import save

from pytorch_accelerated import checkpoint as ckpt
from pytorch_accelerated.checkpoint import CheckpointNotFoundError
from pytorch_accelerated.errors import CheckpointError


@pytest.fixture
def legacy(tmp_path):
    """A training state of 0.1.61."""
    kept = Path(__file__).parent / "golden" / "0.1.61" / "state"
    return Path(shutil.copytree(kept, tmp_path / "legacy"))


def test_a_schedule_of_0_1_61_that_needs_pickle_is_skipped(legacy):
    assert ckpt.is_legacy_training_state(legacy)
    torch.save({"shift": datetime.timedelta(1)}, legacy / "custom_checkpoint_1.pkl")
    with pytest.warns(UserWarning, match=r"custom_checkpoint_1.pkl was skipped.*anew"):
        state = ckpt.read_legacy_training_state(legacy)
    assert state["scheduler"] is None
    assert state["optimizer"] is not None


def test_a_checkpoint_without_its_manifest_is_not_taken_for_a_legacy_state(tmp_path):
    save(tmp_path / "c", 1)
    (tmp_path / "c" / "manifest.json").unlink()
    assert not ckpt.is_legacy_training_state(tmp_path / "c")
    with pytest.raises(CheckpointNotFoundError, match=r"neither model.safetensors nor"):
        ckpt.read_legacy_training_state(tmp_path)


def test_numpy_values_in_files_of_0_1_61_can_be_read(tmp_path):
    """Defect 25: a numpy scalar as metric made the best model unloadable."""
    contents = {
        "number": np.float64(0.5),
        "truth": np.True_,
        "array": np.arange(3, dtype=np.uint16),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
    }
    torch.save(contents, tmp_path / "x.pt")
    loaded = ckpt.load_file(tmp_path / "x.pt")
    for name, value in contents.items():
        np.testing.assert_array_equal(loaded[name], value)


class ForgedDtype:
    """Pickles into the dtype of a number, said to hold objects."""

    def __reduce__(self):
        return np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63)


def test_a_dtype_with_forged_flags_is_not_built_found_92(tmp_path):
    """found 92: numpy made one that claimed to hold pointers to objects."""
    torch.save({"a": ForgedDtype(), "b": [(np.float32(2),)]}, tmp_path / "x.pt")
    loaded = ckpt.load_file(tmp_path / "x.pt")
    assert loaded["b"] == [(2.0,)]
    assert loaded["a"].value.flags == np.dtype("f8").flags
    array = np.array(["text"], dtype="U4")
    torch.save({"a": array}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt.*'U4' are not read"):
        ckpt.load_file(tmp_path / "x.pt")
