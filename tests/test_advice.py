import re
import time

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from pytorch_accelerated.callbacks import ThroughputCallback
from pytorch_accelerated.trainer import Trainer


class SlowSamples(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        time.sleep(0.002)
        return torch.ones(1), torch.zeros(1)


def create(fused=None):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    return Trainer(model, nn.MSELoss(), optimizer, callbacks=())


def test_an_optimizer_that_is_not_fused_is_pointed_out(capsys):
    trainer = create()

    (advice,) = trainer.advise()

    assert advice.startswith("SGD(..., fused=True)")
    assert capsys.readouterr().out.strip() == advice
    assert not trainer.optimizer.param_groups[0]["fused"]


def test_where_all_is_well_nothing_is_suggested(capsys, samples):
    trainer = create(fused=True)
    trainer.train(samples(2), num_epochs=1)

    assert trainer.advise() == []
    nothing, closing = capsys.readouterr().out.splitlines()
    assert nothing == "Nothing to suggest."
    assert closing.startswith("A ThroughputCallback would tell")


def test_slow_samples_without_workers_are_pointed_out(capsys):
    trainer = create(fused=True)
    trainer.train(SlowSamples(), 1, train_dataloader_kwargs={"num_workers": 0})

    (advice,) = trainer.advise()

    assert "Let workers do it" in advice


def test_workers_come_with_the_pace_that_they_can_keep(capsys):
    trainer = create(fused=True)
    trainer.train(SlowSamples(), 1, train_dataloader_kwargs={"num_workers": 1})

    (advice,) = trainer.advise()

    assert "1 workers feed at most" in advice


@pytest.mark.parametrize(
    ("share", "num_workers", "cores", "says"),
    [
        (0.41, 0, 8, "give more workers than 0, .*{'num_workers': 1}"),
        (0.75, 0, 8, "give more workers than 0, .*{'num_workers': 3}"),
        (0.5, 2, 8, "give more workers than 2, .*{'num_workers': 4}"),
        (0.9, 2, 8, "give more workers than 2, .*{'num_workers': 8}"),
        (0.5, 2, 2, "2 workers have 2 cores. Make the samples cheaper"),
    ],
)
def test_where_it_was_measured_the_verdict_comes_with_its_evidence(
    samples, monkeypatch, share, num_workers, cores, says, capsys
):
    trainer = create(fused=True)
    kwargs = {"num_workers": num_workers}
    trainer.train(samples(2), 1, train_dataloader_kwargs=kwargs)
    trainer.evaluate(samples(2))  # the training run is what is spoken of
    trainer.run_history.update_metric("train_data_wait_share", share)
    trainer.run_history.update_metric("train_step_seconds_p50", 0.1)
    monkeypatch.setattr("pytorch_accelerated.advice.usable_cores", lambda: cores)

    (advice,) = trainer.advise()

    assert re.match(
        f"{share:.0%} of the time the loop waited for data: .*{says}", advice
    )
    assert "time of its last epoch" in capsys.readouterr().out.splitlines()[-1]


def test_a_throughput_callback_is_what_measures_it(samples):
    trainer = create(fused=True)
    trainer.callback_handler.add_callback(ThroughputCallback)
    # A stream: of its loading nothing else is known.
    loader = [tuple(batch[None] for batch in samples(1)[0])]
    trainer.train(SlowBatches(loader), 1)
    assert "let your loader fetch ahead" in trainer.advise()[0]
    for share, step in ((0.02, 1.0), (0.5, 0.001)):
        trainer.run_history.update_metric("train_data_wait_share", share)
        trainer.run_history.update_metric("train_step_seconds_p50", step)
        assert trainer.advise() == []


class SlowBatches:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for batch in self.batches:
            time.sleep(0.2)
            yield batch


def test_nothing_is_printed_unless_asked_for(capsys, samples):
    create().train(samples(2), num_epochs=1)

    assert capsys.readouterr().out == ""
