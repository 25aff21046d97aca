import math

import numpy as np
import pytest
import torch
from toys import At, ones

from pytorch_accelerated.callbacks import (
    BestSoFar,
    EarlyStoppingCallback,
    SaveBestModelCallback,
)


def beaten(values, **kwargs):
    best = BestSoFar(**kwargs)
    return [best.update(value) for value in values], best.value


def test_a_smaller_value_is_better_by_default():
    assert beaten([2, 3, 1, 1]) == ([True, False, True, False], 1)


def test_a_greater_value_can_be_better():
    assert beaten([2, 3, 1], greater_is_better=True) == ([True, True, False], 3)


def test_an_improvement_must_exceed_the_threshold():
    assert beaten([1.0, 0.75, 0.5], threshold=0.25) == ([True, False, True], 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("greater_is_better", [True, False])
def test_what_is_not_finite_never_wins(bad, greater_is_better):
    """Defects 25 and 55: NaN as the first value blocked all others."""
    beats, value = beaten([bad, 1.0, bad], greater_is_better=greater_is_better)
    assert beats == [False, True, False]
    assert value == 1.0


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5])]
)
def test_numbers_of_numpy_and_torch_are_kept_as_plain_numbers(value):
    """Defect 25."""
    best = BestSoFar()
    assert best.update(value)
    assert type(best.value) is float
    assert best.value == 0.5


# ------------------------------------------------------------ callbacks that watch


@pytest.fixture(params=[EarlyStoppingCallback, SaveBestModelCallback])
def watching(request, monkeypatch, tmp_path):
    """The callbacks that watch a metric."""
    monkeypatch.chdir(tmp_path)  # where one of them saves
    return request.param


def test_a_metric_that_is_not_recorded_is_an_error_that_lists_those_that_are(
    train_with_scores, watching
):
    with pytest.raises(
        ValueError,
        match=r"'scores' has not been recorded by the end of epoch 1; recorded so far: "
        "eval_loss_epoch, score, train_loss_epoch",
    ):
        train_with_scores([watching(watch_metric="scores")], [1])


def test_watching_the_eval_loss_without_an_eval_dataset_is_refused_before_training(
    create_trainer, weight_of, watching
):
    """Defect 25: ValueError after the first epoch."""
    trainer = create_trainer([watching()])
    with pytest.raises(ValueError, match=r"needs an eval_dataset.*'train_loss_epoch'"):
        trainer.train(ones(1), num_epochs=1)
    assert weight_of(trainer) == 1


def test_what_is_not_one_number_cannot_be_watched(create_trainer, watching):
    """Found 111."""

    def record(trainer):
        trainer.run_history.update_metric("scores", {"f1": 0.5})

    records = At(on_train_epoch_end=record)
    trainer = create_trainer([records, watching(watch_metric="scores")])
    with pytest.raises(TypeError, match=r"must be one number.*is a dict.*scores_f1"):
        trainer.train(ones(1), 1)
