"""Real processes for the promises that speak of processes.

They are forked from the test, which has imported everything: importing torch takes
seconds, forking takes milliseconds. Each has the environment that ``torchrun`` would
give it, and they communicate over gloo, as processes on different machines would.
"""

import os
import signal
import socket
import time
import traceback
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture
def on_processes(tmp_path):
    """Call a function on several processes and return what each returned, in order."""

    limit = float(os.environ.get("PROMISES_TIMEOUT_SECONDS", "60"))

    def run(num_processes, function, *args, timeout_seconds=limit):
        return _Processes(tmp_path, num_processes, function, args).results(
            timeout_seconds
        )

    return run


class _Processes:
    def __init__(self, folder, num_processes, function, args):
        self.files = [folder / f"process_{rank}" for rank in range(num_processes)]
        self.codes = {}
        port = _free_port()
        environments = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_processes),
                "LOCAL_WORLD_SIZE": str(num_processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            for rank in range(num_processes)
        ]
        self.pids = [
            _fork(environment, file, function, args)
            for environment, file in zip(environments, self.files, strict=True)
        ]

    def results(self, timeout_seconds):
        deadline = time.monotonic() + timeout_seconds
        while not self._have_ended():
            if time.monotonic() > deadline:
                for pid in self.pids:
                    if pid not in self.codes:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                pytest.fail(f"The processes hang. {self._logs()}")
            time.sleep(0.005)
        if any(self.codes.values()):
            pytest.fail(f"Exit codes {list(self.codes.values())}. {self._logs()}")
        return [
            torch.load(file.with_suffix(".pt"), weights_only=False)
            for file in self.files
        ]

    def _have_ended(self):
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def _logs(self):
        return "\n".join(
            file.with_suffix(".log").read_text(errors="replace")[-3000:]
            for file in self.files
        )


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _fork(environment, file, function, args):
    with warnings.catch_warnings():
        # Torch has threads, but none that the child would need.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _run_in_child(environment, file, function, args)
    return pid


def _run_in_child(environment, file, function, args):
    code = 1
    try:
        log = os.open(file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.save(function(*args), file.with_suffix(".pt"))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the first process hosts what all talk over
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)
