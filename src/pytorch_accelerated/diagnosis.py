"""What an error in the middle of a run should say besides its own message."""

from __future__ import annotations

import re

import torch

from pytorch_accelerated.errors import add_note
from pytorch_accelerated.run_config import TrainerRunConfig
from pytorch_accelerated.state import RunProgress

_CPU_IS_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
)

# What torch says, and what to do.
_HINTS = {
    r"^Dist\w*Error"
    r"|^RuntimeError: (.|\n)*(gloo|NCCL|Connection (closed|reset) by peer)": (
        "Another process of the job has ended or hangs, or is elsewhere in the script: "
        "look at what it printed first."
    ),
    r"DataLoader worker .*(killed by|exited unexpectedly)"
    r"|MemoryError in DataLoader worker|unable to .* shared memory": (
        "A worker process of a data loader has died. 'Killed' and MemoryError mean "
        "that the memory of the host or container is used up, 'Bus error' that "
        "/dev/shm is full (docker run --shm-size): use fewer num_workers, a smaller "
        "prefetch_factor or smaller batches. Of anything else num_workers=0 shows "
        "where it happens."
    ),
    r"stack expects each tensor to be equal size|storage that is not resizable": (
        "The samples have different shapes, and the default collate_fn can only stack "
        "equal ones. Bring them to one shape in the dataset, or give a collate_fn: for "
        "sequences, one that pads with torch.nn.utils.rnn.pad_sequence. A tuple of "
        "tensors has these as samples; TensorDataset(inputs, targets) has their rows."
    ),
    r"Target -?\d+ is out of bounds|device-side assert triggered": (
        "Cross entropy takes classes from 0 to n - 1, where n is the size of dimension "
        "1 of the model's outputs; a class that is to be left out needs "
        "CrossEntropyLoss(ignore_index=...). On a GPU, CUDA_LAUNCH_BLOCKING=1 shows "
        "where an index is out of range."
    ),
    r"[Ii]nput type \((double|torch\.(cuda\.)?DoubleTensor)\) and .* should be the same"
    r"|must have the same dtype, but got Double": (
        "The inputs have another type than the weights, as arrays of numpy do, which "
        "are in double precision: return inputs.float() from the dataset."
    ),
    r"'(DistributedDataParallel|FullyShardedDataParallel)' object has no attribute": (
        "On several processes the model is wrapped: its own attributes are those of "
        "trainer.get_model()."
    ),
    r"expected target dtype to be Long|expected scalar type Long but found"
    r"|multi-target not supported|result type Float can't be cast to .* Long": (
        "The targets have another type or shape than the loss takes. Cross entropy "
        "takes one whole number for each sample: return target.long() or "
        "target.squeeze() from the dataset. Losses such as MSELoss and "
        "BCEWithLogitsLoss take target.float()."
    ),
}


def explain(
    error: BaseException,
    epoch: int,
    progress: RunProgress,
    config: TrainerRunConfig | None,
    last_checkpoint: str | None,
) -> None:
    """Add to an error where the run stood, and what to do.

    Args:
        error: The error that ends the run.
        epoch: Number of the epoch in the run history.
        progress: Where the run stands.
        config: What it was asked to do, if it came that far.
        last_checkpoint: The last training state that was saved, if any.
    """
    if not isinstance(error, Exception):
        return
    add_note(
        error,
        f"The run ended in epoch {epoch} ({progress.stage.value}), after "
        f"{progress.step} of its batches and {progress.num_updates} updates. Last "
        f"training state: {last_checkpoint or 'none'}.",
    )
    text = f"{type(error).__name__}: {error}"
    for pattern, hint in _HINTS.items():
        if re.search(pattern, text):
            add_note(error, hint)
            return
    if config is not None and is_out_of_memory(error):
        add_note(error, _hint_on_memory(config))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that a device or the host has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in _CPU_IS_OUT_OF_MEMORY)
    )


def _hint_on_memory(config: TrainerRunConfig) -> str:
    batch_size = config.train_per_device_batch_size
    accumulation = config.gradient_accumulation_steps
    text = (
        f"Memory was exhausted with batches of {batch_size} samples on each process "
        f"and gradient_accumulation_steps={accumulation}. "
    )
    if batch_size is not None and batch_size > 1:
        text += (
            "The updates are the same with per_device_batch_size="
            f"{batch_size // 2} and gradient_accumulation_steps={accumulation * 2}, "
            "which need about half of the memory for activations; with "
            "train(halve_batch_if_out_of_memory=True) a run changes to them itself. "
        )
    if config.mixed_precision == "no":
        text += "mixed_precision='bf16' halves it too."
    return text
