"""Processes that differ, data that does not fit them, and what cannot work at all.

Errors are raised on all processes together: none is left waiting for another.
"""

import sys

import pytest
import torch
from launching import SCRIPTS, run, torchrun

ON_TWO = (
    *("uneven", "incomplete_batches_dropped", "steady", "slow", "batch_norm"),
    *("too_little_data", "low_precision", "full_precision", "saved", "missing_state"),
)
ON_ONE = ("uneven", "low_precision", "resumed_alone")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    alone = folder / "alone"
    alone.mkdir()
    launched = run(torchrun(2, "cases.py", "world_cases", folder, *ON_TWO), folder)
    assert launched.code == 0, launched.output[-6000:]
    (folder / "state").rename(alone / "state")
    launched = run(
        [sys.executable, SCRIPTS / "cases.py", "world_cases", alone, *ON_ONE], folder
    )
    assert launched.code == 0, launched.output[-6000:]
    return folder


@pytest.fixture
def result(folder):
    """Read what a case returned on a process of two, or alone."""

    def read(name, process=0, *, alone=False):
        place = folder / "alone" if alone else folder
        content = torch.load(place / f"{name}_{process}.bin")
        if isinstance(content, str) and "Traceback" in content:
            pytest.fail(content)
        return content

    return read


def assert_close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_data_that_does_not_divide_is_trained_on_as_by_one_process(result):
    """27 samples in batches of 4, of which the last has 3: 2 and 1 on two processes."""
    assert_close(result("uneven"), result("uneven", alone=True))
    assert result("uneven")["num_updates"] == 14
    assert result("uneven")["num_samples"] == 54


def test_incomplete_batches_can_be_dropped(result):
    dropped = result("incomplete_batches_dropped")
    assert dropped["num_updates"] == 12
    assert dropped["num_samples"] == 48


def test_a_slow_process_changes_no_number(result):
    assert_close(result("slow"), result("steady"), atol=0)


@pytest.mark.parametrize("process", [0, 1])
def test_synchronised_batch_norm_on_a_cpu_is_refused_with_the_reason(result, process):
    message = result("batch_norm", process)
    assert "SyncBatchNorm needs GPUs" in message
    assert "GroupNorm" in message


@pytest.mark.parametrize("process", [0, 1])
def test_fewer_samples_than_processes_are_refused(result, process):
    errors = result("too_little_data", process)
    assert "1 samples for 2 processes" in errors["train"]
    assert "at least 2 samples are needed" in errors["evaluate"]


@pytest.mark.parametrize("process", [0, 1])
def test_a_missing_training_state_is_an_error_on_every_process(result, process):
    assert "There is no checkpoint folder" in result("missing_state", process)


def test_a_run_of_two_processes_goes_on_with_one(result):
    resumed, whole = result("resumed_alone", alone=True), result("saved")
    assert_close(resumed["weights"], whole["weights"])


def test_bf16_trains_on_several_processes_and_leaves_the_model_plain(result):
    """Defect 57: the model computed in bf16 after the run."""
    low = result("low_precision")
    assert low["is_plain"]
    assert low["outputs"] == low["weights_dtype"] == torch.float32
    assert_close(low["weights"], result("full_precision")["weights"], atol=0.05)
    # Products are rounded, so batches of other sizes do not agree to the last bit.
    assert_close(
        low["weights"], result("low_precision", alone=True)["weights"], atol=0.02
    )
    assert low["weights"].keys() == result("full_precision")["weights"].keys()


def test_a_backend_that_is_not_there_is_refused_on_all_processes(launch):
    program = (
        "from accelerate.utils import InitProcessGroupKwargs\n"
        "from pytorch_accelerated.engines.launch import create_accelerator\n"
        "handler = InitProcessGroupKwargs(backend='mpi')\n"
        "create_accelerator(cpu=True, kwargs_handlers=[handler])"
    )
    launched = launch(*torchrun(2, "run_program.py", program), ok=False)
    assert launched.code != 0
    assert launched.output.count("Your assigned backend mpi is not available") == 2
