"""Training and evaluation mode, set and put back so that each module hears of it.

A module may do more than to note its mode: a layer of LoRA merges its weights for
evaluation, a network freezes its batch norms when it is told to train. So modes are
always set through ``train()``, and never by assigning ``training``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from pytorch_accelerated.compat import Dropout, Norm
from pytorch_accelerated.errors import warn


def start_training(model: nn.Module, plain: nn.Module) -> None:
    """Put a model into training mode.

    Submodules that are in evaluation mode while the model itself is in training mode
    were put there on purpose, and stay there.

    Args:
        model: The model, perhaps wrapped.
        plain: The same without wrappers, which have modes of their own.
    """
    kept = {m for m in plain.modules() if plain.training and not m.training}
    model.train()
    _set([(m, m.training and m not in kept) for m in plain.modules()])


def of(plain: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Return each module of a model without wrappers, with whether it is training."""
    return [(module, module.training) for module in plain.modules()]


def put_back(model: nn.Module, modes: list[tuple[nn.Module, bool]]) -> None:
    """Put all modules back into their modes.

    Args:
        model: The model, perhaps wrapped.
        modes: What :func:`of` returned.
    """
    model.train(modes[0][1])
    _set(modes)


def _set(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    # From the outside in, since a module passes its mode on.
    for module, mode in modes:
        if module.training != mode:
            module.train(mode)


def warn_of_sleeping_submodules(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Warn of a part of a model that is trained, but is in evaluation mode.

    Pretrained models often arrive so. Single layers, such as batch norms, were put into
    it on purpose; so was what is not trained, and whatever a ``train()`` of the user's
    does.
    """
    if not model.training or any(map(_overrides_train, model.modules())):
        return
    trained = {
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    }
    names = [
        name
        for name, module in _asleep(model)
        if any(module.children()) and _misses_training(module, trained)
    ]
    if names:
        warn(
            f"{', '.join(names)} of the model is in evaluation mode while the model is "
            "in training mode, and stays so: its weights are trained without dropout, "
            "and with the statistics that its batch norms have. Call model.train() "
            "before the run if this is not meant. If it is, call .eval() on it in "
            "train_epoch_start, and nothing is said."
        )


def _overrides_train(module: nn.Module) -> bool:
    return "train" in vars(module) or type(module).train is not nn.Module.train


def _asleep(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules in evaluation mode of one in training mode."""
    for name, child in module.named_children():
        if not child.training:
            yield prefix + name, child
        else:
            yield from _asleep(child, f"{prefix}{name}.")


def _misses_training(module: nn.Module, trained: set[nn.Parameter]) -> bool:
    asleep = [each for each in module.modules() if not each.training]
    return any(
        parameter in trained for each in asleep for parameter in each.parameters(False)
    ) and any(
        isinstance(each, Norm) or (isinstance(each, Dropout) and each.p > 0)
        for each in asleep
    )
