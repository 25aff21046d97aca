"""What is measured, of whom and how often; it needs nothing but Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BASELINE = "by hand"
OURS = "pytorch-accelerated"
# The same at another commit, where one is asked for.
OLD = "pytorch-accelerated, old"
# The package that each peer comes from, as in requirements.txt.
PEERS = {
    "accelerate": "accelerate",
    "fabric": "lightning",
    "lightning": "lightning",
    "transformers": "transformers",
    "ignite": "pytorch-ignite",
    "skorch": "skorch",
    "fastai": "fastai",
    "torchtnt": "torchtnt",
    "composer": "mosaicml",
}
CONTENDERS = [BASELINE, OURS, *PEERS]


@dataclass(frozen=True)
class Workload:
    """How some work is measured.

    Args:
        title: What it is.
        measures: "run": the call that trains or evaluates; "steps": the steps of a run
            but the first few, in which models are compiled, and the memory; "memory":
            the memory alone; "process": a whole process, imports included; "import": a
            process that only imports.
        rounds: How often everybody takes a turn.
        rounds_of_a_peer: In how many of the rounds the peers take part. The loop by
            hand and this library are in all of them.
        tolerance: Up to where differences in the results are those of rounding.
        needs_gpu: Whether it is too much work for a CPU.
    """

    title: str
    measures: Literal["run", "steps", "memory", "process", "import"] = "run"
    rounds: int = 9
    rounds_of_a_peer: int = 9
    tolerance: float = 1e-4
    needs_gpu: bool = False

    @property
    def has_time(self) -> bool:
        """Whether it is about time."""
        return self.measures != "memory"

    @property
    def has_memory(self) -> bool:
        """Whether it is about memory."""
        return self.measures in ("memory", "steps")

    @property
    def in_whole_processes(self) -> bool:
        """Whether each measurement is that of a process of its own."""
        return self.measures in ("process", "import")

    @property
    def kind_of_process(self) -> str:
        """What processes have to have in common to be of use for it."""
        return self.measures if self.has_memory else "run"

    def has_turn(self, name: str, number: int) -> bool:
        """Return whether a contender takes part in round ``number``, from 0."""
        every = max(1, -(-self.rounds // self.rounds_of_a_peer))
        return name in (BASELINE, OURS, OLD) or number % every == 0


WORKLOADS = {
    "a": Workload("perceptron, in memory", rounds_of_a_peer=5),
    "b": Workload("perceptron, sample by sample", rounds_of_a_peer=5),
    "c": Workload("with bars, logs, evaluation", rounds=7, rounds_of_a_peer=4),
    "c2": Workload("the same with accuracy and a file of records", rounds=7),
    "d": Workload("residual network", rounds=7, rounds_of_a_peer=4),
    "e": Workload("GPT, clipping, accumulation", rounds=7, rounds_of_a_peer=4),
    "f": Workload(
        "quick start, whole process", "process", rounds=5, rounds_of_a_peer=2
    ),
    "g": Workload("import", "import", rounds=9, rounds_of_a_peer=3),
    "g2": Workload("a run of one step"),
    "h": Workload("checkpoints"),
    "h2": Workload("checkpoints in the background"),
    "i": Workload("evaluation"),
    "i2": Workload("prediction"),
    "m": Workload("memory: residual network", "memory", rounds=1),
    "m2": Workload("memory: GPT", "memory", rounds=1),
    "j": Workload(
        "ResNet-50, bf16",
        "steps",
        rounds=5,
        rounds_of_a_peer=3,
        tolerance=1e-2,
        needs_gpu=True,
    ),
    "k": Workload(
        "GPT-2 small, bf16, compiled",
        "steps",
        rounds=3,
        rounds_of_a_peer=1,
        tolerance=1e-2,
        needs_gpu=True,
    ),
}
