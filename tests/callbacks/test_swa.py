from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset
from toys import At, create_trainer, ones, overriding, seeded

from pytorch_accelerated.callbacks import (
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StopTrainingError,
    SwaCallback,
)
from pytorch_accelerated.errors import TrainingWarning

DATA = TensorDataset(*torch.randn(2, 12, 1, generator=torch.Generator().manual_seed(0)))


def create_normed():
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(1, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Linear(4, 1)
        )
    )


def test_the_model_ends_with_the_mean_of_the_epochs_from_the_first_on(weight_of):
    """The weight halves at each update, of which an epoch has one."""
    swa = SwaCallback(start_epoch=3)
    trainer = create_trainer([swa])

    history = trainer.train(ones(1), num_epochs=5, eval_dataset=ones(1))

    assert weight_of(trainer) == pytest.approx((0.5**3 + 0.5**4 + 0.5**5) / 3)
    assert swa.average.num_updates == 3
    # Meanwhile it trained, and was evaluated, as if nobody averaged.
    assert history.get_latest_metric("eval_loss_epoch") == 0.25**5
    mean = weight_of(trainer)
    assert trainer.evaluate(ones(1))["evaluation_loss"] == pytest.approx(mean**2)

    trainer.train(ones(1), num_epochs=1, reset_run_history=False)
    assert weight_of(trainer) == pytest.approx(mean / 2), "a mean of its own"


def test_batch_norms_are_measured_as_torch_measures_them_whatever_their_mode():
    model, by_hand = create_normed(), create_normed()
    loader = DataLoader(DATA, batch_size=4)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    average = AveragedModel(by_hand)
    for _ in range(2):
        for inputs, targets in loader:
            nn.functional.mse_loss(by_hand(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(by_hand)
    update_bn(loader, average)

    ends_in_evaluation = overriding(training_run_end=lambda self: self.model.eval())
    trainer = create_trainer(
        [SwaCallback(1)], model=model, lr=0.1, trainer_class=ends_in_evaluation
    )
    trainer.train(loader, num_epochs=2)

    for name, tensor in average.module.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
    assert model[1].momentum == 0.3
    assert not model.training


def test_a_frozen_batch_norm_keeps_its_statistics():
    model = create_normed()
    model[1].eval()
    before = model[1].running_var.fill_(2.0).clone()

    create_trainer([SwaCallback(1)], model=model, lr=0.1).train(DATA, num_epochs=1)

    assert torch.equal(model[1].running_var, before)
    assert not model[1].training


class Batches:
    """More of them than a run takes."""

    num_passes = 0

    def __iter__(self):
        self.num_passes += 1
        return iter([[torch.ones(2, 1), torch.ones(2, 1)]] * 100)


@pytest.mark.parametrize("has_norm", [True, False])
def test_only_batch_norms_need_the_data_again_and_of_a_stream_what_was_trained_on(
    has_norm,
):
    batches, model = Batches(), create_normed() if has_norm else nn.Linear(1, 1)

    trainer = create_trainer([SwaCallback(1)], model=model)
    trainer.train(batches, max_num_train_steps=3)

    assert batches.num_passes == (2 if has_norm else 1)
    assert not has_norm or model[1].num_batches_tracked == 3


@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
def test_a_resumed_run_ends_with_the_same_mean(tmp_path, epoch):
    def run(*callbacks, **kwargs):
        trainer = create_trainer(
            [SwaCallback(2), *callbacks], model=create_normed(), lr=0.1, seed=0
        )
        trainer.train(DATA, num_epochs=4, **kwargs)
        return trainer.model.state_dict()

    whole = run(SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1))
    resumed = run(resume_from=tmp_path / f"epoch_{epoch}")

    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_that_ends_early_has_the_mean_so_far_and_one_that_fails_its_own_weights(
    weight_of,
):
    def weight_after(error, epoch):
        def end(trainer, **kwargs):
            if trainer.run_history.current_epoch == epoch:
                raise error

        trainer = create_trainer([SwaCallback(2), At(on_train_epoch_end=end)])
        with suppress(ZeroDivisionError):
            trainer.train(ones(1), num_epochs=6)
        return weight_of(trainer)

    stop = StopTrainingError("enough")
    assert weight_after(stop, epoch=4) == pytest.approx((0.5**2 + 0.5**3) / 2)
    assert weight_after(stop, epoch=1) == 0.5, "nothing was averaged"
    assert weight_after(ZeroDivisionError(), epoch=4) == 0.5**4


def test_a_best_model_that_would_be_loaded_for_nothing_is_warned_of(tmp_path):
    best = SaveBestModelCallback(tmp_path / "best.pt", watch_metric="train_loss_epoch")
    trainer = create_trainer([best, SwaCallback(1)])
    with pytest.warns(TrainingWarning, match="mean in place of .* load_saved_checkp"):
        trainer.train(ones(1), 1)
    best.load_saved_checkpoint = False
    trainer.train(ones(1), 1)


def test_a_start_after_the_end_is_refused_before_the_run():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SwaCallback(0)
    trainer = create_trainer([SwaCallback(start_epoch=4)])

    with pytest.raises(ValueError, match=r"from epoch 4 on, .* of this run is 3"):
        trainer.train(ones(1), num_epochs=3)

    assert trainer.num_updates == 0
    trainer.callback_handler.clear_callbacks()
    trainer.train(ones(1), num_epochs=3)
    trainer.callback_handler.add_callback(SwaCallback(start_epoch=4))
    trainer.train(ones(1), num_epochs=1, reset_run_history=False)
