"""What an error in the middle of a run should say besides its own message."""

from __future__ import annotations

import re

import torch

from pytorch_accelerated import last_words
from pytorch_accelerated.errors import add_note
from pytorch_accelerated.run_config import TrainerRunConfig
from pytorch_accelerated.state import RunProgress

_CPU_IS_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
)

# What torch says of the workers of a data loader, and what it may mean.
_ABOUT_WORKERS = {
    r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)": (
        "A worker process of a data loader has died; the error is raised wherever the "
        "run happens to be. 'Killed' is mostly the system's doing when the memory of "
        "the host or container is used up: use fewer num_workers, a smaller "
        "prefetch_factor or smaller batches. 'Bus error' means that shared memory is "
        "full: enlarge /dev/shm. Anything else is a crash in code that the dataset "
        "calls: num_workers=0 shows where."
    ),
    r"unable to .* shared memory": (
        "Shared memory, through which the workers of a data loader pass batches on, is "
        "full: enlarge /dev/shm (docker run --shm-size), or use fewer num_workers, a "
        "smaller prefetch_factor or smaller batches."
    ),
    r"Caught MemoryError in DataLoader worker": (
        "The memory of the host was exhausted in a worker process of a data loader. "
        "Use fewer num_workers, a smaller prefetch_factor or smaller batches."
    ),
    r"DataLoader timed out": (
        "A worker process of a data loader has not delivered a batch within the "
        "timeout of the loader. If batches may take this long, use a longer timeout or "
        "more num_workers. If it was stuck, `py-spy dump --pid` with the number of its "
        "process says where, as long as it is."
    ),
}


# What torch says of samples and targets, and what to do.
_ABOUT_DATA = {
    r"stack expects each tensor to be equal size": (
        "The samples have different shapes, and the default collate_fn can only stack "
        "equal ones. Bring them to one shape in the dataset, or give a collate_fn: for "
        "sequences, one that pads with torch.nn.utils.rnn.pad_sequence."
    ),
    r"Target -?\d+ is out of bounds": (
        "Cross entropy takes classes from 0 to n - 1, where n is the size of dimension "
        "1 of the model's outputs. Give the model as many outputs as there are "
        "classes, or number the classes from 0; a class that is to be left out needs "
        "CrossEntropyLoss(ignore_index=...)."
    ),
    r"device-side assert triggered": (
        "An index was out of range on the GPU; mostly it is a class of the targets for "
        "which the model has no output. CUDA_LAUNCH_BLOCKING=1, or a run on the CPU "
        "with accelerator_kwargs={'cpu': True}, shows where."
    ),
    r"expected target dtype to be Long|expected scalar type Long but found": (
        "Cross entropy takes the targets as whole numbers: return target.long() from "
        "the dataset, or for a regression use a loss such as MSELoss."
    ),
    r"multi-target not supported": (
        "Cross entropy takes one class for each sample, as targets of shape (batch,): "
        "return target.squeeze() from the dataset. Probabilities of classes are floats "
        "of the shape of the outputs."
    ),
    r"result type Float can't be cast to the desired output type Long": (
        "This loss takes the targets as floats: return target.float() from the dataset."
    ),
}


def explain(
    error: BaseException,
    epoch: int,
    progress: RunProgress,
    config: TrainerRunConfig | None,
    last_checkpoint: str | None,
) -> None:
    """Add to an error where the run stood, what other processes say, and what to do.

    Args:
        error: The error that ends the run.
        epoch: Number of the epoch in the run history.
        progress: Where the run stands.
        config: What it was asked to do, if it came that far.
        last_checkpoint: The last training state that was saved, if any.
    """
    where = (
        f"in epoch {epoch} ({progress.stage.value}), after {progress.step} of its "
        f"batches and {progress.num_updates} updates"
    )
    said_by_others = last_words.exchange(error, where)
    if not isinstance(error, Exception):
        return
    notes = [
        f"The run ended {where}. Last training state: {last_checkpoint or 'none'}.",
        *said_by_others,
        _advice_on(str(error), _ABOUT_WORKERS),
        _advice_on(str(error), _ABOUT_DATA),
    ]
    if config is not None and is_out_of_memory(error) and not any(notes[-2:]):
        notes.append(_advice_on_memory(config))
    for note in filter(None, notes):
        add_note(error, note)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that a device or the host has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in _CPU_IS_OUT_OF_MEMORY)
    )


def _advice_on_memory(config: TrainerRunConfig) -> str:
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


def _advice_on(message: str, meanings: dict[str, str]) -> str:
    found = (
        advice for pattern, advice in meanings.items() if re.search(pattern, message)
    )
    return next(found, "")
