import pytest
from toys import Keeps

from pytorch_accelerated.callbacks import LimitBatchesCallback
from pytorch_accelerated.data import LimitBatches


def test_epochs_are_limited_to_their_first_batches(create_trainer, samples):
    evaluated = Keeps("on_eval_step_end", lambda trainer, **kwargs: None)
    trainer = create_trainer([LimitBatchesCallback(2), evaluated])
    trainer.train(samples(5), 2, eval_dataset=samples(5), per_device_batch_size=1)
    assert (trainer.num_steps, len(evaluated.kept)) == (4, 4)
    trainer.evaluate(samples(5), per_device_batch_size=1)
    assert len(evaluated.kept) == 6


def test_trainers_created_in_the_context_are_limited(create_trainer, samples):
    with LimitBatches(3):
        trainer = create_trainer()
    assert isinstance(trainer.callback_handler.callbacks[0], LimitBatchesCallback)
    trainer.train(samples(5), 1, per_device_batch_size=1)
    assert trainer.num_steps == 3


def test_the_smaller_of_two_limits_holds(create_trainer):
    for limits in ((1, 2), (2, 1), (1, 1)):
        trainer = create_trainer()
        trainer._train_dataloader = [1, 2, 3]
        for limit in limits:
            LimitBatchesCallback(limit).limit(trainer)
        assert trainer._eval_dataloader is None
        assert list(trainer._train_dataloader) == [1]


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LimitBatchesCallback(0)
