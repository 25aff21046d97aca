"""Launching: scripts and functions on several processes, as users do it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[2]
# Long enough for a machine that does other things; a hang is reported as a failure.
LONGEST_SECONDS = 300

# What would tell a launched script that it is already a member of another job.
_OF_A_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Launched:
    """What a launched command left behind."""

    def __init__(self, completed, folder):
        self.code = completed.returncode
        self.output = completed.stdout
        self.folder = folder

    def weights(self):
        return torch.load(self.folder / "weights.bin")

    def processes(self):
        """Return what each process wrote, in order of its index."""
        files = sorted(self.folder.glob("process_*.json"))
        return [json.loads(file.read_text()) for file in files]


@pytest.fixture
def launch(tmp_path):
    """Run a command with our library on its path; every call has a folder of its own.

    "{folder}" in an argument becomes that folder.
    """
    count = iter(range(1000))

    def run(*command, ok=True, seconds=LONGEST_SECONDS, **env):
        folder = tmp_path / f"run_{next(count)}"
        folder.mkdir()
        command = [str(part).replace("{folder}", str(folder)) for part in command]
        completed = subprocess.run(
            command,
            env=environment(**env),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        if ok and completed.returncode != 0:
            pytest.fail(f"{command} exited with {completed.returncode}:\n"
                        f"{completed.stdout[-6000:]}")
        return Launched(completed, folder)

    return run


def environment(**changes):
    """Return the environment for a launched process; None removes a variable."""
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in _OF_A_JOB and not key.startswith(("ACCELERATE_", "FSDP_"))
    }
    path = [str(ROOT / "src"), str(SCRIPTS), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    env["OMP_NUM_THREADS"] = "1"
    # Whatever the machine's user has configured for Accelerate.
    env["HF_HOME"] = env.get("HF_HOME_OF_TESTS", "/nonexistent")
    env.update(changes)
    return {key: str(value) for key, value in env.items() if value is not None}


def torchrun(num_processes, script, *arguments, options=()):
    """Return the command that trains a script with torchrun, on a free port."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *(options or ("--standalone",)),
        "--nproc_per_node",
        num_processes,
        SCRIPTS / script,
        *arguments,
    ]
