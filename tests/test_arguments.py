"""An argument that there is not names the one that was meant."""

import inspect

import pytest
from torch import nn

from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
)
from pytorch_accelerated.trainer import Trainer


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ("batch_size", r"Did you mean per_device_batch_size\?"),
        ("val_dataset", r"Did you mean eval_dataset\?"),
        ("epochs", r"Did you mean num_epochs\?"),
        ("create_scheduler", r"Did you mean create_scheduler_fn\?"),  # a near miss
        ("patience", r"early_stopping_patience, an argument of EarlyStoppingCallback"),
        ("monitor", "watch_metric, an argument of .*Callback"),
        ("callbacks", r"Did you mean callbacks, an argument of Trainer\(\)"),
        ("xyz", "It takes: train_dataset, num_epochs, eval_dataset"),
    ],
)
def test_train_names_the_argument_that_was_meant_found_104(
    create_trainer, samples, argument, advice
):
    with pytest.raises(
        TypeError,
        match=rf"train\(\) got an unexpected keyword argument '{argument}'. .*{advice}",
    ):
        create_trainer().train(samples(2), 1, **{argument: 3})


@pytest.mark.parametrize(
    ("call", "argument", "advice"),
    [
        (Trainer.evaluate, "eval_dataset", r"Did you mean dataset\?"),
        (Trainer.evaluate, "batch_size", "per_device_batch_size"),
        (Trainer.predict, "test_dataset", r"Did you mean dataset\?"),
        (EarlyStoppingCallback, "patience", r"Did you mean early_stopping_patience\?"),
        (SaveBestModelCallback, "monitor", r"Did you mean watch_metric\?"),
        (SaveTrainingStateCallback, "save_top_k", r"Did you mean keep_best\?"),
    ],
)
def test_so_do_other_methods_and_callbacks_found_104(call, argument, advice):
    with pytest.raises(TypeError, match=advice):
        call(**{argument: 3})


def test_so_does_the_trainer_found_104():
    class MyTrainer(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    for trainer_class in (Trainer, MyTrainer):
        with pytest.raises(TypeError, match="num_epochs, an argument of"):
            trainer_class(nn.Linear(1, 1), None, None, epochs=3)
        with pytest.raises(TypeError, match=r"Did you mean loss_func\?"):
            trainer_class(nn.Linear(1, 1), criterion=None, optimizer=None)


def test_an_argument_that_is_missing_is_python_s_own_error(create_trainer):
    with pytest.raises(TypeError, match=r"missing 1 required .*'train_dataset'"):
        create_trainer().train(num_epochs=1)


def test_signatures_can_be_looked_at():
    assert list(inspect.signature(Trainer).parameters)[:3] == [
        "model",
        "loss_func",
        "optimizer",
    ]
    assert "num_epochs" in inspect.signature(Trainer.train).parameters
    assert Trainer.train.__doc__.startswith("Train the model")
