"""Overriding any single method of the trainer changes that behaviour, and only that."""

import dataclasses
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import StepLR
from toys import Keeps, Numbers, overriding

from pytorch_accelerated.callbacks import ProgressBarCallback, TrainerCallback
from pytorch_accelerated.data import epoch_order
from pytorch_accelerated.errors import TrainingWarning
from pytorch_accelerated.run_config import TrainerRunConfig
from pytorch_accelerated.trainer import Trainer

# --- each is called, and how

ONCE, TWICE = [((), {})], [((), {})] * 2
BATCH = [(1, 1), (1, 1)]  # shapes stand for tensors

# The arguments of all calls in a run of two updates with everything on, and after it an
# evaluation of its own.
CALLS = {
    "_create_accelerator": ONCE,
    "_create_callback_handler": ONCE,
    "_prepare_model_optimizer_and_dataloaders": TWICE,
    "_check_eval_batch_size": TWICE,
    "_run_training": ONCE,
    "_run_evaluation": ONCE,
    "_clip_gradients": TWICE,
    "create_scheduler": ONCE,
    "training_run_start": ONCE,
    "training_run_epoch_end": ONCE,
    "training_run_end": ONCE,
    "train_epoch_start": ONCE,
    "train_epoch_end": ONCE,
    "optimizer_step": TWICE,
    "scheduler_step": TWICE,
    "optimizer_zero_grad": TWICE,
    "eval_epoch_start": TWICE,
    "eval_epoch_end": TWICE,
    "evaluation_run_start": ONCE,
    "evaluation_run_end": ONCE,
    "create_train_dataloader": [
        ((), {"batch_size": 1, "train_dl_kwargs": {"drop_last": True}})
    ],
    "create_eval_dataloader": [
        ((), {"batch_size": 1, "eval_dl_kwargs": {"drop_last": False}}),
        ((), {"batch_size": 8, "eval_dl_kwargs": {"batch_size": 2}}),
    ],
    "get_default_train_dl_kwargs": [((1,), {})],
    "get_default_eval_dl_kwargs": [((1,), {}), ((8,), {})],
    "_create_run_config": [
        (
            (),
            {
                "num_epochs": 1,
                "gradient_accumulation_steps": num_accumulated,
                "max_num_train_steps": None,
                "per_device_batch_size": batch_size,
                "gradient_clip_value": clip_value,
            },
        )
        for num_accumulated, batch_size, clip_value in ((2, 1, 100.0), (1, 8, None))
    ],
    "_run_train_epoch": [(("loader",), {})],
    "_run_eval_epoch": [(("loader",), {}), (("loader",), {"is_training": False})],
    "_perform_forward_and_backward_passes": [((BATCH, step), {}) for step in range(4)],
    "calculate_train_batch_loss": [((BATCH,), {})] * 4,
    "backward_step": [(((),), {})] * 4,
    "calculate_eval_batch_loss": [
        *[((BATCH,), {})] * 2,
        (([(2, 1), (2, 1)],), {}),
    ],
    "_update_loss_tracker": [*[(((), 1), {})] * 6, (((), 2), {})],
    "_add_epoch_loss_to_run_history": [
        ((name,), {})
        for name in ("train_loss_epoch", "eval_loss_epoch", "evaluation_loss")
    ],
}


def described(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, list):
        return [described(each) for each in value]
    return "loader" if hasattr(value, "dataset") else value


def test_each_method_is_called_with_the_documented_arguments(create_trainer, samples):
    calls = {method: [] for method in CALLS}

    def noting(method):
        def note(self, *args, **kwargs):
            calls[method].append((tuple(map(described, args)), kwargs))
            return getattr(Trainer, method)(self, *args, **kwargs)

        return note

    notes = overriding(**{method: noting(method) for method in CALLS})
    trainer = create_trainer(trainer_class=notes)
    trainer.train(
        samples(4),
        num_epochs=1,
        eval_dataset=samples(2),
        per_device_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_clip_value=100.0,
        create_scheduler_fn=partial(StepLR, step_size=100),
        train_dataloader_kwargs={"drop_last": True},
        eval_dataloader_kwargs={"drop_last": False},
    )
    trainer.evaluate(samples(2), 8, dataloader_kwargs={"batch_size": 2})

    assert calls == CALLS


def test_an_override_of_load_training_state_says_where_to_go_on(
    create_trainer, samples
):
    """Its path need not exist, and the epoch it returns is the next one."""

    class FromElsewhere(Trainer):
        def load_training_state(self, input_dir):
            self.model.weight.data.fill_(0.5)
            return {"current_epoch": 3}

    epochs = Keeps(
        "on_train_epoch_start", lambda trainer, **_: trainer.run_history.current_epoch
    )
    trainer = create_trainer([epochs], trainer_class=FromElsewhere)
    trainer.train(samples(2), num_epochs=4, resume_from="cloud://state")

    assert epochs.kept == [3, 4]
    assert trainer.model.weight.item() == 0.5**3


# --- an override changes the behaviour


def test_own_losses_are_used_for_training_and_evaluation(create_trainer, samples):
    class Own(Trainer):
        def calculate_train_batch_loss(self, batch):
            inputs, targets = batch
            loss = 3 * self.model(inputs).mean()
            return {"loss": loss, "model_outputs": None, "batch_size": len(targets)}

        def calculate_eval_batch_loss(self, batch):
            assert not torch.is_grad_enabled()
            return {"loss": torch.tensor(7.0), "batch_size": 1}

    trainer = create_trainer(trainer_class=Own)
    history = trainer.train(samples(1), 1, eval_dataset=samples(1))

    assert trainer.model.weight.item() == 1 - 0.25 * 3
    assert history.get_latest_metric("train_loss_epoch") == 3.0
    assert history.get_latest_metric("eval_loss_epoch") == 7.0


@pytest.mark.parametrize(
    ("method", "override", "weight"),
    [
        ("backward_step", lambda self, loss: (2 * loss).backward(), 0.0),
        ("optimizer_step", lambda self: None, 1.0),
        ("optimizer_step", lambda self: [self.optimizer.step() for _ in "12"], 0.0),
        # The gradient of the first update, 2, enters the second: 0.5 - 0.25 * (2 + 1).
        ("optimizer_zero_grad", lambda self: None, -0.25),
        ("training_run_start", lambda self: self.model.weight.data.fill_(4.0), 1.0),
        ("_clip_gradients", lambda self: self.model.weight.grad.div_(2), 0.75),
    ],
)
def test_an_override_of_a_part_of_the_update(
    create_trainer, samples, method, override, weight
):
    trainer = create_trainer(trainer_class=overriding(**{method: override}))

    num_updates = 2 if method in ("optimizer_zero_grad", "training_run_start") else 1
    clip = {"gradient_clip_value": 1e-3} if method == "_clip_gradients" else {}
    trainer.train(samples(num_updates), 1, per_device_batch_size=1, **clip)

    assert trainer.model.weight.item() == weight


def halve_by_hand(trainer):
    trainer.optimizer.param_groups[0]["lr"] *= 0.5


@pytest.mark.parametrize(
    ("override", "create"),
    [
        (
            {"create_scheduler": lambda self: StepLR(self.optimizer, 1, gamma=0.5)},
            None,  # scripts pass the method itself as a mark that there is a schedule
        ),
        (
            {
                "create_scheduler": lambda self: self.create_scheduler_fn(
                    optimizer=self.optimizer, gamma=0.5
                )
            },
            partial(StepLR, step_size=1),
        ),
        ({"scheduler_step": halve_by_hand}, partial(StepLR, step_size=100)),
    ],
)
def test_an_override_of_the_schedule(create_trainer, samples, override, create):
    trainer = create_trainer(trainer_class=overriding(**override))
    create = create or trainer.create_scheduler
    trainer.train(samples(3), 1, per_device_batch_size=1, create_scheduler_fn=create)

    assert trainer.optimizer.param_groups[0]["lr"] == 0.25 * 0.5**3


def test_overrides_of_the_modes_of_the_model(create_trainer, samples):
    modes = []

    def note(trainer):
        modes.append(trainer.model.training)

    stays_in_evaluation_mode = overriding(
        train_epoch_start=lambda self: self.model.eval(),
        eval_epoch_start=lambda self: self.model.train(),
        train_epoch_end=note,
        eval_epoch_end=note,
    )
    trainer = create_trainer(trainer_class=stays_in_evaluation_mode)
    trainer.train(samples(1), 1, eval_dataset=samples(1))

    assert modes == [False, True]


def test_the_run_config_may_be_made_from_the_arguments_of_the_published_version(
    create_trainer, samples
):
    class Own(Trainer):
        def _create_run_config(self, num_epochs, *args, **kwargs):
            config = super()._create_run_config(2 * num_epochs, *args, **kwargs)
            values = {
                field.name: getattr(config, field.name)
                for field in dataclasses.fields(config)
                if field.default is dataclasses.MISSING
            }
            return TrainerRunConfig(**values)

    trainer = create_trainer(trainer_class=Own)
    trainer.train(samples(1), 1)

    assert trainer.model.weight.item() == 0.25


def test_an_epoch_of_the_user_s_own(create_trainer, samples):
    """Written against the parts of the published version, with accumulation."""

    class Own(Trainer):
        def _run_train_epoch(self, train_dl):
            self.train_epoch_start()
            self._loss_tracker.reset()
            for step, batch in enumerate(train_dl):
                self._perform_forward_and_backward_passes(batch, step)
                if (step + 1) % self.run_config.gradient_accumulation_steps == 0:
                    self.optimizer_step()
                    self.optimizer_zero_grad()
            self.train_epoch_end()
            self._add_epoch_loss_to_run_history("train_loss_epoch")
            return True

    trainer = create_trainer(trainer_class=Own)
    windows = {"per_device_batch_size": 2, "gradient_accumulation_steps": 3}
    history = trainer.train(samples(12), 5, **windows)

    assert trainer.model.weight.item() == pytest.approx(0.25)  # and one epoch only
    recorded = history.get_metric_values("train_loss_epoch")
    assert recorded == [pytest.approx((1 + 0.25) / 2)]


# --- subclasses written for 0.1.61


class OfThePublishedVersion(Trainer):
    def _perform_forward_and_backward_passes(self, batch, step):
        batch_output = self.calculate_train_batch_loss(batch)
        loss = batch_output["loss"] / self.run_config.gradient_accumulation_steps
        self._update_loss_tracker(batch_output["loss"], batch_output["batch_size"])
        self.callback_handler.call_event(
            "on_train_step_end", self, batch_output=batch_output, batch=batch, step=step
        )
        self.backward_step(loss)


class AroundOurs(Trainer):
    def _perform_forward_and_backward_passes(self, batch, step):
        super()._perform_forward_and_backward_passes(batch, step)


@pytest.mark.parametrize("num_accumulated", [1, 2])
@pytest.mark.parametrize("trainer_class", [OfThePublishedVersion, AroundOurs])
def test_a_step_of_one_s_own_that_returns_nothing(
    create_trainer, samples, trainer_class, num_accumulated
):
    """As in the published version; it may call the event itself, or ours."""
    steps = Keeps(
        "on_train_step_end",
        lambda trainer, batch_output, step, **_: (step, batch_output["batch_size"]),
    )
    trainer = create_trainer([steps], trainer_class=trainer_class)
    windows = {"gradient_accumulation_steps": num_accumulated}
    trainer.train(samples(8), 1, per_device_batch_size=2, **windows)

    assert steps.kept == [(0, 2), (1, 2), (2, 2), (3, 2)]
    assert trainer.num_samples_seen == 8
    assert trainer.model.weight.item() == 0.5 ** (4 // num_accumulated)


def test_a_copy_of_the_trainer_for_timm_that_counts_updates_itself(
    create_trainer, samples
):
    told = []

    class Scheduler:
        def step_update(self, num_updates):
            told.append(num_updates)

        def step(self, epoch):
            told.append(f"epoch {epoch}")

    class TimmTrainer(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.num_updates = None

        def train_epoch_start(self):
            super().train_epoch_start()
            self.num_updates = self.run_history.current_epoch * len(
                self._train_dataloader
            )

        def scheduler_step(self):
            self.num_updates += 1
            if self.scheduler is not None:
                self.scheduler.step_update(num_updates=self.num_updates)

        def eval_epoch_end(self):
            if self.scheduler is not None:
                self.scheduler.step(self.run_history.current_epoch + 1)

    trainer = create_trainer(trainer_class=TimmTrainer)
    trainer.train(
        samples(2),
        2,
        eval_dataset=samples(1),
        per_device_batch_size=1,
        max_num_train_steps=3,
        create_scheduler_fn=lambda optimizer: Scheduler(),
    )

    # What the schedule is told is the script's own; the run itself counts right.
    assert len(told) == 3 + 2
    assert "epoch 2" in told
    assert trainer.model.weight.item() == 0.5**3
    assert trainer.run_history.records("train_loss_epoch")[-1].step == 3


def test_a_run_history_of_the_user_without_the_newer_methods(
    create_trainer, samples, tmp_path, own_history
):
    """Defect 44: an abstract method that was added later broke such classes."""
    history = own_history()
    trainer = create_trainer(run_history=history)
    trainer.train(samples(2), 2, eval_dataset=samples(1))
    metrics = trainer.evaluate(samples(1))

    assert history.metrics["train_loss_epoch"] == [1.0, 0.25]
    assert history.current_epoch == 3
    assert metrics == {"evaluation_loss": 0.25**2}

    trainer.save_training_state(tmp_path / "state")
    resumed = create_trainer(run_history=own_history())
    resumed.train(samples(2), 3, resume_from=tmp_path / "state")

    assert resumed.run_history.current_epoch == 4
    assert resumed.model.weight.item() == 0.5**3


def test_subclasses_of_bars_may_look_at_them(create_trainer, samples, capsys):
    class Bar(ProgressBarCallback):
        def on_train_step_end(self, trainer, batch, batch_output, **kwargs):
            super().on_train_step_end(trainer, batch, batch_output, **kwargs)
            self.total = self.pbar.total

    bar = Bar()
    create_trainer([bar]).train(samples(3), 1, per_device_batch_size=1)

    assert bar.total == 3
    capsys.readouterr()


def test_optimisation_by_hand_found_113(create_trainer, samples):
    """A step that does everything itself, and returns a loss for the record."""

    class ByHand(Trainer):
        def calculate_train_batch_loss(self, batch):
            inputs, targets = batch
            loss = self.loss_func(self.model(inputs), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            return {"loss": loss.detach(), "batch_size": len(targets)}

        def backward_step(self, *loss):
            pass

        optimizer_step = optimizer_zero_grad = backward_step

    trainer = create_trainer(trainer_class=ByHand)
    history = trainer.train(samples(4), 2, per_device_batch_size=2)

    assert trainer.model.weight.item() == 0.5**4
    assert trainer.num_updates == 4
    assert history.get_metric_values("train_loss_epoch") == [
        (1 + 0.25) / 2,
        (0.25**2 + 0.25**3) / 2,
    ]


# --- loops of the user's own


class KeepsOrders(Trainer):
    """Keeps the inputs of each epoch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.orders = []

    def calculate_train_batch_loss(self, batch):
        self.orders[-1] += batch[0].flatten().tolist()
        return super().calculate_train_batch_loss(batch)


class OwnLoop(KeepsOrders):
    """Trains as the published documentation shows."""

    def _run_train_epoch(self, train_dl):
        self.orders.append([])
        for batch in train_dl:
            self.calculate_train_batch_loss(batch)["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


class OwnRun(KeepsOrders):
    """Runs the epochs of the published version by itself."""

    def _run_training(self):
        for _ in range(self.run_config.num_epochs):
            self.orders.append([])
            self._run_train_epoch(self._train_dataloader)
            self._run_eval_epoch(self._eval_dataloader)
            self.run_history._increment_epoch()


@pytest.mark.parametrize("trainer_class", [OwnLoop, OwnRun])
def test_each_epoch_of_a_loop_of_one_s_own_has_its_own_order_found_68(
    create_trainer, trainer_class
):
    """The order that the trainer's own loop would see."""
    trainer = create_trainer(lr=0.0, trainer_class=trainer_class, seed=3)
    history = trainer.train(Numbers(8), 3, Numbers(2), per_device_batch_size=2)

    expected = [epoch_order(8, 3, epoch).tolist() for epoch in (1, 2, 3)]
    assert trainer.orders == expected
    assert len(history.get_metric_values("eval_loss_epoch")) == 3


def test_augmentation_differs_between_epochs_of_a_loop_of_one_s_own_found_68(
    create_trainer,
):
    class Random(Numbers):
        def __getitem__(self, index):
            return torch.rand(1), torch.zeros(1)

    trainer = create_trainer(lr=0.0, trainer_class=OwnLoop, seed=3)
    trainer.train(Random(2), 2)

    first, second = trainer.orders
    assert not set(first) & set(second)


class CountsUpdates(TrainerCallback):
    def on_train_update_end(self, trainer, **kwargs):
        pass


@pytest.mark.parametrize(
    ("callbacks", "arguments", "ignored"),
    [
        ((), {"max_num_train_steps": 2}, "max_num_train_steps=2"),
        ([CountsUpdates], {}, "CountsUpdates.on_train_update_end"),
    ],
)
def test_what_a_loop_of_one_s_own_does_not_follow_is_warned_of_found_68(
    create_trainer, callbacks, arguments, ignored
):
    trainer = create_trainer(callbacks, trainer_class=OwnLoop)
    with pytest.warns(TrainingWarning, match=f"{ignored}.*super") as caught:
        trainer.train(Numbers(8), 3, **arguments)

    assert len(caught) == 1


def test_loops_of_one_s_own_that_can_be_counted_are_not_warned_of_found_68(
    create_trainer,
):
    around = overriding(
        _run_train_epoch=lambda self, train_dl: Trainer._run_train_epoch(self, train_dl)
    )
    trainer = create_trainer([CountsUpdates], trainer_class=around)
    trainer.train(Numbers(8), 3, max_num_train_steps=2)
    assert trainer.num_updates == 2

    create_trainer(trainer_class=OwnLoop).train(Numbers(8), 3)
