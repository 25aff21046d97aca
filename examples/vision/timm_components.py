"""Train with the parts of timm's training script, and none of its loop.

    pip install 'pytorch-accelerated[examples]'
    python examples/vision/timm_components.py --data-dir data

Look at where each part of timm goes: its loaders are given to ``train`` as they are;
its mixup and its loss are in the trainer's training step; its schedule, which is told
the numbers of epochs and updates, needs ``TrainerWithTimmScheduler``; and its moving
average takes the place of the library's in ``ModelEmaCallback``.
"""

import argparse
from functools import partial

import timm
import torch
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from pytorch_accelerated import TrainerPlaceholderValues
from pytorch_accelerated.callbacks import ModelEmaCallback, get_default_callbacks
from pytorch_accelerated.trainer import TrainerWithTimmScheduler


def load_imagenette(data_dir):
    """Return ten classes of ImageNet for training and validation."""
    return [
        create_dataset("torch/imagenette", data_dir, split=split, download=True)
        for split in ("train", "val")
    ]


class TimmTrainer(TrainerWithTimmScheduler):
    def __init__(self, *args, mixup, eval_loss_func, **kwargs):
        super().__init__(*args, **kwargs)
        self.mixup = mixup
        self.eval_loss_func = eval_loss_func

    def calculate_train_batch_loss(self, batch):
        return super().calculate_train_batch_loss(self.mixup(*batch))

    def calculate_eval_batch_loss(self, batch):
        images, labels = batch
        with torch.no_grad():
            outputs = self.model(images)
        hits = outputs.argmax(dim=1) == labels
        return {
            "loss": self.eval_loss_func(outputs, labels),
            "model_outputs": outputs,
            "batch_size": len(images),
            "accuracy": hits.float().mean(),
        }


def create_schedule(optimizer, num_epochs, updates_per_epoch):
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=num_epochs,
        warmup_epochs=1,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return schedule


def main(train_dataset, eval_dataset, model, num_epochs=10, batch_size=32, **kwargs):
    optimizer = create_optimizer_v2(
        model, opt="lamb", lr=5e-3, weight_decay=0.02, layer_decay=0.75
    )
    trainer = TimmTrainer(
        model,
        loss_func=SoftTargetCrossEntropy(),
        optimizer=optimizer,
        callbacks=[
            ModelEmaCallback(decay=0.99, model_ema=ModelEmaV3),
            *get_default_callbacks(),
        ],
        seed=0,
        mixup=Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=model.num_classes),
        eval_loss_func=nn.CrossEntropyLoss(),
    )
    config = resolve_data_config(model=model)
    settings = {
        "input_size": config["input_size"],
        "mean": config["mean"],
        "std": config["std"],
        "batch_size": batch_size,
        "device": trainer.device,
        **kwargs,
    }
    trainer.train(
        create_loader(
            train_dataset,
            is_training=True,
            auto_augment="rand-m7-mstd0.5-inc1",
            re_prob=0.25,
            **settings,
        ),
        num_epochs=num_epochs,
        eval_dataset=create_loader(eval_dataset, **settings),
        create_scheduler_fn=partial(
            create_schedule,
            num_epochs=TrainerPlaceholderValues.NUM_EPOCHS,
            updates_per_epoch=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
        ),
    )
    return trainer.run_history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data")
    arguments = parser.parse_args()
    main(
        *load_imagenette(arguments.data_dir),
        timm.create_model("resnet50d", num_classes=10),
    )
