"""Small checkpoints, and what tests of them share."""

from collections import OrderedDict
from pathlib import Path

import torch

from pytorch_accelerated import checkpoint as ckpt
from pytorch_accelerated.checkpoint import CheckpointWriter


def save(path, value, **progress):
    """Write a small checkpoint with every kind of file."""
    with CheckpointWriter(path) as writer:
        writer.write_weights(OrderedDict(weight=torch.full((5,), float(value))))
        writer.write("optimizer.pt", {"step": value, "mean": torch.ones(3)})
        writer.write("random/0.pt", ckpt.get_random_states())
        return writer.commit({"num_updates": value, **progress})


def value_of(checkpoint):
    checkpoint.verify()
    weights = checkpoint.load_weights()["weight"]
    assert weights.unique().tolist() == [checkpoint.load("optimizer.pt")["step"]]
    return weights[0].item()


def names_in(folder):
    return sorted(entry.name for entry in Path(folder).iterdir())


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail
