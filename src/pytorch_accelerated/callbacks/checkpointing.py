"""Callbacks that save: the best model, and states to resume from."""

from __future__ import annotations

import math
import operator
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytorch_accelerated.arguments import names_what_was_meant
from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data
from pytorch_accelerated.callbacks.best import (
    BestSoFar,
    check_watch_metric,
    decided_by_main_process,
    is_of_intermediate_evaluations,
    latest_value,
)
from pytorch_accelerated.checkpoint import (
    Checkpoint,
    DirectoryLock,
    is_legacy_training_state,
    list_checkpoints,
    prune,
)
from pytorch_accelerated.checkpoint.files import absolute, check_storable
from pytorch_accelerated.console import brief
from pytorch_accelerated.errors import CheckpointError, warn

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


_NAME = re.compile(r"(epoch|step)_\d+|final")


class SaveBestModelCallback(TrainerCallback):
    """Saves the model whenever a metric is better than before.

    The file also holds the value of the metric, under its name and under ``"loss"``.
    A value that is NaN or infinite is never the best. All processes follow the decision
    of the main one. A metric of the evaluations amid epochs, such as
    ``intermediate_eval_loss``, is looked at after each of them.

    Args:
        save_path: The file to save to. Missing parent folders are created.
        watch_metric: The name of the metric in the run history.
        greater_is_better: Whether a greater value of the metric is better.
        reset_on_train: Whether each call of ``train()`` starts without a best value. A
            run that is resumed keeps it in any case.
        save_optimizer: Whether to save the state of the optimizer as well.
        save_scheduler: Whether to save the state of the scheduler as well.
        load_saved_checkpoint: Whether the trainer is left with the best weights at the
            end of the run, if any have been saved. A run that ends with an error keeps
            those that it has.

    Attributes:
        best_metric: The best value so far, None before the first.
        best_metric_epoch: The number of its epoch.
        operator: Says whether its first argument is better than its second.
    """

    best_metric: float | None = None
    best_metric_epoch: int | None = None

    @names_what_was_meant
    def __init__(
        self,
        save_path: str | Path = "best_model.pt",
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool = False,
        reset_on_train: bool = True,
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        load_saved_checkpoint: bool = True,
    ) -> None:
        self.save_path = save_path
        self.watch_metric = watch_metric
        self.greater_is_better = greater_is_better
        self.operator: Callable[[Any, Any], bool] = (
            operator.gt if greater_is_better else operator.lt
        )
        self.reset_on_train = reset_on_train
        self.save_optimizer = save_optimizer
        self.save_scheduler = save_scheduler
        self.load_saved_checkpoint = load_saved_checkpoint

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        self.save_path = type(self.save_path)(absolute(self.save_path))
        if self.reset_on_train:
            self.best_metric = self.best_metric_epoch = None

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that the metric can be watched."""
        self._check_metric(trainer)

    def _check_metric(self, trainer: Trainer) -> None:
        check_watch_metric(
            trainer, self.watch_metric, greater_is_better=self.greater_is_better
        )

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the model if this epoch is the best so far."""
        if not is_of_intermediate_evaluations(self.watch_metric):
            self._save_if_best(trainer)

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the model if a metric of intermediate evaluations is the best so far."""
        if kwargs.get("is_intermediate", False) and is_of_intermediate_evaluations(
            self.watch_metric
        ):
            self._save_if_best(trainer)

    def _save_if_best(self, trainer: Trainer) -> None:
        value = latest_value(trainer, self.watch_metric)
        best = BestSoFar(
            greater_is_better=self.greater_is_better, value=self.best_metric
        )
        if decided_by_main_process(trainer, best.is_beaten_by(value)):
            self.best_metric = float(value)
            self.best_metric_epoch = trainer.run_history.current_epoch
            about = {self.watch_metric: self.best_metric, "loss": self.best_metric}
            trainer.save_checkpoint(
                save_path=self.save_path,
                checkpoint_kwargs=about,
                save_optimizer=self.save_optimizer,
                save_scheduler=self.save_scheduler,
            )

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Load the best weights, if some have been saved and the run went well."""
        if not self.load_saved_checkpoint or trainer.has_failed:
            return
        if self.best_metric_epoch is None:
            trainer.print("No model was saved in this run; keeping the last weights")
        elif not Path(self.save_path).exists():
            warn(
                f"The best model, of epoch {self.best_metric_epoch}, is no longer at "
                f"{self.save_path}; the trainer keeps the last weights."
            )
        else:
            trainer.print(
                f"Loading the best model, of epoch {self.best_metric_epoch} with "
                f"{self.watch_metric}: {brief(self.best_metric)}"
            )
            trainer.load_checkpoint(self.save_path)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and its epoch."""
        return {
            "best_metric": self.best_metric,
            "best_metric_epoch": self.best_metric_epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the best value and its epoch."""
        self.best_metric = state["best_metric"]
        self.best_metric_epoch = state["best_metric_epoch"]


class SaveTrainingStateCallback(TrainerCallback):
    """Saves training states, from which ``train(resume_from=...)`` can go on.

    They are folders: ``epoch_<n>``, saved once an epoch and its evaluation are done,
    ``step_<n>``, saved after the n-th update, and ``final``, saved at the end of a run
    that did not fail. The other callbacks have seen the epoch or the step by then, so
    that their states fit.

    Old folders are deleted only after a new one is complete, by the main process, and
    only if this callback has written them: in this run, or in the one that it goes on
    from. Another callback of the run that shares ``save_dir`` keeps its own. A
    callback is known by how often it saves.

    Args:
        save_dir: The folder that holds them.
        save_every_n_epochs: Epochs between two of them; by default none are saved.
        save_every_n_steps: Updates between two of them, counted over the whole run,
            also when it is resumed; by default none are saved.
        save_at_end: Whether to save ``final``, which does not count as one of
            ``max_checkpoints``.
        max_checkpoints: How many of the newest to keep, at least 1; by default all.
        save_every_n_minutes: Minutes between two of them, saved after an update; by
            default none are saved.
        keep_best: How many of the epochs with the best ``watch_metric`` to keep, beside
            the newest.
        watch_metric: The metric that says which epochs are best.
        greater_is_better: Whether a greater value of it is better.
        asynchronous: Whether training goes on while a state is written: it waits for
            the copy to the host's memory only. The next save and the end of the run
            wait until the one before is complete, and old folders are deleted then.
        on_save_error: What to do if a state cannot be saved, for instance because the
            disk is full: "warn" goes on training and tries again when the next one is
            due, "raise" ends the run. At the end of a run the error is always raised.
        overwrite: Whether a run may start, and replace states as it comes to their
            names, although ``save_dir`` holds states of another run. Those that it does
            not come to stay. By default such a run is refused, unless it was told by
            ``resume_from`` to go on from there. Further runs of one trainer are one.

    Raises:
        CheckpointError: At the start of a run, if another one writes to ``save_dir`` or
            has left its states there, or if it cannot be written to. And there, or
            after the first update, if the state of the model, the optimizer, the
            scheduler or a callback is such that it could not be loaded again.
    """

    may_stop_alone = False
    # Before the best weights are loaded.
    called_first: tuple[str, ...] = ("on_training_run_end",)
    called_last: tuple[str, ...] = ("on_train_step_end", "on_training_run_epoch_end")

    # What subclasses that were written for 0.1.61 do not set.
    save_every_n_minutes: float | None = None
    keep_best: int = 0
    watch_metric: str = "eval_loss_epoch"
    greater_is_better: bool = False
    asynchronous: bool = False
    on_save_error: Literal["warn", "raise"] = "warn"
    overwrite: bool = False
    _saved_checkpoints: Sequence[Path] = ()  # oldest first; scripts look at them
    _lock: DirectoryLock | None = None
    _saving: Path | None = None
    _global_step: int = 0
    _is_checked: bool = False
    _last_save: float = 0.0

    @names_what_was_meant
    def __init__(
        self,
        save_dir: str | Path = "training_states",
        save_every_n_epochs: int | None = None,
        save_every_n_steps: int | None = None,
        save_at_end: bool = True,
        max_checkpoints: int | None = None,
        *,
        save_every_n_minutes: float | None = None,
        keep_best: int = 0,
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool = False,
        asynchronous: bool = False,
        on_save_error: Literal["warn", "raise"] = "warn",
        overwrite: bool = False,
    ) -> None:
        _check_at_least_one(
            save_every_n_epochs=save_every_n_epochs,
            save_every_n_steps=save_every_n_steps,
            max_checkpoints=max_checkpoints,
        )
        if save_every_n_minutes is not None and not save_every_n_minutes > 0:
            raise ValueError(
                f"save_every_n_minutes must be above 0, got {save_every_n_minutes}."
            )
        if keep_best and max_checkpoints is None:
            raise ValueError(
                f"keep_best={keep_best} has no meaning while all are kept. Say with "
                "max_checkpoints how many of the newest to keep besides."
            )
        if on_save_error not in ("warn", "raise"):
            raise ValueError(
                f"on_save_error must be 'warn' or 'raise', got {on_save_error!r}."
            )
        self.save_dir: Path = Path(save_dir)
        self.save_every_n_epochs = save_every_n_epochs
        self.save_every_n_steps = save_every_n_steps
        self.save_at_end = save_at_end
        self.max_checkpoints = max_checkpoints
        self.save_every_n_minutes = save_every_n_minutes
        self.keep_best = keep_best
        self.watch_metric = watch_metric
        self.greater_is_better = greater_is_better
        self.asynchronous = asynchronous
        self.on_save_error = on_save_error
        self.overwrite = overwrite

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        self.save_dir = absolute(self.save_dir)
        self._saving, self._is_checked, self._global_step = None, False, 0
        self._last_save = time.monotonic()

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Find the folders of earlier runs, and where this run starts."""
        if self.keep_best:
            check_watch_metric(
                trainer, self.watch_metric, greater_is_better=self.greater_is_better
            )
        _check_can_be_saved(trainer)
        if trainer._accelerator.is_main_process:
            self._take_over_folder(trainer)
        self._global_step = trainer.num_updates or 0

    @property
    def identity(self) -> str:
        """Says how often it saves, which tells its states from those of others."""
        return (
            f"{self.save_every_n_epochs} epochs, {self.save_every_n_steps} steps, "
            f"{self.save_every_n_minutes} minutes"
        )

    def _take_over_folder(self, trainer: Trainer) -> None:
        self._release_lock()
        self._lock = DirectoryLock(self.save_dir, owner=trainer._run_id)
        self._lock.acquire()
        run, states = trainer._run, list_checkpoints(self.save_dir)
        # What a longer run left here before is not newer than what comes now.
        run.number = max([run.number, *(each.run_number + 1 for each in states)])
        if self.overwrite or self._is_gone_on_from(trainer):
            return
        of_others = [each.path for each in states if each.run_id != trainer._run_id]
        of_others += filter(is_legacy_training_state, self.save_dir.iterdir())
        names = [path.name for path in of_others if _NAME.fullmatch(path.name)]
        if names:
            raise CheckpointError(
                f"{self.save_dir} holds training states of another run "
                f"({', '.join(names[-3:])}), which this run might replace. To go on "
                "from them, pass resume_from='auto' to train(); to keep them, save to "
                "another folder; to have them replaced, create the callback with "
                "overwrite=True."
            )

    def _is_gone_on_from(self, trainer: Trainer) -> bool:
        """Say whether the run was told to go on from a state in the folder."""
        asked = trainer._run.resume_from
        return asked == "auto" or (
            asked is not None and absolute(asked).parent == self.save_dir
        )

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    @event_with_data
    def on_train_step_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save if this step has made an update, and it is time to."""
        num_updates = trainer.num_updates
        if not isinstance(num_updates, int):
            num_updates = self._global_step + 1
        if num_updates != self._global_step:
            self._global_step = num_updates
            if not self._is_checked:  # now optimizers have their states
                _check_can_be_saved(trainer)
                self._is_checked = True
            every = self.save_every_n_steps
            is_due = every is not None and num_updates % every == 0
            if is_due or self._is_minute_due(trainer):
                self._save(trainer, f"step_{num_updates}")

    def _is_minute_due(self, trainer: Trainer) -> bool:
        if self.save_every_n_minutes is None:
            return False
        seconds = time.monotonic() - self._last_save
        is_due = seconds >= 60 * self.save_every_n_minutes
        return decided_by_main_process(trainer, is_due)

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save if it is time to."""
        epoch, every = trainer.run_history.current_epoch, self.save_every_n_epochs
        if every is not None and epoch % every == 0:
            self._save(trainer, f"epoch_{epoch}")

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the last state, unless the run has failed.

        Of a run that was interrupted, it is a ``step_<n>`` to resume from.
        """
        try:
            if trainer.has_failed is not True:
                self._finish_all(trainer)
                if trainer.interrupted is True:
                    self._save_state(trainer, f"step_{self._global_step}")
                    self._delete_old_ones(trainer)
                elif self.save_at_end:
                    self._save_state(trainer, "final")
        finally:
            self._release_lock()

    @event_with_data
    def on_exception(self, trainer: Trainer, **kwargs: Any) -> None:
        """Let other runs have the folder, if it ends the training run."""
        if trainer._run.is_training:
            self._release_lock()

    def _save(self, trainer: Trainer, name: str) -> None:
        """Save when it is due; an error is what ``on_save_error`` says."""
        self._finish_all(trainer)
        with self._errors_warned_of():
            self._save_state(trainer, name, asynchronous=self.asynchronous)
            if not self.asynchronous:
                self._delete_old_ones(trainer)

    def _finish_all(self, trainer: Trainer) -> None:
        """Wait for what is being written; the one that began it hears of its errors."""
        for callback in savers_in(trainer.callback_handler):
            if callback._saving is not None:
                callback._saving = None
                with callback._errors_warned_of():
                    trainer.finish_saving()
                    callback._delete_old_ones(trainer)

    @contextmanager
    def _errors_warned_of(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            if self.on_save_error == "raise":
                raise
            warn(f"The training state was not saved; the run goes on. {error}")

    def _save_state(
        self, trainer: Trainer, name: str, *, asynchronous: bool = False
    ) -> None:
        # An override from before it was there is not given the argument.
        when = {"asynchronous": True} if asynchronous else {}
        self._saving = path = self.save_dir / name
        try:
            trainer.save_training_state(
                path, checkpoint_kwargs={"global_step": self._global_step}, **when
            )
        finally:
            if not asynchronous:
                self._saving = None
        self._last_save = time.monotonic()

    def _delete_old_ones(self, trainer: Trainer) -> None:
        """Delete what no callback of the run keeps, now that a new one is complete."""
        states = [
            each
            for each in list_checkpoints(self.save_dir)
            if each.run_id == trainer._run_id
            and _NAME.fullmatch(each.path.name)
            and each.path.name != "final"
        ]
        if self.max_checkpoints is not None and trainer._accelerator.is_main_process:
            self._prune(trainer, states)
        self._saved_checkpoints = [
            each.path
            for each in states
            if self.identity in each.saved_by and each.path.exists()
        ]

    def _prune(self, trainer: Trainer, states: list[Checkpoint]) -> None:
        saved: set[Checkpoint] = set()
        kept: set[Checkpoint] = set()
        for saver in savers_in(trainer.callback_handler):
            if saver.save_dir == self.save_dir:
                own = [each for each in states if saver.identity in each.saved_by]
                saved.update(own)
                kept.update(saver.choose_kept(own))
        old = saved - kept
        prune(each for each in states if each in old)

    def choose_kept(self, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
        """Return the newest and the best of those that this callback has saved.

        Args:
            checkpoints: Oldest first.
        """
        if self.max_checkpoints is None:
            return checkpoints
        # Of those saved amid an epoch, the metric is that of other weights.
        measured = [
            each
            for each in checkpoints
            if each.path.name.startswith("epoch_")
            and math.isfinite(each.metrics.get(self.watch_metric, math.nan))
        ]
        measured.sort(
            key=lambda each: each.metrics[self.watch_metric],
            reverse=self.greater_is_better,
        )
        return checkpoints[-self.max_checkpoints :] + measured[: self.keep_best]


def savers_in(callbacks: Iterable[Any]) -> list[SaveTrainingStateCallback]:
    """Return the callbacks that save training states."""
    return [each for each in callbacks if isinstance(each, SaveTrainingStateCallback)]


def _check_at_least_one(**arguments: int | None) -> None:
    for name, value in arguments.items():
        if value is not None and value < 1:
            raise ValueError(
                f"{name} must be at least 1, got {value}. Leave it out to switch it "
                "off."
            )


def _check_can_be_saved(trainer: Trainer) -> None:
    """Find out, at little cost, whether the run's training states would load again.

    Raises:
        NotStorableError: If not; it names what cannot be stored.
    """
    in_parts = trainer._engine.saved_in_parts
    states = {
        "the scheduler": trainer.scheduler,
        "the callbacks": trainer.callback_handler,
        "the model": None if "model" in in_parts else trainer.get_model(False),
        "the optimizer": None if "optimizer" in in_parts else trainer.optimizer,
    }
    for name, owner in states.items():
        if owner is not None:
            check_storable(owner.state_dict(), f"The state of {name}")
