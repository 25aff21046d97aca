"""What exists only while a run does.

A call of ``train()``, ``evaluate()`` or ``predict()`` is a :class:`Run`. Runs nest: an
evaluation amid a training run is one of its own, and the outer one is there again when
it is left.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from itertools import count
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor
from torch.utils.data import IterableDataset

from pytorch_accelerated import checkpoint, checks, compat, data, distributed, modes
from pytorch_accelerated.data import loaders, sharing
from pytorch_accelerated.data.order import Share
from pytorch_accelerated.engines import launch
from pytorch_accelerated.errors import CheckpointError, warn
from pytorch_accelerated.means import Means
from pytorch_accelerated.metrics import start_metrics
from pytorch_accelerated.pace import Pace
from pytorch_accelerated.run_config import TrainerRunConfig
from pytorch_accelerated.schedulers.scheduler_base import (
    forget_start_if_set_by_hand,
    remember_scheduled_values,
)
from pytorch_accelerated.state import (
    BatchLayout,
    ProcessState,
    RunProgress,
    TrainingState,
)
from pytorch_accelerated.step_output import NumItems, num_items_of
from pytorch_accelerated.window import Accumulation, Window

if TYPE_CHECKING:
    from pytorch_accelerated.memory import BatchShrinker
    from pytorch_accelerated.trainer import Trainer


@dataclass(eq=False)
class Run:
    """One call of ``train()``, ``evaluate()`` or ``predict()``.

    Args:
        is_training: Whether it is one of ``train()``.
        is_iterated: Whether the caller's code runs between its batches.

    Attributes:
        training: The training run that this one is part of, or that was the last; this
            one itself if it trains. What is saved is the state of it.
        prepared: What gives the user's model and optimizer back at the end; shared by
            the runs inside of this one.
        is_plain_torch: Whether Accelerate adds nothing to passes and updates.
        accumulation: How the losses of its windows weigh.
        agrees_after_updates: Whether processes ask each other after each update whether
            one has to stop.
        window: The window that is open.
        means: Those of the epoch under way, or of the last one.
        pace: How long that takes.
        batch_output: What a step has returned, where an override does not pass it on.
        noted_error: What this process raises once all of them can act on it.
        state_to_resume: The folder to go on from, also where "auto" has found it.
        found: That of "auto", opened.
        loaded: What :meth:`Trainer.load_training_state` has loaded, without what the
            model and the optimizer have now.
        pending: What this process has not yet taken up of it.
        number: Tells the states of later runs in a folder from those of earlier ones.
    """

    is_training: bool = False
    is_iterated: bool = False

    # What was asked for.
    train_dataset: Any = None
    eval_dataset: Any = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    create_scheduler_fn: Callable[..., Any] | None = None
    num_epochs: int | None = 1
    max_num_train_steps: int | None = None
    batch_size: int = 8
    eval_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    gradient_clip_value: float | None = None
    gradient_clip_norm: float | None = None
    train_dataloader_kwargs: Mapping[str, Any] | None = None
    eval_dataloader_kwargs: Mapping[str, Any] | None = None
    plateau_metric: str = "eval_loss_epoch"
    resume_from: str | os.PathLike[str] | None = None

    # What it works with.
    config: TrainerRunConfig = None  # type: ignore[assignment]
    train_dataloader: Any = None
    eval_dataloader: Any = None
    # What they were made with; None where they came ready.
    train_dl_kwargs: dict[str, Any] | None = None
    eval_dl_kwargs: dict[str, Any] | None = None
    loaders_made: list[Any] = field(default_factory=list)
    data_seed: int = 0
    prepared: distributed.Prepared | None = None
    is_plain_torch: bool = False
    scheduler: Any = None
    accumulation: Accumulation = field(default_factory=lambda: Accumulation(1))
    shrinker: BatchShrinker | None = None
    agrees_after_updates: bool = False

    # Where it stands.
    is_under_way: bool = False
    progress: RunProgress = field(default_factory=RunProgress)
    num_updates: int | None = None
    num_steps: int | None = None
    num_samples_seen: int | None = None
    window: Window | None = None
    means: Means = field(default_factory=Means)
    pace: Pace = field(default_factory=Pace)
    batch_output: dict[str, Any] | None = None
    gradient_norm: Tensor | None = None
    learning_rates: list[float | Tensor] | None = None
    noted_error: Exception | None = None
    stopped_by: Exception | None = None
    interrupted: bool = False
    has_failed: bool = False

    # How it goes on from another one.
    is_resumed: bool = False
    state_to_resume: str | os.PathLike[str] | None = None
    found: checkpoint.Checkpoint | None = None
    loaded: TrainingState | None = None
    pending: ProcessState | None = None
    number: int = 0
    epoch_random_states: dict[str, Any] | None = None
    ahead_random_states: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.training: Run = self
        if self.eval_dataset is None and self.plateau_metric == "eval_loss_epoch":
            self.plateau_metric = "train_loss_epoch"

    # ------------------------------------------------------------ what it works with

    def prepare_model_and_optimizer(self, trainer: Trainer) -> None:
        """Hand the user's to Accelerate, unless this is amid another run."""
        if self.prepared is not None:
            return
        engine = trainer._engine
        self.prepared = distributed.Prepared(trainer.model, trainer.optimizer)
        if not self.is_training:
            trainer.model = engine.prepare_for_evaluation(trainer.model)
            return
        trainer.model, trainer.optimizer = engine.prepare(
            trainer.model, trainer.optimizer
        )
        self.is_plain_torch = distributed.is_plain_torch(trainer._accelerator)
        if self.is_plain_torch:
            # Accelerate's wrapper would do nothing else than cost time.
            trainer.optimizer = self.prepared.optimizer
        # What an earlier run or a learning rate finder may have left.
        trainer.optimizer.zero_grad()  # type: ignore[union-attr]

    def prepare_loader(
        self, loader: Any, accelerator: Accelerator, *, is_evaluation: bool
    ) -> Any:
        """Return the loader that yields this process's batches, on its device."""
        if loader is None:
            return None
        device = accelerator.device
        num_processes, index = accelerator.num_processes, accelerator.process_index
        is_split = num_processes > 1 and sharing.is_split_by_process(loader)
        is_ours = is_evaluation or any(loader is made for made in self.loaders_made)
        if not is_split and is_ours and loaders.is_plain(loader):
            return loaders.PlannedLoader(
                loader,
                device,
                self.data_seed,
                num_processes=num_processes,
                process_index=index,
                even=is_evaluation,
            )
        if is_split or num_processes == 1:
            return loaders.DeviceLoader(loader, device)
        return sharing.SharedLoader(
            loader,
            device,
            self.data_seed,
            num_processes,
            index,
            is_evaluation=is_evaluation,
        )

    def stop_workers(self) -> None:
        """End the worker processes of the loaders."""
        for loader in (self.train_dataloader, self.eval_dataloader):
            if hasattr(loader, "stop_workers"):
                loader.stop_workers()

    def follow_data_seed(self, data_seed: int) -> None:
        """Go on with the order of the data of another run."""
        self.data_seed = data_seed
        self.config = replace(self.config, data_seed=data_seed)
        for loader in (self.train_dataloader, self.eval_dataloader):
            if hasattr(loader, "use_data_seed"):
                loader.use_data_seed(data_seed)

    def layout(self) -> BatchLayout | None:
        """Return how the run cuts its epochs; None if it has not come that far."""
        if self.config is None:
            return None
        plan = loaders.plan_of(self.train_dataloader)
        return BatchLayout(
            num_samples=None if plan is None else plan.length,
            batch_size=self.config.train_per_device_batch_size,
            num_processes=self.config.num_processes,
            accumulation=self.config.gradient_accumulation_steps,
        )

    def last_epoch(self, epoch: int) -> int:
        """Return the number of the last epoch, from that of the present one."""
        return epoch - self.progress.epochs_done + self.config.num_epochs - 1

    @property
    def size_of_eval_batches(self) -> int:
        """Samples in an evaluation batch of one process, where no number is given."""
        config, asked = self.config, self.eval_batch_size
        if config is not None:
            asked = config.eval_per_device_batch_size or asked
            asked = asked or config.train_per_device_batch_size
        return asked or self.batch_size

    # ---------------------------------------------------------------- where it stands

    @property
    def is_used_up(self) -> bool:
        """Whether the updates that the run may make have been made."""
        limit = self.max_num_train_steps
        return limit is not None and self.progress.num_updates >= limit

    def epochs_due(self) -> Iterable[int]:
        """Return the epochs that are left; they end only if their number was given."""
        # Updates that are not applied count for nothing: it may take more epochs.
        limit = None if self.num_epochs is None else self.config.num_epochs
        done = self.progress.epochs_done
        return count(done) if limit is None else range(done, limit)

    @property
    def samples_per_second(self) -> float:
        """Training samples in a second of the epoch; 0 where none has been seen."""
        return self.pace.samples_per_second(self.progress.num_samples_seen)

    def publish_progress(self) -> None:
        """Let scripts read where the run stands; what they set goes no further."""
        self.num_updates = self.progress.num_updates
        self.num_steps = self.progress.num_steps
        self.num_samples_seen = self.progress.num_samples_seen

    # -------------------------------------------------------------------- its steps

    def resume_outside_steps(self) -> None:
        """Take up random states that were not saved amid the steps of an epoch."""
        if self.pending is not None and not self.progress.is_amid_steps:
            self.set_random_states(self.pending.random_states)
            self.pending = None

    def set_epoch_of(self, train_dl: Any, epoch: int) -> None:
        """Tell a training loader which epoch it is to yield, and from where."""
        progress = self.progress
        if loaders.plan_of(train_dl) is not None:
            train_dl.set_epoch(epoch, progress.step, progress.first_sample)
        elif hasattr(train_dl, "set_epoch"):
            train_dl.set_epoch(epoch)

    def windows(self, train_dl: Any, epoch: int) -> Iterator[Window]:
        """Yield the windows of an epoch that are due.

        A resumed epoch starts where it was interrupted.

        Args:
            train_dl: The training loader.
            epoch: Its number in the run history.
        """
        pending, self.pending = self.pending, None
        self.set_epoch_of(train_dl, epoch)
        # First, since the length is that of the data at the start of the iteration.
        batches = loaders.LookAhead(self._start_iteration(train_dl, pending), self.pace)
        plan, num_batches = loaders.plan_of(train_dl), loaders.length_of(train_dl)
        accumulation = self.accumulation
        accumulation.start_epoch(
            plan, num_batches, is_exact=getattr(train_dl, "is_exact", False)
        )
        if pending is not None:
            if pending.ahead_random_states is not None:
                self.set_random_states(pending.ahead_random_states)
                self._has_ended(batches)  # fetches what was fetched ahead
            # In the middle of an epoch they are those after the loader was started.
            self.set_random_states(pending.random_states)

        def is_last(step: int) -> bool:
            self.ahead_random_states = None
            if (step + 1) % accumulation.steps_per_window == 0:
                return True
            return self._has_ended(batches) if plan is None else step + 1 == num_batches

        while not batches.is_exhausted():
            self.window = Window(batches, self.progress.step, is_last)
            yield self.window
        self.window = None
        if self.progress.is_at_epoch_start:
            raise ValueError("The training loader yielded no batch: it has no data.")

    def _start_iteration(
        self, train_dl: Any, pending: ProcessState | None
    ) -> Iterator[Any]:
        if loaders.plan_of(train_dl) is not None:
            return iter(train_dl)
        pending, first_step = pending or ProcessState(), self.progress.step
        # An order of the user's may follow from the random states at its start.
        self.set_random_states(pending.epoch_random_states)
        if pending.place is not None and hasattr(train_dl, "go_to"):
            train_dl.go_to(pending.place, first_step)
            return iter(train_dl)
        self.epoch_random_states = self.random_states()
        batches: Iterator[Any] = iter(train_dl)
        _skip_batches(batches, first_step, train_dl)
        return batches

    def _has_ended(self, batches: loaders.LookAhead) -> bool:
        """Say whether there is no other batch, by fetching it ahead.

        A state that is saved meanwhile has the random states that it is drawn from.
        """
        self.ahead_random_states = self.random_states()
        return batches.is_exhausted()

    def share_of(self, step: int) -> Share | None:
        """Return what this process has of a step, if it shares the data with others."""
        if self.accumulation.num_processes == 1:
            return None
        share_of = getattr(self.train_dataloader, "share_of", None)
        return None if share_of is None else share_of(step)

    def items_of(
        self, batch_output: Mapping[str, Any], step: int
    ) -> tuple[NumItems, bool]:
        """Return how many items a batch has, and whether these are samples."""
        share = self.share_of(step)
        if share is not None and share.is_filler:
            return 0, True
        are_samples = batch_output.get("num_items_in_batch") is None
        return num_items_of(batch_output), are_samples

    def add_to_means(
        self,
        trainer: Trainer,
        batch: Any,
        batch_output: Mapping[str, Any],
        num_items: NumItems,
    ) -> None:
        """Add the scalars of a batch, and what the metrics are given of it."""
        self.means.add_scalars(batch_output, num_items)
        if self.means.metrics is not None:
            inputs = trainer.calculate_metric_inputs(batch, batch_output)
            self._refuse_names_of_scalars(self.means.metrics.names)
            self.means.metrics.update(num_items, inputs)

    def count_step(
        self, step: int, batch: Any, batch_output: Mapping[str, Any] | None
    ) -> None:
        """Note that the passes of a batch are done."""
        progress = self.progress
        progress.step = step + 1
        progress.num_steps += 1
        share = self.share_of(step)
        if share is not None:
            number = share.total
        else:
            output = batch_output or {"batch_size": loaders.num_samples_in(batch)}
            # Where nothing is known of the other processes, they have as many.
            number = output.get("batch_size", 0) * self.accumulation.num_processes
        # Not in place: it may be a tensor, and was read by others.
        progress.num_samples_seen = progress.num_samples_seen + number
        self.publish_progress()

    def note_learning_rates(self, optimizer: Any) -> None:
        """Keep the rates that an update was made with."""
        # Tensors are changed in place later; reading them would wait for the device.
        rates = [group.get("lr", math.nan) for group in optimizer.param_groups]
        self.learning_rates = [
            rate.detach().clone() if isinstance(rate, Tensor) else rate
            for rate in rates
        ]

    def results_of_epoch(self) -> dict[str, Any]:
        """Return the means over all items, and the metrics, of all processes."""
        totals = distributed.sum_over_processes(self.means.totals())
        results: dict[str, Any] = {
            name: total / count for name, (total, count) in totals.items() if count > 0
        }
        if self.means.metrics is not None:
            metrics = self.means.metrics.compute()
            self._refuse_names_of_scalars(metrics.keys())
            results.update(metrics)
        return results

    def _refuse_names_of_scalars(self, names: AbstractSet[str]) -> None:
        if clash := names & {"loss", *self.means.scalars}:
            raise ValueError(
                f"The step returns a number named {min(clash)!r}, which is a metric of "
                "the trainer too. Give one of them another name."
            )

    def random_states(self) -> dict[str, Any]:
        """Return those of this process, and of the generators of a user's loader."""
        generators = loaders.generators_of(self.train_dataloader)
        return {
            **checkpoint.get_random_states(),
            "loader": [generator.get_state() for generator in generators],
        }

    def set_random_states(self, states: Mapping[str, Any] | None) -> None:
        """Put back what :meth:`random_states` returned."""
        if states is None:
            return
        checkpoint.set_random_states(states)
        generators = loaders.generators_of(self.train_dataloader)
        saved = states.get("loader", [])
        for generator, state in zip(generators, saved, strict=False):
            generator.set_state(state)


class UnderWay:
    """Makes a run that of its trainer for a block, and gives everything back after it.

    Args:
        trainer: The trainer.
        run: The run.
    """

    def __init__(self, trainer: Trainer, run: Run) -> None:
        self._trainer = trainer
        self._run = run
        self._outer = trainer._run
        self._model = trainer.model
        self._random_states: dict[str, Any] | None = None

    def __enter__(self) -> None:
        """Begin the run."""
        trainer, run, outer = self._trainer, self._run, self._outer
        accelerator = trainer._accelerator
        launch.use_precision(trainer._mixed_precision)
        trainer.callback_handler.raises_at_once = accelerator.num_processes == 1
        if run.is_training:
            # Further runs go on with the weights of the first.
            trainer._run_id = trainer._run_id or distributed.object_from_main_process(
                secrets.token_hex(8)
            )
            run.publish_progress()
            trainer.run_history.current_step = 0
            run.data_seed = _seed_run(trainer)
            forget_start_if_set_by_hand(trainer.optimizer)  # type: ignore[arg-type]
        else:
            checks.check_can_evaluate(run)
            run.training = outer.training
            run.data_seed = outer.training.data_seed
        if outer.is_under_way:
            run.prepared = outer.prepared
            self._random_states = checkpoint.get_random_states()
            self._was_timed = outer.training.pace.pause()
        run.is_under_way = True
        trainer._run = run

    def __exit__(self, *error: object) -> None:
        """End the run, or go on with the one that it was amid."""
        trainer, run = self._trainer, self._run
        run.is_under_way = False
        run.pace.pause()
        run.stop_workers()
        if self._random_states is not None:
            trainer._run, trainer.model = self._outer, self._model
            checkpoint.set_random_states(self._random_states)
            if self._was_timed:
                self._outer.training.pace.go_on()
            return
        self._give_back()
        if run.scheduler is not None and trainer.optimizer is not None:
            remember_scheduled_values(trainer.optimizer)
        run.loaded = run.found = run.pending = run.shrinker = run.window = None
        run.batch_output = run.stopped_by = None
        run.loaders_made = []
        try:
            trainer._writer.wait()
        except CheckpointError as failed:
            # In a run that went well it was waited for before: another error is raised.
            trainer.print(f"While cleaning up after an error: {failed}")

    def _give_back(self) -> None:
        """Give the user's model and optimizer back as they came, only trained."""
        trainer, run = self._trainer, self._run
        if run.prepared is None:
            return
        trainer.model = trainer.get_model(keep_torch_compile=run.prepared.was_compiled)
        run.prepared.restore()
        trainer._engine.release(trainer.get_model(keep_torch_compile=False))
        trainer.optimizer = run.prepared.optimizer
        run.prepared = None
        compat.forget_prepared(trainer._accelerator)


class Aside:
    """Gives an evaluation means of its own, and takes it out of the time of training.

    Afterwards these, the modes of all modules and the limit on the batches are those
    from before.

    Args:
        trainer: The trainer.
        metrics: What the evaluation calculates besides.
    """

    def __init__(
        self, trainer: Trainer, metrics: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self._trainer = trainer
        self._metrics = metrics

    def __enter__(self) -> None:
        """Put the means of the run aside."""
        trainer = self._trainer
        self._pace = trainer._run.training.pace
        self._was_timed = self._pace.pause()
        self._modes = modes.of(trainer.get_model(keep_torch_compile=False))
        self._means, self._limit = trainer._run.means, trainer.eval_batch_limit
        trainer._run.means = Means(start_metrics(self._metrics, trainer.device))

    def __exit__(self, *error: object) -> None:
        """Put everything back."""
        trainer = self._trainer
        modes.put_back(trainer.model, self._modes)
        trainer._run.means, trainer.eval_batch_limit = self._means, self._limit
        if self._was_timed:
            self._pace.go_on()


class OfRun:
    """A name of the trainer's that belongs to the run under way, or to the last one.

    Args:
        path: Where the run has it.
    """

    def __init__(self, path: str) -> None:
        self._get = attrgetter(path)
        self._owner, _, self._name = path.rpartition(".")

    def __get__(self, trainer: Any, kind: type) -> Any:
        return self if trainer is None else self._get(trainer._run)

    def __set__(self, trainer: Any, value: Any) -> None:
        if "_run" not in vars(trainer):  # a subclass may set it before our constructor
            trainer._run = Run()
        run = trainer._run
        setattr(attrgetter(self._owner)(run) if self._owner else run, self._name, value)


def of_run(path: str) -> Any:
    """Return an :class:`OfRun`, which to a type checker is what it stands for."""
    return OfRun(path)


def _seed_run(trainer: Trainer) -> int:
    """Seed the generators if the trainer has a seed; return that of the data."""
    accelerator, number = trainer._accelerator, trainer._num_runs
    if trainer.seed is None:
        drawn = int(torch.randint(2**63 - 1, ()))
        return distributed.object_from_main_process(drawn)
    # Another run on the same trainer goes on, so it is not to repeat the first.
    seed = data.derive_seed(trainer.seed, number) if number else trainer.seed
    data.seed_everything(seed + accelerator.process_index)
    return seed


def create_run_config(trainer: Trainer, **asked: Any) -> TrainerRunConfig:
    """Record what a run was asked to do, and work out what follows from it."""
    run, accelerator = trainer._run, trainer._accelerator
    num_processes = accelerator.num_processes
    accumulation = asked["gradient_accumulation_steps"]
    batch_size = asked.pop("per_device_batch_size")
    train_batch_size = loaders.batch_size_of_loader(
        run.train_dataloader, run.train_dl_kwargs, batch_size
    )
    eval_batch_size = loaders.batch_size_of_loader(
        run.eval_dataloader, run.eval_dl_kwargs, batch_size
    )
    updates = _count_updates_per_epoch(run.train_dataloader, accumulation)
    if asked["num_epochs"] is None:
        asked["num_epochs"] = asked["max_num_train_steps"]  # each has an update
    if updates:
        in_epochs = asked["num_epochs"] * updates
        limit = min(asked["max_num_train_steps"] or in_epochs, in_epochs)
        asked.update(max_num_train_steps=limit, num_epochs=math.ceil(limit / updates))
    return TrainerRunConfig(
        **asked,
        train_per_device_batch_size=train_batch_size,
        train_dl_kwargs=run.train_dl_kwargs,
        eval_per_device_batch_size=eval_batch_size,
        eval_dl_kwargs=run.eval_dl_kwargs,
        train_total_batch_size=train_batch_size
        and train_batch_size * num_processes * accumulation,
        eval_total_batch_size=eval_batch_size and eval_batch_size * num_processes,
        num_update_steps_per_epoch=updates,
        num_local_update_steps_per_epoch=updates,
        is_local_process_zero=accelerator.is_local_main_process,
        is_world_process_zero=accelerator.is_main_process,
        is_distributed=accelerator.distributed_type != DistributedType.NO,
        mixed_precision=accelerator.mixed_precision,
        num_processes=num_processes,
        seed=trainer.seed,
        data_seed=run.data_seed,
    )


def _count_updates_per_epoch(train_dataloader: Any, accumulation: int) -> int | None:
    if train_dataloader is None:
        return 0
    num_batches = loaders.length_of(train_dataloader)
    if num_batches is None:
        return None
    if num_batches == 0:
        raise ValueError(
            "The training loader has no batches: the dataset is empty, or "
            "drop_last leaves out the only batch. Use more data or a smaller "
            "batch size."
        )
    return math.ceil(num_batches / accumulation)


def create_accumulation(trainer: Trainer) -> Accumulation:
    """Return what weights the losses of a run."""
    accelerator = trainer._accelerator
    return Accumulation(
        trainer.run_config.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
        corrects_gradients=not trainer._engine.owns_gradients,
    )


def _skip_batches(batches: Iterator[Any], number: int, loader: Any) -> None:
    """Take the batches that are done from a loader that cannot leave them out."""
    if number == 0:
        return
    is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
    warn(
        f"To find its place, the run loads {number} batches again that it has trained "
        "on. "
        + (
            "A dataset or loader with state_dict() and load_state_dict() would be set "
            "there at once."
            if is_stream
            else "The loader or sampler is yours: whether they are the same batches "
            "depends on its order being the same in each run."
        )
    )
    for _ in range(number):
        next(batches, None)
