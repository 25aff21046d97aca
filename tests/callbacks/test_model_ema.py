import copy

import pytest
import torch
from toys import At, Keeps

from pytorch_accelerated.callbacks import (
    ModelEmaCallback,
    SaveBestModelCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
)
from pytorch_accelerated.schedulers import CosineLrScheduler


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ema.pt"


def ema_weight(callback):
    return callback.ema_model.module.weight.item()


def average_after(num_updates, decay=0.5):
    average = 1.0
    for update in range(1, num_updates + 1):
        average = decay * average + (1 - decay) * 0.5**update
    return average


def test_the_average_moves_once_per_update(create_trainer, samples, path):
    """Defect 14: once per epoch."""
    ema = ModelEmaCallback(decay=0.5, save_path=path)
    create_trainer([ema]).train(
        samples(5),
        num_epochs=2,
        eval_dataset=samples(1),
        per_device_batch_size=1,
        gradient_accumulation_steps=2,
    )
    assert ema_weight(ema) == pytest.approx(average_after(6))


def test_the_average_is_evaluated_after_each_epoch(
    create_trainer, samples, weight_of, path
):
    ema = ModelEmaCallback(decay=0.5, save_path=path)
    trainer = create_trainer([ema])
    history = trainer.train(samples(1), num_epochs=2, eval_dataset=samples(1))
    assert history.get_metric_values("ema_model_eval_loss_epoch") == pytest.approx(
        [average_after(1) ** 2, average_after(2) ** 2]
    )
    assert history.get_metric_values("eval_loss_epoch") == [0.25, 0.25**2]
    assert history.metric_name_prefix == ""
    assert weight_of(trainer) == 0.5**2


def test_the_best_average_is_saved_alone(create_trainer, samples, path):
    """Defect 14: the file held the state of the scheduler."""
    ema = ModelEmaCallback(decay=0.5, save_path=path)
    create_trainer([ema]).train(
        samples(1),
        num_epochs=2,
        eval_dataset=samples(1),
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(),
    )
    saved = torch.load(path, weights_only=True)
    assert saved.keys() == {"model_state_dict", "ema_model_eval_loss_epoch", "loss"}
    assert saved["model_state_dict"]["weight"].item() == ema_weight(ema)
    assert isinstance(ema, SaveBestModelCallback)


def test_without_an_evaluation_each_average_is_saved(create_trainer, samples, path):
    """Defect 14: no eval dataset was an error even so."""
    ema = ModelEmaCallback(decay=0.5, evaluate_during_training=False, save_path=path)
    history = create_trainer([ema]).train(samples(1), num_epochs=2)
    saved = torch.load(path, weights_only=True)
    assert saved["model_state_dict"]["weight"].item() == ema_weight(ema)
    assert set(history.get_metric_names()) == {"train_loss_epoch"}


def test_no_eval_dataset_is_an_error_before_training(
    create_trainer, samples, weight_of, path
):
    """Defect 14."""
    trainer = create_trainer([ModelEmaCallback(save_path=path)])
    with pytest.raises(ValueError, match="evaluate_during_training=False"):
        trainer.train(samples(1), num_epochs=1)
    assert weight_of(trainer) == 1


def test_evaluate_evaluates_only_the_model(create_trainer, samples, path):
    """Defect 14: an error before training, and the average's metrics after it."""
    trainer = create_trainer([ModelEmaCallback(save_path=path)])
    assert trainer.evaluate(samples(1)) == {"evaluation_loss": 1}
    trainer.train(samples(1), num_epochs=1, eval_dataset=samples(1))
    assert trainer.evaluate(samples(1)) == {"evaluation_loss": 0.25}


def test_intermediate_evaluations_are_of_the_model_only(create_trainer, samples, path):
    """Defect 14."""
    trainer = create_trainer(
        [ModelEmaCallback(save_path=path), StepBasedEvaluationCallback(1)]
    )
    history = trainer.train(
        samples(3), num_epochs=1, eval_dataset=samples(1), per_device_batch_size=1
    )
    assert len(history.get_metric_values("ema_model_eval_loss_epoch")) == 1


@pytest.mark.parametrize("error", [StopTrainingError("x"), RuntimeError("x")])
def test_everything_is_put_back_if_the_evaluation_of_the_average_fails(
    create_trainer, samples, path, error, reaches_the_caller
):
    """Defect 14: the trainer kept the average, the prefix and the callbacks."""

    def fail(trainer, **kwargs):
        raise error

    fails = At(on_eval_epoch_start=fail)
    ema = ModelEmaCallback(save_path=path, callbacks=[fails])
    trainer = create_trainer([ema])
    model, handler = trainer.model, trainer.callback_handler
    with reaches_the_caller(error):
        trainer.train(samples(1), num_epochs=1, eval_dataset=samples(1))
    assert trainer.model is model
    assert trainer.callback_handler is handler
    assert trainer.run_history.metric_name_prefix == ""
    assert trainer.evaluate(samples(1)) == {"evaluation_loss": 0.25}


def test_only_its_own_callbacks_hear_of_the_evaluation_of_the_average(
    create_trainer, samples, path
):
    inner, outer = (
        Keeps("on_eval_step_end", lambda trainer, **kwargs: trainer.model)
        for _ in range(2)
    )
    ema = ModelEmaCallback(save_path=path, callbacks=[inner])
    trainer = create_trainer([ema, outer])
    trainer.train(samples(1), num_epochs=1, eval_dataset=samples(1))
    assert inner.kept == [ema.ema_model.module]
    assert outer.kept == [trainer.model]


def test_a_run_that_goes_on_keeps_the_average(create_trainer, samples, path):
    """Defect 14: it started anew at every train()."""
    ema = ModelEmaCallback(decay=0.5, save_path=path)
    trainer = create_trainer([ema])
    for _ in range(2):
        trainer.train(
            samples(1), num_epochs=1, eval_dataset=samples(1), reset_run_history=False
        )
    assert ema_weight(ema) == pytest.approx(average_after(2))
    trainer.train(samples(1), num_epochs=1, eval_dataset=samples(1))
    assert ema_weight(ema) == 0.5 * 0.25 + 0.5 * 0.125, "and a new one a new average"


def test_another_kind_of_average_can_be_given(create_trainer, samples, path):
    class Latest:
        def __init__(self, model, decay):
            self.decay, self.module = decay, copy.deepcopy(model)

        def to(self, device):
            self.module.to(device)

        def update(self, model):
            self.module.load_state_dict(model.state_dict())

    ema = ModelEmaCallback(decay=0.7, save_path=path, model_ema=Latest)
    create_trainer([ema]).train(samples(1), num_epochs=1, eval_dataset=samples(1))
    assert ema.ema_model.decay == 0.7
    assert ema_weight(ema) == 0.5


def test_it_holds_no_model_after_a_run(create_trainer, samples, path):
    ema = ModelEmaCallback(save_path=path)
    create_trainer([ema]).train(samples(1), num_epochs=1, eval_dataset=samples(1))
    assert ema._averaged_model is None
