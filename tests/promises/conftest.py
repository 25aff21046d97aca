"""Real processes for the promises that speak of processes.

They are forked from the test, which has imported everything: importing torch takes
seconds, forking takes milliseconds. Each has the environment that ``torchrun`` would
give it, and they communicate over gloo, as processes on different machines would.
"""

import os

import pytest
import torch
from accelerate.state import GradientState
from processes import Job


@pytest.fixture
def on_processes(tmp_path):
    """Call a function on several processes and return what each returned, in order."""

    limit = float(os.environ.get("PROMISES_TIMEOUT_SECONDS", "60"))

    def run(num_processes, function, *args, timeout_seconds=limit):
        def call():
            GradientState._reset_state()
            torch.save(function(*args), file_of(os.environ["RANK"]))
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # the first one hosts what all talk over

        def file_of(rank):
            return tmp_path / f"process_{rank}.pt"

        job = Job(call, tmp_path / "log", num_processes, is_launched=True)
        if what_failed := job.wait_or_explain(timeout_seconds):
            pytest.fail(what_failed)
        files = map(file_of, range(num_processes))
        return [torch.load(file, weights_only=False) for file in files]

    return run
