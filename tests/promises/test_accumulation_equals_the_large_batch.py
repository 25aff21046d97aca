"""R3: the update of a window equals the update of one batch with all its items."""

import random
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from accelerate import AutocastKwargs
from accelerate.state import AcceleratorState
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset, default_collate
from toys import At, OneByOne, Stream, create_trainer, one_weight, seeded

from pytorch_accelerated.data import epoch_order
from pytorch_accelerated.trainer import Trainer

NUM_FEATURES, SEED, NUM_EPOCHS = 3, 11, 2


@dataclass
class Case:
    """What a run is made of.

    Items are what the loss is a mean over: the samples of a batch, or its tokens, of
    which sample i has i % 4. Kept are the samples that the collate function leaves in a
    batch.
    """

    num_samples: int
    batch_size: int
    accumulation: int
    items: str = "samples"
    kept: str = "all"
    optimizer: str = "sgd"
    clip_norm: float | None = None
    num_processes: int = 1


def numbered(length):
    """Return samples that know their number."""
    generator = torch.Generator().manual_seed(length)
    kwargs = {"generator": generator, "dtype": torch.float64}
    inputs = torch.randn(length, NUM_FEATURES, **kwargs)
    targets = torch.randn(length, 1, **kwargs)
    return TensorDataset(inputs, targets, torch.arange(length))


LEFT_OUT = {
    "all": lambda index: False,
    "some": lambda index: index % 3 == 0,
    "all but one": lambda index: index == 4,
}


def leave_out(is_left_out, samples):
    kept = [sample for sample in samples if not is_left_out(sample[2])]
    # A batch cannot be empty; which sample stays then is plain to the reference too.
    return default_collate(kept or samples[:1])


def num_tokens(indices):
    return indices % 4


class WithItems(Trainer):
    """Counts what a case says that a loss is a mean over."""

    items = "samples"

    def calculate_train_batch_loss(self, batch):
        inputs, targets, indices = batch
        losses = (self.model(inputs) - targets).square().squeeze(1)
        output = {"batch_size": len(inputs)}
        if self.items == "samples":
            return {**output, "loss": losses.mean()}
        tokens = num_tokens(indices)
        total = tokens.sum()
        output["num_items_in_batch"] = (
            total if self.items == "tokens on the device" else int(total)
        )
        return {**output, "loss": (losses * tokens).sum() / total.clamp(min=1)}


def create_model():
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(NUM_FEATURES, 4), nn.Tanh(), nn.Linear(4, 1)
        ).double()
    )


def create_optimizer(case, model):
    if case.optimizer == "adamw":
        # An epsilon of the size of the gradients: Adam's update hardly depends on
        # their scale otherwise, and a wrong weight would not show.
        return torch.optim.AdamW(model.parameters(), lr=0.01, eps=0.1)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(case):
    """Train with the trainer; return the parameters as one vector."""
    model = create_model()
    trainer = create_trainer(
        model=model,
        optimizer=create_optimizer(case, model),
        trainer_class=WithItems,
        seed=SEED,
    )
    trainer.items = case.items
    trainer.train(
        OneByOne(numbered(case.num_samples)),
        num_epochs=NUM_EPOCHS,
        per_device_batch_size=case.batch_size,
        gradient_accumulation_steps=case.accumulation,
        gradient_clip_norm=case.clip_norm,
        train_dataloader_kwargs={"num_workers": 0},
        collate_fn=None
        if case.kept == "all"
        else partial(leave_out, LEFT_OUT[case.kept]),
    )
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def batches_of_step(case, indices):
    """Split the indices of a step over the processes, as evenly as possible."""
    size, larger = divmod(len(indices), case.num_processes)
    sizes = [size + (p < larger) for p in range(case.num_processes)]
    batches = list(torch.tensor(indices).split(sizes))
    if case.kept == "all":
        return batches
    is_left_out = LEFT_OUT[case.kept]
    return [
        torch.tensor(
            [i for i in batch.tolist() if not is_left_out(i)] or batch.tolist()[:1],
            dtype=torch.int64,
        )
        for batch in batches
    ]


def train_on_large_batches(case):
    """Train by hand, on one process, with a batch for each window."""
    model = create_model()
    optimizer = create_optimizer(case, model)
    inputs, targets, _ = numbered(case.num_samples).tensors
    for epoch in range(1, NUM_EPOCHS + 1):
        order = epoch_order(case.num_samples, SEED, epoch).tolist()
        step_size = case.batch_size * case.num_processes
        steps = [
            order[start : start + step_size]
            for start in range(0, len(order), step_size)
        ]
        for first in range(0, len(steps), case.accumulation):
            window = torch.cat(
                [
                    batch
                    for step in steps[first : first + case.accumulation]
                    for batch in batches_of_step(case, step)
                ]
            )
            weights = torch.ones(len(window), dtype=torch.float64)
            if case.items != "samples":
                weights = num_tokens(window).double()
            losses = (model(inputs[window]) - targets[window]).square()
            loss = (losses.squeeze(1) * weights).sum() / weights.sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            if case.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), case.clip_norm)
            optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def assert_equals_the_large_batch(case, parameters):
    expected = train_on_large_batches(case)
    difference = (parameters - expected).abs().max().item()
    assert difference < 1e-12, (case, difference)


ITEMS = ["samples", "tokens", "tokens on the device"]

cases = st.builds(
    Case,
    num_samples=st.integers(1, 23),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 5),
    items=st.sampled_from(ITEMS),
    kept=st.sampled_from(list(LEFT_OUT)),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    clip_norm=st.sampled_from([None, 0.1]),
)


@settings(max_examples=40)
@given(cases)
@example(Case(5, 1, 2))
@example(Case(5, 2, 2, items="tokens"))
@example(Case(7, 2, 4, kept="some", clip_norm=0.1))
def test_accumulation_in_one_process_equals_the_large_batch(case):
    """Defects 4, 16 and 26."""
    assert_equals_the_large_batch(case, train(case))


def random_cases(count, num_processes):
    chance = random.Random(num_processes)
    for _ in range(count):
        yield Case(
            num_samples=chance.randint(num_processes, 29),
            batch_size=chance.randint(1, 4),
            accumulation=chance.randint(1, 4),
            items=chance.choice(ITEMS),
            kept=chance.choice(list(LEFT_OUT)),
            optimizer=chance.choice(["sgd", "adamw"]),
            clip_norm=chance.choice([None, None, 0.1]),
            num_processes=num_processes,
        )


def check_on_processes(on_processes, cases):
    num_processes = cases[0].num_processes
    results = on_processes(
        num_processes, lambda: [train(case) for case in cases], timeout_seconds=400
    )
    for case, *parameters in zip(cases, *results, strict=True):
        for of_process in parameters:
            assert_equals_the_large_batch(case, of_process)


def test_accumulation_on_two_processes_equals_the_large_batch(on_processes):
    """Defects 4, 16, 26 and 28."""
    named = [
        Case(13, 3, 2, num_processes=2),  # a partial window, an unequal last step
        Case(9, 2, 1, num_processes=2),  # a last step with fewer samples than processes
        Case(9, 2, 2, items="tokens", num_processes=2),
        Case(9, 2, 2, items="tokens on the device", num_processes=2),
        Case(14, 3, 1, kept="some", num_processes=2),
        Case(14, 3, 2, kept="all but one", num_processes=2),  # only in a later batch
        Case(13, 3, 2, optimizer="adamw", clip_norm=0.1, num_processes=2),
    ]
    check_on_processes(on_processes, [*named, *random_cases(20, num_processes=2)])


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
def test_many_random_cases_on_several_processes(on_processes, num_processes):
    check_on_processes(on_processes, list(random_cases(150, num_processes)))


class LeavesOut(WithItems):
    """Leaves samples out of a batch after it was loaded, but only of a later one."""

    def calculate_train_batch_loss(self, batch):
        if self.num_steps == 2:
            batch = [member[:1] for member in batch]
        return super().calculate_train_batch_loss(batch)


def test_a_step_that_leaves_out_samples_by_itself_is_told_to_count_items(on_processes):
    def run():
        trainer = create_trainer(model=create_model(), trainer_class=LeavesOut)
        with pytest.raises(UserWarning, match="Return num_items_in_batch for every"):
            trainer.train(OneByOne(numbered(16)), 1, per_device_batch_size=2)

    on_processes(2, run)


class WithScaler(WithItems):
    """Trains with a gradient scaler, which Accelerate has none of for a CPU.

    In double precision: what autocast would round is not what is tested here.
    """

    def _create_accelerator(self):
        accelerator = super()._create_accelerator()
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        accelerator.native_amp = True
        accelerator.autocast_handler = AutocastKwargs(enabled=False)
        # Accelerate unscales before it clips where this says so.
        accelerator.state._mixed_precision = "fp16"
        return accelerator


def train_with_scaler(trainer_class, clip_norm=None, num_runs=1):
    model, rates, updates = create_model(), [], []
    keeps = At(
        on_train_update_end=lambda _, num_updates, **__: updates.append(num_updates),
        on_train_step_end=lambda trainer, **_: rates.append(
            trainer.scheduler.get_last_lr()[0]
        ),
    )
    trainer = create_trainer(
        [keeps], model=model, lr=1.0, trainer_class=trainer_class, seed=SEED
    )
    for _ in range(num_runs):
        trainer.train(
            OneByOne(numbered(12)),
            num_epochs=1,
            per_device_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_clip_norm=clip_norm,
            create_scheduler_fn=partial(StepLR, step_size=1, gamma=0.5),
        )
    parameters = nn.utils.parameters_to_vector(model.parameters()).detach()
    return parameters, rates, updates


@pytest.fixture
def fresh_accelerate():
    """Let a test choose a precision of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_a_gradient_scaler_changes_no_number(clip_norm):
    """Defects 4 and 27: two runs, with clipping after unscaling."""
    plain, *_ = train_with_scaler(WithItems, clip_norm, num_runs=2)
    scaled, *_ = train_with_scaler(WithScaler, clip_norm, num_runs=2)
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-12)


class OverflowsOnOneProcess(WithScaler):
    """Has a loss whose scaled gradients overflow, in the first window of one."""

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        if self.num_steps == 1 and self._accelerator.process_index == 1:
            output["loss"] = output["loss"] * torch.tensor(float("inf"))
        return output


def test_a_skipped_update_is_skipped_on_both_processes(on_processes):
    """Two windows, of 8 and of 4 samples; on one, see test_schedules_end_right.py."""
    runs = on_processes(2, train_with_scaler, OverflowsOnOneProcess)
    for process, (_, rates, updates) in enumerate(runs):
        assert updates == [1], process
        assert rates == [1.0, 1.0, 0.5], process
    assert torch.equal(runs[0][0], runs[1][0])


# --- parameters that are not the model's


class LossWithAWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, outputs, targets):
        return (outputs + self.weight * targets).mean()


@pytest.mark.parametrize(("batch_size", "accumulation"), [(3, 4), (5, 3), (12, 1)])
def test_the_weights_of_a_loss_are_trained_as_by_the_large_batch_found_69(
    batch_size, accumulation
):
    """All gradients are the mean of the numbers, 6.5."""
    model, loss_func = one_weight(0.0), LossWithAWeight()
    parameters = [*model.parameters(), *loss_func.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    trainer = create_trainer(model=model, loss_func=loss_func, optimizer=optimizer)
    numbers = torch.arange(1.0, 13).unsqueeze(1)
    trainer.train(
        Stream(TensorDataset(numbers, numbers)),
        1,
        per_device_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )

    assert model.weight.item() == pytest.approx(-6.5)
    assert loss_func.weight.item() == pytest.approx(-6.5)
