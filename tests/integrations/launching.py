"""Launching: scripts and functions on several processes, as users do it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[2]
# Long enough for a machine that does other things; a hang is reported as a failure.
LONGEST_SECONDS = 300

# What would tell a launched script that it is already a member of another job.
_OF_A_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Launched:
    """What a launched command left behind."""

    def __init__(self, folder, code=0, output=""):
        self.folder = Path(folder)
        self.code = code
        self.output = output

    def weights(self):
        return torch.load(self.folder / "weights.bin")

    def processes(self):
        """Return what each process wrote, in order of its index."""
        files = sorted(self.folder.glob("process_*.json"))
        return [json.loads(file.read_text()) for file in files]


def run(command, folder, seconds=LONGEST_SECONDS, **env):
    """Run a command with our library on its path, in a folder."""
    completed = subprocess.run(
        [str(part) for part in command],
        env=environment(**env),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    return Launched(folder, completed.returncode, completed.stdout)


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
    # Not what the user of this machine has configured for Accelerate.
    env["HF_HOME"] = "/nonexistent"
    env.update(changes)
    return {key: str(value) for key, value in env.items() if value is not None}


def torchrun(num_processes, script, *arguments, options=(), python=sys.executable):
    """Return the command that runs one of the scripts under torchrun."""
    return [
        python,
        "-m",
        "torch.distributed.run",
        # A free port, chosen by torchrun.
        *(options or ("--standalone",)),
        "--nproc_per_node",
        num_processes,
        SCRIPTS / script,
        *arguments,
    ]


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]
