"""Freezing and unfreezing parts of a model, for fine-tuning a pretrained one.

And parameter groups for its optimizer: without weight decay where it does harm, and
with smaller learning rates for the layers near the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from pytorch_accelerated.compat import Norm

BN_MODULES = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.LazyBatchNorm1d,
    nn.LazyBatchNorm2d,
    nn.LazyBatchNorm3d,
    nn.SyncBatchNorm,
)


def _module_is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, BN_MODULES)


class Layer(NamedTuple):
    """A module without children, or one that owns parameters itself.

    Attributes:
        layer_group_idx: The index of its layer group, counted from the first group and
            from the last one, as in ``(0, -3)``.
        module: The module.
        is_frozen: Whether its own parameters are frozen; for a module without
            parameters, whether it is in evaluation mode.
    """

    layer_group_idx: tuple[int, int]
    module: nn.Module
    is_frozen: bool


class LayerGroup(NamedTuple):
    """A direct child of the model, the unit in which a model is frozen.

    Attributes:
        layer_group_idx: The index of the group, counted from the first group and from
            the last one, as in ``(0, -3)``.
        module: The child.
        is_frozen: Whether any parameter of the group is frozen.
    """

    layer_group_idx: tuple[int, int]
    module: nn.Module
    is_frozen: bool


class _Member(NamedTuple):
    """A module inside a layer group, with the parameters that it owns itself."""

    name: str
    module: nn.Module
    parameters: list[nn.Parameter]


class ModelFreezer:
    """Freezes and unfreezes the layer groups of a model.

    The layer groups are the direct children of the model, in order; a model without
    children is one group. Groups are named by index, where -1 is the last one::

        freezer = ModelFreezer(model)
        freezer.freeze()  # all but the last group, the head
        optimizer = torch.optim.SGD(freezer.get_trainable_parameters(), lr=0.1)
        ...  # train the head
        for group in freezer.unfreeze(from_index=-2).values():
            optimizer.add_param_group({**group, "lr": 0.01})
        ...  # go on training

    Each parameter belongs to exactly one group:

    - Parameters that the model itself owns, such as the ``cls_token`` and ``pos_embed``
      of a vision transformer, count with the first group: they act on the input, so
      they freeze with the layers that read it.
    - A module or a parameter that occurs in several groups, such as the embedding tied
      to the head of a language model, counts with the first of them.

    Making a freezer unfreezes the whole model: all parameters require gradients, and
    all modules inside the model are put in training mode. Neither this nor anything
    else here changes the mode of the model itself.

    Args:
        model: The model, not wrapped for distributed training or compiled.
        freeze_batch_norms: Whether :meth:`freeze` also freezes batch normalisation
            layers. By default they are left alone, so that they go on adapting to the
            new data.

    Attributes:
        model: The model.
        freeze_bn: The value of ``freeze_batch_norms``.
    """

    def __init__(self, model: nn.Module, freeze_batch_norms: bool = False) -> None:
        self.model = model
        self.freeze_bn = freeze_batch_norms
        for group in self._get_groups():
            _set_requires_grad(_parameters_of(group), True)
            self._set_mode(group, training=True)

    @property
    def num_groups(self) -> int:
        """The number of layer groups."""
        return len(self._get_groups())

    def get_layer_groups(self) -> list[LayerGroup]:
        """Return the layer groups, in order."""
        children = list(self.model.children()) or [self.model]
        return [
            LayerGroup(
                (idx, idx - len(children)),
                child,
                not all(p.requires_grad for p in _parameters_of(group)),
            )
            for idx, (child, group) in enumerate(
                zip(children, self._get_groups(), strict=True)
            )
        ]

    def get_layers(self) -> list[Layer]:
        """Return the layers of all groups, in order.

        Raises:
            ValueError: If only some of the parameters of a layer are frozen, which the
                freezer itself never does; the message names the layer.
        """
        groups = self._get_groups()
        return [
            Layer((idx, idx - len(groups)), member.module, _is_frozen(member))
            for idx, group in enumerate(groups)
            for member in group
            if member.parameters or not any(member.module.children())
        ]

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the model that are not frozen, for an optimizer."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def freeze(
        self,
        from_index: int = 0,
        to_index: int = -2,
        set_modules_as_eval: bool = False,
    ) -> None:
        """Freeze a range of layer groups, by default all but the last one.

        Args:
            from_index: One end of the range.
            to_index: The other end, included. The default leaves out the last group, so
                a model with a single group stays trainable.
            set_modules_as_eval: Whether the modules of these groups are also put in
                evaluation mode, which switches off their dropout. While the model
                itself is in training mode, a trainer leaves them so.

        Raises:
            IndexError: If the model has no group with one of these indices.
        """
        if to_index == -2 and self.num_groups == 1:
            return  # "all but the last one" of a single group is none
        for _, members in self._select(from_index, to_index):
            _set_requires_grad(_parameters_of(members), False)
            if set_modules_as_eval:
                self._set_mode(members, training=False)

    def unfreeze(
        self,
        from_index: int = -1,
        to_index: int = 0,
        set_modules_as_training: bool = True,
    ) -> dict[int, dict[str, list[nn.Parameter]]]:
        """Unfreeze a range of layer groups, by default all.

        Args:
            from_index: One end of the range.
            to_index: The other end, included. The default is the first group, so
                ``unfreeze(-2)`` unfreezes all groups but the last.
            set_modules_as_training: Whether the modules of these groups are also put in
                training mode.

        Returns:
            For each group in which parameters were frozen until now, its index and
            those parameters, as ``{"params": [...]}``, which an optimizer's
            ``add_param_group`` takes.

        Raises:
            IndexError: If the model has no group with one of these indices.
        """
        unfrozen = {}
        for idx, members in self._select(from_index, to_index):
            frozen = [p for p in _parameters_of(members) if not p.requires_grad]
            _set_requires_grad(frozen, True)
            if frozen:
                unfrozen[idx] = {"params": frozen}
            if set_modules_as_training:
                self._set_mode(members, training=True)
        return unfrozen

    def _select(
        self, from_index: int, to_index: int
    ) -> Iterator[tuple[int, list[_Member]]]:
        """Yield the groups of a range with those members that may be changed."""
        groups = self._get_groups()
        first, last = self._convert_idxs(from_index, to_index)
        for idx in range(first, last + 1):
            members = groups[idx]
            if not self.freeze_bn:
                members = [m for m in members if not _module_is_batch_norm(m.module)]
            yield idx, members

    def _convert_idxs(self, from_index: int, to_index: int) -> tuple[int, int]:
        """Return the ends of a range of groups, in order and counted from the first."""
        num_groups = self.num_groups
        for index in (from_index, to_index):
            if not -num_groups <= index < num_groups:
                raise IndexError(
                    f"There is no layer group {index}. The model has {num_groups}: "
                    f"0 to {num_groups - 1}, or {-num_groups} to -1 counted from the "
                    "last one. get_layer_groups() lists them."
                )
        first, last = sorted(index % num_groups for index in (from_index, to_index))
        return first, last

    def _get_groups(self) -> list[list[_Member]]:
        """Return the members of each group as the model is now; its head may be new."""
        seen_modules = {self.model}
        seen_parameters: set[nn.Parameter] = set()

        def create_member(name: str, module: nn.Module) -> _Member:
            own = [p for p in module.parameters(recurse=False) if _can_be_trained(p)]
            first_seen = [p for p in own if p not in seen_parameters]
            seen_parameters.update(first_seen)
            return _Member(name, module, first_seen)

        root = create_member("the model itself", self.model)
        groups = [
            [
                create_member(name, module)
                for name, module in child.named_modules(seen_modules, child_name)
            ]
            for child_name, child in self.model.named_children()
        ]
        if not groups:
            return [[root]]
        groups[0].insert(0, root)
        return groups

    def _set_mode(self, members: list[_Member], training: bool) -> None:
        # Not `module.train()`, which would reach batch normalisation layers inside the
        # module as well. The mode of the model as a whole is its user's.
        for member in members:
            if member.module is not self.model:
                member.module.training = training


def _parameters_of(members: list[_Member]) -> list[nn.Parameter]:
    return [parameter for member in members for parameter in member.parameters]


def _can_be_trained(parameter: nn.Parameter) -> bool:
    """Whether a parameter may require a gradient, which quantised weights may not."""
    return parameter.is_floating_point() or parameter.is_complex()


def _set_requires_grad(parameters: list[nn.Parameter], requires_grad: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(requires_grad)


def _is_frozen(member: _Member) -> bool:
    # A layer whose parameters all count with an earlier group still shows their state.
    parameters = member.parameters or list(member.module.parameters(recurse=False))
    if not parameters:
        return not member.module.training
    states = {parameter.requires_grad for parameter in parameters}
    if len(states) == 2:
        raise ValueError(
            f"The layer {member.name!r} ({type(member.module).__name__}) is frozen in "
            "part: some of its own parameters require gradients and some do not. "
            "Freeze and unfreeze whole layers, with freeze() and unfreeze()."
        )
    return states == {False}


_CONTAINERS = (nn.Sequential, nn.ModuleList)
_NORMS = (Norm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    lr: float | None = None,
    layer_decay: float = 1.0,
    depth_of: Callable[[str], int] | None = None,
    decay_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """Return the parameter groups of a model for an optimizer.

    Biases, all other vectors and numbers, and what a normalisation layer owns are not
    decayed. Frozen parameters are left out, and one with several names counts once,
    with the first of them::

        groups = parameter_groups(model, weight_decay=0.05, lr=1e-3, layer_decay=0.75)
        optimizer = torch.optim.AdamW(groups)

    With ``layer_decay`` the last layer trains with ``lr``, the one before it with
    ``lr * layer_decay``, and so on to the first (`BEiT
    <https://arxiv.org/abs/2106.08254>`_). The layers are the modules inside the model,
    in order, and the members of each ``nn.Sequential`` and ``nn.ModuleList`` among them
    count one by one; one that has nothing to decay, such as a normalisation layer,
    belongs to the layer before it. What is not inside of any, such as a ``cls_token``,
    belongs to the layer that follows.

    Args:
        model: The model, not wrapped for distributed training or compiled.
        weight_decay: That of the parameters that are decayed.
        lr: The learning rate of the last layer; by default that of the optimizer, which
            ``layer_decay`` cannot do without.
        layer_decay: The learning rate of a layer as a fraction of that of the next.
        depth_of: Returns the depth of a parameter from its name, as in
            ``model.named_parameters()``: the greater, the nearer to the output. By
            default the number of its layer.
        decay_embeddings: Whether the weights of ``nn.Embedding`` are decayed.

    Raises:
        ValueError: If all parameters are frozen, or the learning rate is missing.
    """
    if layer_decay != 1.0 and lr is None:
        raise ValueError(
            f"layer_decay={layer_decay} needs lr, the learning rate of the last layer."
        )
    not_decayed = _NORMS if decay_embeddings else (*_NORMS, nn.Embedding)
    kept = {
        parameter
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.ndim < 2 or isinstance(module, not_decayed)
    }
    layers = _layers_of(model, kept)
    depths = {
        parameter: depth_of(name) if depth_of else layers[parameter]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if not depths:
        raise ValueError("All parameters are frozen: there is nothing to group.")
    last = max(depths.values())
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for parameter, depth in depths.items():
        scale, is_decayed = layer_decay ** (last - depth), parameter not in kept
        group = {"params": [], "weight_decay": weight_decay if is_decayed else 0.0}
        if lr is not None:
            group["lr"] = lr * scale
        groups.setdefault((scale, is_decayed), group)["params"].append(parameter)
    return list(groups.values())


def _layers_of(model: nn.Module, kept: set[nn.Parameter]) -> dict[nn.Parameter, int]:
    """Return the number of the layer of each parameter."""
    layers: dict[nn.Parameter, int] = {}
    number = 0
    for layer in _layers_in(model):
        new = [p for p in layer.parameters() if p not in layers]
        if not kept.issuperset(new):
            number += 1
        layers.update(dict.fromkeys(new, number))
    for parameter in reversed(list(model.parameters())):
        # Those outside of any layer have the number of what follows them.
        number = layers.setdefault(parameter, number)
    return layers


def _layers_in(module: nn.Module) -> Iterator[nn.Module]:
    is_container = isinstance(module, _CONTAINERS)
    for child in module.children():
        parts = [child] if is_container else child.modules()
        if any(isinstance(part, _CONTAINERS) for part in parts):
            yield from _layers_in(child)
        else:
            yield child
