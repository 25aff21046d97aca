"""Every example runs, on the digits in place of MNIST."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from pytorch_accelerated.utils import LimitBatches

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SOURCES = str(ROOT / "src")
NUM_DIGITS = 1_797
NUM_MNIST_TRAINING_IMAGES = 60_000


@pytest.fixture(autouse=True)
def _examples_can_be_imported(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.syspath_prepend(EXAMPLES / "core")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mnist_of_digits():
    """The digits in MNIST's size and number: 60,000 images of (1, 28, 28)."""
    images, labels = importlib.import_module("quickstart").load_digits().tensors
    images = nn.functional.interpolate(images, size=(28, 28))
    repeated = [i % NUM_DIGITS for i in range(NUM_MNIST_TRAINING_IMAGES)]
    return Subset(TensorDataset(images, labels), repeated)


def train_briefly(example: str, dataset):
    torch.manual_seed(0)
    with LimitBatches(80):
        return importlib.import_module(example).main(dataset, num_epochs=2)


def test_the_digits_are_whole():
    images, labels = importlib.import_module("quickstart").load_digits().tensors

    assert images.shape == (NUM_DIGITS, 1, 8, 8)
    assert images.min() == 0
    assert images.max() == 1
    assert labels.bincount().tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip


def test_the_quickstart_learns_the_digits(capsys):
    metrics = importlib.import_module("quickstart").main(num_epochs=3)

    assert metrics["evaluation_accuracy"] > 0.9
    assert "Accuracy on 360 unseen digits: 9" in capsys.readouterr().out


def test_train_mnist_learns(mnist_of_digits):
    metrics = train_briefly("train_mnist", mnist_of_digits)

    assert metrics["evaluation_loss"] < 1.8  # a guess among ten: log(10) = 2.3


def test_metrics_in_a_callback_are_recorded_for_each_evaluation(mnist_of_digits):
    history = train_briefly("train_mnist_metrics_in_callback", mnist_of_digits)

    for name in ("accuracy", "precision", "recall"):
        assert len(history.get_metric_values(name)) == 2
        assert len(history.get_metric_values(f"evaluation_{name}")) == 1
    assert history.get_latest_metric("accuracy") > 0.5


def test_metrics_in_a_method_are_recorded_for_each_evaluation(mnist_of_digits):
    history = train_briefly("train_mnist_metrics_in_method", mnist_of_digits)

    assert len(history.get_metric_values("accuracy")) == 2
    assert len(history.get_metric_values("evaluation_accuracy")) == 1
    assert history.get_latest_metric("accuracy") > 0.5


def test_a_custom_event_reaches_the_callback(mnist_of_digits, capsys):
    confusions = train_briefly("train_mnist_custom_event", mnist_of_digits)

    assert confusions.total() > 0
    assert all(target != prediction for target, prediction in confusions)
    assert "was taken for a" in capsys.readouterr().out


def test_a_missing_torchvision_is_said_plainly(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)

    with pytest.raises(SystemExit, match="needs torchvision") as stop:
        importlib.import_module("mnist_data").load_mnist("data")

    assert "quickstart.py" in str(stop.value)


def test_files_that_cannot_be_downloaded_are_said_plainly(monkeypatch):
    def unreachable(root, download, transform):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    datasets = ModuleType("torchvision.datasets")
    datasets.MNIST = unreachable
    transforms = ModuleType("torchvision.transforms")
    transforms.ToTensor = object
    for module in (ModuleType("torchvision"), datasets, transforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    with pytest.raises(SystemExit, match="could not be downloaded") as stop:
        importlib.import_module("mnist_data").load_mnist("some/folder")

    assert "'some/folder'" in str(stop.value)
    assert "--data-dir" in str(stop.value)


def test_a_script_that_cannot_have_its_data_ends_with_an_error_and_no_traceback():
    blocked = Path("torchvision.py")  # stands in the way of any installed torchvision
    blocked.write_text("raise ImportError('not here')\n")
    run = subprocess.run(
        [sys.executable, EXAMPLES / "core" / "train_mnist.py"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), SOURCES])},
    )

    assert run.returncode == 1
    assert "This example needs torchvision" in run.stderr
    assert "Traceback" not in run.stderr


def test_no_example_shows_a_command_that_cannot_work_found_106():
    """`accelerate launch --cpu` starts one process, whatever it was asked for."""
    texts = [path.read_text(encoding="utf-8") for path in EXAMPLES.rglob("*.py")]

    assert not [text for text in texts if "accelerate launch --cpu" in text]
