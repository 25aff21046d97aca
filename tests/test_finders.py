import math
import re
import sys
from itertools import count, pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from toys import At, create_trainer, ones, overriding

from pytorch_accelerated.callbacks import LogMetricsCallback, TrainerCallback
from pytorch_accelerated.finders import LearningRateCurve
from pytorch_accelerated.trainer import DEFAULT_CALLBACKS, Trainer


def rates_between(lowest, highest, num):
    return [lowest * (highest / lowest) ** (n / (num - 1)) for n in range(num)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_curve_has_the_loss_before_each_update(accumulation):
    """An update with the rate r turns the weight w into w (1 - 2 r)."""
    curve = create_trainer().find_learning_rate(
        ones(6),
        min_lr=0.01,
        max_lr=0.4,
        num_updates=12,
        per_device_batch_size=2,
        gradient_accumulation_steps=accumulation,
    )

    weight, losses = 1.0, []
    rates = rates_between(0.01, 0.4, 12)
    for rate in rates:
        losses.append(weight**2)
        weight *= 1 - 2 * rate
    assert curve.learning_rates == pytest.approx(rates)
    assert curve.losses == pytest.approx(losses, rel=1e-5)


def test_the_suggestion_is_where_the_smoothed_loss_falls_most_steeply():
    curve = create_trainer().find_learning_rate(ones(8), 1e-4, 100.0, 60)

    # From r to r' = r (1 + h) the logarithm of the weight falls by about 2 r.
    # Its neighbours on either side are about two updates away.
    index = curve.learning_rates.index(curve.suggestion)
    falls = [a - b for a, b in pairwise(curve.losses)]
    assert abs(falls.index(max(falls)) - index) <= 2
    # Until 1 every update brings the weight nearer to 0.
    assert 0.01 < curve.suggestion < 1
    assert max(curve.learning_rates) < 100
    assert all(map(math.isfinite, curve.losses))
    assert repr(curve) == (
        f"LearningRateCurve(suggestion={curve.suggestion!r}, reason='')"
    )


class Unheard(TrainerCallback):
    """Must hear of no event."""

    def __getattribute__(self, name):
        if name.startswith("on_") and name != "on_init_end":
            raise AssertionError(name)
        return super().__getattribute__(name)


def test_a_loss_that_diverges_ends_the_search_quietly(capsys):
    trainer = create_trainer((*DEFAULT_CALLBACKS, LogMetricsCallback))
    trainer.callback_handler.add_callback(Unheard())
    made = []
    trainer.optimizer_step = lambda: made.append(trainer.optimizer.step())

    curve = trainer.find_learning_rate(ones(8), 1e-3, 1e20, 50)

    assert len(curve.losses) < len(made) < 50
    assert capsys.readouterr() == ("", "")
    assert not trainer.run_history.get_metric_names()


class Overflowing(Trainer):
    """Applies no update, like a scaled one whose gradients overflow each time."""

    num_steps_made = 0

    def _update_weights(self, step):
        type(self).num_steps_made += 1
        self.optimizer_zero_grad()


class Endless(IterableDataset):
    def __iter__(self):
        yield from ((torch.ones(1), torch.zeros(1)) for _ in count())


def test_an_override_of_train_that_needs_the_epochs_gets_some():
    class ForThePublishedVersion(Trainer):
        def train(self, train_dataset, num_epochs, **kwargs):
            return super().train(train_dataset, num_epochs, **kwargs)

    trainer = create_trainer(trainer_class=ForThePublishedVersion)
    assert len(trainer.find_learning_rate(ones(4), num_updates=10).losses) == 10


def test_a_stream_of_unknown_length_is_enough():
    curve = create_trainer().find_learning_rate(Endless(), num_updates=10)
    assert len(curve.losses) == 10

    curve = create_trainer(trainer_class=Overflowing).find_learning_rate(
        Endless(), num_updates=10
    )
    assert curve.losses == ()
    assert curve.suggestion is None
    assert Overflowing.num_steps_made < 100


@pytest.mark.parametrize(
    ("create_loss", "reason"),
    [
        (lambda weight, _: weight.sum() * 0 + 1, "did not fall"),
        (lambda weight, _: -weight.sum(), "raise max_lr"),
        (lambda weight, _: 1 + weight.detach().abs().sum() ** 2 - weight.sum(), "did"),
        (lambda weight, _: weight.sum() * math.inf, "lower min_lr"),
    ],
    ids=["flat", "falling to the end", "only rising", "not finite"],
)
def test_where_there_is_nothing_to_go_by_no_rate_is_suggested(create_loss, reason):
    trainer = create_trainer()
    trainer.loss_func = create_loss

    curve = trainer.find_learning_rate(ones(8), 1e-5, 1e-1, 40)

    assert curve.suggestion is None
    assert reason in curve.reason
    assert curve.reason in repr(curve)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_parameter_groups_keep_their_ratio_and_get_their_rates_back(kind):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    groups = [
        {"params": model[0].parameters(), "lr": kind(0.1)},
        {"params": model[1].parameters(), "lr": kind(0.4)},
    ]
    optimizer = torch.optim.SGD(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    seen = []

    def optimizer_step(self):
        seen.append([float(g["lr"]) for g in self.optimizer.param_groups])

    trainer_class = overriding(optimizer_step=optimizer_step)
    trainer = create_trainer(
        model=model, optimizer=optimizer, trainer_class=trainer_class
    )
    curve = trainer.find_learning_rate(ones(8), 0.01, 0.1, 10)

    assert [high for _, high in seen] == pytest.approx(curve.learning_rates)
    assert [low for low, _ in seen] == pytest.approx(
        [rate / 4 for rate in curve.learning_rates]
    )
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert [float(rate) for rate in rates] == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_updates": 9}, ValueError, "at least 10, got 9"),
        ({"min_lr": 1.0, "max_lr": 0.1}, ValueError, "min_lr=1.0 and max_lr=0.1"),
        ({"min_lr": 0.0}, ValueError, "0 < min_lr"),
        ({"eval_dataset": None}, TypeError, "got eval_dataset. Of the arguments"),
        ({"dataset": iter(())}, ValueError, "read again, got a tuple_iterator"),
    ],
)
def test_what_makes_no_search_is_refused_beforehand(arguments, error, text):
    trainer = create_trainer()

    with pytest.raises(error, match=re.escape(text)):
        trainer.find_learning_rate(**{"dataset": ones(8), **arguments})


def test_a_search_that_could_not_be_undone_is_refused():
    amid = At(on_train_epoch_start=lambda trainer: trainer.find_learning_rate([]))
    with pytest.raises(RuntimeError, match=r"find_learning_rate.* amid a run"):
        create_trainer([amid]).train(ones(2), 1)

    trainer = create_trainer()
    trainer._engine.owns_gradients = True  # as DeepSpeed's
    with pytest.raises(ValueError, match=r"find_learning_rate.* with DeepSpeed"):
        trainer.find_learning_rate(ones(2))

    lazy = nn.Sequential(nn.Linear(1, 1), nn.LazyLinear(1))
    optimizer = torch.optim.SGD(lazy[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="using LazyModules Call"):
        create_trainer(model=lazy, optimizer=optimizer).find_learning_rate(ones(2))

    trainer = create_trainer()
    trainer.optimizer.param_groups[0].pop("lr")
    with pytest.raises(ValueError, match=r"'lr' of .*, but SGD has one without"):
        trainer.find_learning_rate(ones(2))


class SmallMemory(nn.Module):
    """Runs out of memory with more samples than fit; beside gradients, fewer do."""

    def __init__(self, fits, fits_beside_gradients=None):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.fits = fits
        self.fits_beside_gradients = fits_beside_gradients or fits
        self.sizes = []

    def forward(self, inputs):
        has_grad = self.layer.weight.grad is not None
        self.sizes.append(len(inputs))
        if len(inputs) > (self.fits_beside_gradients if has_grad else self.fits):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.layer(inputs)


def find_batch_size(model, dataset, *args, trainer_class=Trainer, **kwargs):
    optimizer = torch.optim.Adam(model.parameters())
    trainer = create_trainer(
        model=model, optimizer=optimizer, trainer_class=trainer_class
    )
    return trainer.find_batch_size(dataset, *args, **kwargs)


@pytest.mark.parametrize(
    ("fits", "arguments", "expected"),
    [
        (37, {}, 32),
        (37, {"margin": 0.25}, 24),
        (3, {}, 2),
        (1, {}, 1),
        (37, {"max_batch_size": 20}, 20),
        (37, {"max_batch_size": 3}, 3),
        (1000, {}, 100),  # all samples that there are
        (37, {"per_device_batch_size": 9}, 36),
        (12, {"per_device_batch_size": 13}, 12),
        (37, {"train_dataloader_kwargs": {"batch_size": 5}}, 32),
    ],
)
def test_the_largest_batch_that_fits_is_found(capsys, fits, arguments, expected):
    model = SmallMemory(fits)

    found = find_batch_size(model, ones(100), **{"max_batch_size": 500, **arguments})

    assert found == expected
    assert model.sizes == []
    assert capsys.readouterr().out == ""


def test_an_accumulated_gradient_needs_its_memory_too():
    arguments = {"max_batch_size": 100, "gradient_accumulation_steps": 4}

    assert find_batch_size(SmallMemory(37, 19), ones(100), **arguments) == 16


def test_the_memory_of_the_optimizer_is_part_of_it():
    """The first update has no state yet: only the second shows what fits."""

    def calculate_train_batch_loss(self, batch):
        if self.optimizer.state and len(batch[0]) > 10:
            raise torch.OutOfMemoryError
        return Trainer.calculate_train_batch_loss(self, batch)

    # An epoch has one batch of 64 samples, and a rest of 8 that would fit.
    found = find_batch_size(
        SmallMemory(37),
        ones(72),
        64,
        per_device_batch_size=64,
        trainer_class=overriding(calculate_train_batch_loss=calculate_train_batch_loss),
    )
    assert found == 8


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "needs a max_batch_size on a CPU"),
        ({"margin": 1.0}, "below 1, got 1.0"),
        ({"dataset": Endless()}, "of known length, .* got a Endless"),
        ({"dataset": DataLoader(range(3))}, "makes batches itself, got a DataLoader"),
    ],
)
def test_a_batch_size_that_cannot_be_found_is_refused(arguments, text):
    arguments = {"dataset": ones(4), **arguments}
    if "margin" in arguments:
        arguments["max_batch_size"] = 4

    with pytest.raises(ValueError, match=text):
        find_batch_size(SmallMemory(3), **arguments)


def test_where_nothing_fits_the_error_of_torch_is_raised():
    with pytest.raises(torch.OutOfMemoryError):
        find_batch_size(SmallMemory(0), ones(8), 8)


def test_the_curve_draws_itself(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    curve = LearningRateCurve((0.01, 0.1, 1.0), (2.0, 1.0, 3.0), suggestion=0.1)

    axes = curve.plot()

    assert axes.get_xscale() == "log"
    assert list(axes.lines[0].get_ydata()) == [2.0, 1.0, 3.0]
    assert axes.lines[-1].get_label() == "suggestion: 0.1"

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pytorch-accelerated\[plot\]"):
        curve.plot()
