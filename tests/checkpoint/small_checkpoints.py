"""Small checkpoints, and code that is killed or fails at every file operation."""

import os
import signal
import traceback
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from pytorch_accelerated import checkpoint as ckpt
from pytorch_accelerated.checkpoint import CheckpointWriter


def save(path, num_updates, value=None, **progress):
    """Write a small checkpoint with every kind of file."""
    value = num_updates if value is None else value
    with CheckpointWriter(path) as writer:
        writer.write_weights(OrderedDict(weight=torch.full((5,), float(value))))
        writer.write("optimizer.pt", {"step": value, "mean": torch.ones(3)})
        writer.write("random/0.pt", ckpt.get_random_states())
        return writer.commit({"num_updates": num_updates, **progress})


def value_of(checkpoint):
    checkpoint.verify()
    weights = checkpoint.load_weights()["weight"]
    assert weights.unique().tolist() == [checkpoint.load("optimizer.pt")["step"]]
    return weights[0].item()


def names_in(folder):
    return sorted(entry.name for entry in Path(folder).iterdir())


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


OPERATIONS = [
    ("builtins", "open"),
    *((os, name) for name in ("fsync", "rename", "replace", "mkdir", "open")),
    *((os, name) for name in ("unlink", "rmdir")),
]


def patch_operations(patch, act):
    """Call ``act`` before every file operation that changes something."""

    def counted(operation):
        def wrapper(*args, **kwargs):
            act()
            return operation(*args, **kwargs)

        return wrapper

    for owner, name in OPERATIONS:
        if owner == "builtins":
            patch.setattr(f"{owner}.{name}", counted(open))
        else:
            patch.setattr(owner, name, counted(getattr(owner, name)))


def run_in_child(function):
    """Run a function in a forked process; return its exit status."""
    with warnings.catch_warnings():
        # torch has threads, but this process has not used them yet
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 1, -signal.SIGKILL)
    return status


def killed_at_every_operation(function):
    """Run a function again and again, killed before its 1st, 2nd, ... operation.

    Yields after each kill; the last time, it was not killed.
    """
    for number in range(1, 1000):

        def in_child(left=number):
            def kill_when_due():
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            with pytest.MonkeyPatch.context() as patch:
                patch_operations(patch, kill_when_due)
                function()

        status = run_in_child(in_child)
        assert status != 1
        yield
        if status == 0:
            assert number > 4  # it did get killed
            return
