"""Batches that are a function of (seed, epoch, batch), whoever loads them.

The order of the samples, their split over processes, and the random numbers that the
dataset draws do not depend on the number of workers, on prefetching, or on where a run
was interrupted. The pieces:

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
    DeviceLoader,
    LimitBatches,
    LookAhead,
    PlannedLoader,
    batch_limit_from_environment,
    batch_size_of_loader,
    default_dl_kwargs,
    generators_of,
    is_plain,
    length_of,
    merge_dl_kwargs,
    num_samples_in,
    plan_of,
    remove_padding,
    yields_batches,
)
from pytorch_accelerated.data.order import (
    BatchPlan,
    Share,
    derive_seed,
    epoch_order,
)
from pytorch_accelerated.data.workers import (
    AUTO_NUM_WORKERS,
    choose_num_workers,
    worker_init_fn,
)

__all__ = [
    "AUTO_NUM_WORKERS",
    "LIMIT_BATCHES_ENV_VAR",
    "BatchPlan",
    "DataLoaderSlice",
    "DeviceLoader",
    "LimitBatches",
    "LookAhead",
    "PlannedLoader",
    "Share",
    "batch_limit_from_environment",
    "batch_size_of_loader",
    "choose_num_workers",
    "default_dl_kwargs",
    "derive_seed",
    "epoch_order",
    "generators_of",
    "is_plain",
    "length_of",
    "merge_dl_kwargs",
    "num_samples_in",
    "plan_of",
    "remove_padding",
    "seed_everything",
    "worker_init_fn",
    "yields_batches",
]
