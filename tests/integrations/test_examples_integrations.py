"""The examples run, for an epoch on small data."""

import importlib
import os
from pathlib import Path

import pytest
import torch
from launching import torchrun
from torch import nn
from torch.utils.data import Dataset, Subset

from pytorch_accelerated.utils import LimitBatches

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _examples_can_be_imported(monkeypatch, tmp_path):
    for folder in (EXAMPLES, EXAMPLES / "nlp", EXAMPLES / "vision"):
        monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)


def python_path(folder):
    """Return where two processes find the modules of a folder."""
    path = [str(folder), str(EXAMPLES.parent / "src"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path)


def load(example):
    return importlib.import_module(example)


# ------------------------------------------------------------- running and resuming


def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not():
    main = load("resume_after_interruption").main
    whole = main("of_whole_run", num_epochs=2)

    first = main("of_interrupted_run", num_epochs=2, max_updates=50)
    resumed = main("of_interrupted_run", num_epochs=2)

    assert first.num_updates == 50
    assert resumed.num_updates == whole.num_updates == 114
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_two_processes_train_as_one_with_twice_the_batch(launch, capsys):
    checksum = load("two_processes").main(num_epochs=1, per_device_batch_size=64)
    script = EXAMPLES / "two_processes.py"
    launched = launch(*torchrun(2, script, "--num-epochs=1"))

    in_one, in_two = (
        [line for line in output.splitlines() if "sum of the weights" in line]
        for output in (capsys.readouterr().out, launched.output)
    )
    assert len(in_two) == 1
    assert in_two[0].startswith("Processes: 2, updates: 29 of 64 samples;")
    assert in_one[0].startswith("Processes: 1, updates: 29 of 64 samples;")
    assert float(in_two[0].split()[-1]) == pytest.approx(checksum, abs=2e-3)


# It says it in one write: two processes share the terminal.
SCRIPT_THAT_WATCHES_THE_END = """
import atexit
import os

import torch

def say():
    os.write(1, f"Connected: {torch.distributed.is_initialized()}\\n".encode())

atexit.register(say)  # called after those that are registered later
from two_processes import main

main(num_epochs=0)
"""


def test_the_connections_between_processes_are_closed_before_python_ends(
    launch, tmp_path
):
    """What outlives the interpreter aborted one process in ten that had trained."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT_THAT_WATCHES_THE_END)

    launched = launch(*torchrun(2, script), PYTHONPATH=python_path(EXAMPLES))

    assert launched.output.count("Connected: False\n") == 2


# ---------------------------------------------------------------------- small tasks


def test_the_run_of_a_task_is_in_the_files_of_weights_and_biases(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.syspath_prepend(EXAMPLES / "tasks")

    assert load("track_with_wandb").main(num_epochs=2) > 0.8

    folders = list(Path("wandb").glob("offline-run-*"))
    # That of evaluate() goes on with the run, and has its name.
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1
    assert all(list(folder.glob("run-*.wandb")) for folder in folders)


SCRIPT_OF_TASKS = """
import importlib
import os

for name in {names}:
    importlib.import_module(name).main(2)
    os.write(1, f"Done: {{name}}\\n".encode())
"""


def test_the_tasks_run_on_two_processes(launch, tmp_path):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("wandb")
    names = sorted(path.stem for path in (EXAMPLES / "tasks").glob("*.py"))
    names.remove("digits")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT_OF_TASKS.format(names=names))

    launched = launch(*torchrun(2, script), PYTHONPATH=python_path(EXAMPLES / "tasks"))

    assert [launched.output.count(f"Done: {name}\n") for name in names] == [2] * 10


# -------------------------------------------------------------------------- language


def test_a_gpt_learns_the_standard_library_and_keeps_the_state_before_its_decay():
    with LimitBatches(120):
        bits = load("gpt_from_scratch").main(
            num_files=20, num_epochs=1, length=64, width=64, save_dir="checkpoints"
        )

    assert bits < 6.0
    # 30 updates, of which the last six decay.
    assert sorted(path.name for path in Path("checkpoints").iterdir()) == [
        "checkpoint_24_wsd_pre_decay",
        "checkpoint_30_wsd_post_decay.pt",
    ]


def test_bert_is_fine_tuned_on_pairs_of_sentences(bert_folder, tweets):
    datasets = pytest.importorskip("datasets")
    texts = [text[:60] for text, _ in tweets[:96]]

    def pairs(first, last):
        samples = {"idx": [], "sentence1": [], "sentence2": [], "label": []}
        for index in range(first, last):
            is_same = index % 3 != 0
            samples["idx"].append(index)
            samples["sentence1"].append(texts[index])
            samples["sentence2"].append(texts[index if is_same else index - 7])
            samples["label"].append(int(is_same))
        return datasets.Dataset.from_dict(samples)

    dataset = datasets.DatasetDict(train=pairs(0, 64), validation=pairs(64, 96))

    history = load("bert_glue_mrpc").main(
        dataset, checkpoint=bert_folder, num_epochs=1, save_dir="trained"
    )

    for name in ("train_loss_epoch", "eval_loss_epoch", "accuracy", "f1"):
        assert len(history.get_metric_values(name)) == 1
    assert history.get_latest_metric("f1") > 0.5
    assert Path("trained/model.safetensors").exists()


# ---------------------------------------------------------------------------- vision


def create_small_model(**kwargs):
    torch.manual_seed(0)
    timm = pytest.importorskip("timm")
    return timm.create_model("test_resnet", num_classes=10, **kwargs)


def test_pets_are_fine_tuned_in_two_stages(tensors):
    trainer = load("pets_finetuning").main(
        create_small_model(), tensors(0, 64), tensors(64, 96), num_epochs=1
    )

    history = trainer.run_history
    assert len(history.get_metric_values("train_loss_epoch")) == 2
    assert len(history.get_metric_values("eval_accuracy_epoch")) == 2
    in_optimizer = [p for g in trainer.optimizer.param_groups for p in g["params"]]
    assert set(in_optimizer) == set(trainer.model.parameters())
    assert Path("best_model.pt").exists()


def test_ants_and_bees_train_from_folders_of_pictures(digits, pictures):
    resnet18 = pytest.importorskip("torchvision.models").resnet18
    for part, first in (("train", 0), ("val", 40)):
        for index, (image, label) in enumerate(pictures(digits(first, first + 40))):
            folder = Path("pictures", part, "ants" if label < 5 else "bees")
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{index}.png")

    metrics = load("ants_and_bees").main(
        Path("pictures"), resnet18(weights=None), num_epochs=1, image_size=32
    )

    assert 0.0 <= metrics["evaluation_accuracy"] <= 1.0
    assert Path("best_model.pt").exists()


def test_progressive_resizing_trains_on_images_of_growing_size(
    digits, pictures, capsys
):
    history = load("progressive_resizing").main(
        pictures(digits(0, 64)),
        pictures(digits(64, 96)),
        create_small_model(),
        stages=((16, 1), (32, 1)),
    )

    assert "images of 32 x 32" in capsys.readouterr().out
    assert len(history.get_metric_values("eval_loss_epoch")) == 2


def test_all_components_of_timm_work_together(digits, pictures):
    model = create_small_model()
    model.default_cfg = model.pretrained_cfg = {"input_size": (3, 32, 32)}

    history = load("timm_components").main(
        pictures(digits(0, 64)),
        pictures(digits(64, 96)),
        model,
        num_epochs=1,
        batch_size=16,
        num_workers=0,
        persistent_workers=False,
    )

    for name in ("train_loss_epoch", "eval_accuracy_epoch"):
        assert len(history.get_metric_values(name)) == 1
    assert len(history.get_metric_values("ema_model_eval_accuracy_epoch")) == 1
    assert Path("ema_model.pt").exists()


def test_mixup_trains_with_a_moving_average(tensors):
    history = load("mixup_ema").main(
        tensors(0, 256), tensors(256, 320), create_small_model(), num_epochs=1
    )

    assert len(history.get_metric_values("eval_accuracy_epoch")) == 1
    assert len(history.get_metric_values("ema_model_eval_accuracy_epoch")) == 1
    assert Path("ema_model.pt").exists()


class DigitsOnCanvas(Dataset):
    """Two digits at places of their own, whose boxes are known exactly."""

    def __init__(self, digits, count):
        self.digits, self.count = digits, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        canvas = torch.zeros(3, 96, 96)
        boxes, labels = [], []
        for left in (4, 52):
            choice = int(torch.randint(len(self.digits), (), generator=generator))
            top = int(torch.randint(4, 52, (), generator=generator))
            pixels, label = self.digits[choice]
            larger = nn.functional.interpolate(pixels[None], 40)[0]
            canvas[:, top : top + 40, left : left + 40] = larger
            boxes.append([left, top, left + 40, top + 40])
            labels.append(int(label) + 1)  # class 0 is the background
        return canvas, {
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "labels": torch.tensor(labels),
        }


def test_a_detector_records_each_of_its_losses_and_its_precision(digits):
    """Every further number of a step is recorded as a mean (R4)."""
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=11, min_size=96, max_size=96
    )
    data = DigitsOnCanvas(digits(0, 100), count=12)

    history = load("faster_rcnn").main(
        data, Subset(data, range(4)), model, num_epochs=1, batch_size=4
    )

    losses = ("classifier", "box_reg", "objectness", "rpn_box_reg")
    for part in ("train", "eval"):
        total = sum(
            history.get_latest_metric(f"{part}_loss_{name}_epoch") for name in losses
        )
        assert history.get_latest_metric(f"{part}_loss_epoch") == pytest.approx(total)
    assert 0.0 <= history.get_latest_metric("map") <= 1.0
    assert len(history.get_metric_values("map_50")) == 1
