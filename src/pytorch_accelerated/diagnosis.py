"""What an error in the middle of a run should say besides its own message."""

from __future__ import annotations

import torch

from pytorch_accelerated.progress import RunProgress
from pytorch_accelerated.run_config import TrainerRunConfig

_CPU_IS_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
)


def explain(
    error: BaseException,
    epoch: int,
    progress: RunProgress,
    config: TrainerRunConfig | None,
    last_checkpoint: str | None,
) -> None:
    """Add where the run stood to an error, and what to do if memory was exhausted.

    Does nothing before Python 3.11, where errors cannot have notes.

    Args:
        error: The error that ends the run.
        epoch: Number of the epoch in the run history.
        progress: Where the run stands.
        config: What it was asked to do, if it came that far.
        last_checkpoint: The last training state that was saved, if any.
    """
    if not isinstance(error, Exception) or not hasattr(error, "add_note"):
        return
    error.add_note(
        f"The run ended in epoch {epoch} ({progress.stage.value}), after "
        f"{progress.step} of its batches and {progress.num_updates} updates. Last "
        f"training state: {last_checkpoint or 'none'}."
    )
    if config is not None and is_out_of_memory(error):
        error.add_note(_advice(config))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that a device or the host has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in _CPU_IS_OUT_OF_MEMORY)
    )


def _advice(config: TrainerRunConfig) -> str:
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
            "which need about half of the memory for activations. "
        )
    if config.mixed_precision == "no":
        text += "mixed_precision='bf16' halves it too."
    return text
