"""Train until it gets no better, keep the best epoch, and predict with it.

``SaveBestModelCallback`` saves the model when the watched metric is better than ever
before, and loads it when the run ends; ``EarlyStoppingCallback`` ends the run after
three epochs without anything better. ``predict`` returns an output for each sample, in
the order of the dataset.
"""

import torch
from torch import nn

from digits import accuracy, create_model, load_digits
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    SaveBestModelCallback,
    get_default_callbacks,
)


def main(max_epochs=40):
    torch.manual_seed(0)
    train_dataset, validation_dataset, test_dataset = load_digits()
    model = create_model()

    trainer = Trainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=5e-3),
        callbacks=[
            *get_default_callbacks(),
            SaveBestModelCallback("best_model.pt", watch_metric="eval_loss_epoch"),
            EarlyStoppingCallback(early_stopping_patience=3),
        ],
        metrics={"accuracy": accuracy},
        seed=0,
    )
    history = trainer.train(
        train_dataset,
        num_epochs=max_epochs,
        eval_dataset=validation_dataset,
        per_device_batch_size=32,
    )

    labels = torch.stack([label for _, label in test_dataset])
    predictions = trainer.predict(test_dataset, per_device_batch_size=64).argmax(dim=1)
    num_right = int((predictions == labels).sum())
    trainer.print(f"\n{num_right} of {len(labels)} unseen digits are right")
    return num_right / len(labels), len(history.get_metric_values("eval_loss_epoch"))


if __name__ == "__main__":
    main()
