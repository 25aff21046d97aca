"""Resuming with other batches, other processes and other data."""

import warnings

import pytest
from processes import Job
from runs import AtNth, raise_
from scenario import Augmented, Scenario
from toys import Keeps

from pytorch_accelerated.errors import CheckpointError

OTHER_RUN = "resume with other processes, batches or accumulation"


def samples_of(trainer, batch, **kwargs):
    """Return the epoch and the first number of each sample."""
    epoch = trainer.run_history.current_epoch
    return [(epoch, number) for number in batch[0][:, 0].tolist()]


SCENARIO = Scenario(num_epochs=2, in_memory=True, patience=9, ends_schedule=False)


@pytest.mark.fault(OTHER_RUN)
@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 3},
        {"batch_size": 10},
        {"accumulation": 1},
        {"accumulation": 2},
        {"accumulation": 5, "batch_size": 2},
    ],
    ids=str,
)
def test_each_sample_is_seen_once_with_other_batches(changes, tmp_path, trials):
    for stop in (1, 2, 3):
        before, after = (Keeps("on_train_step_end", samples_of) for _ in range(2))
        # Like Ctrl-C, after the state of that update is saved.
        stopping = AtNth(
            "on_train_step_end",
            lambda _: raise_(KeyboardInterrupt()),
            stop * SCENARIO.accumulation,
            is_last=True,
        )
        stopped = SCENARIO.with_(callbacks=(before, stopping))
        with pytest.raises(KeyboardInterrupt):
            stopped.run(tmp_path / f"{stop}")
        state = tmp_path / f"{stop}" / "states" / f"step_{stop}"
        resumed = SCENARIO.with_(callbacks=(after,), **changes)
        with pytest.warns(UserWarning, match="keeps its place in the data"):
            resumed.run(tmp_path / f"resumed {stop}", resume_from=state)
        seen = sorted(pair for step in before.kept + after.kept for pair in step)
        numbers = sorted(Augmented(44).inputs[:, 0].tolist())
        everything = [(epoch, number) for epoch in (1, 2) for number in numbers]
        trials.add(None if seen[:44] == everything[:44] else f"epoch 1 of {len(seen)}")
        trials.add(None if seen[44:] == everything[44:] else f"epoch 2 of {len(seen)}")


@pytest.mark.fault(OTHER_RUN)
@pytest.mark.parametrize(("then", "now"), [(1, 2), (2, 1)])
def test_the_place_is_kept_with_another_number_of_processes(
    then, now, tmp_path, trials
):
    def first():
        SCENARIO.run(tmp_path / "first")

    def second():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = SCENARIO.run(
                tmp_path / "second", tmp_path / "first" / "states" / "step_2"
            )
        text = f"number of processes {now} instead of {then}"
        assert any(text in str(warning.message) for warning in caught)
        # 24 / 44 samples of the first epoch were seen, in 2 updates of 12 or 24.
        assert trainer.num_samples_seen == 2 * 44
        whole = SCENARIO.run(tmp_path / "whole")
        history = trainer.run_history.get_metric_values("train_loss_epoch")
        assert len(list(history)) == 2
        assert trainer.num_updates != whole.num_updates or then == now

    for number, function in ((then, first), (now, second)):
        job = Job(function, tmp_path / "log", number)
        trials.add(job.wait_or_explain())


@pytest.mark.fault(OTHER_RUN)
def test_other_data_is_refused_in_the_middle_of_an_epoch_only(tmp_path, trials):
    SCENARIO.run(tmp_path)
    more = SCENARIO.with_(num_samples=50)
    with pytest.raises(CheckpointError, match=r"44 samples.* has 50 samples now"):
        more.run(tmp_path / "more", resume_from=tmp_path / "states" / "step_2")
    trainer = more.run(tmp_path / "more", resume_from=tmp_path / "states" / "epoch_1")
    assert trainer.num_samples_seen == 44 + 50
    trials.add(None)


@pytest.mark.fault(OTHER_RUN)
def test_a_schedule_that_ends_too_early_ends_the_run_in_words(tmp_path, trials):
    """Those of torch do; those of the library stay at their last value."""
    scenario = SCENARIO.with_(ends_schedule=True)
    scenario.run(tmp_path)
    with (
        pytest.warns(UserWarning, match="keeps its place"),
        pytest.raises(ValueError, match="Tried to step 9 times"),
    ):
        scenario.with_(accumulation=1).run(
            tmp_path / "other", resume_from=tmp_path / "states" / "step_1"
        )
    trials.add(None)


def test_the_place_in_a_loader_of_the_users_is_not_guessed(tmp_path):
    scenario = SCENARIO.with_(own_loader=True)
    state = tmp_path / "states" / "step_2"
    scenario.run(tmp_path)
    with pytest.raises(CheckpointError, match="loader or sampler of yours"):
        scenario.with_(batch_size=5).run(tmp_path / "other", state)
