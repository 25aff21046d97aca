"""What users write, with types: ``make check`` has both checkers read it as strict.

An event may be overridden with any of the arguments that it is sent, by name or by
position, or with ``**kwargs`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    LogMetricsCallback,
    SaveTrainingStateCallback,
    TrainerCallback,
)
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.schedulers import CosineLrScheduler, StatefulSchedulerBase
from pytorch_accelerated.tracking import InMemoryRunHistory


class AsUnder0161(TrainerCallback):
    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        super().on_train_step_end(trainer, **kwargs)

    def on_eval_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any
    ) -> None:
        super().on_eval_step_end(trainer, batch, batch_output, **kwargs)

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        super().on_eval_epoch_end(trainer, **kwargs)


class ByPosition(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, step: int, **kwargs: Any
    ) -> None:
        self.steps.append(step)

    def on_train_update_end(
        self, trainer: Trainer, num_updates: int, **kwargs: Any
    ) -> None:
        trainer.print(num_updates)

    def on_eval_epoch_start(
        self, trainer: Trainer, is_intermediate: bool, **kwargs: Any
    ) -> None:
        trainer.print(is_intermediate)

    def on_eval_epoch_end(
        self, trainer: Trainer, is_intermediate: bool = False, **kwargs: Any
    ) -> None:
        trainer.print(is_intermediate)

    def on_exception(
        self, trainer: Trainer, exception: BaseException, **kwargs: Any
    ) -> None:
        trainer.print(exception)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class ByName(TrainerCallback):
    def on_train_step_end(
        self,
        trainer: Trainer,
        batch: Any,
        batch_output: Any,
        *,
        step: int = 0,
        **kwargs: Any,
    ) -> None:
        trainer.print(step)

    def on_eval_step_end(
        self, trainer: Trainer, *, batch_output: Mapping[str, Any], **kwargs: Any
    ) -> None:
        trainer.print(batch_output["loss"])

    def on_eval_epoch_start(
        self, trainer: Trainer, *, is_intermediate: bool, **kwargs: Any
    ) -> None:
        trainer.print(is_intermediate)

    def on_exception(
        self,
        trainer: Trainer,
        *,
        exception: BaseException | None = None,
        **kwargs: Any,
    ) -> None:
        trainer.print(exception)


class LogToList(LogMetricsCallback):
    logged: list[dict[str, Any]]

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        super().on_training_run_start(trainer, **kwargs)
        self.logged = []

    def log_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.logged.append(metrics)


class OwnStates(SaveTrainingStateCallback):
    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any
    ) -> None:
        super().on_train_step_end(trainer, batch, batch_output, **kwargs)


class HistoryWithNotes(InMemoryRunHistory):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "notes": self.notes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.notes = state["notes"]


class HalveEvery(StatefulSchedulerBase):
    def __init__(self, optimizer: Optimizer, num_updates: int) -> None:
        super().__init__(optimizer)
        self.num_updates = num_updates

    def get_updated_values(self, num_updates: int) -> list[float]:
        halvings = num_updates // self.num_updates
        return [value * 0.5**halvings for value in self.base_lr_values]


class OwnTrainer(Trainer):
    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        features, targets = batch
        outputs = self.model(features)
        loss = nn.functional.mse_loss(outputs, targets)
        return {"loss": loss, "model_outputs": outputs, "batch_size": len(targets)}

    def backward_step(self, loss: Tensor) -> None:
        super().backward_step(loss)

    def create_scheduler(self) -> Any:
        return super().create_scheduler()

    def train_epoch_end(self) -> None:
        epoch: int = self.run_history.current_epoch
        self.run_history.update_metric(
            "epochs_left", self.run_config.num_epochs - epoch
        )


def one_cycle(optimizer: Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=10)


def main() -> float:
    torch.manual_seed(0)
    dataset = TensorDataset(torch.rand(16, 3), torch.rand(16, 1))
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    ModelFreezer(model).freeze(from_index=0, to_index=0)
    schedules: list[Callable[..., Any]] = [
        partial(
            OneCycleLR,
            max_lr=0.1,
            epochs=TrainerPlaceholderValues.NUM_EPOCHS,
            steps_per_epoch=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
        ),
        partial(
            StepLR, step_size=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH * 2
        ),
        partial(
            HalveEvery, num_updates=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH
        ),
        CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
        one_cycle,
    ]
    history = HistoryWithNotes()
    trainer = OwnTrainer(
        model,
        loss_func=nn.MSELoss(),
        optimizer=SGD(model[1].parameters(), lr=0.1),
        callbacks=[
            AsUnder0161,
            ByPosition(),
            ByName,
            LogToList(),
            EarlyStoppingCallback(early_stopping_patience=2),
        ],
        run_history=history,
    )
    for create_scheduler_fn in schedules:
        trainer.train(
            dataset,
            num_epochs=2,
            eval_dataset=dataset,
            per_device_batch_size=4,
            create_scheduler_fn=create_scheduler_fn,
        )
    losses: list[float] = history.get_metric_values("train_loss_epoch")
    return losses[-1]
