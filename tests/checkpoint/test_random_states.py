"""Random states are restored exactly, and hold tensors and plain values only."""

import random

import numpy as np
import pytest
import torch

from pytorch_accelerated import checkpoint as ckpt
from pytorch_accelerated.errors import CheckpointError


def test_random_states_are_restored_exactly_without_pickle(tmp_path):
    random.gauss(0, 1)  # leaves the second number of a pair behind
    np.random.normal()
    path = ckpt.save_file(ckpt.get_random_states(), tmp_path / "r.pt")
    draws = [
        (random.gauss(0, 1), random.random(), np.random.normal(), torch.rand(3))
        for _ in range(2)
        if ckpt.set_random_states(ckpt.load_file(path)) is None
    ]
    assert draws[0][:3] == draws[1][:3]
    assert torch.equal(draws[0][3], draws[1][3])


def test_states_of_an_accelerator_that_is_not_there_are_skipped_with_a_warning():
    states = ckpt.get_random_states()
    states["accelerator"] = {"type": "none", "current": 0, "states": [states["torch"]]}
    with pytest.warns(UserWarning, match="taken on 1 of the kind none, this process"):
        ckpt.set_random_states(states)


def test_damaged_random_states_are_a_checkpoint_error():
    states = ckpt.get_random_states()
    states["python"]["words"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(CheckpointError, match="random states cannot be restored"):
        ckpt.set_random_states(states)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_generator_of_a_gpu_is_restored():
    torch.rand(1, device="cuda")
    states = ckpt.get_random_states()
    first = torch.rand(4, device="cuda")
    ckpt.set_random_states(ckpt.to_storable(states))
    assert torch.equal(torch.rand(4, device="cuda"), first)
    states["accelerator"]["states"] *= 9
    with pytest.warns(UserWarning, match=r"taken on \d+ .*at most that of the current"):
        ckpt.set_random_states(states)
    assert torch.equal(torch.rand(4, device="cuda"), first)
