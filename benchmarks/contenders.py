"""Those that are measured, each with the fewest lines that do the job.

Each does it as its own documentation would. It trains, or returns the loss or the
predictions that the job asks for. Imports of the libraries are inside the functions, so
that a process imports only what it measures.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workloads import Job

# The package to import for each, as workload (g) does.
PACKAGES = {
    "by hand": "accelerate",
    "pytorch-accelerated": "pytorch_accelerated",
    "accelerate": "accelerate",
    "fabric": "lightning.fabric",
    "lightning": "lightning",
    "transformers": "transformers.trainer",
    "ignite": "ignite.engine",
    "skorch": "skorch",
    "fastai": "fastai.learner",
    "torchtnt": "torchtnt.framework",
    "composer": "composer",
}


class NotOfferedError(Exception):
    """A contender has nothing of its own for a workload; says why."""


def _loader(job: Job, dataset: Any = None) -> Any:
    from torch.utils.data import DataLoader

    dataset = job.dataset if dataset is None else dataset
    return DataLoader(dataset, job.batch_size, **job.loader_options)


def _refuse_what_is_ours_alone(job: Job) -> None:
    if job.saves_in_background:
        raise NotOfferedError("writes a checkpoint while the loop waits")
    if job.with_accuracy:
        raise NotOfferedError("only this library is compared with the loop by hand")


# ------------------------------------------------------------------------ loops by hand


def by_hand(job: Job) -> Any:
    """Train with the loop that a tutorial would show."""
    import torch
    from torch import nn

    model, optimizer = job.model.to(job.device), job.optimizer
    if job.task != "train":
        return _without_training_by_hand(job, model)

    def calculate_loss(inputs: Any, targets: Any) -> Any:
        return job.loss_func(model(inputs), targets)

    if job.in_bf16:
        calculate_loss = torch.autocast(job.device.type, torch.bfloat16)(calculate_loss)
    loader, metric = _loader(job), _accuracy(job)
    num_updates = 0
    with tempfile.TemporaryDirectory() as folder:
        for epoch in range(job.num_epochs):
            model.train()
            for step, (inputs, targets) in enumerate(loader):
                inputs = inputs.to(job.device, non_blocking=True)
                targets = targets.to(job.device, non_blocking=True)
                loss = calculate_loss(inputs, targets)
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
                loss = _without_training_by_hand(job, model, metric)
                if metric is not None:
                    record = {
                        "epoch": epoch,
                        "loss": loss,
                        "accuracy": metric.compute().item(),
                    }
                    metric.reset()
                    with open(f"{folder}/history.jsonl", "a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
    return None


def _accuracy(job: Job) -> Any:
    if not job.with_accuracy:
        return None
    from torchmetrics.classification import MulticlassAccuracy

    return MulticlassAccuracy(10).to(job.device)


def _without_training_by_hand(job: Job, model: Any, metric: Any = None) -> Any:
    """Return the predictions, or else the mean loss."""
    import torch

    model.eval()
    total = count = 0.0
    predictions = []
    with torch.no_grad():
        for inputs, targets in _loader(job, job.eval_dataset):
            outputs = model(inputs.to(job.device, non_blocking=True))
            if job.task == "predict":
                predictions.append(outputs.cpu())
            else:
                targets = targets.to(job.device, non_blocking=True)
                total += job.loss_func(outputs, targets).item() * len(inputs)
                count += len(inputs)
                if metric is not None:
                    metric.update(outputs, targets)
    return torch.cat(predictions) if job.task == "predict" else total / count


def accelerate(job: Job) -> Any:
    """Train with a loop over Accelerate's objects, as its documentation shows."""
    import torch
    from accelerate import Accelerator

    _refuse_what_is_ours_alone(job)
    accelerator = Accelerator(
        gradient_accumulation_steps=job.accumulation,
        mixed_precision="bf16" if job.in_bf16 else "no",
    )
    model, optimizer, loader = accelerator.prepare(
        job.model, job.optimizer, _loader(job)
    )
    eval_loader = None
    if job.eval_dataset is not None:
        eval_loader = accelerator.prepare(_loader(job, job.eval_dataset))

    def evaluate() -> float:
        model.eval()
        losses = []
        with torch.no_grad():
            for inputs, targets in eval_loader:
                loss = job.loss_func(model(inputs), targets)
                losses.append(accelerator.gather_for_metrics(loss))
        return torch.stack(losses).mean().item()

    def predict() -> Any:
        model.eval()
        predictions = []
        with torch.no_grad():
            for inputs, _ in eval_loader:
                predictions.append(accelerator.gather_for_metrics(model(inputs)).cpu())
        return torch.cat(predictions)

    if job.task != "train":
        result = evaluate() if job.task == "evaluate" else predict()
        accelerator.free_memory()
        return result
    num_updates = 0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(job.num_epochs):
            model.train()
            for inputs, targets in loader:
                with accelerator.accumulate(model):
                    loss = job.loss_func(model(inputs), targets)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and job.clip_norm is not None:
                        accelerator.clip_grad_norm_(model.parameters(), job.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                num_updates += accelerator.sync_gradients
                if job.checkpoint_every and num_updates % job.checkpoint_every == 0:
                    accelerator.save_state(f"{folder}/step_{num_updates}")
            if eval_loader is not None:
                evaluate()
    accelerator.free_memory()
    return None


def fabric(job: Job) -> Any:
    """Train with a loop over the objects of Lightning's Fabric."""
    import torch
    from lightning.fabric import Fabric

    _refuse_what_is_ours_alone(job)
    fabric = Fabric(
        accelerator="cpu" if job.device.type == "cpu" else "auto",
        devices=1,
        precision="bf16-mixed" if job.in_bf16 else None,
    )
    fabric.launch()
    model, optimizer = fabric.setup(job.model, job.optimizer)
    eval_loader = None
    if job.eval_dataset is not None:
        eval_loader = fabric.setup_dataloaders(_loader(job, job.eval_dataset))

    def evaluate() -> float:
        model.eval()
        losses = []
        with torch.no_grad():
            for inputs, targets in eval_loader:
                losses.append(job.loss_func(model(inputs), targets))
        return torch.stack(losses).mean().item()

    def predict() -> Any:
        model.eval()
        with torch.no_grad():
            return torch.cat([model(inputs).cpu() for inputs, _ in eval_loader])

    if job.task != "train":
        return evaluate() if job.task == "evaluate" else predict()
    loader = fabric.setup_dataloaders(_loader(job))
    num_updates = 0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(job.num_epochs):
            model.train()
            for step, (inputs, targets) in enumerate(loader):
                accumulates = (step + 1) % job.accumulation != 0
                with fabric.no_backward_sync(model, enabled=accumulates):
                    loss = job.loss_func(model(inputs), targets)
                    fabric.backward(loss / job.accumulation)
                if accumulates:
                    continue
                if job.clip_norm is not None:
                    fabric.clip_gradients(model, optimizer, max_norm=job.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                num_updates += 1
                if job.checkpoint_every and num_updates % job.checkpoint_every == 0:
                    state = {"model": model, "optimizer": optimizer}
                    fabric.save(f"{folder}/step_{num_updates}.ckpt", state)
            if eval_loader is not None:
                evaluate()
    return None


# ------------------------------------------------------------------------- the trainers


def pytorch_accelerated(job: Job) -> Any:
    """Train with this library."""
    from pytorch_accelerated import Trainer
    from pytorch_accelerated.callbacks import (
        RecordHistoryCallback,
        SaveTrainingStateCallback,
    )
    from pytorch_accelerated.trainer import DEFAULT_CALLBACKS

    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[Any] = list(DEFAULT_CALLBACKS) if job.shows_progress else []
        if job.checkpoint_every:
            callbacks.append(
                SaveTrainingStateCallback(
                    folder,
                    save_every_n_steps=job.checkpoint_every,
                    save_at_end=False,
                    asynchronous=job.saves_in_background,
                )
            )
        options: dict[str, Any] = {}
        if job.with_accuracy:
            callbacks.append(RecordHistoryCallback(f"{folder}/history.jsonl"))
            options["metrics"] = {"accuracy": _accuracy(job)}
        trainer = Trainer(
            job.model,
            job.loss_func,
            job.optimizer,
            callbacks,
            accelerator_kwargs={"mixed_precision": "bf16"} if job.in_bf16 else None,
            **options,
        )
        if job.task == "evaluate":
            return trainer.evaluate(job.eval_dataset, job.batch_size)["evaluation_loss"]
        if job.task == "predict":
            return trainer.predict(job.eval_dataset, job.batch_size)
        # Kept from epoch to epoch, as by the loop by hand.
        workers = (
            {"num_workers": job.num_workers, "persistent_workers": True}
            if job.num_workers
            else {}
        )
        trainer.train(
            job.dataset,
            job.num_epochs,
            eval_dataset=job.eval_dataset,
            per_device_batch_size=job.batch_size,
            gradient_accumulation_steps=job.accumulation,
            gradient_clip_norm=job.clip_norm,
            train_dataloader_kwargs={"shuffle": False, **workers},
        )
        return None


def lightning(job: Job) -> Any:
    """Train with Lightning's Trainer."""
    import torch
    from lightning import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

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

        def predict_step(self, batch: Any, _: int) -> Any:
            inputs, _targets = batch
            return self.model(inputs).cpu()

        def configure_optimizers(self) -> Any:
            return job.optimizer

    shows, every = job.shows_progress, job.checkpoint_every
    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[Any] = []
        if every:
            callbacks.append(
                ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1)
            )
        trainer = Trainer(
            accelerator="cpu" if job.device.type == "cpu" else "auto",
            max_epochs=job.num_epochs,
            devices=1,
            precision="bf16-mixed" if job.in_bf16 else None,
            accumulate_grad_batches=job.accumulation,
            gradient_clip_val=job.clip_norm,
            callbacks=callbacks,
            plugins=[AsyncCheckpointIO()] if job.saves_in_background else None,
            default_root_dir=folder,
            logger=shows,
            enable_progress_bar=shows,
            enable_model_summary=shows,
            enable_checkpointing=shows or bool(callbacks),
            num_sanity_val_steps=0,
        )
        eval_loader = job.eval_dataset and _loader(job, job.eval_dataset)
        if job.task == "evaluate":
            (metrics,) = trainer.validate(Module(), eval_loader, verbose=False)
            return metrics["eval_loss"]
        if job.task == "predict":
            return torch.cat(trainer.predict(Module(), eval_loader))
        trainer.fit(Module(), _loader(job), eval_loader)
        return None


def transformers(job: Job) -> Any:
    """Train with the Trainer of transformers."""
    import torch
    from torch.utils.data import SequentialSampler, default_collate
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def forward(self, inputs: Any, labels: Any) -> Any:
            logits = self.model(inputs)
            return {"loss": job.loss_func(logits, labels), "logits": logits}

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(job.dataset)

    def collate(samples: list[Any]) -> dict[str, Any]:
        inputs, labels = default_collate(samples)
        return {"inputs": inputs, "labels": labels}

    _refuse_what_is_ours_alone(job)
    shows, every = job.shows_progress, job.checkpoint_every
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=job.device.type == "cpu",
            bf16=job.in_bf16,
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
            prediction_loss_only=job.task != "predict",
            dataloader_num_workers=job.num_workers,
            dataloader_persistent_workers=job.num_workers > 0,
        )
        trainer = InOrder(
            Model(),
            arguments,
            data_collator=collate,
            train_dataset=job.dataset,
            eval_dataset=job.eval_dataset,
            optimizers=(job.optimizer, None),
        )
        if job.task == "evaluate":
            return trainer.evaluate()["eval_loss"]
        if job.task == "predict":
            predictions = trainer.predict(job.eval_dataset).predictions
            return torch.from_numpy(predictions)
        trainer.train()
        return None


def ignite(job: Job) -> Any:
    """Train with Ignite's engines."""
    import torch
    from ignite.engine import (
        Engine,
        Events,
        create_supervised_evaluator,
        create_supervised_trainer,
    )
    from ignite.handlers import Checkpoint, EpochOutputStore, ProgressBar
    from ignite.metrics import Loss

    _refuse_what_is_ours_alone(job)
    model, optimizer = job.model.to(job.device), job.optimizer
    if job.eval_dataset is not None:
        metrics = {} if job.task == "predict" else {"loss": Loss(job.loss_func)}
        evaluator = create_supervised_evaluator(model, metrics, device=job.device)
        eval_loader = _loader(job, job.eval_dataset)
        if job.task == "evaluate":
            return evaluator.run(eval_loader).metrics["loss"]
        if job.task == "predict":
            store = EpochOutputStore(lambda output: output[0].cpu())
            store.attach(evaluator, "predictions")
            return torch.cat(evaluator.run(eval_loader).predictions)

    def update(engine: Any, batch: Any) -> float:
        # The ready-made trainer can neither clip nor train in bf16.
        model.train()
        inputs, targets = (part.to(job.device, non_blocking=True) for part in batch)
        with torch.autocast(job.device.type, torch.bfloat16, enabled=job.in_bf16):
            loss = job.loss_func(model(inputs), targets) / job.accumulation
        loss.backward()
        if engine.state.iteration % job.accumulation == 0:
            if job.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    if job.clip_norm is not None or job.in_bf16:
        trainer = Engine(update)
    else:
        trainer = create_supervised_trainer(
            model,
            optimizer,
            job.loss_func,
            device=job.device,
            gradient_accumulation_steps=job.accumulation,
        )
    if job.eval_dataset is not None:
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda: evaluator.run(eval_loader)
        )
    if job.shows_progress:
        ProgressBar().attach(trainer)
    with tempfile.TemporaryDirectory() as folder:
        if job.checkpoint_every:
            trainer.add_event_handler(
                Events.ITERATION_COMPLETED(every=job.checkpoint_every),
                Checkpoint(
                    {"model": model, "optimizer": optimizer}, folder, n_saved=None
                ),
            )
        trainer.run(_loader(job), max_epochs=job.num_epochs)
    return None


def skorch(job: Job) -> Any:
    """Train with skorch's NeuralNet."""
    from skorch import NeuralNet
    from skorch.callbacks import Callback, GradientNormClipping
    from skorch.helper import predefined_split
    from skorch.hf import AccelerateMixin
    from skorch.scoring import loss_scoring

    _refuse_what_is_ours_alone(job)

    class Net(NeuralNet):
        def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer_ = job.optimizer
            return self

    class AccumulatingNet(Net):
        # As in skorch's FAQ, with the event that lets a callback clip.
        def get_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().get_loss(*args, **kwargs) / job.accumulation

        def train_step(self, batch: Any, **fit_params: Any) -> Any:
            step = self.train_step_single(batch, **fit_params)
            if len(self.history[-1, "batches"]) % job.accumulation == 0:
                self.notify(
                    "on_grad_computed",
                    named_parameters=self.get_all_learnable_params(),
                    batch=batch,
                )
                self.optimizer_.step()
                self.optimizer_.zero_grad()
            return step

    class AcceleratedNet(AccelerateMixin, Net):
        pass

    class SaveEveryFewUpdates(Callback):
        # Its own callback for checkpoints works once an epoch.
        def on_batch_end(self, net: Any, training: bool, **kwargs: Any) -> None:
            num_updates = len(net.history[-1, "batches"])
            if training and num_updates % job.checkpoint_every == 0:
                net.save_params(
                    f_params=f"{folder}/model_{num_updates}.pt",
                    f_optimizer=f"{folder}/optimizer_{num_updates}.pt",
                )

    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[Any] = []
        if job.clip_norm is not None:
            callbacks.append(GradientNormClipping(gradient_clip_value=job.clip_norm))
        if job.checkpoint_every:
            callbacks.append(SaveEveryFewUpdates())
        kind, options = Net, {"device": str(job.device)}
        if job.accumulation > 1:
            kind = AccumulatingNet
        elif job.in_bf16:
            from accelerate import Accelerator

            kind = AcceleratedNet
            options = {"accelerator": Accelerator(mixed_precision="bf16")}
        with_eval = job.eval_dataset is not None and job.task == "train"
        net = kind(
            job.model,
            criterion=job.loss_func,
            max_epochs=job.num_epochs,
            batch_size=job.batch_size,
            iterator_train__shuffle=False,
            **{f"iterator_train__{k}": v for k, v in job.loader_options.items()},
            train_split=predefined_split(job.eval_dataset) if with_eval else None,
            callbacks=callbacks,
            verbose=int(job.shows_progress),
            **options,
        )
        if job.task == "train":
            net.fit(job.dataset, y=None)
            return None
        net.initialize()
        if job.task == "evaluate":
            return float(loss_scoring(net, job.eval_dataset))
        return net.forward(job.eval_dataset)


def fastai(job: Job) -> Any:
    """Train with fastai's Learner."""
    from fastai.callback.core import Callback
    from fastai.callback.fp16 import MixedPrecision
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    _refuse_what_is_ours_alone(job)

    class SaveEveryFewUpdates(Callback):
        # Its own callback for checkpoints works once an epoch.
        def after_step(self) -> None:
            num_updates = self.learn.train_iter + 1
            if num_updates % job.checkpoint_every == 0:
                self.learn.save(f"step_{num_updates}", with_opt=True)

    def create_loader(dataset: Any) -> Any:
        options = {
            "num_workers": job.num_workers,
            "pin_memory": job.device.type == "cuda",
        }
        return DataLoader(dataset, bs=job.batch_size, **options)

    callbacks: list[Any] = []
    if job.accumulation > 1:
        callbacks.append(GradientAccumulation(job.accumulation * job.batch_size))
    if job.clip_norm is not None:
        callbacks.append(GradientClip(job.clip_norm))
    if job.checkpoint_every:
        callbacks.append(SaveEveryFewUpdates())
    if job.in_bf16:
        callbacks.append(MixedPrecision(amp_mode="bf16"))
    eval_dataset = [] if job.eval_dataset is None else job.eval_dataset
    with tempfile.TemporaryDirectory() as folder:
        learner = Learner(
            DataLoaders(
                create_loader(job.dataset),
                create_loader(eval_dataset),
                device=job.device,
            ),
            job.model,
            loss_func=job.loss_func,
            opt_func=lambda *args, **kwargs: OptimWrapper(opt=job.optimizer),
            cbs=callbacks,
            path=folder,
            train_bn=True,
        )
        quiet = contextlib.nullcontext if job.shows_progress else learner.no_bar
        with quiet():
            if job.task == "evaluate":
                return learner.validate()[0]
            if job.task == "predict":
                return learner.get_preds()[0]
            learner.fit(job.num_epochs, lr=job.optimizer.param_groups[0]["lr"])
            return None


def torchtnt(job: Job) -> Any:
    """Train with TorchTNT's AutoUnit."""
    import torch
    from torchtnt.framework import AutoUnit, PredictUnit, evaluate, fit, predict, train
    from torchtnt.framework.callbacks import DistributedCheckpointSaver, TQDMProgressBar

    class Unit(AutoUnit[Any]):
        total, count = 0.0, 0

        def compute_loss(self, state: Any, data: Any) -> Any:
            inputs, targets = data
            outputs = self.module(inputs)
            return job.loss_func(outputs, targets), outputs

        def configure_optimizers_and_lr_scheduler(self, module: Any) -> Any:
            return job.optimizer, None

        def on_eval_step_end(
            self, state: Any, data: Any, step: int, loss: Any, outputs: Any
        ) -> None:
            self.total += loss * len(outputs)
            self.count += len(outputs)

    class Predictor(PredictUnit[Any]):
        def __init__(self) -> None:
            super().__init__()
            self.module = job.model.to(job.device)
            self.predictions: list[Any] = []

        def predict_step(self, state: Any, data: Any) -> None:
            inputs, _ = data
            self.predictions.append(self.module(inputs.to(job.device)).cpu())

    eval_loader = None
    if job.eval_dataset is not None:
        eval_loader = _loader(job, job.eval_dataset)
    if job.task == "predict":
        predictor = Predictor()
        predict(predictor, eval_loader)
        return torch.cat(predictor.predictions)
    unit = Unit(
        module=job.model,
        device=job.device,
        precision="bf16" if job.in_bf16 else None,
        gradient_accumulation_steps=job.accumulation,
        clip_grad_norm=job.clip_norm,
    )
    if job.task == "evaluate":
        evaluate(unit, eval_loader)
        return float(unit.total / unit.count)
    callbacks: list[Any] = [TQDMProgressBar()] if job.shows_progress else []
    with tempfile.TemporaryDirectory() as folder:
        if job.checkpoint_every:
            callbacks.append(
                DistributedCheckpointSaver(
                    folder,
                    save_every_n_train_steps=job.checkpoint_every,
                    async_checkpoint=job.saves_in_background,
                )
            )
        options = {"max_epochs": job.num_epochs, "callbacks": callbacks}
        if eval_loader is None:
            train(unit, _loader(job), **options)
        else:
            fit(unit, _loader(job), eval_loader, **options)
    return None


def composer(job: Job) -> Any:
    """Say why there is nothing here."""
    raise NotOfferedError("no release of it works with this torch, to try it with")


CONTENDERS: dict[str, Callable[[Any], Any]] = {
    "by hand": by_hand,
    "pytorch-accelerated": pytorch_accelerated,
    "accelerate": accelerate,
    "fabric": fabric,
    "lightning": lightning,
    "transformers": transformers,
    "ignite": ignite,
    "skorch": skorch,
    "fastai": fastai,
    "torchtnt": torchtnt,
    "composer": composer,
}
