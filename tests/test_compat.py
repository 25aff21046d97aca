"""What the library uses of torch and Accelerate beside their public names.

A failure here says that a new version has changed one of them: find another way, and
change ``compat.py`` alone.
"""

import subprocess
import sys
from datetime import timedelta

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from pytorch_accelerated import compat


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


def test_the_timeout_of_a_process_group_can_be_read(process_group):
    assert compat.timeout_of(process_group) == timedelta(seconds=77)


def test_a_sharded_tensor_holds_its_part_whose_place_is_known(process_group):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    tensor = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    assert compat.offset_of_part(tensor) == [0, 0]
    assert compat.wraps_tensors(tensor)
    assert not compat.wraps_tensors(torch.ones(1))


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
