"""Train on CIFAR-10 with mixup and CutMix, and keep a moving average of the weights.

    pip install 'pytorch-accelerated[examples]'
    python examples/vision/mixup_ema.py --data-dir data

Look at ``calculate_train_batch_loss``: the mixing of torchvision is one line of it. The
targets that it makes are probabilities of the classes, which ``CrossEntropyLoss`` takes
as they are. ``ModelEmaCallback`` moves the average after every update and evaluates it
after every epoch: compare ``ema_model_eval_accuracy_epoch`` with
``eval_accuracy_epoch``.
"""

import argparse

import timm
import torch
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import ModelEmaCallback, get_default_callbacks
from pytorch_accelerated.schedulers import CosineLrScheduler


def load_cifar10(data_dir, train):
    """Return one half of CIFAR-10, downloaded to ``data_dir`` if need be."""
    augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if train else []
    to_input = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.491, 0.482, 0.447], [0.247, 0.243, 0.262]),
    ]
    return CIFAR10(
        data_dir, train, transform=v2.Compose([*augment, *to_input]), download=True
    )


class MixupTrainer(Trainer):
    def __init__(self, *args, num_classes, **kwargs):
        super().__init__(*args, **kwargs)
        self.mix = v2.RandomChoice(
            [
                v2.MixUp(alpha=0.2, num_classes=num_classes),
                v2.CutMix(alpha=1.0, num_classes=num_classes),
            ]
        )

    def calculate_train_batch_loss(self, batch):
        return super().calculate_train_batch_loss(self.mix(*batch))

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        hits = output["model_outputs"].argmax(dim=1) == batch[1]
        output["accuracy"] = hits.float().mean()
        return output


def main(train_dataset, eval_dataset, model, num_classes=10, num_epochs=20):
    trainer = MixupTrainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        ),
        # Metrics of the average are recorded before all of them are logged.
        callbacks=[ModelEmaCallback(decay=0.99), *get_default_callbacks()],
        seed=0,
        num_classes=num_classes,
    )
    trainer.train(
        train_dataset,
        num_epochs=num_epochs,
        eval_dataset=eval_dataset,
        per_device_batch_size=128,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
    )
    return trainer.run_history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data")
    data_dir = parser.parse_args().data_dir
    main(
        load_cifar10(data_dir, train=True),
        load_cifar10(data_dir, train=False),
        timm.create_model("resnet18", num_classes=10),
    )
