"""Makes files of the present version, to be kept and loaded by later ones.

``PYTHONPATH=src python tests/checkpoint/golden/make.py`` writes to a folder with the
name of the version:

- ``state``: a training state of a run of three epochs, saved in the second one, in the
  middle of a window of accumulation; it has a schedule and a moving average,
- ``best.pt``: what ``SaveBestModelCallback`` saved,
- ``checkpoint.pt``: a checkpoint of the end,
- ``expected.json``: the weights and metrics that the run has ended with.

``0.1.61`` holds what that version wrote, and the numbers that its loop came to. Once a
version is released, its folder stays as it is.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import TensorDataset

import pytorch_accelerated
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    ModelEmaCallback,
    SaveBestModelCallback,
    TerminateOnNaNCallback,
    TrainerCallback,
)
from pytorch_accelerated.schedulers import CosineLrScheduler


class SaveAmidWindow(TrainerCallback):
    """Saves after the fifth of the six batches of the second epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_step_end(self, trainer, **kwargs):
        if trainer.run_history.current_epoch == 2 and kwargs["step"] == 4:
            trainer.save_training_state(self.path, {"note": "kept"})


def create_trainer(folder, callbacks=()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.25), nn.Linear(3, 1))
    with torch.no_grad():
        for weights in model.parameters():
            weights.copy_(torch.linspace(-0.5, 0.75, weights.numel()).view_as(weights))
    return Trainer(
        model,
        nn.MSELoss(),
        torch.optim.AdamW(model.parameters(), lr=0.05),
        callbacks=[
            TerminateOnNaNCallback,
            ModelEmaCallback(0.9, save_path=Path(folder) / "ema.pt"),
            SaveBestModelCallback(
                Path(folder) / "best.pt", load_saved_checkpoint=False
            ),
            *callbacks,
        ],
        seed=1,
        accelerator_kwargs={"cpu": True},
    )


def create_dataset():
    inputs = torch.linspace(-1, 1, 48).reshape(24, 2)
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))


def train(folder, callbacks=(), resume_from=None):
    """Train three epochs of three updates, on numbers that no generator has drawn."""
    dataset = create_dataset()
    trainer = create_trainer(folder, callbacks)
    trainer.train(
        dataset,
        num_epochs=3,
        eval_dataset=dataset,
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
        train_dataloader_kwargs={"num_workers": 0},
        eval_dataloader_kwargs={"num_workers": 0},
        resume_from=resume_from,
    )
    return trainer


def result_of(trainer):
    """Return the weights and metrics as JSON holds them, exactly."""
    return {
        "weights": weights_of(trainer.model),
        "history": {
            name: trainer.run_history.get_metric_values(name)
            for name in sorted(trainer.run_history.get_metric_names())
        },
        "num_updates": trainer.num_updates,
    }


def train_legacy(model, optimizer, scheduler, dataset):
    """Train an epoch of three batches, as the loop of 0.1.61 did."""
    for inputs, targets in zip(*(t.split(2) for t in dataset.tensors), strict=True):
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def create_legacy():
    """Return a model, optimizer, scheduler and data, without random numbers."""
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    with torch.no_grad():
        for weights in model.parameters():
            weights.copy_(torch.linspace(-0.5, 0.75, weights.numel()).view_as(weights))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
    inputs = torch.linspace(-1, 1, 6).reshape(6, 1)
    return model, optimizer, scheduler, TensorDataset(inputs, 2 * inputs)


def write_legacy(folder):
    """Write what 0.1.61 wrote after the first of two epochs, and the end of both."""
    model, optimizer, scheduler, dataset = create_legacy()
    train_legacy(model, optimizer, scheduler, dataset)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model, optimizer)
    for _ in range(2):  # it registered the scheduler anew at each save
        accelerator.register_for_checkpointing(scheduler)
        accelerator.save_state(str(folder / "state"))
    metadata = {"current_epoch": 2, "note": "kept"}
    torch.save(metadata, folder / "state" / "trainer_metadata.pt")
    best = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "loss": np.float64(0.25),
        "scores": np.arange(3, dtype=np.float32),
    }
    torch.save(best, folder / "best.pt")
    expected = {
        "torch": torch.__version__,
        "best": weights_of(model),
        "draws": [random.random(), np.random.rand(), torch.rand(1).item()],
    }
    train_legacy(model, optimizer, scheduler, dataset)
    expected["end"] = weights_of(model)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def weights_of(model):
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def main():
    here = Path(__file__).parent
    if not (here / "0.1.61").exists():
        write_legacy(here / "0.1.61")
    folder = here / pytorch_accelerated.__version__
    shutil.rmtree(folder, ignore_errors=True)
    trainer = train(folder, [SaveAmidWindow(folder / "state")])
    trainer.save_checkpoint(folder / "checkpoint.pt", {"note": "kept"})
    (folder / "ema.pt").unlink()
    recorded = {"torch": torch.__version__, **result_of(trainer)}
    (folder / "expected.json").write_text(json.dumps(recorded, indent=1) + "\n")
    sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    main()
