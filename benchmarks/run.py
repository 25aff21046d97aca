"""Measure this library against the loop written by hand and against its peers.

    make bench                          all workloads and contenders, minutes
    make bench BENCH_ARGS=--quick       little work, without the peers, a minute
    python benchmarks/run.py --contender lightning --workload a --workload d
    python benchmarks/run.py --device cuda
    make bench BENCH_ARGS="--quick --old main~5"    this code against an older one

It needs nothing but Python: an environment of its own, with the peers of
requirements.txt, is built in benchmarks/.venv. Every contender runs in a process of its
own. The processes take turns, one round after the other, so that what else the machine
does hits all of them alike; each round gives the ratio to the loop by hand in the same
round, and the table shows the median of the ratios with the quarters around it. Use a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from environment import HERE, ROOT, Environment
from plan import BASELINE, CONTENDERS, OLD, OURS, PEERS, WORKLOADS
from tables import create_memory_table, create_table, summarise, write_between_marks

PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = HERE / "results.json"


class Contender:
    """A process that trains when it is told to, see process.py.

    Args:
        name: Who trains.
        python: The interpreter.
        device: Where to train.
        folder: Where the loop by hand leaves its results for the others to compare.
        size: "full", or "quick" for little work.
        variables: The environment variables.
    """

    def __init__(
        self,
        name: str,
        python: Path,
        device: str,
        folder: str,
        size: str,
        variables: dict[str, str],
    ) -> None:
        self.name = name
        self.device = device
        self.python = str(python)
        script = str(HERE / "process.py")
        self.does = OURS if name == OLD else name
        self.command = [self.python, script, self.does, device, folder, size]
        self.variables = variables
        self.process: subprocess.Popen[str] | None = None

    def ask(self, action: str, workload: str) -> dict[str, Any]:
        """Let it do something and return its answer; start it if it does not run."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self.variables,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            command = {"do": action, "workload": workload}
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.stop()
        return {"error": "the process ended", "is_failure": True}

    def stop(self) -> None:
        """End the process, if it runs."""
        if self.process is not None:
            self.process.communicate()
            self.process = None

    def time_process(self, workload: str) -> dict[str, Any]:
        """Measure a new process, from its start to its end, imports included."""
        process = copy.copy(self)
        process.process = None
        start = time.perf_counter()
        answer = process.ask("run", workload)
        process.stop()
        return {**answer, "seconds": time.perf_counter() - start}

    def time_import(self) -> dict[str, Any]:
        """Measure a new process that imports torch, accelerate and the contender.

        The garbage collector is off: whether one of its full passes, which take 0.1 s
        here, falls in the last import or right after it is a matter of some hundred
        objects.
        """
        from contenders import PACKAGES

        package = PACKAGES[self.does]
        code = f"import gc; gc.disable(); import torch, accelerate, {package}"
        start = time.perf_counter()
        done = subprocess.run(
            [self.python, "-c", code],
            env=self.variables,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
        if done.returncode != 0:
            reason = done.stderr.strip().splitlines()[-1]
            is_failure = self.name in (BASELINE, OURS, OLD)
            return {
                "error": f"cannot be imported: {reason}",
                "is_failure": is_failure,
            }
        return {"seconds": seconds, "steps": 1, "difference": 0.0}


@contextlib.contextmanager
def checkout_of(ref: str | None) -> Iterator[str]:
    """Lend a checkout of a commit; an empty folder without one."""
    with tempfile.TemporaryDirectory() as folder:
        worktree = ["git", "-C", str(ROOT), "worktree"]
        if ref:
            add = [*worktree, "add", "--quiet", "--force", "--detach", folder, ref]
            subprocess.run(add, check=True)
        try:
            yield folder
        finally:
            if ref:
                subprocess.run([*worktree, "remove", "--force", folder], check=True)
                Path(folder).mkdir()


def variables_of(device: str, kind_of_process: str) -> dict[str, str]:
    """Return the variables of a measured process: one thread, compiled imports."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
    # Without this a source tree would be compiled anew by each process.
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    variables["HF_HUB_OFFLINE"] = "1"
    if device == "cpu":
        variables.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")
    if kind_of_process == "memory":
        # A mapping of its own for each tensor, given back when it is freed: what the
        # allocator keeps otherwise varies by a tenth from run to run.
        variables["MALLOC_MMAP_THRESHOLD_"] = str(64 * 1024)
    return variables


def measure(
    workload: str, contenders: list[Contender], rounds: int | None
) -> dict[str, dict[str, Any]]:
    """Measure all contenders at a workload and return the figures of each."""
    plan = WORKLOADS[workload]
    prepared = for_all(contenders, lambda one: warm_up(one, workload))
    check_baseline(workload, prepared[BASELINE])
    figures = {name: answer for name, answer in prepared.items() if "error" in answer}
    running = [one for one in contenders if one.name not in figures]
    answers: dict[str, dict[int, dict[str, Any]]] = {one.name: {} for one in running}
    for number in range(rounds or plan.rounds):
        turn = number % len(running)
        in_turn = running[turn:] + running[:turn]
        taking_part = [one for one in in_turn if plan.has_turn(one.name, number)]
        if plan.has_time:
            of_round = {one.name: take_turn(one, workload) for one in taking_part}
        else:
            of_round = for_all(running, lambda one: take_turn(one, workload))
        check_baseline(workload, of_round[BASELINE])
        for name, answer in of_round.items():
            answers[name][number] = answer
    for name, of_rounds in answers.items():
        figures[name] = summarise(of_rounds, answers[BASELINE])
    return figures


def check_baseline(workload: str, answer: dict[str, Any]) -> None:
    """End everything if there is nothing to compare with."""
    if "error" in answer:
        sys.exit(f"The loop by hand fails at ({workload}): {answer['error']}")


def for_all(
    contenders: list[Contender], do: Callable[[Contender], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Let all contenders do something at which time does not matter, on all cores."""
    by_hand, *others = contenders
    answers = {by_hand.name: do(by_hand)}  # the others compare themselves with it
    # More processes at once than one could need more memory than a GPU has.
    is_on_cpu = by_hand.device == "cpu"
    with ThreadPoolExecutor(os.cpu_count() if is_on_cpu else 1) as pool:
        of_others = pool.map(do, others)
        answers.update(zip([one.name for one in others], of_others, strict=True))
    return answers


def warm_up(one: Contender, workload: str) -> dict[str, Any]:
    """Let a contender do the work once, or import what it needs; it is not counted."""
    if not WORKLOADS[workload].in_whole_processes:
        return one.ask("prepare", workload)
    answer = one.time_import()
    return answer if "error" in answer else {}


def take_turn(one: Contender, workload: str) -> dict[str, Any]:
    """Measure a contender once at a workload."""
    measures = WORKLOADS[workload].measures
    if measures == "process":
        return one.time_process(workload)
    if measures == "import":
        return one.time_import()
    return one.ask("run", workload)


def measure_all(
    names: list[str], python: Path, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Measure all workloads, and return the figures by workload and contender."""
    figures = {}
    size = "quick" if options.quick else "full"
    contenders: list[Contender] = []
    kind = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            for workload in options.workload:
                say(f"Workload ({workload}): {WORKLOADS[workload].title}")
                # Processes are kept from workload to workload, but not for those that
                # measure memory; and Accelerate takes the precision of the first run
                # for all of them.
                if kind != (kind := WORKLOADS[workload].kind_of_process):
                    stop_all(contenders)
                    variables = variables_of(options.device, kind)
                    sources = {OLD: {"PYTHONPATH": f"{options.old_checkout}/src"}}
                    contenders = [
                        Contender(
                            name,
                            python,
                            options.device,
                            folder,
                            size,
                            variables | sources.get(name, {}),
                        )
                        for name in names
                    ]
                figures[workload] = measure(workload, contenders, options.rounds)
        finally:
            stop_all(contenders)
    return figures


def stop_all(contenders: list[Contender]) -> None:
    """End the processes of all contenders."""
    for one in contenders:
        one.stop()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options, or say which contenders and workloads there are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="little work, no table in the docs, and no peers but those of --contender",
    )
    parser.add_argument(
        "--contender",
        action="append",
        choices=CONTENDERS,
        metavar="NAME",
        help=f"one of: {', '.join(CONTENDERS)}; may be repeated; by default all",
    )
    parser.add_argument(
        "--workload",
        action="append",
        choices=list(WORKLOADS),
        metavar="LETTER",
        help=f"one of: {', '.join(WORKLOADS)}; may be repeated; by default all",
    )
    parser.add_argument(
        "--old", metavar="REF", help="a commit of this library to measure beside it"
    )
    parser.add_argument("--rounds", type=int, help="how often everybody takes a turn")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps, ...")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    for workload in options.workload or []:
        is_too_much = WORKLOADS[workload].needs_gpu and options.device == "cpu"
        if is_too_much and not options.quick:
            parser.error(
                f"workload ({workload}) needs a GPU: give --device, or try it at a "
                "tiny size with --quick"
            )
    options.is_whole = not (
        options.quick
        or options.contender
        or options.workload
        or options.rounds
        or options.old
    )
    options.rounds = options.rounds or (1 if options.quick else None)
    options.workload = options.workload or [
        workload
        for workload, plan in WORKLOADS.items()
        if options.device != "cpu" or not plan.needs_gpu
    ]
    chosen = options.contender or ([] if options.quick else CONTENDERS)
    options.contender = [
        name for name in CONTENDERS if name in chosen or name in (BASELINE, OURS)
    ]
    if options.old:
        options.contender.insert(2, OLD)
    return options


def main() -> None:
    """Build the environment, measure, print and write the tables."""
    options = parse_arguments()
    environment = Environment()
    skipped = environment.build([name for name in options.contender if name in PEERS])
    names = [name for name in options.contender if name not in skipped]
    code = "import torch; print(torch.__version__)"
    torch_version = subprocess.run(
        [str(environment.python), "-c", code],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    load = os.getloadavg()[0]
    start = time.perf_counter()
    with checkout_of(options.old) as options.old_checkout:
        figures = measure_all(names, environment.python, options)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch_version,
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, load {load:.1f} before",
        "device": options.device,
        "minutes": (time.perf_counter() - start) / 60,
        "rounds": options.rounds,
        "contenders": options.contender,
        "skipped": skipped,
        "workloads": figures,
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    table, memory_table = create_table(results), create_memory_table(results)
    print(f"{table}\n\nPeak memory\n\n{memory_table}" if memory_table else table)
    if options.is_whole:
        on = "" if options.device == "cpu" else " on a GPU"
        write_between_marks(PAGE, f"table{on}", table)
        write_between_marks(PAGE, f"memory{on}", memory_table)
    failures = [
        f"{name} ({workload}): {of_contender['error']}"
        for workload, of_workload in figures.items()
        for name, of_contender in of_workload.items()
        if of_contender.get("is_failure")
    ]
    if failures:
        sys.exit("\n".join(["These failed:", *failures]))


def say(text: str) -> None:
    """Tell whoever waits how far it is."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
