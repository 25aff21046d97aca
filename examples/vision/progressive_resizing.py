"""Train with small images first and with larger ones later, which is faster.

    pip install 'pytorch-accelerated[examples]'
    python examples/vision/progressive_resizing.py --data-dir data

Look at ``set_image_size``: each call of ``train`` goes on with the same weights and
optimizer state, on images of another size, and with a schedule of its own. The method
is that of fast.ai's DAWNBench entry (2018); Touvron et al., "Fixing the train-test
resolution discrepancy" (2019), is about why the last size should be larger.
"""

import argparse

import timm
import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision.datasets import Imagenette
from torchvision.transforms import v2

from pytorch_accelerated import Trainer
from pytorch_accelerated.schedulers import CosineLrScheduler


class Resized(Dataset):
    """The images of another dataset, at a size that can be changed between runs."""

    def __init__(self, dataset, is_training):
        self.dataset = dataset
        self.is_training = is_training

    def set_image_size(self, size):
        if self.is_training:
            change = [
                v2.RandomResizedCrop(size, scale=(0.35, 1.0)),
                v2.RandomHorizontalFlip(),
            ]
        else:
            change = [v2.Resize(size), v2.CenterCrop(size)]
        to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose([*change, *to_float])

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return self.transform(image), label


def main(train_images, eval_images, model, stages=((128, 5), (160, 5), (224, 2))):
    train_dataset = Resized(train_images, is_training=True)
    eval_dataset = Resized(eval_images, is_training=False)
    trainer = Trainer(
        model,
        loss_func=nn.CrossEntropyLoss(label_smoothing=0.1),
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05),
        seed=0,
    )
    for size, num_epochs in stages:
        trainer.print(f"\n{num_epochs} epoch(s) with images of {size} x {size}")
        train_dataset.set_image_size(size)
        eval_dataset.set_image_size(size)
        trainer.train(
            train_dataset,
            num_epochs=num_epochs,
            eval_dataset=eval_dataset,
            per_device_batch_size=32,
            create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(),
            reset_run_history=False,
        )
    return trainer.run_history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data")
    data_dir = parser.parse_args().data_dir
    main(
        Imagenette(data_dir, split="train", size="320px", download=True),
        Imagenette(data_dir, split="val", size="320px", download=True),
        timm.create_model("resnet18d", num_classes=10),
    )
