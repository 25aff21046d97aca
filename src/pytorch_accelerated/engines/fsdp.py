"""Weights that are sharded over processes, as FSDP2 does it, and their state dicts.

A sharded weight is a ``DTensor``: each process holds a part of it. Such a state dict is
saved either whole, as if the model had never been sharded, or as the parts that the
processes hold. Both can be loaded on any number of processes, and nothing that is
loaded is unpickled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from pytorch_accelerated import checkpoint
from pytorch_accelerated.engines.plain import Engine, refuse_clip_value

_SHAPE, _OFFSET, _PART = "shape of the whole", "offset of the part", "part"


class ShardedEngine(Engine):
    """FSDP2: each process holds a part of each weight, gradient and state.

    Weights are sharded in place, by the first run, and stay so: a model that is trained
    like this may not fit into the memory of one process.
    """

    computes_alone = False

    @property
    def saved_in_parts(self) -> frozenset[str]:
        """Everything, unless the plugin asks for whole states."""
        kind: str = self.accelerator.state.fsdp_plugin.state_dict_type.name
        return frozenset(() if kind == "FULL_STATE_DICT" else ("model", "optimizer"))

    def check_arguments(
        self,
        batch_size: int | None,
        accumulation_steps: int,
        clip_value: float | None,
        clip_norm: float | None,
    ) -> None:
        """Raise ValueError for clipping by value, which Accelerate does not do here."""
        refuse_clip_value(clip_value, "FSDP")

    def knows(self, model: nn.Module) -> bool:
        """Say whether an earlier run has sharded the model."""
        return is_sharded(model)

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        """Shard the weights, unless an earlier run did."""
        if self.knows(model):
            # Accelerate tells weights apart by their place in memory, which is the same
            # for all those of which this process has nothing.
            self.accelerator._models.append(model)
            return model, optimizer
        blueprint = blueprint_of(model)
        prepared = super().prepare(model, optimizer)
        if self.knows(model):
            plugin = self.accelerator.state.fsdp_plugin
            make_copyable(
                model,
                blueprint,
                reshard_after_forward=plugin.reshard_after_forward,
                offload_policy=plugin.cpu_offload,
                mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
            )
        return prepared

    def release(self, model: nn.Module) -> None:
        """Let go of whole weights that an evaluation has gathered."""
        settle(model)

    def whole(self, tree: Any, keep: bool = True) -> Any:
        """Return a state dict with whole tensors. Collective."""
        return whole(tree, keep)

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
        contents = {
            "model": parts(model.state_dict()),
            "optimizer": parts(optimizer.state_dict()),
        }
        torch.save(contents, folder / f"part_{self.accelerator.process_index:05d}.pt")


def is_sharded(model: nn.Module) -> bool:
    """Say whether a process holds only parts of the model's weights."""
    return isinstance(model, FSDPModule)


def settle(model: nn.Module) -> None:
    """Let go of the whole weights that an evaluation has gathered.

    Until then, FSDP shows them as the parameters of the model.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tree: Any, keep: bool = True) -> Any:
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

    return _map_tensors(tree, gather)


def parts(tree: Any) -> Any:
    """Return a state dict with this process's part of each sharded tensor.

    Args:
        tree: A nested structure of dictionaries, lists and tensors.
    """

    def describe(tensor: Tensor) -> Any:
        if not isinstance(tensor, DTensor):
            return tensor
        _, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return {
            _SHAPE: list(tensor.shape),
            _OFFSET: list(offset),
            # A part can be a view of a larger buffer, which is not to be saved.
            _PART: tensor.to_local().clone(),
        }

    return _map_tensors(tree, describe)


class Parts:
    """A tensor in the parts that processes saved; put together when it is asked for.

    Args:
        saved: What :func:`parts` made of it on each process.
    """

    def __init__(self, saved: Iterable[Mapping[str, Any]]) -> None:
        self._saved = list(saved)
        self.shape: torch.Size = torch.Size(self._saved[0][_SHAPE])

    def join(self) -> Tensor:
        """Return the whole tensor."""
        joined = torch.empty(self.shape, dtype=self._saved[0][_PART].dtype)
        for saved in self._saved:
            part, place = saved[_PART], joined
            for dim, (start, length) in enumerate(
                zip(saved[_OFFSET], part.shape, strict=True)
            ):
                place = place.narrow(dim, min(start, self.shape[dim]), length)
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
            local(target).copy_(local(_like(state_dict[name], target)))
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


def _map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([_map_tensors(value, change) for value in tree])
    return tree


def blueprint_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model that is not sharded yet, without memory for tensors."""
    without_memory: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        without_memory[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in model.buffers():
        without_memory[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, without_memory)


def make_copyable(model: nn.Module, blueprint: nn.Module, **kwargs: Any) -> None:
    """Let ``copy.deepcopy``, which FSDP refuses, make a sharded copy of a model.

    A moving average of the weights needs one.

    Args:
        model: The model, which is sharded.
        blueprint: What :func:`blueprint_of` returned before it was.
        **kwargs: The arguments of ``fully_shard``, except for the mesh.
    """

    def make_copy(memo: dict[int, Any]) -> nn.Module:
        twin = copy.deepcopy(blueprint)
        originals = dict(model.named_modules())
        some = next(p for p in model.state_dict().values() if isinstance(p, DTensor))
        for name, module in reversed(list(twin.named_modules())):
            if isinstance(originals[name], FSDPModule):
                fully_shard(module, mesh=some.device_mesh, **kwargs)
        twin.to_empty(device=some.device)
        with torch.no_grad():
            for target, source in zip(_tensors(twin), _tensors(model), strict=True):
                local(target).copy_(local(source))
        return twin

    vars(model)["__deepcopy__"] = make_copy


def _tensors(model: nn.Module) -> list[Tensor]:
    settle(model)
    return [*model.parameters(), *model.buffers()]
