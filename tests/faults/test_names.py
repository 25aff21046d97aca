"""Folders of any name, relative paths, and a working directory that changes."""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scenario import Scenario, difference, fingerprint
from toys import At

from pytorch_accelerated import checkpoint
from pytorch_accelerated.errors import CheckpointError

ROW = "unusual names, relative paths, chdir during a run"
CONTENT = {"number": 1}
# What a writer adds to a name, at most, while it writes.
LONGEST_ADDITION = 60


def is_name(text):
    return 0 < len(os.fsencode(text)) <= 255 and text not in (".", "..")


NAMES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0")),
    # names that are no text in any encoding
    st.binary(max_size=255)
    .filter(lambda name: not {*name} & {*b"/\0"})
    .map(os.fsdecode),
    st.text("aé猫🦆 ~.", min_size=40),
).filter(is_name)


def write(path):
    with checkpoint.CheckpointWriter(path) as writer:
        writer.write("state.pt", CONTENT)
        writer.commit({"num_updates": 1})


@pytest.mark.fault(ROW)
def test_a_checkpoint_may_have_any_name_and_be_in_a_folder_of_any_name(
    tmp_path, trials
):
    @settings(
        max_examples=trials.count(200),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(NAMES)
    @example("x" * 255)
    @example("猫" * 85)
    @example("~")
    @example("-rf *")
    @example("line\nbreak")
    @example("\udcff")
    def try_name(name):
        folder = tmp_path / f"{trials.number}"
        trials.add(what_is_wrong(folder, name))
        shutil.rmtree(folder)

    try_name()


def what_is_wrong(folder, name):
    write(folder / name / "step_1")
    found = checkpoint.newest(folder / name)
    if found is None or found.load("state.pt") != CONTENT:
        return f"nothing is found in a folder of the name {name!r}"
    is_long = len(os.fsencode(name)) + LONGEST_ADDITION > 255
    try:
        write(folder / "c" / name)
        write(folder / "c" / name)  # which replaces the first one
    except CheckpointError as error:
        return None if is_long and "too long" in str(error) else f"{name!r}: {error}"
    found = checkpoint.newest(folder / "c")
    if found is None or found.load("state.pt") != CONTENT:
        return f"no checkpoint of the name {name!r} is found"
    return None


@pytest.mark.fault(ROW)
@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "größe 猫 🦆",
        'it\'s "quoted" $HOME',
        "x" * 255,
        "line\nbreak",
        "-rf",
        os.fsdecode(b"\xff\xfe"),
    ],
)
def test_a_run_may_save_to_a_folder_of_any_name(name, tmp_path, trials, monkeypatch):
    scenario = Scenario(num_epochs=2)
    expected = fingerprint(scenario.run(tmp_path / "plain"))
    monkeypatch.chdir(tmp_path)  # and may be relative
    scenario.run(Path(name))
    shutil.rmtree(Path(name) / "states" / "final")
    shutil.rmtree(Path(name) / "states" / "epoch_2")
    resumed = scenario.run(Path(name), resume_from="auto")
    trials.add(difference(expected, fingerprint(resumed)))


def change_folder(folder, trainer, **kwargs):
    elsewhere = folder / f"{trainer.run_history.current_epoch}"
    elsewhere.mkdir(parents=True)
    os.chdir(elsewhere)


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_saves_to_one_folder_wherever_it_goes(
    asynchronous, tmp_path, trials, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    saving = (("asynchronous", asynchronous),)
    scenario = Scenario(max_checkpoints=2, save_kwargs=saving)
    expected = fingerprint(scenario.run(tmp_path / "still"))
    for name, where in [("a b", "start/a b"), ("~/a b", "home/a b")]:
        (tmp_path / "start").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "start")
        elsewhere = tmp_path / "elsewhere" / name.replace("/", "")
        change = partial(change_folder, elsewhere)
        moving = scenario.with_(callbacks=(At(on_train_epoch_start=change),))
        moving.run(Path(name))
        trials.add(difference(files(tmp_path / "still"), files(tmp_path / where)))
        trials.add(files(elsewhere) and f"{files(elsewhere)} are elsewhere")
        monkeypatch.chdir(tmp_path / "start")
        shutil.rmtree(tmp_path / where / "states" / "final")
        resumed = scenario.run(Path(name), resume_from="auto")
        trials.add(difference(expected, fingerprint(resumed)))


@pytest.mark.fault(ROW)
def test_a_state_saved_by_hand_is_loaded_from_where_it_is(
    tmp_path, trials, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    trainer = Scenario(num_epochs=1).run(tmp_path / "run")
    for name in ("by hand", "~/by hand", "../by hand"):
        trainer.save_training_state(name)
        trainer.load_training_state(name)
        trials.add(None)
    assert (tmp_path / "home" / "by hand").is_dir()


def files(folder):
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*.*"))
