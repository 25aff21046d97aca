"""States of every version that was released are loaded and resumed from."""

import importlib.util
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from scenario import difference

from pytorch_accelerated import checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = sorted(path.name for path in FIXTURES.iterdir() if (path / "state").is_dir())


def import_maker():
    spec = importlib.util.spec_from_file_location("make", FIXTURES / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = import_maker()


def differs(found, expected):
    """Say where results differ; other versions of torch may round in other ways."""
    if expected.pop("torch") == torch.__version__:
        return difference(expected, found)
    for kind in ("weights", "history"):
        for name, values in expected[kind].items():
            numbers = (torch.tensor(each) for each in (values, found[kind][name]))
            if not torch.allclose(*numbers, rtol=1e-3, atol=1e-5):
                return f"{name}: {found[kind][name]} is not {values}"
    return difference(expected["num_updates"], found["num_updates"])


@pytest.mark.fault("states of released versions")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_state_of_an_older_version_is_resumed_from(version, tmp_path, trials):
    """With the very same weights, with the version of torch that has written it."""
    kept = FIXTURES / version
    expected = json.loads((kept / "expected.json").read_text())
    states = tmp_path / "states"
    shutil.copytree(kept / "state", states / "step_5")
    checkpoint.Checkpoint(states / "step_5").verify()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is skipped
        trainer = maker.train(states, resume_from="auto")
    trials.add(differs(maker.result_of(trainer), expected))


@pytest.mark.fault("states of released versions")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_checkpoint_of_an_older_version_is_loaded(version, tmp_path, trials):
    kept = FIXTURES / version
    expected = json.loads((kept / "expected.json").read_text())
    trainer = maker.create_trainer(tmp_path)
    contents = trainer.load_checkpoint(kept / "checkpoint.pt")
    found = {
        name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()
    }
    assert contents["note"] == "kept"
    assert len(trainer.optimizer.state_dict()["state"]) == 4
    trials.add(difference(expected["weights"], found))


def test_the_kept_states_are_small():
    sizes = [path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()]
    assert VERSIONS
    assert sum(sizes) < 50_000 * len(VERSIONS)
