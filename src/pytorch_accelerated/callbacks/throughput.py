"""Measuring how fast a run is, and what it waits for."""

from __future__ import annotations

import sys
import time
from collections import deque
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pytorch_accelerated import distributed
from pytorch_accelerated.callbacks.base import TrainerCallback, event_with_data

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_NUM_STEPS_KEPT = 10_000


class _Epoch:
    """What is measured of a training epoch, on this process."""

    def __init__(self, num_samples_before: int) -> None:
        self.num_samples_before = num_samples_before
        self.start = self.accounted_to = time.perf_counter()
        self.waited = self.longest = 0.0
        self.num_items: Any = 0
        self.steps: deque[float] = deque(maxlen=_NUM_STEPS_KEPT)
        self.aside_since: float | None = None


class ThroughputCallback(TrainerCallback):
    """Measures training: samples per second, step times, waiting for data, memory.

    At the end of each epoch's training one line is printed, and these are recorded:

    - ``train_samples_per_second``, over all processes; ``train_items_per_second`` too
      where the step returns ``num_items_in_batch``, such as tokens
    - ``train_data_wait_share``: the part of the time, from 0 to 1, between the end of a
      step and the start of the next one
    - ``train_step_seconds_p50``, ``_p95`` and ``_max``: from the end of a step to that
      of the next; the percentiles are those of the last 10,000 steps
    - ``train_peak_memory_gib``: the most that torch has had allocated on the
      accelerator, or else what the process has had of the host's memory
    - ``train_mfu``: the share of ``peak_flops`` that is used, if that is given

    Evaluations amid an epoch are left out. Of several processes the longest times and
    the largest share, memory and operations count.

    An accelerator works on what it is given while the host goes on. It is waited for at
    the end of the epoch and before an evaluation, and nowhere else: the samples per
    second are true, but the times of single steps are those of the host, which is held
    up only where the device is read from or its queue is full; and the time in which
    the host waits for data is the most in which the device can have had nothing to do.

    List it last: what callbacks behind it do counts as waiting.

    Args:
        peak_flops: Floating-point operations that one device can do in a second, for
            example 989e12 for an H100 in bf16. Those of a step are counted in the first
            one of a run, which is not compiled then; the others are assumed to need as
            many for a sample.
    """

    called_first: tuple[str, ...] = ("on_train_step_start", "on_train_epoch_end")
    called_last: tuple[str, ...] = ("on_train_epoch_start", "on_train_step_end")
    may_stop_alone = False

    peak_flops: float | None = None
    _epoch: _Epoch | None = None
    _counter: Any = None
    _has_counted: bool = False
    _flops_per_sample: float | None = None
    _counting: ExitStack = ExitStack()

    def __init__(self, peak_flops: float | None = None) -> None:
        self.peak_flops = peak_flops

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        self._epoch = self._counter = self._flops_per_sample = None
        self._has_counted = False
        self._counting = ExitStack()

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start to measure."""
        self._epoch = _Epoch(trainer.num_samples_seen or 0)

    def on_train_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Note how long the batch was waited for."""
        self._counting.close()
        epoch = self._epoch
        if epoch is not None:
            epoch.waited += time.perf_counter() - epoch.accounted_to
        if self.peak_flops is not None and not self._has_counted:
            from torch.utils.flop_counter import FlopCounterMode

            self._has_counted = True
            self._counter = FlopCounterMode(display=False)
            # Modules need not be told apart, and torch.compile would see the hooks.
            self._counter.mod_tracker = nullcontext()
            self._counter.mod_tracker.parents = {"Global"}
            # What is compiled under the counter would stay uncompiled for good.
            eager = torch.compiler.set_stance("force_eager")
            self._counting.enter_context(eager)
            self._counting.enter_context(self._counter)

    @event_with_data
    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any
    ) -> None:
        """Note how long the step took, and how many items it had."""
        self._counting.close()
        epoch = self._epoch
        if epoch is None:
            return
        now = time.perf_counter()
        epoch.steps.append(now - epoch.accounted_to)
        epoch.longest = max(epoch.longest, epoch.steps[-1])
        epoch.accounted_to = now
        # Perhaps on the device: read at the end of the epoch.
        share = trainer._run.share_of(kwargs.get("step", 0))
        if share is None or not share.is_filler:
            num_items = batch_output.get("num_items_in_batch", 0)
            epoch.num_items = epoch.num_items + num_items
        counter, self._counter = self._counter, None
        if counter is not None:
            num_samples = batch_output.get("batch_size") or 1
            self._flops_per_sample = counter.get_total_flops() / num_samples

    @event_with_data
    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Stop the clock, if this is amid an epoch."""
        self._counting.close()
        if self._epoch is not None and self._epoch.aside_since is None:
            _wait_for(trainer.device)
            self._epoch.aside_since = time.perf_counter()

    @event_with_data
    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Let the clock go on."""
        epoch = self._epoch
        if epoch is not None and epoch.aside_since is not None:
            aside = time.perf_counter() - epoch.aside_since
            epoch.start, epoch.aside_since = epoch.start + aside, None
            epoch.accounted_to += aside

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record and print what was measured."""
        epoch, self._epoch = self._epoch, None
        if epoch is None:
            return
        _wait_for(trainer.device)
        seconds = time.perf_counter() - epoch.start
        p50, p95 = np.percentile(epoch.steps or [0.0], (50, 95)).tolist()
        own = {
            "seconds": seconds,
            "data_wait_share": epoch.waited / seconds,
            "step_seconds_p50": p50,
            "step_seconds_p95": p95,
            "step_seconds_max": epoch.longest,
            "peak_memory_gib": _peak_memory_of(trainer.device) / 2**30,
            "flops_per_sample": self._flops_per_sample or 0.0,
        }
        all_own = distributed.objects_of_all((own, float(epoch.num_items)))
        most = {name: max(each[name] for each, _ in all_own) for name in own}
        seconds, flops = most.pop("seconds"), most.pop("flops_per_sample")
        num_samples = (trainer.num_samples_seen or 0) - epoch.num_samples_before
        if num_samples == 0:  # the epoch was resumed at its end
            return
        metrics = {"samples_per_second": num_samples / seconds, **most}
        if num_items := sum(number for _, number in all_own):
            metrics["items_per_second"] = num_items / seconds
        if self.peak_flops is not None:
            num_flops = metrics["samples_per_second"] * flops
            metrics["mfu"] = num_flops / (self.peak_flops * len(all_own))
        for name, value in metrics.items():
            trainer.run_history.update_metric(f"train_{name}", value)
        words = (
            f"{name} {value:{',.0f' if value >= 100 else '.3g'}}"
            for name, value in metrics.items()
        )
        trainer.print(", ".join(words).replace("_", " "))

    @event_with_data
    def on_exception(self, trainer: Trainer, **kwargs: Any) -> None:
        """Count no more operations."""
        self._counting.close()

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Count no more operations."""
        self._counting.close()


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize(device)


def _peak_memory_of(device: torch.device) -> float:
    if device.type in ("cuda", "xpu"):
        return float(torch.accelerator.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows does not tell
        return 0.0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(largest) * (1 if sys.platform == "darwin" else 1024)
