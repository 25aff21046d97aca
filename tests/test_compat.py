"""What the library uses of torch and Accelerate beside their public names.

A failure here says that a new version has changed one of them: find another way, and
change ``compat.py`` alone.
"""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, default_collate

from pytorch_accelerated import compat


def test_many_tensors_are_changed_in_place_together():
    ones = [torch.ones(2), torch.ones(3)]
    compat.foreach_mul_(ones, 8.0)
    compat.foreach_lerp_(ones, [torch.zeros(2), torch.zeros(3)], 0.25)
    assert [tensor.tolist() for tensor in ones] == [[6.0] * 2, [6.0] * 3]


@pytest.mark.parametrize(
    ("base", "layers"),
    [
        (compat.BatchNorm, [nn.BatchNorm1d(1), nn.BatchNorm3d(1), nn.SyncBatchNorm(1)]),
        (compat.Norm, [nn.BatchNorm2d(1), nn.InstanceNorm1d(1)]),
        (compat.Dropout, [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout()]),
    ],
)
def test_layers_that_evaluation_changes_have_a_common_base(base, layers):
    assert all(isinstance(layer, base) for layer in layers)


def test_the_default_collate_function_is_known_and_may_have_been_extended(monkeypatch):
    assert compat.is_default_collate(default_collate)
    assert not compat.is_default_collate(list)
    monkeypatch.setitem(compat.default_collate_fn_map, tuple, list)
    assert not compat.is_default_collate(default_collate)


def test_workers_of_an_iterator_are_known_and_can_be_ended():
    assert not compat.has_workers(iter(DataLoader([1])))
    batches = iter(DataLoader([1, 2], num_workers=2))
    assert compat.has_workers(batches)
    workers = compat.workers_of(batches)
    assert [worker.is_alive() for worker in workers] == [True, True]
    compat.stop_workers(batches)
    for worker in workers:
        worker.join(10)
    assert [worker.is_alive() for worker in workers] == [False, False]


def test_it_does_not_matter_if_workers_that_are_ended_have_died():
    class Batches:
        def _shutdown_workers(self):
            raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")

    compat.stop_workers(Batches())


def test_a_loader_with_persistent_workers_can_be_made_to_start_others():
    loader = DataLoader([1], num_workers=1, persistent_workers=True)
    first = iter(loader)
    assert iter(loader) is first
    compat.forget_iterator(loader)
    second = iter(loader)
    assert second is not first
    for batches in (first, second):
        compat.stop_workers(batches)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_model_leads_to_the_one_that_it_was_made_from():
    model = nn.Linear(1, 1)
    assert compat.without_compilation(model) is model
    assert compat.without_compilation(torch.compile(model)) is model


@pytest.fixture
def process_group(tmp_path):
    timeout = timedelta(seconds=77)
    torch.distributed.init_process_group(
        "gloo", f"file://{tmp_path}/store", timeout, world_size=1, rank=0
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_the_timeout_of_a_process_group_can_be_read(process_group):
    assert compat.timeout_of(process_group) == timedelta(seconds=77)


def test_a_sharded_tensor_holds_its_part_whose_place_is_known(process_group):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    tensor = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    assert compat.offset_of_part(tensor) == [0, 0]
    assert compat.wraps_tensors(tensor)
    assert not compat.wraps_tensors(torch.ones(1))


def test_a_state_dict_carries_the_versions_of_its_modules():
    state = nn.BatchNorm1d(1).state_dict()
    assert compat.versions_in(state) == {"": {"version": 2}}
    assert compat.versions_in({}) is None
    compat.set_versions(state, {"": {"version": 3}})
    assert compat.versions_in(state) == {"": {"version": 3}}


def test_all_that_accelerate_leaves_on_a_prepared_model_is_known():
    code = (
        "from accelerate import Accelerator\n"
        "from torch import nn\n"
        "model = nn.Linear(1, 1)\n"
        "before = set(vars(model))\n"
        "Accelerator(mixed_precision='bf16', cpu=True).prepare(model)\n"
        "print(*sorted(set(vars(model)) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == set(compat.MARKS)


def test_an_accelerator_keeps_what_it_has_prepared():
    accelerator, model = Accelerator(), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer, DataLoader([1]))
    registries = ("_models", "_optimizers", "_dataloaders")
    assert all(len(getattr(accelerator, name)) == 1 for name in registries)
    compat.forget_prepared(accelerator)
    assert not any(getattr(accelerator, name) for name in registries)
    compat.remember_prepared(accelerator, model, optimizer)
    assert (accelerator._models, accelerator._optimizers) == ([model], [optimizer])
    compat.forget_prepared(accelerator)


def test_an_accelerator_can_be_told_whether_gradients_are_synchronised():
    accelerator = Accelerator()
    for syncs in (False, True):
        compat.set_sync_gradients(accelerator, syncs=syncs)
        assert accelerator.sync_gradients is syncs


def test_the_precision_is_that_of_the_process():
    accelerator = Accelerator()
    shared = compat.shared_state(AcceleratorState)
    before = shared["_mixed_precision"]
    shared["_mixed_precision"] = "bf16"
    try:
        assert accelerator.mixed_precision == "bf16"
    finally:
        shared["_mixed_precision"] = before
