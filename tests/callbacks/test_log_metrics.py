from types import SimpleNamespace

import pytest
import torch

from pytorch_accelerated.callbacks import (
    LogMetricsCallback,
    ModelEmaCallback,
    TrainerCallback,
)
from pytorch_accelerated.callbacks.logging import _is_train_metric
from pytorch_accelerated.trainer import Trainer


class Log(LogMetricsCallback):
    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, trainer, metrics):
        self.logged.append(metrics)


class Recording(Trainer):
    def train_epoch_end(self):
        self.run_history.update_metric("train_accuracy", 0.5)
        self.run_history.update_metric("constrained", 0.25)

    def eval_epoch_end(self):
        self.run_history.update_metric("zeta", 1)
        self.run_history.update_metric("alpha", 2)


def test_metrics_are_logged_as_they_are_recorded(create_trainer, samples):
    """Defect 45: order, and "train" anywhere in a name ("constrained")."""
    log = Log()
    trainer = create_trainer([log], trainer_class=Recording)
    trainer.train(samples(1), num_epochs=2, eval_dataset=samples(1))
    for epoch, metrics in enumerate((log.logged[:2], log.logged[2:]), start=1):
        train, rest = metrics
        assert list(train) == ["train_accuracy", "train_loss_epoch"]
        assert train["train_loss_epoch"] == 0.25 ** (epoch - 1)
        assert list(rest) == ["constrained", "zeta", "alpha", "eval_loss_epoch"]


def test_lines_are_printed(create_trainer, samples, capsys):
    create_trainer([LogMetricsCallback]).train(samples(1), 1, eval_dataset=samples(1))
    lines = capsys.readouterr().out.split("\n")
    assert lines == ["train_loss_epoch: 1.0", "eval_loss_epoch: 0.25", ""]


def test_a_value_is_logged_once(create_trainer, samples):
    class Once(TrainerCallback):
        def on_train_epoch_end(self, trainer, **kwargs):
            if trainer.run_history.current_epoch == 1:
                trainer.run_history.update_metric("learning_rate", 0.1)

    log = Log()
    trainer = create_trainer([log, Once()])
    trainer.train(samples(1), num_epochs=2)
    assert log.logged == [
        {"train_loss_epoch": 1},
        {"learning_rate": 0.1},
        {"train_loss_epoch": 0.25},
    ]


def test_metrics_of_earlier_runs_are_not_logged_again(create_trainer, samples):
    log = Log()
    trainer = create_trainer([log])
    trainer.train(samples(1), num_epochs=1, eval_dataset=samples(1))
    log.logged.clear()
    trainer.evaluate(samples(1))
    assert log.logged == [{"evaluation_loss": 0.25}]
    log.logged.clear()
    trainer.train(samples(1), num_epochs=1)
    assert log.logged == [{"train_loss_epoch": 0.25}]


def test_a_metric_recorded_late_is_logged_in_its_epoch(
    create_trainer, samples, tmp_path
):
    log = Log()
    ema = ModelEmaCallback(save_path=tmp_path / "ema.pt", decay=0)
    create_trainer([log, ema]).train(samples(1), 1, eval_dataset=samples(1))
    assert log.logged[-1] == {"ema_model_eval_loss_epoch": 0.25}


def test_a_metric_whose_values_are_gone_is_not_logged():
    values = {"a": [1], "b": [2]}
    history = SimpleNamespace(
        get_metric_names=lambda: values.keys(),
        get_metric_values=lambda name: values[name],
        get_latest_metric=lambda name: values[name][-1],
    )
    trainer, log = SimpleNamespace(run_history=history), Log()
    log.on_eval_epoch_end(trainer)
    values["a"].clear()
    values["b"].append(3)
    log.on_eval_epoch_end(trainer)
    assert log.logged == [{"a": 1, "b": 2}, {"b": 3}]


@pytest.mark.parametrize(
    ("name", "is_train"),
    [
        ("train_loss_epoch", True),
        ("TRAIN_loss", True),
        ("TRAINABLE", False),
        ("ema_model_train_loss", True),
        ("training_accuracy", True),
        ("loss/train", True),
        ("trainAccuracy", True),
        ("constrained", False),
        ("constrain_loss", False),
        ("trainable_parameters", False),
        ("eval_loss_epoch", False),
    ],
)
def test_a_train_metric_has_the_word_in_its_name(name, is_train):
    """Defect 45; found 94: "TRAIN_loss"."""
    assert _is_train_metric(name) is is_train


def test_what_is_not_one_number_is_printed_briefly(create_trainer, samples, capsys):
    """Found 111."""

    class Matrix(Trainer):
        def train_epoch_end(self):
            self.run_history.update_metric("train_matrix", torch.ones(30, 30))
            self.run_history.update_metric("train_scores", {"f1": 0.5})
            self.run_history.update_metric("train_words", ["word"] * 100)

    create_trainer([LogMetricsCallback], trainer_class=Matrix).train(samples(1), 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "train_matrix: Tensor of shape (30, 30)",
        "train_scores: {'f1': 0.5}",
        "train_scores_f1: 0.5",
    ]
    assert len(lines[3]) < 100


def test_names_in_a_set_are_logged_in_an_order_that_does_not_change():
    """Defect 45: it depended on PYTHONHASHSEED."""
    names = {"delta", "alpha", "charlie", "bravo", "echo"}
    history = SimpleNamespace(
        get_metric_names=lambda: names, get_metric_values=lambda name: [1]
    )
    log = Log()
    log.on_eval_epoch_end(SimpleNamespace(run_history=history))
    assert list(log.logged[0]) == sorted(names)
