"""One network, two tasks, two losses: which digit is it, and how many holes has it?

Look at ``MultiTaskTrainer``: a step returns its loss and what else is worth knowing.
Each further number in the dictionary is averaged over the samples of all processes and
recorded, here as ``train_loss_digit_epoch``, ``eval_loss_holes_epoch`` and so on.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from digits import accuracy, create_model, load_digits
from pytorch_accelerated import Trainer

#                           0  1  2  3  4  5  6  7  8  9
NUM_HOLES = torch.tensor([1, 0, 0, 0, 0, 0, 1, 0, 2, 1])


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(create_model(num_outputs=64), nn.ReLU())
        self.digit = nn.Linear(64, 10)
        self.holes = nn.Linear(64, 3)

    def forward(self, images):
        features = self.body(images)
        return self.digit(features), self.holes(features)


class MultiTaskTrainer(Trainer):
    def calculate_train_batch_loss(self, batch):
        images, digits = batch
        holes = NUM_HOLES.to(digits.device)[digits]
        outputs = self.model(images)
        losses = cross_entropy(outputs[0], digits), cross_entropy(outputs[1], holes)
        return {
            "loss": losses[0] + 0.5 * losses[1],
            "batch_size": len(images),
            "loss_digit": losses[0],
            "loss_holes": losses[1],
            "accuracy_digit": accuracy(outputs[0], digits),
            "accuracy_holes": accuracy(outputs[1], holes),
        }

    def calculate_eval_batch_loss(self, batch):
        return self.calculate_train_batch_loss(batch)


def main(num_epochs=8):
    torch.manual_seed(0)
    train_dataset, validation_dataset, test_dataset = load_digits()
    model = TwoHeads()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    trainer = MultiTaskTrainer(model, loss_func=None, optimizer=optimizer, seed=0)

    trainer.train(
        train_dataset, num_epochs, validation_dataset, per_device_batch_size=32
    )
    metrics = trainer.evaluate(test_dataset, per_device_batch_size=64)
    for task in ("digit", "holes"):
        trainer.print(f"{task}: {metrics[f'evaluation_accuracy_{task}']:.1%} right")
    return metrics


if __name__ == "__main__":
    main()
