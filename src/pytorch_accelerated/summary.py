"""What a training step of a model holds and costs, layer by layer."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from pytorch_accelerated import checks
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.data import loaders
from pytorch_accelerated.rehearsal import rehearsal

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

__all__ = ["LayerSummary", "ModelSummary"]

_LINE = "{:37.37} {:21.21} {:>11} {:>8}"


@dataclass(frozen=True)
class LayerSummary:
    """A module of the model, with all that is inside of it.

    Attributes:
        name: Its name in the model, empty for the model itself.
        kind: The name of its class.
        output: The shapes of the tensors in its last output, such as ``"8 x 64"`` or
            ``"loss: 1 number, logits: 8 x 10"``; empty if it was not called.
        num_parameters: Numbers in its weights; those that layers share are counted in
            each of them, and in the model once.
        num_trained: Those that require a gradient and that the optimizer holds.
        flops: Of its forward passes, for the whole batch.
    """

    name: str
    kind: str
    output: str
    num_parameters: int
    num_trained: int
    flops: int


@dataclass(frozen=True)
class ModelSummary:
    """What a training step of a model holds and costs; as text, a table.

    FLOPs are those of matrix products, convolutions and attention: what torch counts,
    a multiplication and an addition being two.

    Attributes:
        layers: The modules, the model itself first.
        memory: Bytes of the ``"weights"`` and ``"buffers"``, of the ``"gradients"``
            after a backward pass, and of the state of the ``"optimizer"`` after an
            update, unless that was not applied, since a gradient overflowed.
        forward_flops: Of a forward pass.
        step_flops: Of forward and backward pass together.
        num_samples: Samples in the batch that they were counted for.
        depth: How far the table goes into the model.
    """

    layers: tuple[LayerSummary, ...] = field(repr=False)
    memory: Mapping[str, int]
    forward_flops: int
    step_flops: int
    num_samples: int
    depth: int

    @property
    def num_parameters(self) -> int:
        """Numbers in the weights, shared ones counted once."""
        return self.layers[0].num_parameters

    @property
    def num_trained(self) -> int:
        """Those that require a gradient and that the optimizer holds."""
        return self.layers[0].num_trained

    @property
    def flops_per_sample(self) -> float:
        """Those of forward and backward pass, for one sample of the batch."""
        return self.step_flops / max(self.num_samples, 1)

    def _ipython_display_(self) -> None:
        """Show nothing: it has been printed."""

    def __str__(self) -> str:
        """Return the table, 80 columns wide."""
        lines = [_LINE.format("Layer", "Output", "Parameters", "FLOPs"), "-" * 80]
        for layer in self.layers:
            path = layer.name.split(".") if layer.name else []
            if len(path) <= self.depth:
                label = "  " * len(path) + ": ".join([*path[-1:], layer.kind])
                count = f"{layer.num_parameters:,}" if layer.num_parameters else "-"
                if layer.num_parameters and not layer.num_trained:
                    count = f"({count})"
                flops = _short(layer.flops) if layer.flops else "-"
                lines.append(_LINE.format(label, layer.output or "-", count, flops))
        num_frozen = self.num_parameters - self.num_trained
        memory = (f"{what} {_short(size, 'B')}" for what, size in self.memory.items())
        forward, step = _short(self.forward_flops), _short(self.step_flops)
        return "\n".join(
            [
                *lines,
                "-" * 80,
                f"Parameters  {self.num_trained:,} trained, {num_frozen:,} (frozen)",
                f"Memory      {', '.join(memory)}",
                f"FLOPs       forward {forward}, with backward {step}, for this batch",
            ]
        )


def _short(number: float, unit: str = "") -> str:
    """Return a number with three digits, in thousands, millions ... of a unit."""
    power = 0
    while number >= 999.5:
        number, power = number / 1000, power + 1
    prefix = " kMGTPEZY"[power].strip()
    return f"{number:.3g} {prefix}{unit}".rstrip()


def summarize(
    trainer: Trainer, batch: Any, depth: int, per_device_batch_size: int
) -> ModelSummary:
    """Do what the trainer's method ``summary`` says, and print nothing."""
    checks.check_is_at_least("depth", depth, 0)
    is_dataset = isinstance(batch, Dataset) or hasattr(batch, "__getitems__")
    is_data = is_dataset or loaders.yields_batches(batch)
    step = _MeasuredStep()
    with (
        rehearsal(trainer, "summary()", batch if is_data else None, step),
        torch.compiler.set_stance("force_eager"),  # which works from when it is made
        warnings.catch_warnings(),
        step.counter,
    ):
        warnings.filterwarnings("ignore", r"Using `torch\.compile")  # it is not used
        if trainer.optimizer is None:
            trainer.optimizer = torch.optim.SGD(trainer.model.parameters())
        trainer.train(
            batch if is_data else _OneBatch(batch),
            num_epochs=1,
            max_num_train_steps=1,
            per_device_batch_size=per_device_batch_size,
        )
        return step.summary(trainer, depth)


class _OneBatch:
    """A loader of one batch, which on several processes is each one's own."""

    is_split_by_process = True

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Any]:
        yield self._batch


class _MeasuredStep(TrainerCallback):
    """Looks at the passes of a step, and at what is there after them.

    Attributes:
        counter: Counts what torch computes while it is entered.
    """

    # A step may have no backward pass that could be seen.
    _forward_flops: int = 0
    _step_flops: int = 0
    _gradient_bytes: int = 0

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)
        self._starts: list[int] = []
        self._flops: Counter[str] = Counter()
        self._outputs: dict[str, str] = {}

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to each call of a module, and to the backward pass."""
        model = trainer.get_model(keep_torch_compile=False)
        backward_step, num_flops = trainer.backward_step, self.counter.get_total_flops
        hooks = []
        for name, module in model.named_modules():
            note_end = partial(self._note_end, name)
            hooks.append(module.register_forward_pre_hook(self._note_start))
            hooks.append(module.register_forward_hook(note_end))

        def measured_backward_step(loss: Tensor) -> None:
            for hook in hooks:  # checkpointed layers are called again
                hook.remove()
            self._forward_flops = num_flops()
            backward_step(loss)
            self._step_flops = num_flops()
            self._gradient_bytes = _num_bytes(p.grad for p in model.parameters())

        vars(trainer)["backward_step"] = measured_backward_step

    def _note_start(self, module: nn.Module, args: Any) -> None:
        self._starts.append(self.counter.get_total_flops())

    def _note_end(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._flops[name] += self.counter.get_total_flops() - self._starts.pop()
        self._outputs[name] = _shapes_in(output)

    def summary(self, trainer: Trainer, depth: int) -> ModelSummary:
        """Return what was seen, and what is there after the run of the step."""
        model = trainer.get_model(keep_torch_compile=False)
        optimizer: Any = trainer.optimizer
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        layers = []
        for name, module in model.named_modules():
            parameters = list(module.parameters())  # shared ones once
            trained = [p for p in parameters if p.requires_grad and id(p) in held]
            layers.append(
                LayerSummary(
                    name=name,
                    kind=type(module).__name__,
                    output=self._outputs.get(name, ""),
                    num_parameters=sum(p.numel() for p in parameters),
                    num_trained=sum(p.numel() for p in trained),
                    flops=self._flops[name],
                )
            )
        memory = {
            "weights": _num_bytes(model.parameters()),
            "buffers": _num_bytes(model.buffers()),
            "gradients": self._gradient_bytes,
        }
        if trainer.num_updates:
            states = optimizer.state.values()
            memory["optimizer"] = _num_bytes(v for s in states for v in s.values())
        return ModelSummary(
            layers=tuple(layers),
            memory=memory,
            forward_flops=self._forward_flops,
            step_flops=self._step_flops,
            num_samples=int(trainer.num_samples_seen or 0)
            // trainer._accelerator.num_processes,
            depth=depth,
        )


def _shapes_in(output: Any) -> str:
    """Return the shapes of the tensors in a structure, as text."""
    if isinstance(output, Tensor):
        return " x ".join(map(str, output.shape)) or "1 number"
    if isinstance(output, Mapping):
        texts = {str(name): _shapes_in(member) for name, member in output.items()}
        return ", ".join(f"{name}: {text}" for name, text in texts.items() if text)
    members = output if isinstance(output, list | tuple) else ()
    return ", ".join(filter(None, map(_shapes_in, members)))


def _num_bytes(values: Iterable[Any]) -> int:
    tensors = [value for value in values if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
