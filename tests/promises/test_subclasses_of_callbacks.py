"""Callbacks are subclassed in ways that leave ours out; they work nevertheless.

A subclass may have a constructor that sets the published attributes and does not call
ours, and may override any event without calling ours.
"""

import inspect
import operator
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch import nn
from torch.utils.data import TensorDataset
from toys import At

from pytorch_accelerated import callbacks
from pytorch_accelerated.callbacks import (
    CallbackHandler,
    LogMetricsCallback,
    ModelEmaCallback,
    TrainerCallback,
    UnfreezeCallback,
    WSDCheckpointCallback,
    progress,
)
from pytorch_accelerated.errors import NonFiniteLossError
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.schedulers import WSDLrScheduler
from pytorch_accelerated.tracking import InMemoryRunHistory


class Trial:
    """Has the two methods of a trial of Optuna that are called."""

    steps = ()

    def report(self, value, step):
        self.steps = (*self.steps, step)

    def should_prune(self):
        return False


class Names(GeneralTracker):
    """Keeps the names of what it is sent, those of each run apart."""

    name = "names"
    requires_logging_directory = False
    tracker = None

    def __init__(self):
        self.runs = []

    def start(self):
        self.runs.append(set())

    def log(self, values, step=None):
        self.runs[-1].update(values)


class Moved(nn.Module):
    """Notes where it is moved to."""

    devices = ()

    def to(self, device):
        self.devices = (*self.devices, str(device))
        return self


class Session:
    """Two runs of training and one of evaluation, and what became of them."""

    def __init__(self, callback, create_trainer, samples, capsys):
        self.callback, self.samples, self.capsys = callback, samples, capsys
        self.eval_batches, self.signal_at, self.module = [], None, Moved()
        self.watch = At(
            on_eval_epoch_start=lambda trainer, **_: self.eval_batches.append(0),
            on_eval_step_end=self.count_batch,
            on_train_step_start=self.send_signal,
        )
        unfreezes = isinstance(callback, UnfreezeCallback)
        self.trainer = create_trainer(
            [self.watch] if unfreezes else [callback, self.watch]
        )
        if unfreezes:
            callback.freezer = ModelFreezer(self.trainer.model)
            self.trainer.callback_handler.add_callback(callback)
        self.trainer.metric = self.module
        self.kwargs = {}
        if isinstance(callback, WSDCheckpointCallback):
            create = WSDLrScheduler.create_scheduler_fn(decay_phase_ratio=0.5)
            self.kwargs = {"create_scheduler_fn": create}

    def count_batch(self, trainer, **kwargs):
        self.eval_batches[-1] += 1

    def send_signal(self, trainer, **kwargs):
        if trainer.num_steps == self.signal_at:
            os.kill(os.getpid(), signal.SIGUSR1)

    def train(self, num_epochs, **kwargs):
        self.trainer.train(
            kwargs.pop("data", None) or self.samples(4),
            num_epochs,
            eval_dataset=self.samples(2),
            per_device_batch_size=1,
            **self.kwargs,
            **kwargs,
        )

    def run(self):
        self.train(2)
        self.output_of_first = self.capsys.readouterr()
        self.eval_batches.clear()
        self.logged = getattr(self.callback, "logged", [])
        self.logged.clear()
        self.train(1)
        self.output = self.capsys.readouterr()
        self.trainer.evaluate(self.samples(2), per_device_batch_size=1)


def _stops_early(session):
    for group in session.trainer.optimizer.param_groups:
        group["lr"] = 0.0
    session.train(5)
    return len(session.trainer.run_history.get_metric_values("eval_loss_epoch")) == 2


def _stops_at_nan(session):
    nan = torch.full((4, 1), torch.nan)
    with pytest.raises(NonFiniteLossError):
        session.train(1, data=TensorDataset(nan, torch.zeros(4, 1)))
    return session.callback.triggered


def _heeds_a_signal(session):
    session.signal_at = 1
    session.train(1)
    return session.trainer.interrupted


def _logs_each_run(session):
    names = [name for metrics in session.logged for name in metrics]
    return sorted(names) == ["eval_loss_epoch", "evaluation_loss", "train_loss_epoch"]


def _averages(session):
    recorded = session.trainer.run_history.get_metric_values(
        "ema_model_eval_loss_epoch"
    )
    # The average of this run alone: weights 1/256 to 1/4096 of the start.
    return len(recorded) == 1 and recorded[0] < 1e-4 and os.path.exists("ema.pt")


def _saves_the_best(session):
    latest = session.trainer.run_history.get_latest_metric("eval_loss_epoch")
    saved = torch.load("best.pt", weights_only=True)["loss"]
    return session.callback.best_metric == latest == saved


def _records_each_update(session):
    names = InMemoryRunHistory.load_jsonl("history.jsonl").get_metric_names()
    return {"train_loss", "learning_rate"} <= names


def _measures(session):
    history = session.trainer.run_history
    is_said = "samples per second" in session.output.out
    return is_said and history.get_latest_metric("train_samples_per_second") > 0


def _sends_each_run(session):
    sent = set.union(*session.callback.trackers[0].runs[-2:])
    return {"train_loss_epoch", "eval_loss_epoch", "evaluation_loss"} <= sent


def files_in(folder):
    return set(os.listdir(folder))


class Case:
    """What is to be seen after the session; what 0.1.61 sets in the constructor.

    Without the essential events a callback cannot do what it is there for. The names in
    ``defaults`` are those of arguments that the constructor sets to their defaults.
    """

    def __init__(self, job, essential="", defaults="", **published):
        self.job, self.essential = job, essential.split()
        self.defaults, self.published = defaults.split(), published

    def arguments(self, cls):
        parameters = inspect.signature(cls).parameters
        return self.published | {n: parameters[n].default for n in self.defaults}


RUN_START, EPOCH_END = "on_training_run_start", "on_training_run_epoch_end"

CASES = {
    "ConvertSyncBatchNorm": Case(lambda session: True),  # needs several processes
    "EarlyStopping": Case(
        _stops_early,
        EPOCH_END,
        "early_stopping_patience early_stopping_threshold watch_metric "
        "greater_is_better reset_on_train",
        early_stopping_patience_counter=0,
        best_metric=None,
    ),
    "LimitBatches": Case(lambda session: session.trainer.num_steps == 3, num_batches=3),
    "LimitEvalSteps": Case(
        lambda session: session.eval_batches == [1, 1],
        "on_eval_epoch_start",
        num_eval_steps=1,
        limit_intermediate_only=False,
    ),
    "LogMetrics": Case(_logs_each_run),
    "ModelEma": Case(
        _averages,
        f"on_eval_epoch_end {EPOCH_END}",
        "evaluate_during_training watch_metric greater_is_better",
        decay=0.5,
        save_path="ema.pt",
    ),
    "MoveModulesToDevice": Case(
        lambda session: "cpu" in session.module.devices, RUN_START
    ),
    "PrintProgress": Case(
        lambda session: "Training starts: epoch 1/1, update 0/4" in session.output.out,
        RUN_START,
    ),
    "ProgressBar": Case(
        lambda session: "4/4 [" in session.output.err,
        "on_train_epoch_start on_train_step_end",
    ),
    "SaveBestModel": Case(
        _saves_the_best,
        EPOCH_END,
        "watch_metric greater_is_better reset_on_train save_optimizer save_scheduler",
        save_path="best.pt",
        operator=operator.lt,
        load_saved_checkpoint=False,
    ),
    "SaveTrainingState": Case(
        lambda session: {"epoch_1", "epoch_2"} <= files_in("training_states"),
        EPOCH_END,
        "save_dir save_every_n_steps save_at_end max_checkpoints",
        save_every_n_epochs=1,
    ),
    "StepBasedEvaluation": Case(
        lambda session: session.eval_batches == [2, 2, 2],
        "on_train_step_end",
        eval_every_n_steps=3,
    ),
    "TerminateOnNaN": Case(_stops_at_nan),
    "WSDCheckpoint": Case(
        lambda session: (
            {f"checkpoint_{step}_wsd_pre_decay" for step in (2, 4)} <= files_in("wsd")
        ),
        "on_train_step_end",
        "save_optimizer save_scheduler initial_checkpoint",
        save_dir=Path("wsd"),
    ),
    # These were not there.
    "OptunaPruning": Case(
        lambda session: session.callback.trial.steps[-1] == 0,
        EPOCH_END,
        trial=Trial(),
        metric="eval_loss_epoch",
    ),
    "Preemption": Case(_heeds_a_signal, RUN_START),
    "Profiler": Case(
        lambda session: len(files_in("profile")) == 2,
        f"{RUN_START} on_train_step_end",
        active=2,  # so that each run is over after the steps
    ),
    "RecordHistory": Case(
        _records_each_update, path=Path("history.jsonl"), every_n_updates=2
    ),
    "Report": Case(
        lambda session: "eval_loss_epoch" in Path("report_2.html").read_text(),
        path="report.html",
    ),
    "Swa": Case(
        lambda session: session.callback.average.num_updates == 1,
        EPOCH_END,
        start_epoch=1,
    ),
    "Throughput": Case(
        _measures,
        "on_train_epoch_start on_train_epoch_end",
        peak_flops=1e9,
        flops_per_sample=1.0,
    ),
    "Tracker": Case(
        _sends_each_run, f"{RUN_START} on_evaluation_run_start", trackers=[Names()]
    ),
    "Unfreeze": Case(
        lambda session: session.callback._first == 0,
        "on_train_epoch_start",
        freezer=ModelFreezer(nn.Linear(1, 1)),
        from_index={1: 0},
    ),
}
CASES = {getattr(callbacks, f"{name}Callback"): case for name, case in CASES.items()}


def events_of(cls):
    """Return those that a subclass is most likely to override, and all of ours."""
    ours = {
        name
        for name in dir(cls)
        if name.startswith("on_")
        and getattr(cls, name) is not getattr(TrainerCallback, name, None)
    }
    return sorted(ours | {"on_training_run_start"})


def base_of(cls):
    """Give subclasses of `LogMetricsCallback` something to remember."""
    if cls is not LogMetricsCallback:
        return cls

    class Log(LogMetricsCallback):
        @property
        def logged(self):
            return vars(self).setdefault("seen", [])

        def log_metrics(self, trainer, metrics):
            self.logged.append(metrics)

    return Log


def with_own_constructor(cls):
    def own(self):
        for name, value in CASES[cls].arguments(cls).items():
            setattr(self, name, value)

    return type("Own", (base_of(cls),), {"__init__": own})()


def with_event_overridden(cls, event):
    def nothing(self, *args, **kwargs):
        pass

    subclass = type("Overrides", (base_of(cls),), {event: nothing})
    arguments = {
        name: value
        for name, value in CASES[cls].arguments(cls).items()
        if name not in ("operator", "best_metric", "early_stopping_patience_counter")
    }
    return subclass(**arguments)


@pytest.fixture
def session(create_trainer, samples, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        progress, "is_terminal", lambda stream: True
    )  # as in a terminal
    handlers = {
        number: signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGUSR1, signal.SIGTERM)
    }
    yield lambda callback: Session(callback, create_trainer, samples, capsys)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_each_callback_is_looked_at():
    exported = {
        value
        for name in callbacks.__all__
        if isinstance(value := getattr(callbacks, name), type)
        and issubclass(value, TrainerCallback)
    }
    bases = {TrainerCallback, CallbackHandler, callbacks.Recorder}
    assert exported - bases == set(CASES)


@pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
def test_a_constructor_need_not_call_ours(session, cls):
    """Found 110."""
    runs = session(with_own_constructor(cls))
    runs.run()
    assert CASES[cls].job(runs)


@pytest.mark.parametrize(
    ("cls", "event"),
    [(cls, event) for cls in CASES for event in events_of(cls)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_an_override_of_an_event_need_not_call_ours(session, cls, event):
    """Found 110."""
    runs = session(with_event_overridden(cls, event))
    if (cls, event) == (ModelEmaCallback, "on_eval_epoch_end"):
        with pytest.raises(ValueError, match="'ema_model_eval_loss_epoch' has not"):
            runs.run()  # there is nothing to compare
        return
    runs.run()
    if event not in CASES[cls].essential:
        assert CASES[cls].job(runs)
