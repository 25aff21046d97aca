"""Checkpoints: exact, safe to load, and whole or absent whatever happens."""

import dataclasses
import datetime
import enum
import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import nn

import pytorch_accelerated
from pytorch_accelerated import checkpoint as ckpt
from pytorch_accelerated.checkpoint import (
    Checkpoint,
    CheckpointNotFoundError,
    CheckpointWriter,
)
from pytorch_accelerated.checkpoint import __main__ as command_line
from pytorch_accelerated.errors import CheckpointError

SRC = Path(__file__).parents[1] / "src"


class Evil:
    """Pickles into a call that makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def save(path, num_updates, value=None, **progress):
    """Write a small checkpoint with every kind of file."""
    value = num_updates if value is None else value
    with CheckpointWriter(path) as writer:
        writer.write_weights(OrderedDict(weight=torch.full((5,), float(value))))
        writer.write("optimizer.pt", {"step": value, "mean": torch.ones(3)})
        writer.write("random/0.pt", ckpt.get_random_states())
        return writer.commit({"num_updates": num_updates, **progress})


def value_of(checkpoint):
    checkpoint.verify()
    weights = checkpoint.load_weights()["weight"]
    assert weights.unique().tolist() == [checkpoint.load("optimizer.pt")["step"]]
    return weights[0].item()


def names_in(folder):
    return sorted(entry.name for entry in Path(folder).iterdir())


# ----------------------------------------------------------------------- single files


def test_a_file_is_loaded_exactly_as_it_was_saved(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "bf16": torch.randn(3, 2, dtype=torch.bfloat16),
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "a": shared,
        "b": shared[2:],
        "plain": [1, 2.5, None, True, "é", (1, 2), {1: 2}, 2**70, b"x", 1j, {3, 4}],
        "dtype": torch.float16,
    }
    path = ckpt.save_file(state, tmp_path / "new" / "folders" / "x.pt")
    loaded = ckpt.load_file(path)
    for name in ("bf16", "scalar", "empty", "transposed", "a", "b"):
        assert torch.equal(loaded[name], state[name])
        assert loaded[name].dtype == state[name].dtype
        assert loaded[name].stride() == state[name].stride()
    assert loaded["plain"] == state["plain"]
    assert loaded["dtype"] is torch.float16
    loaded["a"][3] = 100
    assert loaded["b"][1] == 100


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    """Defect 22: an interrupted write replaced the good file by half a file."""
    path = tmp_path / "best.pt"
    ckpt.save_file({"x": 1}, path)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, raising(OSError(errno.ENOSPC, "No space")))
            with pytest.raises(
                CheckpointError, match=r"best.pt: .*errno 28.*Free some"
            ):
                ckpt.save_file({"x": 2}, path)
        assert ckpt.load_file(path) == {"x": 1}
        assert names_in(tmp_path) == ["best.pt"]


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_ctrl_c_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch
):
    path = ckpt.save_file({"x": 1}, tmp_path / "best.pt")
    monkeypatch.setattr(torch, "save", raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ckpt.save_file({"x": 2}, path)
    assert ckpt.load_file(path) == {"x": 1}
    assert names_in(tmp_path) == ["best.pt"]


def test_the_cause_is_named_although_torch_hides_it(tmp_path):
    def in_child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        big = OrderedDict(x=torch.ones(100_000))
        for write in (ckpt.save_file, ckpt.save_weights):
            with pytest.raises(CheckpointError, match=r"errno 27.*ulimit -f"):
                write(big, tmp_path / "here")
        with pytest.raises(CheckpointError), CheckpointWriter(tmp_path / "c") as writer:
            writer.write("x.pt", big)

    assert run_in_child(in_child) == 0
    assert names_in(tmp_path) == ["here"]
    assert names_in(tmp_path / "here") == []


def test_a_folder_in_place_of_the_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="There is a folder of that name"):
        ckpt.save_file({}, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"A file of that name is in the way"):
        ckpt.save_file({}, tmp_path / "file" / "x.pt")


def test_names_may_be_long_and_hold_spaces_and_any_letters(tmp_path):
    for name in ("a b.pt", "模型 ü.pt", "x" * 255, "ü" * 127):
        ckpt.save_file({"x": 1}, tmp_path / name)
        assert ckpt.load_file(tmp_path / name) == {"x": 1}
    with pytest.raises(CheckpointError, match="Choose a shorter name"):
        ckpt.save_file({"x": 1}, tmp_path / ("x" * 256))


def test_a_link_is_followed_and_not_replaced(tmp_path):
    ckpt.save_file({"x": 1}, tmp_path / "target.pt")
    (tmp_path / "link.pt").symlink_to("target.pt")
    ckpt.save_file({"x": 2}, tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert ckpt.load_file(tmp_path / "target.pt") == {"x": 2}


def test_a_missing_file_is_both_a_checkpoint_error_and_file_not_found(tmp_path):
    assert issubclass(CheckpointNotFoundError, CheckpointError)
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing.pt"):
        ckpt.load_file(tmp_path / "nothing.pt")


def test_truncated_files_are_refused_by_name(tmp_path):
    path = ckpt.save_file({"x": torch.ones(100)}, tmp_path / "x.pt")
    whole = path.read_bytes()
    for length in (0, 1, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            ckpt.load_file(path)


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
    assert loaded == {"a": np.dtype("f8"), "b": [(2.0,)]}
    assert loaded["a"].flags == np.dtype("f8").flags
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
        assert loaded[name].dtype == array.dtype


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "pytorch_model.bin"])
def test_every_changed_bit_of_a_single_file_is_found_or_does_not_matter_found_85(
    name, tmp_path
):
    """found 85: it was loaded as another number."""
    state = {"weight": torch.arange(40.0).reshape(8, 5), "b": torch.ones(3).bfloat16()}
    if name == "pytorch_model.bin":
        state["extra"] = 1

    def save():
        if name == "model.pt":
            ckpt.save_file(state, tmp_path / name)
            return lambda: ckpt.load_file(tmp_path / name)
        assert ckpt.save_weights(state, tmp_path).name == name
        return lambda: ckpt.load_weights(tmp_path)

    load = save()
    content = (tmp_path / name).read_bytes()
    found = 0
    # Those of the table of contents are few, and each has a meaning.
    places = range(0, 8 * len(content), 29)
    last = range(8 * max(0, len(content) - 900), 8 * len(content), 3)
    for bit in [*places, *last]:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(changed)
        try:
            loaded = load()
        except CheckpointError as error:
            found += name in str(error)
            continue
        assert loaded.keys() == state.keys()
        for key in ("weight", "b"):
            assert loaded[key].dtype == state[key].dtype
            assert torch.equal(loaded[key], state[key])
    assert found > 20
    where = content.index(state["weight"].numpy().tobytes())
    changed = bytearray(content)
    changed[where + 7] ^= 64
    (tmp_path / name).write_bytes(changed)
    with pytest.raises(CheckpointError, match=rf"{name}.*does not match its checksum"):
        load()


def test_files_without_checksums_are_read_and_never_written(tmp_path):
    """torch can be told to save a little time."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(2)}, tmp_path / "theirs.pt")
        ckpt.save_file({"a": torch.ones(2)}, tmp_path / "ours.pt")
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(ckpt.load_file(tmp_path / "theirs.pt")["a"], torch.ones(2))
    with zipfile.ZipFile(tmp_path / "ours.pt") as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**10),
        torch.empty(10**10, device="meta"),
        torch.sparse_coo_tensor(
            torch.zeros(1, 1, dtype=torch.int64).expand(1, 10**10),
            torch.zeros(1).expand(10**10),
            (5,),
            check_invariants=False,
            is_coalesced=True,
        ),
    ],
    ids=["strided", "meta", "sparse"],
)
def test_a_tensor_larger_than_its_memory_is_refused_found_91(tensor, tmp_path):
    """found 91: a file of a few bytes filled the memory once its tensor was used."""
    torch.save({"python": {"words": [tensor]}}, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 10_000
    with pytest.raises(
        CheckpointError, match=r"x\.pt: (a tensor in it claims|.*sparse)"
    ):
        ckpt.load_file(tmp_path / "x.pt")


# ------------------------------------------------------------------------- conversion


class Colour(enum.IntEnum):
    RED = 3


class Loud(str):
    __slots__ = ()

    def __str__(self):
        return "loud"


@dataclasses.dataclass
class Config:
    path: Path
    sizes: tuple


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (Path("a") / "b", str(Path("a/b"))),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.str_("x"), "x"),
        (np.array(["x", "y"]), ["x", "y"]),
        (np.datetime64("2024-05-01"), "2024-05-01"),
        (datetime.datetime(2024, 5, 1, 12, 30), "2024-05-01T12:30:00"),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (datetime.timedelta(minutes=1), 60.0),
        (Colour.RED, 3),
        (frozenset({1}), {1}),
        (Config(Path("x"), (1, Path("y"))), {"path": "x", "sizes": (1, "y")}),
        (Point(1, 2), (1, 2)),
        (Counter("aab"), Counter("aab")),
        ({Colour.RED: [np.bool_(True)]}, {3: [True]}),
        (Loud("quiet"), "quiet"),
    ],
    ids=repr,
)
def test_what_users_store_is_converted_and_loads_safely(tmp_path, value, stored):
    """Defect 48: Path, numpy, dataclass, datetime could be saved but not loaded."""
    path = ckpt.save_file({"value": value}, tmp_path / "x.pt")
    loaded = ckpt.load_file(path)["value"]
    assert loaded == stored
    assert type(loaded) is type(stored)


def test_arrays_become_equal_tensors():
    big_endian = np.arange(4, dtype=">f8")[::-1]
    tensor = ckpt.to_storable(big_endian)
    assert tensor.dtype == torch.float64
    assert tensor.tolist() == [3, 2, 1, 0]


def test_what_cannot_be_stored_is_refused_at_save_time_with_its_key(tmp_path):
    """Defect 48: the failure was only noticed when loading."""
    path = tmp_path / "x.pt"
    for value, name in [
        (nn.Linear(1, 1), "Linear"),
        (len, "builtin_function"),
        (np.longdouble(1), "longdouble|float128"),  # NumPy renamed it in 2.0
        (object(), "object"),
    ]:
        with pytest.raises(
            TypeError, match=rf"\['a'\]\[1\]\['b'\] is a .*{name}.* can"
        ):
            ckpt.save_file({"a": [0, {"b": value}]}, path)
    assert names_in(tmp_path) == []
    with pytest.raises(TypeError, match="meta device"):
        ckpt.to_storable(torch.empty(1, device="meta"))
    endless = []
    endless.append(endless)
    with pytest.raises(TypeError, match=r"value\[0\] contains itself"):
        ckpt.to_storable(endless)
    with pytest.raises(TypeError, match="two keys are stored as 'a'"):
        ckpt.to_storable({"a": 1, Path("a"): 2})


def test_a_snapshot_does_not_change_with_training_and_keeps_sharing():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    state = {"a": model.state_dict(), "b": model.weight[0]}
    snapshot = ckpt.to_storable(state, copy=True)
    same = ckpt.to_storable(state)
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(snapshot["a"]["weight"], before)
    assert torch.equal(same["a"]["weight"], before + 1)
    assert snapshot["b"].data_ptr() == snapshot["a"]["weight"].data_ptr()
    assert snapshot["a"]._metadata == state["a"]._metadata


def test_of_a_view_only_what_it_shows_is_written_found_94(tmp_path):
    """found 94: one element of a large tensor took as much as all of it."""
    large = torch.arange(4e6)
    state = {
        "one": large[17],
        "few": large[100:200:3],
        "again": large[100:200:3],
        "bytes": large.view(torch.uint8)[405:410],
        "none": large[5:5],
        "expanded": large[7].expand(3, 2),
    }
    ckpt.save_file(state, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 10_000
    loaded = ckpt.load_file(tmp_path / "x.pt")
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name
    assert loaded["few"].data_ptr() == loaded["again"].data_ptr()


@pytest.mark.parametrize(
    "make",
    [
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        torch.Tensor.to_sparse_csc,
        lambda tensor: tensor.to_sparse_bsr(2),
    ],
)
@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.filterwarnings("ignore:Sparse .* in beta")
def test_sparse_tensors_are_stored_found_94(make, copy, tmp_path):
    """found 94: "Cannot access storage of SparseTensorImpl"."""
    sparse = make(torch.eye(4))
    ckpt.save_file(ckpt.to_storable({"a": sparse}, copy=copy), tmp_path / "x.pt")
    ckpt.save_weights({"a": sparse}, tmp_path)
    for loaded in (ckpt.load_file(tmp_path / "x.pt"), ckpt.load_weights(tmp_path)):
        assert loaded["a"].layout == sparse.layout
        assert torch.equal(loaded["a"].to_dense(), torch.eye(4))


def nested(levels):
    return [nested(levels - 1)] if levels else []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**2039, "number of 2040 bits; up to 2039"),
        (-(2**2040), "number of 2041 bits"),
        (nested(99), "nested more than 100 levels"),
        (torch.empty(3, dtype=torch.int4), r"torch.int4.*view\(torch.uint8\)"),
        (torch.ones(2).to_mkldnn(), r"layout.*to_dense\(\)"),
        (nn.LazyLinear(2).weight, "no shape yet. Let the model see a batch"),
    ],
    ids=["int", "negative", "deep", "int4", "mkldnn", "lazy"],
)
def test_what_would_not_load_again_is_refused_when_it_is_saved_found_94(
    value, message, tmp_path
):
    """found 94: it was saved, or a raw error of torch's was raised."""
    with pytest.raises(CheckpointError, match=rf"x\.pt\['a'\].* {message}"):
        ckpt.save_file({"a": value}, tmp_path / "x.pt")
    with pytest.raises(TypeError):
        ckpt.check_storable({"a": value}, "x")


def test_what_is_nearly_too_much_is_loaded_again_found_94(tmp_path):
    contents = {"int": 2**2039 - 1, "negative": 1 - 2**2039, "deep": nested(98)}
    ckpt.save_file(contents, tmp_path / "x.pt")
    assert ckpt.load_file(tmp_path / "x.pt") == contents


class Quantized(torch.Tensor):
    """Made of codes and a scale, as the states of optimizers in 8 bits are."""

    @staticmethod
    def __new__(cls, codes, scale, kind):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape)

    def __init__(self, codes, scale, kind):
        self.codes, self.scale, self.kind = codes, scale, kind

    def __tensor_flatten__(self):
        return ["codes", "scale"], [self.kind]

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size=None, stride=None):
        return cls(inner["codes"], inner["scale"], *context)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


@pytest.mark.parametrize("copy", [False, True])
def test_tensors_of_classes_that_torch_may_load_are_stored_found_87(copy, tmp_path):
    """found 87: states of optimizers in 8 bits were refused."""
    codes = torch.arange(4, dtype=torch.uint8)
    tensor = Quantized(codes, torch.tensor(0.5), "dynamic")
    with pytest.raises(
        TypeError, match=r"dequantize\(\).*add_safe_globals\(\[Quantized\]\)"
    ):
        ckpt.to_storable(tensor)
    with torch.serialization.safe_globals([Quantized]):
        ckpt.check_storable({"a": tensor}, "x")
        storable = ckpt.to_storable({"a": tensor}, copy=copy)
        codes += 1
        ckpt.save_file(storable, tmp_path / "x.pt")
        loaded = ckpt.load_file(tmp_path / "x.pt")["a"]
    assert type(loaded) is Quantized
    assert (loaded.codes.tolist(), loaded.scale.item(), loaded.kind) == (
        [0, 1, 2, 3] if copy else [1, 2, 3, 4],
        0.5,
        "dynamic",
    )


# ---------------------------------------------------------------------- random states


def test_random_states_are_restored_exactly_without_pickle(tmp_path):
    random.gauss(0, 1)  # leaves the second number of a pair behind
    np.random.normal()
    path = ckpt.save_file(ckpt.get_random_states(), tmp_path / "r.pt")
    draws = [
        (random.gauss(0, 1), random.random(), np.random.normal(), torch.rand(3))
        for _ in range(2)
        if ckpt.set_random_states(ckpt.load_file(path)) is None
    ]
    assert draws[0][:3] == draws[1][:3]
    assert torch.equal(draws[0][3], draws[1][3])


def test_states_of_an_accelerator_that_is_not_there_are_skipped_with_a_warning():
    states = ckpt.get_random_states()
    states["accelerator"] = {"type": "none", "current": 0, "states": [states["torch"]]}
    with pytest.warns(UserWarning, match="were taken on none, this process runs on"):
        ckpt.set_random_states(states)


def test_damaged_random_states_are_a_checkpoint_error():
    states = ckpt.get_random_states()
    states["python"]["words"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(CheckpointError, match="random states cannot be restored"):
        ckpt.set_random_states(states)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_generator_of_a_gpu_is_restored():
    torch.rand(1, device="cuda")
    states = ckpt.get_random_states()
    first = torch.rand(4, device="cuda")
    ckpt.set_random_states(ckpt.to_storable(states))
    assert torch.equal(torch.rand(4, device="cuda"), first)
    states["accelerator"]["states"] *= 9
    with pytest.warns(UserWarning, match="only the one of the current device"):
        ckpt.set_random_states(states)
    assert torch.equal(torch.rand(4, device="cuda"), first)


# ---------------------------------------------------------------------------- weights


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4)
        self.head.weight = self.embed.weight


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    model = Tied().to(torch.bfloat16)
    path = ckpt.save_weights(model.state_dict(), tmp_path)
    assert path.name == "model.safetensors"
    assert "head.weight" not in safetensors.torch.load_file(path)
    state = ckpt.load_weights(tmp_path)
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
    path = ckpt.save_weights({"a": torch.ones(1)}, tmp_path)
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
    }
    assert ckpt.save_weights(state, tmp_path).suffix == ".safetensors"
    loaded = ckpt.load_weights(tmp_path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "state",
    [
        {"extra": {"version": 3}, "a": torch.ones(2)},
        {"a": (base := torch.arange(4.0)), "b": base[1:3]},
        {"a": torch.ones(2, dtype=torch.complex64)},
        {"format": torch.ones(2)},
    ],
    ids=["extra state", "overlap", "complex", "reserved name"],
)
def test_what_safetensors_cannot_hold_goes_into_the_safe_torch_format(tmp_path, state):
    ckpt.save_weights({"old": torch.ones(1)}, tmp_path)
    assert ckpt.save_weights(state, tmp_path).name == "pytorch_model.bin"
    assert names_in(tmp_path) == ["pytorch_model.bin"]
    loaded = ckpt.load_weights(tmp_path)
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(loaded[name], value) if name != "extra" else True
    assert loaded.get("extra") == state.get("extra")


def test_missing_and_damaged_weights_are_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"expected model.safetensors or"):
        ckpt.load_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 50)
    with pytest.raises(CheckpointError, match=r"model.safetensors: it is damaged"):
        ckpt.load_weights(tmp_path)


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
    assert ckpt.explain_mismatch(plain, wrapped.state_dict()) is None


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
    assert ckpt.explain_mismatch(model, state) is None
    model.load_state_dict(ckpt.fit_to_model(model, state))
    assert model.extra == 4

    lazy = nn.Sequential(nn.LazyLinear(1))
    state = {"module.0.weight": torch.ones(1, 3), "module.0.bias": torch.zeros(1)}
    assert ckpt.explain_mismatch(lazy, state) is None
    lazy.load_state_dict(ckpt.fit_to_model(lazy, state))
    assert lazy(torch.ones(1, 3)).item() == 3.0
    assert ckpt.explain_mismatch(nn.Sequential(nn.LazyLinear(1)), {"a": 1}) == (
        "missing in the checkpoint: 0.weight, 0.bias; not in the model: a"
    )


def test_weights_that_do_not_fit_are_explained_by_the_first_names():
    model = nn.Linear(2, 3)
    assert ckpt.explain_mismatch(model, model.state_dict()) is None
    others = {f"layer{i}": torch.ones(1) for i in range(5)}
    assert ckpt.explain_mismatch(model, {"weight": torch.ones(2, 2), **others}) == (
        "missing in the checkpoint: bias; "
        "not in the model: layer0, layer1, layer2 and 2 more; "
        "of another shape: weight is (2, 2) in the checkpoint and (3, 2) in the model"
    )


# ----------------------------------------------------------------- checkpoint folders


def test_a_checkpoint_holds_what_was_written(tmp_path):
    random.seed(1)
    written = save(tmp_path / "a b/ü", 3, epoch=1, metrics={"loss": np.float64(0.5)})
    found = Checkpoint(tmp_path / "a b/ü")
    assert found.is_whole()
    assert found.progress == {"num_updates": 3, "epoch": 1, "metrics": {"loss": 0.5}}
    assert (found.num_updates, found.metrics, found.world_size) == (3, {"loss": 0.5}, 1)
    assert found.files == ["model.safetensors", "optimizer.pt", "random/0.pt"]
    assert found.num_bytes == sum((found.path / f).stat().st_size for f in found.files)
    assert value_of(found) == 3
    assert found.manifest["torch_version"] == torch.__version__
    assert found.manifest["library_version"] == pytorch_accelerated.__version__
    ckpt.set_random_states(found.load("random/0.pt"))
    assert written.path == found.path
    assert found.has("optimizer.pt")
    with pytest.raises(CheckpointNotFoundError, match=r"no file 'x'; it has model"):
        found.load("x")


def test_several_processes_share_one_folder_through_the_token(tmp_path):
    main = CheckpointWriter(tmp_path / "c")
    other = CheckpointWriter(tmp_path / "c", token=main.token)
    main.begin()
    for rank, writer in enumerate((main, other)):
        writer.write(f"random_states_{rank}.pt", {"rank": rank})
    found = main.commit({"num_updates": 1}, world_size=2)
    assert found.world_size == 2
    assert [found.load(name)["rank"] for name in found.files] == [0, 1]
    with pytest.raises(ValueError, match="new_token"):
        CheckpointWriter(tmp_path / "c", token="../x")


def test_without_commit_nothing_appears(tmp_path):
    with CheckpointWriter(tmp_path / "c") as writer:
        writer.write("x.pt", {})
    with (
        pytest.raises(TypeError, match=r"y.pt\['z'\] is a"),
        CheckpointWriter(tmp_path / "c") as writer,
    ):
        writer.write("y.pt", {"z": object()})
    assert names_in(tmp_path) == []


def test_writers_refuse_names_outside_the_folder_and_the_manifest(tmp_path):
    with CheckpointWriter(tmp_path / "c") as writer:
        for name in ("../x", "/x", "a/../../x", "", "manifest.json"):
            with pytest.raises(ValueError, match=r"inside the checkpoint|the manifest"):
                writer.write(name, {})
        (writer.folder / "link").symlink_to("/etc/hostname")
        with pytest.raises(CheckpointError, match="is a link"):
            writer.commit({})


def test_progress_that_json_cannot_hold_is_refused(tmp_path):
    with (
        CheckpointWriter(tmp_path / "c") as writer,
        pytest.raises(TypeError, match="progress"),
    ):
        writer.commit({"history": torch.ones(3)})


def test_sha256_can_be_chosen(tmp_path):
    with CheckpointWriter(tmp_path / "c", checksum="sha256") as writer:
        (writer.folder / "x").write_bytes(b"abc")
        found = writer.commit({})
    assert found.manifest["files"]["x"]["checksum"].startswith("sha256:ba7816bf8f01")
    assert found.is_whole()


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
        CheckpointWriter(tmp_path / "file").begin()
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for path in (".", ".."):
        with pytest.raises(CheckpointError, match="holds the working directory"):
            CheckpointWriter(path).begin()


def test_a_relative_path_stays_where_it_was_when_the_directory_changes(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with CheckpointWriter("c") as writer:
        os.chdir("/")
        writer.commit({})
    assert names_in(tmp_path) == ["c"]


def test_every_changed_bit_is_found_and_its_file_named(tmp_path):
    original = save(tmp_path / "c", 1)
    chance = random.Random(0)
    for name in [*original.files, "manifest.json"]:
        path = original.path / name
        whole = path.read_bytes()
        for _ in range(40):
            broken = bytearray(whole)
            broken[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
            path.write_bytes(broken)
            reason = Checkpoint(original.path).why_broken()
            if name == "manifest.json" and reason is None:
                # white space may change; the content is what counts
                assert json.loads(broken) == json.loads(whole)
                continue
            assert name in reason
            with pytest.warns(UserWarning, match=re.escape(name)):
                assert ckpt.newest(tmp_path) is None
        path.write_bytes(whole)
    assert Checkpoint(original.path).is_whole()


def test_every_truncated_emptied_or_missing_file_is_named(tmp_path):
    original = save(tmp_path / "c", 1)
    chance = random.Random(0)
    for name in [*original.files, "manifest.json"]:
        path = original.path / name
        whole = path.read_bytes()
        for length in [0, len(whole) - 1, *chance.sample(range(len(whole)), 10)]:
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=re.escape(name)):
                Checkpoint(original.path).verify()
        path.unlink()
        with pytest.raises(CheckpointError, match=re.escape(name)):
            Checkpoint(original.path).verify()
        path.write_bytes(whole)


def with_manifest(folder, **changes):
    """Change a manifest as an attacker would: with a checksum that is right."""
    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    del manifest["checksum"]
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["checksum"] = f"crc32:{zlib.crc32(text.encode()):08x}"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Checkpoint(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/../../x", "", "..\\x"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    save(tmp_path / "c", 1)
    found = with_manifest(
        tmp_path / "c", files={name: {"size": 0, "checksum": "crc32:00000000"}}
    )
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        found.load(name)


def test_a_link_in_a_checkpoint_is_refused(tmp_path):
    found = save(tmp_path / "c", 1)
    os.rename(found.path / "optimizer.pt", tmp_path / "elsewhere")
    (found.path / "optimizer.pt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"optimizer.pt is a link"):
        found.verify()
    with pytest.raises(CheckpointError, match=r"optimizer.pt is a link"):
        found.load("optimizer.pt")


def test_newer_and_malformed_manifests_say_so(tmp_path):
    save(tmp_path / "c", 1)
    with pytest.raises(CheckpointError, match=r"newer version .format 99.*Update"):
        with_manifest(tmp_path / "c", format_version=99).verify()
    with_manifest(tmp_path / "c", format_version=1)
    file = {"size": 0, "checksum": "xxh3:0"}
    for changes in ({"files": [1]}, {"progress": 1}, {"files": {"a": 3}}):
        save(tmp_path / "c", 1)
        with pytest.raises(CheckpointError, match="lacks what a manifest holds"):
            with_manifest(tmp_path / "c", **changes).verify()
    save(tmp_path / "c", 1)
    (tmp_path / "c" / "a").touch()
    with pytest.raises(CheckpointError, match="unknown kind 'xxh3'"):
        with_manifest(tmp_path / "c", files={"a": file}).verify()
    (tmp_path / "c" / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint(tmp_path / "c").verify()


def test_a_folder_that_is_no_checkpoint_or_not_there_is_named(tmp_path):
    with pytest.raises(
        CheckpointNotFoundError, match=r"no checkpoint folder .*nothing"
    ):
        Checkpoint(tmp_path / "nothing").verify()
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint: it has no"):
        Checkpoint(tmp_path).verify()
    (tmp_path / "manifest.json").write_text('{"name": "app"}')
    with pytest.raises(CheckpointError, match="of another program"):
        Checkpoint(tmp_path).verify()


# ------------------------------------------------------------------ many of them


def test_checkpoints_are_ordered_by_updates_and_others_are_ignored(tmp_path):
    """Defect 41: after a restart older checkpoints were not counted."""
    for number in (10, 9, 100):
        save(tmp_path / f"step_{number}", number)
    os.utime(tmp_path / "step_100", (0, 0))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "empty.tmp").mkdir()
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "app"}')
    (tmp_path / "latest").symlink_to("step_9")
    before = names_in(tmp_path)
    found = ckpt.list_checkpoints(tmp_path)
    assert [c.num_updates for c in found] == [9, 10, 100]
    assert ckpt.newest(tmp_path).path.name == "step_100"
    assert ckpt.clean_leftovers(tmp_path) == []
    assert [p.name for p in ckpt.prune(tmp_path, keep_last=1)] == ["step_9", "step_10"]
    assert set(before) - set(names_in(tmp_path)) == {"step_9", "step_10"}
    assert ckpt.list_checkpoints(tmp_path / "nothing") == []
    assert ckpt.newest(tmp_path / "nothing") is None


def test_the_newest_whole_one_is_taken_and_broken_ones_are_named(tmp_path):
    for number in (1, 2, 3, 4):
        save(tmp_path / f"step_{number}", number)
    (tmp_path / "step_4" / "manifest.json").unlink()
    (tmp_path / "step_3" / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match="passed over") as caught:
        assert ckpt.newest(tmp_path).num_updates == 2
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 2
    assert re.search(r"step_3.*optimizer.pt is missing", messages[0])
    assert re.search(r"step_4.*no manifest.json", messages[1])


def test_the_best_has_the_best_finite_metric(tmp_path):
    for number, loss in enumerate([0.5, 0.2, float("nan"), 0.2, -float("inf")]):
        save(tmp_path / f"{number}", number, metrics={"loss": loss})
    save(tmp_path / "5", 5)
    assert ckpt.best(tmp_path, "loss").num_updates == 1
    assert ckpt.best(tmp_path, "loss", greater_is_better=True).num_updates == 0
    (tmp_path / "1" / "optimizer.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="has 0 bytes instead of"):
        assert ckpt.best(tmp_path, "loss").num_updates == 3
    with pytest.raises(KeyError, match="'accuracy'; recorded are: loss"):
        ckpt.best(tmp_path, "accuracy")
    assert ckpt.best(tmp_path / "nothing", "loss") is None


def test_pruning_keeps_the_last_the_best_the_protected_and_those_of_others(tmp_path):
    for number, loss in enumerate([5, 1, 4, 3, 2, 6, 7, 8]):
        run = "other" if number == 0 else "this"
        save(tmp_path / f"{number}", number, metrics={"loss": loss}, run=run)
    pruned = ckpt.prune(
        tmp_path,
        keep_last=2,
        keep_best=1,
        metric="loss",
        protect=[tmp_path / "3", Checkpoint(tmp_path / "4")],
        only=lambda each: each.progress["run"] == "this",
    )
    assert [path.name for path in pruned] == ["2", "5"]
    assert names_in(tmp_path) == ["0", "1", "3", "4", "6", "7"]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ckpt.prune(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="needs metric"):
        ckpt.prune(tmp_path, keep_last=1, keep_best=1)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_last_whole_checkpoint_is_never_deleted(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path / f"{number}", number)
    flip_a_bit(tmp_path / "3" / "model.safetensors")
    with pytest.warns(UserWarning, match="No old checkpoint was deleted.*model.safe"):
        assert ckpt.prune(tmp_path, keep_last=1) == []
    (tmp_path / "3" / "model.safetensors").unlink()  # seen without reading the files
    assert [path.name for path in ckpt.prune(tmp_path, keep_last=1)] == ["1"]
    assert names_in(tmp_path) == ["2", "3"]


# -------------------------------------------------------------------- kills and faults

OPERATIONS = [
    ("builtins", "open"),
    *((os, name) for name in ("fsync", "rename", "replace", "mkdir", "open")),
    *((os, name) for name in ("unlink", "rmdir")),
]


def patch_operations(patch, act):
    """Call ``act`` before every file operation that changes something."""

    def counted(operation):
        def wrapper(*args, **kwargs):
            act()
            return operation(*args, **kwargs)

        return wrapper

    for owner, name in OPERATIONS:
        if owner == "builtins":
            patch.setattr(f"{owner}.{name}", counted(open))
        else:
            patch.setattr(owner, name, counted(getattr(owner, name)))


def run_in_child(function):
    """Run a function in a forked process; return its exit status."""
    with warnings.catch_warnings():
        # torch has threads, but this process has not used them yet
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 1, -signal.SIGKILL)
    return status


def killed_at_every_operation(function):
    """Run a function again and again, killed before its 1st, 2nd, ... operation.

    Yields after each kill; the last time, it was not killed.
    """
    for number in range(1, 1000):

        def in_child(left=number):
            def kill_when_due():
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            with pytest.MonkeyPatch.context() as patch:
                patch_operations(patch, kill_when_due)
                function()

        status = run_in_child(in_child)
        assert status != 1
        yield
        if status == 0:
            assert number > 4  # it did get killed
            return


def test_a_kill_at_any_operation_leaves_the_old_or_the_new_file(tmp_path):
    """Defect 22: an interrupted write replaced the good file by half a file."""
    path = tmp_path / "x.pt"
    ckpt.save_file({"x": 1}, path)
    for _ in killed_at_every_operation(lambda: ckpt.save_file({"x": 2}, path)):
        value = ckpt.load_file(path)["x"]
        assert value in (1, 2)
        ckpt.clean_leftovers(tmp_path)
        assert names_in(tmp_path) == ["x.pt"]
        ckpt.save_file({"x": 1}, path)
    assert value == 2


def test_a_kill_at_any_operation_of_a_save_and_prune_leaves_a_whole_checkpoint(
    tmp_path,
):
    def save_and_prune():
        written = save(tmp_path / "step_2", 2)
        ckpt.prune(tmp_path, keep_last=1, protect=[written])

    save(tmp_path / "step_1", 1)
    seen = set()
    for _ in killed_at_every_operation(save_and_prune):
        newest = ckpt.newest(tmp_path)
        assert value_of(newest) == newest.num_updates
        seen.add(newest.num_updates)
        ckpt.clean_leftovers(tmp_path)
        assert set(names_in(tmp_path)) <= {"step_1", "step_2"}
        assert ckpt.newest(tmp_path).num_updates == newest.num_updates
        save(tmp_path / "step_1", 1)
        shutil.rmtree(tmp_path / "step_2", ignore_errors=True)
    assert seen == {1, 2}


def test_a_kill_at_any_operation_of_a_replacement_leaves_one_of_the_two(tmp_path):
    path = tmp_path / "last"
    save(path, 1)
    (path / "notes.txt").write_text("mine")
    seen = set()
    was_aside = False
    for _ in killed_at_every_operation(lambda: save(path, 2)):
        was_aside |= not path.exists()
        value = value_of(Checkpoint(path))
        assert value_of(ckpt.newest(tmp_path)) == value
        seen.add(value)
        ckpt.clean_leftovers(tmp_path)
        assert names_in(tmp_path) == ["last"]
        assert value_of(Checkpoint(path)) == value
        assert (path / "notes.txt").read_text() == "mine"
        save(path, 1)
    assert seen == {1, 2}
    assert was_aside


def test_an_error_at_any_operation_is_raised_and_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch
):
    path = tmp_path / "last"
    save(path, 1)
    errors = 0
    for number in range(1, 1000):
        left = number

        def fail_when_due():
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a part of the old one may stay
            patch_operations(patch, fail_when_due)
            try:
                save(path, 2)
            except CheckpointError as error:
                errors += "errno 5" in str(error)
        assert path.is_dir()
        assert value_of(Checkpoint(path)) in (1, 2)
        assert not [name for name in names_in(tmp_path) if ".tmp-" in name]
        save(path, 1)
        if left > 0:
            break
    assert errors > 25


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
    writer = CheckpointWriter(tmp_path / "c")
    with writer:
        writer.write_weights({"w": torch.ones(1)})
        (writer.folder / "sub").mkdir()
        (writer.folder / "sub" / "by_others").touch()
        log.clear()
        writer.commit({})
    *before, manifest, folder, subfolder, renamed, parent = log
    assert set(before) == {
        writer.folder / "model.safetensors",
        writer.folder / "sub" / "by_others",
    }
    assert manifest == writer.folder / "manifest.json"
    assert (folder, subfolder) == (writer.folder, writer.folder / "sub")
    assert (renamed, parent) == ("rename", tmp_path)


def test_leftovers_of_live_writers_and_of_other_machines_stay(tmp_path):
    ours = CheckpointWriter(tmp_path / "live")
    ours.begin()
    machine = ours.token[:8]
    other = "0" * 8 if machine != "0" * 8 else "1" * 8
    dead = tmp_path / f"dead.tmp-{machine}-4194305-1-00000000"
    moved = tmp_path / f".trash-{other}-1-1-00000000"
    recycled = tmp_path / f"again.tmp-{machine}-{os.getpid()}-1-00000000"
    for folder in (dead, moved, recycled):
        folder.mkdir()
    assert set(ckpt.clean_leftovers(tmp_path)) == {dead, recycled}
    assert names_in(tmp_path) == sorted([moved.name, ours.folder.name])
    assert ckpt.clean_leftovers(tmp_path, other_machines=True) == [moved]
    ours.abort()
    assert names_in(tmp_path) == []
    assert ckpt.clean_leftovers(tmp_path / "nothing") == []


# -------------------------------------------------------------------- states of 0.1.61


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
    state = ckpt.fit_to_model(model, legacy.model)
    assert "head.weight" not in legacy.model
    assert torch.equal(state["head.weight"], model.head.weight)
    model.load_state_dict(state)
    moment = legacy.optimizer["state"][0]["exp_avg"]
    assert torch.equal(moment, optimizer.state_dict()["state"][0]["exp_avg"])
    assert legacy.scheduler == scheduler.state_dict()
    assert legacy.scaler is None
    assert legacy.metadata == {"current_epoch": 4, "mine": "x"}
    assert legacy.skipped == {}
    ckpt.set_random_states(legacy.random_states[0])
    assert (random.random(), np.random.rand()) == draws[:2]
    assert torch.equal(torch.rand(2), draws[2])


class Warmup:
    """A schedule that cannot be stored without pickle."""

    def __init__(self):
        self.shift = datetime.timedelta(1)

    def __call__(self, step):
        return 1.0


def test_parts_of_0_1_61_that_need_pickle_are_skipped_unless_allowed(tmp_path):
    _, _, scheduler, _ = write_legacy_state(tmp_path, Warmup())
    with pytest.warns(UserWarning, match=r"custom_checkpoint_1.pkl was skipped.*allow"):
        legacy = ckpt.read_legacy_training_state(tmp_path)
    assert legacy.scheduler is None
    assert list(legacy.skipped) == ["custom_checkpoint_1.pkl"]
    allowed = ckpt.read_legacy_training_state(tmp_path, allow_pickle=True)
    assert allowed.scheduler["last_epoch"] == scheduler.state_dict()["last_epoch"]
    assert allowed.skipped == {}


def test_a_checkpoint_without_its_manifest_is_not_taken_for_a_legacy_state(tmp_path):
    save(tmp_path / "c", 1)
    (tmp_path / "c" / "manifest.json").unlink()
    assert not ckpt.is_legacy_training_state(tmp_path / "c")
    with pytest.raises(CheckpointNotFoundError, match=r"neither model.safetensors nor"):
        ckpt.read_legacy_training_state(tmp_path)


# --------------------------------------------------------------------- hostile files


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

        weights = tmp_path / "weights"
        weights.mkdir(exist_ok=True)
        (weights / "pytorch_model.bin").write_bytes(attack)
        with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
            ckpt.load_weights(weights)
        (tmp_path / "x.safetensors").write_bytes(attack)
        with pytest.raises(CheckpointError, match=r"x.safetensors"):
            ckpt.load_weights(tmp_path / "x.safetensors")

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
                try:
                    skipped = ckpt.read_legacy_training_state(legacy).skipped
                except CheckpointError as error:
                    assert path.name in str(error)  # noqa: PT017 (some are skipped)
                else:
                    assert (
                        path.name in skipped or path.name == "custom_checkpoint_0.pkl"
                    )
            path.write_bytes(good)
    assert not marker.exists()


# ----------------------------------------------------------------------- command line


def test_the_command_line_lists_verifies_and_reports(tmp_path, capsys):
    assert command_line.main([str(tmp_path / "nothing")]) == 2
    assert "no directory" in capsys.readouterr().err
    assert command_line.main([str(tmp_path), "--verify"]) == 0
    assert capsys.readouterr().out == "no checkpoints\n"
    save(tmp_path / "step_2", 2, epoch=1, metrics={"loss": 0.25})
    save(tmp_path / "step_3", 3)
    assert command_line.main([str(tmp_path), "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(
        r'step_2  num_updates 2  epoch 1  metrics {"loss": 0.25}  0.0 MB  1 process  '
        r"saved 20",
        lines[0],
    )
    assert command_line.main([str(tmp_path / "step_3"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["progress"] == {"num_updates": 3}
    assert row["files"].keys() == {"model.safetensors", "optimizer.pt", "random/0.pt"}
    flip_a_bit(tmp_path / "step_3" / "optimizer.pt")
    assert command_line.main([str(tmp_path)]) == 0
    assert "BROKEN" not in capsys.readouterr().out
    assert command_line.main([str(tmp_path), "--verify"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"step_3  BROKEN: .*optimizer.pt does not match its crc32", out)


def test_the_module_runs_as_a_program(tmp_path):
    save(tmp_path / "c", 1)
    (tmp_path / "c" / "manifest.json").write_text("{")
    done = subprocess.run(
        [sys.executable, "-m", "pytorch_accelerated.checkpoint", tmp_path, "--verify"],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "BROKEN" in done.stdout


def test_starting_a_background_write_allocates_next_to_nothing():
    """It did, 32 MB to see whether a thread would fit, which took as long as a save."""
    writer = ckpt.BackgroundWriter()
    tracemalloc.start()
    try:
        writer.start(lambda: None)
        writer.wait()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
