"""What the tests of several callbacks need."""

from contextlib import nullcontext

import pytest

from pytorch_accelerated.errors import StopTrainingError
from pytorch_accelerated.trainer import Trainer


class ScriptedTrainer(Trainer):
    """Records a metric, "score", with values given beforehand, at each evaluation."""

    scores = ()

    def eval_epoch_end(self):
        score = self.scores[self.run_history.current_epoch - 1]
        self.run_history.update_metric("score", score)


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
        if isinstance(error, StopTrainingError) and not error.reaches_caller:
            return nullcontext()
        return pytest.raises(type(error), match=str(error))

    return expect
