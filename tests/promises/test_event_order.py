"""The hooks of the trainer and the events of callbacks, in the order of a run."""

from functools import partial

import pytest
from torch.optim.lr_scheduler import StepLR
from toys import At, create_trainer, ones, overriding

from pytorch_accelerated.callbacks import (
    ProgressBarCallback,
    StopTrainingError,
    TrainerCallback,
)
from pytorch_accelerated.trainer import Trainer

HOOKS = (
    "training_run_start",
    "train_epoch_start",
    "calculate_train_batch_loss",
    "backward_step",
    "optimizer_step",
    "scheduler_step",
    "optimizer_zero_grad",
    "train_epoch_end",
    "eval_epoch_start",
    "calculate_eval_batch_loss",
    "eval_epoch_end",
    "training_run_epoch_end",
    "training_run_end",
    "evaluation_run_start",
    "evaluation_run_end",
)
EVENTS = tuple(name for name in dir(TrainerCallback) if name.startswith("on_"))


def recording_trainer(calls, raise_at=None, error=None):
    """Make a class of trainers and a callback that note each call, then may raise."""

    def note(name):
        calls.append(name)
        if name == raise_at and calls.count(name) == 1:
            raise error

    def hook(name):
        def method(self, *args, **kwargs):
            result = getattr(Trainer, name)(self, *args, **kwargs)
            note(name)
            return result

        return method

    def event(name):
        return lambda trainer, **kwargs: note(name)

    own = overriding(**{name: hook(name) for name in HOOKS})
    return own, At(**{name: event(name) for name in EVENTS})


def step(*, is_update=True, has_scheduler=False):
    update = [
        "optimizer_step",
        *(["scheduler_step"] if has_scheduler else ()),
        "optimizer_zero_grad",
        "on_train_update_end",
    ]
    return [
        "on_train_step_start",
        "calculate_train_batch_loss",
        "backward_step",
        *(update if is_update else ()),
        "on_train_step_end",
    ]


def train_epoch(*steps):
    return [
        "train_epoch_start",
        "on_train_epoch_start",
        *(call for one in steps for call in one),
        "train_epoch_end",
        "on_train_epoch_end",
    ]


def eval_epoch(num_steps):
    one_step = ["on_eval_step_start", "calculate_eval_batch_loss", "on_eval_step_end"]
    return [
        "eval_epoch_start",
        "on_eval_epoch_start",
        *(one_step * num_steps),
        "eval_epoch_end",
        "on_eval_epoch_end",
    ]


RUN_START = ["training_run_start", "on_training_run_start"]
EPOCH_END = ["training_run_epoch_end", "on_training_run_epoch_end"]
RUN_END = ["training_run_end", "on_training_run_end"]
STOPPED = ["on_stop_training_error", *RUN_END]
EVALUATION_START = ["evaluation_run_start", "on_evaluation_run_start"]
EVALUATION_END = ["evaluation_run_end", "on_evaluation_run_end"]


def run(method, dataset, raise_at, error, callbacks=(), calls=None, **kwargs):
    """Train or evaluate with batches of two samples; return the calls."""
    calls = [] if calls is None else calls
    trainer_class, callback = recording_trainer(calls, raise_at, error)
    trainer = create_trainer([callback, *callbacks], trainer_class=trainer_class)
    getattr(trainer, method)(dataset, per_device_batch_size=2, **kwargs)
    return calls


def train(raise_at=None, error=None, callbacks=(), calls=None, **kwargs):
    """Train on 3 batches for two epochs, evaluating on 2 batches."""
    arguments = {"num_epochs": 2, "eval_dataset": ones(4), **kwargs}
    return run("train", ones(6), raise_at, error, callbacks, calls, **arguments)


def evaluate(raise_at=None, error=None, calls=None):
    """Evaluate on 3 batches."""
    return run("evaluate", ones(5), raise_at, error, calls=calls)


def stop(trainer, **kwargs):
    raise StopTrainingError("enough")


STOPS_AFTER_EPOCH = At(on_train_epoch_end=stop)


def test_calls_of_a_run_of_two_epochs_with_evaluation():
    calls = train()

    epoch = [*train_epoch(step(), step(), step()), *eval_epoch(2), *EPOCH_END]
    assert calls == ["on_init_end", *RUN_START, *epoch, *epoch, *RUN_END]


def test_the_last_partial_window_of_an_epoch_makes_an_update_and_a_scheduler_step():
    calls = train(
        num_epochs=1,
        eval_dataset=None,
        gradient_accumulation_steps=2,
        create_scheduler_fn=partial(StepLR, step_size=1),
    )

    update = step(has_scheduler=True)
    epoch = train_epoch(step(is_update=False), update, update)
    assert calls == ["on_init_end", *RUN_START, *epoch, *EPOCH_END, *RUN_END]


def test_calls_of_a_run_that_a_limit_ends_within_an_epoch():
    calls = train(max_num_train_steps=4)

    first = [*train_epoch(step(), step(), step()), *eval_epoch(2), *EPOCH_END]
    second = [*train_epoch(step()), *eval_epoch(2), *EPOCH_END]
    assert calls == ["on_init_end", *RUN_START, *first, *second, *RUN_END]


def test_calls_of_an_evaluation_run():
    assert evaluate() == [
        "on_init_end",
        *EVALUATION_START,
        *eval_epoch(3),
        *EVALUATION_END,
    ]


IN_AN_EPOCH = [*train_epoch(step()), *eval_epoch(1), *EPOCH_END]


@pytest.mark.parametrize("place", [*RUN_START, *IN_AN_EPOCH])
def test_a_run_can_be_stopped_at_any_place(place):
    """Defect 39: StopTrainingError at the start of a run escaped as an error."""
    calls = train(place, StopTrainingError("enough"))

    assert calls[calls.index(place) + 1 :] == STOPPED


@pytest.mark.parametrize("place", RUN_END)
def test_stopping_at_the_end_of_a_run_changes_nothing(place):
    """Defect 39: StopTrainingError at the end of a run escaped as an error."""
    calls = train(place, StopTrainingError("enough"))

    assert calls[-2:] == RUN_END
    assert calls.count("on_training_run_end") == 1


def test_an_error_while_the_stop_is_announced_does_not_skip_the_end_of_the_run():
    calls = train(
        "on_stop_training_error", StopTrainingError("again"), [STOPS_AFTER_EPOCH]
    )

    assert calls[-3:] == STOPPED


@pytest.mark.parametrize(
    "place", [*EVALUATION_START, "on_eval_step_end", *EVALUATION_END]
)
def test_an_evaluation_can_be_stopped_at_any_place(place):
    """Defect 39: StopTrainingError at the start of an evaluation escaped."""
    calls = evaluate(place, StopTrainingError("enough"))

    assert calls[-2:] == EVALUATION_END
    stopped_early = place not in EVALUATION_END
    assert ("on_stop_training_error" in calls) == stopped_early


def test_all_callbacks_hear_of_the_event_at_which_one_stops_the_run():
    heard = []
    listens = At(
        on_train_epoch_end=lambda trainer, **_: heard.append(
            trainer.run_history.current_epoch
        )
    )
    trainer = create_trainer([STOPS_AFTER_EPOCH, listens])
    trainer.train(ones(2), num_epochs=3)

    assert heard == [1]
    assert trainer.run_history.current_epoch == 1  # it is not over


@pytest.mark.parametrize("place", ["on_training_run_start", *IN_AN_EPOCH])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_any_other_error_is_announced_and_goes_on_after_the_end_of_the_run(
    place, error
):
    """Defect 39: other exceptions ended a run without any clean-up."""
    calls = []

    with pytest.raises(type(error)) as raised:
        train(place, error, calls=calls)

    assert raised.value is error
    assert calls[calls.index(place) + 1 :] == ["on_exception", *RUN_END]


@pytest.mark.parametrize(
    ("place", "following"),
    [
        ("on_stop_training_error", ["on_exception", *RUN_END]),
        ("training_run_end", ["on_exception", "on_training_run_end"]),
        ("on_training_run_end", ["on_exception"]),
    ],
)
def test_an_error_at_the_end_of_a_run_is_announced(place, following):
    calls = []
    with pytest.raises(RuntimeError, match="broken"):
        train(place, RuntimeError("broken"), [STOPS_AFTER_EPOCH], calls)

    assert calls[calls.index(place) + 1 :] == following


def test_an_error_in_an_evaluation_is_announced_and_goes_on():
    calls = []
    with pytest.raises(RuntimeError, match="broken"):
        evaluate("on_eval_step_end", RuntimeError("broken"), calls)

    assert calls[-3:] == ["on_exception", *EVALUATION_END]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_after_an_error_the_model_is_plain_and_the_bars_are_closed(error, capsys):
    """Defect 39: the progress bar stayed open and the model wrapped."""
    bars = []

    def fail(trainer, **kwargs):
        bars.append(trainer.callback_handler.callbacks[0].pbar)
        raise error

    trainer = create_trainer(
        [ProgressBarCallback, At(on_train_step_end=fail)],
        accelerator_kwargs={"mixed_precision": "bf16"},
    )
    model, optimizer = trainer.model, trainer.optimizer
    with pytest.raises(type(error)):
        trainer.train(ones(2), num_epochs=1)

    assert trainer.callback_handler.callbacks[0].pbar is None
    assert bars[0].disable  # as tqdm leaves a bar that it has closed
    assert trainer.model is model
    assert trainer.optimizer is optimizer
    assert "forward" not in vars(model)
    capsys.readouterr()


def test_an_error_while_cleaning_up_does_not_hide_the_first_one(capsys):
    def fail(trainer, exception=None, **kwargs):
        raise RuntimeError("second" if exception else "first")

    breaks = At(on_train_step_end=fail, on_exception=fail)
    with pytest.raises(RuntimeError, match="first"):
        create_trainer([breaks]).train(ones(2), num_epochs=1)

    assert "second" in capsys.readouterr().out
