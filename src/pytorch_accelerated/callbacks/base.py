# ruff: noqa: B024, B027 (an interface whose methods are all optional)
"""What a callback is, and how the events of a run reach it."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.distributed import is_on_all_processes
from pytorch_accelerated.errors import (
    StopTrainingError,
    add_note,
)

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


def event_with_data(method: Callable[..., None]) -> Callable[..., None]:
    """Let an override of an event take what it wants of the data, in its own way.

    To a type checker ``(trainer, **kwargs)``, ``(trainer, *, step, **kwargs)`` and
    ``(trainer, batch, batch_output, step, **kwargs)`` are three different promises, of
    which no base class could allow all. When the program runs, this does nothing.
    """
    return method


class TrainerCallback(ABC):
    """Override the events that you want to hear of; all the others cost nothing.

    Every event is given the trainer; further data comes as keyword arguments, so accept
    ``**kwargs`` in each method. Raise :class:`StopTrainingError` to end the run in
    order: the callbacks listed after this one still hear of the event.

    Example::

        class PrintLearningRate(TrainerCallback):
            def on_train_epoch_end(self, trainer, **kwargs):
                trainer.print(trainer.last_lr)

    Attributes:
        called_first: Names of the events in which this callback is called before those
            that do not ask for it, whatever its place in the list.
        called_last: Names of the events in which it is called after those that do not
            ask for it, for instance because it saves the state of the others.
        may_stop_alone: Whether it may raise an error on one of several processes, in an
            event of a step or an update. All processes agree after each update then,
            whether to go on. Where it is False for all callbacks that listen to such
            events, they do so at the end of the epoch.
    """

    called_first: tuple[str, ...] = ()
    called_last: tuple[str, ...] = ()
    may_stop_alone: bool = True

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        """Called when ``train()`` starts, before a saved state is loaded.

        Not an event: subclasses override events, and do not always call ours, nor our
        constructor. So what differs from run to run starts here, and what a callback
        keeps has its first value in the class.
        """

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called at the end of the constructor of the trainer."""

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called at the start of ``train()``, once everything is prepared."""

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called at the start of each pass over the training data."""

    def on_train_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called before each batch is passed to the model."""

    @event_with_data
    def on_train_update_end(
        self, trainer: Trainer, *, num_updates: int = 0, **kwargs: Any
    ) -> None:
        """Called once per applied update.

        Args:
            trainer: The trainer.
            num_updates: The updates of the run so far.
            **kwargs: What later versions may send besides.
        """

    @event_with_data
    def on_train_step_end(
        self,
        trainer: Trainer,
        batch: Any,
        batch_output: Any,
        *,
        step: int = 0,
        **kwargs: Any,
    ) -> None:
        """Called after each batch; if it closed a window, the weights have moved.

        Args:
            trainer: The trainer.
            batch: The batch, on the device.
            batch_output: What ``calculate_train_batch_loss`` returned.
            step: The number of the batch in its epoch, counted from 0.
            **kwargs: What later versions may send besides.
        """

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called after each pass over the training data, its loss being recorded."""

    @event_with_data
    def on_eval_epoch_start(
        self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any
    ) -> None:
        """Called at the start of each pass over the evaluation data.

        Args:
            trainer: The trainer.
            is_intermediate: Whether this happens amid a training epoch.
            **kwargs: What later versions may send besides.
        """

    def on_eval_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called before each evaluation batch is passed to the model."""

    @event_with_data
    def on_eval_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any
    ) -> None:
        """Called after each evaluation batch.

        Args:
            trainer: The trainer.
            batch: The batch, on the device.
            batch_output: What ``calculate_eval_batch_loss`` returned.
            **kwargs: What later versions may send besides.
        """

    @event_with_data
    def on_eval_epoch_end(
        self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any
    ) -> None:
        """Called after each pass over the evaluation data, its loss being recorded.

        Args:
            trainer: The trainer.
            is_intermediate: Whether this happens amid a training epoch.
            **kwargs: What later versions may send besides.
        """

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called once an epoch is finished, its evaluation included."""

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called at the end of ``train()``, also if the run was stopped."""

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called at the start of ``evaluate()``, once everything is prepared."""

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called at the end of ``evaluate()``, also if the run was stopped."""

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called when a :class:`StopTrainingError` ends the run, before its end."""

    @event_with_data
    def on_exception(
        self,
        trainer: Trainer,
        *,
        exception: BaseException | None = None,
        **kwargs: Any,
    ) -> None:
        """Called when any other error ends the run: close what you have opened.

        The end of the run may follow, and the error goes on to the caller. The other
        processes may be elsewhere, so do not communicate with them.

        Args:
            trainer: The trainer.
            exception: The error.
            **kwargs: What later versions may send besides.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to know, to be saved with its state.

        Tensors and plain values only (numbers, strings, None, and lists and
        dictionaries of them).
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state returned by :meth:`state_dict`.

        Called before ``on_training_run_start``, which must not reset it then.
        """


class CallbackHandler:
    """Holds the callbacks of a trainer and calls them, in order, for each event.

    Args:
        callbacks: Callbacks, as instances or as classes that need no arguments. A
            class may occur more than once. None means no callbacks.

    Attributes:
        callbacks: The instances. The list may be changed at any time; the methods of
            its members are looked up when it has changed and at the start of a run.
        raises_at_once: Whether an error keeps the remaining callbacks from hearing of
            the event. The trainer switches it off with several processes, which have
            to meet in the callbacks that communicate.
    """

    def __init__(self, callbacks: Iterable[Any] | None = ()) -> None:
        self.callbacks: list[Any] = []
        self.raises_at_once = True
        self._enabled = True
        self._listeners: dict[str, list[Callable[..., Any]]] = {}
        self._looked_up_for: list[Any] = []
        self.add_callbacks(callbacks)

    def add_callbacks(self, callbacks: Iterable[Any] | None) -> None:
        """Add several callbacks, see :meth:`add_callback`."""
        if not isinstance(callbacks, Iterable | None):
            raise TypeError(
                f"callbacks must be a list, got {callbacks!r}: put it in one."
            )
        for callback in callbacks or ():
            self.add_callback(callback)

    def add_callback(self, callback: Any) -> None:
        """Add a callback to the end of the list.

        Args:
            callback: An instance, or a class that needs no arguments. It does not have
                to inherit from :class:`TrainerCallback` if it has a method for at least
                one event.

        Raises:
            TypeError: If it is neither, or a class that needs arguments.
            ValueError: If this very instance is in the list.
        """
        instance = callback() if isinstance(callback, type) else callback
        if not _is_callback(instance):
            raise TypeError(
                f"A callback must be a TrainerCallback, or have a method for an event "
                f"such as on_train_epoch_end, got {instance!r}."
                + (" Unpack it with *." if isinstance(instance, list | tuple) else "")
            )
        if any(instance is present for present in self.callbacks):
            raise ValueError(
                f"{instance!r} has been added already, and would be called twice for "
                f"each event. Present: {', '.join(self.callback_list)}."
            )
        self.callbacks.append(instance)

    def clear_callbacks(self) -> None:
        """Remove all callbacks."""
        self.callbacks = []

    @property
    def callback_list(self) -> list[str]:
        """The class names of the callbacks, in order."""
        return [type(callback).__name__ for callback in self.callbacks]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.callbacks)

    def call_event(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Call the method named ``event`` on each callback that has one, in order.

        Any name will do, so a trainer can have events of its own. Arguments are passed
        on as they are.

        A :class:`StopTrainingError` is raised once the remaining callbacks have heard
        of the event, so that none misses the last one of a run. Other errors are raised
        at once, except for ``on_exception``, where all callbacks may clean up first,
        and unless ``raises_at_once`` is off.
        """
        errors: list[BaseException] = []
        for listener in self.listeners(event) if self._enabled else ():
            try:
                listener(*args, **kwargs)
            except StopTrainingError as error:  # noqa: PERF203 (each one on its own)
                errors.append(error)
            except Exception as error:
                owner = type(getattr(listener, "__self__", listener)).__name__
                add_note(error, f"Raised by the callback {owner} in the event {event}.")
                if self.raises_at_once and event != "on_exception":
                    raise
                errors.append(error)
            except BaseException as error:
                # A second Ctrl-C ends one callback's cleaning up, not that of all.
                if event != "on_exception":
                    raise
                errors.append(error)
        if errors:
            raise max(errors, key=_gravity)

    def may_stop_alone(self, events: Iterable[str]) -> bool:
        """Say whether a callback that listens to one of the events may stop alone.

        See ``TrainerCallback.may_stop_alone``.
        """
        return self._enabled and any(
            getattr(getattr(listener, "__self__", None), "may_stop_alone", True)
            for event in events
            for listener in self.listeners(event)
        )

    def listeners(self, event: str) -> list[Callable[..., Any]]:
        """Return the methods to call for an event, in order.

        Methods that only inherit the empty one of :class:`TrainerCallback` are left
        out. The result is kept until the list of callbacks changes or a run starts, so
        asking costs next to nothing.
        """
        if self.callbacks != self._looked_up_for or event in _RUN_STARTS:
            self._listeners.clear()
            self._looked_up_for = list(self.callbacks)
        listeners = self._listeners.get(event)
        if listeners is None:
            listeners = self._listeners[event] = self._look_up(event)
        return listeners

    def _look_up(self, event: str) -> list[Callable[..., Any]]:
        ordered = sorted(self.callbacks, key=lambda callback: _rank(callback, event))
        methods = (getattr(callback, event, None) for callback in ordered)
        empty = getattr(TrainerCallback, event, None)
        return [
            method
            for method in methods
            if method is not None and getattr(method, "__func__", method) is not empty
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all callbacks that keep one."""
        states = {
            name: callback.state_dict()
            for name, callback in self._named_callbacks()
            if hasattr(callback, "state_dict")
        }
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give each callback its state back.

        Callbacks are recognised by their class and, among those of one class, by their
        order. Those that the state does not know stay as they are.
        """
        for name, callback in self._named_callbacks():
            if name in state:
                callback.load_state_dict(state[name])

    def _named_callbacks(self) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for name, callback in zip(self.callback_list, self.callbacks, strict=True):
            seen[name] = seen.get(name, 0) + 1
            yield (name if seen[name] == 1 else f"{name}_{seen[name]}"), callback


# Methods may have been replaced since the last run, for instance by a test.
_RUN_STARTS = frozenset({"on_training_run_start", "on_evaluation_run_start"})


def _gravity(error: BaseException) -> tuple[bool, ...]:
    return (
        not isinstance(error, Exception),
        # All processes raise such an error here, so none may raise another one.
        is_on_all_processes(error),
        not isinstance(error, StopTrainingError),
        getattr(error, "reaches_caller", False),
    )


def _rank(callback: Any, event: str) -> int:
    if not isinstance(callback, TrainerCallback):
        return 0
    return (event in callback.called_last) - (event in callback.called_first)


def _is_callback(instance: Any) -> bool:
    # A mock has what it is asked for, and shows nothing of it beforehand.
    has_events = any(name.startswith("on_") for name in dir(instance))
    return has_events or callable(getattr(instance, "on_train_epoch_end", None))
