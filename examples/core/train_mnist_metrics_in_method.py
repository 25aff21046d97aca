"""Compute a metric of torchmetrics in the methods of a trainer of your own.

    python examples/core/train_mnist_metrics_in_method.py --data-dir data

A mean over samples needs no more than another number in the dictionary of a step, as in
``examples/quickstart.py``. Other metrics are computed from all predictions at the end.
"""

from torch import nn, optim
from torch.utils.data import random_split
from torchmetrics.classification import MulticlassAccuracy

from mnist_data import load_mnist
from pytorch_accelerated import Trainer
from train_mnist import MNISTModel, parse_arguments


class ClassificationTrainer(Trainer):
    """Record the accuracy of every evaluation."""

    def __init__(self, *args, num_classes, **kwargs):
        super().__init__(*args, **kwargs)
        # A default callback moves the modules of a trainer to its device.
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        self.accuracy.update(output["model_outputs"].argmax(dim=1), batch[1])
        return output

    def eval_epoch_end(self):
        super().eval_epoch_end()
        # On several processes, torchmetrics combines what each has seen.
        self.run_history.update_metric("accuracy", self.accuracy.compute().item())
        self.accuracy.reset()


def main(dataset, num_epochs=2):
    train_dataset, validation_dataset, test_dataset = random_split(
        dataset, [50_000, 5_000, 5_000]
    )

    model = MNISTModel()
    trainer = ClassificationTrainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        num_classes=10,
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
