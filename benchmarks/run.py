"""Measure this library against the loop written by hand and against its peers.

    make bench                          all workloads and contenders, minutes
    make bench BENCH_ARGS=--quick       a few rounds of little work, to see that it runs
    python benchmarks/run.py --contender lightning --workload a --workload d
    python benchmarks/run.py --device cuda

It needs nothing but Python: an environment of its own, with the peers of
requirements.txt, is built in benchmarks/.venv. Every contender runs in a process of its
own. The processes take turns, one round after the other, so that what else the machine
does hits all of them alike; each round gives the ratio to the loop by hand in the same
round, and the table shows the median of the ratios with the quarters around it. Use a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENVIRONMENT = HERE / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = HERE / "results.json"
START, END = "<!-- table: start -->", "<!-- table: end -->"

BASELINE = "by hand"
OURS = "pytorch-accelerated"
PEERS = {
    "accelerate": "accelerate",
    "lightning": "lightning",
    "transformers": "transformers",
    "ignite": "pytorch-ignite",
    "skorch": "skorch",
    "fastai": "fastai",
}
CONTENDERS = [BASELINE, OURS, *PEERS]
WORKLOADS = ["a", "b", "c", "d", "e", "f", "g", "g2", "h", "i"]
MEASURED_AS_PROCESS = {"f", "g"}
QUICK_WORKLOADS = ["a", "b", "c", "d", "e"]
# The parameters may differ by what rounding in another order makes of them.
LARGEST_DIFFERENCE = 1e-4


def build_environment(peers: list[str]) -> dict[str, str]:
    """Install the library and the peers; return why some could not be."""
    if not PYTHON.exists():
        _say(f"Building {ENVIRONMENT.relative_to(ROOT)}")
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    lines = (HERE / "requirements.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    pinned = [line for line in requirements if line.startswith(("torch=", "accel"))]
    marker = ENVIRONMENT / "installed.json"
    known: dict[str, str] = json.loads(marker.read_text()) if marker.exists() else {}
    if known.get("requirements") != "\n".join(requirements):
        known = {"requirements": "\n".join(requirements)}
        _install(*pinned, "editables", "hatchling", check=True)
        _install("--no-build-isolation", "-e", str(ROOT), *pinned, check=True)
    reasons = {}
    for peer in peers:
        if peer not in known:
            (requirement,) = [
                line for line in requirements if line.startswith(PEERS[peer])
            ]
            _say(f"Installing {requirement}")
            known[peer] = _install(requirement, *pinned)
        if known[peer]:
            reasons[peer] = f"not installed: {known[peer]}"
        marker.write_text(json.dumps(known))
    _drop_unusable_torchvision()
    return reasons


def _drop_unusable_torchvision() -> None:
    """Remove a torchvision for another torch: some peers import it if it is there."""
    imports = subprocess.run(
        [str(PYTHON), "-c", "import torchvision"], capture_output=True, check=False
    )
    if imports.returncode != 0:
        command = [str(PYTHON), "-m", "pip", "uninstall", "--quiet", "-y"]
        subprocess.run([*command, "torchvision"], capture_output=True, check=False)


def _install(*arguments: str, check: bool = False) -> str:
    """Install something; return the last line of what went wrong, "" if nothing."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    if check:
        sys.exit(done.stderr)
    return (done.stderr.strip().splitlines() or ["pip failed"])[-1]


def child_environment(device: str) -> dict[str, str]:
    """Return the variables of a measured process: one thread, compiled imports."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
    # Without this a source tree would be compiled anew by each process.
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    variables["HF_HUB_OFFLINE"] = "1"
    if device == "cpu":
        variables.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")
    return variables


class Runner:
    """A process that trains when it is told to.

    Args:
        name: The contender.
        workload: The workload.
        size: About the number of steps.
        device: Where it trains.
        file: Where the loop by hand leaves its parameters for the others to compare.
    """

    def __init__(
        self, name: str, workload: str, size: int, device: str, file: Path
    ) -> None:
        script = [str(PYTHON), str(HERE / "contenders.py")]
        self.command = [*script, name, workload, str(size), device, str(file)]
        self.variables = child_environment(device)
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process; it waits until it is told to run."""
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.variables,
        )

    def run(self) -> dict[str, Any]:
        """Train once and return what was measured, or the error."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": "the process ended", "is_failure": True}
        line = self.process.stdout.readline()
        if not line:
            return {"error": "the process ended", "is_failure": True}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.communicate("stop\n")


class ProcessRunner(Runner):
    """Measures a whole process, from its start to its end, imports included."""

    def start(self) -> None:
        """Do nothing: each run is a process."""

    def run(self) -> dict[str, Any]:
        """Train once in a new process."""
        start = time.perf_counter()
        super().start()
        answer = super().run()
        super().stop()
        return {**answer, "seconds": time.perf_counter() - start}


class ImportRunner(ProcessRunner):
    """Measures a process that imports torch, accelerate and the contender.

    The garbage collector is off: whether one of its full passes, which take 0.1 s here,
    falls in the last import or right after it is a matter of some hundred objects.
    """

    def run(self) -> dict[str, Any]:
        """Import once in a new process."""
        sys.path.insert(0, str(HERE))
        from contenders import PACKAGES

        code = (
            f"import gc; gc.disable(); import torch, accelerate, {PACKAGES[self.name]}"
        )
        start = time.perf_counter()
        done = subprocess.run(
            [str(PYTHON), "-c", code],
            env=self.variables,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
        if done.returncode != 0:
            return {"error": done.stderr.strip().splitlines()[-1], "is_failure": True}
        return {"seconds": seconds, "steps": 1, "difference": 0.0, "peak_bytes": 0}

    @property
    def name(self) -> str:
        """The contender."""
        return self.command[2]


def measure(
    workload: str, names: list[str], rounds: int, size: int, device: str
) -> dict[str, dict[str, Any]]:
    """Measure all contenders at a workload and return the figures of each."""
    kinds = {"f": ProcessRunner, "g": ImportRunner}
    kind = kinds.get(workload, Runner)
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "parameters.pt"
        runners = {name: kind(name, workload, size, device, file) for name in names}
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        try:
            for name, runner in runners.items():
                runner.start()
                answer = runner.run()  # warms up, and is not counted
                if "error" in answer:
                    figures[name] = answer
            running = [name for name in names if name not in figures]
            for number in range(rounds):
                turn = number % max(1, len(running))
                for name in running[turn:] + running[:turn]:
                    answers[name].append(runners[name].run())
        finally:
            for runner in runners.values():
                runner.stop()
    for name in running:
        figures[name] = summarise(answers[name], answers[BASELINE])
    return figures


def summarise(
    answers: list[dict[str, Any]], by_hand: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the median ratio to the loop by hand, its quarters, and the rest."""
    failed = [answer for answer in answers if "error" in answer]
    if failed:
        return failed[0]
    ratios = [
        answer["seconds"] / base["seconds"]
        for answer, base in zip(answers, by_hand, strict=True)
    ]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    median = statistics.median(answer["seconds"] for answer in answers)
    return {
        "ratio": statistics.median(ratios),
        "quarters": [low, high],
        "seconds": median,
        "microseconds_a_step": median / answers[0]["steps"] * 1e6,
        "difference": max(answer["difference"] for answer in answers),
        "peak_ratio": answers[-1]["peak_bytes"] / max(1, by_hand[-1]["peak_bytes"]),
        "ratios": ratios,
    }


def create_table(results: dict[str, Any]) -> str:
    """Return the results as a table in Markdown, with notes."""
    workloads = list(results["workloads"])
    names = results["contenders"]
    notes: list[str] = []
    rows = [
        "| | " + " | ".join(f"({workload})" for workload in workloads) + " |",
        "|---" * (len(workloads) + 1) + "|",
    ]
    for name in names:
        cells = []
        for workload in workloads:
            figures = results["workloads"][workload].get(name)
            cells.append(_cell(name, workload, figures, results, notes))
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    by_hand = {
        workload: results["workloads"][workload][BASELINE] for workload in workloads
    }
    cells = [
        f"{figures['seconds']:.2f} s"
        if workload in MEASURED_AS_PROCESS
        else f"{figures['microseconds_a_step']:.0f} µs"
        for workload, figures in by_hand.items()
    ]
    rows.append("| *by hand: a process or a step* | " + " | ".join(cells) + " |")
    intro = (
        f"{results['date']}, torch {results['torch']}, {results['device']}, "
        f"{results['machine']}, Python {results['python']}: median of "
        f"{results['rounds']} rounds, with the quarters around it."
    )
    return "\n".join([intro, "", *rows, "", *notes])


def _cell(
    name: str,
    workload: str,
    figures: dict[str, Any] | None,
    results: dict[str, Any],
    notes: list[str],
) -> str:
    if figures is None or "error" in figures:
        reason = results["skipped"].get(name) or (figures or {}).get("error", "")
        note = f"- {name}: {reason}"
        if note not in notes:
            notes.append(note)
        return "-"
    low, high = figures["quarters"]
    text = f"{figures['ratio']:.2f} ({low:.2f} to {high:.2f})"
    if figures["difference"] > LARGEST_DIFFERENCE:
        text += " \\*"
        notes.append(
            f"- \\* {name} ({workload}) ends with other parameters than the loop by "
            f"hand: the largest difference is {figures['difference']:.1e}."
        )
    return f"**{text}**" if name == OURS else text


def write_page(table: str) -> None:
    """Put the table between its marks in the documentation."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options, or say which contenders and workloads there are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="little work, no table in the docs"
    )
    parser.add_argument(
        "--contender", action="append", choices=CONTENDERS, metavar="NAME"
    )
    parser.add_argument(
        "--workload", action="append", choices=WORKLOADS, metavar="LETTER"
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps, ...")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 11)
    options.size = 50 if options.quick else 400
    default_workloads = QUICK_WORKLOADS if options.quick else WORKLOADS
    options.workload = options.workload or default_workloads
    chosen = options.contender or CONTENDERS
    options.contender = [
        name for name in CONTENDERS if name in chosen or name in (BASELINE, OURS)
    ]
    return options


def main() -> None:
    """Build the environment, measure, print and write the table."""
    options = parse_arguments()
    skipped = build_environment([name for name in options.contender if name in PEERS])
    names = [name for name in options.contender if name not in skipped]
    torch_version = subprocess.run(
        [str(PYTHON), "-c", "import torch; print(torch.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch_version,
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before",
        "device": options.device,
        "rounds": options.rounds,
        "contenders": options.contender,
        "skipped": skipped,
        "workloads": {},
    }
    for workload in options.workload:
        _say(f"Workload ({workload}): {', '.join(names)}")
        results["workloads"][workload] = measure(
            workload, names, options.rounds, options.size, options.device
        )
    table = create_table(results)
    print(table)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    if not options.quick:
        write_page(table)
    failures = [
        f"{name} ({workload}): {figures['error']}"
        for workload, of_workload in results["workloads"].items()
        for name, figures in of_workload.items()
        if figures.get("is_failure")
    ]
    if failures:
        sys.exit("\n".join(["These failed:", *failures]))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
