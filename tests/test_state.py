"""What each process takes over from a training state."""

from pytorch_accelerated.state import ProcessState, TrainingState


def state_of(*processes):
    return TrainingState(None, None, None, None, {}, processes=processes)


def test_on_fewer_processes_the_sums_of_all_are_added_up():
    """The losses of an epoch under way count each sample, whoever has seen it."""
    state = state_of(
        ProcessState(trackers={"loss": {"total": 1.5, "count": 2.0}}),
        ProcessState(
            trackers={
                "loss": {"total": 2.0, "count": 4.0},
                "accuracy": {"total": 3.0, "count": 4.0},
            }
        ),
        ProcessState(),
    )

    assert state.of_process(0, 2) == ProcessState(
        trackers={
            "loss": {"total": 3.5, "count": 6.0},
            "accuracy": {"total": 3.0, "count": 4.0},
        }
    )
    assert state.of_process(1, 2) == ProcessState()


def test_on_as_many_processes_each_takes_over_its_own():
    first, second = ProcessState({"torch": 1}), ProcessState({"torch": 2})

    assert state_of(first, second).of_process(1, 2) is second
