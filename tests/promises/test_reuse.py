"""A trainer can be used again, and leaves its model and optimizer to their owner."""

import copy
import gc
import multiprocessing
import os
import pickle
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from toys import At, Keeps, create_trainer, one_weight, ones, overriding

from pytorch_accelerated.errors import StopTrainingError
from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.trainer import DEFAULT_CALLBACKS, Trainer


def keeps_rates():
    """Keep the learning rate that each update was made with."""
    return Keeps(
        "on_train_step_start",
        lambda trainer, **_: trainer.optimizer.param_groups[0]["lr"],
    )


# --- going on


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))]
)
@pytest.mark.parametrize("has_trained", [False, True])
def test_a_copy_goes_on_where_the_trainer_stands_found_104(duplicate, has_trained):
    """Pickled or not, before the first run or after it, with the default callbacks."""
    trainer = create_trainer(DEFAULT_CALLBACKS)
    if has_trained:
        trainer.train(ones(4), 1, ones(2), per_device_batch_size=2)

    twin = duplicate(trainer)
    twin.train(ones(2), num_epochs=2)

    before = 0.5 ** (2 * has_trained)
    assert twin.model.weight.item() == before * 0.5**2
    assert trainer.model.weight.item() == before


def test_parameters_that_the_user_adds_between_runs_are_trained():
    """As when layers are unfrozen one after the other."""
    model = nn.Sequential(one_weight(), one_weight())
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.25)
    trainer = create_trainer(model=model, optimizer=optimizer)

    trainer.train(ones(2), num_epochs=1)
    assert [layer.weight.item() for layer in model] == [1.0, 0.5]

    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    trainer.train(ones(2), num_epochs=1)
    # Output 0.5, so the gradients are 2 * 0.5 * the other weight.
    assert [layer.weight.item() for layer in model] == [1 - 0.25 * 0.5, 0.25]


# --- learning rates


def test_a_run_that_was_refused_changes_no_seed():
    def seeds_after(*refused):
        trainer = create_trainer(seed=3)
        for kwargs in refused:
            with pytest.raises((TypeError, ValueError)):
                trainer.train(ones(4), 1, **kwargs)
        trainer.train(ones(4), 1)
        return trainer.run_config.data_seed, torch.initial_seed()

    no_batch = {"train_dataloader_kwargs": {"batch_size": 5, "drop_last": True}}
    needs_more = {"create_scheduler_fn": StepLR}
    assert seeds_after(no_batch, needs_more) == seeds_after()


def test_the_scheduler_of_an_earlier_run_is_gone():
    """Defect 5: it kept stepping, and overwrote the rate that the user had set."""
    rates = keeps_rates()
    trainer = create_trainer([rates], lr=1.0)
    trainer.train(
        ones(2),
        num_epochs=2,
        create_scheduler_fn=partial(StepLR, step_size=1, gamma=0.5),
    )

    trainer.optimizer.param_groups[0]["lr"] = 0.05
    trainer.train(ones(2), num_epochs=3)

    assert trainer.scheduler is None
    assert rates.kept == [1.0, 0.5, 0.05, 0.05, 0.05]


@pytest.mark.parametrize(
    "create",
    [
        partial(LambdaLR, lr_lambda=lambda update: 0.5**update),
        CosineLrScheduler.create_scheduler_fn(lr_min=0.0),
    ],
)
@pytest.mark.parametrize(("set_to", "start"), [(None, 0.1), (0.001, 0.001)])
def test_a_new_scheduler_starts_where_the_first_one_did_or_the_user_says(
    create, set_to, start
):
    """Defect 5: it started from the rate of the very first run."""
    rates = keeps_rates()
    trainer = create_trainer([rates], lr=0.1)
    trainer.train(ones(2), num_epochs=3, create_scheduler_fn=create)
    if set_to is not None:
        trainer.optimizer.param_groups[0]["lr"] = set_to
    trainer.train(ones(2), num_epochs=3, create_scheduler_fn=create)

    assert (rates.kept[0], rates.kept[3]) == (0.1, start)


# --- nothing is left


def resources():
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":  # ends after its worker has
            thread.join(timeout=30)
    return {
        "threads": threading.active_count(),
        "processes": len(multiprocessing.active_children()),
        "files": len(os.listdir("/proc/self/fd")),
    }


def test_no_thread_process_or_file_is_left(one_by_one, capsys):
    trainer = create_trainer(DEFAULT_CALLBACKS)
    trainer.train(ones(2), num_epochs=1)
    before = resources()

    with_workers = {"num_workers": 1, "batch_size": 1}
    trainer.train(
        one_by_one(ones(4)),
        num_epochs=2,
        eval_dataset=one_by_one(ones(4)),
        max_num_train_steps=6,  # in the middle of an epoch
        train_dataloader_kwargs=with_workers,
        eval_dataloader_kwargs=with_workers,
    )
    trainer.evaluate(one_by_one(ones(4)), dataloader_kwargs=with_workers)

    assert resources() == before
    capsys.readouterr()


def test_no_process_is_left_by_a_run_that_has_failed(one_by_one):
    def fail(trainer, **kwargs):
        raise RuntimeError("broken")

    before = resources()
    trainer = create_trainer([At(on_train_step_end=fail)])
    with_workers = {"num_workers": 1, "batch_size": 1}
    with pytest.raises(RuntimeError, match="broken") as raised:
        trainer.train(one_by_one(ones(4)), 1, train_dataloader_kwargs=with_workers)
    del raised

    assert resources() == before


def train_and_look_at_what_is_left(precision):
    kwargs = {"mixed_precision": precision}
    trainer = create_trainer(accelerator_kwargs=kwargs)
    model, optimizer = trainer.model, trainer.optimizer
    attributes, optimizer_attributes = set(vars(model)), set(vars(optimizer))

    for _ in range(2):
        trainer.train(ones(2), num_epochs=1, eval_dataset=ones(2))
        trainer.evaluate(ones(2))

        assert trainer.model is model
        assert trainer.optimizer is optimizer
        assert set(vars(model)) == attributes
        assert set(vars(optimizer)) == optimizer_attributes
        assert type(optimizer) is torch.optim.SGD
        assert model(torch.ones(1, 1)).dtype == torch.float32
        for parameter in model.parameters():
            assert not parameter._backward_hooks
            assert not parameter._post_accumulate_grad_hooks


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_model_and_the_optimizer_are_as_they_came_only_trained(
    on_processes, precision, num_processes
):
    """Defect 57: the model kept the autocast forward of Accelerate."""
    on_processes(num_processes, train_and_look_at_what_is_left, precision)


def test_hooks_and_a_forward_of_the_user_stay():
    calls = []
    trainer = create_trainer(accelerator_kwargs={"mixed_precision": "bf16"})
    model = trainer.model
    model.register_forward_hook(lambda *args: calls.append("hook"))
    forward = model.forward

    def own_forward(inputs):
        calls.append("forward")
        return forward(inputs)

    model.forward = own_forward
    trainer.train(ones(2), num_epochs=1)

    assert calls == ["forward", "hook"]
    assert model.forward is own_forward


def test_each_trainer_computes_in_the_precision_it_was_given():
    """Defect 57: after a trainer with bf16, all later ones computed in bf16."""
    model, dtypes = nn.Sequential(nn.Linear(1, 1)), []
    model[0].register_forward_hook(lambda *args: dtypes.append(args[-1].dtype))
    trainers = [
        create_trainer(model=model, accelerator_kwargs=kwargs)
        for kwargs in ({"mixed_precision": "bf16"}, {"mixed_precision": "no"}, {})
    ]
    for trainer in trainers * 2:
        trainer.train(ones(2), num_epochs=1)

    assert dtypes == [torch.bfloat16, torch.float32, torch.float32] * 2
    precisions = [trainer.run_config.mixed_precision for trainer in trainers]
    assert precisions == ["bf16", "no", "no"]


def test_the_model_is_not_kept_alive_by_a_trainer_that_is_gone():
    model = one_weight()
    create_trainer(model=model).train(ones(2), 1)
    reference = weakref.ref(model)

    del model
    gc.collect()

    assert reference() is None


def test_the_last_batch_is_not_kept_after_a_run():
    references = []

    class Follows(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            references.append(weakref.ref(output["model_outputs"]))
            return output

    class OwnEpoch(Follows):
        def _run_train_epoch(self, train_dl):
            for step, batch in enumerate(train_dl):
                self._perform_forward_and_backward_passes(batch, step)

    def stop(trainer, batch_output, **kwargs):
        raise StopTrainingError

    for trainer_class, callbacks in (
        (Follows, ()),
        (OwnEpoch, ()),
        (Follows, [At(on_train_step_end=stop)]),
    ):
        trainer = create_trainer(callbacks, trainer_class=trainer_class)
        trainer.train(ones(2), 1)

        assert trainer.num_updates is not None
        gc.collect()
        assert references.pop()() is None


# --- checkpoints before and between


def test_a_checkpoint_can_be_saved_and_loaded_before_any_run(tmp_path):
    """Before a run, saving failed with an AttributeError on None."""
    trainer = create_trainer()
    for save_per_node in (True, False):
        trainer.save_checkpoint(tmp_path / "model.pt", save_per_node=save_per_node)
    trainer.save_training_state(tmp_path / "state")
    trainer.model.weight.data.fill_(9.0)

    trainer.load_checkpoint(tmp_path / "model.pt")
    assert trainer.model.weight.item() == 1.0

    trainer.model.weight.data.fill_(9.0)
    assert trainer.load_training_state(tmp_path / "state")["current_epoch"] == 1
    assert trainer.model.weight.item() == 1.0


# --- precision


def test_a_compiled_model_keeps_its_precision_in_each_run_found_67():
    """Under bf16 an input of 1.001 is rounded to 1, from the second run on too."""
    model, outputs = one_weight(), []

    def keep(trainer, batch):
        output = Trainer._calculate_batch_loss(trainer, batch)
        outputs.append(output["model_outputs"].item())
        return output

    trainer = create_trainer(
        model=torch.compile(model, backend="eager"),
        lr=0.0,
        trainer_class=overriding(_calculate_batch_loss=keep),
        accelerator_kwargs={"mixed_precision": "bf16"},
    )
    data = ones(1, 1.001)
    trainer.train(data, 1)
    trainer.train(data, 1)
    trainer.evaluate(data)

    assert outputs == [1.0, 1.0, 1.0]
    assert model(torch.full((1, 1), 1.001)).item() == pytest.approx(1.001)
