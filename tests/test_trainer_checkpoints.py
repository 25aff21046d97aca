"""Saving and resuming a run, in one process."""

import os
import sys
import warnings
from collections import Counter
from functools import partial
from unittest import mock

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import RandomSampler, Sampler, TensorDataset
from toys import At, Keeps, Numbers, OneByOne, Stream, one_weight

from pytorch_accelerated import checkpoint, distributed
from pytorch_accelerated.callbacks import (
    LimitBatchesCallback,
    ModelEmaCallback,
    SaveTrainingStateCallback,
    TrainerCallback,
)
from pytorch_accelerated.errors import (
    CheckpointError,
    StopTrainingError,
    TrainingWarning,
)
from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.trainer import Trainer


class Augmented(OneByOne):
    """Adds random numbers to the samples of another dataset."""

    def __getitem__(self, index):
        inputs, target = self.dataset[index]
        return inputs + torch.randn(6), target


class StopsAt(TrainerCallback):
    """Saves the state in an event, and ends the run as if it had been killed."""

    def __init__(self, event, folder, at=1):
        self.folder, self.at, self.num_calls = folder, at, 0
        setattr(self, event, self.save_and_stop)

    def save_and_stop(self, trainer, **kwargs):
        self.num_calls += 1
        if self.num_calls == self.at:
            trainer.save_training_state(self.folder)
            raise Killed


class Killed(BaseException):
    pass


@pytest.fixture
def train(noise, create_classifier):
    """Train on 5 batches for 3 epochs, with dropout, augmentation and a schedule."""

    def train(callbacks=(), resume_from=None, num_epochs=3, num_workers=0, **kwargs):
        model = create_classifier(dropout=0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(),
            optimizer,
            callbacks,
            seed=kwargs.pop("seed", 5),
        )
        arguments = {
            "eval_dataset": noise(6),
            "per_device_batch_size": 4,
            "create_scheduler_fn": CosineLrScheduler.create_scheduler_fn(),
            "train_dataloader_kwargs": {"num_workers": num_workers},
            **kwargs,
        }
        trainer.train(
            Augmented(noise(18)), num_epochs, resume_from=resume_from, **arguments
        )
        return trainer

    return train


def assert_same_end(resumed, uninterrupted):
    torch.testing.assert_close(
        resumed.model.state_dict(), uninterrupted.model.state_dict(), rtol=0, atol=0
    )
    torch.testing.assert_close(
        resumed.optimizer.state_dict(),
        uninterrupted.optimizer.state_dict(),
        rtol=0,
        atol=0,
    )
    assert metrics(resumed) == metrics(uninterrupted)
    for name in ("num_updates", "num_steps", "num_samples_seen"):
        assert getattr(resumed, name) == getattr(uninterrupted, name), name
    assert resumed.run_history.current_epoch == uninterrupted.run_history.current_epoch


def metrics(trainer):
    return [record[:4] for record in trainer.run_history.records()]


@pytest.mark.parametrize(
    ("event", "at", "accumulation"),
    [
        ("on_train_epoch_start", 2, 1),
        ("on_train_update_end", 1, 1),
        ("on_train_update_end", 2, 2),
        ("on_train_update_end", 3, 2),
        ("on_train_step_end", 8, 1),
        ("on_train_step_end", 8, 2),
        ("on_train_step_end", 10, 1),
        ("on_train_epoch_end", 1, 1),
        ("on_eval_epoch_end", 2, 1),
        ("on_training_run_epoch_end", 1, 1),
        ("on_training_run_epoch_end", 3, 1),
    ],
)
def test_a_run_that_is_resumed_ends_like_one_that_was_never_stopped(
    train, tmp_path, event, at, accumulation
):
    """Defects 8 and 47: epochs were repeated, orders changed, and metrics were lost."""
    accumulated = {"gradient_accumulation_steps": accumulation}
    with pytest.raises(Killed):
        train([StopsAt(event, tmp_path / "state", at)], **accumulated)
    torch.manual_seed(123)

    resumed = train(resume_from=tmp_path / "state", seed=99, **accumulated)

    assert_same_end(resumed, train(**accumulated))


@pytest.mark.parametrize("then", [0, 2])
def test_a_run_can_be_resumed_with_another_number_of_workers(train, tmp_path, then):
    with pytest.raises(Killed):
        train(
            [StopsAt("on_train_step_end", tmp_path / "state", 7)],
            num_workers=0 if then else 2,
        )

    assert_same_end(train(resume_from=tmp_path / "state", num_workers=then), train())


@pytest.mark.parametrize("limit", [None, 7])
def test_a_run_that_has_ended_has_nothing_left_to_train(train, tmp_path, limit, capsys):
    """Defect 8: a finished run trained one more step."""
    whole = train([SaveTrainingStateCallback(tmp_path)], max_num_train_steps=limit)

    resumed = train(resume_from=tmp_path / "final", max_num_train_steps=limit)

    assert_same_end(resumed, whole)
    assert f"{tmp_path}/final: nothing is left to train" in capsys.readouterr().out


def test_a_run_saved_at_the_update_that_a_limit_allows_as_the_last(train, tmp_path):
    """Its epoch has yet to be evaluated, but no update is left."""
    limited = {"max_num_train_steps": 7}
    with pytest.raises(Killed):
        train([StopsAt("on_train_update_end", tmp_path / "state", 7)], **limited)

    assert_same_end(train(resume_from=tmp_path / "state", **limited), train(**limited))


def test_a_finished_run_on_a_stream_has_nothing_left_to_train(
    create_trainer, samples, tmp_path
):
    arguments = {"per_device_batch_size": 1, "max_num_train_steps": 3}
    stream = Stream(samples(5))
    create_trainer([SaveTrainingStateCallback(tmp_path)]).train(stream, 2, **arguments)

    resumed = create_trainer()
    resumed.train(stream, 2, resume_from=tmp_path / "final", **arguments)

    assert resumed.num_updates == 3
    assert resumed.model.weight.item() == 0.5**3


def test_a_state_that_was_saved_before_any_run_starts_one(
    create_trainer, samples, tmp_path
):
    trainer = create_trainer()
    trainer.model.weight.data.fill_(4.0)
    trainer.save_training_state(tmp_path / "state")

    resumed = create_trainer()
    resumed.train(samples(2), 2, resume_from=tmp_path / "state")

    assert resumed.model.weight.item() == 1.0


def test_auto_reads_no_file_more_often_than_it_has_to_found_94(
    create_trainer, samples, tmp_path
):
    """found 94: what had been found whole was read, to be checked, again."""

    def train():
        trainer = create_trainer([SaveTrainingStateCallback(tmp_path)])
        trainer.train(samples(1), 1, resume_from="auto")

    train()
    opened = Counter()
    is_on = True

    def note(event, arguments):
        if is_on and event == "open":
            opened[str(arguments[0])] += 1

    sys.addaudithook(note)
    train()
    is_on = False
    # To compare its checksum, to look into the archive; torch itself opens it unheard.
    assert opened[str(tmp_path / "final" / "optimizer.bin")] <= 4


def test_auto_takes_the_newest_state_of_all_callbacks_found_84(
    create_trainer, samples, tmp_path, capsys
):
    """found 84: it looked into the folder of the first alone."""

    def train(num_epochs, first_saves=False):
        never, always = (
            SaveTrainingStateCallback(
                tmp_path / name, save_every_n_epochs=every, save_at_end=False
            )
            for name, every in (("first", 2 if first_saves else 100), ("second", 1))
        )
        trainer = create_trainer([never, always])
        trainer.train(samples(1), num_epochs, resume_from="auto")
        return trainer.model.weight.item()

    assert train(3) == 0.5**3
    out = capsys.readouterr().out
    assert f"No training state in {tmp_path}/first, {tmp_path}/second" in out
    assert train(5, first_saves=True) == 0.5**5
    assert f"Resuming from {tmp_path}/second/epoch_3" in capsys.readouterr().out
    assert train(5) == 0.5**5
    assert f"Resuming from {tmp_path}/second/epoch_5" in capsys.readouterr().out


def test_auto_needs_to_know_where_to_look(create_trainer, samples):
    with pytest.raises(ValueError, match=r"has no such callback\. Add one, or give"):
        create_trainer().train(samples(2), 1, resume_from="auto")


def test_all_processes_hear_that_the_newest_state_cannot_be_looked_for(
    create_trainer, samples, tmp_path, monkeypatch
):
    """The main process, which looks, would leave the others waiting."""
    error, heard = CheckpointError("no file can be opened"), []
    monkeypatch.setattr(checkpoint, "newest", mock.Mock(side_effect=error))
    monkeypatch.setattr(distributed, "raise_on_all", heard.append)
    trainer = create_trainer([SaveTrainingStateCallback(tmp_path)])
    with pytest.raises(CheckpointError, match="no file can be opened"):
        trainer.train(samples(1), 1, resume_from="auto")
    assert heard == [error]


@pytest.mark.parametrize(("then", "now"), [(None, StepLR), (StepLR, None)])
def test_resuming_with_another_idea_of_a_schedule_is_refused(
    create_trainer, samples, tmp_path, then, now
):
    """Defect 6: the error spoke of the number of custom checkpoints."""

    def train(scheduler, **kwargs):
        create = None if scheduler is None else partial(scheduler, step_size=1)
        trainer = create_trainer([SaveTrainingStateCallback(tmp_path)])
        trainer.train(samples(2), 1, create_scheduler_fn=create, **kwargs)

    train(then)
    with pytest.raises(ValueError, match="Give the create_scheduler_fn of that run"):
        train(now, resume_from=tmp_path / "final")


def test_a_window_that_is_begun_again_in_other_batches_forgets_its_items(tmp_path):
    """They would be counted twice, and its update be too small."""
    inputs = torch.arange(8.0)[:, None]

    def train(batch_size, accumulation, callbacks=(), **kwargs):
        model = nn.Linear(1, 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        Trainer(model, nn.MSELoss(), optimizer, callbacks, seed=1).train(
            TensorDataset(inputs, 3 * inputs),
            1,
            per_device_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **kwargs,
        )
        return model.weight.detach()

    amid_window = StopsAt("on_train_step_end", tmp_path / "state", 1)
    with pytest.raises(Killed):
        train(2, 2, [amid_window])
    with pytest.warns(TrainingWarning, match="keeps its place"):
        weight = train(1, 4, resume_from=tmp_path / "state")

    torch.testing.assert_close(weight, train(2, 2))


def test_a_limit_on_the_batches_is_not_taken_for_a_longer_run(
    create_trainer, samples, tmp_path
):
    def train(**kwargs):
        callbacks = [SaveTrainingStateCallback(tmp_path), LimitBatchesCallback(2)]
        create_trainer(callbacks).train(
            samples(5),
            2,
            per_device_batch_size=1,
            create_scheduler_fn=partial(OneCycleLR, max_lr=0.1, total_steps=4),
            **kwargs,
        )

    train()
    train(resume_from="auto")


def test_what_is_saved_beside_the_state_comes_back(create_trainer, samples, tmp_path):
    trainer = create_trainer()
    trainer.train(samples(2), 2)
    trainer.save_training_state(
        tmp_path / "state", {"note": "best", "values": [1, 2.5]}
    )

    assert create_trainer().load_training_state(tmp_path / "state") == {
        "current_epoch": 3,
        "note": "best",
        "values": [1, 2.5],
    }


# --- files of one model


def saves_at_end(path):
    """Save while the schedule is there."""
    return At(
        on_training_run_end=lambda trainer: trainer.save_checkpoint(path, {"loss": 0.5})
    )


def test_a_checkpoint_holds_the_documented_parts(create_trainer, samples, tmp_path):
    trainer = create_trainer([saves_at_end(tmp_path / "all.pt")])
    trainer.train(samples(2), 1, create_scheduler_fn=partial(StepLR, step_size=1))
    trainer.save_checkpoint(
        tmp_path / "model.pt", save_optimizer=False, save_scheduler=False
    )

    contents = torch.load(tmp_path / "all.pt", weights_only=True)
    assert set(contents) == {
        "model_state_dict",
        "optimizer_state_dict",
        "scheduler_state_dict",
        "loss",
    }
    assert contents["model_state_dict"]["weight"].item() == 0.5
    assert set(torch.load(tmp_path / "model.pt", weights_only=True)) == {
        "model_state_dict"
    }


def test_a_checkpoint_with_a_schedule_can_be_loaded_without_one(
    create_trainer, samples, tmp_path
):
    """Defect 24: it was an error before train(), after the model had been loaded."""

    create_trainer([saves_at_end(tmp_path / "model.pt")]).train(
        samples(2), 1, create_scheduler_fn=partial(StepLR, step_size=1)
    )

    trainer = create_trainer()
    contents = trainer.load_checkpoint(tmp_path / "model.pt")

    assert trainer.model.weight.item() == 0.5
    assert "scheduler_state_dict" in contents


def test_the_schedule_of_a_checkpoint_can_be_loaded_within_a_run(
    create_trainer, samples, tmp_path
):
    """Defect 24: there was no way to restore a scheduler from a file."""

    create = partial(StepLR, step_size=1)
    create_trainer([saves_at_end(tmp_path / "model.pt")]).train(
        samples(2), 3, create_scheduler_fn=create
    )

    def load(trainer):
        trainer.load_checkpoint(tmp_path / "model.pt")
        assert trainer.scheduler.last_epoch == 3
        raise StopTrainingError

    create_trainer([At(on_training_run_start=load)]).train(
        samples(2), 1, create_scheduler_fn=create
    )


def test_a_model_is_loaded_without_an_optimizer_to_evaluate_it_found_106(
    create_trainer, samples, tmp_path
):
    create_trainer().save_checkpoint(tmp_path / "model.pt")
    model = nn.Linear(1, 1, bias=False)
    trainer = Trainer(model, nn.MSELoss(), None, callbacks=())

    contents = trainer.load_checkpoint(tmp_path / "model.pt")

    assert model.weight.item() == 1.0
    assert "optimizer_state_dict" in contents
    assert trainer.evaluate(samples(2)) == {"evaluation_loss": 1.0}


def test_the_warning_on_resuming_points_at_the_line_of_the_user_found_106(
    create_trainer, samples, tmp_path
):
    saver = create_trainer()
    saver.train(samples(4), 1, per_device_batch_size=2)
    saver.save_training_state(tmp_path / "state")
    trainer = create_trainer()

    with pytest.warns(TrainingWarning, match="batch size 1 instead of 2") as caught:
        trainer.train(
            samples(4), 2, per_device_batch_size=1, resume_from=tmp_path / "state"
        )

    assert caught[0].filename == __file__


def test_a_trainer_without_an_optimizer_can_save(tmp_path):
    trainer = Trainer(nn.Linear(1, 1), nn.MSELoss(), None, callbacks=())

    trainer.save_checkpoint(tmp_path / "new folder" / "model.pt")
    trainer.save_training_state(tmp_path / "state")

    contents = torch.load(tmp_path / "new folder" / "model.pt", weights_only=True)
    assert set(contents) == {"model_state_dict"}


@pytest.mark.parametrize(
    ("save_per_node", "is_main", "is_local_main", "is_written"),
    [
        (True, False, True, True),
        (True, False, False, False),
        (False, False, True, False),
        (False, True, True, True),
    ],
)
def test_a_checkpoint_can_be_written_on_each_machine(
    create_trainer, tmp_path, save_per_node, is_main, is_local_main, is_written
):
    """Defect 33: save_per_node=True wrote a file on the first machine only."""
    trainer = create_trainer()
    state = mock.Mock(is_main_process=is_main, is_local_main_process=is_local_main)

    with mock.patch.object(trainer._accelerator, "state", state):
        trainer.save_checkpoint(tmp_path / "model.pt", save_per_node=save_per_node)

    assert (tmp_path / "model.pt").exists() == is_written


def test_a_file_of_bare_weights_is_explained(create_trainer, tmp_path):
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "weights.pt")

    with pytest.raises(CheckpointError, match=r"\['weight', 'bias'\].*load_state_dict"):
        create_trainer().load_checkpoint(tmp_path / "weights.pt")


# --- what the published version wrote


def test_a_training_state_of_the_published_version_without_a_schedule_is_resumed(
    create_trainer, samples, tmp_path
):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.125)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
    model(torch.ones(1, 1)).backward()
    optimizer.step()  # leaves a momentum of 1 and a weight of -0.125
    accelerator = Accelerator()
    accelerator.prepare(model, optimizer)
    accelerator.save_state(str(tmp_path / "epoch_2"))
    metadata = {"current_epoch": 3, "global_step": 12}
    torch.save(metadata, tmp_path / "epoch_2" / "trainer_metadata.pt")

    trainer = create_trainer(lr=9.0)
    trainer.optimizer.param_groups[0]["momentum"] = 0.5
    trainer.train(samples(1), 3, resume_from=tmp_path / "epoch_2")

    # One epoch is left: momentum 0.5 * 1 + 2 * -0.125, times the rate of 0.25.
    assert trainer.model.weight.item() == -0.125 - 0.25 * (0.5 - 0.25)
    assert trainer.run_history.current_epoch == 4
    assert trainer.num_updates == 1


class Stateful(Numbers):
    """Remembers things of its own, which are no position in it."""

    def state_dict(self):
        return {"path": "images"}

    def load_state_dict(self, state):
        pass


def test_the_state_of_a_map_style_dataset_is_no_position_in_it_found_72(
    create_trainer, tmp_path
):
    seen = Keeps("on_train_step_end", lambda trainer, batch, **_: batch[0].item())

    def run(*callbacks, resume_from=None):
        create_trainer([seen, *callbacks], lr=0.0).train(
            Stateful(8),
            1,
            per_device_batch_size=1,
            train_dataloader_kwargs={"sampler": range(7, -1, -1)},
            resume_from=resume_from,
        )

    with pytest.raises(Killed):
        run(StopsAt("on_train_step_end", tmp_path / "state", at=4))
    with pytest.warns(TrainingWarning, match="4 batches again.*sampler is yours"):
        run(resume_from=tmp_path / "state")

    assert seen.kept == [7, 6, 5, 4, 3, 2, 1, 0]


# --- all or nothing, and as it was saved


class MasterWeights(torch.optim.Optimizer):
    """Keeps weights in single precision, and how often they moved, beside each."""

    def __init__(self, params, lr=0.25):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            state = self.state[weight]
            if not state:
                state["master"] = weight.float()
                state["codes"] = torch.zeros(2, dtype=torch.int8)
            state["master"] -= self.param_groups[0]["lr"] * weight.grad.float()
            state["codes"] += 1
            weight.copy_(state["master"])


def low_precision_trainer(callbacks=(), dtype=torch.bfloat16):
    model = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    optimizer = MasterWeights(model.parameters(), lr=0.001)

    class InPrecision(Trainer):
        def calculate_train_batch_loss(self, batch):
            inputs, targets = (each.to(dtype) for each in batch)
            return super().calculate_train_batch_loss((inputs, targets))

    return InPrecision(model, nn.MSELoss(), optimizer, callbacks)


def test_an_optimizer_s_state_keeps_its_dtypes_found_73(samples, tmp_path):
    """found 73: it was given the dtype of the weights, and rounded."""

    def master_of(trainer):
        (state,) = trainer.optimizer.state.values()
        assert (state["master"].dtype, state["codes"].dtype) == (
            torch.float32,
            torch.int8,
        )
        return state["master"].item()

    def train(num_epochs, **kwargs):
        trainer = low_precision_trainer(
            [SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1, overwrite=True)]
        )
        trainer.train(samples(3), num_epochs, per_device_batch_size=1, **kwargs)
        return trainer

    whole = train(4)
    resumed = train(4, resume_from=tmp_path / "epoch_1")
    assert master_of(resumed) == master_of(whole) != whole.model.weight.item()

    whole.save_checkpoint(tmp_path / "model.pt")
    loaded = low_precision_trainer()
    loaded.load_checkpoint(tmp_path / "model.pt")
    assert master_of(loaded) == master_of(whole)


def test_weights_of_another_dtype_have_states_of_theirs(samples, tmp_path):
    """torch's own optimizers could not make an update with both."""

    def train(dtype):
        model = nn.Linear(1, 1).to(dtype)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(1, 1, dtype=dtype)).sum().backward()
        return Trainer(model, nn.MSELoss(), optimizer, ())

    trainer = train(torch.float32)
    trainer.optimizer.step()
    trainer.save_checkpoint(tmp_path / "model.pt")
    other = train(torch.bfloat16)
    other.load_checkpoint(tmp_path / "model.pt")
    other.optimizer.step()
    assert {state["exp_avg"].dtype for state in other.optimizer.state.values()} == {
        torch.bfloat16
    }


def test_a_checkpoint_is_loaded_as_a_whole_or_not_at_all_found_90(
    create_trainer, samples, tmp_path
):
    """found 90: the weights had changed when the optimizer was found not to fit."""
    other = create_trainer()
    other.train(samples(2), 1)
    extra = {"params": [nn.Parameter(torch.ones(1))]}
    other.optimizer.add_param_group(extra)
    other.save_checkpoint(tmp_path / "model.pt")

    trainer = create_trainer(lr=0.5)
    with pytest.raises(
        CheckpointError,
        match=r"optimizer's state in .*model.pt does not fit.*load only the model",
    ):
        trainer.load_checkpoint(tmp_path / "model.pt")
    assert trainer.model.weight.item() == 1.0

    del other.optimizer.param_groups[1]
    other.save_checkpoint(tmp_path / "model.pt", {"model_state_dict": {"a": 1}})
    with pytest.raises(CheckpointError, match="does not fit the model"):
        trainer.load_checkpoint(tmp_path / "model.pt")
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5


class Picky(StepLR):
    """Accepts no state but its own."""

    def load_state_dict(self, state):
        super().load_state_dict({"step_size": state["step_size"]})
        self.last_epoch = state["a key of its own"]

    def state_dict(self):
        return {**super().state_dict(), "a key of its own": self.last_epoch}


def test_a_scheduler_that_does_not_fit_leaves_the_rest_as_it_was_found_90(
    create_trainer, samples, tmp_path
):
    create_trainer([saves_at_end(tmp_path / "model.pt")]).train(
        samples(1), 1, create_scheduler_fn=partial(StepLR, step_size=3)
    )

    def load(trainer):
        with pytest.raises(CheckpointError, match="does not fit the scheduler"):
            trainer.load_checkpoint(tmp_path / "model.pt")
        assert trainer.model.weight.item() == 1.0
        assert trainer.optimizer.param_groups[0]["lr"] == 0.125
        assert trainer.scheduler.step_size == 7
        raise StopTrainingError

    create_trainer([At(on_training_run_start=load)], lr=0.125).train(
        samples(1), 1, create_scheduler_fn=partial(Picky, step_size=7)
    )


# --- after the run


@pytest.mark.parametrize("own_sampler", [False, True])
@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("evaluates", [False, True])
def test_what_is_saved_after_a_run_is_that_run_found_93(
    train, noise, tmp_path, own_sampler, own_generator, evaluates
):
    """found 93: it was the evaluation after it; an order of the user's was lost."""

    def run(*callbacks, **kwargs):
        if own_sampler:
            generator = torch.Generator().manual_seed(1) if own_generator else None
            sampler = RandomSampler(range(18), generator=generator)
            kwargs["train_dataloader_kwargs"] = {"sampler": sampler}
        return train(callbacks, num_epochs=2, eval_dataset=None, **kwargs)

    def stop(trainer, num_updates, **kwargs):
        if num_updates == 8:
            raise StopTrainingError

    stopped = run(At(on_train_update_end=stop))
    if evaluates:
        stopped.evaluate(noise(6))
    stopped.save_training_state(tmp_path / "state")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # batches are loaded again
        resumed = run(resume_from=tmp_path / "state")

    torch.testing.assert_close(
        resumed.model.state_dict(), run().model.state_dict(), rtol=0, atol=0
    )
    assert resumed.num_updates == 10


@pytest.mark.parametrize("at", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.filterwarnings("ignore:To find its place")
def test_a_run_on_a_sampler_and_data_that_draw_numbers_can_be_resumed_found_70(
    train, tmp_path, at, accumulation
):
    """To look for the last batch ahead draws nothing that would be drawn again."""
    run = partial(
        train,
        num_epochs=2,
        gradient_accumulation_steps=accumulation,
        train_dataloader_kwargs={"sampler": RandomOrder(range(18)), "num_workers": 0},
    )
    with pytest.raises(Killed):
        run([StopsAt("on_train_step_end", tmp_path / "state", at)])

    assert_same_end(run(resume_from=tmp_path / "state"), run())


class RandomOrder(Sampler):
    """Draws each index when it is asked for it."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        return (int(torch.randint(len(self.data), ())) for _ in range(len(self.data)))


def test_an_optimizer_made_of_others_is_loaded_by_its_own_method(
    create_trainer, samples, tmp_path
):
    class Both:
        """Two optimizers behind one face, whose state has a form of its own."""

        def __init__(self, *optimizers):
            self.optimizers = optimizers
            self.defaults = {}

        @property
        def param_groups(self):
            return [group for each in self.optimizers for group in each.param_groups]

        def step(self):
            for each in self.optimizers:
                each.step()

        def zero_grad(self):
            for each in self.optimizers:
                each.zero_grad()

        def state_dict(self):
            return {"both": [each.state_dict() for each in self.optimizers]}

        def load_state_dict(self, state):
            for each, own in zip(self.optimizers, state["both"], strict=True):
                each.load_state_dict(own)

    def create():
        model = one_weight()
        one = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return create_trainer(model=model, optimizer=Both(one))

    first, second = create(), create()
    first.save_checkpoint(tmp_path / "both.pt")
    second.load_checkpoint(tmp_path / "both.pt")
    assert second.optimizer.state_dict() == first.optimizer.state_dict()


# ------------------------------------------------------------------ weights alone


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, inputs):
        return self.head(self.norm(self.embed(inputs).mean(1)))


def train_tied(callbacks=()):
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks)
    inputs = torch.arange(24).reshape(12, 2) % 4
    data = TensorDataset(inputs, inputs[:, 0])
    trainer.train(data, 1, data, per_device_batch_size=3)
    return trainer


@pytest.mark.parametrize(
    ("name", "expected", "read"),
    [
        ("model", "model.safetensors", safetensors.torch.load_file),
        ("v1.2", "v1.2.safetensors", safetensors.torch.load_file),
        ("model.pt", "model.pt", torch.load),
    ],
)
def test_weights_alone_are_a_file_that_others_read(tmp_path, name, expected, read):
    trainer = train_tied()
    # A part of it is compiled, which changes the names in its state dict.
    trainer.model.norm = torch.compile(trainer.model.norm, backend="eager")
    path = trainer.save_model(tmp_path / "new" / name)

    assert path == tmp_path / "new" / expected
    assert os.listdir(path.parent) == [expected]
    plain = Tied()
    missing, unexpected = plain.load_state_dict(read(path), strict=False)
    assert (missing, unexpected) == (["head.weight"] if name != "model.pt" else [], [])
    assert torch.equal(plain.head.weight, trainer.model.embed.weight)
    assert plain.norm.num_batches_tracked == 4

    other = Trainer(Tied(), None, None, callbacks=())
    other.load_model(tmp_path / "new" / name)
    for key, value in plain.state_dict().items():
        assert torch.equal(other.model.state_dict()[key], value)
    trainer.load_model(path)  # its names have what torch.compile adds


def test_weights_alone_are_read_from_what_else_there_is(create_trainer, tmp_path):
    trainer = create_trainer()
    trainer.model.weight.data.fill_(3.0)
    trainer.save_checkpoint(tmp_path / "whole.pt")
    for target in ("whole.pt", "bare.pt"):
        torch.save(trainer.model.state_dict(), tmp_path / "bare.pt")
        other = create_trainer()
        other.load_model(tmp_path / target)
        assert other.model.weight.item() == 3.0

    for name in ("step_1", "step_2"):
        trainer.save_training_state(tmp_path / "states" / name)
    other = create_trainer()
    other.load_model(tmp_path / "states" / "step_2")
    assert other.model.weight.item() == 3.0
    with pytest.raises(CheckpointError, match="holds some: give one of step_1, step_2"):
        other.load_model(tmp_path / "states")

    trainer.save_model(tmp_path / "model")
    other = Trainer(nn.Linear(2, 1), None, None, callbacks=())
    before = other.model.weight.clone()
    with pytest.raises(CheckpointError, match=r"missing .*: bias; of another shape"):
        other.load_model(tmp_path / "model")
    assert torch.equal(other.model.weight, before)
    with pytest.raises(CheckpointError, match=r"no file .*/nothing\.safetensors"):
        other.load_model(tmp_path / "nothing")


def test_the_average_is_saved_alone_on_request(tmp_path):
    average = ModelEmaCallback(decay=0.5, save_path=tmp_path / "ema.pt")
    trainer = train_tied([average])
    trainer.save_model(tmp_path / "own")
    trainer.save_model(tmp_path / "average", ema=True)

    own, averaged = (
        safetensors.torch.load_file(tmp_path / f"{name}.safetensors")
        for name in ("own", "average")
    )
    weight = average.ema_model.module.embed.weight
    assert torch.equal(averaged["embed.weight"], weight)
    assert not torch.equal(own["embed.weight"], weight)
    assert averaged.keys() == own.keys()
    trainer.callback_handler.clear_callbacks()
    with pytest.raises(ValueError, match="this trainer has 0"):
        trainer.save_model(tmp_path / "average", ema=True)


def test_what_safetensors_cannot_hold_is_named(tmp_path):
    class HasExtraState(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            self.extra = state

    trainer = Trainer(HasExtraState(1, 1), None, None, callbacks=())
    with pytest.raises(CheckpointError, match=r"hold _extra_state, .* ends in \.pt"):
        trainer.save_model(tmp_path / "model")
    assert os.listdir(tmp_path) == []
    trainer.save_model(tmp_path / "model.pt")
    trainer.load_model(tmp_path / "model.pt")
    assert trainer.model.extra == {"calls": 3}


def test_a_folder_in_the_place_of_a_file_is_told_what_to_do_with(
    create_trainer, tmp_path
):
    trainer = create_trainer()
    trainer.save_training_state(tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"is a folder.* load_model\(...\)"):
        trainer.load_checkpoint(tmp_path / "state")
