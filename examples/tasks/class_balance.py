"""Rare classes: draw them as often as the others.

Of the digits 5 to 9 only six each are left to train on, against over a hundred of each
other digit. A ``WeightedRandomSampler`` draws each class equally often, and goes where
all arguments of the ``DataLoader`` go. On several processes the trainer shares out what
the sampler draws.
"""

import torch
from torch import nn
from torch.utils.data import Subset, WeightedRandomSampler

from digits import create_model, load_digits
from pytorch_accelerated import Trainer


def mean_recall(predictions, targets):
    """Return the fraction that is right of each class, averaged over the classes."""
    is_right = (predictions.argmax(dim=1) == targets).float()
    return torch.stack([is_right[targets == d].mean() for d in range(10)]).mean()


def make_rare(dataset):
    """Return a dataset with six samples of each digit from 5 on, and its labels."""
    labels = torch.stack([label for _, label in dataset])
    of_each = [(labels == digit).nonzero().flatten() for digit in range(10)]
    kept = torch.cat([each[: None if d < 5 else 6] for d, each in enumerate(of_each)])
    return Subset(dataset, kept.tolist()), labels[kept]


def train(train_dataset, test_dataset, num_epochs, **train_dataloader_kwargs):
    torch.manual_seed(0)
    model = create_model()
    trainer = Trainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3),
        metrics={"mean_recall": mean_recall},
        seed=0,
    )
    trainer.train(
        train_dataset,
        num_epochs,
        per_device_batch_size=32,
        train_dataloader_kwargs=train_dataloader_kwargs,
    )
    recall = trainer.evaluate(test_dataset)["evaluation_mean_recall"]
    trainer.print(f"\n{recall:.1%} of each class are found\n")
    return recall


def main(num_epochs=8):
    train_dataset, _, test_dataset = load_digits()
    train_dataset, labels = make_rare(train_dataset)
    weights = 1 / labels.bincount()[labels]
    sampler = WeightedRandomSampler(weights, num_samples=len(labels))

    as_it_is = train(train_dataset, test_dataset, num_epochs)
    return as_it_is, train(train_dataset, test_dataset, num_epochs, sampler=sampler)


if __name__ == "__main__":
    main()
