"""Data sets, transforms and detectors of torchvision."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from pytorch_accelerated import Trainer, TrainerPlaceholderValues

torchvision = pytest.importorskip("torchvision")

from torchmetrics.detection import MeanAveragePrecision  # noqa: E402
from torchvision import tv_tensors  # noqa: E402
from torchvision.datasets import MNIST, FakeData, ImageFolder  # noqa: E402
from torchvision.models.detection import (  # noqa: E402
    fasterrcnn_mobilenet_v3_large_320_fpn,
)
from torchvision.transforms import v2  # noqa: E402

DIGITS = Path(__file__).parents[2] / "examples" / "data" / "digits.npz"


@pytest.fixture(scope="module")
def digits():
    arrays = np.load(DIGITS)
    images = torch.from_numpy(arrays["images"]).mul(15)
    return images, torch.from_numpy(arrays["labels"]).long()


def create_classifier(num_inputs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(num_inputs, 10))


def train(dataset, num_inputs, num_epochs=2, **kwargs):
    model = create_classifier(num_inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, (), seed=0)
    trainer.train(dataset, num_epochs, per_device_batch_size=16, **kwargs)
    return trainer


def write_mnist(folder, images, labels):
    """Write a data set in the files of MNIST."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for name, array, kind in (
            ("images-idx3-ubyte", images, 3),
            ("labels-idx1-ubyte", labels, 1),
        ):
            header = np.array([0x800 + kind, *array.shape], dtype=">i4").tobytes()
            (raw / f"{part}-{name}").write_bytes(header + array.numpy().tobytes())


def test_a_dataset_of_torchvision_trains_with_transforms_v2(digits, tmp_path):
    images, labels = digits
    write_mnist(tmp_path, images[:200], labels[:200].to(torch.uint8))
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5], [0.5]),
        ]
    )
    dataset = MNIST(tmp_path, train=True, transform=transform)

    history = train(dataset, 64, num_epochs=5).run_history

    losses = history.get_metric_values("train_loss_epoch")
    assert len(dataset) == 200
    assert losses[4] < 0.6 * losses[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_transforms_depend_on_the_seed_and_not_on_the_workers(num_workers):
    def create():
        transform = v2.Compose(
            [
                v2.RandomResizedCrop(16),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(brightness=0.5),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )
        return FakeData(40, (3, 20, 20), num_classes=10, transform=transform)

    workers = {"num_workers": num_workers}
    trainer = train(create(), 3 * 16 * 16, train_dataloader_kwargs=workers)
    again = train(create(), 3 * 16 * 16, train_dataloader_kwargs={"num_workers": 0})

    torch.testing.assert_close(
        trainer.model.state_dict(), again.model.state_dict(), rtol=0, atol=0
    )


def test_a_folder_of_pictures_trains_with_a_schedule_in_epochs(digits, tmp_path):
    for index, (pixels, label) in enumerate(zip(*digits, strict=True)):
        if index == 48:
            break
        folder = tmp_path / str(int(label))
        folder.mkdir(exist_ok=True)
        v2.functional.to_pil_image(pixels[None]).save(folder / f"{index}.png")
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    trainer = train(
        ImageFolder(tmp_path, transform),
        3 * 64,
        num_epochs=4,
        create_scheduler_fn=partial(
            StepLR,
            step_size=2 * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
            gamma=0.1,
        ),
    )

    # 3 updates in an epoch: divided by 10 after six updates and after twelve.
    assert trainer.num_updates == 12
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


class DigitsOnCanvas(torch.utils.data.Dataset):
    """One digit on a black canvas; its box is known exactly."""

    def __init__(self, images, count, transform):
        self.images, self.count, self.transform = images, count, transform

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        left, top = torch.randint(4, 28, (2,), generator=generator).tolist()
        canvas = torch.zeros(3, 64, 64, dtype=torch.uint8)
        digit = self.images[index].repeat_interleave(4, 0).repeat_interleave(4, 1)
        canvas[:, top : top + 32, left : left + 32] = digit
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                [[left, top, left + 32, top + 32]], format="XYXY", canvas_size=(64, 64)
            ),
            "labels": torch.tensor([1]),
        }
        return self.transform(tv_tensors.Image(canvas), target)


def collate(samples):
    return tuple(zip(*samples, strict=True))


class DetectionTrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.precision = MeanAveragePrecision()

    def calculate_train_batch_loss(self, batch):
        images, targets = batch
        losses = self.model(list(images), list(targets))
        return {
            "loss": sum(losses.values()),
            "model_outputs": None,
            "batch_size": len(images),
            **losses,
        }

    def calculate_eval_batch_loss(self, batch):
        images, targets = batch
        with torch.no_grad():
            predictions = self.model(list(images))
        self.precision.update(predictions, list(targets))
        return {
            "loss": torch.zeros(()),
            "model_outputs": predictions,
            "batch_size": len(images),
        }

    def eval_epoch_end(self):
        results = self.precision.compute()
        self.run_history.update_metric("map_50", results["map_50"].item())
        self.precision.reset()


def test_a_faster_rcnn_records_each_of_its_losses_and_its_precision(digits):
    """Each loss of a dictionary is recorded as its mean over the samples (R4)."""
    transform = v2.Compose(
        [v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    )
    data = DigitsOnCanvas(digits[0], 24, transform)
    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=64, max_size=64
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    trainer = DetectionTrainer(model, None, optimizer, (), seed=0)

    few = torch.utils.data.Subset(data, range(4))
    trainer.train(data, 2, few, per_device_batch_size=4, collate_fn=collate)

    history = trainer.run_history
    names = ["classifier", "box_reg", "objectness", "rpn_box_reg"]
    recorded = [history.get_metric_values(f"train_loss_{name}_epoch") for name in names]
    totals = history.get_metric_values("train_loss_epoch")
    assert [sum(parts) for parts in zip(*recorded, strict=True)] == pytest.approx(
        totals, rel=1e-5
    )
    # Where there is something is learnt first.
    objectness = history.get_metric_values("train_loss_objectness_epoch")
    assert objectness[1] < objectness[0]
    assert len(history.get_metric_values("map_50")) == 2
