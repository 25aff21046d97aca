import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from toys import At

from pytorch_accelerated.callbacks import (
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TerminateOnNaNCallback,
    stopping,
)
from pytorch_accelerated.errors import NonFiniteLossError
from pytorch_accelerated.trainer import Trainer


class BadLossTrainer(Trainer):
    """Replaces the loss of some training steps, numbered from 0 over the whole run."""

    bad_steps = ()
    bad_value = math.nan

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        if self.num_steps in self.bad_steps:
            output["loss"] = output["loss"] * self.bad_value
        return output


class BadEvalTrainer(Trainer):
    def calculate_eval_batch_loss(self, batch):
        return {**super().calculate_eval_batch_loss(batch), "loss": math.nan}


def saw_end():
    """Keep the names of the events of the end, in their order."""
    seen = []

    def note(event):
        return lambda trainer, **kwargs: seen.append(event)

    events = ("on_stop_training_error", "on_training_run_end", "on_evaluation_run_end")
    return seen, At(**{event: note(event) for event in events})


def train_badly(create_trainer, samples, callbacks=(), bad_step=5, **kwargs):
    callback = TerminateOnNaNCallback()
    trainer = create_trainer(
        [*callbacks, callback], trainer_class=BadLossTrainer, lr=1e-3
    )
    trainer.bad_steps = (bad_step,)
    trainer.bad_value = kwargs.pop("bad_value", math.nan)
    with pytest.raises(NonFiniteLossError) as info:
        trainer.train(samples(4), num_epochs=4, per_device_batch_size=1, **kwargs)
    assert callback.triggered
    return trainer, str(info.value)


@pytest.mark.parametrize("bad_value", [math.nan, math.inf, -math.inf])
def test_the_run_ends_in_order_and_the_error_says_where_it_was(
    create_trainer, samples, bad_value
):
    """Defect 21: the interpreter was ended with sys.exit, before the end events."""
    seen, end = saw_end()
    trainer, message = train_badly(create_trainer, samples, [end], bad_value=bad_value)
    assert "training loss became NaN or infinite in epoch 2, at step 1 (" in message
    assert "Learning rate: 0.001. Last checkpoint: none." in message
    assert seen == ["on_stop_training_error", "on_training_run_end"]

    # Defect 21: the flag was never reset.
    nn.init.ones_(trainer.get_model().weight)
    trainer.bad_steps = ()
    trainer.train(samples(4), num_epochs=1, eval_dataset=samples(1))
    callback = trainer.callback_handler.callbacks[-1]
    assert not callback.triggered
    assert callback._collected == []


def test_a_bad_epoch_is_not_saved(create_trainer, samples, tmp_path):
    best = SaveBestModelCallback(tmp_path / "best.pt", watch_metric="train_loss_epoch")
    states = SaveTrainingStateCallback(tmp_path / "states", save_every_n_epochs=1)
    _, message = train_badly(create_trainer, samples, [best, states], bad_step=7)
    assert best.best_metric_epoch == 1
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["epoch_1"]
    assert f"Last checkpoint: {tmp_path / 'states' / 'epoch_1'}" in message


@pytest.mark.parametrize("bad_step", range(8))
def test_a_step_is_not_saved_if_it_or_one_before_was_bad(
    create_trainer, samples, tmp_path, bad_step
):
    states = SaveTrainingStateCallback(tmp_path, save_every_n_steps=1)
    train_badly(create_trainer, samples, [states], bad_step=bad_step)
    saved = sorted(path.name for path in tmp_path.iterdir())
    assert saved == [f"step_{number}" for number in range(1, bad_step + 1)]


def test_saving_by_hand_is_refused_in_the_run_and_possible_after_it(
    create_trainer, samples, tmp_path
):
    def save(trainer, **kwargs):
        with pytest.raises(NonFiniteLossError):
            trainer.save_checkpoint(tmp_path / "in_run.pt")

    saving = At(on_stop_training_error=save)
    trainer, _ = train_badly(create_trainer, samples, [saving])
    trainer.save_checkpoint(tmp_path / "after.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["after.pt"]


def test_a_bad_loss_in_the_evaluation_stops_training_before_a_save(
    create_trainer, samples, tmp_path
):
    best = SaveBestModelCallback(tmp_path / "best.pt", watch_metric="train_loss_epoch")
    trainer = create_trainer(
        [best, TerminateOnNaNCallback], trainer_class=BadEvalTrainer
    )
    with pytest.raises(NonFiniteLossError, match=r"The evaluation loss .* in epoch 1"):
        trainer.train(samples(2), num_epochs=2, eval_dataset=samples(2))
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_amid_an_epoch_does_not_take_the_blame(create_trainer, samples):
    _, message = train_badly(
        create_trainer,
        samples,
        [StepBasedEvaluationCallback(2)],
        bad_step=1,
        eval_dataset=samples(1),
    )
    assert "The training loss became NaN or infinite in epoch 1, at step 1 (" in message


def test_evaluate_raises_after_its_end(create_trainer, samples):
    """Defect 21: it ended quietly. A loss that is a plain number can be checked."""
    seen, end = saw_end()
    trainer = create_trainer(
        [TerminateOnNaNCallback, end], trainer_class=BadEvalTrainer
    )
    with pytest.raises(NonFiniteLossError, match="The evaluation loss"):
        trainer.evaluate(samples(2))
    assert seen == ["on_stop_training_error", "on_evaluation_run_end"]


@pytest.mark.parametrize(
    "loss",
    [math.nan, math.inf, torch.tensor(math.nan), torch.tensor([1.0, math.inf])],
    ids=repr,
)
def test_one_batch_can_be_checked_at_once(loss):
    """Defect 21: not usable with losses that are plain numbers."""
    callback = TerminateOnNaNCallback()
    callback.check_for_nan_after_batch({"loss": 1.0})
    callback.check_for_nan_after_batch({"loss": torch.tensor([1.0, 2.0])})
    callback.check_for_nan_after_batch({"loss": torch.full((2,), 60000.0).half()})
    assert not callback.triggered
    with pytest.raises(NonFiniteLossError, match="at step 7"):
        callback.check_for_nan_after_batch({"loss": loss}, step=7)
    assert callback.triggered


class CountedReads(torch.Tensor):
    """A loss that counts how often it, or what is made of it, is read by the host."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("item", "tolist", "cpu", "__bool__", "__float__", "numpy"):
            CountedReads.reads += 1
        return super().__torch_function__(func, types, args, kwargs)


def test_losses_are_read_once_a_second(monkeypatch, create_trainer):
    now = [50.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    CountedReads.reads = 0
    callback = TerminateOnNaNCallback()
    trainer = create_trainer([callback])
    callback.on_training_run_start(trainer)
    loss = torch.ones(()).as_subclass(CountedReads)
    for step in range(1000):
        callback.on_train_step_end(trainer, None, {"loss": loss}, step=step)
        now[0] += 1 / 256
    # At steps 0, 256, 512 and 768.
    assert CountedReads.reads == 4
    assert len(callback._collected) == 1000 - 769


class MeanOverItems(Trainer):
    """Targets of -1 do not count; a mean over none of them is NaN."""

    def calculate_train_batch_loss(self, batch):
        inputs, targets = batch
        counted = targets >= 0
        loss = (self.model(inputs) - targets)[counted].square().mean()
        num_items = counted.sum() if self.on_device else int(counted.sum())
        return {
            "loss": loss,
            "model_outputs": None,
            "batch_size": len(targets),
            "num_items_in_batch": num_items,
        }

    def calculate_eval_batch_loss(self, batch):
        return self.calculate_train_batch_loss(batch)


@pytest.mark.parametrize("on_device", [True, False])
def test_the_loss_of_a_batch_without_items_is_not_looked_at_found_77(
    create_trainer, on_device
):
    """It has no weight, and its gradient is 0: the weight halves at the others."""
    data = TensorDataset(torch.ones(3, 1), torch.tensor([[0.0], [-1.0], [0.0]]))
    callback = TerminateOnNaNCallback()
    trainer = create_trainer([callback], trainer_class=MeanOverItems)
    trainer.on_device = on_device
    history = trainer.train(
        data,
        1,
        eval_dataset=data,
        per_device_batch_size=1,
        train_dataloader_kwargs={"shuffle": False},
    )

    assert trainer.model.weight.item() == 0.25
    assert history.get_latest_metric("train_loss_epoch") == (1 + 0.25) / 2
    assert history.get_latest_metric("eval_loss_epoch") == 0.25**2
    assert not callback.triggered


def test_a_bad_loss_of_counted_items_is_still_found_found_77(create_trainer):
    data = TensorDataset(torch.full((1, 1), math.inf), torch.zeros(1, 1))
    trainer = create_trainer([TerminateOnNaNCallback], trainer_class=MeanOverItems)
    trainer.on_device = True
    with pytest.raises(NonFiniteLossError, match="in epoch 1, at step 0"):
        trainer.train(data, 1)
