import re

import pytest
from toys import At, Stream

from pytorch_accelerated.callbacks import (
    LimitEvalStepsCallback,
    LogMetricsCallback,
    PrintProgressCallback,
    ProgressBarCallback,
    SaveTrainingStateCallback,
    StopTrainingError,
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
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    return opened


def raise_at(event, error):
    def fail(trainer, **kwargs):
        raise error

    return At(**{event: fail})


def test_each_epoch_has_a_bar_of_its_length_that_is_full_at_the_end(
    create_trainer, samples, bars
):
    def lengths():
        shown = [(bar.n, bar.total) for bar in bars]
        assert all(bar.is_closed for bar in bars)
        bars.clear()
        return shown

    trainer = create_trainer([ProgressBarCallback])
    trainer.train(samples(5), 2, samples(3), per_device_batch_size=2)
    assert lengths() == [(3, 3), (2, 2)] * 2
    trainer.train(Stream(samples(3)), 1, per_device_batch_size=1)
    assert lengths() == [(3, None)]
    trainer = create_trainer([LimitEvalStepsCallback(2, False), ProgressBarCallback])
    trainer.evaluate(samples(5), per_device_batch_size=1)
    assert lengths() == [(2, 2)]


@pytest.mark.parametrize("error", [StopTrainingError("x"), RuntimeError("x")])
@pytest.mark.parametrize(
    "event", ["on_train_step_end", "on_eval_step_end", "on_training_run_epoch_end"]
)
def test_bars_are_closed_however_a_run_ends(
    create_trainer, samples, bars, event, error, reaches_the_caller
):
    """Defects 39 and 56: the bar stayed open."""
    callback = ProgressBarCallback()
    trainer = create_trainer([callback, raise_at(event, error)])
    with reaches_the_caller(error):
        trainer.train(samples(1), num_epochs=1, eval_dataset=samples(1))
    assert bars
    assert all(bar.is_closed for bar in bars)
    assert (callback.pbar, callback.eval_pbar) == (None, None)


def test_other_processes_of_a_machine_show_nothing(create_trainer, bars, capsys):
    trainer = create_trainer()
    trainer._accelerator = type("Accelerator", (), {"is_local_main_process": False})
    callback = ProgressBarCallback()
    callback.on_train_epoch_start(trainer)
    callback._next_read = 0
    callback.on_train_step_end(trainer, None, None, step=0)
    assert bars[0].disable
    assert capsys.readouterr() == ("", "")


def steps_take(monkeypatch, seconds):
    """Move the clock, by which the callbacks go, on by some seconds a step."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[-1])

    def move(trainer, **kwargs):
        now.append(now[-1] + seconds)

    return At(on_train_step_start=move, on_eval_step_start=move)


def test_the_loss_is_read_once_a_second(create_trainer, samples, bars, monkeypatch):
    def count(tracker):
        reads.append(tracker)
        return average.fget(tracker)

    reads, average = [], LossTracker.average
    monkeypatch.setattr(LossTracker, "average", property(count))
    trainer = create_trainer([steps_take(monkeypatch, 0.1), ProgressBarCallback], lr=0)
    trainer.train(samples(50), 1, per_device_batch_size=1)
    assert len(reads) in (4, 5)
    assert bars[0].postfix == "loss 1.000, 10 samples/s"


def test_a_run_that_starts_amid_an_epoch_shows_where_it_is(create_trainer, bars):
    trainer = create_trainer()
    callback = ProgressBarCallback()
    callback.on_train_epoch_start(trainer)
    callback.on_train_step_end(trainer, None, None, step=7)
    assert bars[0].n == 8
    callback.on_train_epoch_end(trainer)


def test_a_file_gets_a_plain_line_a_minute_and_no_bar(
    create_trainer, samples, capsys, monkeypatch
):
    trainer = create_trainer([steps_take(monkeypatch, 25), ProgressBarCallback], lr=0)
    trainer.train(samples(8), 2, eval_dataset=samples(4), per_device_batch_size=1)
    epochs = [
        [
            f"epoch {epoch}/2, 38%, loss 1.000, 0.04 samples/s",
            f"epoch {epoch}/2, 75%, loss 1.000, 0.04 samples/s",
            "evaluation, 75%, loss 1.000",
        ]
        for epoch in (1, 2)
    ]
    output = capsys.readouterr()
    assert output.out.splitlines() == epochs[0] + epochs[1]
    assert output.err == ""


@pytest.mark.parametrize(
    ("limit", "accumulation", "totals"),
    [(7, 1, [5, 2]), (2, 2, [4]), (3, 2, [5]), (4, 2, [5, 2])],
)
def test_the_total_is_of_the_updates_that_are_left(
    create_trainer, samples, bars, limit, accumulation, totals
):
    create_trainer([ProgressBarCallback]).train(
        samples(5),
        num_epochs=9,
        per_device_batch_size=1,
        gradient_accumulation_steps=accumulation,
        max_num_train_steps=limit,
    )
    assert [(bar.n, bar.total) for bar in bars] == [(n, n) for n in totals]


def test_a_bar_stays_where_no_row_takes_its_place_and_where_a_run_broke(
    create_trainer, samples, bars
):
    class LogElsewhere(LogMetricsCallback):
        def log_metrics(self, trainer, metrics):
            pass

    def train(*callbacks):
        bars.clear()
        trainer = create_trainer([ProgressBarCallback, *callbacks])
        trainer.train(samples(1), 1, eval_dataset=samples(1))
        return [bar.leave for bar in bars]

    assert train() == train(LogElsewhere) == [True, True]
    assert train(LogMetricsCallback) == [False, False]
    stop = raise_at("on_train_step_end", StopTrainingError("x"))
    assert train(LogMetricsCallback, stop) == [True]


def test_a_run_says_where_it_starts_and_where_it_ends(
    create_trainer, samples, capsys, tmp_path
):
    def train(**kwargs):
        trainer.train(
            samples(4), 12, eval_dataset=samples(1), per_device_batch_size=2, **kwargs
        )
        return re.sub(r"\d+\.\d+s", "?s", capsys.readouterr().out).splitlines()

    trainer = create_trainer([PrintProgressCallback])
    start = "Training starts: epoch 1/12, update 0/24, cpu"
    assert train() == [start, "Training ends: epoch 12/12, update 24/24, ?s"]
    trainer.evaluate(samples(1))
    assert capsys.readouterr().out == ""
    assert train(max_num_train_steps=3)[::2] == [
        "Training starts: epoch 1/2, update 0/3, cpu",
        "Training ends: epoch 2/2, update 3/3, ?s",
    ]
    save = SaveTrainingStateCallback(tmp_path)
    stop = raise_at("on_training_run_epoch_end", StopTrainingError("x"))
    trainer = create_trainer([PrintProgressCallback, save, stop])
    assert train()[::2] == [start, "Training ends: epoch 1/12, update 2/24, ?s"]
    trainer = create_trainer([PrintProgressCallback])
    assert train(resume_from=tmp_path / "final")[1:] == [
        "Training starts: epoch 2/12, update 2/24, cpu",
        "Training ends: epoch 12/12, update 24/24, ?s",
    ]
    with pytest.raises(RuntimeError):
        create_trainer(
            [PrintProgressCallback, raise_at("on_train_step_end", RuntimeError())]
        ).train(samples(1), 1)
    assert capsys.readouterr().out == "Training starts: epoch 1/1, update 0/1, cpu\n"
