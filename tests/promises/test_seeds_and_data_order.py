"""R10 and R11: what a run draws, and what its batches are a function of."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toys import Keeps, Numbers, create_trainer, seeded

from pytorch_accelerated.data import derive_seed, epoch_order

NUM_SAMPLES, BATCH_SIZE, NUM_EPOCHS, SEED = 11, 2, 2, 5


DRAWS = {
    "python": random.random,
    "numpy": np.random.random,
    "torch": lambda: torch.rand(()).item(),
}


class Augmented(Numbers):
    """Draws from one of the three generators, or from all, in every sample."""

    def __init__(self, draw_from="all", length=NUM_SAMPLES):
        super().__init__(length)
        self.draw_from = draw_from

    def __getitem__(self, index):
        noise = [
            draw() if self.draw_from in (name, "all") else 0.0
            for name, draw in DRAWS.items()
        ]
        return torch.tensor([float(index), *noise]), torch.tensor([0.0])


class DrawsLate(Augmented):
    """Draws from python's generator, but not for the sample that comes first."""

    def __init__(self, first):
        super().__init__("none")
        self.first = first

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        if index not in self.first:
            inputs[1] = random.random()
        return inputs, target


def keeps_inputs():
    return Keeps("on_train_step_end", lambda trainer, batch, **_: batch[0])


def create_model(dropout=0.5):
    return seeded(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1))
    )


def train(dataset, num_workers=0, seed=SEED, model=None, num_runs=1):
    model, keeps = model or create_model(), keeps_inputs()
    trainer = create_trainer([keeps], model=model, lr=0.01, seed=seed)
    for _ in range(num_runs):
        trainer.train(
            dataset,
            num_epochs=NUM_EPOCHS,
            per_device_batch_size=BATCH_SIZE,
            train_dataloader_kwargs={"num_workers": num_workers},
        )
    return torch.cat(keeps.kept), parameters_of(model), trainer


def parameters_of(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def assert_same(first, second):
    assert torch.equal(first[0], second[0])  # the samples, in their order
    assert torch.equal(first[1], second[1])  # the weights, after dropout


@pytest.mark.parametrize("draw_from", ["python", "numpy", "torch", "all"])
def test_augmentation_and_dropout_do_not_depend_on_the_number_of_workers(draw_from):
    """Defects 9 and 11."""
    dataset = Augmented(draw_from)
    in_this_process = train(dataset)
    # Whoever drew before the run must not matter.
    random.random(), np.random.random(), torch.rand(1)
    assert_same(train(dataset), in_this_process)
    for num_workers in (1, 2):
        assert_same(train(dataset, num_workers), in_this_process)


def test_another_seed_gives_another_order_and_other_augmentation():
    first, second = train(Augmented()), train(Augmented(), seed=SEED + 1)
    assert not torch.equal(first[0][:, 0], second[0][:, 0])
    assert not (first[0][:, 1:] == second[0][:, 1:]).any()


def test_the_order_and_the_augmentation_differ_from_epoch_to_epoch():
    """The order is the documented function of the seed and the epoch."""
    samples, _, _ = train(Augmented())
    for column in (1, 2, 3):
        assert len(samples[:, column].unique()) == NUM_SAMPLES * NUM_EPOCHS
    orders = [epoch_order(NUM_SAMPLES, SEED, epoch) for epoch in (1, 2)]
    assert torch.equal(samples[:, 0].long(), torch.cat(orders))
    assert not torch.equal(*orders)
    assert torch.equal(*(order.sort().values for order in orders))


def test_a_loop_by_hand_can_reproduce_the_augmentation_of_a_batch():
    samples, _, _ = train(Augmented("torch"))
    # The first batch of the second epoch, on the only process.
    torch.manual_seed(derive_seed(SEED, 2, 0, 0))
    expected = [torch.rand(()).item() for _ in range(BATCH_SIZE)]
    assert samples[NUM_SAMPLES : NUM_SAMPLES + BATCH_SIZE, 3].tolist() == expected


def test_another_run_of_the_same_trainer_has_another_order():
    samples, _, _ = train(Augmented(), num_runs=2)
    first, second = samples[:, 0].split(NUM_SAMPLES * NUM_EPOCHS)
    assert not torch.equal(first, second)


def test_a_generator_that_only_later_batches_draw_from_is_seeded_from_the_next_epoch():
    def run(python_seed):
        random.seed(python_seed)
        torch.manual_seed(8)
        return train(DrawsLate(first), seed=None)[0]

    torch.manual_seed(8)
    data_seed = int(torch.randint(2**63 - 1, ()))
    first = [
        index
        for epoch in (1, 2)
        for index in epoch_order(NUM_SAMPLES, data_seed, epoch)[:BATCH_SIZE].tolist()
    ]
    one, two = run(1), run(2)
    assert not torch.equal(one[:NUM_SAMPLES], two[:NUM_SAMPLES])
    assert torch.equal(one[NUM_SAMPLES:], two[NUM_SAMPLES:])


def states():
    numpy_state = np.random.get_state()
    return random.getstate(), (*numpy_state[2:], numpy_state[1].tobytes())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_without_a_seed_a_run_takes_one_draw_of_torch_and_leaves_the_others(
    num_workers,
):
    """Defect 9."""
    before = states()
    torch.manual_seed(8)
    _, _, trainer = train(
        Augmented(), num_workers, seed=None, model=create_model(dropout=0.0)
    )
    after = torch.rand(3)
    torch.manual_seed(8)
    drawn = torch.randint(2**63 - 1, ())
    assert trainer.run_config.data_seed == drawn
    assert torch.equal(after, torch.rand(3))
    assert states() == before


def test_without_a_seed_dropout_draws_as_in_a_loop_by_hand():
    torch.manual_seed(8)
    samples, weights, _ = train(Augmented("none"), seed=None)
    model = create_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(8)
    torch.randint(2**63 - 1, ())
    for epoch in samples.split(NUM_SAMPLES):
        for inputs in epoch.split(BATCH_SIZE):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    assert torch.equal(parameters_of(model), weights)


def test_evaluate_draws_nothing():
    """Defect 9."""
    trainer = create_trainer(model=create_model())
    before = states(), torch.get_rng_state().tolist()
    trainer.evaluate(Augmented(), dataloader_kwargs={"num_workers": 0})
    assert (states(), torch.get_rng_state().tolist()) == before


def on_one_of_two(num_workers):
    dropped = []

    class KeepsMasks(nn.Dropout):
        def forward(self, inputs):
            dropped.append(super().forward(torch.ones(16)))
            return inputs

    seed = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 1), KeepsMasks(0.5)), seed)
    samples, weights, _ = train(Augmented(), num_workers, model=model)
    return samples, weights, torch.stack(dropped)


def test_two_processes_share_the_samples_and_differ_in_augmentation_and_dropout(
    on_processes,
):
    runs = on_processes(2, lambda: [on_one_of_two(workers) for workers in (0, 1)])
    (first, second), (first_by_worker, second_by_worker) = zip(*runs, strict=True)
    for epoch in range(NUM_EPOCHS):
        # 6 steps, in which each process has half of the 4 samples, then 3 are left.
        per_epoch = [
            run[0][:, 0].chunk(NUM_EPOCHS)[epoch].long() for run in (first, second)
        ]
        assert sorted(torch.cat(per_epoch).tolist()) == list(range(NUM_SAMPLES))
    assert not set(first[0][:, 1].tolist()) & set(second[0][:, 1].tolist())
    assert not torch.equal(first[2], second[2])
    assert torch.equal(first[1], second[1])  # one model
    for by_worker, in_process in (
        (first_by_worker, first),
        (second_by_worker, second),
    ):
        assert torch.equal(by_worker[0], in_process[0])
        assert torch.equal(by_worker[2], in_process[2])


def test_the_batches_of_the_page_are_those_of_a_run():
    page = Path(__file__).parents[2] / "docs" / "correctness.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    names = {}
    exec(code, names)
    keeps = keeps_inputs()
    trainer = create_trainer([keeps], model=nn.Linear(4, 1), lr=0.01, seed=42)
    trainer.train(Augmented(length=10), num_epochs=1, per_device_batch_size=4)
    trained_on = [batch[:, 0].long() for batch in keeps.kept]
    for batch, expected in zip(trained_on, names["batches"], strict=True):
        assert torch.equal(batch, expected)
