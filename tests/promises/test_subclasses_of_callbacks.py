"""Callbacks are subclassed in ways that leave ours out; they work nevertheless.

A subclass may have a constructor that sets the published attributes and does not call
ours, and may override any event without calling ours.
"""

import operator
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated import callbacks
from pytorch_accelerated.callbacks import (
    CallbackHandler,
    ConvertSyncBatchNormCallback,
    EarlyStoppingCallback,
    LimitBatchesCallback,
    LimitEvalStepsCallback,
    LogMetricsCallback,
    ModelEmaCallback,
    MoveModulesToDeviceCallback,
    OptunaPruningCallback,
    PreemptionCallback,
    PrintProgressCallback,
    ProfilerCallback,
    ProgressBarCallback,
    RecordHistoryCallback,
    ReportCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    SwaCallback,
    TerminateOnNaNCallback,
    ThroughputCallback,
    TrackerCallback,
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


_SAVE_BEST = {
    "save_path": "best.pt",
    "watch_metric": "eval_loss_epoch",
    "greater_is_better": False,
    "operator": operator.lt,
    "reset_on_train": True,
    "save_optimizer": True,
    "save_scheduler": True,
    "load_saved_checkpoint": False,
}


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


# What 0.1.61 sets in the constructor of each, for the runs below.
PUBLISHED = {
    ConvertSyncBatchNormCallback: {},
    EarlyStoppingCallback: {
        "early_stopping_patience": 1,
        "early_stopping_threshold": 0.0,
        "watch_metric": "eval_loss_epoch",
        "greater_is_better": False,
        "reset_on_train": True,
        "early_stopping_patience_counter": 0,
        "best_metric": None,
    },
    LimitBatchesCallback: {"num_batches": 3},
    LimitEvalStepsCallback: {"num_eval_steps": 1, "limit_intermediate_only": False},
    LogMetricsCallback: {},
    ModelEmaCallback: {
        "decay": 0.5,
        "evaluate_during_training": True,
        "save_path": "ema.pt",
        "watch_metric": "ema_model_eval_loss_epoch",
        "greater_is_better": False,
    },
    MoveModulesToDeviceCallback: {},
    OptunaPruningCallback: {"trial": Trial(), "metric": "eval_loss_epoch"},  # neither
    PreemptionCallback: {},  # was not there
    PrintProgressCallback: {},
    ProfilerCallback: {},  # was not there
    ProgressBarCallback: {},
    RecordHistoryCallback: {  # was not there
        "path": Path("history.jsonl"),
        "every_n_updates": 2,
    },
    ReportCallback: {"path": "report.html"},  # was not there
    SaveBestModelCallback: _SAVE_BEST,
    SaveTrainingStateCallback: {
        "save_dir": "states",
        "save_every_n_epochs": 1,
        "save_every_n_steps": None,
        "save_at_end": True,
        "max_checkpoints": None,
    },
    StepBasedEvaluationCallback: {"eval_every_n_steps": 3},
    SwaCallback: {"start_epoch": 1},  # was not there
    TerminateOnNaNCallback: {},
    TrackerCallback: {"trackers": [Names()]},  # was not there
    UnfreezeCallback: {  # was not there
        "freezer": ModelFreezer(nn.Linear(1, 1)),
        "from_index": {1: 0},
    },
    ThroughputCallback: {"peak_flops": 1e9},  # was not there
    WSDCheckpointCallback: {
        "save_dir": Path("wsd"),
        "save_optimizer": True,
        "save_scheduler": True,
        "initial_checkpoint": None,
    },
}

# Without these a callback cannot do what it is there for.
ESSENTIAL = {
    EarlyStoppingCallback: {"on_training_run_epoch_end"},
    LimitEvalStepsCallback: {"on_eval_epoch_start"},
    ModelEmaCallback: {"on_eval_epoch_end", "on_training_run_epoch_end"},
    MoveModulesToDeviceCallback: {"on_training_run_start"},
    OptunaPruningCallback: {"on_training_run_epoch_end"},
    PreemptionCallback: {"on_training_run_start"},
    PrintProgressCallback: {"on_training_run_start"},
    ProfilerCallback: {
        "on_training_run_start",
        "on_train_step_end",
        "on_training_run_end",  # a run that is over amid the steps
    },
    ProgressBarCallback: {"on_train_epoch_start", "on_train_step_end"},
    SaveBestModelCallback: {"on_training_run_epoch_end"},
    SaveTrainingStateCallback: {"on_training_run_epoch_end"},
    StepBasedEvaluationCallback: {"on_train_step_end"},
    SwaCallback: {"on_training_run_epoch_end"},
    TrackerCallback: {"on_training_run_start", "on_evaluation_run_start"},
    UnfreezeCallback: {"on_train_epoch_start"},
    ThroughputCallback: {"on_train_epoch_start", "on_train_epoch_end"},
    WSDCheckpointCallback: {"on_train_step_end"},
}


class Moved(nn.Module):
    """Notes where it is moved to."""

    devices = ()

    def to(self, device):
        self.devices = (*self.devices, str(device))
        return self


class Watch(TrainerCallback):
    """Counts evaluation batches, and sends a signal amid the run when told to."""

    def __init__(self):
        self.eval_batches, self.signal_at = [], None

    def on_eval_epoch_start(self, trainer, **kwargs):
        self.eval_batches.append(0)

    def on_eval_step_end(self, trainer, batch, batch_output, **kwargs):
        self.eval_batches[-1] += 1

    def on_train_step_start(self, trainer, **kwargs):
        if trainer.num_steps == self.signal_at:
            os.kill(os.getpid(), signal.SIGUSR1)


class Session:
    """Two runs of training and one of evaluation, and what became of them."""

    def __init__(self, callback, create_trainer, samples, capsys):
        self.callback, self.samples, self.capsys = callback, samples, capsys
        self.watch, self.module = Watch(), Moved()
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
        self.watch.eval_batches.clear()
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
    session.watch.signal_at = 1
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


# What is to be seen after the session.
JOBS = {
    ConvertSyncBatchNormCallback: lambda session: True,  # needs several processes
    EarlyStoppingCallback: _stops_early,
    LimitBatchesCallback: lambda session: session.trainer.num_steps == 3,
    LimitEvalStepsCallback: lambda session: session.watch.eval_batches == [1, 1],
    LogMetricsCallback: _logs_each_run,
    ModelEmaCallback: _averages,
    MoveModulesToDeviceCallback: lambda session: "cpu" in session.module.devices,
    OptunaPruningCallback: lambda session: session.callback.trial.steps[-1] == 0,
    PreemptionCallback: _heeds_a_signal,
    PrintProgressCallback: lambda session: (
        "Training starts: epoch 1/1, update 0/4" in session.output.out
    ),
    ProgressBarCallback: lambda session: "4/4 [" in session.output.err,
    ProfilerCallback: lambda session: len(os.listdir("profile")) == 2,
    RecordHistoryCallback: lambda session: (
        {"train_loss", "learning_rate"}
        <= InMemoryRunHistory.load_jsonl("history.jsonl").get_metric_names()
    ),
    ReportCallback: lambda session: (
        "eval_loss_epoch" in Path("report_2.html").read_text()
    ),
    SaveBestModelCallback: lambda session: (
        session.callback.best_metric
        == session.trainer.run_history.get_latest_metric("eval_loss_epoch")
        == torch.load("best.pt", weights_only=True)["loss"]
    ),
    SaveTrainingStateCallback: lambda session: (
        {"epoch_1", "epoch_2"} <= set(os.listdir("states"))
    ),
    StepBasedEvaluationCallback: lambda session: (
        session.watch.eval_batches == [2, 2, 2]
    ),
    SwaCallback: lambda session: session.callback.average.num_updates == 1,
    TerminateOnNaNCallback: _stops_at_nan,
    TrackerCallback: lambda session: (
        {"train_loss_epoch", "eval_loss_epoch", "evaluation_loss"}
        <= set.union(*session.callback.trackers[0].runs[-2:])
    ),
    UnfreezeCallback: lambda session: session.callback._first == 0,
    ThroughputCallback: lambda session: (
        "samples per second" in session.output.out
        and session.trainer.run_history.get_latest_metric("train_samples_per_second")
        > 0
    ),
    WSDCheckpointCallback: lambda session: (
        {
            "checkpoint_4_wsd_pre_decay",
            "checkpoint_2_wsd_pre_decay",
        }
        <= set(os.listdir("wsd"))
    ),
}


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
        for name, value in PUBLISHED[cls].items():
            setattr(self, name, value)

    return type("Own", (base_of(cls),), {"__init__": own})()


def with_event_overridden(cls, event):
    def nothing(self, *args, **kwargs):
        pass

    subclass = type("Overrides", (base_of(cls),), {event: nothing})
    arguments = {
        name: value
        for name, value in PUBLISHED[cls].items()
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
    assert exported - {TrainerCallback, CallbackHandler} == set(PUBLISHED) == set(JOBS)


@pytest.mark.parametrize("cls", PUBLISHED, ids=lambda cls: cls.__name__)
def test_a_constructor_need_not_call_ours(session, cls):
    """Found 110."""
    runs = session(with_own_constructor(cls))
    runs.run()
    assert JOBS[cls](runs)


@pytest.mark.parametrize(
    ("cls", "event"),
    [(cls, event) for cls in PUBLISHED for event in events_of(cls)],
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
    if event not in ESSENTIAL.get(cls, ()):
        assert JOBS[cls](runs)
