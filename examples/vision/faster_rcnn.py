"""Train a Faster R-CNN of torchvision, and record its losses and its mAP.

    pip install 'pytorch-accelerated[examples]'
    python examples/vision/faster_rcnn.py --data-dir data

Look at the two steps of the trainer. A detector takes lists of images and targets of
different sizes, so ``collate_fn`` leaves them in lists. It returns a dictionary of four
losses: their sum is trained, and each is recorded by itself, as every further number
that a step returns is (``train_loss_objectness_epoch`` and so on). An evaluation
updates torchmetrics' mean average precision.
"""

import argparse

import torch
from torchmetrics.detection import MeanAveragePrecision
from torchvision.datasets import VOCDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.transforms import v2

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import get_default_callbacks
from pytorch_accelerated.schedulers import CosineLrScheduler

NUM_VOC_CLASSES = 21  # with the background, which is class 0


def load_voc(data_dir, image_set):
    """Return a part of Pascal VOC 2012, downloaded to ``data_dir`` if need be."""
    is_training = image_set == "train"
    transforms = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomPhotometricDistort() if is_training else v2.Identity(),
            v2.RandomHorizontalFlip(0.5 if is_training else 0.0),
            v2.ToDtype(torch.float32, scale=True),
            v2.SanitizeBoundingBoxes(),
        ]
    )
    dataset = VOCDetection(
        data_dir, image_set=image_set, download=True, transforms=transforms
    )
    return wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels"))


def create_model(num_classes):
    """Return a small detector, pretrained on COCO, with a new predictor."""
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights="DEFAULT")
    num_features = model.roi_heads.box_predictor.cls_score.in_features
    model.roi_heads.box_predictor = FastRCNNPredictor(num_features, num_classes)
    return model


def collate(samples):
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


class DetectionTrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mean_average_precision = MeanAveragePrecision()

    def calculate_train_batch_loss(self, batch):
        images, targets = batch
        losses = self.model(images, targets)
        return {
            "loss": sum(losses.values()),
            "model_outputs": None,
            "batch_size": len(images),
            **losses,
        }

    def calculate_eval_batch_loss(self, batch):
        images, targets = batch
        with torch.no_grad():
            predictions = self.model(images)
            losses = self.losses_in_evaluation(images, targets)
        self.mean_average_precision.update(predictions, targets)
        return {
            "loss": sum(losses.values()),
            "model_outputs": predictions,
            "batch_size": len(images),
            **losses,
        }

    def losses_in_evaluation(self, images, targets):
        # A detector returns its losses in training mode only. The backbone, which has
        # batch norms, stays in evaluation mode.
        model = self.get_model()
        parts = [model, model.rpn, model.roi_heads]
        for part in parts:
            part.training = True
        losses = model(images, targets)
        for part in parts:
            part.training = False
        return losses

    def eval_epoch_end(self):
        super().eval_epoch_end()
        results = self.mean_average_precision.compute()
        for name in ("map", "map_50"):
            self.run_history.update_metric(name, results[name].item())
        self.mean_average_precision.reset()


def main(train_dataset, eval_dataset, model, num_epochs=10, batch_size=8, lr=0.005):
    parameters = [p for p in model.parameters() if p.requires_grad]
    trainer = DetectionTrainer(
        model,
        loss_func=None,
        optimizer=torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4),
        callbacks=get_default_callbacks(),
        seed=0,
    )
    trainer.train(
        train_dataset,
        num_epochs=num_epochs,
        eval_dataset=eval_dataset,
        per_device_batch_size=batch_size,
        collate_fn=collate,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
        gradient_clip_norm=10.0,
    )
    return trainer.run_history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data")
    arguments = parser.parse_args()
    main(
        load_voc(arguments.data_dir, "train"),
        load_voc(arguments.data_dir, "val"),
        create_model(NUM_VOC_CLASSES),
    )
