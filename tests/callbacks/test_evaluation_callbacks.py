import pytest
import torch
from torch.utils.data import TensorDataset
from toys import At

from pytorch_accelerated.callbacks import (
    LimitEvalStepsCallback,
    LogMetricsCallback,
    ModelEmaCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
    TrainerCallback,
)


class EvalLog(TrainerCallback):
    """Writes down after which step evaluations took place, and how long they were."""

    def __init__(self):
        self.intermediate, self.whole, self.num_batches = [], [], 0

    def on_eval_epoch_start(self, trainer, **kwargs):
        self.num_batches = 0

    def on_eval_step_end(self, trainer, batch, batch_output, **kwargs):
        self.num_batches += 1

    def on_eval_epoch_end(self, trainer, is_intermediate=False, **kwargs):
        seen = (trainer.num_steps, self.num_batches)
        (self.intermediate if is_intermediate else self.whole).append(seen)

    @property
    def steps(self):
        return [step for step, _ in self.intermediate]


@pytest.mark.parametrize(
    ("every", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4]), (7, [])]
)
def test_evaluates_after_every_nth_step_of_the_run(
    create_trainer, samples, every, steps
):
    """Defect 12: one step late, not at all for n = 1's first step, anew each epoch."""
    log = EvalLog()
    trainer = create_trainer([StepBasedEvaluationCallback(every), log])
    trainer.train(
        samples(3), num_epochs=2, eval_dataset=samples(1), per_device_batch_size=1
    )
    assert log.steps == steps
    assert [step for step, _ in log.whole] == [3, 6]


def test_intermediate_evaluations_are_kept_with_their_update_and_logged(
    create_trainer, samples
):
    """Found 96: of five values one was printed, and none was kept."""
    logged = []

    class Log(LogMetricsCallback):
        def log_metrics(self, trainer, metrics):
            logged.extend(metrics.items())

    trainer = create_trainer([StepBasedEvaluationCallback(2), Log])
    history = trainer.train(
        samples(10), num_epochs=1, eval_dataset=samples(1), per_device_batch_size=1
    )
    records = history.records("intermediate_eval_loss")
    assert [(record.step, record.value) for record in records] == [
        (step, 0.25**step) for step in (2, 4, 6, 8, 10)
    ]
    assert [value for name, value in logged if name == "intermediate_eval_loss"] == [
        record.value for record in records
    ]


def test_no_eval_dataset_is_an_error_before_training(
    create_trainer, samples, weight_of
):
    """Defect 12: 'NoneType' object is not iterable."""
    trainer = create_trainer([StepBasedEvaluationCallback(1)])
    with pytest.raises(ValueError, match="StepBasedEvaluationCallback needs an eval_d"):
        trainer.train(samples(1), num_epochs=1)
    assert weight_of(trainer) == 1


def test_an_evaluation_that_stops_the_run_leaves_the_trainer_usable(
    create_trainer, samples
):
    """Defect 12: the loss tracker was not restored."""

    def stop(trainer, **kwargs):
        raise StopTrainingError("enough")

    stopping = At(on_eval_step_end=stop)
    trainer = create_trainer([StepBasedEvaluationCallback(1), stopping])
    trainer.train(samples(2), 1, eval_dataset=samples(1), per_device_batch_size=1)
    assert trainer._loss_tracker.running_count == 1  # the step of training
    assert trainer.model.training


def test_a_resumed_run_goes_on_counting(create_trainer, samples, tmp_path):
    def run(num_epochs, **kwargs):
        log = EvalLog()
        trainer = create_trainer([StepBasedEvaluationCallback(2), log])
        trainer.train(
            samples(3),
            num_epochs,
            eval_dataset=samples(1),
            per_device_batch_size=1,
            **kwargs,
        )
        trainer.save_training_state(tmp_path / "state")
        return log.steps

    assert run(1) == [2]
    assert run(2, resume_from=tmp_path / "state") == [4, 6]


@pytest.mark.parametrize("wrong", [0, -1])
def test_steps_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match=f"at least 1, got {wrong}"):
        StepBasedEvaluationCallback(wrong)
    with pytest.raises(ValueError, match=f"at least 1, got {wrong}"):
        LimitEvalStepsCallback(wrong)


@pytest.mark.parametrize("ema_first", [True, False])
@pytest.mark.parametrize(("intermediate_only", "batches"), [(True, 4), (False, 2)])
def test_an_evaluation_ends_after_the_steps_allowed_and_so_does_that_of_the_average(
    create_trainer, samples, tmp_path, ema_first, intermediate_only, batches
):
    """Defect 13: the limit had no effect. Found 76: nor had it if listed first."""
    log, of_average = EvalLog(), EvalLog()
    callbacks = [
        LimitEvalStepsCallback(2, intermediate_only),
        ModelEmaCallback(1.0, save_path=tmp_path / "ema.pt", callbacks=[of_average]),
    ]
    callbacks = callbacks[::-1] if ema_first else callbacks
    trainer = create_trainer([*callbacks, StepBasedEvaluationCallback(1), log])
    evaluated = TensorDataset(torch.arange(4.0).reshape(4, 1), torch.zeros(4, 1))
    history = trainer.train(samples(1), 1, evaluated, per_device_batch_size=1)
    assert [number for _, number in log.intermediate] == [2]
    assert [number for _, number in (*log.whole, *of_average.whole)] == [batches] * 2
    # The average stays at a weight of 1: the losses are 0, 1, 4 and 9.
    loss = sum(number**2 for number in range(batches)) / batches
    assert history.get_latest_metric("ema_model_eval_loss_epoch") == loss
    assert trainer.eval_batch_limit is None


def test_each_process_does_its_share_and_at_least_one_step(create_trainer):
    """Defect 13: fewer steps than processes made a limit of 0."""
    limits = []
    for num_eval_steps in (7, 1):
        trainer = create_trainer()
        trainer._accelerator = type("Accelerator", (), {"num_processes": 3})
        callback = LimitEvalStepsCallback(num_eval_steps)
        callback.on_eval_epoch_start(trainer, is_intermediate=True)
        limits.append(trainer.eval_batch_limit)
    assert limits == [2, 1]


@pytest.mark.parametrize("error", [StopTrainingError("x"), RuntimeError("x")])
def test_the_limit_is_lifted_if_an_evaluation_does_not_end(
    create_trainer, samples, error, reaches_the_caller
):
    def fail(trainer, **kwargs):
        raise error

    failing = At(on_eval_step_end=fail)
    trainer = create_trainer([LimitEvalStepsCallback(1, False), failing])
    trainer.eval_batch_limit = 3
    with reaches_the_caller(error):
        trainer.train(samples(1), 1, eval_dataset=samples(1))
    assert trainer.eval_batch_limit == 3


def test_an_intermediate_evaluation_at_the_end_of_an_epoch_found_78(
    create_trainer, samples
):
    """The epoch's own evaluation takes place all the same."""

    def evaluate(trainer, **kwargs):
        trainer._run_eval_epoch(trainer._eval_dataloader, is_intermediate=True)

    trainer = create_trainer([At(on_train_epoch_end=evaluate)])
    history = trainer.train(samples(1), 2, eval_dataset=samples(1))

    losses = [0.25, 0.25**2]
    assert history.get_metric_values("intermediate_eval_loss") == losses
    assert history.get_metric_values("eval_loss_epoch") == losses
