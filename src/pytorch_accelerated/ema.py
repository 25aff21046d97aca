"""An exponential moving average of the weights of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from pytorch_accelerated import compat

UpdateFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ModelEma(nn.Module):
    """Keeps a copy of a model whose weights are the moving average of the model's.

    After each optimizer step, ``update`` moves every weight of the copy a little
    towards the model's (Polyak and Juditsky, 1992; see also
    https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage)::

        ema = ModelEma(model, decay=0.999)
        for inputs, targets in loader:
            ...
            optimizer.step()
            ema.update(model)
        predictions = ema.module(inputs)

    The weights are averaged, and so are buffers of floating-point numbers, such as the
    running statistics of batch normalisation. Integers, such as the number of batches
    tracked, are copied. So are elements that are infinite or NaN, such as those of
    attention masks, until they are finite. Averages of 16-bit weights are
    kept in float32 beside the copy, because a 16-bit number is too coarse to take steps
    as small as ``1 - decay``; the copy itself stays in the precision of the model.

    A model that is sharded over processes cannot be copied: there ``module`` holds the
    averaged tensors under their names, sharded in the same way, and cannot be called.

    The average may live on another device than the model: ``ema.to("cpu")``. Its
    ``state_dict`` holds all that is needed to go on exactly.

    Args:
        model: The model to follow, not wrapped for distributed training or compiled.
            It is copied, so start from the weights that are to be averaged.
        decay: How much of the average is kept at each update; an average over about
            the last ``1 / (1 - decay)`` updates.
        warmup: Whether to start with a smaller decay, so that the initial weights are
            soon forgotten: ``min(decay, (1 + n) / (10 + n))`` after ``n`` updates, as
            in TensorFlow's ``ExponentialMovingAverage``.

    Attributes:
        module: The copy with the averaged weights, in evaluation mode and without
            gradients.
        decay: The decay, which may be changed between updates.
        warmup: The value of ``warmup``.
        num_updates: The number of updates made so far.

    Raises:
        ValueError: If the decay is not between 0 and 1.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, *, warmup: bool = False
    ) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(
                f"decay must be between 0 (no average) and 1 (no change), got {decay}."
            )
        self.decay = decay
        self.warmup = warmup
        self.num_updates: int = 0
        # Models that are sharded over processes cannot be copied.
        is_sharded = any(hasattr(p, "device_mesh") for p in model.parameters())
        twin = Tensors(model) if is_sharded else copy.deepcopy(model)
        self.module: nn.Module = twin.eval().requires_grad_(False)
        entries = tensors_of(self.module)
        # Looked for once, as each look waits for the device.
        self._not_finite = frozenset(
            name
            for name, entry in entries.items()
            if _is_averaged(entry) and not entry.isfinite().all()
        )
        # Buffers of a module, so that `to()` and the state dict reach them. Their names
        # must not contain dots.
        self.shadow: nn.Module = nn.Module()
        self._shadow_keys: dict[str, str] = {}
        for name, entry in entries.items():
            if entry.is_floating_point() and entry.element_size() < 4:
                self._shadow_keys[name] = f"fp32/{name.replace('.', '/')}"
                self.shadow.register_buffer(self._shadow_keys[name], entry.float())

    @property
    def current_decay(self) -> float:
        """The decay of the next update, with regard to the warm-up."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of the model.

        Call it once after each optimizer step. It does not wait for the device.

        Args:
            model: The model that this average was made from, as it is now.

        Raises:
            ValueError: If the entries of the model, or their shapes, are not those of
                the average.
        """
        self._update(model, self.update_fn)
        self.num_updates += 1

    def update_fn(
        self,
        ema_model_weights: torch.Tensor,
        updated_model_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the new average of one entry; override it for another rule.

        An override is called for each averaged entry. Left as it is, all entries are
        updated together, which is faster and gives the same up to rounding.

        Args:
            ema_model_weights: The average so far, at least in float32.
            updated_model_weights: The entry of the model, in the same precision and on
                the same device.
        """
        decay = self.current_decay
        return decay * ema_model_weights + (1.0 - decay) * updated_model_weights

    def set(self, model: nn.Module) -> None:
        """Start again from the weights of a model, as if no update had been made."""
        self._update(model, update_fn=lambda _, weights: weights)
        self.num_updates = 0

    def get_extra_state(self) -> torch.Tensor:
        """Return what the state dict holds beside the tensors: the update count."""
        return torch.tensor(self.num_updates)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restore the update count from a state dict."""
        self.num_updates = int(state)

    @torch.no_grad()
    def _update(self, model: nn.Module, update_fn: UpdateFn) -> None:
        entries, new_entries = tensors_of(self.module), tensors_of(model)
        _check_entries_match(entries, new_entries)
        shadow = {
            name: self.shadow.get_buffer(key) for name, key in self._shadow_keys.items()
        }
        is_default_rule = getattr(update_fn, "__func__", None) is ModelEma.update_fn
        weight = 1.0 - self.current_decay
        # All at once, but sharded tensors apart from whole ones.
        together: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for name, entry in entries.items():
            new_value = new_entries[name].to(entry.device)
            average = shadow.get(name, entry)
            if not _is_averaged(entry):
                entry.copy_(new_value)
            elif not is_default_rule:
                new_value = new_value.detach().to(average.dtype)
                average.copy_(update_fn(average, new_value))
            elif name in self._not_finite:
                _lerp_finite_(average, new_value.to(average.dtype), weight)
            elif average.dtype != new_value.dtype:
                # One by one: all at once would take the memory of a second model.
                average.lerp_(new_value.to(average.dtype), weight)
            else:
                is_sharded = hasattr(average, "device_mesh")
                together.setdefault(is_sharded, []).append((average, new_value))
        for pairs in together.values():
            averages, new_values = zip(*pairs, strict=True)
            compat.foreach_lerp_(averages, new_values, weight)
        for name, average in shadow.items():
            entries[name].copy_(average)


class ModelMean(ModelEma):
    """Keeps a copy of a model whose weights are the plain mean of all updates.

    The weights that it was made from are not part of it, and ``decay`` and ``warmup``
    mean nothing::

        mean = ModelMean(model)
        for _ in range(3):
            ...  # train
            mean.update(model)
    """

    @property
    def current_decay(self) -> float:
        """The weight that the mean so far has in the next one."""
        return self.num_updates / (self.num_updates + 1)


class Tensors(nn.Module):
    """Copies of the tensors of a model, under their names, and nothing to call.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, tensor in tensors_of(model).items():
            path, _, leaf = name.rpartition(".")
            module: nn.Module = self
            for part in path.split(".") if path else ():
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            values = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(leaf, nn.Parameter(values))
            else:
                module.register_buffer(leaf, values)


@torch.no_grad()
def copy_tensors(source: nn.Module, target: nn.Module) -> None:
    """Give the tensors of a model the values of those of the same name in another."""
    values = tensors_of(source)
    for name, tensor in tensors_of(target).items():
        tensor.copy_(values[name])


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of the state dict, those with several names only once."""
    tensors: dict[str, torch.Tensor] = {}
    seen_ids = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor) and id(value) not in seen_ids:
            seen_ids.add(id(value))
            tensors[name] = value
    return tensors


def _is_averaged(entry: torch.Tensor) -> bool:
    return entry.is_floating_point() or entry.is_complex()


def _check_entries_match(
    entries: dict[str, torch.Tensor], new_entries: dict[str, torch.Tensor]
) -> None:
    differing = sorted(entries.keys() ^ new_entries.keys())
    if differing:
        raise ValueError(
            "The model given is not the one that this average was made from: "
            f"{len(differing)} entries are in one of the two only, such as "
            f"{', '.join(differing[:3])}. If the model is wrapped for distributed "
            "training or compiled, pass the model inside, as trainer.get_model() "
            "returns it."
        )
    for name, entry in entries.items():
        new_shape = new_entries[name].shape
        if new_shape != entry.shape:
            raise ValueError(
                f"The weight {name!r} of the model has the shape {tuple(new_shape)}, "
                f"but its average has {tuple(entry.shape)}. Create the average after "
                "the model has its final form, or a new one where that changes."
            )


def _lerp_finite_(
    average: torch.Tensor, new_value: torch.Tensor, weight: float
) -> None:
    """Move an average, but take over elements for which there is none."""
    # From an infinity to itself it is x + weight * (x - x): NaN.
    moved = average.lerp(new_value, weight)
    average.copy_(torch.where((new_value - average).isfinite(), moved, new_value))
