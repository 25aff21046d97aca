"""The trainer: a training loop that can be read, and changed one method at a time.

A run of :meth:`Trainer.train`, from top to bottom. Names with brackets are methods of
the trainer, made to be overridden. ``on_...`` are events, which callbacks listen to; an
event comes after the method of the same name::

    create the loaders, prepare with Accelerate, run config, scheduler, (resume)
    training_run_start(), on_training_run_start
    for each epoch
        train_epoch_start(), on_train_epoch_start
        for each batch
            on_train_step_start
            calculate_train_batch_loss(batch)
            backward_step(loss)
            where a window of gradient_accumulation_steps batches ends
                optimizer_step()            after clipping
                scheduler_step()            if the update was applied
                optimizer_zero_grad()
                on_train_update_end         if the update was applied
            on_train_step_end               after the weights have moved
        train_epoch_end(), record the losses, on_train_epoch_end
        if there is an evaluation dataset
            eval_epoch_start(), on_eval_epoch_start
            for each batch
                on_eval_step_start, calculate_eval_batch_loss(batch), on_eval_step_end
            eval_epoch_end(), record the losses, on_eval_epoch_end
        training_run_epoch_end(), on_training_run_epoch_end
    training_run_end(), on_training_run_end
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from pytorch_accelerated import (
    checkpoint,
    checks,
    distributed,
    engines,
    events,
    finders,
    modes,
    predictions,
    saving,
    step_output,
)
from pytorch_accelerated.advice import advice_for, evidence_for
from pytorch_accelerated.arguments import names_what_was_meant
from pytorch_accelerated.callbacks import (
    CallbackHandler,
    LimitBatchesCallback,
    LogMetricsCallback,
    MoveModulesToDeviceCallback,
    PrintProgressCallback,
    ProgressBarCallback,
    TerminateOnNaNCallback,
    TrainerCallback,
)
from pytorch_accelerated.callbacks.progress import above_bars
from pytorch_accelerated.callbacks.tracker import follow_log_with
from pytorch_accelerated.data import loaders
from pytorch_accelerated.data.workers import AUTO_NUM_WORKERS, choose_num_workers
from pytorch_accelerated.engines import launch
from pytorch_accelerated.loop_shown import loop_of
from pytorch_accelerated.means import LossTracker, Means
from pytorch_accelerated.memory import BatchShrinker
from pytorch_accelerated.metrics import (
    check_metrics,
    default_metric_inputs,
    start_metrics,
)
from pytorch_accelerated.pace import Pace
from pytorch_accelerated.placeholders import (
    TrainerPlaceholderValues,
    replace_trainer_placeholder_values,
)
from pytorch_accelerated.run import (
    Aside,
    Run,
    UnderWay,
    create_accumulation,
    create_run_config,
    of_run,
)
from pytorch_accelerated.run_config import TrainerRunConfig
from pytorch_accelerated.schedulers.scheduler_base import start_schedule
from pytorch_accelerated.state import Stage
from pytorch_accelerated.step_output import NumItems
from pytorch_accelerated.tracking import (
    EVALUATION_PREFIX,
    INTERMEDIATE_PREFIX,
    InMemoryRunHistory,
    RunHistory,
)
from pytorch_accelerated.window import parameters_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pytorch_accelerated.summary import ModelSummary

__all__ = [
    "DEFAULT_CALLBACKS",
    "Trainer",
    "TrainerPlaceholderValues",
    "TrainerWithTimmScheduler",
    "replace_trainer_placeholder_values",
]

_AS_USUAL = nullcontext()

_EVENTS_OF_A_STEP = (
    "on_train_step_start",
    "on_train_update_end",
    "on_train_step_end",
)

DEFAULT_CALLBACKS: tuple[type[TrainerCallback], ...] = (
    MoveModulesToDeviceCallback,
    TerminateOnNaNCallback,
    PrintProgressCallback,
    ProgressBarCallback,
    LogMetricsCallback,
)


class Trainer:
    """Trains and evaluates a PyTorch model, on whatever Accelerate was launched on.

    ::

        trainer = Trainer(model, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer)
        trainer.train(train_dataset, num_epochs=3, eval_dataset=eval_dataset)
        trainer.evaluate(test_dataset)

    The module's documentation shows a run from top to bottom. To change what happens,
    override the method that does it, or add a callback.

    Args:
        model: The model to train.
        loss_func: Called as ``loss_func(model_outputs, targets)``; returns the mean
            loss over the samples of a batch. May be None for models that return their
            loss, and for subclasses that calculate it themselves.
        optimizer: The optimizer of the model's parameters. May be None if the trainer
            only evaluates.
        callbacks: Callbacks, as objects or as classes that need no arguments, called in
            this order. None for no callbacks.
        run_history: Where metrics are recorded. By default a new
            :class:`~pytorch_accelerated.tracking.InMemoryRunHistory`.
        seed: Makes runs repeatable: the order of the data is then a function of the
            seed, and the global random generators are seeded when a run starts, with
            another number on each process. By default nothing is seeded; a run then
            draws one number from torch's global generator for the order of the data.
        accelerator_kwargs: Arguments for :class:`accelerate.Accelerator`, such as
            ``{"mixed_precision": "bf16"}``.
        metrics: What to record of each evaluation besides its means, such as
            ``{"accuracy": MulticlassAccuracy(10)}``: metrics and collections of
            torchmetrics, and functions, called as ``function(predictions, targets)``
            with those of all samples. They are recorded as ``eval_accuracy_epoch``, and
            ``evaluation_accuracy`` by :meth:`evaluate`.
        train_metrics: Likewise for training, as ``train_accuracy_epoch``; True for the
            same metrics.
    """

    # Names that belong to the run under way, or to the last one.
    run_config: TrainerRunConfig = of_run("config")
    eval_dataset: Any = of_run("eval_dataset")
    collate_fn: Callable[[list[Any]], Any] | None = of_run("collate_fn")
    interrupted: bool = of_run("interrupted")
    _train_dataloader: Any = of_run("train_dataloader")
    _eval_dataloader: Any = of_run("eval_dataloader")
    _train_dl_kwargs: dict[str, Any] | None = of_run("train_dl_kwargs")
    _eval_dl_kwargs: dict[str, Any] | None = of_run("eval_dl_kwargs")
    _loss_tracker: LossTracker = of_run("means.loss")

    # Those of the training run: an evaluation leaves them as they are.
    train_dataset: Any = of_run("training.train_dataset")
    create_scheduler_fn: Callable[..., Any] | None = of_run(
        "training.create_scheduler_fn"
    )
    scheduler: Any = of_run("training.scheduler")
    num_updates: int | None = of_run("training.num_updates")
    num_steps: int | None = of_run("training.num_steps")
    num_samples_seen: int | None = of_run("training.num_samples_seen")
    gradient_norm: Tensor | None = of_run("training.gradient_norm")
    has_failed: bool = of_run("training.has_failed")
    is_resumed: bool = of_run("training.is_resumed")

    @names_what_was_meant
    def __init__(
        self,
        model: nn.Module,
        loss_func: Callable[[Any, Any], Tensor] | None,
        optimizer: torch.optim.Optimizer | None,
        callbacks: Iterable[TrainerCallback | type[TrainerCallback]]
        | None = DEFAULT_CALLBACKS,
        run_history: RunHistory | None = None,
        *,
        seed: int | None = None,
        accelerator_kwargs: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | Any = None,
        train_metrics: Mapping[str, Any] | Any = None,
    ) -> None:
        self._run = Run()
        self.model: nn.Module = model
        self.loss_func = loss_func
        self.optimizer = optimizer
        self.seed: int | None = (
            None if seed is None else checks.whole_number("seed", seed)
        )
        self._accelerator_kwargs = dict(accelerator_kwargs or {})
        self._metrics, self._train_metrics = check_metrics(metrics, train_metrics)
        self._callbacks = callbacks
        self.callback_handler: CallbackHandler = self._create_callback_handler()
        self.run_history: RunHistory = (
            InMemoryRunHistory() if run_history is None else run_history
        )
        self._accelerator: Accelerator = self._create_accelerator()
        self._engine = engines.create_engine(self._accelerator)
        self._mixed_precision = self._accelerator.mixed_precision
        self.eval_batch_limit: int | None = None
        self._pad_uneven_eval_batches = False  # as scripts for 0.1.61 know it
        # How the runs of this trainer go on from each other.
        self._num_runs = 0
        self._run_id: str | None = None
        # What is saved in the background, and what was saved last.
        self._writer = checkpoint.BackgroundWriter()
        self._being_saved: str | None = None
        self.last_checkpoint: str | None = None

        events.tell(self, "on_init_end")

    def _create_callback_handler(self) -> CallbackHandler:
        handler = CallbackHandler(self._callbacks)
        limit = loaders.batch_limit_from_environment()
        if limit is not None:
            handler.callbacks.insert(0, LimitBatchesCallback(limit))
        return handler

    def _create_accelerator(self) -> Accelerator:
        """Create the accelerator; override to configure it in code."""
        kwargs = follow_log_with(self.callback_handler, self._accelerator_kwargs)
        return launch.create_accelerator(**kwargs)

    # --------------------------------------------------------------------- the runs

    @names_what_was_meant
    def train(
        self,
        train_dataset: Any,
        num_epochs: int | None = None,
        eval_dataset: Any = None,
        per_device_batch_size: int = 8,
        max_num_train_steps: int | None = None,
        gradient_accumulation_steps: int = 1,
        gradient_clip_value: float | None = None,
        create_scheduler_fn: Callable[..., Any] | None = None,
        train_dataloader_kwargs: Mapping[str, Any] | None = None,
        eval_dataloader_kwargs: Mapping[str, Any] | None = None,
        reset_run_history: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        *,
        gradient_clip_norm: float | None = None,
        eval_per_device_batch_size: int | None = None,
        plateau_metric: str = "eval_loss_epoch",
        halve_batch_if_out_of_memory: bool = False,
    ) -> RunHistory:
        """Train the model, and evaluate it after each epoch.

        It may be called again: the next run goes on with the same weights and optimizer
        state, with limits of its own.

        Args:
            train_dataset: A map-style or iterable dataset; or a ready ``DataLoader`` or
                another iterable of batches, which is used as it is.
            num_epochs: Epochs of this run. Where ``max_num_train_steps`` is given, it
                may be left out: there are as many epochs then as it takes.
            eval_dataset: Evaluated after each epoch; none by default.
            per_device_batch_size: Samples in a batch of one process. A ``batch_size``
                in the loader arguments wins over it.
            max_num_train_steps: Updates after which the run ends, in the middle of an
                epoch if need be. With both, the smaller limit holds.
            gradient_accumulation_steps: Batches of one process that make up an update.
            gradient_clip_value: Clamp each element of the gradients to ±this value.
            create_scheduler_fn: Makes a learning rate scheduler from the optimizer, for
                example ``partial(OneCycleLR, max_lr=0.1, epochs=..., ...)``; arguments
                may be :class:`TrainerPlaceholderValues`. It is stepped once per update,
                and ``ReduceLROnPlateau`` once per epoch.
            train_dataloader_kwargs: Arguments of the training ``DataLoader``.
            eval_dataloader_kwargs: Arguments of the evaluation ``DataLoader``.
            reset_run_history: Forget the metrics of earlier runs and count epochs from
                1.
            collate_fn: Makes a batch of a list of samples.
            resume_from: A training state to go on from: the epochs that were left of
                its run are trained. "auto" takes the newest whole one that a
                ``SaveTrainingStateCallback`` of this trainer has saved, if any.
            gradient_clip_norm: Scale the gradients down to this total norm.
            eval_per_device_batch_size: Samples in an evaluation batch of one process;
                by default as in training.
            plateau_metric: The metric that ``ReduceLROnPlateau`` watches.
            halve_batch_if_out_of_memory: When memory runs out in a forward or backward
                pass, go on with batches of half the size, and with as many more of them
                in an update. Copies buffers and random states before each update and,
                on several processes, averages gradients after the backward pass.

        Returns:
            The run history.

        Raises:
            ValueError: If the arguments cannot make a run; nothing has changed then.
            NonFiniteLossError: If the loss became NaN or infinite.
        """
        run = Run(
            is_training=True,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            collate_fn=collate_fn,
            create_scheduler_fn=create_scheduler_fn,
            num_epochs=num_epochs,
            max_num_train_steps=max_num_train_steps,
            batch_size=per_device_batch_size,
            eval_batch_size=eval_per_device_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            gradient_clip_value=gradient_clip_value,
            gradient_clip_norm=gradient_clip_norm,
            train_dataloader_kwargs=train_dataloader_kwargs,
            eval_dataloader_kwargs=eval_dataloader_kwargs,
            plateau_metric=plateau_metric,
            resume_from=resume_from,
        )
        checks.check_can_train(self, run)
        saving.find_state(self, run)
        with UnderWay(self, run):
            self._prepare(run)
            if halve_batch_if_out_of_memory:
                run.shrinker = BatchShrinker(run, self.model, self._engine)
            if reset_run_history and run.state_to_resume is None:
                self.run_history.reset()
            self.callback_handler.call_event("_forget_earlier_runs", self)
            if create_scheduler_fn is not None:
                self.scheduler = self.create_scheduler()
            self._num_runs += 1  # what was refused up to here is no run
            if run.state_to_resume is not None:
                saving.resume(self)
            start_schedule(self.scheduler)
            self._run_training()
        return self.run_history

    @names_what_was_meant
    def evaluate(
        self,
        dataset: Any = None,
        per_device_batch_size: int | None = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> dict[str, Any]:
        """Evaluate the model; every sample counts once, on any number of processes.

        All metrics that are recorded meanwhile are added to the run history under names
        that start with ``evaluation_``. This is no epoch: meanwhile
        ``run_history.current_epoch`` is 1, and afterwards what it was before. Amid a
        training run, called from a callback or a hook, it leaves that as it was.

        Args:
            dataset: A dataset or a ready ``DataLoader``.
            per_device_batch_size: Samples in a batch of one process; by default as in
                the evaluations of the last run, or 8 before any.
            dataloader_kwargs: Arguments of the ``DataLoader``.
            collate_fn: Makes a batch of a list of samples.

        Returns:
            The metrics that were recorded, such as ``{"evaluation_loss": 0.35}``.

        Raises:
            ValueError: If there is nothing to evaluate on.
        """
        run = Run(
            eval_dataset=dataset,
            batch_size=per_device_batch_size or self._run.size_of_eval_batches,
            eval_dataloader_kwargs=dataloader_kwargs,
            collate_fn=collate_fn,
        )
        evaluation = self.run_history._evaluation()
        with evaluation, UnderWay(self, run):
            self._prepare(run)
            self._run_evaluation()
        return evaluation.recorded

    @names_what_was_meant
    def predict(
        self,
        dataset: Any,
        per_device_batch_size: int | None = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> Any:
        """Return what the model makes of each sample, in the order of the dataset.

        It needs no targets and no loss function, calls no events and records nothing.

        Args:
            dataset: A dataset or a ready ``DataLoader``.
            per_device_batch_size: Samples in a batch of one process; by default as in
                the evaluations of the last run, or 8 before any.
            dataloader_kwargs: Arguments of the ``DataLoader``.
            collate_fn: Makes a batch of a list of samples.

        Returns:
            What :meth:`calculate_predictions` returned for all batches, concatenated
            along the first dimension; on the CPU, and the same on all processes.

        Raises:
            ValueError: If there is nothing to predict.
        """
        batches = self.iterate_predictions(
            dataset, per_device_batch_size, dataloader_kwargs, collate_fn
        )
        return predictions.concatenate(batches)

    @names_what_was_meant
    def iterate_predictions(
        self,
        dataset: Any,
        per_device_batch_size: int | None = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> Generator[Any, None, None]:
        """Yield what :meth:`predict` returns, one batch of all processes at a time.

        For more than fits into memory. All processes must go through it alike, and to
        its end, or leave it at the same place; the model is in evaluation mode
        meanwhile. ``train()`` has to wait until it is left::

            for outputs in trainer.iterate_predictions(dataset):
                ...

        Args:
            dataset: A dataset or a ready ``DataLoader``.
            per_device_batch_size: Samples in a batch of one process; by default as in
                the evaluations of the last run, or 8 before any.
            dataloader_kwargs: Arguments of the ``DataLoader``.
            collate_fn: Makes a batch of a list of samples.

        Returns:
            A generator of what :meth:`calculate_predictions` returned, in the order of
            the dataset; on the CPU, and the same on all processes.

        Raises:
            ValueError: If there is nothing to predict.
        """
        run = Run(
            is_iterated=True,
            eval_dataset=dataset,
            batch_size=per_device_batch_size or self._run.size_of_eval_batches,
            eval_dataloader_kwargs=dataloader_kwargs,
            collate_fn=collate_fn,
        )
        return predictions.iterate(self, run)

    def _run_training(self) -> None:
        """Run the epochs that are due, between the events of the run."""
        run = self._run
        with events.Ending(self, "training_run_end"):
            events.call(self, self.training_run_start)
            events.announce(self, "on_training_run_start")
            checks.warn_of_oversights(self)
            for _ in run.epochs_due():
                # Of an epoch that was begun, the evaluation may be left.
                was_last = run.is_used_up and run.progress.is_at_epoch_start
                if was_last or self._run_epoch():
                    self.print(
                        f"Stopping after {run.progress.num_updates} updates, "
                        "as max_num_train_steps asks"
                    )
                    break
        self.finish_saving()

    def _run_evaluation(self) -> None:
        """Evaluate once, between the events of the run."""
        with events.Ending(self, "evaluation_run_end"):
            events.call(self, self.evaluation_run_start)
            events.announce(self, "on_evaluation_run_start")
            self._run_eval_epoch(self._eval_dataloader, is_training=False)

    # ------------------------------------------------------------------- the epochs

    def _run_epoch(self) -> bool:
        """Train and evaluate for an epoch; say whether it must be the last."""
        run = self._run
        is_over = run.is_used_up
        run.resume_outside_steps()
        if run.progress.stage is Stage.TRAINING:
            run.pace = Pace(run.progress.num_samples_seen)
            # Here too, for an override that has a loop of its own.
            run.set_epoch_of(self._train_dataloader, self.run_history.current_epoch)
            num_updates = run.progress.num_updates
            is_over = self._run_train_epoch(self._train_dataloader) or is_over
            run.progress.finish(Stage.TRAINING)  # likewise
            if run.progress.num_updates == num_updates and not is_over:
                checks.check_updates_are_counted(self)
        progress = run.progress  # another one, if batches were made smaller
        if progress.stage is not Stage.ENDED:
            if progress.stage is Stage.EVALUATION and self.eval_dataset is not None:
                self._run_eval_epoch(self._eval_dataloader)
            progress.finish(Stage.EVALUATION)
            self._step_scheduler_after_epoch()
            progress.finish(Stage.EVALUATED)
            events.call(self, self.training_run_epoch_end)
            events.announce(self, "on_training_run_epoch_end")
        progress.start_next_epoch()
        self.run_history._increment_epoch()
        return is_over

    def _step_scheduler_after_epoch(self) -> None:
        """Step a scheduler that goes by a metric of the epoch."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            name = self._run.plateau_metric
            # After an evaluate() amid the epoch, get_latest_metric returns its value.
            value = saving.latest_metrics(self).get(name)
            if value is None:  # an error says which there are
                value = self.run_history.get_latest_metric(name)
            self.scheduler.step(value)

    def _run_train_epoch(self, train_dl: Any) -> bool:
        """Train on the batches of an epoch.

        Args:
            train_dl: The training loader.

        Returns:
            Whether the updates that the run may make are used up.
        """
        run = self._run
        if run.progress.stage is not Stage.TRAINING:
            run.progress.start_next_epoch()  # a run of the user's own does not say so
        run.pace = Pace(run.progress.num_samples_seen)
        events.call(self, self.train_epoch_start)
        if not run.progress.is_amid_epoch:
            run.means = Means(start_metrics(self._train_metrics, self.device))
        events.announce(self, "on_train_epoch_start")
        if run.pending is not None:
            saving.restore_gradients(self, run.pending.gradients)
        run.agrees_after_updates = self._accelerator.num_processes > 1 and self.agree(
            self.callback_handler.may_stop_alone(_EVENTS_OF_A_STEP)
        )
        if run.is_used_up:
            is_over = True  # it was saved right after the last one
        elif run.shrinker is not None:
            is_over = run.shrinker.repeat(self, train_dl)
        else:
            is_over = self._run_windows(train_dl)
        events.call(self, self.train_epoch_end)
        self._add_epoch_loss_to_run_history("train_loss_epoch")
        run.pace.pause()  # now that the device has been waited for
        run.progress.finish(Stage.TRAINING)
        events.announce(self, "on_train_epoch_end")
        return is_over

    def _run_windows(self, train_dl: Any) -> bool:
        """Train on the batches that are due; say whether the updates are used up."""
        run = self._run
        for window in run.windows(train_dl, self.run_history.current_epoch):
            for step, batch in window:
                self._run_train_step(batch, step)
            if run.agrees_after_updates:
                events.agree_to_go_on(self)
            if run.is_used_up:
                return True
        return False

    def _run_train_step(self, batch: Any, step: int) -> None:
        # A method of its own, so that nothing of a step outlives it.
        run, engine = self._run, self._engine
        is_complete = run.window.is_complete  # type: ignore[union-attr]
        events.tell(self, "on_train_step_start")
        if run.shrinker is not None:
            passes = partial(self._perform_forward_and_backward_passes, batch, step)
            batch_output = run.shrinker.attempt(passes, step)
        else:
            with _AS_USUAL if is_complete else engine.without_gradient_sync(self.model):
                batch_output = self._perform_forward_and_backward_passes(batch, step)
        # An override for 0.1.61 returns nothing: it has called either this class, whose
        # output is here, or the event itself.
        batch_output, run.batch_output = batch_output or run.batch_output, None
        run.count_step(step, batch, batch_output)
        if is_complete:
            self._update_weights(step)
        if batch_output is not None:
            events.tell(
                self,
                "on_train_step_end",
                batch=batch,
                batch_output=batch_output,
                step=step,
            )

    def _perform_forward_and_backward_passes(
        self, batch: Any, step: int
    ) -> dict[str, Any] | None:
        """Calculate and back-propagate the loss of a batch.

        Args:
            batch: What the loader yielded.
            step: Number of the batch in the epoch, from 0.

        Returns:
            What :meth:`calculate_train_batch_loss` returned.
        """
        run = self._run
        batch_output = self.calculate_train_batch_loss(batch)
        if run.progress.num_steps == 0:
            checks.check_first_step(self, batch_output)
        loss = batch_output["loss"]
        num_items, are_samples = run.items_of(batch_output, step)
        self._update_loss_tracker(loss, num_items)
        run.add_to_means(self, batch, batch_output, num_items)
        self.backward_step(
            run.accumulation.weigh(loss, step, num_items, are_samples=are_samples)
        )
        run.batch_output = batch_output
        return batch_output

    def _update_weights(self, step: int) -> None:
        """Apply the gradients of the window that this step completes."""
        run = self._run
        run.accumulation.close(step, parameters_of(self.model, self.optimizer))
        config = run.config
        if (config.gradient_clip_value, config.gradient_clip_norm) != (None, None):
            self._clip_gradients()
        self.optimizer_step()
        # A scaled fp16 update whose gradients overflowed did not take place.
        was_applied = (
            run.is_plain_torch or not self._accelerator.optimizer_step_was_skipped
        )
        if was_applied:
            run.progress.num_updates += 1
            run.publish_progress()
            self.run_history.current_step = run.progress.num_updates
            run.note_learning_rates(self.optimizer)
            is_stepped = not isinstance(self.scheduler, ReduceLROnPlateau)
            if is_stepped and self.scheduler is not None:
                self.scheduler_step()
        self.optimizer_zero_grad()
        if was_applied:
            events.tell(
                self, "on_train_update_end", num_updates=run.progress.num_updates
            )

    def _clip_gradients(self) -> None:
        """Clip the gradients of an update as the run config says."""
        config, parameters = self.run_config, self.model.parameters()
        if config.gradient_clip_norm is not None:
            self.gradient_norm = self._engine.clip_by_norm(
                parameters, config.gradient_clip_norm
            )
        else:
            self._accelerator.clip_grad_value_(
                parameters, clip_value=config.gradient_clip_value
            )

    def _run_eval_epoch(
        self, valid_dl: Any, is_training: bool = True, is_intermediate: bool = False
    ) -> None:
        """Evaluate on the batches of a loader; modes and means stay as they are.

        Args:
            valid_dl: The evaluation loader.
            is_training: Whether this is part of a training run.
            is_intermediate: Whether it takes place in the middle of an epoch.
        """
        run, history = self._run, self.run_history
        prefix = history.metric_name_prefix
        if is_intermediate:
            metric_name = "eval_loss"  # "intermediate_eval_loss" with its prefix
            prefix += INTERMEDIATE_PREFIX
        else:
            metric_name = "eval_loss_epoch" if is_training else "evaluation_loss"
        with Aside(self, self._metrics), history.prefixed(prefix):
            events.call(self, self.eval_epoch_start)
            events.announce(
                self, "on_eval_epoch_start", is_intermediate=is_intermediate
            )
            self._run_eval_steps(valid_dl)
            events.agree_to_go_on(self)
            events.call(self, self.eval_epoch_end)
            self._add_epoch_loss_to_run_history(metric_name)
            if is_training and not is_intermediate:
                run.progress.finish(Stage.EVALUATION)
            events.announce(self, "on_eval_epoch_end", is_intermediate=is_intermediate)

    def _run_eval_steps(self, valid_dl: Any) -> None:
        # A method of its own, so that the last batch does not outlive the steps.
        with torch.no_grad():
            for batch in islice(valid_dl, self.eval_batch_limit):
                self._run_eval_step(batch)

    def _run_eval_step(self, batch: Any) -> None:
        events.tell(self, "on_eval_step_start")
        batch_output = self.calculate_eval_batch_loss(batch)
        num_items = step_output.num_items_of(batch_output)
        self._update_loss_tracker(batch_output["loss"], num_items)
        self._run.add_to_means(self, batch, batch_output, num_items)
        events.tell(self, "on_eval_step_end", batch_output=batch_output, batch=batch)

    def _update_loss_tracker(self, batch_loss: Tensor, batch_size: NumItems) -> None:
        """Add a batch's loss to the epoch's, without waiting for the device."""
        self._loss_tracker.update(batch_loss, batch_size)

    def _add_epoch_loss_to_run_history(self, metric_name: str) -> None:
        """Record the means over all items on all processes, and the metrics.

        Args:
            metric_name: The name for the loss. Those of other scalars have their own
                name in place of "loss".
        """
        if self.run_history.metric_name_prefix.endswith(EVALUATION_PREFIX):
            # The prefix, which evaluate() has set, says it already.
            metric_name = metric_name.removeprefix(EVALUATION_PREFIX)
        for name, value in self._run.results_of_epoch().items():
            full_name = metric_name.replace("loss", name, 1)
            self.run_history.update_metric(full_name, value)

    # ---------------------------------------------- the steps: made to be overridden

    def training_run_start(self) -> None:
        """Called when a training run starts; does nothing by default."""

    def train_epoch_start(self) -> None:
        """Called when an epoch starts; sets the training mode.

        Submodules that are in evaluation mode while the model itself is in training
        mode, such as frozen batch norms, were put there on purpose and stay there.
        """
        modes.start_training(self.model, self.get_model(keep_torch_compile=False))

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        """Return the loss of a training batch.

        By default a batch is ``(inputs, targets)``; without a ``loss_func``, a mapping
        is passed to the model as keyword arguments and the loss is ``outputs.loss``.

        Args:
            batch: What the loader yielded, on the device.

        Returns:
            A dictionary with ``loss``, the mean over the batch as a 0-dim tensor with a
            graph; ``model_outputs``; and ``batch_size``, the number of samples. If the
            loss is a mean over something else, such as tokens, ``num_items_in_batch``
            is how many there are, as a number or a 0-dim tensor. Every other number or
            0-dim tensor is averaged and recorded as ``train_<name>_epoch``, unless its
            name starts with an underscore. Everything is passed on to
            ``on_train_step_end``.
        """
        return self._calculate_batch_loss(batch)

    def backward_step(self, loss: Tensor) -> None:
        """Back-propagate a loss, which is weighted for its accumulation window.

        Args:
            loss: The loss of a batch, 0-dim.
        """
        if self._run.is_plain_torch:
            # Accelerate would add a node to the graph that divides the loss by 1.
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._accelerator.backward(loss)

    def optimizer_step(self) -> None:
        """Let the optimizer update the weights, once per window."""
        self.optimizer.step()  # type: ignore[union-attr]

    def scheduler_step(self) -> None:
        """Let the scheduler set the learning rate of the next update."""
        self.scheduler.step()

    def optimizer_zero_grad(self) -> None:
        """Clear the gradients after an update."""
        self.optimizer.zero_grad()  # type: ignore[union-attr]

    def train_epoch_end(self) -> None:
        """Called when an epoch's training ends, before its loss is recorded."""

    def eval_epoch_start(self) -> None:
        """Called when an evaluation starts; sets the evaluation mode."""
        self.model.eval()

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        """Return the loss of an evaluation batch, without a graph.

        Args:
            batch: What the loader yielded, on the device.

        Returns:
            A dictionary as from :meth:`calculate_train_batch_loss`; scalars are
            recorded as ``eval_<name>_epoch``, or as ``evaluation_<name>`` by
            :meth:`evaluate`.
        """
        with torch.no_grad():
            return self._calculate_batch_loss(batch)

    def calculate_metric_inputs(
        self, batch: Any, batch_output: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """Return what metrics are given of a batch: the predictions and the targets.

        By default the predictions are ``model_outputs``, or their ``logits`` if they
        have any; the targets are the second member of a batch, or its ``labels``.

        Args:
            batch: What the loader yielded, on the device.
            batch_output: What the step returned.

        Returns:
            The arguments that each metric is called with; for functions these are
            tensors whose first dimension is that of the samples.
        """
        return default_metric_inputs(batch, batch_output)

    def calculate_predictions(self, batch: Any) -> Any:
        """Return what :meth:`predict` is to collect of a batch, without a graph.

        By default these are the outputs of the model, which is given the first member
        of a batch that is a list or a tuple, and all of any other batch: a tensor as it
        is, the members of a mapping as keyword arguments, without ``labels``.

        Args:
            batch: What the loader yielded, on the device.

        Returns:
            A tensor, or a list, tuple, mapping or dataclass of tensors, whose first
            dimension is that of the samples of the batch.
        """
        if isinstance(batch, Mapping):
            inputs = {name: batch[name] for name in batch if name != "labels"}
            return self.model(**inputs)
        return self.model(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def eval_epoch_end(self) -> None:
        """Called when an evaluation ends, before its loss is recorded."""

    def training_run_epoch_end(self) -> None:
        """Called when an epoch ends, after its evaluation."""

    def training_run_end(self) -> None:
        """Called when a training run ends; unwraps the model."""
        self.model = self.get_model()

    def evaluation_run_start(self) -> None:
        """Called when an evaluation run starts; does nothing by default."""

    def evaluation_run_end(self) -> None:
        """Called when an evaluation run ends; unwraps the model."""
        self.model = self.get_model()

    def _calculate_batch_loss(self, batch: Any) -> dict[str, Any]:
        if self.loss_func is None and isinstance(batch, Mapping):
            outputs = self.model(**batch)
            loss = step_output.loss_of(outputs)
            batch_size = step_output.batch_size_of(batch)
        else:
            inputs, targets = step_output.inputs_and_targets_of(batch, self.loss_func)
            outputs = self.model(inputs)
            loss = self.loss_func(outputs, targets)  # type: ignore[misc]
            batch_size = targets.size(0)
        return {"loss": loss, "model_outputs": outputs, "batch_size": batch_size}

    # ---------------------------------------------------- what a run is created from

    def _prepare(self, run: Run) -> None:
        """Create what a run works with, and hand it to Accelerate."""
        if run.is_training:
            self._train_dataloader = self.create_train_dataloader(
                batch_size=run.batch_size, train_dl_kwargs=run.train_dataloader_kwargs
            )
        if self.eval_dataset is not None:
            self._eval_dataloader = self.create_eval_dataloader(
                batch_size=run.eval_batch_size or run.batch_size,
                eval_dl_kwargs=run.eval_dataloader_kwargs,
            )
        self._prepare_model_optimizer_and_dataloaders()
        # Before the run config, so that schedules know the true length of the run.
        for callback in self.callback_handler:
            if isinstance(callback, LimitBatchesCallback):
                callback.limit(self)
        # An argument that 0.1.61 did not have reaches an override only when it is used.
        clip_norm = run.gradient_clip_norm
        more = {} if clip_norm is None else {"gradient_clip_norm": clip_norm}
        self.run_config = self._create_run_config(
            num_epochs=run.num_epochs,
            gradient_accumulation_steps=run.gradient_accumulation_steps,
            max_num_train_steps=run.max_num_train_steps,
            per_device_batch_size=run.batch_size,
            gradient_clip_value=run.gradient_clip_value,
            **more,
        )
        self._check_eval_batch_size()
        run.accumulation = create_accumulation(self)

    def create_train_dataloader(
        self, batch_size: int, train_dl_kwargs: Mapping[str, Any] | None = None
    ) -> Iterable[Any]:
        """Create the training loader from ``self.train_dataset``.

        Args:
            batch_size: Samples in a batch of one process.
            train_dl_kwargs: Arguments that win over those of
                :meth:`get_default_train_dl_kwargs`.
        """
        checks.check_dataset_is_given(self.train_dataset)
        defaults = self.get_default_train_dl_kwargs(batch_size)
        loader, self._train_dl_kwargs = self._create_dataloader(
            self.train_dataset, defaults, train_dl_kwargs
        )
        return loader

    def create_eval_dataloader(
        self, batch_size: int, eval_dl_kwargs: Mapping[str, Any] | None = None
    ) -> Iterable[Any]:
        """Create the evaluation loader from ``self.eval_dataset``.

        Args:
            batch_size: Samples in a batch of one process.
            eval_dl_kwargs: Arguments that win over those of
                :meth:`get_default_eval_dl_kwargs`.
        """
        defaults = self.get_default_eval_dl_kwargs(batch_size)
        loader, self._eval_dl_kwargs = self._create_dataloader(
            self.eval_dataset, defaults, eval_dl_kwargs
        )
        return loader

    def get_default_train_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """Return the arguments of the training loader that the user did not give.

        Args:
            batch_size: Samples in a batch of one process.
        """
        return loaders.default_dl_kwargs(batch_size, shuffle=True)

    def get_default_eval_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """Return the arguments of the evaluation loader that the user did not give.

        Args:
            batch_size: Samples in a batch of one process.
        """
        return loaders.default_dl_kwargs(batch_size, shuffle=False)

    def _create_dataloader(
        self,
        dataset: Any,
        defaults: Mapping[str, Any],
        given: Mapping[str, Any] | None,
    ) -> tuple[Iterable[Any], dict[str, Any] | None]:
        """Return a loader, and what it was made with; None if it came ready."""
        if loaders.yields_batches(dataset):
            checks.check_no_loader_arguments(given, self.collate_fn)
            return dataset, None
        kwargs = loaders.merge_dl_kwargs(dataset, defaults, given)
        arguments = {"collate_fn": self.collate_fn, **kwargs}
        if kwargs.get("num_workers") is AUTO_NUM_WORKERS:
            arguments["num_workers"] = kwargs["num_workers"] = choose_num_workers(
                dataset, arguments, distributed.num_local_processes()
            )
        # A name of this module, which scripts replace.
        loader: DataLoader[Any] = DataLoader(dataset=dataset, **arguments)
        self._run.loaders_made.append(loader)
        return loader, kwargs

    def _prepare_model_optimizer_and_dataloaders(self) -> None:
        """Hand the model, the optimizer and the loaders to Accelerate."""
        run, accelerator = self._run, self._accelerator
        run.prepare_model_and_optimizer(self)
        self._train_dataloader = run.prepare_loader(
            self._train_dataloader, accelerator, is_evaluation=False
        )
        self._eval_dataloader = run.prepare_loader(
            self._eval_dataloader, accelerator, is_evaluation=True
        )

    def _create_run_config(
        self,
        num_epochs: int | None,
        gradient_accumulation_steps: int,
        max_num_train_steps: int | None,
        per_device_batch_size: int,
        gradient_clip_value: float | None,
        gradient_clip_norm: float | None = None,
    ) -> TrainerRunConfig:
        """Record what the run was asked to do, and work out what follows from it."""
        return create_run_config(
            self,
            num_epochs=num_epochs,
            gradient_accumulation_steps=gradient_accumulation_steps,
            max_num_train_steps=max_num_train_steps,
            per_device_batch_size=per_device_batch_size,
            gradient_clip_value=gradient_clip_value,
            gradient_clip_norm=gradient_clip_norm,
        )

    def _check_eval_batch_size(self) -> None:
        """Called once a run is prepared; does nothing by default."""

    def create_scheduler(self) -> Any:
        """Create the learning rate scheduler of a run from ``create_scheduler_fn``."""
        create = replace_trainer_placeholder_values(self, self.create_scheduler_fn)
        checks.check_needs_only_optimizer(create)
        return create(self.optimizer)

    # ----------------------------------------------------------- saving and loading

    def save_checkpoint(
        self,
        save_path: str | os.PathLike[str],
        checkpoint_kwargs: Mapping[str, Any] | None = None,
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        save_per_node: bool = True,
    ) -> None:
        """Save the model, and what belongs to it, in one file.

        The file is written beside its place and moved there once it is complete, so
        that an interruption leaves an older file as it was. All processes must call
        this.

        Args:
            save_path: The file; missing folders are created.
            checkpoint_kwargs: What else to put into the file, at its top level.
            save_optimizer: Whether the optimizer's state is saved.
            save_scheduler: Whether the scheduler's state is saved.
            save_per_node: Write one file on each machine instead of one in all.

        Raises:
            TypeError: If ``checkpoint_kwargs`` holds something that could not be loaded
                again safely.
            CheckpointError: If the file could not be written.
        """
        events.announce(self, "on_before_save")
        state = self._accelerator.state
        writes = state.is_local_main_process if save_per_node else state.is_main_process
        contents = saving.contents_of(
            self, optimizer=save_optimizer, scheduler=save_scheduler, keep=writes
        )
        contents.update(checkpoint_kwargs or {})
        with saving.OnAllOrNone():
            if writes:
                checkpoint.save_file(contents, save_path)

    def load_checkpoint(
        self,
        checkpoint_path: str | os.PathLike[str],
        load_optimizer: bool = True,
        load_scheduler: bool = True,
    ) -> dict[str, Any]:
        """Load a file that :meth:`save_checkpoint` wrote.

        Args:
            checkpoint_path: The file.
            load_optimizer: Whether the optimizer's state is loaded, if the file has it
                and the trainer has an optimizer.
            load_scheduler: Whether the scheduler's state is loaded, if the file has it
                and the trainer has a scheduler, which it only has during a run.

        Returns:
            All that the file holds.

        Raises:
            CheckpointError: If the file cannot be read, or does not fit the model, the
                optimizer or the scheduler. Nothing has changed then.
        """
        return saving.load_checkpoint(
            self, checkpoint_path, load_optimizer, load_scheduler
        )

    def save_model(
        self, path: str | os.PathLike[str], *, ema: bool = False
    ) -> pathlib.Path:
        """Save the weights of the model alone, in one file that other programs read.

        They have the names that they have in the model without wrappers. The file
        appears once it is complete. All processes must call this; one writes.

        Args:
            path: The file. With ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` at its end it
                is a state dict for ``torch.load``, else it is in the format of
                safetensors, and ``.safetensors`` is added if that is not its end.
            ema: Whether to save the average of the
                :class:`~pytorch_accelerated.callbacks.ModelEmaCallback` instead.

        Returns:
            The path of the file.

        Raises:
            ValueError: If there is no average, or more than one.
            CheckpointError: If the file could not be written.
        """
        events.announce(self, "on_before_save")
        return saving.save_model(self, path, ema)

    def load_model(self, path: str | os.PathLike[str]) -> None:
        """Load the weights of the model from a file. All processes must call this.

        Args:
            path: What :meth:`save_model` was given. A state dict that ``torch.save``
                wrote, a file of :meth:`save_checkpoint` and a folder of
                :meth:`save_training_state` are read too.

        Raises:
            CheckpointError: If the file cannot be read, or does not fit the model,
                which has not changed then.
        """
        saving.load_model(self, path)

    def save_training_state(
        self,
        output_dir: str | os.PathLike[str],
        checkpoint_kwargs: Mapping[str, Any] | None = None,
        *,
        asynchronous: bool = False,
    ) -> None:
        """Save everything that a run needs to go on from here, in a folder.

        The folder appears once it is complete, and replaces one of its name only then.
        All processes must call this.

        Args:
            output_dir: The folder.
            checkpoint_kwargs: What :meth:`load_training_state` is to return besides the
                epoch.
            asynchronous: Whether to return once everything is copied to the host's
                memory, and to write it meanwhile. The next save, the end of the run and
                :meth:`finish_saving` wait for it, and raise its error.

        Raises:
            NotStorableError: If ``checkpoint_kwargs``, or the state of the model, the
                optimizer, the scheduler or a callback, holds something that could not
                be loaded again safely.
            CheckpointError: If the folder could not be written.
        """
        events.announce(self, "on_before_save")
        self.finish_saving()
        path = os.path.abspath(os.path.expanduser(output_dir))
        saving.save_training_state(self, path, checkpoint_kwargs, asynchronous)
        self._being_saved = path
        if not asynchronous:
            self.finish_saving()

    def finish_saving(self) -> None:
        """Wait until a training state that is written in the background is complete.

        All processes must call this.

        Raises:
            CheckpointError: If it could not be written.
        """
        saved, self._being_saved = self._being_saved, None
        with saving.OnAllOrNone():
            self._writer.wait()
        self.last_checkpoint = saved or self.last_checkpoint

    def load_training_state(self, input_dir: str | os.PathLike[str]) -> dict[str, Any]:
        """Load the weights and the optimizer, scheduler and random states of a run.

        To go on with the run itself, use ``train(resume_from=...)``, which calls this.

        Args:
            input_dir: A folder that :meth:`save_training_state` wrote; those of the
                published version 0.1.61 are read too.

        Returns:
            ``current_epoch``, the number of the epoch to go on with, and the
            ``checkpoint_kwargs`` that were saved.

        Raises:
            CheckpointError: If the folder is not whole, or does not fit the model.
        """
        return saving.load_training_state(self, input_dir)

    # --------------------------------------------------------- what can be found out

    def find_learning_rate(
        self,
        dataset: Any,
        min_lr: float = 1e-7,
        max_lr: float = 10.0,
        num_updates: int = 100,
        **train_arguments: Unpack[finders.TrainArguments],
    ) -> finders.LearningRateCurve:
        """Train with a learning rate that grows, and see where the loss falls fastest.

        The range test of Smith (2017), https://arxiv.org/abs/1506.01186: the learning
        rate grows exponentially from update to update, until the loss diverges. The
        suggestion is the one at which the loss, smoothed, falls most steeply over the
        logarithm of the learning rate. Afterwards everything is as it was before.

        Args:
            dataset: As for :meth:`train`.
            min_lr: The learning rate of the first update.
            max_lr: That of the last, if the loss does not diverge before.
            num_updates: How many updates, at least 10.
            **train_arguments: Those of :meth:`train` that say what an update is made of
                (:class:`~pytorch_accelerated.finders.TrainArguments`).

        Returns:
            The curve, which has a ``suggestion`` and can ``plot()`` itself. With
            several parameter groups its learning rates are those of the group with the
            highest; the others keep their ratio to it.
        """
        return finders.find_learning_rate(
            self, dataset, min_lr, max_lr, num_updates, train_arguments
        )

    def find_batch_size(
        self,
        dataset: Any,
        max_batch_size: int | None = None,
        margin: float = 0.0,
        **train_arguments: Unpack[finders.TrainArguments],
    ) -> int:
        """Find the largest batch that memory suffices to train on, in powers of two.

        Batches are doubled, beginning with ``per_device_batch_size``, until memory runs
        out on any process; each size is tried in two updates. Afterwards everything is
        as it was before.

        Args:
            dataset: A map-style dataset. If its samples differ in size, let it have the
                largest ones only.
            max_batch_size: Where the search ends; by default with all samples. Needed
                on a CPU.
            margin: The share of the result to leave out, for other memory needs.
            **train_arguments: As for :meth:`find_learning_rate`.

        Returns:
            The samples in a batch of one process, the same on all of them.

        Raises:
            torch.OutOfMemoryError: If not even one sample fits.
        """
        return finders.find_batch_size(
            self, dataset, max_batch_size, margin, train_arguments
        )

    def summary(
        self, batch: Any, depth: int = 3, per_device_batch_size: int = 8
    ) -> ModelSummary:
        """Print and return what a training step holds and costs, layer by layer.

        The step is made, with all that a run does in it, and then put back.

        Args:
            batch: A batch as the loader yields it; or a dataset or loader, whose first
                batch is taken. A plain list is a batch.
            depth: How many levels of modules the table shows.
            per_device_batch_size: Samples in a batch that is made of a dataset.

        Returns:
            Shapes, parameters, memory and FLOPs; as text, the table.
        """
        from pytorch_accelerated.summary import summarize

        result = summarize(self, batch, depth, per_device_batch_size)
        self.print(result)
        return result

    def advise(self) -> list[str]:
        """Print and return what would make runs like the last one faster.

        Nothing is changed. It speaks of the optimizer and, after a run, of how long its
        last epoch waited for data, and of the use of the GPU.
        """
        found, evidence = advice_for(self), evidence_for(self)
        for line in filter(None, [*(found or ["Nothing to suggest."]), evidence]):
            self.print(line)
        return found

    def show_loop(self) -> str:
        """Print and return the loop that this trainer runs, as it is now.

        Each method with the class, file and line that define it, and each event with
        the callbacks that hear of it, in order. Those that are not the library's own
        are marked.
        """
        text = loop_of(self, __doc__ or "")
        self.print(text)
        return text

    # ---------------------------------------------------------------- small helpers

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = self._accelerator.device
        return device

    @property
    def last_lr(self) -> list[float] | None:
        """The learning rates that the last update of this run was made with.

        One for each parameter group of the optimizer, NaN for a group that has none;
        None before the first update. The groups themselves hold those of the next
        update as soon as the scheduler has been stepped.
        """
        rates = self._run.training.learning_rates
        return None if rates is None else [float(rate) for rate in rates]

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, once on each machine, above the progress bars.

        No run ends because the output is closed, or cannot encode the text: then the
        text is left out.
        """
        if self._accelerator.is_local_main_process:
            with above_bars(), suppress(OSError, ValueError):
                print(*args, **kwargs)  # noqa: T201 (this is what it is for)

    def agree(self, flag: bool) -> bool:
        """Return True on all processes if any of them passes True.

        All processes must call it. In a single process it returns ``flag``.

        Args:
            flag: What this process says.
        """
        return distributed.agree(flag)

    def raise_on_all(self, error: Exception | None) -> None:
        """Raise an error on all processes if any of them passes one.

        All processes must call it, for instance in the same event of a callback.

        Args:
            error: The error of this process, None if it has none. Other processes raise
                one of the same kind that names the process and its error.
        """
        distributed.raise_on_all(error)

    def gather(self, tensor: Any, padding_value: float | None = None) -> Any:
        """Concatenate a tensor over all processes along its first dimension.

        All processes must call it; their first dimensions may differ.

        Args:
            tensor: A tensor, or a nested list, tuple, mapping or dataclass of tensors.
            padding_value: Not needed, since no padding is left in the result.

        Returns:
            The same structure with the tensors of all processes, in process order.
        """
        return distributed.gather_uneven(tensor)

    def get_model(self, keep_torch_compile: bool = True) -> nn.Module:
        """Return the model without the wrappers of distributed training.

        Args:
            keep_torch_compile: Whether a compiled model stays compiled.
        """
        prepared = self._run.prepared
        if prepared is not None and prepared.is_unwrapped(self.model):
            return self.model  # Accelerate would search the disk for DeepSpeed first
        model: nn.Module = self._accelerator.unwrap_model(
            self.model, keep_torch_compile=keep_torch_compile
        )
        return model


class TrainerWithTimmScheduler(Trainer):
    """A trainer for the schedulers of timm, which are told the time.

    ``step_update`` is called after each update with the number of updates completed,
    and ``step`` after each epoch with the number of epochs completed, so that schedules
    in updates and in epochs both work. Arguments are those of :class:`Trainer`.
    """

    def scheduler_step(self) -> None:
        """Tell the scheduler how many updates are completed."""
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=self.num_updates)

    def _step_scheduler_after_epoch(self) -> None:
        """Tell the scheduler how many epochs are completed, and the plateau metric."""
        if self.scheduler is not None:
            metric = saving.latest_metrics(self).get(self._run.plateau_metric)
            self.scheduler.step(self._run.progress.epochs_done + 1, metric)
