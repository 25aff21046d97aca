"""Tell ants from bees with 244 photographs and a pretrained ResNet of torchvision.

    pip install 'pytorch-accelerated[examples]'
    python examples/vision/ants_and_bees.py --data-dir data

The data and the settings are those of PyTorch's tutorial on transfer learning. Look at
what has become of its loop: a schedule of torch, ``StepLR``, told in epochs by a
placeholder; and a callback that saves the best epoch and loads it at the end.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torchvision.datasets import ImageFolder
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models import resnet18
from torchvision.transforms import v2

from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import SaveBestModelCallback, get_default_callbacks

URL = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"


def download_photographs(data_dir):
    """Return the folder with the photographs, downloaded if it is not there."""
    folder = Path(data_dir) / "hymenoptera_data"
    if not folder.exists():
        download_and_extract_archive(URL, data_dir)
    return folder


def create_datasets(folder, image_size):
    """Return the training and the evaluation set, with one folder for each class."""
    to_input = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    train_transform = v2.Compose(
        [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(), *to_input]
    )
    eval_transform = v2.Compose(
        [v2.Resize(image_size * 8 // 7), v2.CenterCrop(image_size), *to_input]
    )
    return (
        ImageFolder(folder / "train", train_transform),
        ImageFolder(folder / "val", eval_transform),
    )


class ClassificationTrainer(Trainer):
    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        hits = output["model_outputs"].argmax(dim=1) == batch[1]
        output["accuracy"] = hits.float().mean()
        return output


def main(folder, model, num_epochs=25, image_size=224, batch_size=4):
    train_dataset, eval_dataset = create_datasets(folder, image_size)
    torch.manual_seed(0)
    model.fc = nn.Linear(model.fc.in_features, len(train_dataset.classes))

    trainer = ClassificationTrainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9),
        callbacks=[
            *get_default_callbacks(),
            SaveBestModelCallback(
                watch_metric="eval_accuracy_epoch", greater_is_better=True
            ),
        ],
        seed=0,
    )
    trainer.train(
        train_dataset,
        num_epochs=num_epochs,
        eval_dataset=eval_dataset,
        per_device_batch_size=batch_size,
        # The trainer steps it once per update: seven epochs' worth of them.
        create_scheduler_fn=partial(
            StepLR,
            step_size=7 * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
            gamma=0.1,
        ),
    )
    return trainer.evaluate(eval_dataset, per_device_batch_size=batch_size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data")
    arguments = parser.parse_args()
    main(download_photographs(arguments.data_dir), resnet18(weights="DEFAULT"))
