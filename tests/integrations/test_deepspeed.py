"""DeepSpeed's ZeRO 1 to 3 on two processes without a GPU.

``make test-integrations`` installs DeepSpeed beside the other packages: where it can be
imported, Accelerate imports it whenever a model is unwrapped.
"""

import sys
from pathlib import Path

import pytest
import torch
from launching import run, torchrun

PYTHON = Path(sys.prefix) / "deepspeed" / "bin" / "python"
CASES = (
    *("plain", "plain_clipped", "plain_accumulated", "plain_again"),
    *("zero_1", "zero_2", "zero_3"),
    *("accumulated_1", "accumulated_2", "accumulated_3", "counted", "clipped"),
    *("again", "saved_2", "resumed_2", "saved_3", "resumed_3", "refused"),
)

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="DeepSpeed is not installed: make test-integrations"
)


def run_cases(num_processes, folder, *cases):
    command = ("cases.py", "deepspeed_cases", folder, *cases)
    launched = run(
        torchrun(num_processes, *command, python=PYTHON),
        folder,
        # The first time, DeepSpeed compiles what it communicates with.
        seconds=600,
        PATH=f"{PYTHON.parent}:/usr/local/bin:/usr/bin:/bin",
    )
    assert launched.code == 0, launched.output[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    run_cases(2, folder, *CASES)
    return folder


def assert_close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("with_deepspeed", "without"),
    [
        ("zero_1", "plain"),
        ("zero_2", "plain"),
        ("zero_3", "plain"),
        ("clipped", "plain_clipped"),
        ("accumulated_1", "plain_accumulated"),
        ("accumulated_2", "plain_accumulated"),
        ("accumulated_3", "plain_accumulated"),
        ("counted", "plain_accumulated"),
        ("again", "plain_again"),
    ],
)
def test_training_with_deepspeed_gives_the_weights_of_training_without(
    result, with_deepspeed, without
):
    assert_close(result(with_deepspeed)["weights"], result(without)["weights"])


def test_a_single_process_accumulates_too(tmp_path):
    """It made an update of each batch, as if every one closed a window."""
    names = "plain_accumulated", "accumulated_2"
    run_cases(1, tmp_path, *names)
    plain, sharded = (torch.load(tmp_path / f"{name}_0.bin") for name in names)

    assert sharded["type"].endswith("DEEPSPEED")
    assert_close(sharded["weights"], plain["weights"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_and_counts_are_those_without_deepspeed(result, stage):
    zero, plain = result(f"zero_{stage}"), result("plain")
    assert zero["type"].endswith("DEEPSPEED")
    assert zero["num_updates"] == plain["num_updates"] == 21
    assert_close(zero["losses"], plain["losses"])
    assert_close(zero["eval_losses"], plain["eval_losses"])


def test_a_last_window_that_is_not_full_counts_as_one_update(result):
    """7 batches and windows of 3 make 3 updates in each of 3 epochs."""
    for stage in (1, 2, 3):
        assert result(f"accumulated_{stage}")["num_updates"] == 9


def test_the_gradient_norm_is_the_one_before_clipping(result):
    norm = result("clipped")["norm"]
    assert norm > 0.3
    assert_close(norm, result("plain_clipped")["norm"].to(norm.dtype))


def test_an_evaluation_between_two_runs_gives_the_loss_of_the_last_epoch(result):
    again = result("again")
    assert_close(again["evaluated"], again["losses"][0])


def test_a_checkpoint_holds_whole_plain_weights(result, folder):
    saved = torch.load(folder / "exported.pt")["model_state_dict"]
    assert_close(saved, result("again")["weights"], atol=0)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_is_bit_for_bit_the_one_that_never_stopped(result, stage):
    resumed, whole = result(f"resumed_{stage}"), result(f"saved_{stage}")
    assert_close(resumed["weights"], whole["weights"], atol=0)


@pytest.mark.parametrize("process", [0, 1])
def test_a_config_that_contradicts_the_arguments_is_refused_with_both_values(
    result, process
):
    clipping, accumulation, batch_size, clip_value = result("refused", process)
    assert "gradient_clipping=1.0" in clipping
    assert "gradient_clip_norm=0.3" in clipping
    assert "gradient_accumulation_steps=4" in accumulation
    assert "gradient_accumulation_steps=3" in accumulation
    assert "train_micro_batch_size_per_gpu=16" in batch_size
    assert "per_device_batch_size=2" in batch_size
    assert "gradient_clip_value=0.3" in clip_value


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_trains_on_two_gpus(launch, stage):
    """What does not run on a CPU: NCCL, and DeepSpeed's kernels."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = ("cases.py", "deepspeed_cases", "{folder}", f"zero_{stage}")
    launched = launch(*torchrun(2, *case, python=PYTHON))
    result = torch.load(launched.folder / f"zero_{stage}_0.bin")
    assert result["losses"][-1] < result["losses"][0]
