"""Libraries in C, preloaded to stand between a process and the system."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import FAULTS, python


def build(name: str, folder: Path) -> Path:
    """Compile ``<name>.c``, or skip the test where that is not possible."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip(f"needs Linux and gcc, to build {name}.c")
    library = folder / f"{name}.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", library]
    subprocess.run([*command, FAULTS / f"{name}.c", "-ldl"], check=True)
    return library


def run_with(library: Path, script: str, *arguments: object) -> list[str]:
    """Run a script of this folder with a library preloaded.

    Returns:
        The texts and nulls in JSON among the lines that it prints. What training runs
        print is none.
    """
    preload = {"LD_PRELOAD": str(library)}
    command, environment = python(FAULTS / script, *arguments, **preload)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    return [line for line in lines if line == "null" or line.startswith('"')]
