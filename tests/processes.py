"""Real processes for the trials, forked from one that has imported everything.

Importing torch takes longer than a trial; forking takes a few milliseconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from accelerate.state import AcceleratorState

TESTS = Path(__file__).parent
FAULTS = TESTS / "faults"
HANG_SECONDS = 120


def python(*arguments: object, **variables: str) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment of a Python that finds all of this."""
    path = os.pathsep.join(map(str, (TESTS.parent / "src", TESTS, FAULTS)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return [sys.executable, *map(str, arguments)], {**environment, **variables}


def torchrun(
    *arguments: object, seconds: float, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script on two processes, as a launcher starts them."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command, environment = python(*launcher, *arguments, **variables)
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=seconds
    )


class Job:
    """One or several processes that run a function, as a launcher would start them.

    Args:
        function: Called in each process; an exception makes its exit code 1.
        num_processes: How many; more than one form a group of torch.distributed.
        log: File for what they print.
        own_group: Whether the first process leads a group of processes, to which those
            that it starts belong.
        is_launched: Whether one process alone has the environment of a launcher too.
    """

    def __init__(
        self,
        function: Callable[[], None],
        log: Path,
        num_processes: int = 1,
        *,
        own_group: bool = False,
        is_launched: bool = False,
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self.pids: list[int] = []
        self.codes: dict[int, int] = {}
        port = _free_port() if num_processes > 1 or is_launched else None
        multiprocessing.active_children()  # forgets those that have ended
        for rank in range(num_processes):
            with warnings.catch_warnings():
                # torch has threads, but none that the child would need
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                if own_group:
                    os.setpgid(0, 0)
                _run_in_child(function, rank, num_processes, port, log)
            self.pids.append(pid)

    def kill(self, signal_number: int, rank: int | None = None) -> None:
        """Send a signal to one process, or to all that still run."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            if pid not in self.codes:
                os.kill(pid, signal_number)

    def interrupt(self) -> None:
        """Do what Ctrl-C does in a terminal: interrupt the whole group."""
        if not self.poll():
            os.killpg(self.pids[0], signal.SIGINT)

    def wait_for_group(self, seconds: float = 15) -> str | None:
        """Say which processes of the group are still there after some time."""
        deadline = time.monotonic() + seconds
        while left := _members_of_group(self.pids[0]):
            if time.monotonic() > deadline:
                os.killpg(self.pids[0], signal.SIGKILL)
                return f"processes that are left: {left}"
            time.sleep(0.01)
        return None

    def poll(self) -> bool:
        """Say whether all have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float = HANG_SECONDS) -> list[int]:
        """Wait for all to end, and return their exit codes; kill them if they hang."""
        deadline = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > deadline:
                self.kill(signal.SIGABRT)  # they print where they are
                time.sleep(1)
                self.kill(signal.SIGKILL)
                text = self.log.read_text(errors="replace")[-4000:]
                raise TimeoutError(f"Processes hang after {seconds} s: {text}")
            time.sleep(0.005)
        return [self.codes[pid] for pid in self.pids]

    def wait_or_explain(self, seconds: float = HANG_SECONDS) -> str | None:
        """Wait for all to end; say what went wrong if one did not end well."""
        try:
            codes = self.wait(seconds)
        except TimeoutError as error:
            return str(error)
        if not any(codes):
            return None
        return f"exit codes {codes}: {self.log.read_text(errors='replace')[-3000:]}"


def memory_taken() -> int:
    """Return the bytes that the addresses of this process span."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def keep_to_memory(num_bytes: int) -> None:
    """Let this process take so many bytes more than it has, and no others."""
    limit = memory_taken() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _members_of_group(group: int) -> list[str]:
    members = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, its_group = (
                (process / "stat").read_text().rpartition(") ")[2].split()[:3]
            )
            if int(its_group) == group and state != "Z":
                members.append(process.name)
    return members


def _run_in_child(
    function: Callable[[], None],
    rank: int,
    num_processes: int,
    port: int | None,
    log: Path,
) -> None:
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (for good)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        faulthandler.enable(2)
        if port is not None:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(num_processes),
                LOCAL_WORLD_SIZE=str(num_processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        AcceleratorState._reset_state(reset_partial_state=True)
        function()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
