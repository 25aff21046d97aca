"""Metrics of torchmetrics and scikit-learn, alone and on two processes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    MoveModulesToDeviceCallback,
    TrainerCallback,
)

torchmetrics = pytest.importorskip("torchmetrics")

from torchmetrics.classification import (  # noqa: E402
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
)

DIGITS = Path(__file__).parents[2] / "examples" / "data" / "digits.npz"
SCRIPT = Path(__file__).parent / "scripts" / "evaluate_with_torchmetrics.py"


@pytest.fixture(scope="module")
def digits():
    arrays = np.load(DIGITS)
    images = torch.from_numpy(arrays["images"]).float().div(16).flatten(1)
    return TensorDataset(images, torch.from_numpy(arrays["labels"]).long())


def create_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(64, 10)


def metrics_by_hand(model, dataset):
    """Return what scikit-learn makes of all predictions at once."""
    metrics = pytest.importorskip("sklearn.metrics")
    images, labels = dataset.tensors
    with torch.no_grad():
        probabilities = model(images).softmax(dim=1)
    predictions = probabilities.argmax(dim=1)
    return {
        "accuracy": metrics.accuracy_score(labels, predictions),
        "f1": metrics.f1_score(labels, predictions, average="macro"),
        "auroc": metrics.roc_auc_score(labels, probabilities, multi_class="ovr"),
    }


class MetricsTrainer(Trainer):
    """Holds a collection that a default callback moves to the device."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metrics = torchmetrics.MetricCollection(
            {
                "accuracy": MulticlassAccuracy(10, average="micro"),
                "f1": MulticlassF1Score(10),
                "auroc": MulticlassAUROC(10),
            }
        )

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        self.metrics.update(output["model_outputs"].softmax(dim=1), batch[1])
        return output

    def eval_epoch_end(self):
        for name, value in self.metrics.compute().items():
            self.run_history.update_metric(name, value.item())
        self.metrics.reset()


class AccuracyCallback(TrainerCallback):
    """Holds one metric, and moves it to the device itself."""

    def __init__(self):
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def on_training_run_start(self, trainer, **kwargs):
        self.accuracy.to(trainer.device)

    def on_train_step_end(self, trainer, batch, batch_output, **kwargs):
        self.accuracy.update(batch_output["model_outputs"], batch[1])

    def on_train_epoch_end(self, trainer, **kwargs):
        value = self.accuracy.compute().item()
        trainer.run_history.update_metric("train_accuracy", value)
        self.accuracy.reset()


def train(dataset, callbacks):
    model = create_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = MetricsTrainer(model, nn.CrossEntropyLoss(), optimizer, callbacks, seed=0)
    trainer.train(dataset, 2, dataset, per_device_batch_size=50)
    return trainer


def test_a_collection_sees_every_sample_of_an_evaluation_once(digits):
    trainer = train(digits, [MoveModulesToDeviceCallback])

    metrics = trainer.evaluate(digits, per_device_batch_size=64)

    expected = metrics_by_hand(trainer.model, digits)
    assert {name: metrics[f"evaluation_{name}"] for name in expected} == pytest.approx(
        expected, rel=1e-5
    )
    assert trainer.run_history.get_latest_metric("f1") == pytest.approx(
        expected["f1"], rel=1e-5
    )


def test_a_metric_in_a_callback_sees_the_training_batches(digits):
    trainer = train(digits, [AccuracyCallback])

    first, second = trainer.run_history.get_metric_values("train_accuracy")

    assert 0.1 < first < second <= 1.0


def test_functions_of_scikit_learn_are_metrics_beside_those_of_torchmetrics(digits):
    sklearn = pytest.importorskip("sklearn.metrics")
    metrics = {
        "accuracy": MulticlassAccuracy(10, average="micro"),
        "f1": lambda p, t: sklearn.f1_score(t, p.argmax(-1), average="macro"),
        "auroc": lambda p, t: sklearn.roc_auc_score(
            t, p.softmax(-1), multi_class="ovr"
        ),
    }
    model = create_model()
    trainer = Trainer(model, nn.CrossEntropyLoss(), None, (), metrics=metrics)

    found = trainer.evaluate(digits, per_device_batch_size=50)

    for name, value in metrics_by_hand(model, digits).items():
        assert found[f"evaluation_{name}"] == pytest.approx(value, rel=1e-5)


def test_metrics_on_two_processes_are_those_of_one(digits, launch):
    launched = launch(
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        SCRIPT,
        DIGITS,
        "{folder}",
    )

    expected = metrics_by_hand(create_model(), digits)
    for process in (0, 1):
        recorded = json.loads((launched.folder / f"metrics_{process}.json").read_text())
        assert recorded["evaluation_num_samples"] == len(digits)
        for name, value in expected.items():
            found = recorded[f"evaluation_{name}"]
            assert found == pytest.approx(value, rel=1e-5), name
