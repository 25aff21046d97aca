"""Announce an event of your own, and answer it in a callback.

    python examples/core/train_mnist_custom_event.py --data-dir data

A trainer can call any event by name. Callbacks that have a method of that name are
called, in order; the others are passed over.
"""

from collections import Counter

from torch import nn, optim
from torch.utils.data import random_split

from mnist_data import load_mnist
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrainerCallback, get_default_callbacks
from train_mnist import MNISTModel, parse_arguments


class PredictionsTrainer(Trainer):
    """Announce the predictions of each evaluation batch."""

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        self.callback_handler.call_event(
            "on_predictions_ready",
            trainer=self,
            predictions=output["model_outputs"].argmax(dim=1),
            targets=batch[1],
        )
        return output


class CountConfusionsCallback(TrainerCallback):
    """Print which digits are taken for which others."""

    def __init__(self):
        self.confusions = Counter()

    def on_eval_epoch_start(self, trainer, **kwargs):
        self.confusions.clear()

    def on_predictions_ready(self, trainer, predictions, targets, **kwargs):
        # Gathered, each process has the predictions of all.
        predictions = trainer.gather(predictions)
        targets = trainer.gather(targets)
        wrong = predictions != targets
        pairs = zip(targets[wrong].tolist(), predictions[wrong].tolist(), strict=True)
        self.confusions.update(pairs)

    def on_eval_epoch_end(self, trainer, **kwargs):
        for (target, prediction), count in self.confusions.most_common(3):
            trainer.print(f"{count} times, a {target} was taken for a {prediction}")


def main(dataset, num_epochs=2):
    train_dataset, validation_dataset, test_dataset = random_split(
        dataset, [50_000, 5_000, 5_000]
    )

    model = MNISTModel()
    confusions = CountConfusionsCallback()
    trainer = PredictionsTrainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        callbacks=[*get_default_callbacks(), confusions],
    )

    trainer.train(
        train_dataset=train_dataset,
        eval_dataset=validation_dataset,
        num_epochs=num_epochs,
        per_device_batch_size=32,
    )
    trainer.evaluate(dataset=test_dataset, per_device_batch_size=64)
    return confusions.confusions


if __name__ == "__main__":
    arguments = parse_arguments()
    main(load_mnist(arguments.data_dir), num_epochs=arguments.num_epochs)
