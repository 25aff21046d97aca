"""Nothing of a batch or of a graph outlives its step, and nothing piles up."""

import gc
import weakref

import pytest
import torch
from torch import nn
from toys import Numbers

from pytorch_accelerated.callbacks import TerminateOnNaNCallback, TrainerCallback
from pytorch_accelerated.trainer import DEFAULT_CALLBACKS, Trainer


class WatchesTensors(Trainer):
    """Says at each step which tensors of earlier steps are still alive."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.watched = []
        self.left_over = set()
        self.num_watched = 0

    def watch(self, name, tensor):
        self.watched.append((name, weakref.ref(tensor)))
        self.num_watched += 1

    def look(self):
        self.left_over |= {
            name for name, tensor in self.watched if tensor() is not None
        }
        self.watched = []

    def calculate_train_batch_loss(self, batch):
        return self._watched_step("train", super().calculate_train_batch_loss, batch)

    def calculate_eval_batch_loss(self, batch):
        return self._watched_step("eval", super().calculate_eval_batch_loss, batch)

    def _watched_step(self, phase, calculate, batch):
        self.look()
        output = calculate(batch)
        inputs, targets = batch[0], batch[1]
        output["gradient_free"] = output["model_outputs"].detach().square().mean()
        output["of_the_graph"] = output["model_outputs"].square().mean()
        output["nested"] = {"outputs": output["model_outputs"], "inputs": [inputs]}
        for name, tensor in {"inputs": inputs, "targets": targets, **output}.items():
            if isinstance(tensor, torch.Tensor):
                self.watch(f"{phase} {name}", tensor)
        return output

    train_epoch_end = eval_epoch_end = look


class ReadsEverything(TrainerCallback):
    def on_train_step_end(self, trainer, batch, batch_output, **kwargs):
        self.size = len(batch[0])

    on_eval_step_end = on_train_step_end


@pytest.mark.parametrize("callbacks", [(), (*DEFAULT_CALLBACKS, ReadsEverything)])
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"gradient_clip_norm": 1.0}]
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_no_tensor_of_a_step_is_alive_in_the_next(
    create_classifier, noise, one_by_one, capsys, callbacks, options, in_memory
):
    dataset = noise(12) if in_memory else one_by_one(noise(12))
    model = create_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = WatchesTensors(model, nn.CrossEntropyLoss(), optimizer, callbacks)
    no_workers = {"num_workers": 0}
    # Collected by counting references alone: a cycle would keep a graph for a while.
    gc.collect()
    gc.disable()
    try:
        trainer.train(
            dataset,
            num_epochs=2,
            eval_dataset=dataset,
            per_device_batch_size=3,
            train_dataloader_kwargs=no_workers,
            eval_dataloader_kwargs=no_workers,
            **options,
        )
    finally:
        gc.enable()

    assert trainer.num_watched == 2 * 4 * 2 * 6
    assert trainer.left_over == set()


def test_left_over_tensors_are_seen(create_classifier, noise):
    """The test above would notice a tensor that is kept."""

    class Keeps(TrainerCallback):
        def on_train_step_end(self, trainer, batch, batch_output, **kwargs):
            self.kept = batch_output

    model = create_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = WatchesTensors(model, nn.CrossEntropyLoss(), optimizer, [Keeps()])
    trainer.train(noise(12), num_epochs=1, per_device_batch_size=3)

    assert "train loss" in trainer.left_over
    assert "train targets" not in trainer.left_over


class CountsObjects(TrainerCallback):
    """Counts live tensors and objects at some steps.

    The losses of the last second, a tuple and a tensor each, are left out: they are
    kept until they are looked at together.
    """

    def __init__(self, steps):
        self.steps = steps
        self.counts = []

    def on_train_step_end(self, trainer, batch, batch_output, **kwargs):
        if kwargs["step"] in self.steps:
            gc.collect()
            objects = gc.get_objects()
            tensors = sum(issubclass(type(each), torch.Tensor) for each in objects)
            losses = sum(
                len(callback._collected)
                for callback in trainer.callback_handler
                if isinstance(callback, TerminateOnNaNCallback)
            )
            self.counts.append((tensors - losses, len(objects) - 2 * losses))


@pytest.mark.slow
def test_nothing_piles_up_over_ten_thousand_steps(create_trainer, samples, capsys):
    counts = CountsObjects(steps=(500, 9_999))
    trainer = create_trainer([*DEFAULT_CALLBACKS, counts], lr=1e-4)

    trainer.train(samples(10_000), num_epochs=1, per_device_batch_size=1)

    (early_tensors, early_objects), (late_tensors, late_objects) = counts.counts
    assert late_tensors <= early_tensors
    assert late_objects <= early_objects + 100


def test_a_run_lets_go_of_its_data_once_it_has_ended(create_trainer, samples):
    trainer, dataset = create_trainer(), Numbers(4)
    data = weakref.ref(dataset)
    trainer.train(dataset, num_epochs=1)
    del dataset
    trainer.train(samples(2), num_epochs=1)
    gc.collect()

    assert data() is None
