"""Measuring how fast a run is, and what it waits for."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pytorch_accelerated import distributed
from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data
from pytorch_accelerated.console import rate

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_NUM_STEPS_KEPT = 10_000


class ThroughputCallback(TrainerCallback):
    """Measures training: samples per second, step times, waiting for data, memory.

    At the end of each epoch's training one line is printed, and these are recorded:

    - ``train_samples_per_second``, over all processes; ``train_items_per_second`` too
      where the step returns ``num_items_in_batch``, such as tokens
    - ``train_data_wait_share``: the part of the time, from 0 to 1, in which the loop
      waited for its loader
    - ``train_step_seconds_p50``, ``_p95`` and ``_max``: from the end of a step to that
      of the next, of the last 10,000 steps
    - ``train_peak_memory_gib``: the most that torch has had allocated on the
      accelerator, or else what the process has had of the host's memory
    - ``train_mfu``: the share of ``peak_flops`` that is used, if that is given

    Evaluations amid an epoch are left out. Of several processes the longest times and
    the largest share and memory count.

    An accelerator works on what it is given while the host goes on. It is waited for at
    the end of the epoch and nowhere else: the samples per second are true, but the
    times of single steps are those of the host, which is held up only where the device
    is read from or its queue is full; and the time in which the host waits for data is
    the most in which the device can have had nothing to do.

    Args:
        peak_flops: Floating-point operations that one device can do in a second, for
            example 989e12 for an H100 in bf16.
        flops_per_sample: Those that training on a sample takes, such as
            ``trainer.summary(batch).flops_per_sample``.

    Raises:
        ValueError: If one of the two is given without the other.
    """

    called_last: tuple[str, ...] = ("on_train_step_end",)
    may_stop_alone = False

    peak_flops: float | None = None
    flops_per_sample: float | None = None
    # When the last step had ended, in seconds of training.
    _last: float = 0.0
    _step_seconds: Sequence[float] = ()
    _num_items: Any = 0

    def __init__(
        self, peak_flops: float | None = None, flops_per_sample: float | None = None
    ) -> None:
        if (peak_flops is None) != (flops_per_sample is None):
            raise ValueError(
                "The use of a device follows from peak_flops and flops_per_sample; got "
                f"{peak_flops} and {flops_per_sample}. Give both: the latter is "
                "trainer.summary(batch).flops_per_sample."
            )
        self.peak_flops = peak_flops
        self.flops_per_sample = flops_per_sample

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start to measure."""
        self._step_seconds, self._num_items = deque(maxlen=_NUM_STEPS_KEPT), 0
        self._last = trainer._run.pace.seconds

    @event_with_data
    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any
    ) -> None:
        """Note how long the step took, and how many items it had."""
        run, before = trainer._run, self._last
        self._last = run.pace.seconds
        if isinstance(self._step_seconds, deque):
            self._step_seconds.append(self._last - before)
        # Perhaps on the device: read at the end of the epoch.
        share = run.share_of(kwargs.get("step", 0))
        if share is None or not share.is_filler:
            num_items = batch_output.get("num_items_in_batch")
            self._num_items = self._num_items + (0 if num_items is None else num_items)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record and print what was measured."""
        pace, num_items = trainer._run.pace, float(self._num_items)
        if pace.num_batches == 0:  # the epoch was resumed at its end
            return
        own = {"data_wait_share": pace.waited / pace.seconds}
        if self._step_seconds:
            p50, p95 = np.percentile(self._step_seconds, (50, 95)).tolist()
            own |= {"step_seconds_p50": p50, "step_seconds_p95": p95}
            own["step_seconds_max"] = max(self._step_seconds)
        own["peak_memory_gib"] = _peak_memory_of(trainer.device) / 2**30
        per_second = trainer._run.samples_per_second  # over all, by the clock of this
        of_all = distributed.objects_of_all((own, num_items, pace.seconds, per_second))
        measures, counts, times, rates = zip(*of_all, strict=True)
        seconds, per_second = max(times), min(rates)
        metrics = {"samples_per_second": per_second}
        for name in own:
            metrics[name] = max(each[name] for each in measures)
        if num_items := sum(counts):
            metrics["items_per_second"] = num_items / seconds
        if self.peak_flops is not None and self.flops_per_sample is not None:
            used = per_second * self.flops_per_sample
            metrics["mfu"] = used / (self.peak_flops * len(times))
        for name, value in metrics.items():
            trainer.run_history.update_metric(f"train_{name}", value)
        words = (f"{name} {rate(value)}" for name, value in metrics.items())
        trainer.print(", ".join(words).replace("_", " "))


def _peak_memory_of(device: torch.device) -> float:
    if device.type in ("cuda", "xpu"):
        return float(torch.accelerator.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows does not tell
        return 0.0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(largest) * (1 if sys.platform == "darwin" else 1024)
