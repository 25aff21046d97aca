import math

import pytest

from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    SaveBestModelCallback,
    StepBasedEvaluationCallback,
)
from pytorch_accelerated.trainer import Trainer


def epochs_of(trainer):
    return len(trainer.run_history.get_metric_values("score"))


FALLS_A_LITTLE = [1 - 0.005 * epoch for epoch in range(6)]


@pytest.mark.parametrize(
    ("arguments", "scores", "num_epochs", "best"),
    [
        ((2,), [3, 2, 2.5, 2, 1, 0], 4, 2),
        ((2, 0.25), [1.0, 0.875, 0.75, 0.0], 3, 1.0),  # within the threshold
        ((2, 0.25), [1.0, 0.8, 0.7, 0.6, 0.4], 5, 0.4),  # small ones add up
        # Defect 55: the default threshold of 0.01 stopped it at once.
        ((), FALLS_A_LITTLE, 6, FALLS_A_LITTLE[-1]),
        # Defect 55: nothing was better than a first NaN.
        ((2,), [math.nan, 3, 2, 1], 4, 1),
    ],
)
def test_stops_after_patience_epochs_without_improvement(
    train_with_scores, arguments, scores, num_epochs, best
):
    stopping = EarlyStoppingCallback(*arguments, watch_metric="score")
    assert epochs_of(train_with_scores([stopping], scores)) == num_epochs
    assert stopping.best_metric == best


@pytest.mark.parametrize(
    ("name", "greater_is_better", "is_warned_of"),
    [("accuracy", False, True), ("accuracy", True, False), ("loss", True, True)],
)
def test_the_way_that_a_name_says_is_worse_is_warned_of(
    create_trainer, samples, recwarn, name, greater_is_better, is_warned_of
):
    """The worst epoch was taken for the best, without a word."""

    class Scores(Trainer):
        def eval_epoch_end(self):
            self.run_history.update_metric(name, 1.0)

    stopping = EarlyStoppingCallback(
        watch_metric=name, greater_is_better=greater_is_better
    )
    trainer = create_trainer([stopping], trainer_class=Scores)
    trainer.train(samples(1), 1, samples(1))
    advice = f"pass greater_is_better={not greater_is_better}"
    assert [advice in str(each.message) for each in recwarn] == [True] * is_warned_of


@pytest.mark.parametrize("patience", [0, -1])
def test_patience_below_one_is_refused(patience):
    """Defect 55: a patience of 0 stopped after the first epoch."""
    with pytest.raises(ValueError, match=r"at least 1 epoch.*leave the callback out"):
        EarlyStoppingCallback(patience)


def test_a_negative_threshold_is_refused():
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        EarlyStoppingCallback(1, -1)


@pytest.mark.parametrize(
    "order", [("stop", "save"), ("save", "stop")], ids=["stop first", "save first"]
)
def test_the_best_epoch_is_saved_in_whatever_order_they_are_listed(
    train_with_scores, tmp_path, order
):
    """Defect 25: an improvement below the threshold stopped the run before the save."""
    callbacks = {
        "stop": EarlyStoppingCallback(1, 0.5, watch_metric="score"),
        "save": SaveBestModelCallback(tmp_path / "best.pt", watch_metric="score"),
    }
    train_with_scores([callbacks[name] for name in order], [1.0, 0.9, 0.0])
    assert callbacks["save"].best_metric == 0.9
    assert callbacks["save"].best_metric_epoch == 2


@pytest.mark.parametrize(("reset_on_train", "num_epochs"), [(True, 3), (False, 1)])
def test_each_run_starts_to_count_anew_or_goes_on(
    train_with_scores, reset_on_train, num_epochs
):
    stopping = EarlyStoppingCallback(
        2, watch_metric="score", reset_on_train=reset_on_train
    )
    trainer = train_with_scores([stopping], [1, 2])
    assert epochs_of(train_with_scores(None, [9, 8, 7], trainer)) == num_epochs


def test_a_resumed_run_goes_on_counting(train_with_scores, tmp_path):
    stopping = EarlyStoppingCallback(2, watch_metric="score")
    train_with_scores([stopping], [1, 2]).save_training_state(tmp_path / "state")
    resumed = EarlyStoppingCallback(2, watch_metric="score")
    trainer = train_with_scores(
        [resumed], [1, 2, 1.5, 0, 0], resume_from=tmp_path / "state"
    )
    assert epochs_of(trainer) == 3
    assert resumed.best_metric == 1


def test_a_run_that_had_stopped_trains_no_further_when_it_is_resumed(
    train_with_scores, weight_of, tmp_path
):
    stopping = EarlyStoppingCallback(1, watch_metric="score")
    train_with_scores([stopping], [1, 2]).save_training_state(tmp_path / "state")
    resumed = EarlyStoppingCallback(1, watch_metric="score")
    trainer = train_with_scores([resumed], [1, 2, 0, 0], resume_from=tmp_path / "state")
    assert weight_of(trainer) == 0.25


def test_it_says_what_it_does(train_with_scores, capsys):
    """Found 115."""
    stopping = EarlyStoppingCallback(2, watch_metric="score")
    train_with_scores([stopping], [3, 2.5, 2.75, 2.5])
    assert capsys.readouterr().out.splitlines() == [
        "score improved by 0.5000 to 2.500",
        "score has not improved on 2.500 for 1 of 2 epochs",
        "score has not improved on 2.500 for 2 of 2 epochs",
        "Stopping early: score has not improved on 2.500 for 2 epochs",
    ]


def test_intermediate_evaluations_can_be_watched(create_trainer, samples):
    """Found 96: patience is counted in evaluations."""

    class Scripted(Trainer):
        losses = iter([3, 2, 2.5, 2.25, 1])

        def eval_epoch_end(self):
            self.run_history.update_metric("score", next(self.losses))

    stopping = EarlyStoppingCallback(2, watch_metric="intermediate_score")
    trainer = create_trainer(
        [StepBasedEvaluationCallback(2), stopping], trainer_class=Scripted
    )
    trainer.train(samples(10), 1, eval_dataset=samples(1), per_device_batch_size=1)
    assert trainer.num_steps == 8
    assert stopping.best_metric == 2
