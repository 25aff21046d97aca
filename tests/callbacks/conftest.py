"""A model with one weight, whose losses can be worked out by hand.

With inputs of 1 and targets of 0 the loss is the square of the weight and its gradient
twice the weight. A learning rate of 0.25 then halves the weight at each update: after k
updates from 1 it is 0.5 ** k, and the loss 0.25 ** k.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated.errors import StopTrainingError
from pytorch_accelerated.trainer import Trainer


class ScriptedTrainer(Trainer):
    """Records a metric, "score", with values given beforehand, at each evaluation."""

    scores = ()

    def eval_epoch_end(self):
        score = self.scores[self.run_history.current_epoch - 1]
        self.run_history.update_metric("score", score)


@pytest.fixture
def samples():
    def create(count):
        return TensorDataset(torch.ones(count, 1), torch.zeros(count, 1))

    return create


@pytest.fixture
def create_trainer():
    def create(callbacks=(), *, lr=0.25, model=None, trainer_class=Trainer, **kwargs):
        if model is None:
            model = nn.Linear(1, 1, bias=False)
            nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        return trainer_class(model, nn.MSELoss(), optimizer, callbacks, **kwargs)

    return create


@pytest.fixture
def train_with_scores(create_trainer, samples):
    """Train for as many epochs as there are scores, one update each."""

    def train(callbacks, scores, trainer=None, **kwargs):
        trainer = trainer or create_trainer(callbacks, trainer_class=ScriptedTrainer)
        trainer.scores = scores
        trainer.train(
            samples(1), num_epochs=len(scores), eval_dataset=samples(1), **kwargs
        )
        return trainer

    return train


@pytest.fixture
def weight_of():
    def weight(trainer):
        return trainer.get_model().weight.item()

    return weight


@pytest.fixture
def reaches_the_caller():
    """What to expect of a run in which this error was raised."""

    def expect(error):
        if isinstance(error, StopTrainingError):
            return nullcontext()
        return pytest.raises(type(error), match=str(error))

    return expect
