"""The run that the fault tests kill, interrupt and starve, and what it must end with.

It has everything that a state could forget: shuffling, augmentation from three random
generators, dropout, batch norm, momentum, a schedule, accumulation with a last window
that is not full, an average of the weights, early stopping, a best model, history.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    ModelEmaCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    TerminateOnNaNCallback,
    TrainerCallback,
)
from pytorch_accelerated.placeholders import TrainerPlaceholderValues


class Augmented(Dataset):
    """Adds noise from all three generators that augmentations draw from."""

    def __init__(self, num_samples: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(num_samples, 6, generator=generator)
        self.targets = self.inputs.sum(dim=1, keepdim=True)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(6) + np.random.rand() + random.random()
        return self.inputs[index] + 0.1 * noise, self.targets[index]


ONE_CYCLE = partial(
    OneCycleLR,
    max_lr=0.05,
    epochs=TrainerPlaceholderValues.NUM_EPOCHS,
    steps_per_epoch=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
)


def create_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1)
    )


class ScaledLoss(Trainer):
    """Counts items of its own, so that windows are corrected when they close."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_train_batch_loss(batch)
        return {**output, "num_items_in_batch": 2 * output["batch_size"] + 1}


class SaveInWindows(TrainerCallback):
    """Saves after each batch that does not close its window of accumulation."""

    called_last = ("on_train_step_end",)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_step_end(self, trainer, batch, batch_output, step, **kwargs):
        if (step + 1) % trainer.run_config.gradient_accumulation_steps:
            # A name that comes after the "step_..." with as many updates.
            trainer.save_training_state(self.folder / f"window_{trainer.num_steps:03}")


@dataclass(frozen=True)
class Scenario:
    """How the run is set up; two with equal settings end with equal weights."""

    num_epochs: int = 3
    num_samples: int = 44
    batch_size: int = 4
    accumulation: int = 3
    num_workers: int = 0
    loader_kwargs: tuple[tuple[str, Any], ...] = ()
    precision: str = "no"
    counts_items: bool = False
    in_memory: bool = False
    seed: int | None = 7
    save_every_n_steps: int | None = 1
    max_checkpoints: int | None = None
    callbacks: tuple[Any, ...] = ()
    save_kwargs: tuple[tuple[str, Any], ...] = ()
    patience: int = 3
    save_best: bool = True
    saves_in_windows: bool = False
    own_loader: bool = False
    own_generator: bool = True
    ends_schedule: bool = True

    def with_(self, **changes: Any) -> Scenario:
        return replace(self, **changes)

    def create_trainer(self, folder: Path) -> Trainer:
        model = create_model()
        trainer_class = ScaledLoss if self.counts_items else Trainer
        return trainer_class(
            model,
            loss_func=nn.MSELoss(),
            optimizer=torch.optim.AdamW(model.parameters(), lr=0.02),
            callbacks=[
                TerminateOnNaNCallback,
                EarlyStoppingCallback(early_stopping_patience=self.patience),
                *(self._best_callbacks(folder) if self.save_best else ()),
                SaveTrainingStateCallback(
                    folder / "states",
                    save_every_n_steps=self.save_every_n_steps,
                    save_every_n_epochs=1,
                    max_checkpoints=self.max_checkpoints,
                    **dict(self.save_kwargs),
                ),
                *([SaveInWindows(folder / "states")] if self.saves_in_windows else ()),
                *self.callbacks,
            ],
            seed=self.seed,
            accelerator_kwargs={"mixed_precision": self.precision, "cpu": True},
        )

    @staticmethod
    def _best_callbacks(folder: Path) -> list[Any]:
        return [
            SaveBestModelCallback(folder / "best.pt", load_saved_checkpoint=False),
            ModelEmaCallback(0.9, save_path=folder / "ema.pt"),
        ]

    def train_dataset(self) -> Any:
        data = Augmented(self.num_samples)
        if not (self.in_memory or self.own_loader):
            return data
        samples = TensorDataset(data.inputs, data.targets)
        return self._loader_of(samples) if self.own_loader else samples

    def _loader_of(self, samples: Any) -> Any:
        order = torch.Generator().manual_seed(3) if self.own_generator else None
        return DataLoader(samples, self.batch_size, shuffle=True, generator=order)

    def eval_dataset(self) -> Any:
        data = Augmented(10)
        return TensorDataset(data.inputs, data.targets)

    def run(
        self, folder: Path, resume_from: Any = None, trainer: Trainer | None = None
    ) -> Trainer:
        if trainer is None:
            trainer = self.create_trainer(folder)
        trainer.train(
            self.train_dataset(),
            self.num_epochs,
            eval_dataset=self.eval_dataset(),
            per_device_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulation,
            gradient_clip_norm=1.0,
            create_scheduler_fn=ONE_CYCLE
            if self.ends_schedule
            else partial(ExponentialLR, gamma=0.9),
            train_dataloader_kwargs=None
            if self.own_loader
            else {"num_workers": self.num_workers, **dict(self.loader_kwargs)},
            eval_dataloader_kwargs={"num_workers": 0},
            resume_from=resume_from,
        )
        return trainer


def fingerprint(trainer: Trainer) -> dict[str, Any]:
    """Return all that a run ends with; equal runs have equal ones, bit for bit."""
    return {
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": {
            name: value
            for name, value in trainer.scheduler.state_dict().items()
            if not callable(value)
        },
        "callbacks": trainer.callback_handler.state_dict(),
        "history": {
            name: list(trainer.run_history.get_metric_values(name))
            for name in sorted(trainer.run_history.get_metric_names())
        },
        "epoch": trainer.run_history.current_epoch,
        "progress": (
            trainer.num_updates,
            trainer.num_steps,
            trainer.num_samples_seen,
        ),
        "random": {
            "torch": torch.get_rng_state(),
            "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
            "python": torch.tensor(random.getstate()[1]),
        },
    }


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """Say where two fingerprints differ; None if they are equal in every bit."""
    if isinstance(one, torch.Tensor):
        same = torch.equal(one, other) and one.dtype == other.dtype
        return None if same else f"{where}: {one} is not {other}"
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            return f"{where}: {sorted(one)} is not {sorted(other)}"
        pairs = [(one[key], other[key], f"{where}[{key!r}]") for key in one]
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{where}: {one} is not {other}"
        pairs = [
            (a, b, f"{where}[{i}]")
            for i, (a, b) in enumerate(zip(one, other, strict=True))
        ]
    else:
        same = one == other or (one != one and other != other)
        return None if same else f"{where}: {one!r} is not {other!r}"
    found = (difference(*pair) for pair in pairs)
    return next((text for text in found if text), None)
