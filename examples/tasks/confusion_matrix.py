"""A convolutional network of your own, its accuracy, and what it confuses.

    pip install 'pytorch-accelerated[metrics]'

``metrics`` are recorded after each epoch, here as ``eval_accuracy_epoch``, and
``evaluate`` returns them as ``evaluation_accuracy``. Those of torchmetrics are exact on
any number of processes.
"""

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from digits import load_digits
from pytorch_accelerated import Trainer


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(1, 16, kernel_size=3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, kernel_size=3, padding=1), nn.ReLU()),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(32 * 4 * 4, 10)

    def forward(self, images):
        return self.head(self.convolutions(images).flatten(1))


def main(num_epochs=5):
    torch.manual_seed(0)
    train_dataset, validation_dataset, test_dataset = load_digits()
    model = Cnn()
    trainer = Trainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3),
        metrics={
            "accuracy": MulticlassAccuracy(10, average="micro"),
            "confusion": MulticlassConfusionMatrix(10),
        },
        seed=0,
    )
    trainer.train(
        train_dataset, num_epochs, validation_dataset, per_device_batch_size=32
    )
    metrics = trainer.evaluate(test_dataset, per_device_batch_size=64)

    matrix = metrics["evaluation_confusion"]
    wrong = matrix - matrix.diag().diag()
    digit, other = divmod(int(wrong.argmax()), 10)
    trainer.print(f"\n{metrics['evaluation_accuracy']:.1%} of unseen digits are right")
    trainer.print(f"{wrong.max()} of {matrix[digit].sum()} {digit}s pass for {other}s")
    return metrics


if __name__ == "__main__":
    main()
