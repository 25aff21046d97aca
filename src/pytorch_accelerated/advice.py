"""What would make a run faster, for those who ask.

Nothing here changes anything: what is faster may cost exactness, memory, or money.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from pytorch_accelerated import distributed
from pytorch_accelerated.data import PlannedLoader
from pytorch_accelerated.data.fetching import BatchDataset, InMemoryDataset
from pytorch_accelerated.data.order import SeededIndices
from pytorch_accelerated.data.workers import (
    HAND_OVER_SECONDS,
    are_processes_forked,
    usable_cores,
)

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_SMALL_BATCH_ON_A_GPU = 32
_SMALL_SHARE = 0.1

_ON_SPAWNED_PROCESSES = (
    " Here they import your script, so it must start the run below "
    "if __name__ == '__main__': only."
)


def advice_for(trainer: Trainer) -> list[str]:
    """Return what would make runs like the last one faster, a sentence or two each.

    What a ``ThroughputCallback`` has recorded says whether the loop waited for data. If
    there was none, a batch is loaded, to measure how long that takes; random states
    stay as they are.

    Args:
        trainer: A trainer; before its first run only the optimizer is looked at.
    """
    found = list(_on_the_optimizer(trainer.optimizer))
    if trainer.run_config is not None:
        is_measured = "train_data_wait_share" in trainer.run_history.get_metric_names()
        found += (_on_waiting if is_measured else _on_the_loader)(trainer)
        if trainer.device.type == "cuda":
            found += _on_the_gpu(trainer)
    return found


def closing_of(trainer: Trainer) -> str:
    """Say what the advice on loading the data goes by."""
    history, name = trainer.run_history, "train_data_wait_share"
    if name in history.get_metric_names():
        share = history.get_latest_metric(name)
        return f"The loop waited for data {share:.0%} of the time of its last epoch."
    return "A ThroughputCallback would tell how long a run waits for data."


def _on_waiting(trainer: Trainer) -> Iterator[str]:
    """Say what to do about the time that a ThroughputCallback saw lost on data."""
    latest = trainer.run_history.get_latest_metric
    share, step = latest("train_data_wait_share"), latest("train_step_seconds_p50")
    # A worker would take as long to hand a batch over.
    if share < _SMALL_SHARE or share * step < HAND_OVER_SECONDS:
        return
    workers = getattr(trainer._run.training.train_dataloader, "num_workers", None)
    cores = max(1, usable_cores() // distributed.num_local_processes())
    # As many as load a batch in the time in which the model works on one.
    needed = min(cores, math.ceil((workers or share) / max(1 - share, 0.01)))
    if workers is None:
        remedy = "let your loader fetch ahead, in processes or threads."
    elif workers >= cores:
        remedy = (
            f"{workers} workers have {cores} cores. Make the samples cheaper: decode, "
            "resize or tokenize them once, ahead of the run."
        )
    else:
        remedy = (
            f"give more workers than {workers}, train_dataloader_kwargs="
            f"{{'num_workers': {needed}}}, or the same to a DataLoader of yours."
        ) + ("" if are_processes_forked() else _ON_SPAWNED_PROCESSES)
    yield f"{share:.0%} of the time the loop waited for data: {remedy}"


def _on_the_optimizer(optimizer: Any) -> Iterator[str]:
    if optimizer is None or "fused" not in optimizer.defaults:
        return
    if not any(group.get("fused") for group in optimizer.param_groups):
        name = type(optimizer).__name__
        yield (
            f"{name}(..., fused=True) updates all parameters in one pass. The results "
            "may differ in the last digit."
        )


def _on_the_loader(trainer: Trainer) -> Iterator[str]:
    loader = trainer._run.training.train_dataloader
    if not isinstance(loader, PlannedLoader):
        return
    num_workers = loader.num_workers
    if num_workers == 0 and InMemoryDataset.of(loader.loader) is not None:
        return
    seconds = _seconds_per_batch(loader)
    if num_workers == 0 and seconds > HAND_OVER_SECONDS:
        yield (
            f"Loading a batch takes {seconds * 1e3:.1f} ms, in which the model waits. "
            "Let workers do it: train_dataloader_kwargs={'num_workers': ...}."
        ) + ("" if are_processes_forked() else _ON_SPAWNED_PROCESSES)
    elif num_workers > 0:
        yield (
            f"Loading a batch takes {seconds * 1e3:.1f} ms, so {num_workers} workers "
            f"feed at most {num_workers / seconds:.0f} steps a second. If your steps "
            "could be faster, use more workers or cheaper samples."
        )


def _seconds_per_batch(loader: PlannedLoader) -> float:
    """Measure how long it takes to load the first batch in this process."""
    batches = BatchDataset(loader.loader.dataset, loader.loader.collate_fn)
    indices = SeededIndices(range(loader.plan.bounds(0, 0)[1]), seed=0)
    seconds = []
    for _ in range(2):  # the first includes what is done only once
        start = time.perf_counter()
        batches.fetch_here(indices)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _on_the_gpu(trainer: Trainer) -> Iterator[str]:
    loader, config = trainer._train_dataloader, trainer.run_config
    if not getattr(loader, "pin_memory", True):
        yield (
            "Batches are copied from pageable memory, which the host waits for. Leave "
            "pin_memory at its default, True."
        )
    if not torch.backends.cuda.matmul.allow_tf32 and config.mixed_precision == "no":
        yield (
            "torch.set_float32_matmul_precision('high') lets matrix products use tf32 "
            "(10 bits of mantissa); mixed precision, bf16, is faster still."
        )
    batch_size = config.train_per_device_batch_size
    if batch_size is not None and batch_size < _SMALL_BATCH_ON_A_GPU:
        yield (
            f"Batches of {batch_size} samples may be too small to keep a GPU busy. Try "
            "per_device_batch_size in powers of two until the time of an epoch no "
            "longer falls."
        )
