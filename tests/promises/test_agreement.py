"""R2, R15: a stop on one process stops all of them, at the same update."""

import contextlib
import io
import time
from datetime import timedelta
from functools import partial
from itertools import pairwise
from unittest import mock

import pytest
import torch
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from toys import At, create_trainer, ones, overriding

from pytorch_accelerated.callbacks import (
    ConvertSyncBatchNormCallback,
    EarlyStoppingCallback,
    ProgressBarCallback,
    SaveTrainingStateCallback,
    TerminateOnNaNCallback,
    TrainerCallback,
)
from pytorch_accelerated.errors import StopTrainingError
from pytorch_accelerated.trainer import Trainer


class RaisesOnOneProcess(TrainerCallback):
    """Raises an error in an event, when it has been called a number of times."""

    def __init__(self, event, error, calls=1, process=1):
        self.error, self.calls, self.process = error, calls, process
        setattr(self, event, self._count)

    def _count(self, trainer, **kwargs):
        self.calls -= 1
        if self.calls == 0 and trainer._accelerator.process_index == self.process:
            raise self.error


def train(callbacks, trainer_class=Trainer, **kwargs):
    """Train; return all that tells how the run ended."""
    model = kwargs.pop("model", None) or nn.Linear(1, 1)
    dataset, ends = kwargs.pop("dataset", ones(20)), []
    notes = At(
        on_stop_training_error=lambda trainer, **_: ends.append("stop"),
        on_exception=lambda trainer, **_: ends.append("exception"),
        on_training_run_end=lambda trainer, **_: ends.append("end"),
        may_stop_alone=False,
    )
    trainer = create_trainer(
        [*callbacks, notes],
        lr=0.01,
        model=model,
        trainer_class=trainer_class,
        accelerator_kwargs=kwargs.pop("accelerator_kwargs", None),
    )
    error, printed = None, io.StringIO()
    arguments = {"num_epochs": 3, "eval_dataset": ones(8), **kwargs}
    with contextlib.redirect_stdout(printed):
        try:
            trainer.train(dataset, per_device_batch_size=1, **arguments)
        except Exception as raised:
            error = raised
    return {
        "updates": trainer.num_updates,
        "error": type(error).__name__,
        "message": str(error),
        "ends": ends,
        "printed": printed.getvalue(),
        "epoch": trainer.run_history.current_epoch,
        "is plain": trainer.model is model,
    }


def check_stopped(runs, updates, message):
    """All stopped after so many updates, in order, and the first one says why."""
    for run in runs:
        assert run["updates"] == updates
        assert run["error"] == "NoneType"
        assert run["ends"] == ["stop", "end"]
        assert run["is plain"]
    assert message in runs[0]["printed"]


def check_failed(runs, updates, message, failing=1):
    """All failed after so many updates, and all say why."""
    for process, run in enumerate(runs):
        assert run["updates"] == updates
        assert run["error"] == ("ValueError" if process == failing else "RuntimeError")
        assert message in run["message"]
        assert run["ends"] == ["exception"]
        assert run["is plain"]


# ---------------------------------------------------------------- stops in a callback


class AllStop(Trainer):
    def calculate_train_batch_loss(self, batch):
        if self.num_steps == 4:
            raise StopTrainingError("all of us")
        return super().calculate_train_batch_loss(batch)


def test_a_stop_after_an_update_stops_both_at_that_update(on_processes):
    """Defect 40. Amid a window, it stops them when the window ends."""

    def run():
        one_stops = partial(RaisesOnOneProcess, error=StopTrainingError("enough"))
        amid_window = one_stops("on_train_step_end", calls=4)
        return [
            train([one_stops("on_train_step_end", calls=3)]),
            train([one_stops("on_train_update_end", calls=3)]),
            train([amid_window], gradient_accumulation_steps=3),
            train([], AllStop),
        ]

    runs = zip(*on_processes(2, run), strict=True)
    for of_both, updates in zip(runs, (3, 3, 2, 4), strict=True):
        of_one = "Process 1 raised StopTrainingError('enough')"
        check_stopped(of_both, updates, "all of us" if updates == 4 else of_one)


class Final(StopTrainingError):
    reaches_caller = True


def test_a_stop_that_reaches_the_caller_reaches_that_of_both(on_processes):
    def run():
        return train([RaisesOnOneProcess("on_train_epoch_end", Final("enough"))])

    runs = on_processes(2, run)
    assert [run["error"] for run in runs] == ["StopTrainingError", "Final"]
    assert [run["ends"] for run in runs] == [["stop", "end"]] * 2


# The updates that are done when an event or a hook happens first; 10 an epoch.
EVENTS = {
    "on_training_run_start": 0,
    "on_train_epoch_start": 0,
    "on_train_step_start": 1,  # the window is finished first
    "on_train_step_end": 1,
    **dict.fromkeys(
        (
            *("on_train_epoch_end", "on_eval_epoch_start", "on_eval_step_start"),
            *("on_eval_step_end", "on_eval_epoch_end", "on_training_run_epoch_end"),
        ),
        10,
    ),
}
HOOKS = {
    **dict.fromkeys(("training_run_start", "train_epoch_start"), 0),
    **dict.fromkeys(("train_epoch_end", "eval_epoch_start", "eval_epoch_end"), 10),
    "training_run_epoch_end": 10,
}


def test_an_error_in_any_event_or_hook_is_raised_on_both(on_processes):
    """Defects 39 and 40; the other process says where the error comes from."""

    def failing_in(hook):
        def fail(trainer):
            if trainer._accelerator.process_index == 1:
                raise ValueError(hook)

        return overriding(**{hook: fail})

    def run():
        return [
            *(
                train([RaisesOnOneProcess(name, ValueError(name), 1, process)])
                for process in (0, 1)
                for name in EVENTS
            ),
            *(train([], failing_in(hook)) for hook in HOOKS),
        ]

    expected = [
        *((0, *each) for each in EVENTS.items()),
        *((1, *each) for each in (EVENTS | HOOKS).items()),
    ]
    runs = zip(*on_processes(2, run), strict=True)
    for of_both, (failing, name, updates) in zip(runs, expected, strict=True):
        check_failed(of_both, updates, name, failing)
        other = of_both[1 - failing]["message"]
        assert f"Process {failing} raised ValueError" in other


def test_callbacks_that_communicate_still_meet_when_another_one_fails(on_processes):
    """An error before them in the list kept one process from them: the other hung."""

    def run():
        return [
            train([RaisesOnOneProcess(event, ValueError("first")), *others])
            for event, *others in (
                ("on_training_run_epoch_end", EarlyStoppingCallback()),
                ("on_train_step_end", TerminateOnNaNCallback()),
            )
        ]

    early_stopping, non_finite = zip(*on_processes(2, run), strict=True)
    check_failed(early_stopping, 10, "first")
    check_failed(non_finite, 1, "first")


def test_an_error_that_all_raise_wins_over_that_of_one_process(on_processes):
    def run():
        return train(
            [
                RaisesOnOneProcess("on_train_step_end", ValueError("of one"), 1, 0),
                TerminateOnNaNCallback(),
            ],
            BadOnOneProcess,
        )

    for result in on_processes(2, run):
        assert result["error"] == "NonFiniteLossError"


# -------------------------------------------------------------------- what stops a run


class BadOnOneProcess(Trainer):
    """Has a loss that is NaN on the second process, from some step on."""

    bad_step = 0

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        if self._accelerator.process_index == 1 and self.num_steps >= self.bad_step:
            output["loss"] = output["loss"] * torch.nan
        return output


class BadLater(BadOnOneProcess):
    bad_step = 4


def test_a_loss_that_is_nan_on_one_process_stops_both(on_processes):
    """Defects 21 and 40."""

    def run():
        return [
            train([TerminateOnNaNCallback(), *others], BadOnOneProcess)
            for others in ((), (RaisesOnOneProcess("on_train_step_end", None, 99),))
        ]

    for results in on_processes(2, run):
        for result in results:
            assert result["error"] == "NonFiniteLossError"
            assert result["updates"] == 1
            assert result["ends"] == ["stop", "end"]
            assert "at step 0" in result["message"]


def test_nothing_is_saved_when_the_loss_of_one_process_is_nan(on_processes, tmp_path):
    """The save looks itself, on all processes; the fifth update has the NaN."""

    def save(trainer, num_updates, **kwargs):
        trainer.save_checkpoint(tmp_path / f"{num_updates}.pt")

    def run():
        saves = At(on_train_update_end=save)
        return train([TerminateOnNaNCallback(), saves], BadLater)

    for result in on_processes(2, run):
        assert result["error"] == "NonFiniteLossError"
        assert result["updates"] == 6
    saved = {path.name for path in tmp_path.glob("*.pt")}
    assert {"1.pt", "4.pt"} <= saved
    assert "6.pt" not in saved


class OtherMetricOnEachProcess(Trainer):
    def eval_epoch_end(self):
        epoch = self.run_history.current_epoch
        sign = 1 - 2 * self._accelerator.process_index
        self.run_history.update_metric("score", sign * epoch)


def test_early_stopping_follows_the_main_process_where_metrics_differ(on_processes):
    """Defect 40: one score gets better from epoch to epoch, the other worse."""

    def run():
        return [
            train(
                [EarlyStoppingCallback(1, 0.0, "score", greater_is_better=greater)],
                OtherMetricOnEachProcess,
            )
            for greater in (True, False)
        ]

    for goes_on, stops in on_processes(2, run):
        assert goes_on["updates"] == 30
        assert stops["updates"] == 20
        assert stops["ends"] == ["stop", "end"]


def test_what_cannot_work_is_refused_on_both_with_the_reason(on_processes, tmp_path):
    def run():
        model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
        return [
            train([ConvertSyncBatchNormCallback()], model=model)["message"],
            train([], dataset=ones(1))["message"],
            train([], resume_from=tmp_path / "nowhere")["message"],
        ]

    for batch_norm, data, state in on_processes(2, run):
        assert "SyncBatchNorm needs GPUs" in batch_norm
        assert "GroupNorm" in batch_norm
        assert "1 samples for 2 processes" in data
        assert "There is no checkpoint folder" in state


# ------------------------------------------------------------- what the agreement costs


COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce"),
    *("all_to_all", "barrier", "broadcast", "broadcast_object_list", "gather"),
    *("gather_object", "reduce", "reduce_scatter_tensor", "scatter"),
    *("monitored_barrier", "recv", "send"),
)


def count_collectives(callbacks=(), trainer_class=Trainer, num_epochs=1, **kwargs):
    """Return what the library exchanges in each update and in all, beyond DDP."""
    calls, sizes, is_inside = 0, [0], False

    def counting(collective):
        def call(*args, **kwargs):
            nonlocal calls, is_inside
            if is_inside:  # objects go in two tensors
                return collective(*args, **kwargs)
            calls, is_inside = calls + 1, True
            sizes.extend(
                each.numel() for each in args if isinstance(each, torch.Tensor)
            )
            try:
                return collective(*args, **kwargs)
            finally:
                is_inside = False

        return call

    class CountsPerUpdate(trainer_class):
        counts = ()

        def optimizer_zero_grad(self):
            self.counts = (*self.counts, calls)
            super().optimizer_zero_grad()

    trainer = create_trainer(callbacks, lr=0.01, trainer_class=CountsPerUpdate)
    arguments = {"eval_dataset": ones(8), "per_device_batch_size": 1, **kwargs}
    with contextlib.ExitStack() as patches:
        for name in COLLECTIVES:
            counted = counting(getattr(torch.distributed, name))
            patches.enter_context(mock.patch.object(torch.distributed, name, counted))
        trainer.train(ones(200), num_epochs, **arguments)
    in_updates = [after - before for before, after in pairwise(trainer.counts)]
    return {"in updates": in_updates, "in all": calls, "largest": max(sizes)}


class CountsTokens(Trainer):
    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        return {**output, "num_items_in_batch": torch.tensor(1 + self.num_steps % 3)}


def test_collectives_cost_what_docs_scaling_says(on_processes, tmp_path):
    """Whatever the size of the model: at most one number, or a small object."""

    def run():
        listens = RaisesOnOneProcess("on_train_step_end", None, 10**6)
        usual = [TerminateOnNaNCallback(), ProgressBarCallback()]
        saves = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1)
        return {
            "plain": count_collectives(),
            "clipped": count_collectives(gradient_clip_norm=1.0),
            "accumulated": count_collectives(gradient_accumulation_steps=2),
            "saves": count_collectives([saves]),
            "usual": count_collectives(usual),
            "listened to": count_collectives([listens]),
            "counted": count_collectives(trainer_class=CountsTokens),
            "two epochs": count_collectives(num_epochs=2),
        }

    for counts in on_processes(2, run):
        in_updates = {name: count["in updates"] for name, count in counts.items()}
        for name in ("plain", "clipped", "accumulated", "saves"):
            assert set(in_updates[name]) == {0}, name
        for name in ("listened to", "counted"):
            assert set(in_updates[name]) == {1}, name
        # A look for NaN after 1, 2, 4, ... updates while they take under a second.
        assert set(in_updates["usual"]) == {0, 2}
        assert in_updates["usual"].count(2) < 10
        assert counts["two epochs"]["in all"] - counts["plain"]["in all"] == 9
        assert {count["largest"] for count in counts.values()} == {1}


# ----------------------------------------------------------------- a process that hangs


def hang_on_one_process(trainer, **kwargs):
    if trainer._accelerator.process_index == 1 and trainer.num_steps == 2:
        time.sleep(6)


@pytest.mark.slow
@pytest.mark.parametrize("event", ["on_train_step_end", "a step"])
def test_nobody_waits_longer_than_the_timeout_of_the_user(on_processes, event):
    def step(self, batch):
        hang_on_one_process(self)
        return Trainer.calculate_train_batch_loss(self, batch)

    def run():
        timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=2))
        is_step = event == "a step"
        result = train(
            [] if is_step else [At(**{event: hang_on_one_process})],
            overriding(calculate_train_batch_loss=step) if is_step else Trainer,
            accelerator_kwargs={"kwargs_handlers": [timeout]},
        )
        torch.distributed.destroy_process_group()
        return result

    waiting, _ = on_processes(2, run, timeout_seconds=60)
    assert waiting["updates"] <= 3
    assert waiting["error"] != "NoneType"
