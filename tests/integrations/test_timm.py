"""Models, optimizers, schedules, data loaders and mixup of timm."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import ModelEmaCallback, TrainerCallback
from pytorch_accelerated.data import epoch_order, seed_everything
from pytorch_accelerated.trainer import TrainerWithTimmScheduler

timm = pytest.importorskip("timm")

from timm.data import Mixup, create_loader  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402

# ---------------------------------------------------------------------- schedules

NUM_EPOCHS, UPDATES_PER_EPOCH = 4, 3

SCHEDULES = {
    "cosine": {"sched": "cosine"},
    "cosine with warm-up": {"sched": "cosine", "warmup_epochs": 1},
    "cosine with cooldown": {"sched": "cosine", "cooldown_epochs": 1},
    "tanh with a warm-up before it": {
        "sched": "tanh",
        "warmup_epochs": 1,
        "warmup_prefix": True,
    },
    "step": {"sched": "step", "decay_epochs": 2},
    "multistep": {"sched": "multistep", "decay_milestones": [1, 3]},
    "poly with noise from the start": {"sched": "poly", "noise": [0.0, 1.0]},
}


class RecordLearningRates(TrainerCallback):
    """Keeps the learning rate of every group at every update."""

    def __init__(self):
        self.values = []

    def on_train_update_end(self, trainer, **kwargs):
        self.values.append(self.current)

    def on_train_step_start(self, trainer, **kwargs):
        self.current = [group["lr"] for group in trainer.optimizer.param_groups]


def create_optimizer():
    """Create an optimizer with two groups, with and without weight decay."""
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    return model, create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.1)


def rates_as_timm_does_it(settings):
    """The learning rates of the loop of timm's own training script."""
    _, optimizer = create_optimizer()
    scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        num_epochs=NUM_EPOCHS,
        updates_per_epoch=UPDATES_PER_EPOCH,
        **settings,
    )
    rates = []
    for epoch in range(num_epochs):
        num_updates = epoch * UPDATES_PER_EPOCH
        for _ in range(UPDATES_PER_EPOCH):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            num_updates += 1
            scheduler.step_update(num_updates=num_updates, metric=0.5)
        scheduler.step(epoch + 1, 0.5)
    return rates, num_epochs


def create_timm_scheduler(optimizer, num_epochs, **settings):
    return create_scheduler_v2(optimizer, num_epochs=NUM_EPOCHS, **settings)[0]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("has_eval_dataset", [True, False])
@pytest.mark.parametrize("by_epoch", [True, False], ids=["by epoch", "by update"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_as_in_the_training_script_of_timm(
    name, by_epoch, has_eval_dataset, accumulation
):
    """Defect 20: the first epoch's count was one epoch ahead."""
    settings = {**SCHEDULES[name], "step_on_epochs": by_epoch}
    expected, num_epochs = rates_as_timm_does_it(settings)
    model, optimizer = create_optimizer()
    rates = RecordLearningRates()
    # Five batches in an epoch make three windows of two.
    num_samples = UPDATES_PER_EPOCH * accumulation - (accumulation - 1)
    dataset = TensorDataset(torch.ones(num_samples, 1), torch.zeros(num_samples, 1))
    trainer = TrainerWithTimmScheduler(model, nn.MSELoss(), optimizer, [rates])

    trainer.train(
        dataset,
        num_epochs=num_epochs,
        eval_dataset=dataset if has_eval_dataset else None,
        per_device_batch_size=1,
        gradient_accumulation_steps=accumulation,
        create_scheduler_fn=partial(
            create_timm_scheduler,
            num_epochs=num_epochs,
            updates_per_epoch=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
            **settings,
        ),
    )

    assert rates.values == expected
    assert any(rate != [0.1, 0.1] for rate in rates.values)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_the_plateau_schedule_of_timm_goes_by_the_evaluation_loss(warmup_epochs):
    # Inputs of 0 leave the loss as it is: no epoch is better than the one before.
    dataset = TensorDataset(torch.zeros(3, 1), torch.ones(3, 1))
    model = nn.Linear(1, 1, bias=False)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1)
    rates = RecordLearningRates()
    trainer = TrainerWithTimmScheduler(model, nn.MSELoss(), optimizer, [rates])

    trainer.train(
        dataset,
        num_epochs=6,
        eval_dataset=dataset,
        per_device_batch_size=3,
        create_scheduler_fn=partial(
            create_timm_scheduler,
            num_epochs=6,
            sched="plateau",
            plateau_mode="min",
            patience_epochs=0,
            warmup_epochs=warmup_epochs,
            warmup_lr=0.02,
        ),
    )

    # After the warm-up, the first value counts as the best and each later one is worse.
    expected = {0: [0.1, 0.1, 0.01, 1e-3, 1e-4, 1e-5], 2: [0.02, 0.06, 0.1, 0.1, 0.01]}
    first_group = [values[0] for values in rates.values]
    assert first_group[: len(expected[warmup_epochs])] == pytest.approx(
        expected[warmup_epochs]
    )


# ------------------------------------------------------------------- mixup and EMA


class MixupTrainer(Trainer):
    def __init__(self, *args, mixup, **kwargs):
        super().__init__(*args, **kwargs)
        self.mixup = mixup
        self.eval_loss_func = nn.CrossEntropyLoss()

    def calculate_train_batch_loss(self, batch):
        return super().calculate_train_batch_loss(self.mixup(*batch))

    def calculate_eval_batch_loss(self, batch):
        images, labels = batch
        outputs = self.model(images)
        return {
            "loss": self.eval_loss_func(outputs, labels),
            "model_outputs": outputs,
            "batch_size": len(images),
        }


def create_digits_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))


def create_mixup():
    return Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)


def train_with_mixup_by_hand(dataset):
    model = create_digits_model()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1)
    ema, mixup = ModelEmaV3(model, decay=0.8), create_mixup()
    loss_func = SoftTargetCrossEntropy()
    seed_everything(2)
    losses = []
    for epoch in (1, 2):
        for indices in epoch_order(len(dataset), 2, epoch).split(16):
            images, targets = mixup(*dataset[indices])
            loss = loss_func(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            ema.update(model)
    return model.state_dict(), losses, ema.module.state_dict()


def test_mixup_and_the_average_of_timm_train_bit_for_bit_as_by_hand(tensors, tmp_path):
    dataset = tensors(0, 64, 8)
    weights, losses, average = train_with_mixup_by_hand(dataset)
    model = create_digits_model()
    ema = ModelEmaCallback(0.8, model_ema=ModelEmaV3, save_path=tmp_path / "ema.pt")
    trainer = MixupTrainer(
        model,
        SoftTargetCrossEntropy(),
        create_optimizer_v2(model, opt="sgd", lr=0.1),
        [ema],
        mixup=create_mixup(),
        seed=2,
    )

    history = trainer.train(dataset, 2, tensors(64, 128, 8), per_device_batch_size=16)

    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(ema.ema_model.module.state_dict(), average)
    recorded = history.get_metric_values("train_loss_epoch")
    assert recorded == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])])
    evaluated = history.get_metric_values("eval_loss_epoch")
    of_average = history.get_metric_values("ema_model_eval_loss_epoch")
    assert len(evaluated) == len(of_average) == 2
    assert of_average[-1] != evaluated[-1]


# ------------------------------------------------------------------------- loaders


@pytest.mark.parametrize("use_prefetcher", [True, False])
def test_the_loaders_of_timm_are_used_as_they_are(digits, pictures, use_prefetcher):
    def loader(first, last, is_training):
        return create_loader(
            pictures(digits(first, last)),
            input_size=32,
            batch_size=16,
            is_training=is_training,
            num_workers=0,
            persistent_workers=False,
            device=torch.device("cpu"),
            use_prefetcher=use_prefetcher,
        )

    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, ())

    # timm leaves out the last, smaller batch of a training epoch.
    trainer.train(loader(0, 40, True), 2, loader(40, 64, False))

    assert trainer.num_updates == 4
    assert trainer.num_samples_seen == 64
    assert len(trainer.run_history.get_metric_values("eval_loss_epoch")) == 2
