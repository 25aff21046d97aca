"""Several processes: the accelerator, agreement, gathering, and who runs what.

Everything here goes through Accelerate's and torch's public interfaces and is
transparent in a single process.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import (
    broadcast_object_list,
    gather,
    gather_object,
    pad_across_processes,
    recursively_apply,
)
from torch import Tensor, nn

from pytorch_accelerated.errors import NonFiniteLossError, StopTrainingError

Result = TypeVar("Result")


def create_accelerator(**kwargs: Any) -> Accelerator:
    """Create the accelerator for the way in which this script was launched.

    The difference from ``Accelerator(**kwargs)`` is on machines without an accelerator
    device: a plain ``Accelerator()`` under ``torchrun`` would train unrelated copies
    there, so the CPU backend is asked for.

    Args:
        **kwargs: Arguments of :class:`accelerate.Accelerator`.

    Raises:
        RuntimeError: If the launcher started more processes than the accelerator sees.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    sharded = any(
        os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
        for engine in ("DEEPSPEED", "FSDP")
    )
    plugin = kwargs.get("deepspeed_plugin") or kwargs.get("deepspeed_plugins")
    if launched > 1 and not torch.accelerator.is_available() and not sharded:
        kwargs.setdefault("cpu", plugin is None)
    accelerator = Accelerator(**kwargs)
    if launched > 1 and accelerator.num_processes != launched:
        raise RuntimeError(
            f"The launcher started {launched} processes, but Accelerate sees "
            f"{accelerator.num_processes}: each would train a model of its own. "
            "On a machine without an accelerator device set ACCELERATE_USE_CPU=true; "
            "otherwise check the distributed type in `accelerate env`."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        warnings.warn(
            "mixed_precision='fp16' has no effect on a CPU: Accelerate trains in fp32 "
            "there. Use 'bf16', which a CPU supports.",
            stacklevel=3,
        )
    if accelerator.gradient_accumulation_steps != 1:
        # The trainer owns the accumulation window: Accelerate would divide once more.
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            warnings.warn(
                "Accelerate is configured with gradient_accumulation_steps="
                f"{accelerator.gradient_accumulation_steps}, which the trainer does "
                "not use; give gradient_accumulation_steps to train() instead.",
                stacklevel=3,
            )
        accelerator.gradient_accumulation_steps = 1
    return accelerator


class PreparedModel:
    """Undoes what Accelerate does to a model, so that its owner gets it back plain.

    Accelerate replaces ``forward`` under mixed precision and marks the model as
    prepared, which would make a later trainer with another precision skip it.

    Args:
        model: The model before it is prepared.
    """

    _MARKS = ("forward", "_original_forward", "_is_accelerate_prepared")

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = {
            name: vars(model)[name] for name in self._MARKS if name in vars(model)
        }
        self.was_compiled = hasattr(model, "_orig_mod")

    def restore(self) -> None:
        """Put back what preparation replaced on the model."""
        for name in self._MARKS:
            vars(self._model).pop(name, None)
        vars(self._model).update(self._before)


def is_plain(accelerator: Accelerator) -> bool:
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


def forget_prepared(accelerator: Accelerator) -> None:
    """Drop the accelerator's references to the objects of a finished run.

    ``Accelerator.free_memory`` does this too, at the price of a garbage collection that
    takes longer than a short run.
    """
    for registry in ("_models", "_optimizers", "_schedulers", "_dataloaders"):
        setattr(accelerator, registry, [])


def agree(flag: bool, device: torch.device) -> bool:
    """Return True on all processes if any process passes True. Collective."""
    return largest(float(flag), device) > 0


def largest(number: float, device: torch.device) -> float:
    """Return on all processes the largest of the numbers they pass. Collective."""
    if PartialState().num_processes == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float32, device=device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return tensor.item()


def from_main_process(value: int, device: torch.device) -> int:
    """Return on all processes the integer that the main process passes. Collective."""
    if PartialState().num_processes == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    torch.distributed.broadcast(tensor, src=0)
    return int(tensor.item())


def object_from_main_process(value: Result) -> Result:
    """Return on all processes what the main process passes. Collective."""
    return broadcast_object_list([value])[0]  # type: ignore[no-any-return]


def gather_uneven(data: Any) -> Any:
    """Concatenate tensors along dim 0 over processes that hold different lengths.

    Sizes are gathered first, so no value has to be reserved for padding. 0-dim tensors
    give one element per process. Collective.

    Args:
        data: A tensor, or a nested list, tuple or mapping of tensors. The tensors of a
            process may differ from those of others in their first dimension only.

    Returns:
        The same structure with the tensors of all processes, in process order.
    """
    return recursively_apply(_gather_tensor, data, error_on_other_type=True)


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


@contextmanager
def _then_barrier() -> Iterator[None]:
    # Also when the function raises: the others would wait for this process forever.
    try:
        yield
    finally:
        PartialState().wait_for_everyone()


def local_process_zero_only(
    func: Callable[..., Result],
) -> Callable[..., Result | None]:
    """Run the function on the first process of each machine; others return None.

    All processes wait for it to end.
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Result | None:
        with _then_barrier():
            if PartialState().is_local_main_process:
                return func(*args, **kwargs)
        return None

    return wrapper


def world_process_zero_only(
    func: Callable[..., Result],
) -> Callable[..., Result | None]:
    """Run the function on the first process of the job; others return None.

    All processes wait for it to end.
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Result | None:
        with _then_barrier():
            if PartialState().is_main_process:
                return func(*args, **kwargs)
        return None

    return wrapper


def local_process_zero_first(func: Callable[..., Result]) -> Callable[..., Result]:
    """Run the function on the first process of each machine, then on the others.

    All processes get their own result. Use it for a download that others then find.
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Result:
        state = PartialState()
        if state.is_local_main_process:
            with _then_barrier():
                return func(*args, **kwargs)
        state.wait_for_everyone()
        return func(*args, **kwargs)

    return wrapper


ERRORS_BY_KIND: dict[str, type[Exception]] = {
    "non-finite": NonFiniteLossError,
    "stop": StopTrainingError,
    "error": RuntimeError,
}


def kind_of(error: Exception | None) -> str:
    """Return the key of an error in ``ERRORS_BY_KIND``, "" for none."""
    if error is None:
        return ""
    if isinstance(error, NonFiniteLossError):
        return "non-finite"
    return "stop" if isinstance(error, StopTrainingError) else "error"
