"""A process that trains when it is told to, as one contender.

    python benchmarks/process.py CONTENDER DEVICE FOLDER full|quick

Commands come in on standard input, answers go out on standard output, a line of JSON
each. ``{"do": "run", "workload": "a"}`` trains and is answered with the time that it
took. ``"prepare"`` warms up, and measures the memory. In the folder the loop by hand
leaves its results, which those of the others are compared with.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contenders import CONTENDERS, PACKAGES, NotOfferedError
from plan import BASELINE, OURS, WORKLOADS

if TYPE_CHECKING:
    from workloads import Job

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


@contextlib.contextmanager
def answers_apart() -> Iterator[Any]:
    """Keep what libraries print away from the answers."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    if "BENCH_DEBUG" not in os.environ:
        os.dup2(nothing, 2)
    yield answers


class PeakMemory:
    """Measures the most memory that is in use, over what was before.

    On a GPU, it is what torch has allocated there. On a CPU, it is resident memory, and
    only Linux tells: elsewhere ``num_bytes`` stays None.

    Args:
        device: The device.
    """

    def __init__(self, device: str) -> None:
        self.is_cuda = device.startswith("cuda")
        self.num_bytes: int | None = None

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measure what happens inside."""
        if self.is_cuda:
            import torch

            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            yield
            self.num_bytes = torch.cuda.max_memory_allocated()
        elif CLEAR.exists():
            gc.collect()
            # Give back what was freed: otherwise it would be used again unseen.
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR.write_text("5")  # the peak begins anew
            before = _resident_bytes("VmRSS")
            yield
            self.num_bytes = _resident_bytes("VmHWM") - before
        else:
            yield


def _resident_bytes(field: str) -> int:
    (line,) = (
        line for line in STATUS.read_text().splitlines() if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def measure(
    name: str, workload: str, device: str, folder: Path, size: str
) -> dict[str, Any]:
    """Do a workload; return its time, its memory, and how far its results are off."""
    from workloads import time_when_done

    plan = WORKLOADS[workload]
    memory = PeakMemory(device)
    with memory.measured() if plan.has_memory else contextlib.nullcontext():
        job = create_job(workload, device, size)
        start = time_when_done(job.device)
        result = CONTENDERS[name](job)
        seconds = time_when_done(job.device) - start
    steps = job.num_steps
    if plan.measures == "steps":
        seconds = job.loss_func.times[1] - job.loss_func.times[0]
        steps = job.loss_func.noted_calls[1] - job.loss_func.noted_calls[0]
    return {
        "seconds": seconds,
        "steps": steps,
        "difference": compare(job, result, name, folder / f"{workload}.pt"),
        "peak_bytes": memory.num_bytes,
    }


def prepare(
    name: str, workload: str, device: str, folder: Path, size: str
) -> dict[str, Any]:
    """Import what is needed and warm up."""
    measures = WORKLOADS[workload].measures
    if measures != "run":
        size = "quick"
    if measures == "steps":
        # Lightning has to be there before a model is compiled.
        importlib.import_module(PACKAGES[name])
    CONTENDERS[name](create_job(workload, device, size))
    return {}


def create_job(workload: str, device: str, size: str) -> Job:
    """Return the job of a workload; ``size`` is "full" or "quick"."""
    import torch
    from workloads import JOBS

    job = JOBS[workload][size == "quick"]()
    job.device = torch.device(device)
    return job


def compare(job: Job, result: Any, name: str, file: Path) -> float:
    """Return how far parameters and result are from those of the loop by hand."""
    import torch

    parts = [p.detach().cpu().float().flatten() for p in job.model.parameters()]
    if result is not None:
        parts.append(torch.as_tensor(result).detach().cpu().float().flatten())
    values = torch.cat(parts)
    if name == BASELINE:
        torch.save(values, file)
        return 0.0
    expected = torch.load(file)
    if values.shape != expected.shape:
        raise ValueError(
            f"returned {len(values)} numbers, parameters included, and the loop by "
            f"hand {len(expected)}"
        )
    return float((values - expected).abs().max())


def answer(
    command: dict[str, str], name: str, device: str, folder: Path, size: str
) -> dict[str, Any]:
    """Carry out a command and return its answer, or the error."""
    action = {"prepare": prepare, "run": measure}[command["do"]]
    try:
        return action(name, command["workload"], device, folder, size)
    except NotOfferedError as error:
        return {"error": str(error)}
    except ImportError as error:
        is_failure = name in (BASELINE, OURS)
        return {"error": f"cannot be imported: {error}", "is_failure": is_failure}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "is_failure": True}


def main() -> None:
    """Answer the commands that come in on standard input."""
    name, device, folder, size = sys.argv[1:]
    warnings.simplefilter("ignore")
    with answers_apart() as answers:
        import torch

        torch.set_num_threads(1)
        for line in sys.stdin:
            answered = answer(json.loads(line), name, device, Path(folder), size)
            print(json.dumps(answered), file=answers, flush=True)


if __name__ == "__main__":
    main()
