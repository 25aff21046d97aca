"""What this version and 0.1.61 have written is loaded and resumed from."""

import importlib.util
import json
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pytorch_accelerated import Trainer, checkpoint

GOLDEN = Path(__file__).parent / "golden"


def import_maker():
    spec = importlib.util.spec_from_file_location("make", GOLDEN / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = import_maker()


@pytest.fixture(autouse=True)
def _nothing_is_skipped():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def expected_of(version):
    return json.loads((GOLDEN / version / "expected.json").read_text())


def assert_same(found, expected, torch_version):
    """With the version of torch that has written it, to the last bit."""
    assert found.keys() == expected.keys()
    tolerance = {} if torch_version == torch.__version__ else {"rel": 1e-3, "abs": 1e-5}
    for name, values in expected.items():
        if tolerance:
            flat = torch.tensor(found[name]).flatten().tolist()
            assert flat == pytest.approx(
                torch.tensor(values).flatten().tolist(), **tolerance
            )
        else:
            assert found[name] == values, name


def test_a_state_amid_a_window_is_resumed_from(tmp_path):
    expected = expected_of("0.2.0")
    shutil.copytree(GOLDEN / "0.2.0" / "state", tmp_path / "state")
    found = checkpoint.Checkpoint(tmp_path / "state")
    found.verify()
    assert (found.num_updates, found.manifest["world_size"]) == (5, 1)

    trainer = maker.train(tmp_path, resume_from=tmp_path / "state")

    result = maker.result_of(trainer)
    assert result["num_updates"] == expected["num_updates"]
    for kind in ("weights", "history"):
        assert_same(result[kind], expected[kind], expected["torch"])
    assert trainer.load_training_state(tmp_path / "state") == {
        "current_epoch": 2,
        "note": "kept",
    }


def test_a_checkpoint_is_loaded(tmp_path):
    trainer = maker.create_trainer(tmp_path)
    contents = trainer.load_checkpoint(GOLDEN / "0.2.0" / "checkpoint.pt")
    assert contents["note"] == "kept"
    assert maker.weights_of(trainer.model) == expected_of("0.2.0")["weights"]
    assert len(trainer.optimizer.state_dict()["state"]) == 4


def test_a_best_model_is_loaded(tmp_path):
    history, version = (expected_of("0.2.0")[key] for key in ("history", "torch"))
    trainer = maker.create_trainer(tmp_path)
    contents = trainer.load_checkpoint(GOLDEN / "0.2.0" / "best.pt")
    best = min(history["eval_loss_epoch"])
    assert contents["eval_loss_epoch"] == contents["loss"] == best
    metrics = trainer.evaluate(maker.create_dataset(), per_device_batch_size=4)
    assert_same({"loss": metrics["evaluation_loss"]}, {"loss": best}, version)


def test_a_state_of_0_1_61_is_resumed_from(tmp_path):
    expected = expected_of("0.1.61")
    shutil.copytree(GOLDEN / "0.1.61" / "state", tmp_path / "state")
    model, optimizer, _, dataset = maker.create_legacy()
    trainer = Trainer(
        model, nn.MSELoss(), optimizer, callbacks=(), accelerator_kwargs={"cpu": True}
    )
    trainer.train(
        dataset,
        num_epochs=2,
        per_device_batch_size=2,
        create_scheduler_fn=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 4),
        train_dataloader_kwargs={"shuffle": False, "num_workers": 0},
        resume_from=tmp_path / "state",
    )
    assert_same(maker.weights_of(trainer.model), expected["end"], expected["torch"])

    metadata = trainer.load_training_state(tmp_path / "state")
    assert metadata == {"current_epoch": 2, "note": "kept"}
    assert maker.weights_of(trainer.model) == expected["best"]
    draws = [random.random(), np.random.rand(), torch.rand(1).item()]
    assert draws == expected["draws"]


def test_a_best_model_of_0_1_61_is_loaded():
    """Defect 25: a metric that was a numpy number made it unloadable."""
    model, optimizer, _, _ = maker.create_legacy()
    trainer = Trainer(model, nn.MSELoss(), optimizer, callbacks=())
    contents = trainer.load_checkpoint(GOLDEN / "0.1.61" / "best.pt")
    assert maker.weights_of(model) == expected_of("0.1.61")["best"]
    assert contents["loss"] == 0.25
    assert contents["scores"].tolist() == [0, 1, 2]
