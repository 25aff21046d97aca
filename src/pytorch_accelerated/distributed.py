"""Several processes: the accelerator, agreement, gathering, and who runs what.

Everything here goes through Accelerate's and torch's public interfaces and is
transparent in a single process.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import (
    broadcast_object_list,
    gather,
    gather_object,
    pad_across_processes,
    reduce,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from pytorch_accelerated import compat
from pytorch_accelerated.compat import MARKS
from pytorch_accelerated.errors import (
    CheckpointError,
    NonFiniteLossError,
    StopTrainingError,
    TrainingInterruptedError,
    set_attribute,
)

Result = TypeVar("Result")


class Prepared:
    """Gives a model and its optimizer back as they were before Accelerate had them.

    Accelerate replaces ``forward`` under mixed precision and marks the model as
    prepared, which would make a later trainer with another precision skip it.

    Args:
        model: The model before it is prepared.
        optimizer: The optimizer before it is prepared, if there is one.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._model = model
        self.optimizer = optimizer
        original = compat.without_compilation(model)
        self.was_compiled: bool = original is not model
        # A compiled model passes most marks on to the one that it was made from.
        self._marked = [model, original] if self.was_compiled else [model]
        self._before = [
            {name: vars(each)[name] for name in MARKS if name in vars(each)}
            for each in self._marked
        ]

    def is_unwrapped(self, model: nn.Module) -> bool:
        """Say whether this is the model as it came, and it came without wrappers."""
        wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
        return (
            model is self._model
            and not self.was_compiled
            and not isinstance(model, wrappers)
        )

    def restore(self) -> None:
        """Put back what preparation replaced on the model."""
        for model, before in zip(self._marked, self._before, strict=True):
            for name in MARKS:
                vars(model).pop(name, None)
            vars(model).update(before)


def is_plain_torch(accelerator: Accelerator) -> bool:
    """Say whether backward and optimizer steps are torch's own, with nothing added.

    They are not where gradients are scaled (fp16) or owned by another engine.
    """
    return (
        accelerator.scaler is None
        and not accelerator.has_lomo_optimizer
        and accelerator.distributed_type
        not in (
            DistributedType.DEEPSPEED,
            DistributedType.MEGATRON_LM,
            DistributedType.XLA,
        )
    )


def num_local_processes() -> int:
    """Return the number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def agree(flag: bool) -> bool:
    """Return True on all processes if any process passes True. Collective."""
    return largest(float(flag)) > 0


def largest(number: float) -> float:
    """Return on all processes the largest of the numbers they pass. Collective.

    The processes exchange it on their hosts: no accelerator device is waited for.
    """
    if PartialState().num_processes == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64)
    torch.distributed.all_reduce(
        tensor,
        torch.distributed.ReduceOp.MAX,
        group=_host_group(torch.distributed.group.WORLD),
    )
    return tensor.item()


@functools.lru_cache(maxsize=1)
def _host_group(world: Any) -> Any:
    # A group of its own also where the default one could do it: what the model
    # communicates must never meet what the trainer does.
    timeout = compat.timeout_of(world)
    return torch.distributed.new_group(backend="gloo", timeout=timeout)


def forget_groups() -> None:
    """Let go of the group of the hosts, whose threads end once nobody holds it."""
    _host_group.cache_clear()


def raise_on_all(error: Exception | None) -> None:
    """Raise an error on all processes if any of them passes one. Collective.

    Args:
        error: The error of this process, if it has one: then it raises that. Others
            raise one of the same kind which names the process and its error.
    """
    if not agree(error is not None):
        return
    reaches_caller = getattr(error, "reaches_caller", False)
    kind = None if error is None else _kind_of(error)
    raised = gather_object([(kind, repr(error), reaches_caller)])
    if error is None:
        process = next(p for p, (kind, *_) in enumerate(raised) if kind is not None)
        kind, text, reaches_caller = raised[process]
        error = kind(f"Process {process} raised {text}")
        set_attribute(error, "reaches_caller", reaches_caller)
    set_attribute(error, "_is_on_all_processes", True)
    raise error


def _kind_of(error: Exception) -> type[Exception]:
    """Return the class that stands for an error on other processes."""
    stops = (NonFiniteLossError, TrainingInterruptedError, StopTrainingError)
    kinds = (*stops, CheckpointError)
    return next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)


def is_on_all_processes(error: BaseException) -> bool:
    """Say whether an error was raised by :func:`raise_on_all`."""
    return getattr(error, "_is_on_all_processes", False)


def settle(error: BaseException) -> None:
    """Note that an error has ended a run: the same one may be raised in another."""
    set_attribute(error, "_is_on_all_processes", False)


def add_up(tensor: Tensor) -> Tensor:
    """Return the sum of the tensors that the processes pass. Collective."""
    total: Tensor = reduce(tensor.to(PartialState().device), "sum")
    return total


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process holds, itself if whole.

    It shares its memory.
    """
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def same_on_all_processes(tensors: Iterable[Tensor]) -> None:
    """Give tensors the values that they have on the main process. Collective."""
    if PartialState().num_processes > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average gradients over the processes, as DDP does while it computes them.

    A gradient that only some processes have is zero on the others. Collective.
    """
    parameters = [each for each in parameters if each.requires_grad]
    exists = torch.tensor(
        [each.grad is not None for each in parameters],
        dtype=torch.uint8,
        device=parameters[0].device,
    )
    torch.distributed.all_reduce(exists, torch.distributed.ReduceOp.MAX)
    for parameter, is_needed in zip(parameters, exists.tolist(), strict=True):
        if is_needed:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad /= PartialState().num_processes
            torch.distributed.all_reduce(parameter.grad)


def objects_of_all(value: Result) -> list[Result]:
    """Return what all processes pass, in their order. Collective.

    It may hold tensors of all kinds: pickle alone cannot restore unsigned integers.
    """
    if PartialState().num_processes == 1:
        return [value]
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return [
        torch.load(io.BytesIO(content), weights_only=True)
        for content in gather_object([buffer.getvalue()])
    ]


def object_from_main_process(value: Result) -> Result:
    """Return on all processes what the main process passes. Collective."""
    return broadcast_object_list([value])[0]  # type: ignore[no-any-return]


def gather_uneven(data: Any) -> Any:
    """Concatenate tensors along dim 0 over processes that hold different lengths.

    Sizes are gathered first, so no value has to be reserved for padding. 0-dim tensors
    give one element per process. Collective.

    Args:
        data: A tensor, or a nested structure of them, see :func:`map_tensors`. The
            tensors of a process may differ from those of others in their first
            dimension only.

    Returns:
        The same structure with the tensors of all processes, in process order.
    """
    return map_tensors(_gather_tensor, data)


def map_tensors(function: Callable[..., Any], *trees: Any) -> Any:
    """Call a function with the tensors at each place of structures that are alike.

    Args:
        function: Called with one tensor of each structure.
        *trees: Tensors, or nested lists, tuples, mappings and dataclasses of them. None
            stays None.

    Returns:
        What the function returned, in the same structure.
    """
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return function(*trees)
    if isinstance(first, Mapping):
        return type(first)(  # type: ignore[call-arg]
            {name: map_tensors(function, *(t[name] for t in trees)) for name in first}
        )
    if isinstance(first, (list, tuple)):
        members = [map_tensors(function, *each) for each in zip(*trees, strict=True)]
        is_named = hasattr(first, "_fields")
        return type(first)(*members) if is_named else type(first)(members)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        result = copy.copy(first)
        for name in (field.name for field in dataclasses.fields(first)):
            value = map_tensors(function, *(getattr(tree, name) for tree in trees))
            object.__setattr__(result, name, value)
        return result
    raise TypeError(
        "Tensors are needed, or nested lists, tuples, mappings and dataclasses of "
        f"them; got a {type(first).__name__}. Leave it out of what you gather, or of "
        "what calculate_predictions returns."
    )


def _gather_tensor(tensor: Tensor) -> Tensor:
    if tensor.dim() == 0 or PartialState().num_processes == 1:
        return gather(tensor)  # type: ignore[no-any-return]
    lengths = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = gather(pad_across_processes(tensor, dim=0))
    longest = max(lengths)
    return torch.cat(
        [
            padded[process * longest : process * longest + length]
            for process, length in enumerate(lengths)
        ]
    )


def sum_over_processes(
    totals: Mapping[str, tuple[float, float]],
) -> dict[str, tuple[float, float]]:
    """Add up (sum, count) pairs by name over all processes. Collective.

    A name may be missing on some processes.
    """
    if PartialState().num_processes == 1:
        return dict(totals)
    summed: dict[str, tuple[float, float]] = {}
    for local in gather_object([dict(totals)]):
        for name, (total, count) in local.items():
            so_far = summed.get(name, (0.0, 0.0))
            summed[name] = (so_far[0] + total, so_far[1] + count)
    return summed


def local_process_zero_only(
    func: Callable[..., Result],
) -> Callable[..., Result | None]:
    """Run the function on the first process of each machine; others return None.

    All processes wait for it to end.
    """
    return _first("is_local_main_process", func, others_follow=False)


def world_process_zero_only(
    func: Callable[..., Result],
) -> Callable[..., Result | None]:
    """Run the function on the first process of the job; others return None.

    All processes wait for it to end.
    """
    return _first("is_main_process", func, others_follow=False)


def local_process_zero_first(func: Callable[..., Result]) -> Callable[..., Result]:
    """Run the function on the first process of each machine, then on the others.

    All processes get their own result. Use it for a download that others then find.
    """
    return _first("is_local_main_process", func, others_follow=True)


def _first(
    is_chosen: str, func: Callable[..., Any], *, others_follow: bool
) -> Callable[..., Any]:
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        state = PartialState()
        if not getattr(state, is_chosen):
            state.wait_for_everyone()
            return func(*args, **kwargs) if others_follow else None
        try:
            return func(*args, **kwargs)
        finally:  # also when it raises: the others would wait for ever
            state.wait_for_everyone()

    return wrapper
