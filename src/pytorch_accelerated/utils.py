"""Helpers that scripts import from here; each lives in the module of its subject."""

from pytorch_accelerated.data import (
    LIMIT_BATCHES_ENV_VAR,
    DataLoaderSlice,
    LimitBatches,
    remove_padding,
    worker_init_fn,
)
from pytorch_accelerated.distributed import (
    local_process_zero_first,
    local_process_zero_only,
    world_process_zero_only,
)
from pytorch_accelerated.ema import ModelEma

__all__ = [
    "LIMIT_BATCHES_ENV_VAR",
    "DataLoaderSlice",
    "LimitBatches",
    "ModelEma",
    "local_process_zero_first",
    "local_process_zero_only",
    "remove_padding",
    "worker_init_fn",
    "world_process_zero_only",
]
