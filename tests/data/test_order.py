"""The order of an epoch, and the batches that a plan makes of it.

Plans of evaluations are in promises/test_evaluation_counts_each_sample_once.py.
"""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from pytorch_accelerated.data import BatchPlan, derive_seed, epoch_order


def test_the_order_of_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch():
    visited = epoch_order(100, seed=1, epoch=1)

    assert sorted(visited.tolist()) == list(range(100))
    assert torch.equal(visited, epoch_order(100, seed=1, epoch=1))
    assert not torch.equal(visited, epoch_order(100, seed=1, epoch=2))
    assert not torch.equal(visited, epoch_order(100, seed=2, epoch=1))


def test_the_order_of_an_epoch_stays_what_it_is():
    """Runs that are resumed, and loops by hand, rely on these very numbers."""
    assert derive_seed(7, 1) == 1437869018007346628
    assert epoch_order(6, seed=7, epoch=1).tolist() == [0, 2, 4, 3, 5, 1]


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4))
def test_derived_seeds_can_be_given_to_torch(values):
    assert 0 <= derive_seed(*values) < 2**63


def bounds(plan):
    return [
        [plan.bounds(step, process) for process in range(plan.num_processes)]
        for step in range(len(plan))
    ]


plans = st.builds(
    dict,
    length=st.integers(1, 200),
    batch_size=st.integers(1, 16),
    num_processes=st.integers(1, 5),
    drop_last=st.booleans(),
)


@given(plans)
def test_training_takes_each_sample_at_most_once_and_drops_less_than_a_step(arguments):
    plan = BatchPlan(**arguments)
    taken = [pair for step in bounds(plan) for pair in step]

    positions = [number for first, last in taken for number in range(first, last)]
    assert positions == list(range(len(positions)))
    num_left = plan.length - len(positions)
    assert num_left < plan.batch_size * plan.num_processes
    assert num_left == 0 or plan.drop_last
    assert all(last - first <= plan.batch_size for first, last in taken)


@given(plans, st.data())
def test_smaller_batches_hold_the_same_samples_in_as_many_windows(arguments, draw):
    size = arguments["batch_size"]
    smaller = draw.draw(
        st.sampled_from([each for each in range(1, size + 1) if size % each == 0])
    )
    plan, factor = BatchPlan(**arguments), size // smaller
    changed = plan.with_batch_size(smaller)
    # Windows of one large step, or of several small ones; also from a later one on.
    first = draw.draw(st.integers(0, len(plan)))
    step_size = size * plan.num_processes
    changed = replace(changed, first=min(first * step_size, plan.length))

    small, large = bounds(changed), bounds(plan)[first:]
    windows = [small[at : at + factor] for at in range(0, len(small), factor)]
    assert [
        sorted({i for step in window for a, b in step for i in range(a, b)})
        for window in windows
    ] == [sorted({i for a, b in step for i in range(a, b)}) for step in large]


@given(plans)
def test_the_size_of_a_window_is_the_sum_of_its_batches(arguments):
    plan = BatchPlan(**arguments)
    if len(plan) == 0:
        return

    total = sum(
        plan.size(step, process)
        for step in range(len(plan))
        for process in range(plan.num_processes)
    )
    assert plan.window_size(0, len(plan) - 1) == total
