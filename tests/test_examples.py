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


@pytest.mark.parametrize(
    ("where", "names"),
    [("callback", ["accuracy", "precision", "recall"]), ("method", ["accuracy"])],
)
def test_metrics_in_a_callback_or_a_method_are_recorded_for_each_evaluation(
    mnist_of_digits, where, names
):
    history = train_briefly(f"train_mnist_metrics_in_{where}", mnist_of_digits)

    for name in names:
        assert len(history.get_metric_values(name)) == 2
        assert len(history.get_metric_values(f"evaluation_{name}")) == 1
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


# ------------------------------------------------------------------- ten small tasks


@pytest.fixture
def run_task(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "tasks")

    def run(task, *args):
        return importlib.import_module(task).main(*args)

    return run


def test_a_network_of_ones_own_has_its_confusion_matrix(run_task, capsys):
    metrics = run_task("confusion_matrix", 3)

    assert metrics["evaluation_accuracy"] > 0.8
    matrix = metrics["evaluation_confusion"]
    assert matrix.shape == (10, 10)
    assert matrix.sum() == 360
    hits = matrix.diag().sum() / 360
    assert metrics["evaluation_accuracy"] == pytest.approx(hits.item())
    assert "s pass for " in capsys.readouterr().out


def test_two_losses_are_recorded_and_drawn(run_task):
    history = run_task("several_losses", 6)

    losses = history.get_metric_values("eval_loss_reconstruction_epoch")
    # The mean of all images in the place of each of them comes to 27.1.
    assert losses[-1] < 24.5 < losses[0]
    assert history.get_latest_metric("eval_loss_epoch") == pytest.approx(
        losses[-1] + history.get_latest_metric("eval_loss_divergence_epoch")
    )
    assert Path("losses.png").stat().st_size > 5_000


def test_training_stops_early_and_predicts_with_the_best_epoch(run_task):
    accuracy, num_epochs = run_task("early_stopping")

    assert accuracy > 0.95
    assert 4 < num_epochs < 40
    assert Path("best_model.pt").exists()


def test_a_learning_rate_is_found_and_trained_with(run_task):
    accuracy, suggestion = run_task("learning_rate_finder", 2)

    assert 0.01 < suggestion < 1.0
    assert accuracy > 0.85
    assert Path("learning_rate.png").stat().st_size > 5_000


def test_two_tasks_are_learned_at_once(run_task):
    metrics = run_task("multi_task", 3)

    assert metrics["evaluation_accuracy_digit"] > 0.8
    assert metrics["evaluation_accuracy_holes"] > 0.85
    assert metrics["evaluation_loss"] == pytest.approx(
        metrics["evaluation_loss_digit"] + 0.5 * metrics["evaluation_loss_holes"],
        rel=1e-4,
    )


def test_a_student_learns_digits_from_its_teacher_without_labels(run_task):
    assert run_task("distillation", 4) > 0.8


def test_a_gan_makes_digits_that_are_recognised(run_task, capsys):
    assert run_task("gan", 25) > 0.5  # of ten digits
    assert "of the digits made are recognised" in capsys.readouterr().out


def test_a_network_is_unfrozen_and_learns_other_digits_from_few_samples(
    run_task, capsys
):
    assert run_task("unfreezing", 7) > 0.8
    said = capsys.readouterr().out
    assert all(f"Unfreezing the layer groups [{group}]" in said for group in (2, 0))


def test_rare_digits_are_found_more_often_when_they_are_drawn_as_often(run_task):
    as_it_is, balanced = run_task("class_balance", 8)

    assert balanced > as_it_is + 0.02
    assert balanced > 0.8


def test_the_tasks_are_short_and_all_on_the_pages(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    size = importlib.import_module("size")
    files = sorted((EXAMPLES / "tasks").glob("*.py"))
    pages = (EXAMPLES / "tasks" / "README.md", ROOT / "docs" / "examples.md")

    assert len(files) == 11
    for file in files:
        module = size.Module(file.name, file.read_text(encoding="utf-8"))
        assert len(module.lines()) <= 60, file.name
        for page in pages:
            assert file.name in page.read_text(encoding="utf-8"), (file.name, page)
