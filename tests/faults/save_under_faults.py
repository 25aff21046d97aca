"""Saves a training state again and again, each time with a fault one operation later.

A new one, after which the older one is deleted, and one over the older one.

``python save_under_faults.py FOLDER MODE``, with file_faults.so preloaded, prints a
line of JSON for each fault: what went wrong, or null.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from runs import SMALL, save_with, train_another_epoch

from pytorch_accelerated import checkpoint
from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.errors import CheckpointError
from pytorch_accelerated.state import TrainingState

MODES = {"kill": 1, "no space": 2, "io error": 3}
RAISED, NOT_RAISED = 3, 0


def main(folder: Path, mode: str) -> None:
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    trainer = SMALL.with_(save_best=True).run(folder / "run")
    states = folder / "states"
    saving = SaveTrainingStateCallback(
        states, save_every_n_steps=1, max_checkpoints=1, on_save_error="raise"
    )
    save_with(saving, trainer, "step_1")
    shutil.copytree(states, folder / "pristine")
    weights = {1: {k: v.clone() for k, v in trainer.model.state_dict().items()}}
    train_another_epoch(trainer, states / "step_1")
    weights[2] = trainer.model.state_dict()

    for name in ("step_2", "step_1"):
        for number in range(1, 10_000):
            code = in_child(
                lambda at=number, name=name: save(
                    shim, MODES[mode], at, partial(save_with, saving, trainer, name)
                )
            )
            if code == 77:  # it ended before the fault was due
                break
            wrong = what_is_wrong(states, weights, mode, code)
            sys.stdout.write(json.dumps(wrong) + "\n")
            sys.stdout.flush()
            shutil.rmtree(states)
            shutil.copytree(folder / "pristine", states)


def in_child(function) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = function()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def save(shim, mode: int, number: int, save_state) -> int:
    shim.fault_arm(mode, ctypes.c_long(number))
    code = NOT_RAISED
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an old folder may stay
            save_state()
    except CheckpointError as error:
        expected = "errno 5" if mode == MODES["io error"] else "errno 28"
        code = RAISED if expected in str(error) else 1
        if code == 1:
            sys.stderr.write(f"{error}\n")
    return 77 if shim.fault_disarm() < number else code


def what_is_wrong(states: Path, weights, mode: str, code: int) -> str | None:
    allowed = (-signal.SIGKILL,) if mode == "kill" else (RAISED, NOT_RAISED)
    if code not in allowed:
        return f"exit code {code}"
    newest = checkpoint.newest(states)
    if newest is None:
        return "no checkpoint is left"
    if code == NOT_RAISED and newest.num_updates != 2:
        return "it failed without a word"
    loaded = TrainingState.read(newest).model
    expected = weights[newest.num_updates]
    if not all(torch.equal(loaded[name], expected[name]) for name in expected):
        return f"{newest} has other weights"
    if mode != "kill" and any(".tmp-" in path.name for path in states.iterdir()):
        return "half a checkpoint was left by a process that lives"
    checkpoint.clean_leftovers(states)
    left = {path.name for path in states.iterdir()}
    return None if left <= {"step_1", "step_2"} else f"{left} are left"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
