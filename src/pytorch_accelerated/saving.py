"""Saving a run and going on from it: what ``save_*`` and ``load_*`` do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pytorch_accelerated import checkpoint, data, distributed, engines
from pytorch_accelerated.callbacks import ModelEmaCallback
from pytorch_accelerated.callbacks.checkpointing import savers_in
from pytorch_accelerated.checkpoint.files import new_token
from pytorch_accelerated.checkpoint.folder import without_wrappers
from pytorch_accelerated.errors import CheckpointError
from pytorch_accelerated.means import Means
from pytorch_accelerated.metrics import start_metrics
from pytorch_accelerated.pace import Pace
from pytorch_accelerated.state import (
    ProcessState,
    RunState,
    Stage,
    TrainingState,
    find_place,
)
from pytorch_accelerated.tracking import is_number

if TYPE_CHECKING:
    from pytorch_accelerated.run import Run
    from pytorch_accelerated.trainer import Trainer


# Endings of files that are written for torch.load.
_OF_TORCH = (".pt", ".pth", ".bin", ".ckpt")


class OnAllOrNone:
    """Waits for all processes; an error of one in the block is raised on all."""

    def __enter__(self) -> None:
        """Nothing is to be done at the start."""

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        """Raise what was raised on any process."""
        if error is None or isinstance(error, Exception):
            distributed.raise_on_all(error)


def contents_of(
    trainer: Trainer, *, optimizer: bool, scheduler: bool, keep: bool
) -> dict[str, Any]:
    """Return what a single file has of a trainer. Called on all processes.

    Args:
        trainer: The trainer.
        optimizer: Whether the optimizer is wanted.
        scheduler: Whether the scheduler is wanted; left out if it cannot be stored.
        keep: Whether this process writes the file.
    """
    engine, model = trainer._engine, trainer.get_model(keep_torch_compile=False)
    contents: dict[str, Any] = {"model_state_dict": engine.model_state(model, keep)}
    if optimizer and trainer.optimizer is not None:
        state = engine.whole(trainer.optimizer.state_dict(), keep)
        contents["optimizer_state_dict"] = state
    if scheduler and trainer.scheduler is not None:
        key = "scheduler_state_dict"
        try:
            contents[key] = checkpoint.to_storable(trainer.scheduler.state_dict(), key)
        except Exception as error:
            if "DataLoader worker" in str(error):
                raise  # by torch, wherever the main thread happens to be
            trainer.print(f"The state of the scheduler is not saved: {error}")
    return contents


def save_model(trainer: Trainer, path: str | os.PathLike[str], ema: bool) -> Path:
    """Write the weights alone; return the path of the file. Called on all processes.

    Args:
        trainer: The trainer.
        path: The file; its ending says in which format.
        ema: Whether those of the average are wanted.
    """
    keep, path = trainer._accelerator.is_main_process, _file_of_model(path)
    model = _average_of(trainer) if ema else trainer.get_model(keep_torch_compile=False)
    state = trainer._engine.model_state(model, keep)
    is_of_torch = path.suffix in _OF_TORCH
    write = checkpoint.save_file if is_of_torch else checkpoint.save_weights
    with OnAllOrNone():
        if keep:
            write(without_wrappers(state), path)
    return path


def load_model(trainer: Trainer, path: str | os.PathLike[str]) -> None:
    """Load weights that :func:`save_model` wrote. Called on all processes."""
    with OnAllOrNone():
        file = _file_of_model(path)
        if os.path.isdir(path) and not file.exists():
            contents = checkpoint.Checkpoint(path).load_weights()
        else:
            contents = checkpoint.read_weights(file)
        state = contents.get("model_state_dict", contents)
        load_states(trainer, path, state)


def _file_of_model(path: str | os.PathLike[str]) -> Path:
    path = Path(os.path.abspath(os.path.expanduser(path)))
    is_whole = path.suffix in (".safetensors", *_OF_TORCH)
    return path if is_whole else path.with_name(f"{path.name}.safetensors")


def _average_of(trainer: Trainer) -> nn.Module:
    averages = [
        callback.ema_model
        for callback in trainer.callback_handler
        if isinstance(callback, ModelEmaCallback) and callback.ema_model is not None
    ]
    if len(averages) != 1:
        raise ValueError(
            f"ema=True saves the average of a ModelEmaCallback, and this trainer has "
            f"{len(averages)}. It is there from the start of a run on; one of several "
            "can be saved with safetensors.torch.save_model(callback.ema_model.module, "
            "path)."
        )
    module: nn.Module = averages[0].module
    return module


def load_checkpoint(
    trainer: Trainer, path: str | os.PathLike[str], optimizer: bool, scheduler: bool
) -> dict[str, Any]:
    """Load a file that has what :func:`contents_of` returned; return all it holds."""
    contents: dict[str, Any] = checkpoint.load_file(path)
    if "model_state_dict" not in contents:
        raise CheckpointError(
            f"{path} was not written by save_checkpoint(): it has no "
            f"'model_state_dict' but {list(contents)[:5]}. If these are the weights "
            "themselves, load them with load_model(path), or "
            "model.load_state_dict(torch.load(path))."
        )
    load_states(
        trainer,
        path,
        contents["model_state_dict"],
        contents.get("optimizer_state_dict") if optimizer else None,
        contents.get("scheduler_state_dict") if scheduler else None,
    )
    return contents


def save_training_state(
    trainer: Trainer,
    path: str,
    checkpoint_kwargs: Mapping[str, Any] | None,
    asynchronous: bool,
) -> None:
    """Write a training state, or start to. Called on all processes.

    Args:
        trainer: The trainer.
        path: The folder, absolute.
        checkpoint_kwargs: What the user saves beside it.
        asynchronous: Whether it is written while the run goes on.
    """
    run, is_main = trainer._run.training, trainer._accelerator.is_main_process
    epoch = trainer.run_history.current_epoch + (run.progress.stage is Stage.ENDED)
    summary = {
        "num_updates": run.progress.num_updates,
        "epoch": epoch,
        "metrics": latest_metrics(trainer),
        "run_number": run.number,
        "run_id": trainer._run_id,
        "saved_by": _savers_of(trainer, Path(path)),
    }
    metadata = {"current_epoch": epoch, **(checkpoint_kwargs or {})}
    with OnAllOrNone():
        state = _training_state(trainer, run, metadata)
        state.parts = _save_parts(trainer, path)
        own = checkpoint.to_storable(_process_state(trainer, run), "processes")
    state.processes = distributed.objects_of_all(own)
    with OnAllOrNone():
        if is_main and asynchronous:
            trainer._writer.start(partial(state.snapshot().write, path, summary))
        elif is_main:
            state.write(path, summary)


def _savers_of(trainer: Trainer, path: Path) -> list[str]:
    """Return who saves a state, or has saved that of its name before in this run."""
    savers = savers_in(trainer.callback_handler)
    identities = {saver.identity for saver in savers if saver._saving == path}
    with suppress(CheckpointError):
        replaced = checkpoint.Checkpoint(path)
        if replaced.run_id == trainer._run_id:
            identities.update(replaced.saved_by)
    return sorted(identities)


def _training_state(
    trainer: Trainer, run: Run, metadata: dict[str, Any]
) -> TrainingState:
    engine, keep = trainer._engine, trainer._accelerator.is_main_process
    in_parts, scaler = engine.saved_in_parts, trainer._accelerator.scaler
    model, optimizer = trainer.get_model(keep_torch_compile=False), trainer.optimizer
    model_state = optimizer_state = None
    if "model" not in in_parts:
        model_state = engine.model_state(model, keep)
    if optimizer is not None and "optimizer" not in in_parts:
        optimizer_state = engine.whole(optimizer.state_dict(), keep)
    history = trainer.run_history
    progress = replace(run.progress)
    if progress.stage is Stage.ENDED:
        progress.start_next_epoch()
    return TrainingState(
        model=model_state,
        optimizer=optimizer_state,
        scheduler=None if run.scheduler is None else run.scheduler.state_dict(),
        scaler=None if scaler is None else scaler.state_dict(),
        metadata=metadata,
        run=RunState(
            progress=progress,
            layout=run.layout(),
            data_seed=run.data_seed,
            num_runs=trainer._num_runs,
            learning_rates=run.learning_rates,
            run_id=trainer._run_id,
            callbacks=engine.whole(trainer.callback_handler.state_dict(), keep),
            run_history=history.state_dict()
            if hasattr(history, "state_dict")
            else None,
        ),
    )


def _save_parts(trainer: Trainer, path: str) -> str | None:
    """Let every process write what it alone holds; say in which folder."""
    if not trainer._engine.saved_in_parts:
        return None
    token = distributed.object_from_main_process(new_token())
    folder = f"{path}.tmp-{token}"
    model = trainer.get_model(keep_torch_compile=False)
    trainer._engine.save_parts(model, trainer.optimizer, Path(folder))
    return folder


def _process_state(trainer: Trainer, run: Run) -> ProcessState:
    progress = run.progress
    state = ProcessState(run.random_states(), run.accumulation.state)
    if not progress.is_amid_steps:
        return state
    state.epoch_random_states = run.epoch_random_states
    state.ahead_random_states = run.ahead_random_states
    state.trackers = run.means.state_dict()
    if run.means.metrics is not None:
        state.metrics = run.means.metrics.state_dict()
    if hasattr(run.train_dataloader, "place_after"):
        state.place = run.train_dataloader.place_after(progress.step)
    if progress.step % run.accumulation.steps_per_window:
        state.gradients = {
            name: parameter.grad
            for name, parameter in _named_parameters(trainer)
            if parameter.grad is not None
        }
    return state


def _named_parameters(trainer: Trainer) -> Iterator[tuple[str, nn.Parameter]]:
    return trainer.get_model(keep_torch_compile=False).named_parameters()


def latest_metrics(trainer: Trainer) -> dict[str, float]:
    """Return the last value of each metric that is a number."""
    history = trainer.run_history
    return {
        name: values[-1]
        for name in history.get_metric_names()
        if (values := list(history.get_metric_values(name))) and is_number(values[-1])
    }


def load_training_state(
    trainer: Trainer, input_dir: str | os.PathLike[str]
) -> dict[str, Any]:
    """Load a training state, and keep for the run what it is to take up later."""
    run, engine = trainer._run, trainer._engine
    found, run.found = run.found, None
    if found is None or str(found.path) != str(input_dir):
        found = checkpoint.Checkpoint(input_dir)
    state = TrainingState.read(found)
    if state.parts is not None:
        model = trainer.get_model(keep_torch_compile=False)
        folder, num_processes = Path(state.parts), len(state.processes)
        engine.load_parts(model, trainer.optimizer, folder, num_processes)
    load_states(
        trainer,
        input_dir,
        (state.model or {}) if state.parts is None else None,
        state.optimizer,
        state.scheduler,
    )
    accelerator = trainer._accelerator
    if accelerator.scaler is not None and state.scaler is not None:
        accelerator.scaler.load_state_dict(state.scaler)
    own = state.of_process(accelerator.process_index, accelerator.num_processes)
    if own.random_states is not None:
        checkpoint.set_random_states(own.random_states)
    run.loaded = replace(state, model=None, optimizer=None, processes=[own])
    return dict(state.metadata)


def load_states(
    trainer: Trainer,
    source: str | os.PathLike[str],
    model_state: Mapping[str, Any] | None,
    optimizer_state: Mapping[str, Any] | None = None,
    scheduler_state: Mapping[str, Any] | None = None,
) -> None:
    """Load what is given and there is a use for, or nothing if some does not fit.

    Raises:
        CheckpointError: If something does not fit.
    """
    engine, model = trainer._engine, trainer.get_model(keep_torch_compile=False)
    optimizer, scheduler = trainer.optimizer, trainer.scheduler
    keep_dtypes = True
    if model_state is not None:
        model_state = checkpoint.fit_to_model(model, model_state, source)
        keep_dtypes = engines.have_same_dtypes(model_state, model.state_dict())
    with ExitStack() as undo:
        if optimizer is not None and optimizer_state is not None:
            load = partial(engine.load_optimizer, optimizer, keep_dtypes=keep_dtypes)
            before = optimizer.state_dict()
            undo.callback(engines.load_with_dtypes, optimizer, before)
            _load("optimizer", load, optimizer_state, source)
        if scheduler is not None and scheduler_state is not None:
            before = dict(scheduler.state_dict())
            undo.callback(scheduler.load_state_dict, before)
            _load("scheduler", scheduler.load_state_dict, scheduler_state, source)
        undo.pop_all()
    if model_state is not None:
        engine.load_model(model, model_state)


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


def find_state(trainer: Trainer, run: Run) -> None:
    """Let a run that is to go on from "auto" do so from the newest state, if any."""
    if run.resume_from != "auto":
        run.state_to_resume = run.resume_from
        return
    savers = savers_in(trainer.callback_handler)
    folders = list(dict.fromkeys(saver.save_dir for saver in savers))
    if not folders:
        raise ValueError(
            "resume_from='auto' looks for the newest training state that a "
            "SaveTrainingStateCallback of this trainer has saved; it has no such "
            "callback. Add one, or give the path of a training state."
        )
    with OnAllOrNone():
        if trainer._accelerator.is_main_process:
            run.found = checkpoint.newest(*folders)
    run.state_to_resume = distributed.object_from_main_process(
        None if run.found is None else str(run.found.path)
    )
    if run.state_to_resume is None:
        names = ", ".join(map(str, folders))
        trainer.print(f"No training state in {names}: starting afresh")


def resume(trainer: Trainer) -> None:
    """Put the run where its training state says that it stood."""
    run = trainer._run
    source = run.state_to_resume
    assert source is not None
    with OnAllOrNone():
        metadata = trainer.load_training_state(source)
    run.is_resumed = True
    epoch, loaded = metadata.get("current_epoch", 1), run.loaded
    # Only here: a state that a callback loads is not one to go on from.
    if loaded is not None:
        run.pending = loaded.processes[0]
    if loaded is None or loaded.run is None:
        run.progress.epochs_done = max(epoch - 1, 0)
    else:
        _check_schedule(run, loaded, source)
        _go_on_from(trainer, run, loaded.run, loaded.processes[0])
    run.pace = Pace(run.progress.num_samples_seen)
    trainer.run_history._set_epoch(epoch)
    run.publish_progress()
    trainer.run_history.current_step = run.progress.num_updates
    is_over = run.is_used_up or next(iter(run.epochs_due()), None) is None
    where = ": nothing is left to train" if is_over else f" at epoch {epoch}"
    trainer.print(f"Resuming from {source}{where}")


def _check_schedule(run: Run, loaded: TrainingState, source: object) -> None:
    if (loaded.scheduler is None) != (run.scheduler is None):
        was, now = ("with", "without") if run.scheduler is None else ("without", "with")
        raise ValueError(
            f"{source} was saved by a run {was} a scheduler, but train() was "
            f"called {now} one. Give the create_scheduler_fn of that run."
        )


def _go_on_from(
    trainer: Trainer, run: Run, saved: RunState, process: ProcessState
) -> None:
    now = run.layout()
    assert now is not None
    # A state that was saved before any run has no layout.
    run.progress = find_place(saved.progress, saved.layout or now, now)
    if run.progress.step != saved.progress.step:
        # What was begun of a window is done again.
        process.gradients, process.window.items = {}, 0
    if process.random_states is None:
        # Other processes saved theirs.
        index = trainer._accelerator.process_index
        num_updates = saved.progress.num_updates
        data.seed_everything(data.derive_seed(saved.data_seed, num_updates, index))
    run.means = Means(start_metrics(trainer._train_metrics, trainer.device))
    run.means.load_state_dict(process.trackers)
    is_amid_training = run.progress.is_amid_epoch and (
        run.progress.stage is Stage.TRAINING
    )
    if run.means.metrics is not None and is_amid_training:
        run.means.metrics.load_state_dict(process.metrics)
    run.accumulation.state = process.window
    trainer._num_runs = saved.num_runs
    run.learning_rates = saved.learning_rates
    trainer._run_id = saved.run_id or trainer._run_id
    run.follow_data_seed(saved.data_seed)
    history = trainer.run_history
    if saved.run_history is not None and hasattr(history, "load_state_dict"):
        history.load_state_dict(saved.run_history)
    trainer.callback_handler.load_state_dict(saved.callbacks)


def restore_gradients(trainer: Trainer, gradients: Mapping[str, Tensor]) -> None:
    """Put back what a saved run had accumulated of a window."""
    for name, parameter in _named_parameters(trainer):
        if name in gradients:
            parameter.grad = gradients[name].to(parameter)
