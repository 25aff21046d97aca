"""Train a multi-layer perceptron on MNIST.

    python examples/core/train_mnist.py --data-dir data

The same file runs on several processes or GPUs with ``accelerate launch`` or
``torchrun``.
"""

import argparse

from torch import nn, optim
from torch.utils.data import random_split

from mnist_data import load_mnist
from pytorch_accelerated import Trainer


class MNISTModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, images):
        return self.layers(images)


def main(dataset, num_epochs=2):
    train_dataset, validation_dataset, test_dataset = random_split(
        dataset, [50_000, 5_000, 5_000]
    )

    model = MNISTModel()
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss_func = nn.CrossEntropyLoss()

    trainer = Trainer(model, loss_func=loss_func, optimizer=optimizer)

    trainer.train(
        train_dataset=train_dataset,
        eval_dataset=validation_dataset,
        num_epochs=num_epochs,
        per_device_batch_size=32,
    )

    return trainer.evaluate(dataset=test_dataset, per_device_batch_size=64)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", default="data", help="where MNIST is or will be")
    parser.add_argument("--num-epochs", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_arguments()
    main(load_mnist(arguments.data_dir), num_epochs=arguments.num_epochs)
