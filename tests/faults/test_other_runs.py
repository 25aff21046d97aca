"""Resuming with other batches, other data, other loaders, and from other states."""

import warnings

import pytest
import torch
from processes import Job
from runs import At, raise_
from scenario import Augmented, Scenario, difference
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    SaveTrainingStateCallback,
    TerminateOnNaNCallback,
    TrainerCallback,
)
from pytorch_accelerated.errors import CheckpointError

OTHER_RUN = "resume with other processes, batches or accumulation"


class NoteSamples(TrainerCallback):
    """Notes which samples each epoch trains on, by their first number."""

    def __init__(self):
        self.seen = {}

    def on_train_step_end(self, trainer, batch, batch_output, **kwargs):
        samples = self.seen.setdefault(trainer.run_history.current_epoch, [])
        samples += batch[0][:, 0].tolist()


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
        before, after = NoteSamples(), NoteSamples()
        # Like Ctrl-C, after the state of that update is saved.
        stopping = At(
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
        everything = sorted(Augmented(44).inputs[:, 0].tolist())
        seen = before.seen[1] + after.seen[1]
        trials.add(None if sorted(seen) == everything else f"{len(seen)} samples")
        trials.add(None if sorted(after.seen[2]) == everything else "epoch 2")


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


# ------------------------------------------------------------ loaders of the user's


class Counting(IterableDataset):
    """A stream, which can go to a place in it if it is asked to keep one."""

    def __init__(self, num_samples=20):
        self.num_samples = num_samples
        self.start = 0
        self.read = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for number in range(start, self.num_samples):
            self.read += 1
            self.next = number + 1
            yield torch.tensor([number / 10]), torch.tensor([number / 5])


class KeepsPlace(Counting):
    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.start = state["next"]


def train_on(dataset, folder, resume_from=None, num_workers=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.3), nn.Linear(4, 1))
    trainer = Trainer(
        model,
        nn.MSELoss(),
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        callbacks=[
            TerminateOnNaNCallback,
            SaveTrainingStateCallback(folder, save_every_n_steps=1),
        ],
        seed=3,
        accelerator_kwargs={"cpu": True},
    )
    is_loader = isinstance(dataset, DataLoader)
    trainer.train(
        dataset,
        num_epochs=2,
        per_device_batch_size=3,
        gradient_accumulation_steps=2,
        resume_from=resume_from,
        train_dataloader_kwargs=None if is_loader else {"num_workers": num_workers},
    )
    return trainer


@pytest.mark.parametrize("dataset_class", [Counting, KeepsPlace])
def test_a_stream_goes_on_where_it_was(dataset_class, tmp_path):
    expected = train_on(dataset_class(), tmp_path / "whole").model.state_dict()
    for number in (1, 2, 4, 6):
        dataset = dataset_class()
        state = tmp_path / "whole" / f"step_{number}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = train_on(dataset, tmp_path / f"{number}", state)
        assert difference(expected, trainer.model.state_dict()) is None
        if dataset_class is Counting:
            assert ["loads" in str(w.message) for w in caught] == [True]
        else:
            assert not caught
            samples_done = (0, 6, 12, 18, 20, 26, 32)[number]
            assert dataset.read == 40 - samples_done


def test_the_place_in_a_loader_of_the_users_is_not_guessed(tmp_path):
    samples = Augmented(20).inputs[:, :1]
    data = TensorDataset(samples, samples)

    def loader(batch_size):
        return DataLoader(data, batch_size, sampler=RandomSampler(data))

    train_on(loader(3), tmp_path)
    with pytest.raises(CheckpointError, match="loader or sampler of yours"):
        train_on(loader(5), tmp_path / "2", tmp_path / "step_2")
