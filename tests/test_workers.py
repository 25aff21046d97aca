"""Workers say where they are stuck; Ctrl-C and dead workers leave none behind."""

import ctypes
import io
import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pytorch_accelerated.workers import LastIteration, StuckReport


def wait_in_python():
    time.sleep(0.5)


def wait_in_c():
    ctypes.PyDLL(None).usleep(500_000)  # lets no other Python code run


def test_a_block_that_takes_too_long_has_its_stack_printed_once(capfd):
    report = StuckReport(seconds=0.1)
    with report:
        wait_in_python()
    printed = capfd.readouterr().err
    assert printed.count("Timeout (") == 1
    assert "in wait_in_python" in printed


def test_code_in_c_that_never_comes_back_has_its_stack_printed(capfd):
    report = StuckReport(seconds=0.1)
    with report:
        wait_in_c()
    assert "in wait_in_c" in capfd.readouterr().err


def test_nothing_is_printed_between_blocks_and_during_short_ones(capfd):
    report = StuckReport(seconds=1)
    for _ in range(150):
        with report:
            time.sleep(0.01)
    time.sleep(1.5)
    with report:
        pass
    assert capfd.readouterr().err == ""


def test_every_block_that_takes_too_long_has_its_stack_printed(capfd):
    report = StuckReport(seconds=0.1)
    for _ in range(2):
        with report:
            wait_in_python()
    assert capfd.readouterr().err.count("Timeout (") == 2


@pytest.mark.parametrize("stderr", [None, io.StringIO()])
def test_a_standard_error_that_is_no_file_is_no_hindrance(stderr, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr)
    report = StuckReport(seconds=0.1)
    with report:
        wait_in_python()


# --------------------------------------------------------------- iterations


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
