"""FSDP2 on two processes without a GPU: the numbers of one process, and its states."""

import math
import sys

import pytest
import safetensors.torch
import torch
from launching import SCRIPTS, run, torchrun

ON_TWO = (
    *("sharded", "clipped", "accumulated", "counted", "evaluated_and_trained_again"),
    *("exported", "resumed_from_parts", "resumed_from_whole_state", "averaged"),
    *("rehearsed", "low_precision", "refused"),
)
ON_ONE = (
    *("plain", "plain_clipped", "plain_accumulated", "trained_again_plainly"),
    "plain_averaged",
    # After the others: it loads what two processes have saved.
    "loaded_from_parts",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run all cases: those with FSDP on two processes, then the others on one."""
    folder = tmp_path_factory.mktemp("sharded")
    for command in (
        torchrun(2, "cases.py", "sharded_cases", folder, *ON_TWO),
        [sys.executable, SCRIPTS / "cases.py", "sharded_cases", folder, *ON_ONE],
    ):
        launched = run(command, folder)
        assert launched.code == 0, launched.output[-6000:]
    return folder


def assert_close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("on_two", "on_one"),
    [
        ("sharded", "plain"),
        ("clipped", "plain_clipped"),
        ("accumulated", "plain_accumulated"),
        ("counted", "plain_accumulated"),
        ("evaluated_and_trained_again", "trained_again_plainly"),
    ],
)
def test_sharded_training_ends_with_the_weights_of_one_process(result, on_two, on_one):
    assert_close(result(on_two)["weights"], result(on_one)["weights"])


def test_the_model_was_sharded_and_its_losses_are_those_of_one_process(result):
    sharded, plain = result("sharded"), result("plain")
    assert sharded["is_sharded"]
    assert not plain["is_sharded"]
    assert_close(sharded["losses"], plain["losses"])
    assert_close(sharded["eval_losses"], plain["eval_losses"])
    assert result("sharded", process=1)["losses"] == sharded["losses"]


def test_what_finders_do_with_sharded_weights_is_undone(result):
    rehearsed, sharded = result("rehearsed"), result("sharded")
    assert_close(rehearsed["weights"], sharded["weights"], atol=0)
    assert rehearsed["losses"] == sharded["losses"]
    summary, other = rehearsed["found"], result("rehearsed", process=1)["found"]
    assert summary == other
    assert summary["parameters"] == 6 * 8 + 8 + 8 * 7 + 7 + 7 + 1
    assert len(summary["curve"]) > 5


def test_the_gradient_norm_is_that_of_all_parts(result):
    assert_close(result("clipped")["norm"], result("plain_clipped")["norm"])


def test_an_evaluation_between_two_runs_gives_the_loss_of_the_last_epoch(result):
    again = result("evaluated_and_trained_again")
    assert again["evaluated"] == again["losses"][0]


def test_a_checkpoint_holds_whole_plain_weights(result, folder):
    exported = result("exported")
    saved = torch.load(folder / "exported.pt")["model_state_dict"]
    assert {type(tensor) for tensor in saved.values()} == {torch.Tensor}
    assert_close(saved, exported["weights"], atol=0)
    assert_close(exported["loaded"], exported["weights"], atol=0)
    alone = safetensors.torch.load_file(folder / "exported.safetensors")
    assert_close(alone, exported["weights"], atol=0)
    assert_close(exported["loaded alone"], exported["weights"], atol=0)


def test_the_moving_average_is_sharded_and_equals_that_of_one_process(result, folder):
    sharded, plain = result("averaged"), result("plain_averaged")
    assert sharded["is_sharded"]
    assert_close(sharded["weights"], plain["weights"])
    assert_close(sharded["losses"], plain["losses"])
    saved = torch.load(folder / "average_True.pt")["model_state_dict"]
    assert_close(saved, sharded["weights"])
    alone = safetensors.torch.load_file(folder / "average_alone_True.safetensors")
    assert_close(alone, sharded["weights"])


@pytest.mark.parametrize("kind", ["parts", "whole_state"])
def test_a_resumed_run_is_bit_for_bit_the_one_that_never_stopped(result, kind):
    whole, resumed = result(f"resumed_from_{kind}")
    for part in ("weights", "average"):
        assert_close(resumed[part], whole[part], atol=0)
    assert resumed["losses"] == whole["losses"]


def test_each_process_writes_its_part_and_nothing_needs_to_be_unpickled(folder):
    state = folder / "state_SHARDED_STATE_DICT"
    parts = sorted((state / "parts").iterdir())
    assert [part.name for part in parts] == ["part_00000.pt", "part_00001.pt"]
    for part in parts:
        torch.load(part, weights_only=True)
    assert not (state / "model.safetensors").exists()
    assert (folder / "state_FULL_STATE_DICT" / "model.safetensors").exists()
    assert not list(folder.glob("*.tmp-*"))


def test_the_parts_of_two_processes_can_be_loaded_in_one_without_fsdp(result, folder):
    loaded = result("loaded_from_parts")
    parts = [
        torch.load(folder / "state_SHARDED_STATE_DICT" / "parts" / f"part_0000{i}.pt")
        for i in range(2)
    ]
    for name in ("0.weight", "4.bias"):
        joined = torch.cat([part["model"][name]["part"] for part in parts])
        assert_close(loaded["weights"][name], joined, atol=0)
    assert loaded["optimizer"]["state"][0]["exp_avg"].shape == (8, 6)
    assert loaded["optimizer"]["state"][0]["step"] == 9


def test_losses_under_bf16_keep_their_precision(result):
    low = result("low_precision")
    assert low["loss_dtype"] == torch.float32
    assert_close(low["losses"], result("sharded")["losses"], atol=0.05)
    assert all(map(math.isfinite, low["losses"]))


@pytest.mark.parametrize("process", [0, 1])
def test_clipping_by_value_is_refused_on_all_processes(result, process):
    message = result("refused", process)
    assert "gradient_clip_value=0.1" in message
    assert "gradient_clip_norm" in message


def test_fsdp_is_refused_where_accelerate_would_use_ddp(launch):
    program = (
        "from accelerate.utils import FullyShardedDataParallelPlugin as Plugin\n"
        "from pytorch_accelerated.engines.launch import create_accelerator\n"
        "create_accelerator(fsdp_plugin=Plugin(fsdp_version=2))"
    )
    launched = launch(*torchrun(2, "run_program.py", program), ok=False)
    assert launched.code != 0
    assert launched.output.count("RuntimeError: FSDP does not run on a CPU") == 2
