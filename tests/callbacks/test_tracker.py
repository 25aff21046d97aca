"""What trackers are sent, seen by one that keeps it all in a list."""

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch.utils.data import TensorDataset

from pytorch_accelerated.callbacks import (
    RecordHistoryCallback,
    StepBasedEvaluationCallback,
    TrackerCallback,
    TrainerCallback,
    tracker,
)
from pytorch_accelerated.errors import TrainingWarning
from pytorch_accelerated.trainer import Trainer


class Kept(GeneralTracker):
    """Keeps what it is sent; fails at what it is told to fail at."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self, fails_at=()):
        super().__init__()
        self.calls, self.settings, self.sent, self.pictures = [], {}, [], {}
        self.fails_at = fails_at

    @property
    def tracker(self):
        return self

    def _note(self, call):
        self.calls.append(call)
        if call in self.fails_at:
            raise ConnectionError("no route to host")

    def start(self):
        self._note("start")

    def store_init_configuration(self, values):
        self._note("store")
        self.settings = values

    def log(self, values, step=None, **kwargs):
        self._note("log")
        self.sent.append((step, values))

    def log_images(self, values, step=None, **kwargs):
        self.pictures.update({(name, step): value for name, value in values.items()})

    def finish(self):
        self._note("finish")

    def values_of(self, name):
        return [(step, values[name]) for step, values in self.sent if name in values]


@pytest.fixture
def kept():
    return Kept()


def test_each_value_is_sent_once_at_its_update(create_trainer, samples, kept):
    callback = TrackerCallback(kept, config={"augment": {"flip": True}})
    trainer = create_trainer([StepBasedEvaluationCallback(3), callback])
    trainer.train(samples(4), 2, eval_dataset=samples(1), per_device_batch_size=1)

    losses = [(4, (1 + 0.25 + 0.25**2 + 0.25**3) / 4), (8, 0.25**4 * losses_of_4 / 4)]
    assert kept.values_of("train_loss_epoch") == losses
    assert kept.values_of("eval_loss_epoch") == [(4, 0.25**4), (8, 0.25**8)]
    intermediate = kept.values_of("intermediate_eval_loss")
    assert intermediate == [(3, 0.25**3), (6, 0.25**6)]
    assert set(kept.values_of("epoch")) == {(3, 1), (4, 1), (6, 2), (8, 2)}
    assert all(rate > 0 for _, rate in kept.values_of("samples_per_second"))
    assert kept.values_of("train_gradient_norm_epoch") == []
    assert kept.values_of("learning_rate") == [(4, 0.25), (8, 0.25)]
    assert kept.calls[:2] == ["start", "store"]
    assert kept.calls[2:] == ["log"] * (len(kept.calls) - 3) + ["finish"]
    settings = kept.settings
    assert settings["augment/flip"] is True
    assert settings["optimizer_arguments/lr"] == 0.25
    assert settings["train_dl_kwargs/batch_size"] == settings["num_parameters"] == 1
    assert {type(value) for value in settings.values()} <= {bool, int, float, str}


losses_of_4 = 1 + 0.25 + 0.25**2 + 0.25**3


class WithAccuracy(Trainer):
    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        return {**output, "accuracy": batch[0].mean()}


def test_means_of_intervals_are_those_of_their_samples(create_trainer, kept):
    """The last batch of an epoch has one sample, and its interval one update."""
    inputs = torch.tensor([[1.0], [1.0], [2.0], [2.0], [4.0]])
    trainer = create_trainer(
        [TrackerCallback(kept, every_n_updates=2)], lr=0.0, trainer_class=WithAccuracy
    )
    trainer.train(
        TensorDataset(inputs, torch.zeros(5, 1)),
        num_epochs=2,
        per_device_batch_size=2,
        gradient_clip_norm=1e9,
        train_dataloader_kwargs={"shuffle": False},
    )

    assert kept.values_of("train_loss") == [(2, 2.5), (3, 16), (4, 1), (6, 8)]
    assert [v for _, v in kept.values_of("train_accuracy")] == pytest.approx(
        [1.5, 4, 1, 8 / 3]
    )
    assert kept.values_of("train_gradient_norm") == [(2, 5), (3, 32), (4, 2), (6, 20)]


def test_what_is_recorded_amid_epochs_is_sent_from_there(create_trainer, samples, kept):
    """Two curves of other intervals had one name."""
    for every in (1, 3):
        kept.sent.clear()
        callbacks = [
            RecordHistoryCallback(every_n_updates=every),
            TrackerCallback(kept, every_n_updates=2),
        ]
        create_trainer(callbacks).train(samples(6), 1, per_device_batch_size=1)
        steps = [step for step, _ in kept.values_of("train_loss")]
        assert steps == ([1, 2, 3, 4, 5, 6] if every == 1 else [2, 3, 4, 6])
    assert kept.values_of("train_loss")[1] == (3, 0.25**2)


class Evaluates(TrainerCallback):
    """Evaluates amid the first epoch; the last time it fails."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_train_update_end(self, trainer, *, num_updates=0, **kwargs):
        if num_updates in (1, 2):
            trainer.evaluate(self.dataset)
        if num_updates == 3:
            with pytest.raises(TypeError):
                trainer.evaluate([1])


def test_evaluations_belong_to_the_run_that_they_are_amid_or_after(
    create_trainer, samples, kept
):
    trainer = create_trainer([Evaluates(samples(1)), TrackerCallback(kept)])
    trainer.evaluate(samples(1))
    assert kept.values_of("evaluation_loss") == [(0, 1)]
    assert kept.calls == ["start", "store", "log", "finish"]
    kept.sent.clear()
    kept.calls.clear()

    trainer.train(samples(4), 1, per_device_batch_size=1)
    assert kept.calls.count("start") == kept.calls.count("finish") == 1
    trainer.evaluate(samples(1))
    trainer.train(samples(1), 1)

    evaluations = kept.values_of("evaluation_loss")
    assert evaluations == [(1, 0.25), (2, 0.25**2), (4, 0.25**4), (1, 0.25**5)]
    assert [step for step, _ in kept.values_of("train_loss_epoch")] == [4, 1]
    assert trainer._accelerator.trackers == []


@pytest.mark.parametrize("fails_at", ["start", "store", "log", "finish"])
def test_a_tracker_that_fails_is_warned_of_once(
    create_trainer, samples, kept, fails_at
):
    failing = Kept(fails_at=[fails_at])
    failing.name = "failing"
    callback = TrackerCallback([failing, kept], every_n_updates=1)
    trainer = create_trainer([callback])
    with pytest.warns(TrainingWarning, match="'failing' failed to .*no route") as given:
        trainer.train(samples(4), 3, eval_dataset=samples(1), per_device_batch_size=1)

    assert len(given) == 1
    assert len(kept.values_of("train_loss")) == 12
    if fails_at == "log":  # at the first update, and then at the ends of epochs
        assert failing.calls.count("log") == 1 + 3 * 3
    assert trainer._accelerator.trackers == []


def test_a_tracker_that_failed_is_tried_again_after_an_epoch(
    create_trainer, samples, kept
):
    class Evaluates(TrainerCallback):
        def on_training_run_epoch_end(self, trainer, **kwargs):
            kept.fails_at = ()
            trainer.evaluate(samples(1))

    kept.fails_at = ["log"]
    trainer = create_trainer([TrackerCallback(kept, every_n_updates=1), Evaluates()])
    with pytest.warns(TrainingWarning, match="no route"):
        trainer.train(samples(1), 2)
    assert [step for step, _ in kept.values_of("evaluation_loss")] == [1, 2]


def test_a_run_that_ends_with_an_error_is_sent_and_ended(create_trainer, samples, kept):
    class Fails(TrainerCallback):
        def on_training_run_epoch_end(self, trainer, **kwargs):
            trainer.run_history.update_metric("last", 1)
            raise RuntimeError("for some reason")

    trainer = create_trainer([Fails(), TrackerCallback(kept)])
    with pytest.raises(RuntimeError, match="for some reason"):
        trainer.train(samples(1), 1)

    assert kept.values_of("last") == [(1, 1)]
    assert kept.calls[-1] == "finish"
    assert kept.calls.count("finish") == 1


def test_a_resumed_run_sends_what_is_new(create_trainer, samples, kept, tmp_path):
    class Saves(TrainerCallback):
        def on_train_update_end(self, trainer, *, num_updates=0, **kwargs):
            if num_updates == 3:
                trainer.save_training_state(tmp_path / "state")

    first = create_trainer([Saves(), TrackerCallback(Kept(), every_n_updates=2)])
    first.train(samples(2), 3, per_device_batch_size=1)
    second = create_trainer([Saves(), TrackerCallback(kept, every_n_updates=2)])
    second.train(samples(2), 3, per_device_batch_size=1, resume_from=tmp_path / "state")

    assert [step for step, _ in kept.values_of("train_loss_epoch")] == [4, 6]
    # The first interval has the losses of before and after the state.
    assert kept.values_of("train_loss")[0] == (4, (0.25**2 + 0.25**3) / 2)


def test_matrices_are_sent_as_pictures_and_figures_as_figures(
    create_trainer, samples, kept
):
    matplotlib = pytest.importorskip("matplotlib.figure")
    figure = matplotlib.Figure(figsize=(2, 1), dpi=50, facecolor="#ff0000")

    class Draws(Trainer):
        def eval_epoch_end(self):
            self.run_history.update_metric("confusion", torch.tensor([[0, 2], [1, 2]]))
            self.run_history.update_metric("holes", np.array([[np.nan, np.inf]]))
            self.run_history.update_metric("figure", figure)
            self.run_history.update_metric("note", "a text")

    trainer = create_trainer([TrackerCallback(kept)], trainer_class=Draws)
    trainer.train(samples(1), 1, eval_dataset=samples(1))

    (confusion,) = kept.pictures["confusion", 1]
    assert confusion.shape == (256, 256, 3)
    assert confusion.dtype == np.uint8
    corners = [confusion[y, x].tolist() for y, x in [(0, 0), (0, 255), (255, 0)]]
    assert corners == [[255, 255, 255], [8, 64, 140], [132, 160, 198]]
    (drawn,) = kept.pictures["figure", 1]
    assert drawn.shape == (50, 100, 3)
    assert drawn[25, 50].tolist() == [255, 0, 0]
    assert set(kept.pictures) == {("confusion", 1), ("holes", 1), ("figure", 1)}

    kept.log_figure = lambda figure, file: setattr(kept, "file", (file, figure))
    trainer.train(samples(1), 1, eval_dataset=samples(1))
    assert kept.file == ("figure_1.png", figure)


def test_a_careless_subclass_and_a_history_of_the_user_s(
    create_trainer, samples, kept, own_history
):
    class Careless(TrackerCallback):
        def __init__(self):
            self.trackers = [kept]

    class Records(TrainerCallback):
        def on_training_run_epoch_end(self, trainer, **kwargs):
            trainer.run_history.update_metric("late", 1)

    history = own_history()
    history.records = []  # a name of its own, whatever the library's has
    trainer = create_trainer([Careless(), Records()], run_history=history)
    for _ in range(2):
        trainer.train(samples(2), 2, per_device_batch_size=1)
    steps = [step for step, _ in kept.values_of("train_loss_epoch")]
    assert steps == [step for step, _ in kept.values_of("late")] == [2, 4, 2, 4]


def test_log_with_is_honoured_unless_the_script_starts_the_trackers_found_103(
    create_trainer, samples, kept
):
    trainer = create_trainer(accelerator_kwargs={"log_with": kept})
    trainer.train(samples(1), 1)
    assert kept.values_of("train_loss_epoch") == [(1, 1)]

    class Own(Trainer):
        """Sends to the trackers by itself, as scripts for 0.1.61 had to."""

        def training_run_start(self):
            self._accelerator.init_trackers("project")

        def training_run_epoch_end(self):
            self._accelerator.log({"mine": 1}, step=1)

    own = Kept()
    trainer = create_trainer(accelerator_kwargs={"log_with": own}, trainer_class=Own)
    trainer.train(samples(1), 1)
    assert own.calls == ["start", "log"]
    assert own.sent == [(1, {"mine": 1})]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("tensorbord",),
            ValueError,
            "Did you mean 'tensorboard'.*aim, clearml, comet",
        ),
        ((["comet_ml"],), ImportError, "pip install comet_ml$"),
        (("wandb",), ImportError, r"pip install 'pytorch-accelerated\[wandb\]'"),
        ((Kept,), ValueError, "objects of subclasses of accelerate"),
    ],
)
def test_a_tracker_that_cannot_be_had_is_refused(
    monkeypatch, arguments, error, message
):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(error, match=message):
        TrackerCallback(*arguments)


def test_wrong_arguments_are_refused(create_trainer, samples, kept, tmp_path):
    with pytest.raises(ValueError, match="every_n_updates must be at least 1, got 0"):
        TrackerCallback(kept, every_n_updates=0)
    with pytest.raises(ValueError, match=r"for each of \['kept'\].*got \['tags'\]"):
        TrackerCallback(kept, init_kwargs={"tags": ["a"]})
    (tmp_path / "file").write_text("")

    class Folder(Kept):
        requires_logging_directory = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tracker.KNOWN, "folder", Folder)
        callback = TrackerCallback("folder", logging_dir=tmp_path / "file")
        with pytest.raises(ValueError, match=r"cannot write to the folder .*file"):
            create_trainer([callback]).train(samples(1), 1)
