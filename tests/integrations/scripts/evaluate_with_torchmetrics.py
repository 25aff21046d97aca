"""Evaluates an untrained model on the digits; each process writes what it recorded."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
)

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import MoveModulesToDeviceCallback


class MetricsTrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(10, average="micro"),
                "f1": MulticlassF1Score(10),
                "auroc": MulticlassAUROC(10),
            }
        )
        self.labels = []

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        self.metrics.update(output["model_outputs"].softmax(dim=1), batch[1])
        self.labels.append(batch[1])
        return output

    def eval_epoch_end(self):
        for name, value in self.metrics.compute().items():
            self.run_history.update_metric(name, value.item())
        # Whatever torchmetrics cannot do: gather, and use any library.
        labels = self.gather(torch.cat(self.labels))
        self.run_history.update_metric("num_samples", len(labels))


def main(digits_file, folder):
    arrays = np.load(digits_file)
    images = torch.from_numpy(arrays["images"]).float().div(16).flatten(1)
    labels = torch.from_numpy(arrays["labels"]).long()
    torch.manual_seed(0)
    trainer = MetricsTrainer(
        nn.Linear(64, 10), nn.CrossEntropyLoss(), None, [MoveModulesToDeviceCallback]
    )
    metrics = trainer.evaluate(TensorDataset(images, labels), per_device_batch_size=50)
    process = trainer._accelerator.process_index
    Path(folder, f"metrics_{process}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(*sys.argv[1:])
