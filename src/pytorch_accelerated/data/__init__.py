"""Batches that are a function of (seed, epoch, batch), whoever loads them.

The order of the samples, their split over processes, and the random numbers that the
dataset draws do not depend on the number of workers, on prefetching, or on where a run
was interrupted. Scripts may use what is here; its pieces:

* ``order``: the order and the seeds, as plain functions, so that a loop written by hand
  can reproduce a run; and which samples make up each batch of each process;
* ``fetching``: the samples of a batch, under random numbers of its own;
* ``loaders``: what the trainer iterates over in place of a plain ``DataLoader``;
* ``workers``: how many worker processes load the data, and their end;
* ``sharing``: samplers, loaders and streams of the user's on several processes.
"""

from pytorch_accelerated.data.fetching import seed_everything
from pytorch_accelerated.data.loaders import (
    LIMIT_BATCHES_ENV_VAR,
    DataLoaderSlice,
    LimitBatches,
    remove_padding,
)
from pytorch_accelerated.data.order import BatchPlan, derive_seed, epoch_order
from pytorch_accelerated.data.workers import worker_init_fn

__all__ = [
    "LIMIT_BATCHES_ENV_VAR",
    "BatchPlan",
    "DataLoaderSlice",
    "LimitBatches",
    "derive_seed",
    "epoch_order",
    "remove_padding",
    "seed_everything",
    "worker_init_fn",
]
