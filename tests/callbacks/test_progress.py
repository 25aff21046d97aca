import re

import pytest
import torch
from torch.utils.data import IterableDataset

from pytorch_accelerated.callbacks import (
    LimitEvalStepsCallback,
    PrintProgressCallback,
    ProgressBarCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
    TrainerCallback,
    progress,
)
from pytorch_accelerated.tracking import LossTracker


@pytest.fixture
def bars(monkeypatch):
    """All bars that are opened, newest last."""
    opened = []

    class NotedBar(progress.tqdm):
        is_closed = False

        def __init__(self, *args, **kwargs):
            opened.append(self)
            super().__init__(*args, **kwargs)

        def close(self):
            self.is_closed = True
            super().close()

    monkeypatch.setattr(progress, "tqdm", NotedBar)
    return opened


class RaiseAt(TrainerCallback):
    def __init__(self, event, error):
        def fail(trainer, **kwargs):
            raise error

        setattr(self, event, fail)


def test_each_epoch_has_a_bar_of_its_length_that_is_full_at_the_end(
    create_trainer, samples, bars
):
    trainer = create_trainer([ProgressBarCallback])
    trainer.train(
        samples(5), num_epochs=2, eval_dataset=samples(3), per_device_batch_size=2
    )
    assert [(bar.n, bar.total) for bar in bars] == [(3, 3), (2, 2)] * 2
    assert all(bar.is_closed for bar in bars)


def test_a_limited_evaluation_has_a_bar_of_its_length(create_trainer, samples, bars):
    trainer = create_trainer([LimitEvalStepsCallback(2, False), ProgressBarCallback])
    trainer.evaluate(samples(5), per_device_batch_size=1)
    assert [(bar.n, bar.total) for bar in bars] == [(2, 2)]


def test_a_stream_of_unknown_length_has_a_bar_without_a_total(create_trainer, bars):
    class Stream(IterableDataset):
        def __iter__(self):
            for _ in range(3):
                yield torch.ones(1), torch.zeros(1)

    create_trainer([ProgressBarCallback]).train(
        Stream(), num_epochs=1, per_device_batch_size=1
    )
    assert [(bar.n, bar.total) for bar in bars] == [(3, None)]


@pytest.mark.parametrize("error", [StopTrainingError("x"), RuntimeError("x")])
@pytest.mark.parametrize(
    "event", ["on_train_step_end", "on_eval_step_end", "on_training_run_epoch_end"]
)
def test_bars_are_closed_however_a_run_ends(
    create_trainer, samples, bars, event, error, reaches_the_caller
):
    """Defects 39 and 56: the bar stayed open."""
    callback = ProgressBarCallback()
    trainer = create_trainer([callback, RaiseAt(event, error)])
    with reaches_the_caller(error):
        trainer.train(samples(1), num_epochs=1, eval_dataset=samples(1))
    assert bars
    assert all(bar.is_closed for bar in bars)
    assert (callback.pbar, callback.eval_pbar) == (None, None)


def test_other_processes_of_a_machine_show_nothing(create_trainer, bars):
    trainer = create_trainer()
    trainer._accelerator = type("Accelerator", (), {"is_local_main_process": False})
    callback = ProgressBarCallback()
    callback.on_train_epoch_start(trainer)
    callback.on_train_step_end(trainer, None, None, step=0)
    assert bars[0].disable


def test_the_loss_is_read_once_a_second(create_trainer, samples, bars, monkeypatch):
    class StepsTakeATenth(TrainerCallback):
        def on_train_step_start(self, trainer, **kwargs):
            now[0] += 0.1

    def count(tracker):
        reads.append(now[0])
        return average.fget(tracker)

    now, reads, average = [100.0], [], LossTracker.average
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(LossTracker, "average", property(count))
    trainer = create_trainer([StepsTakeATenth, ProgressBarCallback], lr=0)
    trainer.train(samples(50), 1, per_device_batch_size=1)
    assert len(reads) in (4, 5)
    assert bars[0].postfix == "loss=1"


def test_a_run_that_starts_amid_an_epoch_shows_where_it_is(create_trainer, bars):
    trainer = create_trainer()
    callback = ProgressBarCallback()
    callback.on_train_epoch_start(trainer)
    callback.on_train_step_end(trainer, None, None, step=7)
    assert bars[0].n == 8
    callback.on_train_epoch_end(trainer)


def test_a_log_file_gets_few_lines(create_trainer, samples, bars, capsys):
    trainer = create_trainer([StepBasedEvaluationCallback(1), ProgressBarCallback])
    trainer.train(samples(50), 1, eval_dataset=samples(1), per_device_batch_size=1)
    refreshes = re.findall(r"it/s\]", capsys.readouterr().err)
    # Each of the two bars at its start and at its end, none for those in between.
    assert len(refreshes) == 4


def test_the_start_and_end_of_runs_and_epochs_are_printed(
    create_trainer, samples, capsys
):
    trainer = create_trainer([PrintProgressCallback, StepBasedEvaluationCallback(1)])
    trainer.train(samples(1), num_epochs=2, eval_dataset=samples(1))
    trainer.evaluate(samples(1))
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [
        "Starting training run",
        "Starting epoch 1",
        "Starting eval epoch",
        "Starting epoch 2",
        "Starting eval epoch",
        "Finishing training run",
        "Starting evaluation run",
        "Starting eval epoch",
        "Finishing evaluation run",
    ]
