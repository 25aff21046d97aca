"""Fine-tune a pretrained model on 37 breeds of cats and dogs, in two stages.

    pip install 'pytorch-accelerated[examples]'
    python examples/vision/pets_finetuning.py --data-dir data

Look at the freezer between the two calls of ``train``. At first only the head is
trained, which is new. Then all is unfrozen: what was frozen joins the optimizer with a
smaller learning rate, and ``reset_run_history=False`` goes on counting epochs.
"""

import argparse

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.datasets import OxfordIIITPet

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveBestModelCallback, get_default_callbacks
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.schedulers import CosineLrScheduler

NUM_BREEDS = 37


def load_pets(data_dir, model):
    """Return the training and the test set, with the transforms that suit the model."""
    config = resolve_data_config(model=model)
    return [
        OxfordIIITPet(
            data_dir,
            split=split,
            transform=create_transform(**config, is_training=split == "trainval"),
            download=True,
        )
        for split in ("trainval", "test")
    ]


class ClassificationTrainer(Trainer):
    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        hits = output["model_outputs"].argmax(dim=1) == batch[1]
        output["accuracy"] = hits.float().mean()
        return output


def main(model, train_dataset, eval_dataset, num_epochs=3, batch_size=32, lr=1e-3):
    freezer = ModelFreezer(model)
    freezer.freeze()
    optimizer = torch.optim.AdamW(freezer.get_trainable_parameters(), lr=lr)
    trainer = ClassificationTrainer(
        model,
        loss_func=nn.CrossEntropyLoss(label_smoothing=0.1),
        optimizer=optimizer,
        callbacks=[
            *get_default_callbacks(),
            # The best of both stages is loaded when a run ends.
            SaveBestModelCallback(
                watch_metric="eval_accuracy_epoch",
                greater_is_better=True,
                reset_on_train=False,
                save_optimizer=False,
            ),
        ],
        seed=0,
    )
    stage = {
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "num_epochs": num_epochs,
        "per_device_batch_size": batch_size,
        "create_scheduler_fn": CosineLrScheduler.create_scheduler_fn(),
    }

    trainer.print("\nStage 1: the head alone")
    trainer.train(**stage)

    trainer.print("\nStage 2: all of it")
    for group in optimizer.param_groups:
        group["lr"] = lr / 2
    for group in freezer.unfreeze().values():
        optimizer.add_param_group({**group, "lr": lr / 10})
    trainer.train(**stage, reset_run_history=False)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data")
    arguments = parser.parse_args()
    pretrained = timm.create_model("resnet50", pretrained=True, num_classes=NUM_BREEDS)
    main(pretrained, *load_pets(arguments.data_dir, pretrained))
