"""What each process takes over from a training state."""

from pytorch_accelerated.training_state import TrainingState


def state_of(*processes):
    return TrainingState(None, None, None, None, {}, processes=processes)


def test_on_fewer_processes_the_sums_of_all_are_added_up():
    """The losses of an epoch under way count each sample, whoever has seen it."""
    state = state_of(
        {"trackers": {"loss": {"total": 1.5, "count": 2.0}}},
        {
            "trackers": {
                "loss": {"total": 2.0, "count": 4.0},
                "accuracy": {"total": 3.0, "count": 4.0},
            }
        },
        {},
    )

    assert state.of_process(0, 2) == {
        "trackers": {
            "loss": {"total": 3.5, "count": 6.0},
            "accuracy": {"total": 3.0, "count": 4.0},
        }
    }
    assert state.of_process(1, 2) == {}


def test_on_as_many_processes_each_takes_over_its_own():
    state = state_of({"random_states": 1}, {"random_states": 2})

    assert state.of_process(1, 2) == {"random_states": 2}
