import math

import numpy as np
import pytest
import torch
from toys import At, Keeps

from pytorch_accelerated.callbacks import (
    SaveBestModelCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
)
from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.trainer import Trainer


@pytest.mark.parametrize(("load", "num_updates"), [(True, 2), (False, 3)])
def test_the_best_model_is_saved_and_loaded_at_the_end_if_it_is_to(
    train_with_scores, weight_of, tmp_path, load, num_updates
):
    path = tmp_path / "folder" / "best.pt"
    best = SaveBestModelCallback(path, watch_metric="score", load_saved_checkpoint=load)
    trainer = train_with_scores([best], [3, 1, 2])
    assert (best.best_metric, best.best_metric_epoch) == (1, 2)
    assert weight_of(trainer) == 0.5**num_updates


@pytest.mark.parametrize(
    "scores",
    [[1.0], [2.0, 1.0], [np.float64(2), np.float32(1)]],
    ids=["first", "later", "of numpy"],
)
def test_the_value_is_stored_under_the_name_of_the_metric_and_as_loss(
    train_with_scores, tmp_path, scores
):
    """Defect 25: the first save used one key, later ones the other."""
    best = SaveBestModelCallback(tmp_path / "best.pt", watch_metric="score")
    train_with_scores([best], scores)
    saved = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (saved["score"], saved["loss"]) == (1.0, 1.0)


@pytest.mark.parametrize("save", [True, False])
def test_optimizer_and_scheduler_are_saved_as_asked_from_the_first_save_on(
    train_with_scores, tmp_path, save
):
    """Defect 25: the first save ignored save_scheduler=False."""
    best = SaveBestModelCallback(
        tmp_path / "best.pt",
        watch_metric="score",
        save_optimizer=save,
        save_scheduler=save,
    )
    train_with_scores(
        [best], [1], create_scheduler_fn=CosineLrScheduler.create_scheduler_fn()
    )
    saved = torch.load(tmp_path / "best.pt", weights_only=True)
    assert ("optimizer_state_dict" in saved) is save
    assert ("scheduler_state_dict" in saved) is save


def test_nan_at_first_does_not_block_later_epochs(train_with_scores, tmp_path):
    """Defect 25."""
    best = SaveBestModelCallback(tmp_path / "best.pt", watch_metric="score")
    train_with_scores([best], [math.nan, 3, 2])
    assert best.best_metric_epoch == 3


def test_a_run_that_saves_nothing_does_not_load_the_file_of_an_older_run(
    train_with_scores, weight_of, tmp_path, capsys
):
    """Defect 25: it silently loaded the stale file."""

    def stop(trainer):
        raise StopTrainingError("enough")

    path = tmp_path / "best.pt"
    train_with_scores([SaveBestModelCallback(path, watch_metric="score")], [1, 1, 1])
    assert path.exists()
    best = SaveBestModelCallback(path, watch_metric="score")
    trainer = train_with_scores([best, At(on_train_epoch_end=stop)], [0, 0])
    assert weight_of(trainer) == 0.5
    assert "No model was saved in this run; keeping the last" in capsys.readouterr().out


def test_a_run_of_no_epochs_leaves_the_model_as_it_is(
    create_trainer, samples, weight_of, tmp_path
):
    """Defect 25: FileNotFoundError."""
    trainer = create_trainer([SaveBestModelCallback(tmp_path / "best.pt")])
    trainer.train(samples(1), num_epochs=0, eval_dataset=samples(1))
    assert weight_of(trainer) == 1


def test_two_metrics_can_be_watched(train_with_scores, tmp_path):
    """Defect 56."""
    by_score = SaveBestModelCallback(
        tmp_path / "score.pt", "score", greater_is_better=True
    )
    by_loss = SaveBestModelCallback(tmp_path / "loss.pt")
    train_with_scores([by_score, by_loss], [1, 3, 2])
    assert (by_score.best_metric_epoch, by_loss.best_metric_epoch) == (2, 3)


@pytest.mark.parametrize(("reset", "expected"), [(True, (5, 2)), (False, (1, 1))])
def test_each_run_starts_without_a_best_value_if_it_is_to(
    train_with_scores, tmp_path, reset, expected
):
    best = SaveBestModelCallback(
        tmp_path / "best.pt", watch_metric="score", reset_on_train=reset
    )
    trainer = train_with_scores([best], [1])
    train_with_scores(None, [9, 5], trainer)
    assert (best.best_metric, best.best_metric_epoch) == expected


def test_a_resumed_run_keeps_the_best_value(train_with_scores, weight_of, tmp_path):
    """Defect 47: the file was overwritten by a worse model."""
    path = tmp_path / "best.pt"
    best = SaveBestModelCallback(path, watch_metric="score")
    train_with_scores([best], [1]).save_training_state(tmp_path / "state")
    resumed = SaveBestModelCallback(path, watch_metric="score")
    trainer = train_with_scores([resumed], [1, 5, 4], resume_from=tmp_path / "state")
    assert weight_of(trainer) == 0.5
    assert torch.load(path, weights_only=True)["score"] == 1

    path.unlink()
    with pytest.warns(UserWarning, match="of epoch 1, is no longer at"):
        trainer = train_with_scores([resumed], [1, 5], resume_from=tmp_path / "state")
    assert weight_of(trainer) == 0.25


def test_a_run_that_fails_keeps_its_weights(train_with_scores, weight_of, tmp_path):
    def fail(trainer):
        if trainer.run_history.current_epoch == 3:
            raise RuntimeError("broken")

    at_end = Keeps("on_training_run_end", weight_of)
    best = SaveBestModelCallback(tmp_path / "best.pt", watch_metric="score")
    with pytest.raises(RuntimeError, match="broken"):
        train_with_scores([best, At(on_train_epoch_start=fail), at_end], [1, 2, 3])
    assert at_end.kept == [0.5**2]


def test_it_follows_the_main_process(create_trainer, tmp_path):
    """Defect 40: a metric that differs between processes let some wait in the save."""
    trainer = create_trainer()
    trainer.run_history.update_metric("score", 1)
    trainer._accelerator = type("Accelerator", (), {"is_main_process": False})
    saved = []
    trainer.save_checkpoint = lambda **kwargs: saved.append(kwargs)

    best = SaveBestModelCallback(tmp_path / "best.pt", watch_metric="score")
    trainer.agree = lambda flag: flag  # the main process says no
    best.on_training_run_epoch_end(trainer)
    assert saved == []

    trainer.agree = lambda flag: True  # the main process says yes
    best.on_training_run_epoch_end(trainer)
    assert len(saved) == 1


def test_intermediate_evaluations_can_be_watched(create_trainer, samples, tmp_path):
    """Found 96: the model is saved amid the epoch, at the best of its evaluations."""

    class Scripted(Trainer):
        losses = iter([3, 2, 2.5, 9])

        def eval_epoch_end(self):
            self.run_history.update_metric("score", next(self.losses))

    path = tmp_path / "best.pt"
    best = SaveBestModelCallback(path, watch_metric="intermediate_score")
    trainer = create_trainer(
        [StepBasedEvaluationCallback(2), best], trainer_class=Scripted
    )
    trainer.train(samples(6), 1, eval_dataset=samples(1), per_device_batch_size=1)
    assert best.best_metric == 2
    saved = torch.load(path, weights_only=True)["model_state_dict"]["weight"]
    assert saved.item() == trainer.get_model().weight.item() == 0.5**4
