import re
import time

import pytest
import torch
from torch import nn

from pytorch_accelerated.trainer import Trainer


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


def test_where_all_is_well_nothing_is_suggested_and_the_evidence_given(capsys, samples):
    trainer = create(fused=True)
    trainer.train(samples(2), num_epochs=1)

    assert trainer.advise() == []
    nothing, evidence = capsys.readouterr().out.splitlines()
    assert nothing == "Nothing to suggest."
    assert re.match(
        r"Of the last epoch's training, \S+ s, the loop waited \d+% for data, \S+ ms ",
        evidence,
    )


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
def test_the_verdict_comes_with_its_evidence(
    samples, monkeypatch, share, num_workers, cores, says, capsys
):
    trainer = create(fused=True)
    kwargs = {"num_workers": num_workers}
    trainer.train(samples(2), 1, train_dataloader_kwargs=kwargs)
    pace = trainer._run.pace
    trainer.evaluate(samples(2))  # the training run is what is spoken of
    pace.waited = share * pace.seconds
    pace.num_batches = 1
    monkeypatch.setattr("pytorch_accelerated.advice.usable_cores", lambda: cores)
    monkeypatch.setattr("pytorch_accelerated.advice.HAND_OVER_SECONDS", 0.0)

    (advice,) = trainer.advise()

    assert re.match(
        f"{share:.0%} of the time the loop waited for data: .*{says}", advice
    )
    assert f"waited {share:.0%} for data" in capsys.readouterr().out.splitlines()[-1]
    for waited, hand_over in ((0.05 * pace.seconds, 0.0), (pace.waited, pace.waited)):
        pace.waited = waited
        monkeypatch.setattr("pytorch_accelerated.advice.HAND_OVER_SECONDS", hand_over)
        assert trainer.advise() == []


class SlowBatches:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for batch in self.batches:
            time.sleep(0.2)
            yield batch


def test_a_run_measures_how_long_it_waits(samples):
    trainer = create(fused=True)
    # A stream: of its loading nothing else is known.
    loader = [tuple(batch[None] for batch in samples(1)[0])]
    trainer.train(SlowBatches(loader), 1)

    (advice,) = trainer.advise()
    assert "let your loader fetch ahead" in advice
    assert trainer._run.pace.num_batches == 1
    assert 0.2 <= trainer._run.pace.waited <= trainer._run.pace.seconds


def test_nothing_is_printed_unless_asked_for(capsys, samples):
    create().train(samples(2), num_epochs=1)

    assert capsys.readouterr().out == ""
