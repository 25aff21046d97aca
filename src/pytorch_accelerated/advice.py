"""What would make a run faster, for those who ask.

Nothing here changes anything: what is faster may cost exactness, memory, or money.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from pytorch_accelerated import distributed
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

    Args:
        trainer: A trainer; before its first run only the optimizer is looked at.
    """
    found = list(_on_the_optimizer(trainer.optimizer))
    if trainer.run_config is not None:
        found += _on_waiting(trainer)
        if trainer.device.type == "cuda":
            found += _on_the_gpu(trainer)
    return found


def evidence_for(trainer: Trainer) -> str | None:
    """Say what the advice on loading the data goes by; None before there is any."""
    pace = trainer._run.training.pace
    if pace.num_batches == 0:
        return None
    return (
        f"Of the last epoch's training, {pace.seconds:.3g} s, the loop waited "
        f"{pace.waited / pace.seconds:.0%} for data, "
        f"{pace.waited / pace.num_batches * 1e3:.3g} ms for a batch."
    )


def _on_waiting(trainer: Trainer) -> Iterator[str]:
    """Say what to do about the time that the last epoch lost on data."""
    training = trainer._run.training
    pace = training.pace
    share = pace.waited / pace.seconds
    # A worker would take as long to hand a batch over.
    is_short = pace.waited <= HAND_OVER_SECONDS * pace.num_batches
    if share < _SMALL_SHARE or is_short:
        return
    workers = getattr(training.train_dataloader, "num_workers", None)
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
