"""Unfreezing parts of a model in the course of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.engines.plain import Engine

if TYPE_CHECKING:
    from pytorch_accelerated.finetuning import ModelFreezer
    from pytorch_accelerated.trainer import Trainer


class UnfreezeCallback(TrainerCallback):
    """Unfreezes a model from its head towards its input, at the start of given epochs.

    ::

        freezer = ModelFreezer(model)
        freezer.freeze()  # all but the last layer group
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        UnfreezeCallback(freezer, {3: -3, 5: 0})  # from -3 on, then all

    A frozen parameter has no gradient, so an optimizer may hold it and leaves it as it
    is. Those that the optimizer does not hold are added to it when the trainer is
    created, as a group of their own, and not when they are unfrozen: so schedules know
    all groups from the first update, and a run is resumed with the same ones.

    A run that is resumed starts with what was unfrozen by then. In later runs of the
    same trainer nothing is frozen again.

    Args:
        freezer: The freezer of the trainer's model.
        from_index: For each epoch, counted from 1, the layer group from which on to the
            last one all are unfrozen.
        lr: The learning rate of parameters that the optimizer does not hold; by default
            that of the optimizer.

    Raises:
        IndexError: If the model has no layer group with one of these indices.
        ValueError: If the freezer has another model than the trainer, or the weights
            belong to an engine, FSDP or DeepSpeed, that cannot be told of new ones.
    """

    lr: float | None = None
    _first: int | None = None

    def __init__(
        self,
        freezer: ModelFreezer,
        from_index: Mapping[int, int],
        lr: float | None = None,
    ) -> None:
        self.freezer = freezer
        self.from_index: dict[int, int] = dict(from_index)
        self.lr = lr
        for index in self.from_index.values():
            freezer._convert_idxs(index, -1)

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        self._first = None
        self.on_init_end(trainer)  # it may have been added later

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Let the optimizer hold what is to be unfrozen."""
        model, optimizer = self.freezer.model, trainer.optimizer
        if model is not trainer.get_model(keep_torch_compile=False):
            raise ValueError(
                "The freezer of UnfreezeCallback has another model than the trainer. "
                "Make it for the model that the trainer is given."
            )
        if type(trainer._engine) is not Engine:
            raise ValueError(
                "UnfreezeCallback does not work with FSDP and DeepSpeed. Unfreeze "
                "between two calls of train()."
            )
        groups = [] if optimizer is None else optimizer.param_groups
        held = {parameter for group in groups for parameter in group["params"]}
        frozen = [p for p in model.parameters() if not p.requires_grad]
        new = [p for p in frozen if p not in held and p.is_floating_point()]
        if new and optimizer is not None:
            rate = {} if self.lr is None else {"lr": self.lr}
            optimizer.add_param_group({"params": new, **rate})

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Unfreeze what is due by this epoch."""
        epoch, num_groups = trainer.run_history.current_epoch, self.freezer.num_groups
        due = [i % num_groups for at, i in self.from_index.items() if at <= epoch]
        if not due or min(due) == self._first:
            return
        self._first = min(due)
        unfrozen = self.freezer.unfreeze(self._first, -1)
        if unfrozen:
            trainer.print(f"Unfreezing the layer groups {sorted(unfrozen)}")
            if trainer._run.shrinker is None:  # which averages gradients by itself
                trainer.model = trainer._engine.wrap_again(trainer.model)
