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

from pytorch_accelerated.data.fetching import InMemoryDataset as InMemoryDataset
from pytorch_accelerated.data.fetching import seed_everything as seed_everything
from pytorch_accelerated.data.loaders import (
    LIMIT_BATCHES_ENV_VAR as LIMIT_BATCHES_ENV_VAR,
)
from pytorch_accelerated.data.loaders import DataLoaderSlice as DataLoaderSlice
from pytorch_accelerated.data.loaders import DeviceLoader as DeviceLoader
from pytorch_accelerated.data.loaders import LimitBatches as LimitBatches
from pytorch_accelerated.data.loaders import LookAhead as LookAhead
from pytorch_accelerated.data.loaders import PlannedLoader as PlannedLoader
from pytorch_accelerated.data.loaders import (
    batch_limit_from_environment as batch_limit_from_environment,
)
from pytorch_accelerated.data.loaders import (
    batch_size_of_loader as batch_size_of_loader,
)
from pytorch_accelerated.data.loaders import default_dl_kwargs as default_dl_kwargs
from pytorch_accelerated.data.loaders import generators_of as generators_of
from pytorch_accelerated.data.loaders import is_plain as is_plain
from pytorch_accelerated.data.loaders import length_of as length_of
from pytorch_accelerated.data.loaders import merge_dl_kwargs as merge_dl_kwargs
from pytorch_accelerated.data.loaders import num_samples_in as num_samples_in
from pytorch_accelerated.data.loaders import plan_of as plan_of
from pytorch_accelerated.data.loaders import remove_padding as remove_padding
from pytorch_accelerated.data.loaders import yields_batches as yields_batches
from pytorch_accelerated.data.order import BatchPlan as BatchPlan
from pytorch_accelerated.data.order import PlannedBatchSampler as PlannedBatchSampler
from pytorch_accelerated.data.order import Share as Share
from pytorch_accelerated.data.order import derive_seed as derive_seed
from pytorch_accelerated.data.order import epoch_order as epoch_order
from pytorch_accelerated.data.workers import AUTO_NUM_WORKERS as AUTO_NUM_WORKERS
from pytorch_accelerated.data.workers import choose_num_workers as choose_num_workers
from pytorch_accelerated.data.workers import worker_init_fn as worker_init_fn
