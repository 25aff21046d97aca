"""R4: what is recorded is the mean over all items, on all processes."""

import math

import pytest
import torch
from torch import nn
from toys import create_trainer

from pytorch_accelerated.data import epoch_order
from pytorch_accelerated.trainer import Trainer

NUM_SAMPLES, SEED = 13, 4


def loss_of(index):
    return math.sin(index) + 2.0


def num_tokens(index):
    return index % 3 + (index == 0)


class Scripted(Trainer):
    """Has a loss that does not depend on the weights, so that its mean is known."""

    counts_tokens = False

    def calculate_train_batch_loss(self, batch):
        indices = batch.tolist()
        items = [num_tokens(i) if self.counts_tokens else 1 for i in indices]
        mean = sum(loss_of(i) * n for i, n in zip(indices, items, strict=True)) / max(
            sum(items), 1
        )
        loss = self.model(torch.zeros(1, 1, dtype=torch.float64)).sum() * 0 + mean
        output = {
            "loss": loss,
            "batch_size": len(indices),
            "twice_the_loss": 2 * mean,
            "square_of_it": loss.detach() ** 0 * mean * mean,
            "model_outputs": None,
            "not_a_scalar": batch,
        }
        if self.counts_tokens:
            output["num_items_in_batch"] = torch.tensor(sum(items))
        return output

    def calculate_eval_batch_loss(self, batch):
        return self.calculate_train_batch_loss(batch)


def scripted(trainer_class, **kwargs):
    model = nn.Linear(1, 1).double()
    return create_trainer(model=model, trainer_class=trainer_class, **kwargs)


CASES = [
    {"per_device_batch_size": size, "gradient_accumulation_steps": accumulation}
    for size in (1, 2, 5, 13)
    for accumulation in (1, 3)
]


def train(case, counts_tokens):
    trainer = scripted(Scripted, seed=SEED)
    trainer.counts_tokens = counts_tokens
    no_workers = {"num_workers": 0}
    history = trainer.train(
        range(NUM_SAMPLES),
        num_epochs=2,
        eval_dataset=range(NUM_SAMPLES),
        eval_per_device_batch_size=5,
        train_dataloader_kwargs=no_workers,
        eval_dataloader_kwargs=no_workers,
        **case,
    )
    recorded = {
        name: history.get_metric_values(name) for name in history.get_metric_names()
    }
    return {
        **recorded,
        **trainer.evaluate(range(NUM_SAMPLES), 5, dataloader_kwargs=no_workers),
    }


def check(recorded, case, counts_tokens):
    weight = num_tokens if counts_tokens else lambda index: 1
    items = sum(weight(i) for i in range(NUM_SAMPLES))
    mean = sum(loss_of(i) * weight(i) for i in range(NUM_SAMPLES)) / items
    for name in ("train_loss_epoch", "eval_loss_epoch"):
        assert recorded[name] == pytest.approx([mean, mean], rel=1e-14), (name, case)
    assert recorded["evaluation_loss"] == pytest.approx(mean, rel=1e-14)
    for name in ("train_twice_the_loss_epoch", "eval_twice_the_loss_epoch"):
        assert recorded[name] == pytest.approx([2 * mean] * 2, rel=1e-14), (name, case)
    assert recorded["evaluation_twice_the_loss"] == pytest.approx(2 * mean, rel=1e-14)
    assert not [name for name in recorded if "not_a_scalar" in name]
    assert {"train_square_of_it_epoch", "evaluation_square_of_it"} <= set(recorded)


@pytest.mark.parametrize("counts_tokens", [False, True])
def test_recorded_losses_of_one_process_are_means_over_all_items(counts_tokens):
    """Defects 16 and 28."""
    for case in CASES:
        check(train(case, counts_tokens), case, counts_tokens)


@pytest.mark.parametrize("num_processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_recorded_losses_of_several_processes_are_means_over_all_items(
    on_processes, num_processes
):
    """Defects 16 and 28; and every process records the same number."""
    grid = [(case, tokens) for case in CASES for tokens in (False, True)]
    runs = on_processes(
        num_processes, lambda: [train(case, tokens) for case, tokens in grid]
    )
    for process in runs:
        for recorded, (case, tokens) in zip(process, grid, strict=True):
            check(recorded, case, tokens)


def test_a_scalar_is_the_mean_of_its_batches_weighted_with_their_items():
    recorded = train({"per_device_batch_size": 4}, counts_tokens=False)
    # Batches of 4, 4, 4 and 1 samples in the documented order of the first epoch.
    expected = 0.0
    for batch in epoch_order(NUM_SAMPLES, SEED, 1).split(4):
        mean = sum(loss_of(i) for i in batch.tolist()) / len(batch)
        expected += mean * mean * len(batch) / NUM_SAMPLES
    assert recorded["train_square_of_it_epoch"][0] == pytest.approx(expected, rel=1e-12)


def test_a_batch_without_items_adds_nothing_even_if_its_mean_is_nan():
    class SkipsEveryOther(Scripted):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            if self.num_steps % 2 == 0:
                output["loss"] = output["loss"] * 0 + 3
                return {**output, "num_items_in_batch": torch.tensor(2)}
            # As of a language model, for a sample of nothing but padding.
            logits = self.model(torch.zeros(1, 1, dtype=torch.float64))
            output["loss"] = nn.functional.cross_entropy(logits, torch.tensor([-100]))
            assert output["loss"].isnan()
            return {**output, "num_items_in_batch": torch.tensor(0)}

    history = scripted(SkipsEveryOther).train(
        range(NUM_SAMPLES), 1, per_device_batch_size=2
    )
    assert history.get_latest_metric("train_loss_epoch") == 3.0


def test_the_loss_of_an_epoch_is_its_own():
    class Grows(Scripted):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            epoch = self.run_history.current_epoch
            return {**output, "loss": output["loss"] * 0 + epoch}

    history = scripted(Grows).train(range(NUM_SAMPLES), num_epochs=3)
    assert history.get_metric_values("train_loss_epoch") == [1.0, 2.0, 3.0]


def test_long_sums_do_not_lose_small_losses():
    """Losses in bfloat16, 4,000 of them: a sum in that precision would stick at 256."""

    class Ones(Scripted):
        def calculate_train_batch_loss(self, batch):
            weight = next(self.model.parameters()).sum().bfloat16() * 0
            return {"loss": weight + 1, "batch_size": len(batch)}

    history = scripted(Ones).train(range(4000), 1, per_device_batch_size=1)
    assert history.get_latest_metric("train_loss_epoch") == 1.0
