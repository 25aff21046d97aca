"""Runs that leave no trace: what a trainer is tried with, and then put back."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pytorch_accelerated import checkpoint, checks
from pytorch_accelerated.callbacks import (
    CallbackHandler,
    MoveModulesToDeviceCallback,
    TrainerCallback,
)
from pytorch_accelerated.run import Run, UnderWay
from pytorch_accelerated.tracking import InMemoryRunHistory

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

# Those that no user has taught to do something else when they are emptied and filled.
_PLAIN_CONTAINERS = (dict, OrderedDict, defaultdict, list)


class Rehearsal:
    """Lets a trainer train for a block, and undoes it: all is as before, bit for bit.

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

    def __init__(
        self, trainer: Trainer, method: str, data: Any, *listeners: TrainerCallback
    ) -> None:
        self._trainer = trainer
        self._method = method
        self._data = data
        self._listeners = listeners
        self._undo: list[Callable[[], object]] = []
        # Kept alive, so that no other object gets their ids.
        self._seen: dict[int, Any] = {}

    def __enter__(self) -> None:
        """Copy everything, and let nobody listen."""
        trainer = self._trainer
        self._check_can_be_undone()
        checks.warn_of_misspelt_names(trainer)  # while its callbacks are there
        torch.empty(0, device=trainer.device)  # an unused one would have no states
        self._random_states = checkpoint.get_random_states()
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise

    def _begin(self) -> None:
        trainer, handler = self._trainer, self._trainer.callback_handler
        self._copy_data(self._data)
        self._undo.append(partial(_refill, vars(trainer), dict(vars(trainer))))
        movers = [c for c in handler if isinstance(c, MoveModulesToDeviceCallback)]
        trainer.callback_handler = CallbackHandler([*movers, *self._listeners])
        trainer.run_history = InMemoryRunHistory()
        vars(trainer)["print"] = lambda *args, **kwargs: None
        if not trainer._engine.computes_alone:
            self._shard_weights()
        self._copy(vars(trainer))
        if trainer._accelerator.scaler is not None:
            self._copy(vars(trainer._accelerator.scaler))

    def __exit__(self, *error: object) -> None:
        """Put everything back."""
        for undo in reversed(self._undo):
            undo()
        checkpoint.set_random_states(self._random_states)

    def _shard_weights(self) -> None:
        """Let FSDP replace the weights by parts of them, as any run does for good."""
        checks.check_optimizer(self._trainer.model, self._trainer.optimizer)
        run = Run(is_training=True)
        with UnderWay(self._trainer, run):
            run.prepare_model_and_optimizer(self._trainer)

    def _copy(self, value: Any) -> None:
        """Copy a value and all that is in it.

        What has no values of its own here (functions, callbacks, datasets) stays.
        """
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._undo.append(_undo_of_tensor(value))
            self._copy(value.grad if value.is_leaf else None)
        elif isinstance(value, nn.Module | Optimizer):
            self._copy(vars(value))
        elif type(value) in _PLAIN_CONTAINERS or isinstance(value, tuple):
            if not isinstance(value, tuple):
                self._undo.append(partial(_refill, value, value.copy()))
            for member in value.values() if isinstance(value, dict) else value:
                self._copy(member)
        else:
            self._copy_generator(value)

    def _copy_data(self, data: Any) -> None:
        """Note the members of a dataset or loader, which is too large to be copied."""
        members = getattr(data, "__dict__", {})
        self._undo.append(partial(_refill, members, dict(members)))
        for name, member in members.items():
            if name in ("dataset", "sampler", "batch_sampler"):
                self._copy_data(member)
            self._copy_generator(member)

    def _copy_generator(self, value: Any) -> None:
        """Copy the state of a random generator; leave everything else."""
        if isinstance(value, torch.Generator | np.random.RandomState):
            self._undo.append(partial(value.set_state, value.get_state()))  # type: ignore[arg-type]
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            self._undo.append(partial(setattr, bits, "state", bits.state))
        elif type(value) is random.Random:
            self._undo.append(partial(value.setstate, value.getstate()))

    def _check_can_be_undone(self) -> None:
        if self._trainer._run.is_under_way:
            raise RuntimeError(
                f"{self._method} was called amid a run, by a callback or a method of "
                "the trainer. Call it before the run."
            )
        if self._trainer._engine.owns_gradients:
            raise ValueError(
                f"{self._method} cannot be used with DeepSpeed, whose state cannot be "
                "put back. Use it without, for example with a smaller model."
            )


def _undo_of_tensor(tensor: Tensor) -> Callable[[], None]:
    grad = tensor.grad if tensor.is_leaf else None
    requires_grad = tensor.requires_grad
    copy = _local(tensor).detach().to("cpu", copy=True)

    def undo() -> None:
        with torch.no_grad():
            _local(tensor).copy_(copy)
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad

    return undo


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process holds.

    Of a tensor that shows the same elements many times, they are in it once.
    """
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    strides = part.stride() if part.layout is torch.strided else ()
    for dim, stride in enumerate(strides):
        if stride == 0 and part.shape[dim] > 1:
            part = part.narrow(dim, 0, 1)
    return part


def _refill(container: Any, members: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(members)
