"""Weights that are sharded over processes, as FSDP2 does it, and their state dicts.

A sharded weight is a ``DTensor``: each process holds a part of it. Such a state dict is
saved either whole, as if the model had never been sharded, or as the parts that the
processes hold. Both can be loaded on any number of processes, and nothing that is
loaded is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from pytorch_accelerated import checkpoint, compat
from pytorch_accelerated.distributed import own_part
from pytorch_accelerated.engines.plain import Engine

_SHAPE, _OFFSET, _PART = "shape of the whole", "offset of the part", "part"


class ShardedEngine(Engine):
    """FSDP2: each process holds a part of each weight, gradient and state.

    Weights are sharded in place, by the first run, and stay so: a model that is trained
    like this may not fit into the memory of one process.
    """

    clips_by_norm_only: str = "FSDP"
    computes_alone: bool = False

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        if accelerator.state.fsdp_plugin.state_dict_type.name != "FULL_STATE_DICT":
            self.saved_in_parts: frozenset[str] = frozenset(("model", "optimizer"))

    def knows(self, model: nn.Module) -> bool:
        """Say whether an earlier run has sharded the model."""
        return isinstance(model, FSDPModule)

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        """Shard the weights, unless an earlier run did."""
        if self.knows(model):
            # Accelerate tells weights apart by their place in memory, which is the same
            # for all those of which this process has nothing.
            compat.remember_prepared(self.accelerator, model)
            return model, optimizer
        return super().prepare(model, optimizer)

    def release(self, model: nn.Module) -> None:
        """Let go of whole weights that an evaluation has gathered.

        Until then, FSDP shows them as the parameters of the model.
        """
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def whole(self, tree: Any, keep: bool = True) -> Any:
        """Return a state dict with whole tensors in place of sharded ones. Collective.

        Args:
            tree: A nested structure, the same on all processes.
            keep: Whether this process wants the result. Otherwise sharded tensors are
                left out, so that it holds no more than one whole tensor at a time.
        """

        def gather(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, DTensor):
                return tensor
            gathered = tensor.full_tensor()
            return gathered.cpu() if keep else torch.empty(0)

        return recursively_apply(gather, tree)

    def load_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Load whole weights; each process takes its part."""
        load_model(model, state)

    def load_optimizer(
        self, optimizer: Any, state: Mapping[str, Any], *, keep_dtypes: bool = True
    ) -> None:
        """Load a whole state; each process takes its part."""
        state = optimizer_state_like(optimizer, state)
        super().load_optimizer(optimizer, state, keep_dtypes=keep_dtypes)

    def save_parts(self, model: nn.Module, optimizer: Any, folder: Path) -> None:
        """Write this process's part of the weights and of the optimizer's state."""
        folder.mkdir(parents=True, exist_ok=True)
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        contents = recursively_apply(_part_of, states)
        torch.save(contents, folder / f"part_{self.accelerator.process_index:05d}.pt")


def _part_of(tensor: Tensor) -> Any:
    """Return this process's part of a sharded tensor, with its place in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor
    return {
        _SHAPE: list(tensor.shape),
        _OFFSET: compat.offset_of_part(tensor),
        # A part can be a view of a larger buffer, which is not to be saved.
        _PART: tensor.to_local().clone(),
    }


class Parts(list[Mapping[str, Any]]):
    """A tensor in the parts that processes saved; put together when it is asked for."""

    def join(self) -> Tensor:
        """Return the whole tensor."""
        joined = torch.empty(self[0][_SHAPE], dtype=self[0][_PART].dtype)
        for saved in self:
            part, place = saved[_PART], joined
            for dim, start in enumerate(saved[_OFFSET]):
                start = min(start, joined.shape[dim])
                place = place.narrow(dim, start, part.shape[dim])
            place.copy_(part)
        return joined


def read_parts(paths: Iterable[Path]) -> Any:
    """Read the files of all processes, with :class:`Parts` for sharded tensors.

    The files are mapped into memory: only what is used is read from the disk.

    Args:
        paths: One file for each process that saved, in any order.
    """
    return _join([checkpoint.load_file(path, mmap=True) for path in sorted(paths)])


def _join(trees: list[Any]) -> Any:
    first = trees[0]
    if isinstance(first, Mapping):
        if _PART in first:
            return Parts(trees)
        return {key: _join([tree[key] for tree in trees]) for key in first}
    if isinstance(first, (list, tuple)):
        return [_join(list(members)) for members in zip(*trees, strict=True)]
    return first


def load_model(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load whole tensors, or :class:`Parts`, into a model that is sharded.

    Args:
        model: The model.
        state_dict: Entries for all names in the model's state dict.
    """
    for name, target in model.state_dict().items():
        if isinstance(target, Tensor):
            own_part(target).copy_(own_part(_like(state_dict[name], target)))
        else:
            module, _, _ = name.rpartition("._extra_state")
            model.get_submodule(module).set_extra_state(state_dict[name])


def optimizer_state_like(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> dict[str, Any]:
    """Return an optimizer's state dict, sharded as the optimizer's parameters are.

    Args:
        optimizer: The optimizer that is to load it.
        state_dict: With whole tensors or :class:`Parts`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            name: _like(value, parameters[index]) for name, value in entries.items()
        }
        for index, entries in state_dict["state"].items()
        if index < len(parameters)
    }
    return {**state_dict, "state": state}


def _like(value: Any, reference: Tensor) -> Any:
    """Return a value with the sharding of a tensor, if it has its shape."""
    if isinstance(value, Parts):
        value = value.join()
    if (
        isinstance(value, Tensor)
        and isinstance(reference, DTensor)
        and value.shape == reference.shape
    ):
        # All processes have the whole tensor: each takes its part without being sent.
        return distribute_tensor(
            value.to(reference.to_local().device),
            reference.device_mesh,
            reference.placements,
            src_data_rank=None,
        )
    return value
