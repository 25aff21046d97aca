"""Workers of loaders get along with what else a process does, and leave none behind."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from toys import OneByOne, create_trainer, ones

from pytorch_accelerated.data import workers
from pytorch_accelerated.data.fetching import BatchDataset
from pytorch_accelerated.data.order import SeededBatch
from pytorch_accelerated.data.workers import LastIteration
from pytorch_accelerated.errors import TrainingWarning

SRC = Path(__file__).parents[2] / "src"


def test_workers_that_are_not_forked_are_sent_the_data_and_no_generator():
    batches = BatchDataset(Samples(), default_collate)
    expected = batches.fetch_here(SeededBatch([2, 5], 1))
    assert torch.equal(
        pickle.loads(pickle.dumps(batches)).__getitems__(SeededBatch([2, 5], 1)),
        expected,
    )


def test_batches_out_of_order_are_not_what_a_run_can_do():
    loader = {"num_workers": 1, "in_order": False}
    trainer = create_trainer()
    with pytest.warns(TrainingWarning, match="in_order=False is not followed"):
        trainer.train(OneByOne(ones(4)), 1, train_dataloader_kwargs=loader)
    assert trainer._train_dataloader._loader.in_order


class Samples(Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return torch.tensor(index)


def test_workers_are_ended_while_their_iteration_is_still_in_use():
    iteration = LastIteration()
    batches = iteration.of(DataLoader(Samples(), num_workers=2))
    assert next(batches) == 0
    assert len(multiprocessing.active_children()) == 2
    iteration.stop_workers()
    assert multiprocessing.active_children() == []


@pytest.fixture
def ctrl_c():
    """Interrupt this process, as a terminal does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


class Starting:
    """A loader that does something while it starts its workers."""

    num_workers = 1
    has_started = False

    def __init__(self, *actions):
        self.actions = actions

    def __iter__(self):
        for action in self.actions:
            action()
        self.has_started = True
        return iter(())


def test_ctrl_c_waits_until_workers_have_started(ctrl_c):
    loader = Starting(ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        LastIteration().of(loader)
    assert loader.has_started


def test_ctrl_c_is_not_lost_on_workers_that_cannot_start(ctrl_c):
    def fail():
        raise OSError("no more processes")

    with pytest.raises(KeyboardInterrupt) as caught:
        LastIteration().of(Starting(ctrl_c, fail))
    assert isinstance(caught.value.__context__, OSError)


def test_a_second_ctrl_c_does_not_wait_for_workers(ctrl_c):
    loader = Starting(ctrl_c, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        LastIteration().of(loader)
    assert not loader.has_started


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_ctrl_c_ends_a_worker_that_is_starting_as_if_all_were_well(ctrl_c):
    codes = []

    def fork():
        pid = os.fork()
        if pid == 0:
            ctrl_c()
            os._exit(1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    LastIteration().of(Starting(fork))
    assert codes == [0]


# ----------------------------------------------------------------------- how many


def test_a_dataset_in_memory_needs_no_workers(noise):
    """Defect 30: as many workers as cores, for each loader and in each process."""
    with mock.patch.object(workers, "usable_cores", return_value=64):
        assert workers.choose_num_workers(noise(100), {"batch_size": 8}) == 0


class Slow(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(0.01)
        return index


def test_a_slow_dataset_gets_this_process_s_share_of_the_cores():
    for cores, processes, expected in ((3, 1, 3), (64, 1, 8), (12, 4, 3), (2, 4, 0)):
        with mock.patch.object(workers, "usable_cores", return_value=cores):
            found = workers.choose_num_workers(Slow(), {"batch_size": 2}, processes)
        assert found == expected


def test_a_quick_dataset_gets_no_workers(one_by_one, noise):
    with mock.patch.object(workers, "HAND_OVER_SECONDS", 60.0):
        assert workers.choose_num_workers(one_by_one(noise(9)), {"batch_size": 2}) == 0


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
    assert workers.choose_num_workers(dataset, {"batch_size": 1}) == 0


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

    class Notes(Slow):
        def __getitem__(self, index):
            fetched_here.append(index)
            return torch.rand(1)

    state = torch.get_rng_state()
    workers.choose_num_workers(Notes(), {"batch_size": 2})

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


# ------------------------------------------------------- whole scripts of a user's

SLOW_SAMPLES = """
import faulthandler, multiprocessing, os, time
import torch
from torch import nn
from pytorch_accelerated import Trainer, data
from pytorch_accelerated.data import workers

workers.usable_cores = lambda: 2

class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(0.01)
        return torch.ones(1), torch.ones(1)

def train(**kwargs):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.MSELoss(), optimizer, callbacks=())
    trainer.train(Samples(), num_epochs=1, per_device_batch_size=2, **kwargs)
    print("trained with", trainer.run_config.train_dl_kwargs["num_workers"], "workers")
    return trainer
"""


def run_script(folder, script):
    file = folder / "script.py"
    file.write_text(SLOW_SAMPLES + script)
    done = subprocess.run(
        [sys.executable, file],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_workers_run_while_the_user_has_a_timer_of_faulthandler(tmp_path):
    """Found 80: a timer of ours in the forked worker waited for a thread of theirs."""
    out = run_script(
        tmp_path,
        "faulthandler.dump_traceback_later(100)\n"
        "train(train_dataloader_kwargs={'num_workers': 2})\n",
    )
    assert out == "trained with 2 workers\n"


def test_an_unguarded_script_whose_processes_are_spawned_trains_once(tmp_path):
    """Found 81: the process that measured imported the script, and so trained too."""
    out = run_script(
        tmp_path,
        "forks = multiprocessing.get_all_start_methods()[0] == 'fork'\n"
        "chosen = workers.choose_num_workers(Samples(), {'batch_size': 2})\n"
        "assert chosen == (2 if forks else 0)\n"
        # Measuring has left the choice to the user.
        "multiprocessing.set_start_method('spawn')\n"
        "train()\n",
    )
    assert out.count("trained with") == 1
    assert "trained with 0 workers\n" in out
