"""Importing the package changes nothing in the process, and loads nothing optional."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, logging, os, random, signal, sys, threading, warnings

import accelerate, numpy, torch, tqdm.auto  # what the package cannot do without

def state():
    loggers = {
        name: (logger.level, [str(handler) for handler in logger.handlers])
        for name, logger in logging.Logger.manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
        and not name.startswith("pytorch_accelerated")
    }
    return {
        "python's random state": repr(random.getstate()),
        "numpy's random state": repr(numpy.random.get_state()),
        "torch's random state": repr(torch.get_rng_state().tolist()),
        "environment": dict(os.environ),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "root logger": (logging.root.level, repr(logging.root.handlers)),
        "other loggers": {n: l for n, l in loggers.items() if l != (0, [])},
        "warning filters": repr(warnings.filters),
        "signal handlers": repr([signal.getsignal(n) for n in (2, 10, 15)]),
        "torch threads": torch.get_num_threads(),
        "default dtype": str(torch.get_default_dtype()),
        "directory": (os.getcwd(), sorted(os.listdir())),
    }

before, loaded = state(), set(sys.modules)
import pytorch_accelerated
import pytorch_accelerated.finetuning
import pytorch_accelerated.schedulers
after = state()
own = logging.getLogger("pytorch_accelerated")
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]],
    "loaded": sorted({name.partition(".")[0] for name in set(sys.modules) - loaded}),
    "own logger": [own.level, [str(handler) for handler in own.handlers]],
}))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    source = __import__("pytorch_accelerated").__file__
    folder = tmp_path_factory.mktemp("empty")
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**__import__("os").environ, "PYTHONPATH": source.rsplit("/", 2)[0]},
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_importing_changes_nothing_in_the_process(report):
    """Defect 9: importing reseeded python, numpy and torch, and set up logging."""
    assert report["changed"] == []


def test_importing_does_not_configure_the_package_s_own_logger(report):
    assert report["own logger"] == [0, []]


def test_importing_loads_no_optional_library(report):
    third_party = set(report["loaded"]) - set(sys.stdlib_module_names)

    assert third_party == {"pytorch_accelerated"}
