"""One script, launched in every way: the same weights, or a refusal with the reason."""

import subprocess
import sys

import nbformat
import pytest
import torch
import yaml
from launching import (
    LONGEST_SECONDS,
    SCRIPTS,
    Launched,
    environment,
    free_port,
    torchrun,
)
from nbclient import NotebookClient

SCRIPT = SCRIPTS / "train.py"
ACCELERATE_LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The weights that `python train.py` ends with."""
    folder = tmp_path_factory.mktemp("reference")
    subprocess.run(
        [sys.executable, SCRIPT, folder],
        env=environment(),
        check=True,
        timeout=LONGEST_SECONDS,
    )
    return torch.load(folder / "weights.bin")


def assert_is_one_job_of_two_with(weights, launched):
    first, second = launched.processes()
    assert (first["num_processes"], second["num_processes"]) == (2, 2)
    assert (first["is_main"], second["is_main"]) == (True, False)
    assert first["eval_loss"] == second["eval_loss"]
    torch.testing.assert_close(launched.weights(), weights, rtol=0, atol=1e-6)


def write_config(path, **changes):
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "MULTI_GPU",
        "machine_rank": 0,
        "main_process_port": free_port(),
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 2,
        "use_cpu": False,
        **changes,
    }
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    ("started_by", "env"),
    [
        ("torchrun", {}),
        ("accelerate launch", {}),
        # It says that there are several devices; there are CPUs.
        ("accelerate launch", {"ACCELERATE_USE_CPU": "true"}),
        ("config file", {}),
    ],
)
def test_one_model_is_trained_on_two_processes(
    launch, reference, tmp_path, started_by, env
):
    port = ("--main_process_port", free_port())
    options = {
        "accelerate launch": ("--multi_gpu", "--num_processes", 2, *port),
        "config file": ("--config_file", write_config(tmp_path / "config.yaml")),
    }
    if started_by == "torchrun":
        command = torchrun(2, SCRIPT.name, "{folder}")
    else:
        command = (*ACCELERATE_LAUNCH, *options[started_by], SCRIPT, "{folder}")
    assert_is_one_job_of_two_with(reference, launch(*command, **env))


def test_the_config_file_that_accelerate_makes_by_itself_is_followed(
    launch, reference, tmp_path
):
    config = tmp_path / "config.yaml"
    launch(
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli"),
        *("config", "default", "--config_file", config),
    )
    launched = launch(*ACCELERATE_LAUNCH, "--config_file", config, SCRIPT, "{folder}")
    torch.testing.assert_close(launched.weights(), reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("told_by", ["--cpu", "config file"])
def test_processes_that_accelerate_launch_does_not_start_are_asked_back(
    launch, tmp_path, told_by
):
    if told_by == "--cpu":
        arguments = ("--cpu", "--num_processes", 2)
    else:
        config = write_config(
            tmp_path / "config.yaml", distributed_type="MULTI_CPU", use_cpu=True
        )
        arguments = ("--config_file", config)
    launched = launch(*ACCELERATE_LAUNCH, *arguments, SCRIPT, "{folder}", ok=False)
    assert launched.code != 0
    assert "starts only one there" in launched.output
    assert "torchrun --nproc_per_node" in launched.output
    assert launched.processes() == []


def test_two_machines_with_one_process_each_are_one_job(launch, reference, tmp_path):
    folder = tmp_path / "nodes"
    folder.mkdir()
    port = free_port()

    def command(rank):
        node = ("--nnodes", 2, "--node_rank", rank)
        store = ("--master_addr", "127.0.0.1", "--master_port", port)
        return torchrun(1, SCRIPT.name, folder, options=(*node, *store))

    other = subprocess.Popen([str(part) for part in command(1)], env=environment())
    try:
        launch(*command(0))
        assert other.wait(timeout=LONGEST_SECONDS) == 0
    finally:
        other.kill()
    assert_is_one_job_of_two_with(reference, Launched(folder))


@pytest.mark.parametrize("launcher", ["notebook_launcher", "debug_launcher"])
def test_a_function_is_launched_on_two_processes(launch, reference, launcher):
    script = SCRIPTS / "launch_function.py"
    launched = launch(sys.executable, script, launcher, "{folder}", free_port())
    assert_is_one_job_of_two_with(reference, launched)


def test_a_notebook_trains_on_two_processes(reference, tmp_path, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    cells = [
        "from pytorch_accelerated import notebook_launcher\nfrom train import train",
        f"notebook_launcher(train, args=({str(tmp_path)!r},), num_processes=2, "
        f"use_port='{free_port()}')",
    ]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells]
    )
    NotebookClient(notebook, timeout=LONGEST_SECONDS).execute()
    assert_is_one_job_of_two_with(reference, Launched(tmp_path))


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
