"""What 0.1.61 wrote is read without running code from it."""

import contextlib
import datetime
import os
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from small_checkpoints import save
from torch import nn

from pytorch_accelerated import checkpoint as ckpt
from pytorch_accelerated.checkpoint import CheckpointNotFoundError, CheckpointWriter
from pytorch_accelerated.errors import CheckpointError


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4)
        self.head.weight = self.embed.weight


def write_legacy_state(folder, lr_lambda=None):
    """Write a training state the way that 0.1.61 did."""
    accelerator = Accelerator(cpu=True)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.head(model.norm(model.embed(torch.tensor([0, 1])))).sum().backward()
    optimizer.step()
    plain = optimizer.optimizer
    scheduler = (
        torch.optim.lr_scheduler.LambdaLR(plain, lr_lambda)
        if lr_lambda
        else torch.optim.lr_scheduler.StepLR(plain, 1)
    )
    for _ in range(2):  # defect 6: registered anew at each save
        accelerator.register_for_checkpointing(scheduler)
        accelerator.save_state(str(folder))
    torch.save({"current_epoch": 4, "mine": "x"}, folder / "trainer_metadata.pt")
    draws = (random.random(), np.random.rand(), torch.rand(2))
    return model, plain, scheduler, draws


def test_training_states_of_0_1_61_are_read_without_pickle(tmp_path):
    """Defect 6: from the second save on they could not be loaded at all."""
    folder = tmp_path / "epoch_2"
    model, optimizer, scheduler, draws = write_legacy_state(folder)
    assert len(list(folder.glob("custom_checkpoint_*"))) == 2
    assert ckpt.is_legacy_training_state(folder)
    legacy = ckpt.read_legacy_training_state(folder)
    state = ckpt.fit_to_model(model, legacy["model"])
    assert "head.weight" not in legacy["model"]
    assert torch.equal(state["head.weight"], model.head.weight)
    model.load_state_dict(state)
    moment = legacy["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moment, optimizer.state_dict()["state"][0]["exp_avg"])
    assert legacy["scheduler"] == scheduler.state_dict()
    assert legacy["scaler"] is None
    assert legacy["metadata"] == {"current_epoch": 4, "mine": "x"}
    ckpt.set_random_states(legacy["random_states"][0])
    assert (random.random(), np.random.rand()) == draws[:2]
    assert torch.equal(torch.rand(2), draws[2])


class Warmup:
    """A schedule that cannot be stored without pickle."""

    def __init__(self):
        self.shift = datetime.timedelta(1)

    def __call__(self, step):
        return 1.0


def test_a_schedule_of_0_1_61_that_needs_pickle_is_skipped(tmp_path):
    write_legacy_state(tmp_path, Warmup())
    with pytest.warns(UserWarning, match=r"custom_checkpoint_1.pkl was skipped.*anew"):
        legacy = ckpt.read_legacy_training_state(tmp_path)
    assert legacy["scheduler"] is None


def test_a_checkpoint_without_its_manifest_is_not_taken_for_a_legacy_state(tmp_path):
    save(tmp_path / "c", 1)
    (tmp_path / "c" / "manifest.json").unlink()
    assert not ckpt.is_legacy_training_state(tmp_path / "c")
    with pytest.raises(CheckpointNotFoundError, match=r"neither model.safetensors nor"):
        ckpt.read_legacy_training_state(tmp_path)


class Evil:
    """Pickles into a call that makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def evil_bytes(marker, path):
    """The attack as torch writes it, and as a bare pickle."""
    torch.save({"state": Evil(marker)}, path)
    return path.read_bytes(), pickle.dumps(Evil(marker))


def test_no_way_of_loading_runs_code_from_a_file(tmp_path):
    marker = tmp_path / "ran"
    legacy = tmp_path / "legacy"
    write_legacy_state(legacy)
    for attack in evil_bytes(marker, tmp_path / "evil"):
        evil = tmp_path / "evil.pt"
        evil.write_bytes(attack)
        with pytest.raises(CheckpointError, match=r"would run code|damaged"):
            ckpt.load_file(evil)

        with CheckpointWriter(tmp_path / "c") as writer:
            (writer.folder / "optimizer.pt").write_bytes(attack)
            (writer.folder / "pytorch_model.bin").write_bytes(attack)
            found = writer.commit({})
        found.verify()
        for load in (lambda c=found: c.load("optimizer.pt"), found.load_weights):
            with pytest.raises(CheckpointError, match=r"would run code|damaged"):
                load()

        for path in legacy.iterdir():
            good = path.read_bytes()
            path.write_bytes(attack)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with contextlib.suppress(CheckpointError):
                    ckpt.read_legacy_training_state(legacy)
            path.write_bytes(good)
    assert not marker.exists()


def test_numpy_values_in_files_of_0_1_61_can_be_read(tmp_path):
    """Defect 25: a numpy scalar as metric made the best model unloadable."""
    contents = {"a": np.float64(0.5), "b": np.arange(3, dtype=np.uint16), "c": np.True_}
    torch.save(contents, tmp_path / "x.pt")
    loaded = ckpt.load_file(tmp_path / "x.pt")
    assert loaded["a"] == 0.5
    assert loaded["b"].tolist() == [0, 1, 2]
    assert loaded["c"]


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


def test_arrays_come_back_in_any_order_of_bytes_and_elements(tmp_path):
    arrays = {
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
    }
    torch.save(arrays, tmp_path / "x.pt")
    loaded = ckpt.load_file(tmp_path / "x.pt")
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
