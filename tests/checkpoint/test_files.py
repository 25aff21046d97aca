"""Single files are exact, safe to load, and whole or absent whatever happens."""

import dataclasses
import datetime
import enum
import errno
import os
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from small_checkpoints import names_in, raising
from torch import nn

from pytorch_accelerated import checkpoint as ckpt
from pytorch_accelerated.checkpoint import CheckpointNotFoundError
from pytorch_accelerated.checkpoint.files import check_storable
from pytorch_accelerated.errors import CheckpointError


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


def test_ctrl_c_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch
):
    path = ckpt.save_file({"x": 1}, tmp_path / "best.pt")
    monkeypatch.setattr(torch, "save", raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ckpt.save_file({"x": 2}, path)
    assert ckpt.load_file(path) == {"x": 1}
    assert names_in(tmp_path) == ["best.pt"]


def test_a_folder_in_place_of_the_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"Is a directory \(errno 21\)"):
        ckpt.save_file({}, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"Could not write .*errno"):
        ckpt.save_file({}, tmp_path / "file" / "x.pt")


def test_names_may_be_long_and_hold_spaces_and_any_letters(tmp_path):
    for name in ("a b.pt", "模型 ü.pt", "x" * 255, "ü" * 127):
        ckpt.save_file({"x": 1}, tmp_path / name)
        assert ckpt.load_file(tmp_path / name) == {"x": 1}
    with pytest.raises(CheckpointError, match="File name too long"):
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


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**10),
        torch.empty(10**10, device="meta"),
    ],
    ids=["strided", "meta"],
)
def test_a_tensor_larger_than_its_memory_is_refused_found_91(tensor, tmp_path):
    """found 91: a file of a few bytes filled the memory once its tensor was used."""
    torch.save({"python": {"words": [tensor]}}, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 10_000
    with pytest.raises(CheckpointError, match=r"x\.pt: a tensor in it claims"):
        ckpt.load_file(tmp_path / "x.pt")


# ------------------------------------------------------------------ what can be stored


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
    with pytest.raises(TypeError, match="on the device meta"):
        ckpt.to_storable(torch.empty(1, device="meta"))
    endless = []
    endless.append(endless)
    with pytest.raises(TypeError, match="value contains itself"):
        ckpt.to_storable(endless)
    with pytest.raises(TypeError, match="two keys are stored as 'a'"):
        ckpt.to_storable({"a": 1, Path("a"): 2})


def test_a_snapshot_does_not_change_with_training_and_keeps_what_is_tied():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    state = {"a": model.state_dict(), "b": model.weight}
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
    loaded = ckpt.load_file(tmp_path / "x.pt")["a"]
    assert loaded.layout == sparse.layout
    assert torch.equal(loaded.to_dense(), torch.eye(4))


def nested(levels):
    return [nested(levels - 1)] if levels else []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**2039, "number of 2040 bits; up to 2039"),
        (-(2**2040), "number of 2041 bits"),
        (nested(900), "nested too deeply"),
        (torch.empty(3, dtype=torch.int4), r"torch.int4.*view\(torch.uint8\)"),
        (torch.ones(2).to_mkldnn(), r"layout torch._mkldnn.*to_dense\(\)"),
        (nn.LazyLinear(2).weight, "no shape yet. Let the model see a batch"),
    ],
    ids=["int", "negative", "deep", "int4", "mkldnn", "lazy"],
)
def test_what_would_not_load_again_is_refused_when_it_is_saved_found_94(
    value, message, tmp_path
):
    """found 94: it was saved, or a raw error of torch's was raised."""
    with pytest.raises(CheckpointError, match=rf"x\.pt.* {message}"):
        ckpt.save_file({"a": value}, tmp_path / "x.pt")
    with pytest.raises(TypeError):
        check_storable({"a": value}, "x")


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
        check_storable({"a": tensor}, "x")
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
