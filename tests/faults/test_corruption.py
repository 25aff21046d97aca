"""Damaged checkpoints are found, named, and passed over by "auto"."""

import copy
import json
import random
import shutil
import warnings

import pytest
import torch
from scenario import Scenario, difference, fingerprint
from torch import nn

from pytorch_accelerated import checkpoint
from pytorch_accelerated.callbacks import WSDCheckpointCallback
from pytorch_accelerated.errors import CheckpointError
from pytorch_accelerated.schedulers import WSDLrScheduler
from pytorch_accelerated.state import TrainingState

SCENARIO = Scenario(num_epochs=2, save_every_n_steps=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    SCENARIO.run(folder)
    return folder / "states"


def truncate(file):
    content = file.read_bytes()
    file.write_bytes(content[: random.randrange(len(content))])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def overwrite(file):
    content = bytearray(file.read_bytes())
    start = random.randrange(len(content))
    content[start : start + 100] = b"\1" * len(content[start : start + 100])
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def json_in(file):
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None


def remove(file):
    file.unlink()


def raise_format_version(file):
    manifest = json.loads((file.parent / "manifest.json").read_text())
    manifest["format_version"] = 99
    (file.parent / "manifest.json").write_text(json.dumps(manifest))


def read_quietly(folder):
    """Return the newest whole one and the warnings about the others."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        newest = checkpoint.newest(folder)
    return newest, " ".join(str(warning.message) for warning in caught)


@pytest.mark.fault("damaged, truncated or missing file, newer format")
@pytest.mark.parametrize(
    ("damage", "number"),
    [(truncate, 200), (flip_a_bit, 200), (overwrite, 40), (raise_format_version, 2)],
    ids=["truncated", "a bit flipped", "overwritten", "newer format"],
)
def test_any_damage_is_named_and_auto_falls_back(
    damage, number, saved, tmp_path, trials
):
    while trials.number < trials.count(number):
        file = random.choice(sorted((saved / "final").iterdir()))
        try_damage(file, damage, tmp_path / "states", trials)


@pytest.mark.fault("damaged, truncated or missing file, newer format")
@pytest.mark.parametrize("damage", [remove, empty])
def test_any_file_may_be_missing_or_empty(damage, saved, tmp_path, trials):
    for file in sorted((saved / "final").iterdir()):
        try_damage(file, damage, tmp_path / "states", trials)
    assert trials.number == 7


def try_damage(file, damage, states, trials):
    """Damage a file in a copy of the newest two states."""
    newest = file.parent
    before = states / checkpoint.list_checkpoints(newest.parent)[-2].path.name
    for name in (newest.name, before.name):
        shutil.copytree(newest.with_name(name), states / name)
    file = states / newest.name / file.name
    before_damage = json_in(file)
    damage(file)
    if before_damage is None or json_in(file) != before_damage:  # 1e-05 equals 1E-05
        trials.add(what_is_wrong(file.parent, before, file, damage))
    shutil.rmtree(states)


def what_is_wrong(newest, before, file, damage):
    told = f"{damage.__name__} of {file.name}"
    found, warned = read_quietly(newest.parent)
    if found is None or found.path != before:
        return f"{told}: {found} is taken"
    if newest.name not in warned:
        return f"{told}: no warning names it"
    try:
        TrainingState.read(checkpoint.Checkpoint(newest))
    except CheckpointError as error:
        named = file.name if damage is not raise_format_version else "newer version"
        return None if named in str(error) else f"{told}: the error is {error}"
    return f"{told}: it was loaded"


@pytest.fixture(scope="module")
def single_files(tmp_path_factory):
    """What save_checkpoint and the callbacks that keep models have written."""
    folder = tmp_path_factory.mktemp("single")
    SCENARIO.run(folder).save_checkpoint(folder / "mine.pt")
    schedule = WSDLrScheduler.create_scheduler_fn(num_checkpoints=1)
    trainer = SCENARIO.create_trainer(folder / "wsd")
    trainer.callback_handler.add_callback(WSDCheckpointCallback(folder / "wsd"))
    trainer.train(
        *(SCENARIO.train_dataset(), 2, SCENARIO.eval_dataset()),
        create_scheduler_fn=schedule,
    )
    files = [folder / name for name in ("mine.pt", "best.pt", "ema.pt")]
    return [*files, *(folder / "wsd").glob("*_wsd_post_decay.pt")]


@pytest.mark.fault("damaged, truncated or missing file, newer format")
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, overwrite])
def test_damage_of_a_single_file_is_found_or_does_not_matter_found_85(
    damage, single_files, tmp_path, trials
):
    """found 85: a number that was flipped was loaded."""
    assert len(single_files) == 4
    for file in single_files:
        whole = checkpoint.load_file(file)
        for _ in range(trials.count(25)):
            damaged = tmp_path / file.name
            shutil.copy(file, damaged)
            damage(damaged)
            trainer = SCENARIO.create_trainer(tmp_path)
            before = copy.deepcopy(trainer.model.state_dict())
            try:
                loaded = trainer.load_checkpoint(damaged)
            except CheckpointError as error:
                wrong = None if file.name in str(error) else str(error)
                after = trainer.model.state_dict()
                trials.add(wrong or difference(before, after))
            else:  # padding, for one
                trials.add(difference(whole, loaded))


@pytest.mark.fault("damaged, truncated or missing file, newer format")
def test_a_run_resumed_from_the_one_before_ends_in_the_same_weights(tmp_path, trials):
    expected = fingerprint(SCENARIO.run(tmp_path))
    states = tmp_path / "states"
    for name in ("final", "epoch_2"):
        flip_a_bit(states / name / "model.safetensors")
    with pytest.warns(UserWarning, match="passed over"):
        resumed = SCENARIO.run(tmp_path, resume_from="auto")
    trials.add(difference(expected, fingerprint(resumed)))


@pytest.mark.fault("foreign or unsuitable folder")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "folder is not a complete checkpoint: it has no manifest.json"),
        ("other files", "folder is not a checkpoint: .* of another program"),
        ("file", "There is no checkpoint folder .*folder"),
        ("nothing", "There is no checkpoint folder .*folder"),
    ],
)
def test_what_is_no_training_state_is_refused(kind, message, tmp_path, trials):
    folder = tmp_path / "folder"
    if kind == "file":
        folder.write_text("text")
    elif kind != "nothing":
        folder.mkdir()
    if kind == "other files":
        (folder / "notes.txt").write_text("text")
        (folder / "manifest.json").write_text('{"name": "an extension"}')
    with pytest.raises(CheckpointError, match=message):
        SCENARIO.run(tmp_path / "run", resume_from=folder)
    trials.add(None)


@pytest.mark.fault("foreign or unsuitable folder")
def test_the_state_of_another_model_is_refused_by_the_names_of_its_weights(
    saved, tmp_path, trials
):
    trainer = SCENARIO.create_trainer(tmp_path)
    trainer.model = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 1))
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())
    with pytest.raises(CheckpointError, match=r"does not fit the model.*0\.weight"):
        SCENARIO.run(tmp_path, saved / "epoch_1", trainer)
    trials.add(None)
