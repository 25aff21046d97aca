import copy
import inspect
import pickle
from unittest.mock import MagicMock, Mock

import pytest

from pytorch_accelerated import callbacks
from pytorch_accelerated.callbacks import (
    CallbackHandler,
    CallbackMethodNotImplementedError,
    LimitBatchesCallback,
    SaveBestModelCallback,
    StopTrainingError,
    TrainerCallback,
)
from pytorch_accelerated.errors import NonFiniteLossError


def needs_no_arguments(cls):
    is_one = inspect.isclass(cls) and issubclass(cls, TrainerCallback)
    parameters = inspect.signature(cls).parameters.values() if is_one else ()
    return is_one and all(each.default is not each.empty for each in parameters)


ALL_PUBLIC = map(vars(callbacks).get, callbacks.__all__)
SOME_OF_EACH = [cls() for cls in ALL_PUBLIC if needs_no_arguments(cls)]


class Recorder(TrainerCallback):
    def __init__(self, name="recorder", log=None):
        self.name = name
        self.log = [] if log is None else log

    def on_train_epoch_end(self, trainer, **kwargs):
        self.log.append(self.name)


def test_callbacks_are_objects_or_classes_and_several_of_one_class_or_none():
    """Defect 56."""
    handler = CallbackHandler([SaveBestModelCallback("a.pt"), SaveBestModelCallback])
    assert list(handler) == handler.callbacks
    assert all(isinstance(each, SaveBestModelCallback) for each in handler)
    assert handler.callback_list == ["SaveBestModelCallback", "SaveBestModelCallback"]
    for nothing in (None, (), []):
        handler = CallbackHandler(nothing)
        handler.call_event("on_init_end", None)
        assert handler.callbacks == []


def test_the_same_instance_twice_is_refused():
    recorder = Recorder()
    with pytest.raises(ValueError, match=r"added already.*Present: Recorder"):
        CallbackHandler([recorder, recorder])


@pytest.mark.parametrize("wrong", ["ProgressBarCallback", 3, {}, lambda: None])
def test_something_that_is_no_callback_is_refused(wrong):
    with pytest.raises(TypeError, match="must be a TrainerCallback, or have a method"):
        CallbackHandler([wrong])


def test_callbacks_in_a_list_of_the_list_are_to_be_unpacked():
    with pytest.raises(TypeError, match=r"Unpack it with \*"):
        CallbackHandler([(Recorder, Recorder)])


@pytest.mark.parametrize("alone", [Recorder, Recorder()])
def test_a_callback_that_is_not_in_a_list_is_refused(alone):
    with pytest.raises(TypeError, match=r"must be a list, got .*Recorder.*put it in"):
        CallbackHandler(alone)


def test_any_event_name_may_be_called_and_callbacks_without_it_are_skipped():
    class Interested(TrainerCallback):
        def on_lunch(self, trainer, dish):
            self.eaten = (trainer, dish)

    interested = Interested()
    handler = CallbackHandler([Recorder, interested])
    handler.call_event("on_lunch", trainer="me", dish="soup")
    assert interested.eaten == ("me", "soup")


def test_callbacks_need_not_inherit():
    """Defect 56."""

    class Duck:
        def on_train_epoch_end(self, trainer, **kwargs):
            self.called_with = trainer

    duck = Duck()
    handler = CallbackHandler([duck])
    handler.call_event("on_train_epoch_start", 1)
    handler.call_event("on_train_epoch_end", 2)
    assert duck.called_with == 2


def test_mocks_hear_of_all_events_and_methods_set_on_an_instance_are_called():
    recorder = Recorder()
    recorder.on_eval_epoch_end = Mock()
    mocks = [Mock(), MagicMock(), recorder]
    CallbackHandler(mocks).call_event("on_eval_epoch_end", 1, a=2)
    for mock in mocks:
        mock.on_eval_epoch_end.assert_called_once_with(1, a=2)


def test_only_callbacks_that_override_an_event_are_called_for_it():
    handler = CallbackHandler([Recorder, TrainerCallback])
    assert handler.listeners("on_train_step_end") == []
    assert handler.listeners("on_train_epoch_end") == [
        handler.callbacks[0].on_train_epoch_end
    ]


def test_callbacks_that_are_added_and_removed_later_are_noticed():
    log = []
    handler = CallbackHandler()
    handler.call_event("on_train_epoch_end", None)
    handler.add_callbacks([Recorder("added", log)])
    handler.call_event("on_train_epoch_end", None)
    handler.callbacks.insert(0, Recorder("inserted", log))
    handler.call_event("on_train_epoch_end", None)
    handler.callbacks[1] = Recorder("replaced", log)
    handler.call_event("on_train_epoch_end", None)
    handler.clear_callbacks()
    handler.call_event("on_train_epoch_end", None)
    assert log == ["added", "inserted", "added", "inserted", "replaced"]


def test_a_disabled_handler_calls_nobody():
    recorder = Recorder()
    handler = CallbackHandler([recorder])
    handler._enabled = False
    handler.call_event("on_train_epoch_end", None)
    assert recorder.log == []


def test_an_error_surfaces_as_it_is_and_names_the_callback_and_the_event():
    """Defect 10: a missing attribute was taken for an event that is not there."""

    class Forgetful(TrainerCallback):
        def on_train_epoch_end(self, trainer, **kwargs):
            self.counter += 1

    with pytest.raises(AttributeError, match="counter") as info:
        CallbackHandler([Forgetful]).call_event("on_train_epoch_end", None)
    assert not isinstance(info.value, CallbackMethodNotImplementedError)
    assert info.traceback[-1].name == "on_train_epoch_end"
    assert info.value.__notes__ == [
        "Raised by the callback Forgetful in the event on_train_epoch_end."
    ]


@pytest.mark.parametrize(
    "callback", [LimitBatchesCallback(1), *SOME_OF_EACH], ids=lambda c: type(c).__name__
)
def test_callbacks_can_be_copied_pickled_and_asked_for_attributes(callback):
    """Defect 10: hasattr, copy, deepcopy and unpickling raised an error."""
    assert not hasattr(callback, "no_such_attribute")
    for twin in (
        copy.copy(callback),
        copy.deepcopy(callback),
        pickle.loads(pickle.dumps(callback)),
    ):
        assert type(twin) is type(callback)
        assert vars(twin).keys() == vars(callback).keys()


class Raiser(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_train_epoch_end(self, trainer, **kwargs):
        raise self.error

    def on_exception(self, trainer, **kwargs):
        raise self.error


def test_a_loss_that_is_not_finite_outweighs_another_reason_to_stop():
    handler = CallbackHandler(
        [Raiser(StopTrainingError("early")), Raiser(NonFiniteLossError("NaN"))]
    )
    with pytest.raises(NonFiniteLossError, match="NaN"):
        handler.call_event("on_train_epoch_end", None)


def test_another_error_ends_the_event_at_once_but_for_cleaning_up():
    last = Mock()
    handler = CallbackHandler([Raiser(ValueError("wrong")), last])
    for event in ("on_train_epoch_end", "on_exception"):
        with pytest.raises(ValueError, match="wrong"):
            handler.call_event(event, None, exception=KeyError("x"))
    last.on_train_epoch_end.assert_not_called()
    last.on_exception.assert_called_once()


def test_callbacks_may_ask_to_be_called_first_or_last():
    class First(Recorder):
        called_first = ("on_train_epoch_end",)

    class Last(Recorder):
        called_last = ("on_train_epoch_end",)

    log = []
    handler = CallbackHandler(
        [Last("last", log), Recorder("a", log), First("first", log), Recorder("b", log)]
    )
    handler.call_event("on_train_epoch_end", None)
    assert log == ["first", "a", "b", "last"]


def test_states_go_back_to_the_callbacks_they_came_from():
    class Stateful(TrainerCallback):
        value = None

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    class Duck:
        def on_train_epoch_end(self, trainer, **kwargs): ...

    first, second = Stateful(), Stateful()
    first.value, second.value = 1, 2
    state = CallbackHandler([first, Recorder(), second, Duck()]).state_dict()
    assert state == {"Stateful": {"value": 1}, "Stateful_2": {"value": 2}}

    handler = CallbackHandler([Recorder, Stateful, Stateful, Stateful])
    handler.load_state_dict(state)
    assert [callback.value for callback in handler.callbacks[1:]] == [1, 2, None]
