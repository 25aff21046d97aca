"""R8: updates, steps and samples; limits; runs that go on; placeholders."""

import math
from functools import partial

import pytest
import torch
from toys import At, Keeps, Stream, create_trainer, ones

from pytorch_accelerated.callbacks import LimitBatchesCallback
from pytorch_accelerated.trainer import Trainer, TrainerPlaceholderValues


class CountsOptimizerSteps(Trainer):
    num_optimizer_steps = 0

    def optimizer_step(self):
        self.num_optimizer_steps += 1
        super().optimizer_step()


class KeepsArguments:
    """Takes the place of a scheduler, to look at what placeholders stand for."""

    def __init__(self, optimizer, **arguments):
        self.arguments = arguments

    def step(self):
        pass

    def state_dict(self):
        return {}


PLACEHOLDERS = {member.name: member for member in TrainerPlaceholderValues}

create_trainer = partial(create_trainer, lr=0.1, trainer_class=CountsOptimizerSteps)


def count(num_samples, num_epochs, callbacks=(), **kwargs):
    kept = {
        "numbers of updates": Keeps("on_train_update_end", read_num_updates),
        "numbers of steps": Keeps("on_train_step_end", lambda _, step, **__: step),
        "epochs": Keeps("on_training_run_epoch_end", read_epoch),
    }
    trainer = create_trainer([*kept.values(), *callbacks])
    history = trainer.train(
        ones(num_samples),
        num_epochs,
        eval_dataset=ones(8),
        create_scheduler_fn=partial(KeepsArguments, **PLACEHOLDERS),
        **kwargs,
    )
    config = trainer.run_config
    return {
        **{name: keeps.kept for name, keeps in kept.items()},
        "updates": trainer.num_updates,
        "optimizer steps": trainer.num_optimizer_steps,
        "steps": trainer.num_steps,
        "samples": trainer.num_samples_seen,
        "planned epochs": config.num_epochs,
        "per epoch": config.num_update_steps_per_epoch,
        "per epoch too": config.num_local_update_steps_per_epoch,
        "limit": config.max_num_train_steps,
        "total batch size": config.train_total_batch_size,
        "placeholders": trainer.scheduler.arguments,
        "train losses": len(history.get_metric_values("train_loss_epoch")),
        "eval losses": len(history.get_metric_values("eval_loss_epoch")),
        "next epoch": history.current_epoch,
    }


def read_num_updates(trainer, num_updates, **kwargs):
    return num_updates


def read_epoch(trainer, **kwargs):
    return trainer.run_history.current_epoch


# The arguments of a run, with batches of 4 samples over all processes.
GRID = [
    {
        "num_samples": num_samples,
        "num_epochs": num_epochs,
        "gradient_accumulation_steps": accumulation,
        "max_num_train_steps": limit,
    }
    for num_samples in (8, 10, 21)
    for num_epochs in (1, 3)
    for accumulation in (1, 2, 4)
    for limit in (None, 1, 5, 100)
]


def check(counts, case):
    steps = math.ceil(case["num_samples"] / 4)
    accumulation = case["gradient_accumulation_steps"]
    per_epoch = math.ceil(steps / accumulation)
    total = min(case["num_epochs"] * per_epoch, case["max_num_train_steps"] or math.inf)
    whole_epochs, rest = divmod(total, per_epoch)
    num_epochs = math.ceil(total / per_epoch)
    # In an epoch that is cut short, all windows are full ones.
    numbers_of_steps = [*range(steps)] * whole_epochs + [*range(rest * accumulation)]
    placeholders = counts.pop("placeholders")
    assert placeholders.pop("NUM_EPOCHS") == pytest.approx(total / per_epoch), case
    # Together with the epochs, which are exact beside it, the length of the run.
    of_epoch = placeholders.pop("NUM_UPDATE_STEPS_PER_EPOCH")
    assert placeholders.pop("PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH") == of_epoch, case
    assert placeholders == {"TRAIN_DATALOADER_LEN": steps, "EVAL_DATALOADER_LEN": 2}
    assert counts == {
        "updates": total,
        "optimizer steps": total,
        "steps": len(numbers_of_steps),
        "samples": whole_epochs * case["num_samples"] + rest * accumulation * 4,
        "numbers of updates": list(range(1, total + 1)),
        "numbers of steps": numbers_of_steps,
        "epochs": list(range(1, num_epochs + 1)),
        # Also an epoch that was cut short has its loss and its evaluation.
        "train losses": num_epochs,
        "eval losses": num_epochs,
        "next epoch": num_epochs + 1,
        "planned epochs": num_epochs,
        "per epoch": per_epoch,
        "per epoch too": per_epoch,
        "total batch size": 4 * accumulation,
        "limit": total,  # found 99: one more, without a limit
    }, case


def test_one_process_counts_what_it_did():
    """Defects 15, 17 and 58."""
    for case in GRID:
        check(count(**case, per_device_batch_size=4), case)


def test_two_processes_count_what_the_job_did(on_processes):
    """Defects 1 and 15."""
    runs = on_processes(
        2, lambda: [count(**case, per_device_batch_size=2) for case in GRID]
    )
    for process in runs:
        for counts, case in zip(process, GRID, strict=True):
            check(counts, case)


def test_the_samples_of_a_run_that_is_never_whole_are_still_counted():
    dropped = {"drop_last": True}
    counts = count(7, 2, per_device_batch_size=2, train_dataloader_kwargs=dropped)
    assert (counts["samples"], counts["per epoch"]) == (12, 3)


def test_a_limit_of_batches_is_part_of_all_counts():
    """Defects 38 and 58: the last window was never applied."""
    counts = count(
        20,
        2,
        [LimitBatchesCallback(3)],
        per_device_batch_size=2,
        gradient_accumulation_steps=2,
    )
    assert counts["steps"] == 6
    assert counts["updates"] == counts["optimizer steps"] == 4
    assert counts["per epoch"] == 2
    assert counts["placeholders"]["TRAIN_DATALOADER_LEN"] == 3
    assert counts["placeholders"]["NUM_UPDATE_STEPS_PER_EPOCH"] == 2


def test_limits_are_those_of_each_call():
    """Defect 7: a run that went on stopped early."""
    trainer = create_trainer()
    arguments = {"per_device_batch_size": 2, "reset_run_history": False}
    trainer.train(ones(8), 2, **arguments)
    trainer.train(ones(8), 6, **arguments)
    assert trainer.num_updates == 24
    trainer.train(ones(8), 9, max_num_train_steps=5, **arguments)
    assert trainer.num_updates == 5
    assert trainer.num_optimizer_steps == 8 + 24 + 5
    history = trainer.run_history
    assert len(history.get_metric_values("train_loss_epoch")) == 2 + 6 + 2
    assert history.current_epoch == 11
    assert [record.epoch for record in history.records("train_loss_epoch")] == list(
        range(1, 11)
    )


def test_a_stream_of_unknown_length_ends_by_itself_or_at_the_limit():
    trainer = create_trainer()
    trainer.train(
        Stream(ones(10)), 2, per_device_batch_size=3, gradient_accumulation_steps=3
    )
    # Batches of 3, 3, 3 and 1: two windows in each epoch.
    assert (trainer.num_steps, trainer.num_updates) == (8, 4)
    assert trainer.num_samples_seen == 20
    trainer.train(Stream(ones(10)), 100, per_device_batch_size=3, max_num_train_steps=6)
    assert (trainer.num_steps, trainer.num_updates) == (6, 6)
    assert trainer.run_config.num_update_steps_per_epoch is None


# ------------------------------------------------------------ without num_epochs


def count_updates_alone():
    whole = count(10, None, max_num_train_steps=8, per_device_batch_size=2)
    placeholders = {"epochs": PLACEHOLDERS["NUM_EPOCHS"]}
    trainer = create_trainer()
    trainer.train(
        Stream(ones(10)),
        max_num_train_steps=9,
        per_device_batch_size=2,
        create_scheduler_fn=partial(KeepsArguments, **placeholders),
    )
    return {
        "whole": whole,
        "stream": (trainer.num_updates, trainer.run_config.num_epochs),
        "epochs of the stream": trainer.run_history.current_epoch - 1,
        "placeholders": trainer.scheduler.arguments,
    }


@pytest.mark.parametrize("num_processes", [1, 2])
def test_without_a_number_of_epochs_there_are_as_many_as_the_updates_take(
    on_processes, num_processes
):
    per_epoch = 5 if num_processes == 1 else 3
    for counts in on_processes(num_processes, count_updates_alone):
        whole = counts["whole"]
        assert whole["updates"] == whole["optimizer steps"] == whole["limit"] == 8
        assert whole["planned epochs"] == len(whole["epochs"]) == -(-8 // per_epoch)
        assert whole["placeholders"]["NUM_EPOCHS"] == pytest.approx(8 / per_epoch)
        assert whole["placeholders"]["NUM_UPDATE_STEPS_PER_EPOCH"] == per_epoch
        assert counts["stream"] == (9, 9)
        assert counts["epochs of the stream"] == -(-9 // per_epoch)
        assert counts["placeholders"] == {"epochs": 1}


def test_neither_a_number_of_epochs_nor_of_updates_is_refused():
    with pytest.raises(ValueError, match=r"neither num_epochs nor max_num_train_steps"):
        create_trainer().train(ones(4))


def test_without_a_number_of_epochs_a_run_that_can_make_no_updates_ends():
    stream = Stream(ones(4))

    def leave_nothing(trainer, **kwargs):
        stream.dataset = ones(0)

    trainer = create_trainer([At(on_train_epoch_end=leave_nothing)])
    with pytest.raises(ValueError, match="yielded no batch"):
        trainer.train(stream, max_num_train_steps=9, per_device_batch_size=2)
    assert trainer.num_updates == 2

    class Own(Trainer):
        num_passes = 0

        def _run_train_epoch(self, train_dl):
            self.num_passes += 1
            return self.num_passes == 3

    own = create_trainer(trainer_class=Own)
    with pytest.raises(ValueError, match="Give num_epochs"):
        own.train(ones(2), max_num_train_steps=2)
    with pytest.warns(UserWarning, match="max_num_train_steps=100"):
        own.train(ones(2), 3, max_num_train_steps=100)


def test_without_a_number_of_epochs_a_resumed_run_makes_the_updates_left(tmp_path):
    def save(trainer, **kwargs):
        if trainer.num_updates == 3:  # the last one of the first epoch
            trainer.save_training_state(tmp_path / "state")
            raise KeyboardInterrupt

    arguments = {"max_num_train_steps": 7, "per_device_batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        create_trainer([At(on_train_step_end=save)]).train(ones(6), **arguments)
    trainer = create_trainer()
    trainer.train(ones(6), resume_from=tmp_path / "state", **arguments)
    assert (trainer.num_updates, trainer.num_optimizer_steps) == (7, 4)
    assert len(trainer.run_history.get_metric_values("train_loss_epoch")) == 3


class SkipsFirst(CountsOptimizerSteps):
    """fp16 with a scale at which the first updates overflow."""

    def _create_accelerator(self):
        accelerator = super()._create_accelerator()
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        return accelerator


def test_updates_that_fp16_skips_are_made_up_for_unless_all_are():
    trainer = create_trainer(trainer_class=SkipsFirst)
    trainer.train(ones(2, 3.0), max_num_train_steps=2)
    assert trainer.num_updates == 2
    assert trainer.run_history.current_epoch > 3
    with pytest.raises(ValueError, match="made no update"):
        trainer.train(ones(2, torch.inf), max_num_train_steps=2)
