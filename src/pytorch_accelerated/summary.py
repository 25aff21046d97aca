"""What a training step of a model holds and costs, layer by layer."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from pytorch_accelerated import checks, data
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.rehearsal import rehearsal

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

__all__ = ["LayerSummary", "ModelSummary"]


@dataclass(frozen=True)
class LayerSummary:
    """A module of the model, with all that is inside of it.

    Attributes:
        name: Its name in the model, empty for the model itself.
        kind: The name of its class.
        output_shape: The shape of its last output: a tuple, or a list or dictionary of
            those of its tensors; None if the module was not called.
        num_calls: How often it was called.
        num_parameters: Numbers in its weights, without those of a layer further up that
            shares them.
        num_trained: Those of them that are trained.
        flops: Of its forward passes, for the whole batch.
    """

    name: str
    kind: str
    output_shape: Any
    num_calls: int
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
        num_parameters: Numbers in its weights, shared ones counted once.
        num_trained: Those that require a gradient and that the optimizer holds.
        weight_bytes: Memory of the weights.
        buffer_bytes: Memory of the buffers.
        gradient_bytes: Memory of the gradients after a backward pass.
        optimizer_bytes: Memory of the state of the optimizer after an update; None if
            the update was not applied, since a gradient overflowed.
        forward_flops: Of a forward pass.
        step_flops: Of forward and backward pass together.
        num_samples: Samples in the batch that they were counted for.
        depth: How far the table goes into the model.
    """

    layers: tuple[LayerSummary, ...]
    num_parameters: int
    num_trained: int
    weight_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_bytes: int | None
    forward_flops: int
    step_flops: int
    num_samples: int
    depth: int

    @property
    def flops_per_sample(self) -> float:
        """Those of forward and backward pass, for one sample of the batch."""
        return self.step_flops / self.num_samples

    def __str__(self) -> str:
        """Return the table, at most 80 columns wide."""
        lines = [_LINE.format("Layer", "Output", "Parameters", "FLOPs"), "-" * 80]
        for layer in self.layers:
            path = layer.name.split(".") if layer.name else []
            if len(path) > self.depth:
                continue
            label = "  " * len(path) + ": ".join([*path[-1:], layer.kind])
            count = f"{layer.num_parameters:,}" if layer.num_parameters else "-"
            if layer.num_parameters and not layer.num_trained:
                count = f"({count})"
            shape = "-" if layer.num_calls == 0 else _as_text(layer.output_shape)
            shape += f" x{layer.num_calls}" if layer.num_calls > 1 else ""
            flops = _short(layer.flops) if layer.flops else "-"
            lines.append(_LINE.format(_cut(label, 37), _cut(shape, 21), count, flops))
        memory = {
            "weights": self.weight_bytes,
            "buffers": self.buffer_bytes,
            "gradients": self.gradient_bytes,
            "optimizer": self.optimizer_bytes,
        }
        texts = [
            f"{what} {'unknown' if size is None else _short(size, 'B')}"
            for what, size in memory.items()
        ]
        num_frozen = self.num_parameters - self.num_trained
        return "\n".join(
            [
                *lines,
                "-" * 80,
                f"Parameters  {self.num_trained:,} trained, {num_frozen:,} (frozen)",
                f"Memory      {', '.join(texts)}",
                f"FLOPs       forward {_short(self.forward_flops)}, with backward "
                f"{_short(self.step_flops)}, for this batch",
            ]
        )


_LINE = "{:37} {:21} {:>11} {:>8}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _short(number: float, unit: str = "") -> str:
    """Return a number with three digits, in thousands, millions ... of a unit."""
    prefixes = iter("kMGTPEZY")
    prefix = ""
    while number >= 999.5:
        number, prefix = number / 1000, next(prefixes)
    return f"{number:.3g} {prefix}{unit}".rstrip()


def _as_text(shape: Any) -> str:
    if isinstance(shape, dict):
        return ", ".join(f"{name}: {_as_text(each)}" for name, each in shape.items())
    if isinstance(shape, list):
        return ", ".join(map(_as_text, shape))
    return " x ".join(map(str, shape)) or "1 number"


def _shape_of(output: Any) -> Any:
    """Return the shape of a tensor, or those of the tensors in a structure."""
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, Mapping):
        shapes = {name: _shape_of(member) for name, member in output.items()}
        return {name: shape for name, shape in shapes.items() if shape != []}
    members = output if isinstance(output, list | tuple) else ()
    return [shape for shape in map(_shape_of, members) if shape != []]


def summarize(
    trainer: Trainer, batch: Any, depth: int, per_device_batch_size: int
) -> ModelSummary:
    """Do what the trainer's method ``summary`` says, and print nothing."""
    checks.check_is_at_least("depth", depth, 0)
    is_dataset = isinstance(batch, Dataset) or hasattr(batch, "__getitems__")
    is_data = is_dataset or data.yields_batches(batch)
    counter = FlopCounterMode(display=False)
    step = _MeasuredStep(counter)
    with (
        rehearsal(trainer, "summary()", batch if is_data else None, step),
        torch.compiler.set_stance("force_eager"),  # which works from when it is made
        warnings.catch_warnings(),
        counter,
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
        return step.summary(depth)


class _OneBatch:
    """A loader of one batch, which on several processes is each one's own."""

    is_split_by_process = True

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Any]:
        yield self._batch


class _MeasuredStep(TrainerCallback):
    """Looks at the passes of a step, and at what is there after them.

    Args:
        counter: Counts what torch computes meanwhile.
    """

    optimizer_bytes: int | None = None

    def __init__(self, counter: FlopCounterMode) -> None:
        self._total_flops = counter.get_total_flops
        self._starts: list[int] = []
        self._flops: Counter[str] = Counter()
        self._num_calls: Counter[str] = Counter()
        self._shapes: dict[str, Any] = {}

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to each call of a module, and to the backward pass."""
        self._model = trainer.get_model(keep_torch_compile=False)
        groups = trainer.optimizer.param_groups  # type: ignore[union-attr]
        self._held = {id(p) for group in groups for p in group["params"]}
        hooks = [
            hook
            for name, module in self._model.named_modules()
            for hook in (
                module.register_forward_pre_hook(self._note_start),
                module.register_forward_hook(partial(self._note_end, name)),
            )
        ]
        backward_step = trainer.backward_step

        def measured_backward_step(loss: Tensor) -> None:
            for hook in hooks:  # checkpointed layers are called again
                hook.remove()
            self._forward_flops = self._total_flops()
            backward_step(loss)
            self._step_flops = self._total_flops()
            self._gradient_bytes = _num_bytes(p.grad for p in self._model.parameters())

        vars(trainer)["backward_step"] = measured_backward_step

    def on_train_update_end(
        self, trainer: Trainer, *, num_updates: int = 0, **kwargs: Any
    ) -> None:
        """Look at the state of the optimizer."""
        states = trainer.optimizer.state.values()  # type: ignore[union-attr]
        self.optimizer_bytes = _num_bytes(v for s in states for v in s.values())

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any
    ) -> None:
        """Note how many samples it had."""
        self._num_samples = int(batch_output["batch_size"])

    def _note_start(self, module: nn.Module, args: Any) -> None:
        self._starts.append(self._total_flops())

    def _note_end(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._num_calls[name] += 1
        self._flops[name] += self._total_flops() - self._starts.pop()
        self._shapes[name] = _shape_of(output)

    def summary(self, depth: int) -> ModelSummary:
        """Return what was seen."""
        parameters = dict(self._model.named_parameters())  # shared ones once
        trained = [
            name
            for name, parameter in parameters.items()
            if parameter.requires_grad and id(parameter) in self._held
        ]

        def num_in(module: str, names: Iterable[str]) -> int:
            prefix = f"{module}." if module else ""
            return sum(parameters[n].numel() for n in names if n.startswith(prefix))

        layers = tuple(
            LayerSummary(
                name,
                type(module).__name__,
                self._shapes.get(name),
                self._num_calls[name],
                num_in(name, parameters),
                num_in(name, trained),
                self._flops[name],
            )
            for name, module in self._model.named_modules()
        )
        return ModelSummary(
            layers,
            layers[0].num_parameters,
            layers[0].num_trained,
            _num_bytes(parameters.values()),
            _num_bytes(self._model.buffers()),
            self._gradient_bytes,
            self.optimizer_bytes,
            self._forward_flops,
            self._step_flops,
            self._num_samples,
            depth,
        )


def _num_bytes(values: Iterable[Any]) -> int:
    tensors = [value for value in values if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
