"""Checkpoints made to run code, to read other files, or to take memory and time."""

import copy
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import warnings
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import Job, keep_to_memory
from runs import SMALL, change_manifest

from pytorch_accelerated import checkpoint
from pytorch_accelerated.checkpoint import folder as folders
from pytorch_accelerated.engines import fsdp
from pytorch_accelerated.errors import CheckpointError
from pytorch_accelerated.state import TrainingState

SCENARIO = SMALL.with_(ends_schedule=True, save_every_n_steps=1)
MEGABYTE = 2**20
# What a process may take of memory, besides what it has; each bomb would take more.
MEMORY_LEFT = 400 * MEGABYTE


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    SCENARIO.run(folder)
    return folder / "states"


class Attack:
    """Pickles into a call that creates a file when it is unpickled."""

    marker: Path

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def sign(state):
    """Give a state the manifest that would have been written for its files."""

    def change(manifest):
        manifest["files"] = {
            path.relative_to(state).as_posix(): {
                "size": path.stat().st_size,
                "checksum": folders.calculate_checksum(path),
            }
            for path in state.rglob("*")
            if path.is_file() and path.name != "manifest.json"
        }

    change_manifest(state, change)


def change_archive(path, name, change, kind=zipfile.ZIP_STORED):
    """Write an archive of torch.save anew, with other content in one entry."""
    with zipfile.ZipFile(path) as archive:
        contents = {each: archive.read(each) for each in archive.namelist()}
    with zipfile.ZipFile(path, "w", kind, compresslevel=1) as archive:
        for each, content in contents.items():
            is_meant = each.endswith(f"/{name}")
            archive.writestr(each, change(content) if is_meant else content)


# ------------------------------------------------- what may be in a file of torch.save


def code(path):
    torch.save({"state": Attack()}, path)


def code_in_a_bare_pickle(path):
    path.write_bytes(pickle.dumps({"state": Attack()}, protocol=2))


def code_in_the_old_format(path):
    torch.save({"state": Attack()}, path, _use_new_zipfile_serialization=False)


def script(path):
    """What torch takes for a program of TorchScript."""
    torch.save({"state": {}}, path)
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/constants.pkl", pickle.dumps(()))


def tar(path):
    inside = path.with_name("pickle")
    inside.write_bytes(pickle.dumps(Attack()))
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(inside, name)
    inside.unlink()


def compressed(path):
    torch.save({"model_state_dict": {}}, path)
    change_archive(path, "", bytes, zipfile.ZIP_DEFLATED)


def compressed_tensor(path):
    zeros = bytes(500 * MEGABYTE)
    torch.save({"state": torch.zeros(4)}, path)
    change_archive(path, "data/0", lambda _: zeros, zipfile.ZIP_DEFLATED)


def compressed_pickle(path):
    push_and_pop = b"\x80\x02" + b"N0" * (250 * MEGABYTE) + b"N."
    torch.save({"state": {}}, path)
    change_archive(path, "data.pkl", lambda _: push_and_pop, zipfile.ZIP_DEFLATED)


def entries_that_share_bytes(path):
    """One entry under a hundred names, each of which could be read to a tensor."""
    torch.save({"state": torch.zeros(MEGABYTE)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        (one,) = (each for each in archive.filelist if each.filename.endswith("data/0"))
        for number in range(1, 100):
            twin = copy.copy(one)
            twin.filename = f"{one.filename}{number}"
            archive.filelist.append(twin)
        archive._didModify = True  # so that its table of contents is written anew


def nested(path):
    levels = 100_000
    pickled = b"\x80\x02" + b"}K\0" * levels + b"}" + b"s" * levels + b"."
    torch.save({"state": {}}, path)
    change_archive(path, "data.pkl", lambda _: pickled)


def other_content(path):
    torch.save([1, 2, 3], path)


CONTENTS = {
    code: "would run code",
    code_in_a_bare_pickle: "would run code",
    code_in_the_old_format: "would run code",
    script: "TorchScript",
    tar: r"legacy \.tar|would run code",
    compressed_tensor: "compressed",
    compressed_pickle: "compressed",
    entries_that_share_bytes: "more bytes than",
    nested: "RecursionError",
    other_content: "do not hold what belongs there",
}


LEGACY = (
    "pytorch_model.bin",
    "optimizer.bin",
    "scaler.pt",
    "trainer_metadata.pt",
    "custom_checkpoint_0.pkl",
    "random_states_0.pkl",
)


def read_legacy(path):
    """Read a state of 0.1.61 of which one file is hostile; raise what was warned of."""
    for name in LEGACY:
        if name != path.name:
            torch.save({}, path.with_name(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        checkpoint.read_legacy_training_state(path.parent)


WAYS_TO_LOAD = {
    "load_file": ("any.pt", checkpoint.load_file),
    "weights": ("pytorch_model.bin", folders.read_weights),
    "read_parts": ("process_0.pt", lambda path: fsdp.read_parts([path])),
    "load_checkpoint": (
        "best.pt",
        lambda path: SCENARIO.create_trainer(path.parent).load_checkpoint(path),
    ),
    **{f"{name} of 0.1.61": (name, read_legacy) for name in LEGACY},
}


@pytest.mark.fault("hostile checkpoint: code, bombs, links, lies")
@pytest.mark.parametrize("write", [code, compressed])
@pytest.mark.parametrize("way", WAYS_TO_LOAD)
def test_no_way_of_loading_runs_code_or_unpacks(way, write, tmp_path, trials):
    name, load = WAYS_TO_LOAD[way]
    Attack.marker = tmp_path / "code was run"
    write(tmp_path / name)
    expected = rf"{name}.*{CONTENTS.get(write, 'compressed')}"
    with pytest.raises((CheckpointError, UserWarning), match=expected):
        load(tmp_path / name)
    trials.add("code was run" if Attack.marker.exists() else None)


# ----------------------------------------------------- what may be wrong with a folder


def weights_as_pickle(state):
    (state / "model.safetensors").unlink()
    code(state / "pytorch_model.bin")
    sign(state)


def header_longer_than_all_memory(state):
    (state / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    sign(state)


def write_header(state, header):
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(16)
    (state / "model.safetensors").write_bytes(content)
    sign(state)


def tensor_of_gigabytes(state):
    size = 2**34
    tensor = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
    write_header(state, {"0.weight": tensor})


def versions_that_are_none(state):
    tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    versions = {"_metadata": json.dumps({"": [1]})}
    write_header(state, {"__metadata__": versions, "0.weight": tensor})


def deep_manifest(state):
    (state / "manifest.json").write_text("[" * 10**6 + "]" * 10**6)


def manifest_nearly_too_deep(state):
    """Levels that can be read, though not written again."""
    for levels in range(800, 1001):
        progress = '{"a":' * levels + "1" + "}" * levels
        text = f'{{"format_version": 1, "progress": {progress}}}'
        (state / "manifest.json").write_text(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint.list_checkpoints(state.parent)


def add_file(state, name):
    change_manifest(state, lambda m: m["files"].update({name: m["files"]["run.pt"]}))


def change_entries(state, **entries):
    change_manifest(state, lambda manifest: manifest.update(entries))


def link(state, name, target):
    (state / name).unlink()
    (state / name).symlink_to(target)


def folder_link(state):
    """A file in a folder that is linked to another one."""
    target = state.parent.parent / "elsewhere"
    target.mkdir()
    shutil.copy(state / "run.pt", target)
    sub = state / "sub"
    sub.mkdir()
    shutil.copy(state / "run.pt", sub)
    sign(state)
    shutil.rmtree(sub)
    sub.symlink_to(target)


def sparse_terabyte(state):
    os.truncate(state / "run.pt", 2**40)


def pipe(state, name):
    (state / name).unlink()
    os.mkfifo(state / name)
    if name != "manifest.json":
        change_manifest(state, lambda m: m["files"][name].update(size=0))


# What is done to a folder, with what, and what is said of it.
FOLDERS = [
    (weights_as_pickle, {}, "pytorch_model.bin.*would run code"),
    (header_longer_than_all_memory, {}, "model.safetensors.*(?i:header)"),
    (tensor_of_gigabytes, {}, "model.safetensors.*(?i:offset|metadata|size|buffer)"),
    (versions_that_are_none, {}, "model.safetensors.*versions"),
    (deep_manifest, {}, "manifest.json.*RecursionError"),
    (manifest_nearly_too_deep, {}, "manifest.json.*damaged"),
    (change_entries, {"files": [1]}, "manifest.json.*damaged"),
    (change_entries, {"progress": 1}, "manifest.json.*damaged"),
    (change_entries, {"files": {"a": 3}}, "a.*damaged"),
    (add_file, {"name": "../run.pt"}, "leads out"),
    (add_file, {"name": "a/../../run.pt"}, "leads out"),
    (add_file, {"name": ""}, "leads out"),
    (add_file, {"name": "/etc/passwd"}, "leads out"),
    (add_file, {"name": "a\0b"}, "zzz/a.*damaged"),
    (add_file, {"name": "\ud800"}, "zzz.*damaged"),
    (add_file, {"name": "x" * 300}, "x"),
    (link, {"name": "run.pt", "target": "/etc/passwd"}, "run.pt is a link"),
    (link, {"name": "manifest.json", "target": "/dev/zero"}, "manifest.json.*link"),
    (link, {"name": "manifest.json", "target": "run.pt"}, "manifest.json.*link"),
    (folder_link, {}, "sub/run.pt is a link"),
    (sparse_terabyte, {}, "run.pt has 1,099,511,627,776 bytes instead of"),
    (pipe, {"name": "manifest.json"}, "manifest.json.*no plain file"),
    (pipe, {"name": "run.pt"}, "run.pt.*no plain file"),
]


# ----------------------------------------------------------------------------- trials


def what_happens(states, hostile, expected, marker):
    """Read the state in every way, with little memory to spare; say what went wrong."""
    keep_to_memory(MEMORY_LEFT)
    told = []
    try:
        TrainingState.read(checkpoint.Checkpoint(hostile))
    except CheckpointError as error:
        told.append(str(error))
    else:
        raise AssertionError("It was read.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer = SCENARIO.run(states.parent, resume_from="auto")
        except CheckpointError as error:
            told.append(str(error))
        else:
            assert trainer.num_updates == 1
            told.append(" ".join(str(each.message) for each in caught))
    for text in told:
        assert hostile.name in text, text
        assert re.search(expected, text), text
    assert not marker.exists()


def try_it(saved, folder, expected, change):
    """Change the newest of two states, and say what reading it does wrong."""
    Attack.marker = folder / "code was run"
    states = folder / "states"
    for name in ("step_1", "final"):
        shutil.copytree(saved / name, states / name)
    hostile = states / "zzz"  # the last of those with as many updates
    (states / "final").rename(hostile)
    change(hostile)
    job = Job(
        lambda: what_happens(states, hostile, expected, Attack.marker),
        folder / "log",
    )
    wrong = job.wait_or_explain()
    return wrong or ("code was run" if Attack.marker.exists() else None)


OTHER_FILES = ("optimizer.bin", "scheduler.bin", "trainer_metadata.pt", "processes.pt")
IN_FILES = [("run.pt", each) for each in CONTENTS]
IN_FILES += [(name, code) for name in OTHER_FILES]


@pytest.mark.fault("hostile checkpoint: code, bombs, links, lies")
@pytest.mark.parametrize(("name", "write"), IN_FILES)
def test_a_hostile_file_of_torch_is_refused(name, write, saved, tmp_path, trials):
    def change(state):
        write(state / name)
        sign(state)

    trials.add(try_it(saved, tmp_path, f"{name}.*{CONTENTS[write]}", change))


@pytest.mark.fault("hostile checkpoint: code, bombs, links, lies")
@pytest.mark.parametrize(("change", "kwargs", "expected"), FOLDERS)
def test_a_hostile_folder_is_refused(change, kwargs, expected, saved, tmp_path, trials):
    trials.add(try_it(saved, tmp_path, expected, partial(change, **kwargs)))
