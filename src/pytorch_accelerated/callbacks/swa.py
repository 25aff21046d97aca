"""Ending a run with the mean of the weights of its last epochs."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from pytorch_accelerated import compat, distributed, modes
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.ema import ModelMean, copy_tensors
from pytorch_accelerated.errors import warn

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class SwaCallback(TrainerCallback):
    """Gives the model the mean of the weights of its last epochs when the run ends.

    This is `stochastic weight averaging <https://arxiv.org/abs/1803.05407>`_, best with
    a learning rate that stays rather high in the epochs that are averaged. Until the
    end of the run the model trains as if nobody averaged. Then it is given the mean,
    and the statistics of its batch norms are measured anew, as
    :func:`torch.optim.swa_utils.update_bn` does it: the training data pass through it
    once more, in the batches of all processes. So what is evaluated, predicted or saved
    after the run has the mean; metrics and checkpoints of the run itself have not.

    The mean is saved with the training state, and goes on when a run is resumed. A run
    that has failed, or was interrupted, leaves the model as it is. What another
    callback loads at the end of the run, such as the best model, is replaced.

    Args:
        start_epoch: The first epoch, counted from 1, that is part of the mean.

    Attributes:
        average: The mean, None before the first epoch that is part of it.

    Raises:
        ValueError: If ``start_epoch`` is below 1, or comes after the last epoch.

    Warns:
        TrainingWarning: If another callback loads the best weights, for nothing.
    """

    called_last: tuple[str, ...] = ("on_training_run_end",)

    average: ModelMean | None = None
    _saved: dict[str, Any] | None = None

    def __init__(self, start_epoch: int) -> None:
        if start_epoch < 1:
            raise ValueError(f"start_epoch must be at least 1, got {start_epoch}.")
        self.start_epoch = start_epoch

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        self.average = self._saved = None

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that there is an epoch to average."""
        last = trainer._run.last_epoch(trainer.run_history.current_epoch)
        if self.start_epoch > last:
            raise ValueError(
                f"SwaCallback averages from epoch {self.start_epoch} on, but the last "
                f"epoch of this run is {last}. Start earlier, or train for longer."
            )
        for each in trainer.callback_handler:
            if getattr(each, "load_saved_checkpoint", False):
                warn(
                    "SwaCallback gives the model the mean in place of the best weights "
                    f"that {type(each).__name__} loads. Give the latter "
                    "load_saved_checkpoint=False if that is meant."
                )

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Add the weights to the mean."""
        if trainer.run_history.current_epoch >= self.start_epoch:
            model = trainer.get_model(keep_torch_compile=False)
            self._mean_of(trainer, model).update(model)

    def _mean_of(self, trainer: Trainer, model: nn.Module) -> ModelMean:
        if self.average is None:
            self.average = ModelMean(model)
            if self._saved is not None:
                trainer._engine.load_model(self.average, self._saved)
                self._saved = None
        return self.average

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Give the model the mean."""
        nothing = (self.average or self._saved) is None
        if nothing or trainer.has_failed or trainer.interrupted:
            return
        model = trainer.get_model(keep_torch_compile=False)
        average = self._mean_of(trainer, model)
        trainer._engine.release(model)
        copy_tensors(average.module, model)
        distributed.same_on_all_processes(model.buffers())
        _measure_batch_norms(trainer, model)
        trainer.print(f"The model has the mean of {average.num_updates} epochs")

    def state_dict(self) -> dict[str, Any]:
        """Return the mean."""
        state = self._saved if self.average is None else self.average.state_dict()
        return {} if state is None else {"average": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the mean."""
        self._saved = state["average"]


def _measure_batch_norms(trainer: Trainer, model: nn.Module) -> None:
    """Let the batch norms that are training average over the training data."""
    before, loader = modes.of(model), trainer._train_dataloader
    modes.start_training(trainer.model, model)
    norms = nn.ModuleList(
        m for m in model.modules() if isinstance(m, compat.BatchNorm) and m.training
    )
    momenta = [norm.momentum for norm in norms]
    # update_bn takes them for a model, and the first member of a tuple for its input.
    norms.forward = trainer.calculate_train_batch_loss
    try:
        if norms:
            loader.set_epoch(trainer.run_history.current_epoch)
            # A stream may have no end.
            update_bn(((batch,) for batch in islice(loader, trainer.num_steps)), norms)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        modes.put_back(trainer.model, before)
    for statistic in filter(torch.is_floating_point, norms.buffers()):
        statistic.copy_(trainer._accelerator.reduce(statistic, "mean"))
