"""Those that are measured, each with the fewest lines that do the job.

Run as a script it is one contender at one workload: it says "ready", trains each time
it is told "run", and answers with a line of JSON. Imports of the libraries are inside
the functions, so that a process imports only what it measures.

    python benchmarks/contenders.py CONTENDER WORKLOAD SIZE DEVICE PARAMETERS_FILE
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workloads import Job

# The package to import for each, as workload (g) does.
PACKAGES = {
    "by hand": "accelerate",
    "pytorch-accelerated": "pytorch_accelerated",
    "accelerate": "accelerate",
    "lightning": "lightning",
    "transformers": "transformers",
    "ignite": "ignite.engine",
    "skorch": "skorch",
    "fastai": "fastai.learner",
}


class NotOfferedError(Exception):
    """A contender has nothing of its own for a workload."""


def _loader(job: Job, dataset: Any = None) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(job.dataset if dataset is None else dataset, job.batch_size)


def _evaluate_by_hand(job: Job, model: Any, loader: Any) -> float:
    import torch

    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for inputs, targets in loader:
            inputs, targets = inputs.to(job.device), targets.to(job.device)
            total += job.loss_func(model(inputs), targets).item() * len(inputs)
            count += len(inputs)
    return total / count


def by_hand(job: Job) -> None:
    """Train with the loop that a tutorial would show."""
    import torch
    from torch import nn

    model, optimizer = job.model.to(job.device), job.optimizer
    loader = _loader(job)
    if job.only_evaluates:
        _evaluate_by_hand(job, model, _loader(job, job.eval_dataset))
        return
    num_updates = 0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(job.num_epochs):
            model.train()
            for step, (inputs, targets) in enumerate(loader):
                inputs, targets = inputs.to(job.device), targets.to(job.device)
                loss = job.loss_func(model(inputs), targets)
                if job.accumulation > 1:
                    loss = loss / job.accumulation
                loss.backward()
                if (step + 1) % job.accumulation == 0:
                    if job.clip_norm is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                    num_updates += 1
                    if job.checkpoint_every and num_updates % job.checkpoint_every == 0:
                        state = {
                            "model": model.state_dict(),
                            "optimizer": optimizer.state_dict(),
                        }
                        torch.save(state, f"{folder}/step_{num_updates}.pt")
            if job.eval_dataset is not None:
                _evaluate_by_hand(job, model, _loader(job, job.eval_dataset))


def pytorch_accelerated(job: Job) -> None:
    """Train with this library."""
    from pytorch_accelerated import Trainer
    from pytorch_accelerated.callbacks import SaveTrainingStateCallback
    from pytorch_accelerated.trainer import DEFAULT_CALLBACKS

    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[Any] = list(DEFAULT_CALLBACKS) if job.shows_progress else []
        if job.checkpoint_every:
            callbacks.append(
                SaveTrainingStateCallback(
                    folder, save_every_n_steps=job.checkpoint_every, save_at_end=False
                )
            )
        trainer = Trainer(job.model, job.loss_func, job.optimizer, callbacks)
        if job.only_evaluates:
            trainer.evaluate(job.eval_dataset, job.batch_size)
            return
        trainer.train(
            job.dataset,
            job.num_epochs,
            eval_dataset=job.eval_dataset,
            per_device_batch_size=job.batch_size,
            gradient_accumulation_steps=job.accumulation,
            gradient_clip_norm=job.clip_norm,
            train_dataloader_kwargs={"shuffle": False},
        )


def accelerate(job: Job) -> None:
    """Train with a loop over Accelerate's objects, as its documentation shows."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=job.accumulation)
    model, optimizer, loader = accelerator.prepare(
        job.model, job.optimizer, _loader(job)
    )
    eval_loader = None
    if job.eval_dataset is not None:
        eval_loader = accelerator.prepare(_loader(job, job.eval_dataset))

    def evaluate() -> None:
        model.eval()
        losses = []
        with torch.no_grad():
            for inputs, targets in eval_loader:
                loss = job.loss_func(model(inputs), targets)
                losses.append(accelerator.gather_for_metrics(loss))
        torch.stack(losses).mean().item()

    if job.only_evaluates:
        evaluate()
    else:
        num_updates = 0
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(job.num_epochs):
                model.train()
                for inputs, targets in loader:
                    with accelerator.accumulate(model):
                        loss = job.loss_func(model(inputs), targets)
                        accelerator.backward(loss)
                        if accelerator.sync_gradients and job.clip_norm is not None:
                            accelerator.clip_grad_norm_(
                                model.parameters(), job.clip_norm
                            )
                        optimizer.step()
                        optimizer.zero_grad()
                    num_updates += accelerator.sync_gradients
                    if job.checkpoint_every and num_updates % job.checkpoint_every == 0:
                        accelerator.save_state(f"{folder}/step_{num_updates}")
                if eval_loader is not None:
                    evaluate()
    accelerator.free_memory()


def lightning(job: Job) -> None:
    """Train with Lightning's Trainer."""
    from lightning import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def training_step(self, batch: Any, _: int) -> Any:
            inputs, targets = batch
            return job.loss_func(self.model(inputs), targets)

        def validation_step(self, batch: Any, _: int) -> None:
            inputs, targets = batch
            self.log("eval_loss", job.loss_func(self.model(inputs), targets))

        def configure_optimizers(self) -> Any:
            return job.optimizer

    shows = job.shows_progress
    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[Any] = []
        if job.checkpoint_every:
            callbacks.append(
                ModelCheckpoint(
                    folder, every_n_train_steps=job.checkpoint_every, save_top_k=-1
                )
            )
        trainer = Trainer(
            max_epochs=job.num_epochs,
            devices=1,
            accumulate_grad_batches=job.accumulation,
            gradient_clip_val=job.clip_norm,
            callbacks=callbacks,
            default_root_dir=folder,
            logger=shows,
            enable_progress_bar=shows,
            enable_model_summary=shows,
            enable_checkpointing=shows or bool(callbacks),
            num_sanity_val_steps=0,
        )
        eval_loader = job.eval_dataset and _loader(job, job.eval_dataset)
        if job.only_evaluates:
            trainer.validate(Module(), eval_loader, verbose=False)
        else:
            trainer.fit(Module(), _loader(job), eval_loader)


def transformers(job: Job) -> None:
    """Train with the Trainer of transformers."""
    import torch
    from torch.utils.data import SequentialSampler, default_collate
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def forward(self, inputs: Any, labels: Any) -> Any:
            return {"loss": job.loss_func(self.model(inputs), labels)}

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(job.dataset)  # type: ignore[arg-type]

    def collate(samples: list[Any]) -> dict[str, Any]:
        inputs, labels = default_collate(samples)
        return {"inputs": inputs, "labels": labels}

    shows, every = job.shows_progress, job.checkpoint_every
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=job.batch_size,
            per_device_eval_batch_size=job.batch_size,
            num_train_epochs=job.num_epochs,
            gradient_accumulation_steps=job.accumulation,
            max_grad_norm=job.clip_norm or 0.0,
            eval_strategy="epoch" if job.eval_dataset is not None else "no",
            save_strategy="steps" if every else "no",
            save_steps=every or 500,
            logging_strategy="steps" if shows else "no",
            disable_tqdm=not shows,
            report_to="none",
            remove_unused_columns=False,
            lr_scheduler_type="constant",
            prediction_loss_only=True,
        )
        trainer = InOrder(
            Model(),
            arguments,
            data_collator=collate,
            train_dataset=job.dataset,
            eval_dataset=job.eval_dataset,
            optimizers=(job.optimizer, None),
        )
        if job.only_evaluates:
            trainer.evaluate()
        else:
            trainer.train()


def ignite(job: Job) -> None:
    """Train with Ignite's engines."""
    from ignite.engine import (
        Events,
        create_supervised_evaluator,
        create_supervised_trainer,
    )
    from ignite.handlers import ProgressBar
    from ignite.metrics import Loss

    if job.clip_norm is not None or job.checkpoint_every:
        raise NotOfferedError("its ready-made trainer does not do this")
    model = job.model.to(job.device)
    trainer = create_supervised_trainer(
        model, job.optimizer, job.loss_func, device=job.device
    )
    if job.eval_dataset is not None:
        evaluator = create_supervised_evaluator(
            model, {"loss": Loss(job.loss_func)}, device=job.device
        )
        eval_loader = _loader(job, job.eval_dataset)
        if job.only_evaluates:
            evaluator.run(eval_loader)
            return
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda: evaluator.run(eval_loader)
        )
    if job.shows_progress:
        with contextlib.suppress(ImportError):
            ProgressBar().attach(trainer)
    trainer.run(_loader(job), max_epochs=job.num_epochs)


def skorch(job: Job) -> None:
    """Train with skorch's NeuralNet."""
    import skorch as library
    from skorch.helper import predefined_split

    if job.clip_norm is not None or job.checkpoint_every or job.only_evaluates:
        raise NotOfferedError("it does this otherwise, or not at all")
    with_eval = job.eval_dataset is not None

    class Net(library.NeuralNet):
        def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer_ = job.optimizer
            return self

    net = Net(
        job.model,
        criterion=type(job.loss_func),
        max_epochs=job.num_epochs,
        batch_size=job.batch_size,
        iterator_train__shuffle=False,
        train_split=predefined_split(job.eval_dataset) if with_eval else None,
        device=str(job.device),
        verbose=int(job.shows_progress),
    )
    net.fit(job.dataset, y=None)


def fastai(job: Job) -> None:
    """Train with fastai's Learner."""
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    if job.clip_norm is not None or job.checkpoint_every or job.only_evaluates:
        raise NotOfferedError("it does this otherwise, or not at all")
    loaders = [DataLoader(job.dataset, bs=job.batch_size, num_workers=0)]
    if job.eval_dataset is not None:
        loaders.append(DataLoader(job.eval_dataset, bs=job.batch_size, num_workers=0))
    else:
        loaders.append(DataLoader([], bs=job.batch_size, num_workers=0))
    learner = Learner(
        DataLoaders(*loaders, device=job.device),
        job.model,
        loss_func=job.loss_func,
        opt_func=lambda *args, **kwargs: OptimWrapper(opt=job.optimizer),
        train_bn=True,
    )
    quiet = contextlib.nullcontext if job.shows_progress else learner.no_bar
    with quiet():
        learner.fit(job.num_epochs, lr=job.optimizer.param_groups[0]["lr"])


CONTENDERS: dict[str, Callable[[Any], None]] = {
    "by hand": by_hand,
    "pytorch-accelerated": pytorch_accelerated,
    "accelerate": accelerate,
    "lightning": lightning,
    "transformers": transformers,
    "ignite": ignite,
    "skorch": skorch,
    "fastai": fastai,
}


@contextlib.contextmanager
def _answers_apart() -> Iterator[Any]:
    """Keep what libraries print away from the answers."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    if "BENCH_DEBUG" not in os.environ:
        os.dup2(nothing, 2)
    yield answers


def _measure(name: str, workload: str, size: int, device: str, file: Path) -> Any:
    import torch
    from workloads import WORKLOADS

    job = WORKLOADS[workload].create_job(size)
    job.device = torch.device(device)
    start = time.perf_counter()
    CONTENDERS[name](job)
    if device != "cpu":
        torch.accelerator.synchronize()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "steps": job.num_steps,
        "difference": _difference(job, name, file),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _difference(job: Job, name: str, file: Path) -> float:
    """Return how far the parameters are from those of the loop by hand."""
    import torch

    parameters = torch.cat([p.detach().cpu().flatten() for p in job.model.parameters()])
    if name == "by hand":
        torch.save(parameters, file)
        return 0.0
    return float((parameters - torch.load(file)).abs().max())


def main() -> None:
    """Answer the commands that come in on standard input."""
    name, workload, size, device, file = sys.argv[1:]
    warnings.simplefilter("ignore")
    with _answers_apart() as answers:
        import torch

        torch.set_num_threads(1)
        for command in sys.stdin:
            if command.strip() != "run":
                break
            try:
                answer = _measure(name, workload, int(size), device, Path(file))
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
                if not isinstance(error, NotOfferedError):
                    answer["is_failure"] = True
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
