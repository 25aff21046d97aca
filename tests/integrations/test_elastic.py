"""The guide in docs/clusters.md, followed: a process dies, the job ends the same."""

import torch
from launching import torchrun

RESTARTS = ("--standalone", "--max-restarts", 3)


def test_a_job_that_loses_a_process_ends_with_the_weights_of_one_that_does_not(launch):
    # Without it a restarted job may meet the keys of the one before, and hang.
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    never = 10**6
    whole = launch(*torchrun(2, "elastic.py", "{folder}", never, options=RESTARTS))
    killed = launch(
        # In the second of three epochs of 7 updates; the last save was at update 10.
        *torchrun(2, "elastic.py", "{folder}", 11, options=RESTARTS),
        **store,
    )

    assert (killed.folder / "was_killed").exists()
    assert "Resuming from" in killed.output
    for name, tensor in whole.weights().items():
        assert torch.equal(killed.weights()[name], tensor), name
    assert torch.load(killed.folder / "losses.bin") == torch.load(
        whole.folder / "losses.bin"
    )
