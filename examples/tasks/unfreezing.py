"""What a network knows of some digits helps with others: unfreeze it step by step.

It learns 0 to 4 first. Then it gets a new head for 5 to 9, of which there are only 60
samples, and the head is trained alone; ``UnfreezeCallback`` lets the layers before it
follow, the nearest first, with the smaller learning rates of ``parameter_groups``.
"""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from digits import accuracy, create_model, load_digits, train_classifier
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import UnfreezeCallback, get_default_callbacks
from pytorch_accelerated.finetuning import ModelFreezer, parameter_groups


def five_digits(dataset, first, num_samples=None):
    """Return the samples of five digits, which are numbered from 0."""
    images, labels = (torch.stack(part) for part in zip(*dataset, strict=True))
    chosen = ((labels >= first) & (labels < first + 5)).nonzero().flatten()
    chosen = chosen[:num_samples]
    return TensorDataset(images[chosen], labels[chosen] - first)


def main(num_epochs=10):
    torch.manual_seed(0)
    train_dataset, _, test_dataset = load_digits()
    model = create_model(num_outputs=5)
    train_classifier(model, five_digits(train_dataset, 0), num_epochs)

    model[-1] = nn.Linear(model[-1].in_features, 5)
    # Before freezing: what is frozen would be left out of the groups.
    groups = parameter_groups(model, weight_decay=0.01, lr=1e-2, layer_decay=0.3)
    freezer = ModelFreezer(model)
    freezer.freeze()
    trainer = Trainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(groups),
        callbacks=[
            *get_default_callbacks(),
            # From epoch 4 on the second convolution too (layer group 2), from 7 on all.
            UnfreezeCallback(freezer, {4: 2, 7: 0}),
        ],
        metrics={"accuracy": accuracy},
        seed=0,
    )
    trainer.train(five_digits(train_dataset, 5, 60), num_epochs)

    right = trainer.evaluate(five_digits(test_dataset, 5))["evaluation_accuracy"]
    trainer.print(f"\n{right:.1%} of unseen digits from 5 to 9 are right")
    return right


if __name__ == "__main__":
    main()
