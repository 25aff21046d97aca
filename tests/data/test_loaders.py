import multiprocessing
import os
import random
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data._utils.collate import default_collate_fn_map

from pytorch_accelerated import data
from pytorch_accelerated.data import (
    BatchPlan,
    PlannedLoader,
    derive_seed,
    epoch_order,
    loaders,
    order,
    workers,
)

CPU = torch.device("cpu")


# --- orders and seeds


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


def test_the_order_does_not_touch_the_global_random_state():
    before = torch.get_rng_state()

    epoch_order(10, seed=1, epoch=1)

    assert torch.equal(torch.get_rng_state(), before)


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4))
def test_derived_seeds_can_be_given_to_torch(values):
    assert 0 <= derive_seed(*values) < 2**63


def test_derived_seeds_of_neighbours_are_unrelated():
    seeds = {derive_seed(a, b) for a in range(20) for b in range(20)}

    assert len(seeds) == 400


# --- plans of batches


def bounds(plan):
    return [
        [plan.bounds(step, process) for process in range(plan.num_processes)]
        for step in range(len(plan))
    ]


def test_in_one_process_a_plan_is_that_of_a_data_loader():
    assert bounds(BatchPlan(7, 3)) == [[(0, 3)], [(3, 6)], [(6, 7)]]
    assert bounds(BatchPlan(7, 3, drop_last=True)) == [[(0, 3)], [(3, 6)]]
    assert bounds(BatchPlan(7, 3, even=True)) == [[(0, 3)], [(3, 6)], [(6, 7)]]


def test_processes_share_the_last_step_of_an_epoch():
    plan = BatchPlan(11, 2, num_processes=2)

    assert bounds(plan) == [[(0, 2), (2, 4)], [(4, 6), (6, 8)], [(8, 10), (10, 11)]]


def test_a_process_without_a_sample_in_the_last_step_is_a_filler():
    plan = BatchPlan(5, 2, num_processes=2)

    assert [plan.size(1, process) for process in (0, 1)] == [1, 0]
    assert [plan.is_filler(1, process) for process in (0, 1)] == [False, True]


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
def test_evaluation_takes_every_sample_once_in_batches_of_nearly_equal_size(arguments):
    arguments["drop_last"] = False
    try:
        plan = BatchPlan(**arguments, even=True)
    except ValueError:
        num_steps = -(
            -arguments["length"]
            // (arguments["batch_size"] * arguments["num_processes"])
        )
        assert arguments["length"] < num_steps * arguments["num_processes"]
        return

    taken = [pair for step in bounds(plan) for pair in step]
    assert [number for first, last in taken for number in range(first, last)] == list(
        range(plan.length)
    )
    sizes = [last - first for first, last in taken]
    assert min(sizes) >= 1
    assert max(sizes) <= plan.batch_size
    if plan.num_processes > 1:
        assert max(sizes) - min(sizes) <= 1


def test_too_few_samples_for_an_evaluation_are_refused():
    with pytest.raises(ValueError, match=r"at least 3 samples are needed\. Use"):
        BatchPlan(2, 4, num_processes=3, even=True)


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


# --- planned loaders


class Augmented(Dataset):
    """Adds random numbers of three generators to its samples."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(())


def planned(dataset, seed=3, **kwargs):
    arguments = {"batch_size": 4, "shuffle": True, **kwargs}
    return PlannedLoader(DataLoader(dataset, **arguments), CPU, seed)


def batches_of(loader, epoch, first_step=0):
    loader.set_epoch(epoch, first_step)
    return list(loader)


def assert_same_batches(some, others):
    assert len(some) == len(others)
    for batch, other in zip(some, others, strict=True):
        assert all(map(torch.equal, batch, other))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(num_workers):
    """Defect 11: workers were seeded from the operating system."""
    dataset = Augmented(10)
    with_workers = planned(dataset, num_workers=num_workers)

    for epoch in (1, 2):
        assert_same_batches(
            batches_of(planned(dataset), epoch), batches_of(with_workers, epoch)
        )
    with_workers.stop_workers()


def test_each_batch_has_random_numbers_of_its_own():
    loader = planned(Augmented(12))

    for column in range(1, 4):
        epochs = [batches_of(loader, epoch) for epoch in (1, 2)]
        numbers = [
            number.item()
            for epoch in epochs
            for batch in epoch
            for number in batch[column]
        ]
        assert len(set(numbers)) == 24


def test_an_epoch_can_be_started_at_any_batch():
    loader = planned(Augmented(13))
    whole = batches_of(loader, 5)

    for first_step in range(len(whole) + 1):
        rest = batches_of(planned(Augmented(13)), 5, first_step)
        assert_same_batches(whole[first_step:], rest)


def test_batches_that_are_left_out_are_not_loaded():
    loaded = []

    class Notes(Augmented):
        def __getitem__(self, index):
            loaded.append(index)
            return index

    loader = planned(Notes(12), shuffle=False)
    batches_of(loader, 1, first_step=2)

    assert loaded == [8, 9, 10, 11]


def test_loading_leaves_the_random_states_of_the_process_as_they_were():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    batches_of(planned(Augmented(9)), 1)

    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_random_states_are_put_back_also_where_a_sample_cannot_be_loaded():
    class Broken(Augmented):
        def __getitem__(self, index):
            random.random()
            raise OSError("no such file")

    before = random.getstate()
    with pytest.raises(OSError, match="no such file"):
        batches_of(planned(Broken(3)), 1)

    assert random.getstate() == before


def test_the_order_is_the_documented_one():
    loader = planned(Augmented(10), seed=8)

    indices = torch.cat([batch[0] for batch in batches_of(loader, 3)])

    assert torch.equal(indices, epoch_order(10, seed=8, epoch=3))


def test_a_dataset_in_memory_gives_the_same_batches_as_one_sample_at_a_time(
    noise, one_by_one
):
    dataset = Subset(Subset(noise(40), list(range(5, 35))), [3, 20, 7, 11, 0, 29, 4])

    assert data.InMemoryDataset.of(DataLoader(dataset)) is not None
    assert data.InMemoryDataset.of(DataLoader(one_by_one(dataset))) is None
    assert_same_batches(
        batches_of(planned(dataset, batch_size=3), 2),
        batches_of(planned(one_by_one(dataset), batch_size=3), 2),
    )


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(torch.ones(3)), collate_fn=list),
        DataLoader(type("Own", (TensorDataset,), {})(torch.ones(3))),
        DataLoader(type("Own", (Subset,), {})(TensorDataset(torch.ones(3)), [0])),
        DataLoader(TensorDataset(torch.nn.Parameter(torch.ones(3)))),
    ],
)
def test_what_may_do_something_of_its_own_is_not_taken_for_data_in_memory(loader):
    assert data.InMemoryDataset.of(loader) is None


def test_a_planned_loader_has_the_attributes_of_the_loader():
    """Scripts read .dataset, .device and len() of the trainer's loaders."""
    dataset = Augmented(10)
    loader = planned(dataset)

    assert loader.dataset is dataset
    assert loader.device == CPU
    assert loader.batch_size == 4
    assert len(loader) == 3
    assert not hasattr(loader, "no_such_attribute")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, True),
        ({"shuffle": True}, True),
        ({"drop_last": True}, True),
        ({"sampler": RandomSampler(range(5), replacement=True)}, False),
        ({"sampler": RandomSampler(range(5), num_samples=3)}, False),
        ({"sampler": WeightedRandomSampler([1.0] * 5, 5)}, False),
        ({"sampler": [0, 1, 2]}, False),
        ({"batch_sampler": [[0, 1], [2]]}, False),
        ({"batch_sampler": BatchSampler([2, 0], 2, drop_last=False)}, False),
        ({"batch_size": None}, False),
        ({"shuffle": True, "generator": torch.Generator()}, False),
        ({"dataset": Stream()}, False),
    ],
)
def test_a_loader_with_a_sampler_of_the_user_is_not_plain(arguments, expected):
    loader = DataLoader(**{"dataset": range(5), **arguments})

    assert data.is_plain(loader) is expected


# --- arguments and workers


def test_given_arguments_win_over_defaults():
    defaults = data.default_dl_kwargs(8, shuffle=True)

    merged = data.merge_dl_kwargs(range(3), defaults, {"batch_size": 2, "timeout": 1})

    assert merged["batch_size"] == 2
    assert merged["timeout"] == 1
    assert merged["shuffle"] is True


@pytest.mark.parametrize(
    ("dataset", "given", "absent"),
    [
        (range(3), {"sampler": [0]}, {"shuffle"}),
        (range(3), {"batch_sampler": [[0]]}, {"shuffle", "batch_size"}),
        (Stream(), {}, {"shuffle"}),
        (range(3), None, set()),
    ],
)
@pytest.mark.parametrize("defaults", [data.default_dl_kwargs(8, shuffle=True), {}])
def test_defaults_that_the_given_arguments_rule_out_are_dropped(
    dataset, given, absent, defaults
):
    """Defect 37: batch_sampler, and sampler without the default shuffle, failed."""
    merged = data.merge_dl_kwargs(dataset, defaults, given)

    assert absent.isdisjoint(merged)
    DataLoader(dataset, **merged)


def test_both_sampler_and_shuffle_of_the_user_are_left_for_torch_to_refuse():
    merged = data.merge_dl_kwargs(range(3), {}, {"sampler": [0], "shuffle": True})

    with pytest.raises(ValueError, match="mutually exclusive"):
        DataLoader(range(3), **merged)


def test_a_dataset_in_memory_needs_no_workers(noise):
    """Defect 30: as many workers as cores, for each loader and in each process."""
    with mock.patch.object(workers, "usable_cores", return_value=64):
        assert data.choose_num_workers(noise(100), {"batch_size": 8}) == 0


class Slow(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(0.01)
        return index


def test_a_slow_dataset_gets_this_process_s_share_of_the_cores():
    for cores, processes, expected in ((3, 1, 3), (64, 1, 8), (12, 4, 3), (2, 4, 0)):
        with mock.patch.object(workers, "usable_cores", return_value=cores):
            found = data.choose_num_workers(Slow(), {"batch_size": 2}, processes)
        assert found == expected


def test_a_quick_dataset_gets_no_workers(one_by_one, noise):
    with mock.patch.object(workers, "HAND_OVER_SECONDS", 60.0):
        assert data.choose_num_workers(one_by_one(noise(9)), {"batch_size": 2}) == 0


class QuickAfterAll(Dataset):
    """Slow for the first trials, as on a machine that has other things to do."""

    def __init__(self):
        self.num_fetched = 0
        self.clock = 0.0

    def __len__(self):
        return 1

    def __getitem__(self, index):
        self.num_fetched += 1
        self.clock += 0.01 if self.num_fetched <= 2 else 0
        return index


def test_a_quick_dataset_that_was_held_up_gets_no_workers(monkeypatch):
    dataset = QuickAfterAll()
    monkeypatch.setattr(workers, "usable_cores", lambda: 2)
    monkeypatch.setattr(workers.time, "perf_counter", lambda: dataset.clock)
    assert data.choose_num_workers(dataset, {"batch_size": 1}) == 0


class WaitsForThread(Dataset):
    """Loads samples in a thread, which does not survive a fork."""

    def __init__(self):
        self.threads = ThreadPoolExecutor(1)
        self.threads.submit(int).result()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.threads.submit(torch.ones, 1).result(), torch.zeros(1)


def test_a_dataset_that_hangs_in_a_worker_gets_none(monkeypatch, create_trainer):
    """Found 82: the measurement waited for ever."""
    monkeypatch.setattr(workers, "usable_cores", lambda: 2)
    monkeypatch.setattr(workers, "_MEASURING_SECONDS", 0.2)
    trainer = create_trainer()

    trainer.train(WaitsForThread(), num_epochs=1)

    assert trainer.run_config.train_dl_kwargs["num_workers"] == 0
    assert trainer.num_samples_seen == 4
    assert multiprocessing.active_children() == []


def test_measuring_leaves_the_process_as_it_was():
    fetched_here = []

    class Notes(Augmented):
        def __getitem__(self, index):
            fetched_here.append(index)
            return super().__getitem__(index)

    state = torch.get_rng_state()
    data.choose_num_workers(Notes(4), {"batch_size": 2})

    assert fetched_here == []
    assert torch.equal(torch.get_rng_state(), state)


def test_usable_cores_are_those_that_the_process_may_use():
    """Defect 30: os.cpu_count() ignores what a process is limited to, or is None."""
    assert workers.usable_cores() == len(os.sched_getaffinity(0))
    with (
        mock.patch.object(os, "cpu_count", return_value=None),
        mock.patch.object(os, "sched_getaffinity", create=True),
    ):
        del os.sched_getaffinity
        assert workers.usable_cores() == 1


# --- small things


def test_on_an_accelerator_one_batch_is_fetched_ahead():
    fetched = []

    def batches():
        for number in range(3):
            fetched.append(number)
            yield torch.ones(number)

    on_device = loaders.to_device(batches(), torch.device("meta"))
    assert fetched == []
    for length, ahead in ((0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2])):
        batch = next(on_device)
        assert (batch.device.type, batch.shape) == ("meta", (length,))
        assert fetched == ahead
    assert list(on_device) == []


def test_the_length_of_what_has_none_is_none():
    assert data.length_of([1, 2]) == 2
    assert data.length_of(iter([1])) is None
    assert data.length_of(DataLoader(Stream())) is None


def test_a_loader_on_the_device_passes_everything_else_on():
    loader = data.DeviceLoader(DataLoader(range(4), batch_size=2), CPU)

    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]
    assert len(loader) == 2
    assert loader.batch_size == 2
    with pytest.raises(TypeError):
        len(data.DeviceLoader(iter([]), CPU))


def test_batches_keep_their_values_and_structure_on_the_way():
    batches = [{"a": torch.ones(1), "b": ["x", (torch.zeros(2),)]}]

    (batch,) = data.DeviceLoader(batches, CPU)

    assert batch["a"].tolist() == [1.0]
    assert batch["b"][0] == "x"


def test_indices_of_a_batch_keep_their_seed_on_the_way_to_a_worker():
    import pickle

    indices = pickle.loads(pickle.dumps(order.SeededIndices([3, 1], seed=9)))

    assert indices == [3, 1]
    assert indices.seed == 9


MEMBERS = {
    "tensor": lambda number: torch.full((2, 3), number + 0.5),
    "label": torch.tensor,
    "bfloat16": lambda number: torch.ones(2, dtype=torch.bfloat16) * number,
    "parameter": lambda number: torch.nn.Parameter(torch.ones(2) * number),
    "array": lambda number: np.full(2, number),
    "int": int,
    "float": float,
    "text": str,
    "pair": lambda number: (torch.ones(2) * number, number),
    "list": lambda number: [torch.ones(1) * number],
    "mapping": lambda number: {"x": torch.ones(1) * number},
}
SAMPLES = {
    "tuple": tuple,
    "list": list,
    "mapping": lambda members: dict(enumerate(members)),
    "alone": lambda members: members[0],
}


class Made(Dataset):
    """Makes samples of some kind, whose members are of some kinds."""

    def __init__(self, length, sample, members):
        self.length = length
        self.sample, self.members = SAMPLES[sample], [MEMBERS[name] for name in members]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.sample([make(index) for make in self.members])


def equal(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return equal(list(one.items()), list(other.items()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@given(
    st.integers(1, 5),
    st.sampled_from(sorted(SAMPLES)),
    st.lists(st.sampled_from(sorted(MEMBERS)), min_size=1, max_size=3),
)
def test_batches_are_those_of_torch_whatever_the_samples_are(length, sample, members):
    dataset = Made(length, sample, members)
    (expected,) = DataLoader(dataset, batch_size=length)
    (batch,) = planned(dataset, batch_size=length, shuffle=False)
    assert equal(batch, expected)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.nested.nested_tensor([torch.ones(1)])


@pytest.mark.parametrize(
    "samples",
    [
        [(torch.ones(1), 1), (torch.ones(1),)],
        [(torch.ones(2), 1), (torch.ones(3), 1)],
        [(torch.ones(1), 1), (1, 1)],
        [(torch.ones(1), 1), None],
        [(object(), 1), (object(), 1)],
        [(torch.ones(1).to_sparse(), 1)] * 2,
        [(nested(), 1)] * 2,
    ],
)
def test_samples_that_do_not_fit_together_are_refused_as_by_torch(samples):
    with pytest.raises((RuntimeError, TypeError)) as expected:
        list(DataLoader(samples, batch_size=2))
    with pytest.raises(expected.type) as raised:
        list(planned(samples, batch_size=2, shuffle=False))
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("kind", [tuple, torch.Tensor])
@pytest.mark.parametrize(
    "dataset",
    [Made(2, "tuple", ["tensor", "int"]), TensorDataset(torch.ones(2), torch.ones(2))],
)
def test_what_the_user_has_told_torch_to_do_with_samples_is_done(
    monkeypatch, kind, dataset
):
    def as_they_are(samples, *, collate_fn_map):
        return ("as they are", list(samples))

    monkeypatch.setitem(default_collate_fn_map, kind, as_they_are)
    (expected,) = DataLoader(dataset, batch_size=2)
    loader = planned(dataset, batch_size=2, shuffle=False)
    (batch,) = loader
    assert "as they are" in str(batch)
    assert not loader.is_exact
    assert equal(batch, expected)


def test_the_default_collate_function_is_torch_s():
    loader = planned(Augmented(4))

    assert loader.collate_fn is default_collate
