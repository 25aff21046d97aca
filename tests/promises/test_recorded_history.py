"""What RecordHistoryCallback records, and that its file outlives a crash."""

import csv
import math
import os
import signal
import warnings

import pytest
import torch
from torch import nn

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import RecordHistoryCallback, TrainerCallback
from pytorch_accelerated.errors import StopTrainingError, TrainingWarning
from pytorch_accelerated.tracking import InMemoryRunHistory

# Of the one weight after k updates, see tests/conftest.py.
LOSSES = [0.25**k for k in range(8)]
NORMS = [2 * 0.5**k for k in range(8)]


class Careless(RecordHistoryCallback):
    """Does not call the constructor."""

    every_n_updates = 3

    def __init__(self):
        pass


@pytest.mark.parametrize(
    "callback", [RecordHistoryCallback(every_n_updates=3), Careless()]
)
def test_means_are_recorded_every_n_updates_and_at_the_end_of_an_epoch(
    create_trainer, samples, callback
):
    history = create_trainer([callback]).train(
        samples(8), 2, per_device_batch_size=2, gradient_clip_norm=math.inf
    )

    def means(of):
        return [sum(of[:3]) / 3, of[3], sum(of[4:6]) / 2, sum(of[6:]) / 2]

    assert history.get_metric_values("train_loss") == pytest.approx(means(LOSSES))
    found = history.get_metric_values("train_gradient_norm")
    assert found == pytest.approx(means(NORMS))
    assert history.get_metric_values("learning_rate") == [0.25] * 4
    assert [each.step for each in history.records("train_loss")] == [3, 4, 6, 8]


def test_an_epoch_has_its_last_learning_rate_its_mean_norm_and_its_times(
    create_trainer, samples
):
    trainer = create_trainer([RecordHistoryCallback])
    history = trainer.train(
        samples(8),
        2,
        samples(2),
        per_device_batch_size=2,
        gradient_clip_norm=math.inf,
        create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.StepLR(
            optimizer, 4, 1.0
        ),
    )

    norms = history.get_metric_values("train_gradient_norm_epoch")
    assert norms == pytest.approx([sum(NORMS[:4]) / 4, sum(NORMS[4:]) / 4])
    assert history.get_metric_values("learning_rate") == [0.25, 0.25]
    training = history.get_metric_values("train_seconds_epoch")
    whole = history.get_metric_values("seconds_epoch")
    assert all(0 < a < b for a, b in zip(training, whole, strict=True))
    assert "train_loss" not in history.get_metric_names()


def test_an_epoch_that_is_resumed_at_its_end_has_its_learning_rate(
    create_trainer, samples, tmp_path
):
    def train(*callbacks, **kwargs):
        trainer = create_trainer([RecordHistoryCallback, *callbacks])
        return trainer.train(samples(2), 1, per_device_batch_size=1, **kwargs)

    train(At(2, lambda trainer: trainer.save_training_state(tmp_path / "state")))
    history = train(resume_from=tmp_path / "state")
    assert history.get_metric_values("learning_rate") == [0.25]
    assert "samples_per_second" not in history.get_metric_names()


def test_a_recorder_may_be_held_by_another_callback(create_trainer, samples):
    class Holds(TrainerCallback):
        inner = RecordHistoryCallback()

        def on_train_epoch_end(self, trainer, **kwargs):
            self.inner.on_train_epoch_end(trainer)

    history = create_trainer([Holds]).train(samples(2), 1)
    assert history.get_metric_values("learning_rate") == [0.25]


def test_an_infinite_limit_measures_the_norm_and_changes_no_bit(
    create_classifier, noise
):
    def train(**kwargs):
        model = create_classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, (), seed=1)
        trainer.train(noise(40), 2, **kwargs)
        return trainer

    measured, plain = train(gradient_clip_norm=math.inf), train()

    assert plain.gradient_norm is None
    assert measured.gradient_norm > 0
    for a, b in zip(measured.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


class At(TrainerCallback):
    """Does something after an update."""

    def __init__(self, num_updates, action):
        self.num_updates, self.action = num_updates, action

    def on_train_update_end(self, trainer, num_updates=0, **kwargs):
        if num_updates == self.num_updates:
            self.action(trainer)


def lines_of(file):
    """Return what a file says of the run, but for its times."""
    if file.suffix == ".csv":
        with open(file, newline="") as rows:
            records = list(csv.DictReader(rows))
    else:
        records = [
            {key: str(value) for key, value in record._asdict().items()}
            for record in InMemoryRunHistory.load_jsonl(file).records()
        ]
    return sorted(
        (each["name"], each["value"], each["epoch"], each["step"])
        for each in records
        if "second" not in each["name"]
    )


@pytest.mark.parametrize("name", ["history.jsonl", "of a run/history.csv"])
def test_the_file_outlives_a_kill_and_a_resumed_run_writes_nothing_twice(
    create_trainer, samples, tmp_path, name
):
    file, state = tmp_path / name, tmp_path / "state"

    def train(file, *callbacks, **kwargs):
        recorder = RecordHistoryCallback(file, every_n_updates=1)
        trainer = create_trainer([*callbacks, recorder])
        trainer.train(samples(8), 2, samples(3), per_device_batch_size=2, **kwargs)
        return trainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads
        pid = os.fork()
    if pid == 0:
        try:
            train(
                file,
                At(3, lambda trainer: trainer.save_training_state(state)),
                At(5, lambda trainer: os.kill(os.getpid(), signal.SIGKILL)),
            )
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    killed = {step for name, _, _, step in lines_of(file) if name == "train_loss"}
    trainer = train(file, resume_from=state)
    trainer.evaluate(samples(4))
    whole = train(tmp_path / f"whole{file.suffix}")
    whole.evaluate(samples(4))

    assert killed == {"1", "2", "3", "4", "5"}
    assert lines_of(file) == lines_of(tmp_path / f"whole{file.suffix}")
    assert len(lines_of(file)) == 8 * 2 + 2 * 2 + 1


def test_what_is_new_is_found_without_reading_what_is_old(
    create_trainer, samples, tmp_path, monkeypatch
):
    """Each interval of a long run would take longer than the one before."""
    read = []
    get_metric_values = InMemoryRunHistory.get_metric_values
    monkeypatch.setattr(
        InMemoryRunHistory,
        "get_metric_values",
        lambda *args: read.append(args) or get_metric_values(*args),
    )
    callbacks = [RecordHistoryCallback(tmp_path / "h.jsonl", every_n_updates=1)]
    create_trainer(callbacks).train(samples(4), 2, samples(1), 1)
    assert read == []


def test_a_trainer_that_only_evaluates_leaves_the_file_alone(
    create_trainer, samples, tmp_path
):
    file = tmp_path / "history.jsonl"
    file.write_text("of the training\n")

    create_trainer([RecordHistoryCallback(file)]).evaluate(samples(4))

    assert file.read_text() == "of the training\n"


def test_a_write_that_fails_warns_and_the_next_one_writes_everything(
    create_trainer, samples, tmp_path
):
    file = tmp_path / "folder" / "history.jsonl"

    def block(trainer):
        file.unlink()
        file.parent.rmdir()
        file.parent.write_text("a file where a folder is to be")

    callbacks = [
        RecordHistoryCallback(file, every_n_updates=1),
        At(2, block),
        At(3, lambda trainer: file.parent.unlink()),
    ]
    with pytest.warns(TrainingWarning, match="could not be written"):
        history = create_trainer(callbacks).train(samples(4), 1, None, 1)

    written = InMemoryRunHistory.load_jsonl(file)
    assert written.records() == history.records()


def test_the_file_has_what_the_history_has_when_a_trainer_is_used_again(
    create_trainer, samples, tmp_path
):
    file = tmp_path / "history.jsonl"
    trainer = create_trainer([RecordHistoryCallback(file)])
    for kwargs in ({}, {"reset_run_history": False}, {}):
        trainer.train(samples(4), 2, **kwargs)
        trainer.evaluate(samples(4))

        written = InMemoryRunHistory.load_jsonl(file)
        assert written.to_dict()["metrics"] == trainer.run_history.to_dict()["metrics"]


def train_in_parts(folder, num_processes):
    """Train on one process or two; stop between two records, and resume."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(33, 6, generator=generator)
    dataset = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))

    def stop(trainer):
        trainer.save_training_state(folder / "state")
        raise StopTrainingError("stopped")

    def train(file, *callbacks, **kwargs):
        torch.manual_seed(2)
        model = nn.Linear(6, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        recorder = RecordHistoryCallback(folder / file, every_n_updates=2)
        trainer = Trainer(
            model, nn.MSELoss(), optimizer, [recorder, *callbacks], seed=1
        )
        return trainer.train(
            dataset,
            2,
            per_device_batch_size=8 // num_processes,
            gradient_clip_norm=math.inf,
            **kwargs,
        ).get_metric_values("train_loss")

    whole = train("whole.jsonl")
    train("parts.jsonl", At(3, stop))
    assert train("parts.jsonl", resume_from=folder / "state") == whole
    assert lines_of(folder / "parts.jsonl") == lines_of(folder / "whole.jsonl")
    return whole


def test_two_processes_record_what_one_would_in_one_file(on_processes, tmp_path):
    expected = train_in_parts(tmp_path / "one", 1)

    for found in on_processes(2, train_in_parts, tmp_path / "two", 2):
        assert found == pytest.approx(expected, rel=1e-5)
    one, two = (lines_of(tmp_path / n / "whole.jsonl") for n in ("one", "two"))
    assert [line[0] for line in one] == [line[0] for line in two]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "history.txt"}, r"must end in \.jsonl .* or \.csv"),
        ({"every_n_updates": 0}, "at least 1, got 0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        RecordHistoryCallback(**arguments)


def test_a_history_without_records_is_refused_before_the_run(
    create_trainer, samples, own_history, tmp_path
):
    callback = RecordHistoryCallback(tmp_path / "history.csv")
    trainer = create_trainer([callback], run_history=own_history())

    with pytest.raises(TypeError, match="has a OwnHistory"):
        trainer.train(samples(4), 1)
    assert trainer.num_updates == 0
