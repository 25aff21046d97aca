"""R5: the host does not wait for the device inside a step.

Every way in which python can read a number out of a tensor is counted, of whatever
tensor but the order of the samples (whole numbers in one dimension), which never leaves
the host.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toys import At, Sent, create_trainer

from pytorch_accelerated.callbacks import (
    RecordHistoryCallback,
    TrackerCallback,
    TrainerCallback,
)
from pytorch_accelerated.trainer import DEFAULT_CALLBACKS, Trainer

# item(), float(), bool() and the like end in an operation that is counted by itself.
OTHER_READS = {"tolist", "numpy", "cpu", "__array__", "equal", "nonzero"}


class CountReads(TorchFunctionMode):
    """Counts the reads of whole tensors that python code asks for."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in OTHER_READS and not _is_order(args[0]):
            self.count += 1
        return func(*args, **(kwargs or {}))


class CountReadsOfNumbers(TorchDispatchMode):
    """Counts the reads of single numbers, those inside of torch's functions too."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and not _is_order(
            args[0]
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


def _is_order(tensor):
    return tensor.dtype is torch.int64 and tensor.dim() == 1


class CountedSteps(Trainer):
    """Counts the reads from the first step of each epoch to the end of its last."""

    reads = 0

    def _run_windows(self, train_dl):
        with CountReads() as reads, CountReadsOfNumbers() as numbers:
            is_over = super()._run_windows(train_dl)
        self.reads += reads.count + numbers.count
        return is_over

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        accuracy = (output["model_outputs"].argmax(1) == batch[1]).float().mean()
        return {**output, "accuracy": accuracy}


class CountedStepsByItems(CountedSteps):
    """Its losses are means over items that are counted on the device."""

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        return {**output, "num_items_in_batch": (batch[1] > 0).sum()}


class CountedStepsWithMetrics(CountedSteps):
    """A function is given all its predictions and targets at the end of the epoch."""

    def __init__(self, *args):
        super().__init__(*args, train_metrics={"count": lambda p, t: len(t)})


def count_reads(model, dataset, callbacks=(), trainer_class=CountedSteps, **kwargs):
    trainer = create_trainer(
        callbacks,
        model=model,
        lr=0.1,
        loss_func=nn.CrossEntropyLoss(),
        trainer_class=trainer_class,
    )
    trainer.train(
        dataset,
        num_epochs=1,
        per_device_batch_size=2,
        train_dataloader_kwargs={"num_workers": 0},
        **kwargs,
    )
    assert trainer.num_steps == len(dataset) / 2
    return trainer.reads


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_norm": 1.0},
        {"gradient_clip_value": 0.1},
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 3, "gradient_clip_norm": 1.0},
    ],
    ids=lambda options: " and ".join(options) or "plain",
)
@pytest.mark.parametrize(
    "trainer_class", [CountedSteps, CountedStepsByItems, CountedStepsWithMetrics]
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_step_reads_nothing_from_the_device(
    create_classifier, noise, one_by_one, options, trainer_class, in_memory
):
    dataset = noise(40) if in_memory else one_by_one(noise(40))
    first_batch_of_the_run = 1  # in which unit items are counted, see window.py

    reads = count_reads(
        create_classifier(), dataset, trainer_class=trainer_class, **options
    )

    counts_items = trainer_class is CountedStepsByItems
    accumulates = "gradient_accumulation_steps" in options
    assert reads == (first_batch_of_the_run if counts_items and accumulates else 0)


def test_the_default_callbacks_read_no_more_often_in_more_steps(
    create_classifier, noise, capsys, monkeypatch
):
    """They look once a second, and the clock stands still here."""
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)

    def reads(count):
        return count_reads(create_classifier(), noise(count), DEFAULT_CALLBACKS)

    few = reads(20)
    assert few <= 2
    assert reads(200) == few


@pytest.mark.parametrize(
    "create", [partial(TrackerCallback, Sent()), RecordHistoryCallback]
)
def test_a_tracker_or_a_history_costs_one_read_in_n_updates(
    create_classifier, noise, create
):
    callbacks = [create(every_n_updates=5)]

    reads = count_reads(
        create_classifier(), noise(40), callbacks, gradient_clip_norm=math.inf
    )

    assert reads == 20 / 5


def test_reads_are_seen(create_classifier, noise):
    """The tests above would notice a read."""

    def read(trainer, batch_output, **kwargs):
        batch_output["loss"].item()
        bool(batch_output["loss"] > 0)
        torch.isfinite(batch_output["loss"]).tolist()

    reads = At(on_train_step_end=read)
    assert count_reads(create_classifier(), noise(20), [reads]) >= 30


def test_the_methods_of_callbacks_are_looked_up_once_a_run_and_not_at_each_step(
    create_classifier, noise
):
    lookups = []

    class Watched(TrainerCallback):
        def __getattribute__(self, name):
            if name.startswith("on_train_"):
                lookups.append(name)
            return super().__getattribute__(name)

        def on_train_step_end(self, trainer, batch, batch_output, **kwargs):
            pass

    def lookups_of(count, num_epochs):
        lookups.clear()
        trainer = create_trainer(
            [Watched()], model=create_classifier(), loss_func=nn.CrossEntropyLoss()
        )
        trainer.train(noise(count), num_epochs)
        return sorted(lookups)

    assert lookups_of(8, 1).count("on_train_step_end") == 1
    assert lookups_of(8, 1) == lookups_of(160, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"gradient_clip_norm": 1.0}])
def test_a_step_never_waits_for_a_real_gpu(create_classifier, noise, options):
    class Strict(Trainer):
        def _run_train_step(self, *args):
            torch.cuda.set_sync_debug_mode("error")
            try:
                super()._run_train_step(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    trainer = create_trainer(
        model=create_classifier(),
        loss_func=nn.CrossEntropyLoss(),
        trainer_class=Strict,
    )
    trainer.train(noise(64), num_epochs=2, **options)
    assert trainer.num_updates == 16
