"""The code of docs/recipes.md runs, with the libraries that it is about."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes.md"


def accuracy(predictions, targets):
    assert targets.ndim == 1
    return (predictions.argmax(dim=1) == targets).float().mean()


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from quickstart import load_digits

    images, labels = load_digits().tensors
    return TensorDataset(images[:512], labels[:512])


def create_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@pytest.fixture
def page():
    """Return what the code of the page defines."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names = {}
    exec(compile("\n".join(blocks), PAGE.name, "exec"), names)
    return names


@pytest.fixture
def trainer(page):
    model = create_model()
    return page["SoftTargetTrainer"](
        model,
        page["loss_func"],
        torch.optim.SGD(model.parameters(), lr=0.1),
        (),
        metrics={"accuracy": accuracy},
        train_metrics=True,
        seed=0,
    )


def test_batches_are_mixed_for_training_only(page, trainer, digits):
    pytest.importorskip("torchvision")
    page["trainer"] = trainer

    history = page["train_with_mixup"](digits, digits, num_classes=10)

    assert history.get_latest_metric("eval_accuracy_epoch") > 0.85
    # What is mixed is harder to tell.
    mixed, plain = (
        history.get_latest_metric(f"{part}_loss_epoch") for part in ("train", "eval")
    )
    assert mixed > plain + 0.2
    assert history.get_latest_metric("train_accuracy_epoch") > 0.4


def test_the_mixing_of_timm_takes_its_place(page, trainer, digits):
    timm_data = pytest.importorskip("timm.data")
    mix = timm_data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)

    history = trainer.train(
        digits,
        2,
        train_dataloader_kwargs={"collate_fn": page["Mixing"](mix), "drop_last": True},
    )
    assert history.get_latest_metric("train_accuracy_epoch") > 0.3


def test_rare_classes_are_drawn_as_often(page, digits):
    _, labels = digits.tensors
    rare = (labels > 0) | (torch.arange(len(labels)) < 30)
    dataset = TensorDataset(*(tensor[rare] for tensor in digits.tensors))
    labels = dataset.tensors[1]
    drawn = labels[list(page["balanced_sampler"](labels))].bincount()
    assert labels.bincount().min() < 0.1 * labels.bincount().max()
    assert drawn.min() > 0.5 * drawn.max()


def test_a_study_searches_with_the_objective(page, digits):
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(1))
    for lr in (0.01, 0.0001):
        study.enqueue_trial({"lr": lr})

    study.optimize(page["create_objective"](create_model, digits, digits), n_trials=2)

    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert study.best_value < 0.5
