import time

import torch
from torch import nn
from torch.utils.data import Dataset

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
    assert capsys.readouterr().out.strip() == "Nothing to suggest."


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


def test_nothing_is_printed_unless_asked_for(capsys, samples):
    create().train(samples(2), num_epochs=1)

    assert capsys.readouterr().out == ""
