import datetime
import math
from types import SimpleNamespace

import pytest
import torch
from toys import At, create_trainer, ones

from pytorch_accelerated.callbacks import (
    SaveBestModelCallback,
    WSDCheckpointCallback,
)
from pytorch_accelerated.checkpoint import Checkpoint
from pytorch_accelerated.schedulers import CosineLrScheduler, WSDLrScheduler
from pytorch_accelerated.trainer import Trainer

# 20 updates: checkpoints after 10 and 20, each after a decay of a fifth of its period.
SCHEDULE = {"decay_phase_ratio": 0.2, "num_checkpoints": 2}


class NotesRates(Trainer):
    """Notes the learning rate of each update."""

    def optimizer_step(self):
        self.learning_rates.append(self.optimizer.param_groups[0]["lr"])
        super().optimizer_step()


def train(callback, *others, trainer=None, epochs=2, arguments=(), **schedule):
    trainer = trainer or create_trainer([callback, *others], trainer_class=NotesRates)
    trainer.learning_rates = []
    trainer.train(
        ones(10),
        num_epochs=epochs,
        per_device_batch_size=1,
        create_scheduler_fn=WSDLrScheduler.create_scheduler_fn(
            num_warmup_epochs=0, **{**SCHEDULE, **schedule}
        ),
        **dict(arguments),
    )
    return trainer


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_change_of_the_working_directory_does_not_move_them_found_94(
    tmp_path, monkeypatch
):
    """found 94: the second half was saved elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    moves = At(on_train_epoch_end=lambda _: monkeypatch.chdir(tmp_path / "elsewhere"))

    train(WSDCheckpointCallback("checkpoints"), moves)
    assert len(names_in(tmp_path / "checkpoints")) == 4
    assert names_in(tmp_path / "elsewhere") == []


def test_the_turning_points_of_the_schedule_are_saved(tmp_path):
    train(WSDCheckpointCallback(tmp_path))
    assert names_in(tmp_path) == [
        "checkpoint_10_wsd_post_decay.pt",
        "checkpoint_18_wsd_pre_decay",
        "checkpoint_20_wsd_post_decay.pt",
        "checkpoint_8_wsd_pre_decay",
    ]
    pre_decay = Checkpoint(tmp_path / "checkpoint_8_wsd_pre_decay")
    assert pre_decay.num_updates == 8
    assert pre_decay.load_weights()["weight"].item() == 0.5**8


def test_the_file_says_what_it_is(tmp_path):
    trainer = train(WSDCheckpointCallback(tmp_path))
    saved = torch.load(tmp_path / "checkpoint_10_wsd_post_decay.pt", weights_only=True)
    assert saved["step"] == 10
    assert saved["checkpoint_type"] == "wsd_post_decay"
    assert saved["total_steps"] == 20, "found 99: it was 21"
    assert saved["decay_fraction"] == 0.2
    assert datetime.datetime.fromisoformat(saved["timestamp"])
    state = trainer.load_training_state(tmp_path / "checkpoint_18_wsd_pre_decay")
    assert (state["step"], state["checkpoint_type"]) == (18, "wsd_pre_decay")


@pytest.mark.parametrize("save", [True, False])
def test_optimizer_and_scheduler_are_saved_as_asked(tmp_path, save):
    train(WSDCheckpointCallback(tmp_path, save_optimizer=save, save_scheduler=save))
    saved = torch.load(tmp_path / "checkpoint_20_wsd_post_decay.pt", weights_only=True)
    assert ("optimizer_state_dict" in saved) is save
    assert ("scheduler_state_dict" in saved) is save


@pytest.mark.filterwarnings("ignore:.*greater_is_better")
def test_the_trained_model_is_saved_and_not_the_best(tmp_path):
    best = SaveBestModelCallback(
        tmp_path / "best.pt", "train_loss_epoch", greater_is_better=True
    )
    train(WSDCheckpointCallback(tmp_path / "wsd"), best)
    post = torch.load(
        tmp_path / "wsd" / "checkpoint_20_wsd_post_decay.pt", weights_only=True
    )
    first = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (
        post["model_state_dict"]["weight"].item()
        < first["model_state_dict"]["weight"].item()
    )


def test_a_continuation_writes_all_its_checkpoints(tmp_path):
    """Defect 49: the step of the loaded file suppressed the checkpoint of that number.

    And the first update ran with the decayed learning rate.
    """
    first = train(WSDCheckpointCallback(tmp_path / "first"))
    names = names_in(tmp_path / "first")
    initial = tmp_path / "first" / "checkpoint_18_wsd_pre_decay"
    second = WSDCheckpointCallback(tmp_path / "second", initial_checkpoint=initial)
    trainer = train(second, is_continuation_from_checkpoint=True)
    assert names_in(tmp_path / "second") == names
    assert trainer.learning_rates == first.learning_rates
    weights = Checkpoint(
        tmp_path / "second" / "checkpoint_8_wsd_pre_decay"
    ).load_weights()
    assert math.isclose(
        weights["weight"].item(),
        Checkpoint(initial).load_weights()["weight"].item() * 0.5**8,
    )


@pytest.mark.parametrize(
    ("save_scheduler", "schedule"),
    [
        (True, {"is_continuation_from_checkpoint": True}),
        (False, {"is_continuation_from_checkpoint": True}),
        (False, {}),
    ],
)
def test_a_run_that_starts_after_a_decay_has_the_full_learning_rate(
    tmp_path, save_scheduler, schedule
):
    """Defect 49, and found, section G: it came with the optimizer, decayed."""
    train(WSDCheckpointCallback(tmp_path / "first", save_scheduler=save_scheduler))
    second = WSDCheckpointCallback(
        tmp_path / "second",
        initial_checkpoint=tmp_path / "first" / "checkpoint_20_wsd_post_decay.pt",
    )
    assert train(second, **schedule).learning_rates[:8] == [0.25] * 8


def test_a_run_can_start_in_the_middle_of_the_same_schedule(tmp_path):
    train(WSDCheckpointCallback(tmp_path / "first"))
    second = WSDCheckpointCallback(
        tmp_path / "second",
        initial_checkpoint=tmp_path / "first" / "checkpoint_8_wsd_pre_decay",
    )
    train(second)
    assert names_in(tmp_path / "second") == [
        "checkpoint_10_wsd_post_decay.pt",
        "checkpoint_18_wsd_pre_decay",
        "checkpoint_20_wsd_post_decay.pt",
    ]
    pre_decay = Checkpoint(tmp_path / "second" / "checkpoint_18_wsd_pre_decay")
    assert pre_decay.num_updates == 18 - 8


def test_the_losses_of_a_continuation_are_its_own(tmp_path):
    train(WSDCheckpointCallback(tmp_path / "first"))
    initial = tmp_path / "first" / "checkpoint_8_wsd_pre_decay"
    start = Checkpoint(initial).load_weights()["weight"].item()
    second = WSDCheckpointCallback(tmp_path / "second", initial_checkpoint=initial)
    trainer = train(
        second,
        epochs=1,
        is_continuation_from_checkpoint=True,
        num_checkpoints=1,
        decay_phase_ratio=0.0,
    )
    losses = [start**2 * 0.25**step for step in range(10)]
    recorded = trainer.run_history.get_metric_values("train_loss_epoch")[0]
    assert math.isclose(recorded, sum(losses) / 10, rel_tol=1e-3)


def test_an_initial_checkpoint_that_is_not_there_is_an_error(tmp_path):
    """Defect 49: a typo was ignored."""
    callback = WSDCheckpointCallback(tmp_path, initial_checkpoint=tmp_path / "typo")
    with pytest.raises(FileNotFoundError, match=r"no initial_checkpoint .*typo"):
        train(callback)


def test_another_scheduler_is_refused():
    trainer = create_trainer([WSDCheckpointCallback()])
    create = CosineLrScheduler.create_scheduler_fn()
    with pytest.raises(ValueError, match="needs a WSDLrScheduler, got CosineLr"):
        trainer.train(ones(1), num_epochs=1, create_scheduler_fn=create)


def test_a_resumed_run_saves_what_is_left(tmp_path):
    train(WSDCheckpointCallback(tmp_path / "first"))
    state = tmp_path / "first" / "checkpoint_8_wsd_pre_decay"
    train(WSDCheckpointCallback(tmp_path / "second"), arguments={"resume_from": state})
    assert names_in(tmp_path / "second") == [
        "checkpoint_10_wsd_post_decay.pt",
        "checkpoint_18_wsd_pre_decay",
        "checkpoint_20_wsd_post_decay.pt",
    ]


def test_a_second_run_of_a_trainer_counts_its_own_updates(tmp_path):
    callback = WSDCheckpointCallback(tmp_path)
    trainer = train(callback)
    names = names_in(tmp_path)
    callback.save_dir = tmp_path / "second"
    train(None, trainer=trainer, arguments={"reset_run_history": False})
    assert names_in(tmp_path / "second") == names


def test_it_can_be_called_by_hand_before_the_scheduler_is_stepped(tmp_path):
    optimizer = torch.optim.SGD([torch.ones(1)], lr=0.1)
    scheduler = WSDLrScheduler(optimizer, total_steps=10, decay_phase_ratio=0.2)
    saved = []
    trainer = SimpleNamespace(
        scheduler=scheduler,
        num_updates=None,
        run_config=SimpleNamespace(max_num_train_steps=10),
        save_training_state=lambda path, **kwargs: saved.append(path),
        save_checkpoint=lambda path, **kwargs: saved.append(path),
    )
    callback = WSDCheckpointCallback(tmp_path)
    callback.on_training_run_start(trainer)
    scheduler.step()
    for step in range(10):
        callback.on_train_step_end(trainer, step=step)
        scheduler.step()
    assert saved == [
        str(tmp_path / "checkpoint_8_wsd_pre_decay"),
        str(tmp_path / "checkpoint_10_wsd_post_decay.pt"),
    ]
