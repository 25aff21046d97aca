"""Compute metrics of torchmetrics in a callback.

    python examples/core/train_mnist_metrics_in_callback.py --data-dir data

Such a callback fits any trainer, unchanged.
"""

from torch import nn, optim
from torch.utils.data import random_split
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassPrecision,
    MulticlassRecall,
)

from mnist_data import load_mnist
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrainerCallback, get_default_callbacks
from train_mnist import MNISTModel, parse_arguments


class ClassificationMetricsCallback(TrainerCallback):
    """Record accuracy, precision and recall of every evaluation."""

    def __init__(self, num_classes):
        self.metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "precision": MulticlassPrecision(num_classes),
                "recall": MulticlassRecall(num_classes),
            }
        )

    def on_training_run_start(self, trainer, **kwargs):
        self.metrics.to(trainer.device)

    def on_evaluation_run_start(self, trainer, **kwargs):
        self.metrics.to(trainer.device)

    def on_eval_step_end(self, trainer, batch, batch_output, **kwargs):
        predictions = batch_output["model_outputs"].argmax(dim=1)
        self.metrics.update(predictions, batch[1])

    def on_eval_epoch_end(self, trainer, **kwargs):
        # On several processes, torchmetrics combines what each has seen.
        for name, value in self.metrics.compute().items():
            trainer.run_history.update_metric(name, value.item())
        self.metrics.reset()


def main(dataset, num_epochs=2):
    train_dataset, validation_dataset, test_dataset = random_split(
        dataset, [50_000, 5_000, 5_000]
    )

    model = MNISTModel()
    trainer = Trainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        # Callbacks are called in order: record the metrics before they are logged.
        callbacks=[
            ClassificationMetricsCallback(num_classes=10),
            *get_default_callbacks(),
        ],
    )

    trainer.train(
        train_dataset=train_dataset,
        eval_dataset=validation_dataset,
        num_epochs=num_epochs,
        per_device_batch_size=32,
    )
    trainer.evaluate(dataset=test_dataset, per_device_batch_size=64)
    return trainer.run_history


if __name__ == "__main__":
    arguments = parse_arguments()
    main(load_mnist(arguments.data_dir), num_epochs=arguments.num_epochs)
