"""Saving a run and going on from it: the part of the trainer that is not the loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from pytorch_accelerated import checkpoint, data, distributed, engines
from pytorch_accelerated.accumulation import AccumulationWindow
from pytorch_accelerated.callbacks import CallbackHandler, SaveTrainingStateCallback
from pytorch_accelerated.callbacks.checkpointing import savers_of
from pytorch_accelerated.engines import Engine
from pytorch_accelerated.errors import CheckpointError
from pytorch_accelerated.progress import RunProgress, Stage
from pytorch_accelerated.resuming import (
    BatchLayout,
    check_schedule_is_long_enough,
    count_updates_left,
    find_place,
    gradients_of,
)
from pytorch_accelerated.run_config import TrainerRunConfig
from pytorch_accelerated.tracking import LossTracker, RunHistory, is_number
from pytorch_accelerated.training_state import TrainingState


class ResumableRun:
    """What a trainer saves of a run, and how it goes on from what was saved.

    It is the base of :class:`~pytorch_accelerated.trainer.Trainer`, and stands apart so
    that the trainer can be read as the story of its loop.
    """

    # What the trainer sets.
    optimizer: torch.optim.Optimizer | None
    scheduler: Any
    run_history: RunHistory
    run_config: TrainerRunConfig
    callback_handler: CallbackHandler
    last_checkpoint: str | None
    is_resumed: bool
    _accelerator: Accelerator
    _engine: Engine
    _progress: RunProgress
    _window: AccumulationWindow
    _loss_tracker: LossTracker
    _scalar_trackers: dict[str, LossTracker]
    _train_dataloader: Any
    _last_trained_on: tuple[Any, BatchLayout | None]
    _eval_dataloader: Any
    _num_runs: int
    _run_number: int
    _run_id: str | None
    _found: checkpoint.Checkpoint | None
    _asked_to_resume_from: str | os.PathLike[str] | None
    _update_limit: int | None
    _data_seed: int
    _loaded_state: dict[str, Any]
    _resume_state: dict[str, Any]
    _epoch_random_states: dict[str, Any] | None
    _ahead_random_states: dict[str, Any] | None
    _background_writer: checkpoint.BackgroundWriter
    _being_saved: str | None

    if TYPE_CHECKING:  # what the trainer defines

        def print(self, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102
        def get_model(  # noqa: D102
            self, keep_torch_compile: bool = True
        ) -> nn.Module: ...
        def raise_on_all(self, error: Exception | None) -> None: ...  # noqa: D102
        def _notify(self, event: str, **kwargs: Any) -> None: ...
        def _publish_progress(self) -> None: ...

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
        self._notify("on_before_save")
        state = self._accelerator.state
        writes = state.is_local_main_process if save_per_node else state.is_main_process
        contents: dict[str, Any] = {"model_state_dict": self._model_state_dict(writes)}
        if save_optimizer and self.optimizer is not None:
            contents["optimizer_state_dict"] = self._engine.whole(
                self.optimizer.state_dict(), writes
            )
        if save_scheduler and self.scheduler is not None:
            contents.update(self._scheduler_contents())
        contents.update(checkpoint_kwargs or {})
        with self._on_all_processes_or_none():
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
        contents: dict[str, Any] = checkpoint.load_file(checkpoint_path)
        if "model_state_dict" not in contents:
            raise CheckpointError(
                f"{checkpoint_path} was not written by save_checkpoint(): it has no "
                f"'model_state_dict' but {list(contents)[:5]}. If these are the "
                "weights themselves, load them with "
                "model.load_state_dict(torch.load(path))."
            )
        self._load_states(
            checkpoint_path,
            contents["model_state_dict"],
            contents.get("optimizer_state_dict") if load_optimizer else None,
            contents.get("scheduler_state_dict") if load_scheduler else None,
        )
        return contents

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
        self._notify("on_before_save")
        self.finish_saving()
        path = os.path.abspath(os.path.expanduser(output_dir))
        epoch = self.run_history.current_epoch + (self._progress.stage is Stage.ENDED)
        metadata = {"current_epoch": epoch, **(checkpoint_kwargs or {})}
        progress = {
            "num_updates": self._progress.num_updates,
            "epoch": epoch,
            "metrics": self._latest_metrics(),
            "run_number": self._run_number,
            "run_id": self._run_id,
            "saved_by": [
                saver.identity for saver in savers_of(Path(path), self.callback_handler)
            ],
        }
        with self._on_all_processes_or_none():
            state = self._training_state(metadata)
            state.parts = self._save_parts(path)
        state.processes = distributed.objects_of_all(self._state_of_process())
        with self._on_all_processes_or_none():
            if not self._accelerator.is_main_process:
                pass
            elif asynchronous:
                write = partial(state.snapshot().write, path, progress)
                self._background_writer.start(write)
            else:
                state.write(path, progress)
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
        with self._on_all_processes_or_none():
            self._background_writer.wait()
        self.last_checkpoint = saved or self.last_checkpoint

    def _training_state(self, metadata: dict[str, Any]) -> TrainingState:
        scaler = self._accelerator.scaler
        in_parts, keep = self._engine.saved_in_parts, self._accelerator.is_main_process
        _, layout = self._trained_on()
        run: dict[str, Any] = {
            "progress": self._progress_to_save().to_dict(),
            "layout": layout.to_dict() if layout else None,
            "data_seed": self._data_seed,
            "num_runs": self._num_runs,
            "run_id": self._run_id,
            "callbacks": self._engine.whole(self.callback_handler.state_dict(), keep),
        }
        if hasattr(self.run_history, "state_dict"):
            run["run_history"] = self.run_history.state_dict()
        return TrainingState(
            model=None if "model" in in_parts else self._model_state_dict(keep),
            optimizer=None
            if self.optimizer is None or "optimizer" in in_parts
            else self._engine.whole(self.optimizer.state_dict(), keep),
            scheduler=None if self.scheduler is None else self.scheduler.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
            metadata=metadata,
            run=run,
        )

    def _save_parts(self, path: str) -> str | None:
        """Let every process write what it alone holds; say in which folder."""
        if not self._engine.saved_in_parts:
            return None
        token = distributed.object_from_main_process(checkpoint.new_token())
        folder = f"{path}.tmp-{token}"
        self._engine.save_parts(
            self.get_model(keep_torch_compile=False), self.optimizer, Path(folder)
        )
        return folder

    def _state_of_process(self) -> dict[str, Any]:
        """Return what this process has of its own."""
        progress = self._progress
        state: dict[str, Any] = {
            "random_states": self._random_states(),
            "window": self._window.state_dict(),
        }
        if progress.step == 0 or progress.stage is not Stage.TRAINING:
            return state
        state["epoch_random_states"] = self._epoch_random_states
        state["ahead_random_states"] = self._ahead_random_states
        state["trackers"] = {
            "loss": self._loss_tracker.state_dict(),
            **{name: t.state_dict() for name, t in self._scalar_trackers.items()},
        }
        loader, _ = self._trained_on()
        if hasattr(loader, "place_after"):
            state["place"] = loader.place_after(progress.step)
        if progress.step % self._window.num_steps:
            state["gradients"] = gradients_of(self.get_model(keep_torch_compile=False))
        return state

    def _trained_on(self) -> tuple[Any, BatchLayout | None]:
        """Return the loader of the last training run, and how it cut its epochs."""
        # A run that fails before it starts has a loader and no config.
        if self._train_dataloader is None or self.run_config is None:
            return self._last_trained_on
        return self._train_dataloader, self._batch_layout()

    def _batch_layout(self) -> BatchLayout:
        config = self.run_config
        plan = getattr(self._train_dataloader, "plan", None)
        return BatchLayout(
            num_samples=None if plan is None else plan.length,
            batch_size=config.train_per_device_batch_size,
            num_processes=config.num_processes,
            accumulation=config.gradient_accumulation_steps,
        )

    def load_training_state(
        self, input_dir: str | os.PathLike[str], *, allow_pickle: bool = False
    ) -> dict[str, Any]:
        """Load the weights and the optimizer, scheduler and random states of a run.

        To go on with the run itself, use ``train(resume_from=...)``, which calls this.

        Args:
            input_dir: A folder that :meth:`save_training_state` wrote; those of the
                published version 0.1.61 are read too.
            allow_pickle: Whether parts of a state of 0.1.61 that run code while they
                are loaded are read. True only for files that you wrote yourself.

        Returns:
            ``current_epoch``, the number of the epoch to go on with, and the
            ``checkpoint_kwargs`` that were saved.

        Raises:
            CheckpointError: If the folder is not whole, or does not fit the model.
        """
        found, self._found = self._found, None
        if found is None or str(found.path) != str(input_dir):
            found = checkpoint.Checkpoint(input_dir)
        state = TrainingState.read(found, allow_pickle=allow_pickle)
        if state.parts is not None:
            self._engine.load_parts(
                self.get_model(keep_torch_compile=False),
                self.optimizer,
                Path(state.parts),
                len(state.processes),
            )
        self._load_states(
            input_dir,
            (state.model or {}) if state.parts is None else None,
            state.optimizer,
            state.scheduler,
        )
        if self._accelerator.scaler is not None and state.scaler is not None:
            self._accelerator.scaler.load_state_dict(state.scaler)
        own = state.of_process(
            self._accelerator.process_index, self._accelerator.num_processes
        )
        if own.get("random_states") is not None:
            checkpoint.set_random_states(own["random_states"])
        self._loaded_state = {
            **state.run,
            **own,
            "has_scheduler": state.scheduler is not None,
        }
        return dict(state.metadata)

    def _resolve_resume_from(
        self, resume_from: str | os.PathLike[str] | None
    ) -> str | os.PathLike[str] | None:
        if resume_from != "auto":
            return resume_from
        folders = list(
            dict.fromkeys(
                callback.save_dir
                for callback in self.callback_handler
                if isinstance(callback, SaveTrainingStateCallback)
            )
        )
        if not folders:
            raise ValueError(
                "resume_from='auto' looks for the newest training state that a "
                "SaveTrainingStateCallback of this trainer has saved; it has no such "
                "callback. Add one, or give the path of a training state."
            )
        if self._accelerator.is_main_process:
            self._found = checkpoint.newest(*folders)
        found: str | None = distributed.object_from_main_process(
            None if self._found is None else str(self._found.path)
        )
        if found is None:
            names = ", ".join(map(str, folders))
            self.print(f"No training state in {names}: starting afresh")
        return found

    def _goes_on_in(self, folder: Path) -> bool:
        """Say whether the run was told to go on from a training state in a folder."""
        asked = self._asked_to_resume_from
        if asked is None or asked == "auto":
            return asked is not None
        return Path(os.path.realpath(os.path.expanduser(asked))).parent == folder

    def _resume(self, resume_from: str | os.PathLike[str]) -> None:
        """Put the run where a training state says that it stood."""
        with self._on_all_processes_or_none():
            metadata = self.load_training_state(resume_from)
        self.is_resumed = True
        # Only here: a state that a callback loads is not one to go on from.
        state = self._resume_state = self._loaded_state
        if "progress" in state:
            self._check_schedule_was_saved(resume_from)
            now = self._batch_layout()
            # A state that was saved before any run has none.
            then = BatchLayout(**state["layout"]) if state["layout"] else now
            progress = RunProgress.from_dict(state["progress"])
            self._progress = find_place(progress, then, now)
            if self._progress.step != progress.step:
                # What was begun of a window is done again.
                state.pop("gradients", None)
            self._check_schedule_is_long_enough(now)
            if "random_states" not in state:
                # Other processes saved theirs.
                data.seed_everything(
                    data.derive_seed(
                        state["data_seed"],
                        progress.num_updates,
                        self._accelerator.process_index,
                    )
                )
            self._num_runs = state["num_runs"]
            self._run_id = state.get("run_id") or self._run_id
            self._follow_data_seed(state["data_seed"])
            if "run_history" in state and hasattr(self.run_history, "load_state_dict"):
                self.run_history.load_state_dict(state["run_history"])
        epoch = metadata.get("current_epoch", 1)
        if "progress" not in state:
            self._progress.epochs_done = max(epoch - 1, 0)
        self.run_history._set_epoch(epoch)
        self._publish_progress()
        self.print(f"Resuming from {resume_from} at epoch {epoch}")

    def _check_schedule_was_saved(self, resume_from: str | os.PathLike[str]) -> None:
        if self._resume_state["has_scheduler"] != (self.scheduler is not None):
            was, now = (
                ("with", "without") if self.scheduler is None else ("without", "with")
            )
            raise ValueError(
                f"{resume_from} was saved by a run {was} a scheduler, but train() was "
                f"called {now} one. Give the create_scheduler_fn of that run."
            )

    def _check_schedule_is_long_enough(self, layout: BatchLayout) -> None:
        plan = getattr(self._train_dataloader, "plan", None)
        if plan is None or plan.drop_last or len(self._train_dataloader) != len(plan):
            return  # how many updates are left is not known
        num_epochs = self.run_config.num_epochs
        updates = self._progress.num_updates + count_updates_left(
            self._progress, layout, num_epochs
        )
        if self._update_limit is not None:
            updates = min(updates, self._update_limit)
        check_schedule_is_long_enough(self.scheduler, updates)

    def _follow_data_seed(self, data_seed: int) -> None:
        self._data_seed = data_seed
        self.run_config = replace(self.run_config, data_seed=data_seed)
        for loader in (self._train_dataloader, self._eval_dataloader):
            if hasattr(loader, "use_data_seed"):
                loader.use_data_seed(data_seed)

    def _random_states(self) -> dict[str, Any]:
        loader, _ = self._trained_on()
        generators = data.generators_of(loader)
        return {
            **checkpoint.get_random_states(),
            "loader": [generator.get_state() for generator in generators],
        }

    def _restore_random_states(self, name: str = "random_states") -> None:
        states = self._resume_state.pop(name, None)
        if states is not None:
            checkpoint.set_random_states(states)
            generators = data.generators_of(self._train_dataloader)
            for generator, state in zip(
                generators, states.get("loader", []), strict=False
            ):
                generator.set_state(state)

    def _progress_to_save(self) -> RunProgress:
        progress = replace(self._progress)
        if progress.stage is Stage.ENDED:
            progress.start_next_epoch()
        return progress

    def _latest_metrics(self) -> dict[str, float]:
        return {
            name: values[-1]
            for name in self.run_history.get_metric_names()
            if (values := list(self.run_history.get_metric_values(name)))
            and is_number(values[-1])
        }

    def _model_state_dict(self, keep: bool = True) -> dict[str, Any]:
        return self._engine.model_state(self.get_model(keep_torch_compile=False), keep)

    def _scheduler_contents(self) -> dict[str, Any]:
        """Return the scheduler's state under its key; nothing if it cannot be saved."""
        key = "scheduler_state_dict"
        try:
            state = checkpoint.to_storable(self.scheduler.state_dict(), key)
        except Exception as error:
            if "DataLoader worker" in str(error):
                raise  # by torch, wherever the main thread happens to be
            self.print(f"The state of the scheduler is not saved: {error}")
            return {}
        return {key: state}

    def _check_can_be_saved(self) -> None:
        """Find out, at little cost, whether the run's training states would load again.

        Raises:
            NotStorableError: If not; it names what cannot be stored.
        """
        in_parts = self._engine.saved_in_parts
        states = {
            "the scheduler": self.scheduler,
            "the callbacks": self.callback_handler,
            "the model": None if "model" in in_parts else self.get_model(False),
            "the optimizer": None if "optimizer" in in_parts else self.optimizer,
        }
        for name, owner in states.items():
            if owner is not None:
                checkpoint.check_storable(owner.state_dict(), f"The state of {name}")

    def _load_states(
        self,
        source: str | os.PathLike[str],
        model_state: Mapping[str, Any] | None,
        optimizer_state: Mapping[str, Any] | None,
        scheduler_state: Mapping[str, Any] | None,
    ) -> None:
        """Load what is given and there is a use for, or nothing if some does not fit.

        Raises:
            CheckpointError: If something does not fit.
        """
        model = self.get_model(keep_torch_compile=False)
        keep_dtypes = True
        if model_state is not None:
            model_state = checkpoint.fit_to_model(model, model_state)
            if mismatch := checkpoint.explain_mismatch(model, model_state):
                raise CheckpointError(f"{source} does not fit the model: {mismatch}")
            keep_dtypes = engines.have_same_dtypes(model_state, model.state_dict())
        with ExitStack() as undo:
            if self.optimizer is not None and optimizer_state is not None:
                load = partial(
                    self._engine.load_optimizer, self.optimizer, keep_dtypes=keep_dtypes
                )
                before = self.optimizer.state_dict()
                undo.callback(engines.load_with_dtypes, self.optimizer, before)
                _load("optimizer", load, optimizer_state, source)
            if self.scheduler is not None and scheduler_state is not None:
                before = dict(self.scheduler.state_dict())
                undo.callback(self.scheduler.load_state_dict, before)
                load = self.scheduler.load_state_dict
                _load("scheduler", load, scheduler_state, source)
            undo.pop_all()
        if model_state is not None:
            self._engine.load_model(model, model_state)

    @contextmanager
    def _on_all_processes_or_none(self) -> Iterator[None]:
        """Wait for all processes; an error on one of them is raised on all."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        self.raise_on_all(error)


def _load(
    what: str,
    load: Callable[[dict[str, Any]], object],
    state: Mapping[str, Any],
    source: str | os.PathLike[str],
) -> None:
    try:
        load(dict(state))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"The {what}'s state in {source} does not fit the {what}: {error}. Create "
            "it with the same kind and parameter groups, or load only the model."
        ) from error
