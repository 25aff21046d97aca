"""Metrics of torchmetrics and scikit-learn; those of two processes are in promises/."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import MoveModulesToDeviceCallback

torchmetrics = pytest.importorskip("torchmetrics")
sklearn = pytest.importorskip("sklearn.metrics")

from torchmetrics.classification import (  # noqa: E402
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
)


class MetricsTrainer(Trainer):
    """Has a collection that a default callback moves, and gathers for scikit-learn."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metrics = torchmetrics.MetricCollection(
            {
                "accuracy": MulticlassAccuracy(10, average="micro"),
                "f1": MulticlassF1Score(10),
                "auroc": MulticlassAUROC(10),
            }
        )

    def eval_epoch_start(self):
        super().eval_epoch_start()
        self.seen = []

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        outputs, labels = output["model_outputs"], batch[1]
        self.metrics.update(outputs.softmax(dim=1), labels)
        self.seen.append(self.gather(torch.stack([outputs.argmax(dim=1), labels])))
        return output

    def eval_epoch_end(self):
        for name, value in self.metrics.compute().items():
            self.run_history.update_metric(name, value.item())
        self.metrics.reset()
        predictions, labels = torch.cat(self.seen, dim=1)
        score = sklearn.f1_score(labels, predictions, average="macro")
        self.run_history.update_metric("f1_of_sklearn", score)


def test_metrics_of_both_see_every_sample_of_an_evaluation_once(digits):
    images, labels = digits().tensors
    images = images.flatten(1)
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    own = {
        "own_accuracy": MulticlassAccuracy(10, average="micro"),
        "own_f1": lambda p, t: sklearn.f1_score(t, p.argmax(-1), average="macro"),
    }
    trainer = MetricsTrainer(
        model, nn.CrossEntropyLoss(), None, [MoveModulesToDeviceCallback], metrics=own
    )

    metrics = trainer.evaluate(TensorDataset(images, labels), per_device_batch_size=64)

    with torch.no_grad():
        probabilities = model(images).softmax(dim=1)
    predictions = probabilities.argmax(dim=1)
    accuracy = sklearn.accuracy_score(labels, predictions)
    f1 = sklearn.f1_score(labels, predictions, average="macro")
    expected = {
        "accuracy": accuracy,
        "own_accuracy": accuracy,
        "f1": f1,
        "f1_of_sklearn": f1,
        "own_f1": f1,
        "auroc": sklearn.roc_auc_score(labels, probabilities, multi_class="ovr"),
    }
    assert {name: metrics[f"evaluation_{name}"] for name in expected} == pytest.approx(
        expected, rel=1e-5
    )
