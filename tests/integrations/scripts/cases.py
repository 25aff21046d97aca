"""Runs functions of a module one after another, on all processes of one job.

Starting a job takes longer than most of what is tested in it. The result of each
function, or its error, is saved as ``<function>_<process>.bin``.
"""

import importlib
import os
import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState


def run_cases(module, folder, names):
    cases = importlib.import_module(module)
    process = os.environ.get("RANK", "0")
    for name in names:
        try:
            result = getattr(cases, name)(Path(folder))
        except Exception:
            traceback.print_exc()
            result = f"{name} failed: {traceback.format_exc()}"
        torch.save(result, Path(folder) / f"{name}_{process}.bin")
        # As in a new process, except that the process group stays.
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_USE_FSDP", None)


if __name__ == "__main__":
    run_cases(sys.argv[1], sys.argv[2], sys.argv[3:])
