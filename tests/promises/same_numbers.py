"""Trains in many ways on two versions of the code, and says whether a number moved.

A change that is to leave the numbers alone leaves every bit of them alone: weights,
the optimizer's state, the history, the learning rate of each update, the batches, and
the random states at the end::

    make same-numbers OLD=v0.2.0
    python tests/promises/same_numbers.py --record old.json
    python tests/promises/same_numbers.py --compare old.json
    python tests/promises/same_numbers.py --compare old.json stream resumed

Words choose the runs whose names have one of them. It exits with 1 if a run differs or
fails. Only public names are used, so that old code can run it too.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS_PER_RUN = 100

# Before torch is imported: sums depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path[0] = os.environ.get("SOURCE_OF_NUMBERS", str(ROOT / "src"))
sys.path += [str(ROOT / "examples" / folder) for folder in (".", "core", "nlp")]
sys.path.append(str(ROOT / "tests"))

import numpy as np
import torch
import torch._dynamo  # the first optimizer would import it, in each process
from processes import Job
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import pytorch_accelerated
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import (
    LimitEvalStepsCallback,
    ModelEmaCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
    TrainerCallback,
)
from pytorch_accelerated.schedulers import CosineLrScheduler, WSDLrScheduler
from pytorch_accelerated.trainer import TrainerWithTimmScheduler
from pytorch_accelerated.utils import LimitBatches

# ------------------------------------------------------------------ what is trained on

NUM_SAMPLES = 44


def samples(count: int = NUM_SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 6, generator=generator)
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))


class Augmented(Dataset):
    """Draws from the three generators that augmentations draw from."""

    def __init__(self) -> None:
        self.samples = samples()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.samples[index]
        noise = torch.randn(6) + np.random.rand() + random.random()
        return inputs + 0.1 * noise, targets


class Stream(IterableDataset):
    """Samples in their order; nobody knows how many."""

    def __iter__(self) -> Iterator[Any]:
        return iter(samples())


class StreamWithPlace(Stream):
    """A stream that knows how far it has been read."""

    def __init__(self) -> None:
        self.num_read = 0

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.num_read, NUM_SAMPLES):
            self.num_read = index + 1
            yield samples()[index]
        self.num_read = 0

    def state_dict(self) -> dict[str, int]:
        return {"num_read": self.num_read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_read = state["num_read"]


def without_large_samples(batch: list[Any]) -> list[torch.Tensor]:
    """Make a batch of those samples whose target is small, or of the first one."""
    kept = [pair for pair in batch if pair[1] < 2] or batch[:1]
    return torch.utils.data.default_collate(kept)


def loader(generator: torch.Generator | None) -> DataLoader[Any]:
    return DataLoader(samples(), 4, shuffle=True, generator=generator)


class Network(nn.Module):
    """Has random numbers, buffers, and a memory that too large batches exhaust."""

    def __init__(self, fits: float = math.inf) -> None:
        super().__init__()
        self.fits = fits
        self.layers = nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8, track_running_stats=True),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(8, 1),
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training and len(inputs) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if self.training and len(inputs) == 1:  # batch norm refuses
            inputs = inputs.repeat(2, 1)
            return self.layers(inputs)[:1]
        return self.layers(inputs)


class CountsTokens(Trainer):
    """Its losses are means over tokens, of which batches have unequal numbers."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_train_batch_loss(batch)
        num_tokens = 1 + (batch[0].abs() > 1).sum()
        error = (output["model_outputs"] - batch[1]).abs().mean()
        return {**output, "num_items_in_batch": num_tokens, "error": error}


class StepsInEpochs:
    """A scheduler like those of timm."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step_update(self, num_updates: int) -> None:
        self._set(0.02 / (1 + num_updates))

    def step(self, epoch: int, metric: float | None = None) -> None:
        self._set(0.03 / (1 + epoch))

    def _set(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


ONE_CYCLE = partial(
    OneCycleLR,
    max_lr=0.05,
    epochs=TrainerPlaceholderValues.NUM_EPOCHS,
    steps_per_epoch=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
)


class EvaluateAmidEpoch(TrainerCallback):
    def on_train_step_end(self, trainer: Trainer, step: int, **kwargs: Any) -> None:
        if step % 4 == 2:
            trainer.evaluate(samples(10), per_device_batch_size=3)


class SaveAndStop(TrainerCallback):
    """Ends a run after some batches, with a state of that moment."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_steps == self.num_steps:
            trainer.save_training_state("stopped")
            raise StopTrainingError("It is time")


class SaveAtEnd(TrainerCallback):
    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        trainer.save_training_state("stopped")


class StopAtEpochEnd(TrainerCallback):
    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        trainer.save_training_state("stopped")
        raise StopTrainingError("It is time")


# ---------------------------------------------------------------------- how it is done


def train(
    dataset: Any = None,
    *,
    callbacks: tuple[Any, ...] = (),
    trainer_class: type[Trainer] = Trainer,
    precision: str = "no",
    seed: int | None = 7,
    fits: float = math.inf,
    num_epochs: int = 3,
    **kwargs: Any,
) -> Trainer:
    model = Network(fits)
    trainer = trainer_class(
        model,
        nn.MSELoss(),
        torch.optim.AdamW(model.parameters(), lr=0.02),
        callbacks,
        seed=seed,
        accelerator_kwargs={"mixed_precision": precision, "cpu": True},
    )
    arguments = {
        "eval_dataset": samples(10),
        "per_device_batch_size": 4,
        "train_dataloader_kwargs": {"num_workers": 0},
        "eval_dataloader_kwargs": {"num_workers": 0},
        **kwargs,
    }
    trainer.train(samples() if dataset is None else dataset, num_epochs, **arguments)
    return trainer


def train_twice() -> None:
    trainer = train(create_scheduler_fn=ONE_CYCLE)
    trainer.train(
        samples(30), 2, per_device_batch_size=5, create_scheduler_fn=ONE_CYCLE
    )
    trainer.evaluate(samples(10), per_device_batch_size=8)
    trainer.train(samples(), 1, gradient_clip_norm=1, reset_run_history=False)


def train_and_evaluate() -> Any:
    trainer = train()
    metrics = trainer.evaluate(samples(13), per_device_batch_size=3)
    predictions = trainer.predict(samples(13), per_device_batch_size=3)
    return metrics, predictions, trainer.gather(predictions[:2])


def train_on_digits(name: str) -> None:
    """Run an example for MNIST on as many small images, which are all here."""
    images, labels = importlib.import_module("quickstart").load_digits().tensors
    images = nn.functional.interpolate(images, size=(28, 28))
    repeated = [i % len(labels) for i in range(60_000)]
    with LimitBatches(30):
        dataset = Subset(TensorDataset(images, labels), repeated)
        importlib.import_module(name).main(dataset, num_epochs=1)


def example(name: str, **kwargs: Any) -> Any:
    return importlib.import_module(name).main(**kwargs)


# ------------------------------------------------------------------------- what is run


@dataclass(frozen=True)
class Part:
    """A part of a run, in processes of its own."""

    function: Callable[[], Any]
    num_processes: int = 1


def once(num_processes: int = 1, **kwargs: Any) -> list[Part]:
    return [Part(partial(train, **kwargs), num_processes)]


def resumed(
    stop: TrainerCallback,
    *,
    num_processes: tuple[int, int] = (1, 1),
    callbacks: tuple[TrainerCallback, ...] = (),
    before: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> list[Part]:
    """Let a callback stop and save a run, and go on in other processes.

    ``before`` holds the arguments of the part until then that differ.
    """
    kwargs = {"create_scheduler_fn": partial(ExponentialLR, gamma=0.95), **kwargs}
    start = {**kwargs, "callbacks": (*callbacks, stop), **(before or {})}
    return [
        Part(partial(train, **start), num_processes[0]),
        Part(
            partial(train, **kwargs, callbacks=callbacks, resume_from="stopped"),
            num_processes[1],
        ),
    ]


STREAM = {"dataset": Stream(), "gradient_accumulation_steps": 2}
TOKENS = {"trainer_class": CountsTokens, "gradient_accumulation_steps": 3}
WORKERS = {"dataset": Augmented(), "train_dataloader_kwargs": {"num_workers": 2}}

RUNS: dict[str, list[Part]] = {
    "plain": once(),
    "no seed": once(seed=None),
    "augmentation": once(dataset=Augmented()),
    "augmentation, 2 workers": once(**WORKERS),
    "chosen workers": once(dataset=Augmented(), train_dataloader_kwargs=None),
    "accumulation, a window not full": once(gradient_accumulation_steps=3),
    "tokens": once(**TOKENS),
    "batches made smaller by collate_fn": once(
        collate_fn=without_large_samples, gradient_accumulation_steps=3
    ),
    "clipping by value": once(gradient_clip_value=0.05),
    "clipping by norm": once(gradient_clip_norm=0.1, gradient_accumulation_steps=2),
    "bf16": once(precision="bf16", gradient_accumulation_steps=2),
    "CosineLrScheduler": once(
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1)
    ),
    "WSDLrScheduler": once(
        create_scheduler_fn=WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=1)
    ),
    "OneCycleLR": once(create_scheduler_fn=ONE_CYCLE),
    "ReduceLROnPlateau": once(
        create_scheduler_fn=partial(ReduceLROnPlateau, patience=0, threshold=0.5)
    ),
    "a scheduler of timm": once(
        trainer_class=TrainerWithTimmScheduler, create_scheduler_fn=StepsInEpochs
    ),
    "EMA": once(callbacks=(ModelEmaCallback(0.9),)),
    "evaluation every 4 steps": once(
        callbacks=(LimitEvalStepsCallback(2), StepBasedEvaluationCallback(4))
    ),
    "evaluate() amid an epoch": once(callbacks=(EvaluateAmidEpoch(),)),
    "evaluate(), predict()": [Part(train_and_evaluate)],
    "a loader with a generator": once(
        dataset=loader(torch.Generator().manual_seed(3)), train_dataloader_kwargs=None
    ),
    "a loader without one": once(dataset=loader(None), train_dataloader_kwargs=None),
    "stream": once(**STREAM),
    "stream, max steps amid an epoch": once(
        **STREAM, num_epochs=9, max_num_train_steps=8
    ),
    "max steps amid an epoch": once(
        max_num_train_steps=15, create_scheduler_fn=ONE_CYCLE
    ),
    "batches halved": once(
        fits=4, per_device_batch_size=16, halve_batch_if_out_of_memory=True
    ),
    "train() twice": [Part(train_twice)],
    "resumed amid an epoch": resumed(SaveAndStop(15)),
    "resumed at the end of an epoch": resumed(StopAtEpochEnd()),
    "resumed, 2 workers": resumed(SaveAndStop(15), **WORKERS),
    "resumed amid a window": resumed(
        SaveAndStop(16), gradient_accumulation_steps=3, create_scheduler_fn=ONE_CYCLE
    ),
    "resumed amid a window of tokens": resumed(SaveAndStop(16), **TOKENS),
    "resumed, stream": resumed(SaveAndStop(16), dataset=Stream()),
    "resumed, stream with its place": resumed(
        SaveAndStop(16), dataset=StreamWithPlace()
    ),
    "resumed, a loader without a generator": resumed(
        SaveAndStop(15), dataset=loader(None), train_dataloader_kwargs=None
    ),
    "resumed after max steps": resumed(SaveAtEnd(), before={"max_num_train_steps": 15}),
    "resumed after max steps at the end of an epoch": resumed(
        SaveAtEnd(), before={"max_num_train_steps": 22}
    ),
    "resumed, EMA": resumed(SaveAndStop(15), callbacks=(ModelEmaCallback(0.9),)),
    "2 processes": once(2, per_device_batch_size=3),
    "2 processes, augmentation": once(2, dataset=Augmented()),
    "2 processes, accumulation": once(2, gradient_accumulation_steps=4),
    "2 processes, tokens": once(2, **TOKENS),
    "2 processes, stream": once(2, **STREAM),
    "2 processes, EMA": once(2, callbacks=(ModelEmaCallback(0.9),)),
    "2 processes, evaluate(), predict()": [Part(train_and_evaluate, 2)],
    "2 processes, resumed": resumed(SaveAndStop(8), num_processes=(2, 2)),
    "2 processes, resumed amid a window": resumed(
        SaveAndStop(8), num_processes=(2, 2), gradient_accumulation_steps=3
    ),
    "2 processes, resumed, stream": resumed(
        SaveAndStop(8), num_processes=(2, 2), dataset=Stream()
    ),
    "2 processes, resumed on 1": resumed(StopAtEpochEnd(), num_processes=(2, 1)),
    "2 processes, resumed on 1 amid an epoch": resumed(
        SaveAndStop(8), num_processes=(2, 1), before={"per_device_batch_size": 2}
    ),
    "quickstart.py": [Part(partial(example, "quickstart", num_epochs=1))],
    "resume_after_interruption.py": [
        Part(partial(example, "resume_after_interruption", num_epochs=1, max_updates=k))
        for k in (30, None)
    ],
    "2 processes, two_processes.py": [
        Part(partial(example, "two_processes", num_epochs=1), 2)
    ],
    "gpt_from_scratch.py": [
        Part(partial(example, "gpt_from_scratch", num_files=4, length=32, width=32))
    ],
    **{
        f"{name}.py": [Part(partial(train_on_digits, name))]
        for name in (
            "train_mnist",
            "train_mnist_custom_event",
            "train_mnist_metrics_in_callback",
            "train_mnist_metrics_in_method",
        )
    },
}


# -------------------------------------------------------------------- what is recorded


class Recorder(TrainerCallback):
    """Notes what a trainer trains on, and how fast."""

    def __init__(self) -> None:
        self.learning_rates: list[list[float]] = []
        self.steps: list[str] = []

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any
    ) -> None:
        self.steps.append(digest([batch, batch_output["loss"]]))

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.learning_rates.append(trainer.last_lr)


def record_all_trainers() -> list[tuple[Trainer, Recorder]]:
    """Give a recorder to every trainer of this process, also to those of examples."""
    found: list[tuple[Trainer, Recorder]] = []
    create = Trainer.__init__

    @functools.wraps(create)
    def create_recorded(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        create(trainer, *args, **kwargs)
        recorder = Recorder()
        trainer.callback_handler.add_callback(recorder)
        found.append((trainer, recorder))

    Trainer.__init__ = create_recorded
    return found


def results_of(trainer: Trainer, recorder: Recorder) -> dict[str, str]:
    history, optimizer = trainer.run_history, trainer.optimizer
    groups, names = optimizer.param_groups, history.get_metric_names()
    results = {
        "weights": trainer.model.state_dict(),
        "optimizer": [
            optimizer.state_dict()["state"],
            [[group[name] for name in optimizer.defaults] for group in groups],
        ],
        "history": [
            history.current_epoch,
            {name: history.get_metric_values(name) for name in names},
        ],
        "learning rates": recorder.learning_rates,
        "batches and losses": recorder.steps,
        "counts": [trainer.num_updates, trainer.num_steps, trainer.num_samples_seen],
    }
    for callback in trainer.callback_handler:
        if isinstance(callback, ModelEmaCallback):
            results["EMA"] = callback.ema_model.module.state_dict()
    return {name: digest(value) for name, value in results.items()}


def digest(value: Any) -> str:
    """Return the same text only for what is the same in every bit."""
    total = hashlib.sha256()
    for piece in pieces_of(value):
        total.update(piece)
    return total.hexdigest()[:16]


def pieces_of(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield repr(key).encode()
            yield from pieces_of(value[key])
    elif isinstance(value, list | tuple):
        yield f"{len(value)} values".encode()
        for each in value:
            yield from pieces_of(each)
    else:
        yield repr(value).encode()


# ----------------------------------------------------------------------- its processes


def run_in_folder(parts: list[Part], folder: Path) -> None:
    """Run the parts one after the other; leave the results in ``results.json``."""
    os.chdir(folder)
    results: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        job = Job(partial(run_part, part, number), Path("log"), part.num_processes)
        if what_failed := job.wait_or_explain(SECONDS_PER_RUN):
            print(what_failed)
            sys.exit(1)
        for rank in range(part.num_processes):
            results |= json.loads(Path(f"{number}-{rank}.json").read_text())
    Path("results.json").write_text(json.dumps(results))


def run_part(part: Part, number: int) -> None:
    rank = os.environ.get("RANK", "0")
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    recorded = record_all_trainers()
    returned = part.function()
    results = {} if isinstance(returned, Trainer) else {"returned": digest(returned)}
    for trainer, recorder in recorded:
        results |= results_of(trainer, recorder)
    results["random states"] = digest(
        [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]
    )
    where = f"part {number}, process {rank}: "
    Path(f"{number}-{rank}.json").write_text(
        json.dumps({where + name: value for name, value in results.items()})
    )
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first process hosts what all talk over


def record(names: list[str]) -> dict[str, dict[str, str]]:
    """Run what is named, as many at once as there are cores; return the results."""
    results: dict[str, dict[str, str]] = {}
    waiting = sorted(names, key=lambda name: -len(RUNS[name]))
    running: dict[str, Job] = {}
    with tempfile.TemporaryDirectory() as root:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                name = waiting.pop(0)
                folder = Path(root) / name
                run = partial(run_in_folder, RUNS[name], folder)
                running[name] = Job(run, folder / "log")
            for name in [name for name, job in running.items() if job.poll()]:
                del running[name]
                results[name] = read_results(Path(root) / name)
            time.sleep(0.01)
    return {name: results[name] for name in names}


def read_results(folder: Path) -> dict[str, str]:
    try:
        return json.loads((folder / "results.json").read_text())
    except FileNotFoundError:
        lines = (folder / "log").read_text(errors="replace").splitlines()
        return {"failed": "\n".join(lines[-30:])}


# ---------------------------------------------------------------------- the comparison


def compare(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Print a table of the runs, and say whether all of them are the same."""
    outcomes = {name: outcome_of(old.get(name), new[name]) for name in new}
    print("| run | same |\n|---|---|")
    for name, outcome in outcomes.items():
        print(f"| {name} | {outcome} |")
    for name, results in new.items():
        if "failed" in results:
            print(f"\n{name} failed:\n{results['failed']}")
    return set(outcomes.values()) == {"yes"}


def outcome_of(old: dict[str, str] | None, new: dict[str, str]) -> str:
    if "failed" in new:
        return "no: it fails"
    if old is None or "failed" in old:
        return "no: nothing to compare with"
    differ = [name for name in old | new if old.get(name) != new.get(name)]
    if not differ:
        return "yes"
    where = differ[0].partition(": ")[0]  # what comes after it follows from it
    names = [name.removeprefix(f"{where}: ") for name in differ if where in name]
    return f"no: in {where}, {', '.join(names)}"


def record_other_version(ref: str, words: list[str]) -> dict[str, Any]:
    """Record with the code of a commit, in a checkout of its own."""
    git = partial(subprocess.run, cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder:
        checkout, file = f"{folder}/checkout", Path(folder) / "numbers.json"
        git(["git", "worktree", "add", "--quiet", "--detach", checkout, ref])
        try:
            subprocess.run(
                [sys.executable, __file__, "--record", file, *words],
                env={**os.environ, "SOURCE_OF_NUMBERS": f"{checkout}/src"},
                check=False,  # runs that fail are in the file too
            )
        finally:
            git(["git", "worktree", "remove", "--force", checkout])
        return json.loads(file.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of the names of the runs")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--record", type=Path, metavar="FILE")
    mode.add_argument("--compare", type=Path, metavar="FILE")
    mode.add_argument("--old", metavar="REF", help="a commit to compare with")
    arguments = parser.parse_args()
    words = arguments.words or [""]
    names = [name for name in RUNS if any(word in name for word in words)]
    source = Path(pytorch_accelerated.__file__).parent
    print(f"{len(names)} runs with {source}", flush=True)
    new = record(names)
    if arguments.record:
        arguments.record.write_text(json.dumps(new, indent=1))
        return int(not compare(new, new))
    if arguments.old:
        old = record_other_version(arguments.old, arguments.words)
    else:
        old = json.loads(arguments.compare.read_text())
    return int(not compare(old, new))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
