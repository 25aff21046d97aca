"""Counts the collectives that the library itself asks for.

What DDP does on its own, to average gradients, is not among them: it takes place below
Python.
"""

import contextlib
from collections import Counter
from unittest import mock

import torch
import torch.distributed
from sharded_cases import CountsItems, WithoutDropout, create_data, create_model
from torch import nn

from pytorch_accelerated.callbacks import SaveTrainingStateCallback, TrainerCallback
from pytorch_accelerated.trainer import DEFAULT_CALLBACKS

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce"),
    *("all_to_all", "barrier", "broadcast", "broadcast_object_list", "gather"),
    *("gather_object", "reduce", "reduce_scatter_tensor", "scatter"),
    *("monitored_barrier", "recv", "send"),
)


@contextlib.contextmanager
def counted():
    """Count calls from outside of torch.distributed; objects go in two tensors."""
    counts, sizes = Counter(), []
    is_inside = False

    def counting(name, function):
        def call(*args, **kwargs):
            nonlocal is_inside
            if is_inside:
                return function(*args, **kwargs)
            counts[name] += 1
            sizes.extend(a.numel() for a in args if isinstance(a, torch.Tensor))
            is_inside = True
            try:
                return function(*args, **kwargs)
            finally:
                is_inside = False

        return call

    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            function = getattr(torch.distributed, name)
            stack.enter_context(
                mock.patch.object(torch.distributed, name, counting(name, function))
            )
        yield counts, sizes


def run(num_samples, num_epochs, trainer_class=WithoutDropout, callbacks=(), **kwargs):
    model = create_model()
    trainer = trainer_class(
        model,
        loss_func=nn.MSELoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        callbacks=callbacks,
        seed=3,
    )
    arguments = {"per_device_batch_size": 2, "eval_dataset": create_data(8), **kwargs}
    with counted() as (counts, sizes):
        trainer.train(create_data(num_samples), num_epochs=num_epochs, **arguments)
    return sum(counts.values()), max(sizes, default=0), dict(counts)


def per_update_and_epoch(**kwargs):
    """Return collectives per update and per epoch, from runs of other lengths."""
    # 4 samples are an update of two processes with 2 each; 10 and 20 updates.
    updates = kwargs.get("gradient_accumulation_steps", 1)
    short, largest, counts = run(40 * updates, 1, **kwargs)
    long, _, _ = run(80 * updates, 1, **kwargs)
    two_epochs, _, _ = run(40 * updates, 2, **kwargs)
    return {
        "per_update": (long - short) / 10,
        "per_epoch": two_epochs - short,
        "per_run": short,
        "largest": largest,
        "counts": counts,
    }


def plain(folder):
    return per_update_and_epoch()


def default_callbacks(folder):
    return per_update_and_epoch(callbacks=DEFAULT_CALLBACKS)


def accumulated(folder):
    return per_update_and_epoch(gradient_accumulation_steps=2)


def clipped(folder):
    return per_update_and_epoch(gradient_clip_norm=1.0)


def counted_items(folder):
    return per_update_and_epoch(
        trainer_class=CountsItems, gradient_accumulation_steps=2
    )


class MayStop(TrainerCallback):
    """Listens to updates, so that processes have to agree after them."""

    def on_train_update_end(self, trainer, **kwargs):
        pass


def callback_of_updates(folder):
    return per_update_and_epoch(callbacks=[MayStop()])


def training_states(folder):
    save = SaveTrainingStateCallback(folder / "states", overwrite=True)
    return per_update_and_epoch(callbacks=[save])
