import sys
import time
from types import SimpleNamespace

import pytest
import torch
from toys import At, Stream

from pytorch_accelerated.callbacks import (
    LogMetricsCallback,
    ModelEmaCallback,
    ProgressBarCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
    TrainerCallback,
    progress,
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


def test_only_what_columns_say_already_is_left_out_of_a_row(
    create_trainer, samples, capsys
):
    class Records(Trainer):
        def train_epoch_end(self):
            for name in ("learning_rate", "learning_rate_1", "train_mfu"):
                self.run_history.update_metric(name, 1)
                self.run_history.update_metric(f"{name}_head", 2)

    create_trainer([LogMetricsCallback], trainer_class=Records).train(samples(1), 1)
    header, *rest = capsys.readouterr().out.splitlines()
    for name in ("learning_rate", "learning_rate_1", "train_mfu"):
        assert f"{name}_head" in header
        assert name not in header.split()
    assert len(rest) == 1


class Clock(TrainerCallback):
    """Time passes by seconds: 2 a step of training, 1 a step of evaluation."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def on_train_step_start(self, trainer, **kwargs):
        self.now += 2

    def on_eval_step_start(self, trainer, **kwargs):
        self.now += 1


def table_of(capsys):
    """The lines that were printed, with one space between the words."""
    output = capsys.readouterr()
    assert output.err == ""
    assert "\r" not in output.out
    return [" ".join(line.split()) for line in output.out.splitlines()]


def test_each_epoch_is_a_row_and_an_evaluation_a_line(
    create_trainer, samples, capsys, monkeypatch
):
    trainer = create_trainer([LogMetricsCallback, Clock(monkeypatch)])
    trainer.train(samples(4), 3, eval_dataset=samples(1), per_device_batch_size=2)
    trainer.evaluate(samples(2), per_device_batch_size=1)
    assert table_of(capsys) == [
        "epoch train_loss eval_loss lr samples/s time ETA",
        "1/3 0.6250* 0.06250* 0.25 1 5.0s 10.0s",
        "2/3 0.03906* 0.003906* 0.25 1 5.0s 5.0s",
        "3/3 0.002441* 0.0002441* 0.25 1 5.0s",
        "evaluation loss=0.0002441 time=2.0s",
    ]


def test_evaluations_amid_an_epoch_are_rows_and_leave_the_pace_of_training_alone(
    create_trainer, samples, capsys, monkeypatch
):
    def evaluate(trainer, step=0, **kwargs):
        if step == 0:
            trainer.evaluate(samples(1))

    apart = At(on_train_step_end=evaluate, on_train_epoch_end=evaluate)
    callbacks = [StepBasedEvaluationCallback(2), apart, LogMetricsCallback]
    trainer = create_trainer([*callbacks, Clock(monkeypatch)], lr=0)
    trainer.train(
        samples(6), 9, samples(3), per_device_batch_size=1, max_num_train_steps=4
    )
    assert table_of(capsys) == [
        "evaluation loss=1.000 time=1.0s",
        "epoch train_loss eval_loss lr samples/s time ETA",
        "@2 1.000* 0 0.5 8.0s 8.0s",
        "@4 1.000 0 0.5 15.0s",
        "evaluation loss=1.000 time=1.0s",
        "1/1 1.000* 1.000* 0 0.5 19.0s",
        "Stopping after 4 updates, as max_num_train_steps asks",
    ]


def test_a_resumed_run_goes_on_in_its_epoch_and_knows_what_was_best(
    create_trainer, samples, capsys, monkeypatch, tmp_path
):
    def end(trainer, **kwargs):
        if trainer.run_history.current_epoch == 3:
            raise StopTrainingError("enough")

    def train(*callbacks, lr, **kwargs):
        clock = Clock(monkeypatch)
        clock.now += 1000 * lr
        trainer = create_trainer([LogMetricsCallback, *callbacks, clock], lr=lr)
        trainer.train(samples(1), 10, per_device_batch_size=1, **kwargs)
        return table_of(capsys)

    save = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1)
    assert train(save, At(on_train_epoch_end=end), lr=0.25)[1:] == [
        "1/10 1.000* 0.25 0.5 2.0s 18.0s",
        "2/10 0.2500* 0.25 0.5 2.0s 16.0s",
        "enough",
        "3/10 0.06250* 0.25 0.5 2.0s 14.0s",
    ]
    rows = train(lr=0, resume_from=tmp_path / "epoch_2")
    assert rows[-8:-6] == [
        "3/10 0.06250* 0.25 0.5 2.0s 14.0s",
        "4/10 0.01562* 0.25 0.5 2.0s 12.0s",
    ]


def test_a_star_marks_what_is_better_than_all_before_it(
    train_with_scores, create_trainer, samples, capsys
):
    class Scores(Trainer):
        def train_epoch_end(self):
            epoch = self.run_history.current_epoch - 1
            for name, values in scores.items():
                self.run_history.update_metric(name, values[epoch])

    scores = {
        "my_error": [2.0, float("nan"), 3.0, 2.0, 1.0],
        "accuracy": [0.5, "broken", 0.75, 0.5, 1],
        "whatever": [2.0, 1.0, 3.0, 0.0, 4.0],
    }
    create_trainer([LogMetricsCallback], trainer_class=Scores).train(samples(1), 5)
    rows = [line.split() for line in table_of(capsys)]
    assert rows[0][2:5] == list(scores)
    assert [
        [cell[-1] == "*" for cell in row[2:5]] for row in rows if "/5" in row[0]
    ] == [
        [True, True, False],
        [False, False, False],
        [False, True, False],
        [False, False, False],
        [True, True, False],
    ]


def test_without_a_known_length_the_epochs_tell_what_is_left(
    create_trainer, samples, capsys, monkeypatch
):
    def train(**kwargs):
        trainer = create_trainer([LogMetricsCallback, Clock(monkeypatch)], lr=0)
        trainer.train(Stream(samples(3)), per_device_batch_size=1, **kwargs)
        return [(row.split()[0], row.split()[-1]) for row in table_of(capsys)]

    assert train(num_epochs=2) == [("epoch", "ETA"), ("1/2", "6.0s"), ("2/2", "6.0s")]
    assert train(num_epochs=99, max_num_train_steps=5)[:3] == [
        ("epoch", "ETA"),
        ("1", "4.0s"),
        ("2", "4.0s"),
    ]


def test_a_row_is_printed_where_the_bars_were(
    create_trainer, samples, capsys, monkeypatch
):
    monkeypatch.setattr(progress, "is_terminal", lambda stream: stream is sys.stderr)
    trainer = create_trainer([LogMetricsCallback, ProgressBarCallback])
    trainer.train(samples(1), 2, eval_dataset=samples(1))
    output = capsys.readouterr()
    assert [line.split()[:3] for line in output.out.splitlines()] == [
        ["epoch", "train_loss", "eval_loss"],
        ["1/2", "1.000*", "0.2500*"],
        ["2/2", "0.2500*", "0.06250*"],
    ]
    assert output.err.split("\r")[-1].strip() == ""


def test_an_override_that_calls_ours_has_its_row_too(
    create_trainer, samples, capsys, own_history
):
    class Log(LogMetricsCallback):
        def log_metrics(self, trainer, metrics):
            super().log_metrics(trainer, {f"my_{n}": v for n, v in metrics.items()})

    trainer = create_trainer([Log], run_history=own_history())
    trainer.train(samples(1), 1, eval_dataset=samples(1))
    header, row = table_of(capsys)
    assert "eval_loss my_train_loss my_eval_loss lr" in header
    assert row.startswith("1/1 1.000* 0.2500* ")


def test_a_value_is_logged_once_also_by_the_next_runs(create_trainer, samples):
    def record(trainer, **kwargs):
        if trainer.run_history.current_epoch == 1:
            trainer.run_history.update_metric("learning_rate", 0.1)

    log = Log()
    trainer = create_trainer([log, At(on_train_epoch_end=record)])
    trainer.train(samples(1), num_epochs=2)
    trainer.evaluate(samples(1))
    trainer.train(samples(1), num_epochs=1)
    assert log.logged == [
        {"train_loss_epoch": 1},
        {"learning_rate": 0.1},
        {"train_loss_epoch": 0.25},
        {"evaluation_loss": 0.25**2},
        {"train_loss_epoch": 0.25**2},
        {"learning_rate": 0.1},
    ]


def test_a_metric_recorded_late_is_logged_in_its_epoch(
    create_trainer, samples, tmp_path
):
    log = Log()
    ema = ModelEmaCallback(save_path=tmp_path / "ema.pt", decay=0)
    create_trainer([log, ema]).train(samples(1), 1, eval_dataset=samples(1))
    assert log.logged[-1] == {"ema_model_eval_loss_epoch": 0.25}


def test_metrics_of_another_history_may_be_a_set_and_lose_values():
    """Defect 45: the order of names in a set depended on PYTHONHASHSEED."""
    values = {name: [1] for name in ("delta", "alpha", "charlie", "bravo", "echo")}
    history = SimpleNamespace(
        get_metric_names=lambda: set(values),
        get_metric_values=lambda name: values[name],
        get_latest_metric=lambda name: values[name][-1],
    )
    trainer, log = SimpleNamespace(run_history=history), Log()
    log.on_eval_epoch_end(trainer)
    assert list(log.logged[0]) == sorted(values)
    values["alpha"].clear()
    values["bravo"].append(3)
    log.on_eval_epoch_end(trainer)
    assert log.logged[1] == {"bravo": 3}


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
    header, row, *rest = table_of(capsys)
    assert header.startswith("epoch train_loss train_scores_f1 lr")
    assert row.startswith("1/1 1.000* 0.5000* ")
    assert rest == ["train_matrix=Tensor of shape (30, 30) train_words=list of 100"]
