"""Runs that leave no trace: what a trainer is tried with, and then put back."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from pytorch_accelerated import checkpoint, checks, distributed
from pytorch_accelerated.callbacks import (
    CallbackHandler,
    MoveModulesToDeviceCallback,
    TrainerCallback,
)
from pytorch_accelerated.data import loaders
from pytorch_accelerated.run import Run, UnderWay
from pytorch_accelerated.tracking import InMemoryRunHistory

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

# Those that no user has taught to do something else when they are emptied and filled.
_PLAIN_CONTAINERS = (dict, OrderedDict, defaultdict, list)


@contextmanager
def rehearsal(
    trainer: Trainer, method: str, data: Any, *listeners: TrainerCallback
) -> Iterator[None]:
    """Let a trainer train for a block, and undo it: all is as before, bit for bit.

    Undone is what the trainer, its model, its optimizer and other modules among its
    attributes hold: tensors, numbers, lists, dictionaries and random generators; the
    global random states; and of the data what it holds itself, such as a generator or a
    counter. Values go back in place: no object is replaced. Meanwhile nothing is
    printed, and the callbacks and the run history of the trainer hear of nothing.
    Copies of tensors are kept on the CPU.

    Args:
        trainer: The trainer.
        method: What the user has called, for messages.
        data: The dataset or loader of the block.
        *listeners: The callbacks that take part.
    """
    _check_can_be_undone(trainer, method, data)
    checks.warn_of_misspelt_names(trainer)  # while its callbacks are there
    torch.empty(0, device=trainer.device)  # an unused one would have no states
    with ExitStack() as undo:
        undo.callback(checkpoint.set_random_states, checkpoint.get_random_states())
        undo.callback(_refill, vars(trainer), dict(vars(trainer)))
        handler = trainer.callback_handler
        movers = [c for c in handler if isinstance(c, MoveModulesToDeviceCallback)]
        trainer.callback_handler = CallbackHandler([*movers, *listeners])
        trainer.run_history = InMemoryRunHistory()
        vars(trainer)["print"] = lambda *args, **kwargs: None
        if not trainer._engine.computes_alone:
            _shard_weights(trainer)
        before = _Before(undo)
        before.note_data(data)
        before.note(vars(trainer))
        before.note(trainer._accelerator.scaler)
        yield


def _check_can_be_undone(trainer: Trainer, method: str, data: Any) -> None:
    if trainer._run.is_under_way:
        raise RuntimeError(
            f"{method} was called amid a run, by a callback or a method of the trainer."
            " Call it before the run."
        )
    if trainer._engine.owns_gradients:
        raise ValueError(
            f"{method} cannot be used with DeepSpeed, whose state cannot be put back. "
            "Use it without, for example with a smaller model."
        )
    if isinstance(data, Iterator) and loaders.length_of(data) is None:
        raise ValueError(
            f"{method} needs data that can be read again, got a {type(data).__name__}, "
            "which a look uses up. Pass a dataset or a DataLoader."
        )


def _shard_weights(trainer: Trainer) -> None:
    """Let FSDP replace the weights by parts of them, as any run does for good."""
    checks.check_optimizer(trainer.model, trainer.optimizer)
    run = Run(is_training=True)
    with UnderWay(trainer, run):
        run.prepare_model_and_optimizer(trainer)


class _Before:
    """Copies values, so that they can go back to where they were.

    Args:
        undo: What is called to put them back.
    """

    def __init__(self, undo: ExitStack) -> None:
        self._on_undo = undo.callback
        # Kept alive, so that no other object gets their ids.
        self._seen: dict[int, Any] = {}

    def note(self, value: Any) -> None:
        """Copy a value and all that is in it.

        What has no values of its own here (functions, callbacks, datasets) stays.
        """
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._note_tensor(value)
        elif isinstance(value, nn.Module | Optimizer | GradScaler):
            self.note(vars(value))
        elif isinstance(value, tuple) or type(value) in _PLAIN_CONTAINERS:
            if not isinstance(value, tuple):
                self._on_undo(_refill, value, value.copy())
            for member in value.values() if isinstance(value, dict) else value:
                self.note(member)
        else:
            self._note_generator(value)

    def note_data(self, data: Any) -> None:
        """Note the members of a dataset or loader, which is too large to be copied."""
        members = getattr(data, "__dict__", {})
        self._on_undo(_refill, members, dict(members))
        for name, member in members.items():
            if name in ("dataset", "sampler", "batch_sampler"):
                self.note_data(member)
            self._note_generator(member)

    def _note_generator(self, value: Any) -> None:
        """Copy the state of a random generator; leave everything else."""
        if isinstance(value, torch.Generator | np.random.RandomState):
            self._on_undo(value.set_state, value.get_state())  # type: ignore[arg-type]
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            self._on_undo(setattr, bits, "state", bits.state)
        elif type(value) is random.Random:
            self._on_undo(value.setstate, value.getstate())

    def _note_tensor(self, tensor: Tensor) -> None:
        values = _local(tensor).detach().to("cpu", copy=True)
        grad = tensor.grad if tensor.is_leaf else None
        self._on_undo(_put_back, tensor, values, tensor.requires_grad, grad)
        self.note(grad)


@torch.no_grad()
def _put_back(
    tensor: Tensor, values: Tensor, requires_grad: bool, grad: Tensor | None
) -> None:
    _local(tensor).copy_(values)
    if tensor.is_leaf:
        tensor.requires_grad_(requires_grad)
        tensor.grad = grad


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process holds.

    Of a tensor that shows the same elements many times, they are in it once.
    """
    part = distributed.own_part(tensor)
    strides = part.stride() if part.layout is torch.strided else ()
    for dim, stride in enumerate(strides):
        if stride == 0 and part.shape[dim] > 1:
            part = part.narrow(dim, 0, 1)
    return part


def _refill(container: Any, members: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(members)
