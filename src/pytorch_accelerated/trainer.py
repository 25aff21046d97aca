"""The trainer: a training loop that can be read, and changed one method at a time.

A run of :meth:`Trainer.train`, from top to bottom. Lines that end in ``()`` are methods
of the trainer, made to be overridden; ``on_...`` are events, which callbacks listen to
and which come after the method of the same name::

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

import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from pytorch_accelerated import (
    checkpoint,
    checks,
    data,
    distributed,
    engines,
    modes,
    step_output,
)
from pytorch_accelerated.accumulation import AccumulationWindow
from pytorch_accelerated.advice import advice_for
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
from pytorch_accelerated.contexts import contextmanager
from pytorch_accelerated.data import sharing
from pytorch_accelerated.diagnosis import explain
from pytorch_accelerated.engines import launch
from pytorch_accelerated.errors import (
    CheckpointError,
    NonFiniteLossError,
    StopTrainingError,
    TrainingInterruptedError,
    warn,
)
from pytorch_accelerated.memory import BatchesTooLargeError, BatchShrinker
from pytorch_accelerated.placeholders import (
    TrainerPlaceholderValues,
    replace_trainer_placeholder_values,
)
from pytorch_accelerated.progress import RunProgress, Stage
from pytorch_accelerated.resumable import ResumableRun
from pytorch_accelerated.resuming import (
    BatchLayout,
    set_gradients,
    skip_batches,
)
from pytorch_accelerated.run_config import TrainerRunConfig
from pytorch_accelerated.schedulers.scheduler_base import (
    StatefulSchedulerBase,
    forget_start_if_set_by_hand,
    remember_scheduled_values,
)
from pytorch_accelerated.step_output import NumItems
from pytorch_accelerated.tracking import (
    EVALUATION_PREFIX,
    INTERMEDIATE_PREFIX,
    InMemoryRunHistory,
    LossTracker,
    RunHistory,
)

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

# What evaluate() and predict() set, besides what they leave for their caller to read.
_REPLACED_BY_AN_EVALUATION = (
    "model",
    "eval_dataset",
    "collate_fn",
    "run_config",
    "interrupted",
    "_noted_error",
    "_batch_output",
    "_loaders_made",
    "_train_dataloader",
    "_eval_dataloader",
    "_train_dl_kwargs",
    "_eval_dl_kwargs",
)

DEFAULT_CALLBACKS: tuple[type[TrainerCallback], ...] = (
    MoveModulesToDeviceCallback,
    TerminateOnNaNCallback,
    PrintProgressCallback,
    ProgressBarCallback,
    LogMetricsCallback,
)


class Trainer(ResumableRun):
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
    """

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
    ) -> None:
        self.model: nn.Module = model
        self.loss_func = loss_func
        self.optimizer = optimizer
        self.seed: int | None = (
            None if seed is None else checks.whole_number("seed", seed)
        )
        self._accelerator_kwargs = dict(accelerator_kwargs or {})
        self._callbacks = callbacks
        self.callback_handler: CallbackHandler = self._create_callback_handler()
        self.run_history: RunHistory = (
            InMemoryRunHistory() if run_history is None else run_history
        )
        self._accelerator: Accelerator = self._create_accelerator()
        self._engine = engines.create_engine(self._accelerator)
        self._mixed_precision = self._accelerator.mixed_precision
        self._loss_tracker = LossTracker()
        self._scalar_trackers: dict[str, LossTracker] = {}

        # What a call of train() or evaluate() sets.
        self.train_dataset: Any = None
        self.eval_dataset: Any = None
        self.collate_fn: Callable[[list[Any]], Any] | None = None
        self.create_scheduler_fn: Callable[..., Any] | None = None
        self.scheduler: Any = None
        self.run_config: TrainerRunConfig = None  # type: ignore[assignment]
        self.num_updates: int | None = None
        self.num_steps: int | None = None
        self.num_samples_seen: int | None = None
        self.gradient_norm: Tensor | None = None
        self.eval_batch_limit: int | None = None
        self.interrupted: bool = False
        self.has_failed: bool = False
        self.is_resumed: bool = False
        self.last_checkpoint: str | None = None
        self._pad_uneven_eval_batches = False
        self._train_dataloader: Any = None
        self._last_trained_on: tuple[Any, BatchLayout | None] = None, None
        self._eval_dataloader: Any = None
        self._train_dl_kwargs: dict[str, Any] | None = None
        self._eval_dl_kwargs: dict[str, Any] | None = None

        # How the runs of this trainer go on from each other.
        self._num_runs = 0
        self._run_number = 0
        self._run_id: str | None = None
        self._asked_to_resume_from: str | os.PathLike[str] | None = None
        self._found: checkpoint.Checkpoint | None = None
        self._data_seed = 0
        self._progress = RunProgress()
        self._plateau_metric = "eval_loss_epoch"
        self._last_lr: list[float | Tensor] | None = None
        self._update_limit: int | None = None
        self._window = AccumulationWindow(1)
        self._backward_is_plain = False
        self._noted_error: Exception | None = None
        self._batch_output: dict[str, Any] | None = None
        self._agrees_after_updates = False
        self._shrinker: BatchShrinker | None = None
        self._prepared_model: distributed.PreparedModel | None = None
        self._plain_optimizer: torch.optim.Optimizer | None = None
        self._loaders_made: list[Any] = []
        self._loaded_state: dict[str, Any] = {}
        self._resume_state: dict[str, Any] = {}
        self._epoch_random_states: dict[str, Any] | None = None
        self._ahead_random_states: dict[str, Any] | None = None
        self._background_writer = checkpoint.BackgroundWriter()
        self._being_saved: str | None = None

        self._call_event("on_init_end")

    # --------------------------------------------------------------------- the runs

    @names_what_was_meant
    def train(
        self,
        train_dataset: Any,
        num_epochs: int,
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
            num_epochs: Epochs of this run.
            eval_dataset: Evaluated after each epoch; none by default.
            per_device_batch_size: Samples in a batch of one process. A ``batch_size``
                in the loader arguments wins over it.
            max_num_train_steps: Updates after which the run ends, in the middle of an
                epoch if need be. With ``num_epochs``, the smaller limit holds.
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
        self._check_train_arguments(
            train_dataset,
            num_epochs,
            max_num_train_steps,
            gradient_accumulation_steps,
            gradient_clip_value,
            gradient_clip_norm,
            create_scheduler_fn,
        )
        self._engine.check_arguments(
            data.batch_size_of_loader(
                train_dataset, train_dataloader_kwargs, per_device_batch_size
            ),
            gradient_accumulation_steps,
            gradient_clip_value,
            gradient_clip_norm,
        )
        checks.check_dataset_is_not_empty(eval_dataset, "eval_dataset")
        if self._num_runs == 0 and self.optimizer is not None:
            modes.warn_of_sleeping_submodules(self.model, self.optimizer)
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.create_scheduler_fn = create_scheduler_fn
        self.collate_fn = collate_fn
        self._plateau_metric = plateau_metric
        self._update_limit = max_num_train_steps
        self._asked_to_resume_from = resume_from
        resume_from = self._resolve_resume_from(resume_from)
        if reset_run_history and resume_from is None:
            self.run_history.reset()
        # Arguments that 0.1.61 did not have reach an override only when they are used.
        clip_norm = (
            {}
            if gradient_clip_norm is None
            else {"gradient_clip_norm": gradient_clip_norm}
        )

        self._begin_run()
        try:
            self._train_dataloader = self.create_train_dataloader(
                batch_size=per_device_batch_size,
                train_dl_kwargs=train_dataloader_kwargs,
            )
            if eval_dataset is not None:
                self._eval_dataloader = self.create_eval_dataloader(
                    batch_size=eval_per_device_batch_size or per_device_batch_size,
                    eval_dl_kwargs=eval_dataloader_kwargs,
                )
            self._prepare_model_optimizer_and_dataloaders()
            self._limit_batches()
            self.run_config = self._create_run_config(
                num_epochs=num_epochs,
                gradient_accumulation_steps=gradient_accumulation_steps,
                max_num_train_steps=max_num_train_steps,
                per_device_batch_size=per_device_batch_size,
                gradient_clip_value=gradient_clip_value,
                **clip_norm,
            )
            self._check_eval_batch_size()
            self.scheduler = None
            if create_scheduler_fn is not None:
                self.scheduler = self.create_scheduler()
            if resume_from is not None:
                self._resume(resume_from)
            self._prepare_callbacks()
            self._window = self._create_window()
            if halve_batch_if_out_of_memory:
                self._shrinker = BatchShrinker(self)
            self._start_schedule()
            self._run_training()
        finally:
            self._end_run()
        return self.run_history

    @names_what_was_meant
    def evaluate(
        self,
        dataset: Any = None,
        per_device_batch_size: int = 8,
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
            per_device_batch_size: Samples in a batch of one process.
            dataloader_kwargs: Arguments of the ``DataLoader``.
            collate_fn: Makes a batch of a list of samples.

        Returns:
            The metrics that were recorded, such as ``{"evaluation_loss": 0.35}``.

        Raises:
            ValueError: If there is nothing to evaluate on.
        """
        recorded = self._count_recorded_metrics()
        with (
            self.run_history._evaluation(),
            self._prepared_to_evaluate(
                dataset, per_device_batch_size, dataloader_kwargs, collate_fn
            ),
        ):
            self._run_evaluation()
        return {
            name: list(self.run_history.get_metric_values(name))[-1]
            for name, count in self._count_recorded_metrics().items()
            if count > recorded.get(name, 0)
        }

    @names_what_was_meant
    def predict(
        self,
        dataset: Any,
        per_device_batch_size: int = 8,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> Any:
        """Return what the model makes of each sample, in the order of the dataset.

        It needs no targets and no loss function, calls no events and records nothing.

        Args:
            dataset: A dataset or a ready ``DataLoader``.
            per_device_batch_size: Samples in a batch of one process.
            dataloader_kwargs: Arguments of the ``DataLoader``.
            collate_fn: Makes a batch of a list of samples.

        Returns:
            What :meth:`calculate_predictions` returned for all batches, concatenated
            along the first dimension; on the CPU, and the same on all processes.

        Raises:
            ValueError: If there is nothing to predict.
        """
        predictions = []
        with (
            self._prepared_to_evaluate(
                dataset, per_device_batch_size, dataloader_kwargs, collate_fn
            ),
            self._modes_and_trackers_kept(),
            torch.no_grad(),
        ):
            self.model.eval()
            for batch in self._eval_dataloader:
                gathered = self.gather(self.calculate_predictions(batch))
                predictions.append(distributed.map_tensors(Tensor.cpu, gathered))
        return distributed.map_tensors(_concatenate, *predictions)

    @contextmanager
    def _prepared_to_evaluate(
        self,
        dataset: Any,
        per_device_batch_size: int,
        dataloader_kwargs: Mapping[str, Any] | None,
        collate_fn: Callable[[list[Any]], Any] | None,
    ) -> Iterator[None]:
        """Prepare everything for a run that does not train, and end it."""
        if dataset is None:
            raise ValueError("A dataset or a DataLoader is needed, got None.")
        checks.check_dataset_is_not_empty(dataset, "dataset")
        with self._run_under_way_kept():
            self.eval_dataset = dataset
            self.collate_fn = collate_fn
            self._begin_run(is_training=False)
            self._eval_dataloader = self.create_eval_dataloader(
                batch_size=per_device_batch_size, eval_dl_kwargs=dataloader_kwargs
            )
            self._prepare_model_optimizer_and_dataloaders()
            self._limit_batches()
            self.run_config = self._create_run_config(
                num_epochs=1,
                gradient_accumulation_steps=1,
                max_num_train_steps=None,
                per_device_batch_size=per_device_batch_size,
                gradient_clip_value=None,
            )
            self._check_eval_batch_size()
            yield

    @contextmanager
    def _run_under_way_kept(self) -> Iterator[None]:
        """End the run that begins in the block, or put back the one that it is amid."""
        if self._prepared_model is None:
            try:
                yield
            finally:
                self._end_run()
            return
        outer = {name: getattr(self, name) for name in _REPLACED_BY_AN_EVALUATION}
        random_states = checkpoint.get_random_states()
        try:
            yield
        finally:
            self._stop_workers()
            vars(self).update(outer)
            checkpoint.set_random_states(random_states)

    def _run_training(self) -> None:
        """Run the epochs that are due, between the events of the run."""
        with self._ended_by("training_run_end"):
            self._call(self.training_run_start)
            self._notify("on_training_run_start")
            self._warn_of_oversights()
            for _ in range(self._progress.epochs_done, self.run_config.num_epochs):
                at_start = self._progress.is_at_epoch_start
                if (at_start and self._are_updates_used_up()) or self._run_epoch():
                    self.print(
                        f"Stopping after {self._progress.num_updates} updates, "
                        "as max_num_train_steps asks"
                    )
                    break
        self.finish_saving()

    def _run_evaluation(self) -> None:
        """Evaluate once, between the events of the run."""
        with self._ended_by("evaluation_run_end"):
            self._call(self.evaluation_run_start)
            self._notify("on_evaluation_run_start")
            self._run_eval_epoch(self._eval_dataloader, is_training=False)

    # ------------------------------------------------------------------- the epochs

    def _run_epoch(self) -> bool:
        """Train and evaluate for an epoch; say whether it must be the last."""
        is_over = self._are_updates_used_up()
        if self._progress.step == 0 or self._progress.stage is not Stage.TRAINING:
            self._restore_random_states()
        if self._progress.stage is Stage.TRAINING:
            # Here, for a loop over the loader that the user has written.
            self._set_epoch_of(self._train_dataloader)
            num_updates = self._progress.num_updates
            is_over = self._run_train_epoch(self._train_dataloader) or is_over
            if self._progress.num_updates == num_updates and not is_over:
                self._warn_of_uncounted_updates()
        if self._progress.stage is not Stage.ENDED:
            is_evaluated = self._progress.stage is Stage.EVALUATED
            if self.eval_dataset is not None and not is_evaluated:
                self._run_eval_epoch(self._eval_dataloader)
            self._step_scheduler_after_epoch()
            self._progress.stage = Stage.ENDED
            self._call(self.training_run_epoch_end)
            self._notify("on_training_run_epoch_end")
        self._progress.start_next_epoch()
        self.run_history._increment_epoch()
        return is_over

    def _run_train_epoch(self, train_dl: Any) -> bool:
        """Train on the batches of an epoch.

        Args:
            train_dl: The training loader.

        Returns:
            Whether the updates that the run may make are used up.
        """
        if self._progress.stage is not Stage.TRAINING:
            self._progress.start_next_epoch()  # a run of the user's own does not say so
        self._call(self.train_epoch_start)
        self._reset_trackers()
        self._notify("on_train_epoch_start")
        self._agrees_after_updates = self._accelerator.num_processes > 1 and self.agree(
            self.callback_handler.may_stop_alone(_EVENTS_OF_A_STEP)
        )
        is_over = self._run_train_steps(train_dl)
        self._call(self.train_epoch_end)
        self._add_epoch_loss_to_run_history("train_loss_epoch")
        self._progress.stage = Stage.EVALUATION
        self._notify("on_train_epoch_end")
        return is_over

    def _run_train_steps(self, train_dl: Any) -> bool:
        if self._are_updates_used_up():
            return True  # it was saved right after the last one
        while True:
            with suppress(BatchesTooLargeError):
                return self._run_steps_that_are_due(train_dl)
            self._shrinker.shrink()  # type: ignore[union-attr]

    def _run_steps_that_are_due(self, train_dl: Any) -> bool:
        for step, batch, closes_window in self._batches_that_are_due(train_dl):
            self._run_train_step(batch, step, closes_window)
            if closes_window:
                if self._agrees_after_updates:
                    self._agree_to_go_on()
                if self._are_updates_used_up():
                    return True
        return False

    # A method of its own, so that nothing of a step outlives it.
    def _run_train_step(self, batch: Any, step: int, closes_window: bool) -> None:
        self._call_event("on_train_step_start")
        if self._shrinker is not None:
            passes = partial(self._perform_forward_and_backward_passes, batch, step)
            batch_output = self._shrinker.attempt(passes, step, closes_window)
        else:
            with _AS_USUAL if closes_window else self._without_gradient_sync():
                batch_output = self._perform_forward_and_backward_passes(batch, step)
        # An override from 0.1.61 returns nothing, and either lets this class do the
        # work, or calls the event itself.
        batch_output = batch_output or self._batch_output
        self._batch_output = None
        self._count_step(step, batch, batch_output)
        if closes_window:
            self._update_weights(step)
        if batch_output is not None:
            self._call_event(
                "on_train_step_end", batch=batch, batch_output=batch_output, step=step
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
        batch_output = self.calculate_train_batch_loss(batch)
        if self._progress.num_steps == 0:
            self._check_first_step(batch_output)
        loss = batch_output["loss"]
        num_items, are_samples = self._items_of(batch_output, step)
        self._update_loss_tracker(loss, num_items)
        self._track_scalars(batch_output, num_items)
        self.backward_step(
            self._window.weigh(loss, step, num_items, are_samples=are_samples)
        )
        self._batch_output = batch_output
        return batch_output

    def _update_weights(self, step: int) -> None:
        """Apply the gradients of the window that this step closes."""
        self._window.close(step, self._parameters_to_update())
        if self._clips_gradients:
            self._clip_gradients()
        self.optimizer_step()
        # A scaled fp16 update whose gradients overflowed did not take place.
        was_applied = (
            self._backward_is_plain or not self._accelerator.optimizer_step_was_skipped
        )
        if was_applied:
            self._progress.num_updates += 1
            self.num_updates = self._progress.num_updates
            self.run_history.current_step = self._progress.num_updates
            self._last_lr = _learning_rates_of(self.optimizer)
            if self.scheduler is not None and self._steps_scheduler:
                self.scheduler_step()
        self.optimizer_zero_grad()
        if was_applied:
            self._call_event("on_train_update_end", num_updates=self.num_updates)

    def _run_eval_epoch(
        self, valid_dl: Any, is_training: bool = True, is_intermediate: bool = False
    ) -> None:
        """Evaluate on the batches of a loader; modes and trackers stay as they are.

        Args:
            valid_dl: The evaluation loader.
            is_training: Whether this is part of a training run.
            is_intermediate: Whether it takes place in the middle of an epoch.
        """
        if is_intermediate:
            metric_name = "eval_loss"  # "intermediate_eval_loss" with its prefix
        else:
            metric_name = "eval_loss_epoch" if is_training else "evaluation_loss"
        with self._modes_and_trackers_kept(), self._metrics_apart(is_intermediate):
            self._call(self.eval_epoch_start)
            self._notify("on_eval_epoch_start", is_intermediate=is_intermediate)
            self._run_eval_steps(valid_dl)
            self._agree_to_go_on()
            self._call(self.eval_epoch_end)
            self._add_epoch_loss_to_run_history(metric_name)
            is_of_epoch = is_training and not is_intermediate
            if is_of_epoch and self._progress.stage is Stage.EVALUATION:
                self._progress.stage = Stage.EVALUATED
            self._notify("on_eval_epoch_end", is_intermediate=is_intermediate)

    def _run_eval_steps(self, valid_dl: Any) -> None:
        with torch.no_grad():
            for batch in islice(valid_dl, self.eval_batch_limit):
                self._run_eval_step(batch)

    def _run_eval_step(self, batch: Any) -> None:
        self._call_event("on_eval_step_start")
        batch_output = self.calculate_eval_batch_loss(batch)
        num_items = step_output.num_items(batch_output)
        self._update_loss_tracker(batch_output["loss"], num_items)
        self._track_scalars(batch_output, num_items)
        self._call_event("on_eval_step_end", batch_output=batch_output, batch=batch)

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
        if self._backward_is_plain:
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
            inputs, targets = self._inputs_and_targets(batch)
            outputs = self.model(inputs)
            loss = self.loss_func(outputs, targets)  # type: ignore[misc]
            batch_size = targets.size(0)
        return {"loss": loss, "model_outputs": outputs, "batch_size": batch_size}

    def _inputs_and_targets(self, batch: Any) -> tuple[Any, Any]:
        inputs, targets = step_output.inputs_and_targets_of(batch)
        if self.loss_func is None:
            raise ValueError(
                "loss_func is None, and the batch is not a mapping whose members could "
                "be passed to a model that returns its loss. Pass a loss_func, or "
                "override calculate_train_batch_loss and calculate_eval_batch_loss."
            )
        checks.check_is_instance("loss_func", self.loss_func)
        return inputs, targets

    # ---------------------------------------------------- what a run is created from

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
        if data.yields_batches(self.train_dataset):
            checks.check_no_loader_arguments(train_dl_kwargs, self.collate_fn)
            return self.train_dataset
        self._train_dl_kwargs = data.merge_dl_kwargs(
            self.train_dataset,
            self.get_default_train_dl_kwargs(batch_size),
            train_dl_kwargs,
        )
        return self._create_dataloader(self.train_dataset, self._train_dl_kwargs)

    def create_eval_dataloader(
        self, batch_size: int, eval_dl_kwargs: Mapping[str, Any] | None = None
    ) -> Iterable[Any]:
        """Create the evaluation loader from ``self.eval_dataset``.

        Args:
            batch_size: Samples in a batch of one process.
            eval_dl_kwargs: Arguments that win over those of
                :meth:`get_default_eval_dl_kwargs`.
        """
        if data.yields_batches(self.eval_dataset):
            checks.check_no_loader_arguments(eval_dl_kwargs, self.collate_fn)
            return self.eval_dataset
        self._eval_dl_kwargs = data.merge_dl_kwargs(
            self.eval_dataset,
            self.get_default_eval_dl_kwargs(batch_size),
            eval_dl_kwargs,
        )
        return self._create_dataloader(self.eval_dataset, self._eval_dl_kwargs)

    def get_default_train_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """Return the arguments of the training loader that the user did not give.

        Args:
            batch_size: Samples in a batch of one process.
        """
        return data.default_dl_kwargs(batch_size, shuffle=True)

    def get_default_eval_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """Return the arguments of the evaluation loader that the user did not give.

        Args:
            batch_size: Samples in a batch of one process.
        """
        return data.default_dl_kwargs(batch_size, shuffle=False)

    def create_scheduler(self) -> Any:
        """Create the learning rate scheduler of a run from ``create_scheduler_fn``."""
        create = replace_trainer_placeholder_values(self, self.create_scheduler_fn)
        checks.check_needs_only_optimizer(create)
        return create(self.optimizer)

    def _create_callback_handler(self) -> CallbackHandler:
        handler = CallbackHandler(self._callbacks)
        limit = data.batch_limit_from_environment()
        if limit is not None:
            handler.callbacks.insert(0, LimitBatchesCallback(limit))
        return handler

    def _create_accelerator(self) -> Accelerator:
        """Create the accelerator; override to configure it in code."""
        checks.check_accelerator_kwargs(self._accelerator_kwargs)
        return launch.create_accelerator(**self._accelerator_kwargs)

    def _prepare_model_optimizer_and_dataloaders(self) -> None:
        """Hand the model, the optimizer and the loaders to Accelerate."""
        if self._prepared_model is None:  # else this is amid another run
            self._prepare_model_and_optimizer()
        self._train_dataloader = self._prepare_dataloader(self._train_dataloader)
        self._eval_dataloader = self._prepare_dataloader(
            self._eval_dataloader, is_evaluation=True
        )

    def _prepare_model_and_optimizer(self) -> None:
        self._prepared_model = distributed.PreparedModel(self.model)
        self._plain_optimizer = self.optimizer
        if self._train_dataloader is None:
            self.model = self._engine.prepare_for_evaluation(self.model)
            return
        self.model, self.optimizer = self._engine.prepare(self.model, self.optimizer)
        self._backward_is_plain = distributed.is_plain(self._accelerator)
        if self._backward_is_plain:
            # Accelerate's wrapper would do nothing else than cost time.
            self.optimizer = self._plain_optimizer
        # What an earlier run or a learning rate finder may have left.
        self.optimizer.zero_grad()  # type: ignore[union-attr]

    def _prepare_dataloader(self, loader: Any, is_evaluation: bool = False) -> Any:
        accelerator = self._accelerator
        is_ours = is_evaluation or any(loader is made for made in self._loaders_made)
        if loader is None:
            return None
        is_alone = accelerator.num_processes == 1
        if not is_alone and sharing.is_split_by_process(loader):
            return data.DeviceLoader(loader, self.device)
        if is_ours and data.is_plain(loader):
            return data.PlannedLoader(
                loader,
                self.device,
                self._data_seed,
                num_processes=accelerator.num_processes,
                process_index=accelerator.process_index,
                even=is_evaluation,
            )
        if is_alone:
            return data.DeviceLoader(loader, self.device)
        return sharing.share(
            loader,
            self.device,
            self._data_seed,
            accelerator.num_processes,
            accelerator.process_index,
            is_evaluation=is_evaluation,
        )

    def _create_dataloader(
        self, dataset: Any, kwargs: dict[str, Any]
    ) -> DataLoader[Any]:
        arguments = {"collate_fn": self.collate_fn, **kwargs}
        if kwargs.get("num_workers") is data.AUTO_NUM_WORKERS:
            arguments["num_workers"] = kwargs["num_workers"] = data.choose_num_workers(
                dataset, arguments, distributed.num_local_processes()
            )
        loader: DataLoader[Any] = DataLoader(dataset=dataset, **arguments)
        self._loaders_made.append(loader)
        return loader

    def _create_run_config(
        self,
        num_epochs: int,
        gradient_accumulation_steps: int,
        max_num_train_steps: int | None,
        per_device_batch_size: int,
        gradient_clip_value: float | None,
        gradient_clip_norm: float | None = None,
    ) -> TrainerRunConfig:
        """Record what the run was asked to do, and work out what follows from it."""
        accelerator = self._accelerator
        num_processes = accelerator.num_processes
        train_batch_size = data.batch_size_of_loader(
            self._train_dataloader, self._train_dl_kwargs, per_device_batch_size
        )
        eval_batch_size = data.batch_size_of_loader(
            self._eval_dataloader, self._eval_dl_kwargs, per_device_batch_size
        )
        steps = self._count_updates_per_epoch(gradient_accumulation_steps)
        if steps:
            in_epochs = num_epochs * steps
            max_num_train_steps = min(max_num_train_steps or in_epochs, in_epochs)
            num_epochs = math.ceil(max_num_train_steps / steps)
        return TrainerRunConfig(
            num_epochs=num_epochs,
            train_per_device_batch_size=train_batch_size,
            train_dl_kwargs=self._train_dl_kwargs,
            eval_per_device_batch_size=eval_batch_size,
            eval_dl_kwargs=self._eval_dl_kwargs,
            gradient_accumulation_steps=gradient_accumulation_steps,
            gradient_clip_value=gradient_clip_value,
            train_total_batch_size=train_batch_size
            and train_batch_size * num_processes * gradient_accumulation_steps,
            eval_total_batch_size=eval_batch_size and eval_batch_size * num_processes,
            num_update_steps_per_epoch=steps,
            num_local_update_steps_per_epoch=steps,
            max_num_train_steps=max_num_train_steps,
            is_local_process_zero=accelerator.is_local_main_process,
            is_world_process_zero=accelerator.is_main_process,
            is_distributed=accelerator.distributed_type != DistributedType.NO,
            mixed_precision=accelerator.mixed_precision,
            num_processes=num_processes,
            gradient_clip_norm=gradient_clip_norm,
            seed=self.seed,
            data_seed=self._data_seed,
        )

    def _count_updates_per_epoch(self, gradient_accumulation_steps: int) -> int | None:
        if self._train_dataloader is None:
            return 0
        num_batches = data.length_of(self._train_dataloader)
        if num_batches is None:
            return None
        if num_batches == 0:
            raise ValueError(
                "The training loader has no batches: the dataset is empty, or "
                "drop_last leaves out the only batch. Use more data or a smaller "
                "batch size."
            )
        return math.ceil(num_batches / gradient_accumulation_steps)

    def _create_window(self) -> AccumulationWindow:
        accelerator = self._accelerator
        return AccumulationWindow(
            self.run_config.gradient_accumulation_steps,
            accelerator.num_processes,
            accelerator.process_index,
            largest=distributed.largest,
            add_up=self._add_up,
            corrects_gradients=not self._engine.owns_gradients,
        )

    def _add_up(self, tensor: Tensor) -> Any:
        return self._accelerator.reduce(tensor.to(self.device), "sum")

    def _limit_batches(self) -> None:
        # Before the run config, so that schedules know the true length of the run.
        for callback in self.callback_handler:
            if isinstance(callback, LimitBatchesCallback):
                callback.limit(self)

    def _check_eval_batch_size(self) -> None:
        """Raise ValueError if evaluation would leave a process without samples."""
        if self.eval_dataset is None or not self.run_config.is_distributed:
            return
        num_samples = data.length_of(self.eval_dataset)
        batch_size = self.run_config.eval_per_device_batch_size
        if (
            num_samples is not None
            and batch_size is not None
            and not data.yields_batches(self.eval_dataset)
        ):
            data.BatchPlan(
                num_samples, batch_size, self.run_config.num_processes, even=True
            )

    # --------------------------------------------------------- the parts of the story

    def _begin_run(self, is_training: bool = True) -> None:
        launch.use_precision(self._accelerator, self._mixed_precision)
        self.interrupted = False
        self._noted_error = None
        self.callback_handler.raises_at_once = self._accelerator.num_processes == 1
        self._loaders_made = []
        if not is_training:  # it is still that run which may be saved
            self._last_trained_on = self._trained_on()
        self._train_dataloader = self._eval_dataloader = None
        self._train_dl_kwargs = self._eval_dl_kwargs = None
        if not is_training:
            return
        self.has_failed = self.is_resumed = False
        self._progress = RunProgress()
        self._epoch_random_states = self._ahead_random_states = None
        self._run_number = 0
        # Further runs go on with the weights of the first.
        self._run_id = self._run_id or secrets.token_hex(8)
        self._publish_progress()
        self.gradient_norm = None
        self._last_lr = None
        self._seed_run()
        forget_start_if_set_by_hand(self.optimizer)  # type: ignore[arg-type]

    def _prepare_callbacks(self) -> None:
        """Let callbacks forget earlier runs, and take over what a saved run knew."""
        self.callback_handler.call_event("_forget_earlier_runs", self)
        self.callback_handler.load_state_dict(self._resume_state.get("callbacks", {}))

    def _end_run(self) -> None:
        """Give the user's model and optimizer back as they came, only trained."""
        if self._prepared_model is not None:
            self.model = self.get_model(
                keep_torch_compile=self._prepared_model.was_compiled
            )
            self._prepared_model.restore()
            self._engine.release(self.get_model(keep_torch_compile=False))
            self.optimizer = self._plain_optimizer
            self._prepared_model, self._plain_optimizer = None, None
            self._backward_is_plain = False
            distributed.forget_prepared(self._accelerator)
        if self.optimizer is not None and self.scheduler is not None:
            remember_scheduled_values(self.optimizer)
        self._stop_workers()
        self._loaded_state, self._resume_state = {}, {}
        self._batch_output = None
        self._shrinker = None
        try:
            self._background_writer.wait()
        except CheckpointError as error:
            # In a run that went well it was waited for before: another error is raised.
            self.print(f"While cleaning up after an error: {error}")
        except KeyboardInterrupt:
            self._background_writer.abandon()
            raise

    def _stop_workers(self) -> None:
        for loader in (self._train_dataloader, self._eval_dataloader):
            if hasattr(loader, "stop_workers"):
                loader.stop_workers()

    def _seed_run(self) -> None:
        if self.seed is None:
            drawn = int(torch.randint(2**63 - 1, ()))
            self._data_seed = distributed.from_main_process(drawn, self.device)
        else:
            # Another run on the same trainer goes on, so it is not to repeat the first.
            self._data_seed = (
                data.derive_seed(self.seed, self._num_runs)
                if self._num_runs
                else self.seed
            )
            data.seed_everything(self._data_seed + self._accelerator.process_index)
        self._num_runs += 1

    def _start_schedule(self) -> None:
        """Apply the first value of a scheduler whose counter starts before it."""
        if (
            isinstance(self.scheduler, StatefulSchedulerBase)
            and self.scheduler._num_updates < 0
        ):
            self.scheduler.step()

    @property
    def _steps_scheduler(self) -> bool:
        return self.scheduler is not None and not isinstance(
            self.scheduler, ReduceLROnPlateau
        )

    def _step_scheduler_after_epoch(self) -> None:
        """Step a scheduler that goes by a metric of the epoch."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            name = self._name_of_plateau_metric
            value = self._latest_metrics().get(name)
            if value is None:  # to be told which there are
                value = self.run_history.get_latest_metric(name)
            self.scheduler.step(value)

    @property
    def _name_of_plateau_metric(self) -> str:
        if self.eval_dataset is None and self._plateau_metric == "eval_loss_epoch":
            return "train_loss_epoch"
        return self._plateau_metric

    @property
    def _clips_gradients(self) -> bool:
        config = self.run_config
        return (
            config.gradient_clip_value is not None
            or config.gradient_clip_norm is not None
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

    def _parameters_to_update(self) -> Iterator[Tensor]:
        """Yield those of the model and of the optimizer, each once."""
        groups = self.optimizer.param_groups  # type: ignore[union-attr]
        of_optimizer = (each for group in groups for each in group["params"])
        yield from dict.fromkeys(chain(self.model.parameters(), of_optimizer))

    def _without_gradient_sync(self) -> AbstractContextManager[Any]:
        if self._accelerator.num_processes == 1:
            return _AS_USUAL
        return self._engine.without_gradient_sync(self.model)

    def _batches_that_are_due(self, train_dl: Any) -> Iterator[tuple[int, Any, bool]]:
        """Yield the number of each batch, the batch, and whether it closes its window.

        A resumed epoch starts where it was interrupted.
        """
        first_step = self._progress.step
        self._set_epoch_of(train_dl)
        # First, since the length is that of the data at the start of the iteration.
        batches = data.LookAhead(self._start_iteration(train_dl, first_step))
        plan, num_batches = data.plan_of(train_dl), data.length_of(train_dl)
        self._window.start_epoch(
            plan, num_batches, is_exact=getattr(train_dl, "is_exact", False)
        )
        self._restore_open_window()
        if self._resume_state.get("ahead_random_states") is not None:
            self._restore_random_states("ahead_random_states")
            self._is_exhausted(batches)
        # In the middle of an epoch they are those after the loader was started.
        self._restore_random_states()
        for step, batch in enumerate(batches, first_step):
            self._ahead_random_states = None
            closes_window = self._window.is_closed_by(step, is_last=False) or (
                self._is_exhausted(batches) if plan is None else step + 1 == num_batches
            )
            yield step, batch, closes_window
        if self._progress.is_at_epoch_start:
            raise ValueError("The training loader yielded no batch: it has no data.")

    def _is_exhausted(self, batches: data.LookAhead) -> bool:
        """Say whether there is no other batch, by fetching it ahead.

        A state that is saved meanwhile has the random states that it is drawn from.
        """
        self._ahead_random_states = self._random_states()
        return batches.is_exhausted()

    def _set_epoch_of(self, train_dl: Any) -> None:
        """Tell a training loader which epoch it is to yield, and from where."""
        epoch = self.run_history.current_epoch
        if data.plan_of(train_dl) is not None:
            progress = self._progress
            train_dl.set_epoch(epoch, progress.step, progress.first_sample)
        elif hasattr(train_dl, "set_epoch"):
            train_dl.set_epoch(epoch)

    def _start_iteration(self, train_dl: Any, first_step: int) -> Iterator[Any]:
        if data.plan_of(train_dl) is not None:
            return iter(train_dl)
        # An order of the user's may follow from the random states at its start.
        self._restore_random_states("epoch_random_states")
        place = self._resume_state.pop("place", None)
        if place is not None and hasattr(train_dl, "go_to"):
            train_dl.go_to(place, first_step)
            return iter(train_dl)
        self._epoch_random_states = self._random_states()
        batches: Iterator[Any] = iter(train_dl)
        skip_batches(batches, first_step, train_dl)
        return batches

    def _warn_of_uncounted_updates(self) -> None:
        """Say what is not followed by an override of the epoch, after the first one."""
        if self._progress.epochs_done > 0 or not self._overrides("_run_train_epoch"):
            return
        event = "on_train_update_end"
        ignored = [
            getattr(listener, "__qualname__", event)
            for listener in self.callback_handler.listeners(event)
        ]
        if self._update_limit is not None:
            ignored.insert(0, f"max_num_train_steps={self._update_limit}")
        if ignored:
            warn(
                "Your _run_train_epoch made no update that the trainer could count, so "
                f"these are not followed: {', '.join(ignored)}. Call "
                "super()._run_train_epoch(train_dl) for the loop and override the "
                "methods of a step, or return True to end the run."
            )

    def _restore_open_window(self) -> None:
        """Put back what a saved run had accumulated of a window."""
        state = self._resume_state.pop("window", None)
        gradients = self._resume_state.pop("gradients", {})
        if state is not None:
            self._window.load_state_dict(state)
        set_gradients(self.get_model(keep_torch_compile=False), gradients)

    def _count_step(
        self, step: int, batch: Any, batch_output: Mapping[str, Any] | None
    ) -> None:
        progress = self._progress
        progress.step = step + 1
        progress.num_steps += 1
        share = self._share_of(step)
        if share is not None:
            progress.num_samples_seen += share.total
        else:
            output = batch_output or {"batch_size": data.num_samples_in(batch)}
            # Where nothing is known of the other processes, they have as many.
            progress.num_samples_seen += (
                output.get("batch_size", 0) * self._window.num_processes
            )
        self.num_steps = progress.num_steps
        self.num_samples_seen = progress.num_samples_seen

    def _publish_progress(self) -> None:
        self.num_updates = self._progress.num_updates
        self.num_steps = self._progress.num_steps
        self.num_samples_seen = self._progress.num_samples_seen
        self.run_history.current_step = self._progress.num_updates

    def _are_updates_used_up(self) -> bool:
        limit = self._update_limit
        return limit is not None and self._progress.num_updates >= limit

    def _items_of(
        self, batch_output: Mapping[str, Any], step: int
    ) -> tuple[NumItems, bool]:
        """Return how many items a batch has, and whether these are samples."""
        share = self._share_of(step)
        if share is not None and share.is_filler:
            return 0, True
        num_items = batch_output.get("num_items_in_batch")
        if num_items is None:
            return batch_output["batch_size"], True
        return num_items, False

    def _share_of(self, step: int) -> data.Share | None:
        """Return what this process has of a step, if it shares the data with others."""
        if self._window.num_processes == 1:
            return None
        share_of = getattr(self._train_dataloader, "share_of", None)
        return None if share_of is None else share_of(step)

    def _reset_trackers(self) -> None:
        self._loss_tracker.reset()
        self._scalar_trackers.clear()
        for name, state in self._resume_state.pop("trackers", {}).items():
            tracker = self._loss_tracker if name == "loss" else LossTracker()
            tracker.load_state_dict(state)
            if name != "loss":
                self._scalar_trackers[name] = tracker

    def _update_loss_tracker(self, batch_loss: Tensor, batch_size: NumItems) -> None:
        """Add a batch's loss to the epoch's, without waiting for the device."""
        self._loss_tracker.update(batch_loss, batch_size)

    def _track_scalars(
        self, batch_output: Mapping[str, Any], num_items: NumItems
    ) -> None:
        for name, value in batch_output.items():
            if not step_output.is_recorded(name, value):
                continue
            if name not in self._scalar_trackers:
                self._scalar_trackers[name] = LossTracker()
            self._scalar_trackers[name].update(value, num_items)

    def _add_epoch_loss_to_run_history(self, metric_name: str) -> None:
        """Record the means over all items on all processes.

        Args:
            metric_name: The name for the loss. Those of other scalars have their own
                name in place of "loss".
        """
        if self.run_history.metric_name_prefix.endswith(EVALUATION_PREFIX):
            metric_name = metric_name.removeprefix(EVALUATION_PREFIX)
        totals = {"loss": self._loss_tracker.totals()}
        for name, tracker in self._scalar_trackers.items():
            totals[name] = tracker.totals()
        for name, (total, count) in distributed.sum_over_processes(totals).items():
            if count > 0:
                self.run_history.update_metric(
                    metric_name.replace("loss", name, 1), total / count
                )

    @contextmanager
    def _modes_and_trackers_kept(self) -> Iterator[None]:
        """Put modes and the batch limit back, and give the block its own trackers."""
        trackers = self._loss_tracker, self._scalar_trackers
        limit = self.eval_batch_limit
        self._loss_tracker, self._scalar_trackers = LossTracker(), {}
        try:
            with modes.kept(self.model, self.get_model(keep_torch_compile=False)):
                yield
        finally:
            self.eval_batch_limit = limit
            self._loss_tracker, self._scalar_trackers = trackers

    def _metrics_apart(self, is_intermediate: bool) -> AbstractContextManager[Any]:
        """Keep the metrics of an intermediate evaluation out of the epochs' series."""
        history = self.run_history
        if not is_intermediate:
            return nullcontext()
        return history.prefixed(history.metric_name_prefix + INTERMEDIATE_PREFIX)

    def _count_recorded_metrics(self) -> dict[str, int]:
        history = self.run_history
        return {
            name: len(list(history.get_metric_values(name)))
            for name in history.get_metric_names()
        }

    # ------------------------------------------------- events, and how a run may end

    def _call_event(self, event: str, **kwargs: Any) -> None:
        """Call the callbacks for an event within an epoch."""
        if self.callback_handler.listeners(event):
            self._call(self.callback_handler.call_event, event, self, **kwargs)

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call what a user may have written.

        With several processes an error waits until all can act on it together: a
        process that left alone would leave the others waiting for it.
        """
        try:
            method(*args, **kwargs)
        except Exception as error:
            is_alone = self._accelerator.num_processes == 1
            if is_alone or distributed.is_on_all_processes(error):
                raise
            self._noted_error = self._noted_error or error

    def _notify(self, event: str, **kwargs: Any) -> None:
        """Call the callbacks for an event at which all processes act on an error."""
        self._call_event(event, **kwargs)
        self._agree_to_go_on()

    def _agree_to_go_on(self) -> None:
        """Raise on all processes what has waited on any of them."""
        error, self._noted_error = self._noted_error, None
        self.raise_on_all(error)

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

    @contextmanager
    def _ended_by(self, end: str) -> Iterator[None]:
        """Call the hook and the event that end a run, however it ends."""
        due = [
            partial(self._call, getattr(self, end)),
            partial(self._notify, f"on_{end}"),
        ]
        stops: list[StopTrainingError] = []
        try:
            try:
                yield
            except StopTrainingError as stop:
                distributed.settle(stop)
                self.print(stop)
                self.interrupted = isinstance(stop, TrainingInterruptedError)
                stops.append(stop)
                due.insert(0, partial(self._notify, "on_stop_training_error"))
            while due:
                try:
                    due.pop(0)()
                except StopTrainingError as stop:  # noqa: PERF203 (each on its own)
                    self.print(stop)  # the run is over as it is
                    stops.append(stop)
        except BaseException as error:
            distributed.settle(error)
            self._clean_up_after(error, due)
            raise
        for reason in stops:
            if isinstance(reason, NonFiniteLossError):
                raise reason

    def _clean_up_after(self, error: BaseException, due: list[partial[None]]) -> None:
        """Let callbacks close what they opened; an error of theirs hides no other."""
        self.has_failed = True
        call_event = self.callback_handler.call_event
        clean_ups = [
            partial(self._explain, error),
            partial(call_event, "on_exception", self, exception=error),
        ]
        # With several processes the others may be elsewhere, and be waited for.
        if self._accelerator.num_processes == 1:
            clean_ups += due
        for clean_up in clean_ups:
            try:
                clean_up()
            except Exception as another:  # noqa: PERF203 (each one on its own)
                self.print(f"While cleaning up after an error: {another!r}")
            except KeyboardInterrupt:  # a second Ctrl-C
                self._background_writer.abandon()
                raise

    def _explain(self, error: BaseException) -> None:
        explain(
            error,
            self.run_history.current_epoch,
            self._progress,
            self.run_config,
            self.last_checkpoint,
        )

    # ---------------------------------------------------------------- small helpers

    def advise(self) -> list[str]:
        """Print and return what would make runs like the last one faster.

        Nothing is changed. It speaks of the optimizer and, after a run, of loading the
        data and of the use of the GPU.
        """
        found = advice_for(self)
        for advice in found or ["Nothing to suggest."]:
            self.print(advice)
        return found

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
        return None if self._last_lr is None else [float(lr) for lr in self._last_lr]

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, once on each machine."""
        if self._accelerator.is_local_main_process:
            print(*args, **kwargs)  # noqa: T201 (this is what it is for)

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
        if self._prepared_model is not None and self._prepared_model.is_unwrapped(
            self.model
        ):
            return self.model  # Accelerate would search the disk for DeepSpeed first
        model: nn.Module = self._accelerator.unwrap_model(
            self.model, keep_torch_compile=keep_torch_compile
        )
        return model

    def _warn_of_oversights(self) -> None:
        # DeepSpeed holds copies of the parameters, not those of the model.
        if not self._engine.owns_gradients:
            checks.warn_of_untrained_parameters(self)
        checks.warn_of_misspelt_names(self)

    def _check_train_arguments(
        self,
        train_dataset: Any,
        num_epochs: int,
        max_num_train_steps: int | None,
        gradient_accumulation_steps: int,
        gradient_clip_value: float | None,
        gradient_clip_norm: float | None,
        create_scheduler_fn: Any,
    ) -> None:
        checks.check_is_at_least("num_epochs", num_epochs, 0)
        checks.check_is_at_least(
            "gradient_accumulation_steps", gradient_accumulation_steps, 1
        )
        if max_num_train_steps is not None:
            checks.check_is_at_least("max_num_train_steps", max_num_train_steps, 1)
        checks.check_clipping(gradient_clip_value, gradient_clip_norm)
        checks.check_scheduler_fn(create_scheduler_fn)
        checks.check_dataset_is_not_empty(train_dataset, "train_dataset")
        checks.check_dataset_serves_all(train_dataset, self._accelerator.num_processes)
        if not self._engine.knows(self.model):
            checks.check_optimizer(self.model, self.optimizer)
        if not self._overrides("optimizer_step", "_run_train_epoch", "_run_training"):
            checks.check_optimizer_needs_no_closure(self.optimizer)

    def _check_first_step(self, batch_output: Any) -> None:
        """Check what can only be known at the first step of a run."""
        step_output.check_loss(
            batch_output, needs_graph=not self._overrides("backward_step")
        )
        if not self._overrides("optimizer_step"):
            checks.check_optimizer_is_in_training_mode(self.optimizer)

    def _overrides(self, *methods: str) -> bool:
        """Say whether any of these methods is the user's own."""
        return any(
            getattr(getattr(self, name), "__func__", None) is not getattr(Trainer, name)
            for name in methods
        )


def _learning_rates_of(optimizer: Any) -> list[float | Tensor]:
    # Tensors are changed in place later; to read them now would wait for the device.
    rates = [group.get("lr", math.nan) for group in optimizer.param_groups]
    return [
        rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates
    ]


def _concatenate(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


class TrainerWithTimmScheduler(Trainer):
    """A trainer for the schedulers of timm, which are told the time.

    ``step_update`` is called after each update with the number of updates completed,
    and ``step`` after each epoch with the number of epochs completed, so that schedules
    in updates and in epochs both work. Arguments are those of :class:`Trainer`.
    """

    @property
    def _steps_scheduler(self) -> bool:
        return self.scheduler is not None

    def scheduler_step(self) -> None:
        """Tell the scheduler how many updates are completed."""
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=self._progress.num_updates)

    def _step_scheduler_after_epoch(self) -> None:
        """Tell the scheduler how many epochs are completed, and the plateau metric."""
        if self.scheduler is not None:
            metric = self._latest_metrics().get(self._name_of_plateau_metric)
            self.scheduler.step(self._progress.epochs_done + 1, metric)
