"""Sending what a run records to experiment trackers."""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS as KNOWN
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from torch.nn.parameter import is_lazy

from pytorch_accelerated import tracking
from pytorch_accelerated.arguments import closest
from pytorch_accelerated.callbacks.base import event_with_data
from pytorch_accelerated.callbacks.history import Recorder
from pytorch_accelerated.errors import warn
from pytorch_accelerated.state import Stage

if TYPE_CHECKING:
    from pytorch_accelerated.callbacks.base import CallbackHandler
    from pytorch_accelerated.trainer import Trainer

DEFAULT_FOLDER = "runs"
_EXTRAS = ("mlflow", "tensorboard", "trackio", "wandb")

# What names a run, and what goes on with one that was ended.
_NAME_ARGUMENTS = {"mlflow": "run_name", "trackio": "name", "wandb": "name"}
_GO_ON: dict[str, Callable[[Any], dict[str, Any]]] = {
    "mlflow": lambda run: {"run_id": run.info.run_id},
    "trackio": lambda run: {"name": run.name, "resume": "allow"},
    "wandb": lambda run: {"id": run.id, "resume": "allow"},
}
# Their `log_images` takes a picture by itself and not in a list.
_TAKE_ONE_PICTURE = ("aim", "clearml")
_PICTURE_SIZE = 256
_MAX_CELLS = 1024
_WHITE_MINUS_BLUE = (247.0, 191.0, 115.0)


class TrackerCallback(Recorder):
    """Sends metrics and hyper-parameters to experiment trackers, through Accelerate.

    ::

        TrackerCallback("tensorboard")
        TrackerCallback(["wandb", "mlflow"], "digits", config={"augment": "light"})

    Each run of ``train()`` is a run of the tracker, and what ``evaluate()`` records
    during or after it belongs to it. A run that is resumed goes on in the same run of
    TensorBoard, Weights & Biases, MLflow and Trackio. The x axis is the number of
    updates.

    Numbers in the run history are sent as they are recorded, matrices as pictures and
    figures of matplotlib as figures, where the tracker takes them. The callback records
    what a :class:`RecordHistoryCallback` does: the learning rate, the gradient norm (if
    gradients are clipped by norm), the samples per second and times. A tracker that
    fails is warned of once; the run goes on.

    One process sends. All of them need the callback, since losses are those of all.

    Args:
        trackers: Names known to Accelerate, such as "tensorboard", "wandb", "mlflow",
            "trackio" or "comet_ml", or "all" that are installed; objects of
            :class:`accelerate.tracking.GeneralTracker`; or several of these. One that
            the script starts itself, with ``accelerator.init_trackers``, is left to it.
        project: The project, or experiment, that the runs belong to.
        run_name: The name of the run, to which TensorBoard's has the time added; by
            default what the trackers make up.
        config: What else is to be stored with the arguments of the run. Nested
            dictionaries become ``outer/inner``.
        every_n_updates: How often to record and send the mean training losses, the
            learning rate, the gradient norm and the throughput; by default once per
            epoch.
        init_kwargs: For each tracker by its name, arguments for its start, such as
            ``{"wandb": {"tags": ["baseline"]}}``.
        logging_dir: The folder for trackers that write files; by default the one that
            Accelerate was given, else "runs".

    Raises:
        ValueError: If a tracker is not known.
        ImportError: If its package is not installed.
    """

    called_last: tuple[str, ...] = (
        *Recorder.called_last,
        "on_training_run_start",  # after the script's own trackers
    )

    trackers: Sequence[Any] = ()
    project: str = "pytorch-accelerated"
    run_name: str | None = None
    config: Mapping[str, Any] = MappingProxyType({})
    init_kwargs: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    logging_dir: str | os.PathLike[str] | None = None

    # Those in use, and whether they are to be ended.
    _open: Sequence[tuple[Any, bool]] = ()
    _is_for_evaluation: bool = False
    _failed: frozenset[str] = frozenset()
    # How to go on with the runs of the trackers, and what has been sent to them.
    _runs: Mapping[str, dict[str, Any]] = MappingProxyType({})
    _num_sent: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self,
        trackers: str | Any | Iterable[str | Any],
        project: str = "pytorch-accelerated",
        *,
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        every_n_updates: int | None = None,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        logging_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(every_n_updates)
        self.trackers = list(_checked(trackers))
        self.project, self.run_name, self.logging_dir = project, run_name, logging_dir
        self.config, self.init_kwargs = dict(config or {}), dict(init_kwargs or {})
        names = [_name_of(which) for which in self.trackers]
        if not set(names).issuperset(self.init_kwargs):
            raise ValueError(
                f"init_kwargs must have the arguments for each of {names} under its "
                f"name, got {list(self.init_kwargs)}."
            )

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        super()._forget_earlier_runs(trainer)
        self._end(trainer)
        self._runs = {}
        self._num_sent = tracking.count_values(trainer.run_history)

    def state_dict(self) -> dict[str, Any]:
        """Return which runs of the trackers to go on with, and what they have."""
        sent = {"runs": dict(self._runs), "num_sent": dict(self._num_sent)}
        return {**super().state_dict(), **sent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the same runs of the trackers."""
        super().load_state_dict(state)
        self._runs, self._num_sent = dict(state["runs"]), dict(state["num_sent"])

    # ------------------------------------------------------------------- the events

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start the trackers.

        Raises:
            ValueError: If files cannot be written to the folder for them.
        """
        # A history that keeps its metrics elsewhere is empty when a run is resumed.
        counts = tracking.count_values(trainer.run_history)
        sent = self._num_sent.items()
        self._num_sent = {name: min(n, counts.get(name, 0)) for name, n in sent}
        self._start(trainer)

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start the trackers, unless this is amid a training run.

        Raises:
            ValueError: If files cannot be written to the folder for them.
        """
        if not self._open:
            self._num_sent = tracking.count_values(trainer.run_history)
            self._start(trainer)
            self._is_for_evaluation = True

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Send what has been recorded since, and end the trackers."""
        self._end(trainer)

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Send what has been recorded since."""
        self.keep(trainer)
        if self._is_for_evaluation:
            self._end(trainer)

    @event_with_data
    def on_exception(self, trainer: Trainer, **kwargs: Any) -> None:
        """Send what has been recorded, and end the trackers."""
        if trainer._run.is_training or self._is_for_evaluation:
            self._end(trainer)

    # ------------------------------------------------------------ starting and ending

    def _start(self, trainer: Trainer) -> None:
        accelerator = trainer._accelerator
        self._open, self._failed = (), frozenset()
        folder = Path(self.logging_dir or accelerator.logging_dir or DEFAULT_FOLDER)
        started = {each.name for each in accelerator.trackers}  # by the script
        for which in self.trackers if accelerator.is_main_process else ():
            if _needs_folder(which):
                _check_folder(folder)
            if _name_of(which) not in started:
                self._try(which, "start", self._start_one, trainer, which, folder)

    def _start_one(self, trainer: Trainer, which: Any, folder: Path) -> None:
        name, goes_on = _name_of(which), which in self._runs
        tracker = self._create(which, folder, trainer.num_updates or 0)
        # A run of W&B that the script has started is joined, and not ended.
        is_ours = name != "wandb" or not getattr(sys.modules.get(name), "run", None)
        tracker.start()
        trainer._accelerator.trackers.append(tracker)
        self._open = (*self._open, (tracker, is_ours))
        if name == "wandb":  # whose own steps never go back, as a resumed run may
            tracker.tracker.define_metric("*", step_metric="num_updates")
        if name in _GO_ON:
            self._runs = {**self._runs, name: _GO_ON[name](tracker.tracker)}
        if not goes_on or name == "trackio":  # which forgets them when it goes on
            settings = flat({**settings_of(trainer), **self.config})
            tracker.store_init_configuration(
                {_accepted(key, name): value for key, value in settings}
            )

    def _create(self, which: Any, folder: Path, num_updates: int) -> Any:
        """Return a tracker that is to be started."""
        if isinstance(which, GeneralTracker):
            return which
        arguments = {**self._runs.get(which, {}), **self.init_kwargs.get(which, {})}
        if not _needs_folder(which):
            if self.run_name is not None and which in _NAME_ARGUMENTS:
                arguments.setdefault(_NAME_ARGUMENTS[which], self.run_name)
            return KNOWN[which](self.project, **arguments)
        if which in self._runs and which == "tensorboard":
            # What came after the state that the run is resumed from is hidden.
            arguments.setdefault("purge_step", num_updates + 1)
        name = f"{datetime.now():%Y-%m-%d_%H-%M-%S.%f}"
        name = f"{self.run_name}_{name}" if self.run_name else name
        run = arguments.pop("folder", f"{self.project}/{name}")
        self._runs = {**self._runs, which: {"folder": run}}
        return KNOWN[which](run, folder, **arguments)

    def _end(self, trainer: Trainer) -> None:
        self.keep(trainer)
        for tracker, is_ours in self._open:
            trainer._accelerator.trackers.remove(tracker)
            if is_ours:
                self._try(tracker, "end", tracker.finish)
        self._open, self._is_for_evaluation = (), False

    # ------------------------------------------------------------------------ sending

    def keep(self, trainer: Trainer) -> None:
        """Send what has been recorded since the last time, each value at its update."""
        if not self._open:
            return
        history, now = trainer.run_history, trainer.num_updates or 0
        counts = tracking.count_values(history)
        by_step: dict[int, dict[str, Any]] = defaultdict(dict)
        for record in tracking.records_of(history, skip=self._num_sent):
            values = by_step[now if record.step is None else record.step]
            values[record.name] = record.value
            if record.epoch is not None:
                values["epoch"] = record.epoch
        self._num_sent = counts
        # One that has failed may take its time, so it is tried at the ends of epochs.
        is_amid_epoch = trainer._run.training.progress.stage is Stage.TRAINING
        failed = self._failed if is_amid_epoch else ()
        for step in sorted(by_step):
            for tracker, _ in self._open:
                if _name_of(tracker) not in failed:
                    self._try(tracker, "log", _send_to, tracker, by_step[step], step)

    def _try(
        self, which: Any, what: str, function: Callable[..., None], *args: Any
    ) -> None:
        name = _name_of(which)
        try:
            function(*args)
        except Exception as error:
            if name not in self._failed:
                self._failed |= {name}
                warn(
                    f"The tracker {name!r} failed to {what}: {type(error).__name__}: "
                    f"{error} The run goes on; its metrics are in trainer.run_history."
                )


def follow_log_with(
    handler: CallbackHandler, accelerator_kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Add a callback for the trackers that Accelerate is told to log with.

    Args:
        handler: Where to add it.
        accelerator_kwargs: The arguments that Accelerate is given.

    Returns:
        The arguments, with a folder for trackers that write files.
    """
    kwargs = dict(accelerator_kwargs)
    if kwargs.get("log_with") is not None:
        handler.add_callback(TrackerCallback(kwargs["log_with"]))
        if "project_config" not in kwargs:
            kwargs.setdefault("project_dir", DEFAULT_FOLDER)
    return kwargs


def settings_of(trainer: Trainer) -> dict[str, Any]:
    """Return what a run works with, as nested dictionaries."""
    model, training = trainer.get_model(keep_torch_compile=False), trainer._run.training
    parameters: Any = getattr(model, "parameters", list)()
    scheduler, prepared = training.scheduler, training.prepared
    optimizer = trainer.optimizer if prepared is None else prepared.optimizer
    config = (training.config or trainer.run_config).to_dict()
    return {
        "model": type(model).__name__,
        "num_parameters": sum(p.numel() for p in parameters if not is_lazy(p)),
        "optimizer": type(optimizer).__name__,
        "optimizer_arguments": dict(getattr(optimizer, "defaults", {})),
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        **{name: config[name] for name in config if not name.startswith("is_")},
    }


def _checked(trackers: Any) -> Iterator[Any]:
    """Yield known names, and trackers.

    Raises:
        ValueError: If a name is not known.
        ImportError: If the package of a name is not installed.
    """
    available = [str(each) for each in get_available_trackers()]
    are_several = isinstance(trackers, Iterable) and not isinstance(trackers, str)
    for which in trackers if are_several else [trackers]:
        name = which if isinstance(which, GeneralTracker) else str(which)
        if name == "all":
            yield from available
        elif isinstance(name, str) and name not in KNOWN:
            near = closest(name, KNOWN)
            raise ValueError(
                f"There is no tracker {name!r}."
                + (f" Did you mean {near!r}?" if near else "")
                + f" Accelerate knows {', '.join(sorted(KNOWN))}; others are objects "
                "of subclasses of accelerate.tracking.GeneralTracker."
            )
        elif name in LoggerType.list() and name not in available:
            what = f"'pytorch-accelerated[{name}]'" if name in _EXTRAS else name
            raise ImportError(
                f"The tracker {name!r} needs a package that is not installed: "
                f"pip install {what}"
            )
        else:
            yield name


def _name_of(which: Any) -> str:
    return which if isinstance(which, str) else str(which.name)


def _needs_folder(which: Any) -> bool:
    return isinstance(which, str) and bool(KNOWN[which].requires_logging_directory)


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"Trackers cannot write to the folder {str(folder)!r}: {error}. Pass "
            "another one as logging_dir to TrackerCallback."
        ) from error


def flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield names, those of inner settings with slashes, and numbers or short texts."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{name}", inner) for name, inner in flat(value))
        elif value is not None:
            yield str(key), plain(value)


def plain(value: Any) -> Any:
    """Return a number or a text as it is, and of anything else a short text."""
    if tracking.is_number(value) and hasattr(value, "item"):
        return value.item()
    if isinstance(value, (int, float, str)):
        return value
    text = getattr(value, "__qualname__", None) or str(value)
    return textwrap.shorten(text, 200, placeholder=" ...")


def _accepted(name: str, tracker: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name) if tracker == "mlflow" else name


def _send_to(tracker: Any, values: Mapping[str, Any], step: int) -> None:
    """Send numbers, pictures and figures to a tracker."""
    kind, at = _name_of(tracker), {"step": step}
    values = {_accepted(name, kind): value for name, value in values.items()}
    numbers = {n: plain(v) for n, v in values.items() if tracking.is_number(v)}
    if kind == "wandb":
        numbers, at = {"num_updates": step, **numbers}, {}
    if numbers:
        tracker.log(numbers, **at)
    for name, value in values.items():
        if hasattr(value, "savefig") and hasattr(tracker, "log_figure"):
            tracker.log_figure(value, f"{name}_{step}.png")
        elif hasattr(tracker, "log_images"):
            picture = _picture_of(value)
            if picture is not None:
                several = picture if kind in _TAKE_ONE_PICTURE else picture[None]
                layout = {"dataformats": "NHWC"} if kind == "tensorboard" else {}
                tracker.log_images({name: several}, **at, **layout)


def _picture_of(value: Any) -> Any:
    """Return a figure or a matrix as pixels, height x width x 3; None for others."""
    if hasattr(value, "savefig"):
        from matplotlib.image import imread

        file = io.BytesIO()
        value.savefig(file, format="png")
        file.seek(0)
        return (imread(file)[..., :3] * 255).round().astype("uint8")
    if getattr(value, "ndim", 0) != 2 or 0 in value.shape:
        return None
    rows, columns = (-(-length // _MAX_CELLS) for length in value.shape)
    cells = torch.as_tensor(value)[::rows, ::columns].double().nan_to_num(0.0, 0.0, 0.0)
    # From white for the smallest to blue for the largest.
    shades = (cells - cells.min()) / ((cells.max() - cells.min()) or 1.0)
    pixels = 255 - shades[..., None] * torch.tensor(_WHITE_MINUS_BLUE)
    size = max(1, _PICTURE_SIZE // max(cells.shape))
    pixels = pixels.repeat_interleave(size, 0).repeat_interleave(size, 1)
    return pixels.round().to(torch.uint8).numpy()
