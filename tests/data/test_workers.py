"""Workers of loaders get along with what else a process does, and leave none behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pytorch_accelerated.data.workers import LastIteration

SRC = Path(__file__).parents[2] / "src"


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


def test_an_error_of_workers_that_are_being_ended_does_not_matter():
    class Workers:
        def __iter__(self):
            return self

        def __next__(self):
            raise StopIteration

        def _shutdown_workers(self):
            raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")

    class Loader:
        num_workers = 1

        def __iter__(self):
            return workers

    workers = Workers()
    iteration = LastIteration()
    iteration.of(Loader())
    iteration.stop_workers()


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
        "chosen = data.choose_num_workers(Samples(), {'batch_size': 2})\n"
        "assert chosen == (2 if forks else 0)\n"
        # Measuring has left the choice to the user.
        "multiprocessing.set_start_method('spawn')\n"
        "train()\n",
    )
    assert out.count("trained with") == 1
    assert "trained with 0 workers\n" in out
