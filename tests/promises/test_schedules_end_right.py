"""R7: update number k trains with value(k), for every scheduler, however it is run."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from toys import create_trainer, ones

from pytorch_accelerated.callbacks import LimitBatchesCallback, TrainerCallback
from pytorch_accelerated.schedulers import (
    CosineLrScheduler,
    SchedulerBase,
    StatefulSchedulerBase,
    WSDLrScheduler,
)
from pytorch_accelerated.schedulers.curve import schedule_curve
from pytorch_accelerated.trainer import (
    Trainer,
    TrainerPlaceholderValues,
    TrainerWithTimmScheduler,
)

LR = 0.1
NUM_EPOCHS = TrainerPlaceholderValues.NUM_EPOCHS
UPDATES_PER_EPOCH = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH
UPDATES_PER_EPOCH_TOO = TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH


class Halve(StatefulSchedulerBase):
    """A scheduler as a user would write it, for each group."""

    def get_updated_values(self, num_updates):
        return [lr * 0.5**num_updates for lr in self.base_lr_values]


def warm_up_then_decay(optimizer, total):
    return SequentialLR(
        optimizer,
        [
            LinearLR(optimizer, start_factor=0.1, total_iters=3),
            CosineAnnealingLR(optimizer, T_max=total - 3),
        ],
        milestones=[3],
    )


# ------------------------------------------------- the formulas, for total updates each


def cosine(k, total):
    warmup = 2  # two updates, as (2 / total) epochs of a run are
    if k < warmup:
        return 0.01 + k * (LR - 0.01) / warmup
    progress = (k - warmup) / (total - warmup)
    return 0.001 + (LR - 0.001) / 2 * (1 + math.cos(math.pi * progress))


def wsd(k, total):
    decay = int(total * 0.5)
    if k < total - decay:
        return LR
    t = (k - (total - decay)) / decay
    return LR * (0.01 + 0.99 * (1 - math.sqrt(t)))


def one_cycle(k, total):
    def anneal(start, end, fraction):
        return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))

    up = 0.3 * total - 1
    if k <= up:
        return anneal(LR / 25, LR, k / up)
    return anneal(LR, LR / 25 / 1e4, (k - up) / (total - 1 - up))


def sequential(k, total):
    if k < 3:
        return LR * (0.1 + 0.9 * k / 3)
    return LR / 2 * (1 + math.cos(math.pi * (k - 3) / (total - 3)))


SCHEDULES = {
    "cosine": (
        CosineLrScheduler.create_scheduler_fn(
            num_warmup_epochs=2 / UPDATES_PER_EPOCH,
            warmup_starting_lr=0.01,
            lr_min=0.001,
        ),
        cosine,
    ),
    "wsd": (
        WSDLrScheduler.create_scheduler_fn(
            decay_phase_ratio=0.5, lr_min=0.01, num_warmup_epochs=0
        ),
        wsd,
    ),
    "one of a user": (Halve, lambda k, total: LR * 0.5**k),
    "OneCycleLR": (
        partial(
            OneCycleLR,
            max_lr=LR,
            epochs=NUM_EPOCHS,
            steps_per_epoch=UPDATES_PER_EPOCH,
        ),
        one_cycle,
    ),
    "CosineAnnealingLR": (
        partial(CosineAnnealingLR, T_max=NUM_EPOCHS * UPDATES_PER_EPOCH_TOO),
        lambda k, total: LR / 2 * (1 + math.cos(math.pi * k / total)),
    ),
    "StepLR": (
        partial(StepLR, step_size=3, gamma=0.5),
        lambda k, total: LR * 0.5 ** (k // 3),
    ),
    "LinearLR, then CosineAnnealingLR": (
        partial(warm_up_then_decay, total=NUM_EPOCHS * UPDATES_PER_EPOCH),
        sequential,
    ),
}

# How a run is limited, and how many updates it then has; 22 samples, batches of 2.
RUNS = {
    "plain": ({}, 22),
    "accumulation": ({"gradient_accumulation_steps": 2}, 12),
    "max_num_train_steps": ({"max_num_train_steps": 15}, 15),
    "both": ({"gradient_accumulation_steps": 2, "max_num_train_steps": 8}, 8),
    "fewer batches": ({"callbacks": [LimitBatchesCallback(5)]}, 10),
}


class KeepsRates(Trainer):
    """Keeps the learning rate that each update is made with."""

    skipped = ()

    def training_run_start(self):
        self.rates, self.num_windows = [], 0

    def optimizer_step(self):
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.num_windows += 1
        super().optimizer_step()


def train(create_scheduler_fn, trainer_class=KeepsRates, num_processes=1, **kwargs):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    trainer = create_trainer(
        kwargs.pop("callbacks", ()),
        model=model,
        optimizer=optimizer,
        trainer_class=trainer_class,
    )
    trainer.train(
        ones(22),
        num_epochs=kwargs.pop("num_epochs", 2),
        per_device_batch_size=2 // num_processes,
        create_scheduler_fn=create_scheduler_fn,
        **kwargs,
    )
    return trainer


def rates_of_all_runs(num_processes):
    return {
        (schedule, run): train(
            create_scheduler_fn, num_processes=num_processes, **kwargs
        ).rates
        for schedule, (create_scheduler_fn, _) in SCHEDULES.items()
        for run, (kwargs, _) in RUNS.items()
    }


def expected_rates():
    # OneCycleLR and others of torch are told the length in whole epochs. Theirs is the
    # length of the run if it is not cut off amid an epoch.
    return {
        (schedule, run): [formula(k, total) for k in range(total)]
        for schedule, (_, formula) in SCHEDULES.items()
        for run, (_, total) in RUNS.items()
    }


def check(rates):
    for name, expected in expected_rates().items():
        assert rates[name] == pytest.approx(expected, rel=1e-9, abs=1e-12), name


def test_each_update_of_one_process_trains_with_its_value():
    """Defects 18, 32, 34 and 58."""
    check(rates_of_all_runs(1))


def test_each_update_of_two_processes_trains_with_its_value(on_processes):
    """Defect 1: schedules were twice as long as the run."""
    for rates in on_processes(2, lambda: rates_of_all_runs(2)):
        check(rates)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_curve_that_is_drawn_before_training_is_that_of_the_run(schedule):
    create_scheduler_fn, _ = SCHEDULES[schedule]
    curve = schedule_curve(create_scheduler_fn, num_epochs=2, steps_per_epoch=11, lr=LR)
    assert curve == pytest.approx(train(create_scheduler_fn).rates, rel=1e-12)


class SkipsUpdates(KeepsRates):
    """Has a gradient scaler whose gradients overflow in the windows 2 and 5."""

    def _create_accelerator(self):
        accelerator = super()._create_accelerator()
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        return accelerator

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        if self.num_windows in (2, 5):
            output["loss"] = output["loss"] * torch.tensor(float("inf"))
        return output


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_skipped_update_is_made_up_for_with_the_same_value(schedule):
    create_scheduler_fn, formula = SCHEDULES[schedule]
    trainer = train(create_scheduler_fn, SkipsUpdates)
    # Of 22 windows two are skipped: the values of updates 2 and 4 are tried twice.
    updates = [0, 1, 2, 2, 3, 4, 4, *range(5, 20)]
    assert trainer.rates == pytest.approx(
        [formula(k, 22) for k in updates], rel=1e-9, abs=1e-12
    )
    assert trainer.num_updates == 20


class ReadsRates(TrainerCallback):
    """Reads what an update was made with, after it."""

    def on_training_run_start(self, trainer, **kwargs):
        self.before = trainer.last_lr
        self.after_updates, self.after_steps = [], []

    def on_train_update_end(self, trainer, **kwargs):
        self.after_updates.append(trainer.last_lr)

    def on_train_step_end(self, trainer, batch, batch_output, **kwargs):
        self.after_steps.append(trainer.last_lr)


def test_callbacks_can_read_what_an_update_was_made_with():
    """Found 98: the optimizer's groups hold the learning rate of the next one."""
    reader = ReadsRates()
    trainer = train(SCHEDULES["cosine"][0], callbacks=[reader])
    rates = [[rate] for rate in trainer.rates]
    assert reader.before is None
    assert reader.after_updates == reader.after_steps == rates
    assert trainer.last_lr == rates[-1]

    accumulating = train(None, callbacks=[reader], gradient_accumulation_steps=8)
    assert reader.before is None, "a run begins without"
    assert reader.after_steps[:8] == [None] * 7 + [[LR]]
    assert accumulating.num_updates == 4

    skipping = train(Halve, SkipsUpdates, callbacks=[reader])
    applied = [[rate] for k, rate in enumerate(skipping.rates) if k not in (2, 5)]
    assert reader.after_updates == applied
    assert reader.after_steps[1:4] == [applied[1], applied[1], applied[2]]


def test_learning_rates_of_all_groups_are_read_also_from_tensors():
    """Found 98: a schedule changes such a tensor in place."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    rates = torch.tensor(0.5), 0.25
    groups = [
        {"params": layer.parameters(), "lr": lr}
        for layer, lr in zip(model, rates, strict=True)
    ]
    reader = ReadsRates()
    trainer = create_trainer([reader], model=model, optimizer=torch.optim.AdamW(groups))
    assert trainer.last_lr is None
    trainer.train(ones(3), 1, per_device_batch_size=1, create_scheduler_fn=Halve)
    assert reader.after_steps == [[0.5, 0.25], [0.25, 0.125], [0.125, 0.0625]]
    assert {type(rate) for rates in reader.after_steps for rate in rates} == {float}


# ------------------------------------------------------------------ ReduceLROnPlateau


class Plateau(KeepsRates):
    """Has evaluation losses that are given; the rate of each epoch is looked at."""

    losses = (5.0, 4.0, 4.0, 4.0, 3.0, 3.0)

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        loss = self.losses[self.run_history.current_epoch - 1]
        return {**output, "loss": torch.tensor(loss)}


def rates_on_a_plateau(num_processes):
    trainer = train(
        partial(ReduceLROnPlateau, factor=0.5, patience=1),
        Plateau,
        num_processes,
        num_epochs=6,
        eval_dataset=ones(4),
    )
    return trainer.rates


def test_reduce_on_plateau_follows_the_evaluation_loss_of_each_epoch(on_processes):
    # Without improvement in the third and the fourth epoch: lower from the fifth on.
    expected = [LR] * 11 * 4 + [LR / 2] * 11 * 2
    assert rates_on_a_plateau(1) == pytest.approx(expected)
    for rates in on_processes(2, lambda: rates_on_a_plateau(2)):
        assert rates == pytest.approx(expected)


# ------------------------------------------------------------------------------ timm


class TimmLike:
    """A scheduler with the interface of timm's, linear in the time it is told.

    As in timm, one that counts epochs ignores updates, and the other way round.
    """

    def __init__(self, optimizer, total, t_in_epochs):
        self.optimizer, self.total, self.t_in_epochs = optimizer, total, t_in_epochs
        self.metrics = []
        self._set(0)

    def _set(self, t):
        for group in self.optimizer.param_groups:
            group["lr"] = LR * (1 - t / self.total)

    def step(self, epoch, metric=None):
        self.metrics.append(metric)
        if self.t_in_epochs:
            self._set(epoch)

    def step_update(self, num_updates, metric=None):
        if not self.t_in_epochs:
            self._set(num_updates)

    def state_dict(self):
        return {}


class KeepsRatesOfTimm(KeepsRates, TrainerWithTimmScheduler):
    pass


def rates_of_timm(num_processes):
    return [
        train(
            partial(TimmLike, total=total, t_in_epochs=t_in_epochs),
            KeepsRatesOfTimm,
            num_processes,
            **kwargs,
        ).rates
        for total, t_in_epochs, kwargs in (
            (22, False, {}),
            (2, True, {}),
            (12, False, {"gradient_accumulation_steps": 2}),
        )
    ]


def test_schedulers_with_the_interface_of_timm_are_told_the_right_time(on_processes):
    """Defect 20: they were one epoch ahead."""
    expected = [
        [LR * (1 - k / 22) for k in range(22)],
        [LR] * 11 + [LR / 2] * 11,
        [LR * (1 - k / 12) for k in range(12)],
    ]
    for rates in (rates_of_timm(1), *on_processes(2, lambda: rates_of_timm(2))):
        for of_run, expected_of_run in zip(rates, expected, strict=True):
            assert of_run == pytest.approx(expected_of_run)

    trainer = train(partial(TimmLike, total=22, t_in_epochs=False), KeepsRatesOfTimm)
    before = trainer.optimizer.param_groups[0]["lr"]
    trainer.evaluate(ones(4))
    assert trainer.optimizer.param_groups[0]["lr"] == before


# ------------------------------------------------------------------------- other runs


def test_a_scheduler_that_is_not_stateful_can_be_told_the_update():
    class Told(SchedulerBase):
        def get_updated_values(self, num_updates):
            return LR / (1 + num_updates)

    class TellsIt(KeepsRates):
        def scheduler_step(self):
            self.scheduler.step_update(self.num_updates)

    assert train(Told, TellsIt).rates == pytest.approx(
        [LR / (1 + k) for k in range(22)]
    )
