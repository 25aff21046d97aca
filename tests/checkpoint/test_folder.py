"""Checkpoint folders are whole or absent, and every damage is found and named."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from small_checkpoints import (
    names_in,
    save,
    value_of,
)
from torch import nn

import pytorch_accelerated
from pytorch_accelerated import checkpoint as ckpt
from pytorch_accelerated.checkpoint import (
    Checkpoint,
    CheckpointNotFoundError,
    CheckpointWriter,
)
from pytorch_accelerated.errors import CheckpointError


def test_a_checkpoint_holds_what_was_written(tmp_path):
    random.seed(1)
    written = save(tmp_path / "a b/ü", 3, epoch=1, metrics={"loss": np.float64(0.5)})
    found = Checkpoint(tmp_path / "a b/ü")
    found.verify()
    assert found.progress == {"num_updates": 3, "epoch": 1, "metrics": {"loss": 0.5}}
    assert (found.num_updates, found.metrics) == (3, {"loss": 0.5})
    assert found.manifest["world_size"] == 1
    assert found.files == ["model.safetensors", "optimizer.pt", "random/0.pt"]
    assert value_of(found) == 3
    assert found.manifest["torch_version"] == torch.__version__
    assert found.manifest["library_version"] == pytorch_accelerated.__version__
    ckpt.set_random_states(found.load("random/0.pt"))
    assert written.path == found.path
    with pytest.raises(CheckpointNotFoundError, match=r"no file 'x'; it has model"):
        found.load("x")


def test_without_commit_nothing_appears(tmp_path):
    with CheckpointWriter(tmp_path / "c") as writer:
        writer.write("x.pt", {})
    with (
        pytest.raises(TypeError, match=r"y.pt\['z'\] is a"),
        CheckpointWriter(tmp_path / "c") as writer,
    ):
        writer.write("y.pt", {"z": object()})
    assert names_in(tmp_path) == []


def test_progress_that_json_cannot_hold_is_refused(tmp_path):
    with (
        CheckpointWriter(tmp_path / "c") as writer,
        pytest.raises(TypeError),
    ):
        writer.commit({"history": object()})


def test_replacing_a_checkpoint_keeps_the_files_of_others_in_it(tmp_path):
    path = tmp_path / "last"
    path.mkdir()  # an empty folder may be made beforehand
    save(path, 1)
    (path / "notes.txt").write_text("mine")
    (path / "logs").mkdir()
    with CheckpointWriter(path) as writer:
        writer.write_weights({"weight": torch.ones(1)})
        writer.commit({"num_updates": 2})
    assert names_in(path) == ["logs", "manifest.json", "model.safetensors", "notes.txt"]
    assert names_in(tmp_path) == ["last"]
    assert Checkpoint(path).num_updates == 2


def test_a_file_or_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; a checkpoint is a folder"):
        CheckpointWriter(tmp_path / "file").__enter__()
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for path in (".", ".."):
        with pytest.raises(CheckpointError, match="holds the working directory"):
            CheckpointWriter(path).__enter__()


def test_a_relative_path_stays_where_it_was_when_the_directory_changes(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with CheckpointWriter("c") as writer:
        os.chdir("/")
        writer.commit({})
    assert names_in(tmp_path) == ["c"]


def test_everything_is_on_the_disk_before_the_name_is_given(tmp_path, monkeypatch):
    """After a loss of power a name must not be there without what it stands for."""
    log = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor):
        log.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def logged_rename(source, target):
        log.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    with CheckpointWriter(tmp_path / "c") as writer:
        writer.write_weights({"w": torch.ones(1)})
        (writer.folder / "sub").mkdir()
        (writer.folder / "sub" / "by_others").touch()
        writer.commit({})
    *before, manifest, folder, renamed, parent = log
    written = ("model.safetensors", "sub/by_others", "sub")
    assert {*before} >= {writer.folder / name for name in written}
    assert manifest == writer.folder / "manifest.json"
    assert folder == writer.folder
    assert (renamed, parent) == ("rename", tmp_path)


# ----------------------------------------------------------------------------- weights


def save_weights(state, folder):
    """Save weights alone, and return the name of the file that holds them."""
    with CheckpointWriter(folder / "weights") as writer:
        writer.write_weights(state)
        return writer.commit({}).files


def load_weights(folder):
    return Checkpoint(folder / "weights").load_weights()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4)
        self.head.weight = self.embed.weight


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    model = Tied().to(torch.bfloat16)
    assert save_weights(model.state_dict(), tmp_path) == ["model.safetensors"]
    file = tmp_path / "weights" / "model.safetensors"
    assert "head.weight" not in safetensors.torch.load_file(file)
    state = load_weights(tmp_path)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert state._metadata == model.state_dict()._metadata
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert state[name].dtype == tensor.dtype
    Tied().to(torch.bfloat16).load_state_dict(state)


def test_weights_are_as_readable_for_others_as_any_new_file(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    save_weights({"a": torch.ones(1)}, tmp_path)
    path = tmp_path / "weights" / "model.safetensors"
    assert path.stat().st_mode == ordinary.stat().st_mode


def test_views_strides_and_empty_tensors_are_stored_exactly(tmp_path):
    flat = torch.arange(10.0)
    state = {
        "first": flat[:4],
        "second": flat[4:],
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "expanded": torch.ones(1).expand(3),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0),
        "empty_too": torch.empty(0),
        "half": torch.ones(3, dtype=torch.float16),
        "eighth": torch.ones(3).to(torch.float8_e5m2),
        "bool": torch.tensor([True]),
    }
    assert save_weights(state, tmp_path) == ["model.safetensors"]
    loaded = load_weights(tmp_path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "state",
    [
        {"extra": {"version": 3}, "a": torch.ones(2)},
        {"a": torch.ones(2, dtype=torch.complex64)},
        {"format": torch.ones(2)},
    ],
    ids=["extra state", "complex", "reserved name"],
)
def test_what_safetensors_cannot_hold_goes_into_the_safe_torch_format(tmp_path, state):
    assert save_weights(state, tmp_path) == ["pytorch_model.bin"]
    loaded = load_weights(tmp_path)
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(loaded[name], value) if name != "extra" else True
    assert loaded.get("extra") == state.get("extra")


def test_names_of_wrapped_models_are_fitted_both_ways():
    plain, compiled = nn.Sequential(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1))
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = compiled
    state = ckpt.fit_to_model(plain, wrapped.state_dict())
    assert list(state) == ["0.weight", "0.bias"]
    assert set(state._metadata) >= {"", "0"}
    plain.load_state_dict(state)
    wrapped.load_state_dict(ckpt.fit_to_model(wrapped, plain.state_dict()))


class WithExtras(nn.Module):
    """Has extra state that is no tensor, and a sparse buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.extra = 3
        self.register_buffer("mask", torch.eye(2).to_sparse())

    def get_extra_state(self):
        return {"extra": self.extra}

    def set_extra_state(self, state):
        self.extra = state["extra"]


def test_names_are_fitted_whatever_else_a_model_keeps_found_89():
    """found 89: an AttributeError, and torch's words about a lazy parameter."""
    model = WithExtras()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    state["module._extra_state"] = {"extra": 4}
    model.load_state_dict(ckpt.fit_to_model(model, state))
    assert model.extra == 4

    lazy = nn.Sequential(nn.LazyLinear(1))
    state = {"module.0.weight": torch.ones(1, 3), "module.0.bias": torch.zeros(1)}
    lazy.load_state_dict(ckpt.fit_to_model(lazy, state))
    assert lazy(torch.ones(1, 3)).item() == 3.0
    with pytest.raises(
        CheckpointError, match=r"missing in .*: 0.weight, 0.bias; not in the model: a$"
    ):
        ckpt.fit_to_model(nn.Sequential(nn.LazyLinear(1)), {"a": 1})


def test_weights_that_do_not_fit_are_explained_by_the_first_names():
    model = nn.Linear(2, 3)
    others = {f"layer{i}": torch.ones(1) for i in range(5)}
    state = {"module.weight": torch.ones(2, 2), **others}
    with pytest.raises(CheckpointError) as raised:
        ckpt.fit_to_model(model, state, "model.pt")
    assert str(raised.value) == (
        "model.pt does not fit the model: missing in the checkpoint: bias; "
        "not in the model: layer0, layer1, layer2 and 2 more; "
        "of another shape: weight is (2, 2) in the checkpoint and (3, 2) in the model"
    )
