"""The accelerator for the way in which a script was launched.

Accelerate decides by the launcher's environment what a job is. Some of its decisions on
machines without an accelerator device are silent and surprising: several processes that
train unrelated copies, FSDP that becomes DDP. Here they are made right, or refused.

Accelerate also has one precision for the whole process: it refuses another than that of
the first accelerator, and gives it to all that do not ask for one. So a trainer with
``"bf16"`` would make all later ones compute in bfloat16. Here every trainer has the
precision that it asks for, or that of its launcher; only the precision of an
accelerator that the user has created is taken over.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    parse_choice_from_env,
)

from pytorch_accelerated import compat, distributed
from pytorch_accelerated.errors import warn

# Kept in Accelerate's state, to be gone when that is reset.
_IS_CHOSEN_BY_TRAINER = "_is_precision_chosen_by_trainer"

# They build the precision into what they share between processes.
_FIXED_FOR = (
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
    DistributedType.MEGATRON_LM,
)


def create_accelerator(**kwargs: Any) -> Accelerator:
    """Create the accelerator for the way in which this script was launched.

    It is ``Accelerator(**kwargs)``, except that

    - on a machine without an accelerator device, several processes form one job on the
      CPU under any launcher;
    - FSDP2 with ``mixed_precision="bf16"`` reduces gradients and returns outputs in
      float32, unless the plugin has a policy of its own;
    - what Accelerate would silently ignore is refused or warned of.

    Args:
        **kwargs: Arguments of :class:`accelerate.Accelerator`.

    Raises:
        RuntimeError: If the launcher started another number of processes than the
            accelerator sees, or could not start what it was asked for.
    """
    _refuse_lost_processes()
    sharding = _fsdp_plugin(kwargs)
    if sharding is not None:
        kwargs["fsdp_plugin"] = sharding
    if num_launched() > 1 and not torch.accelerator.is_available():
        if not _asks_for("DEEPSPEED", kwargs, "deepspeed_plugin", "deepspeed_plugins"):
            kwargs.setdefault("cpu", True)
        atexit.unregister(_leave_job)  # one trainer or many, it is left once
        atexit.register(_leave_job)
    with precision_of_its_own(kwargs.get("mixed_precision")):
        accelerator = Accelerator(**kwargs)
    _check_world(accelerator, sharding)
    _check_settings(accelerator)
    return accelerator


def _leave_job() -> None:
    """Close the connections between processes before Python shuts down.

    Threads of gloo that outlive the interpreter abort, now and then, a process that has
    done its work. After an error the others may never answer, so nothing is closed.
    """
    has_failed = hasattr(sys, "last_value")
    if torch.distributed.is_initialized() and not has_failed:
        distributed.forget_groups()
        torch.distributed.destroy_process_group()


def num_launched() -> int:
    """Return the number of processes of the job, as its launcher says it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _asks_for(engine: str, kwargs: dict[str, Any], *names: str) -> bool:
    by_launcher = os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
    return by_launcher or any(kwargs.get(name) is not None for name in names)


def _refuse_lost_processes() -> None:
    """Raise RuntimeError if `accelerate launch` starts fewer processes than asked for.

    On a CPU it starts a single one and leaves the settings for several in its
    environment.
    """
    from_accelerate = "ACCELERATE_DYNAMO_BACKEND" in os.environ
    meant_for_several = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    is_member = any(
        name in os.environ
        for name in ("RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    )
    if from_accelerate and meant_for_several and not is_member:
        raise RuntimeError(
            "`accelerate launch` was asked for several processes on the CPU, but "
            "starts only one there unless it is given an --mpirun_hostfile. Use "
            "`torchrun --nproc_per_node N train.py`, or `accelerate launch --multi_gpu "
            "--num_processes N train.py` (distributed_type: MULTI_GPU in a config "
            "file), which run on the CPU where there is no GPU."
        )


def _fsdp_plugin(kwargs: dict[str, Any]) -> Any:
    """Return the plugin that asks for FSDP, with a policy for mixed precision."""
    if not _asks_for("FSDP", kwargs, "fsdp_plugin"):
        return None
    plugin = kwargs.get("fsdp_plugin") or FullyShardedDataParallelPlugin()
    by_launcher = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    is_bf16 = (kwargs.get("mixed_precision") or by_launcher) == "bf16"
    has_policy = plugin.fsdp_version != 2 or plugin.mixed_precision_policy is not None
    if is_bf16 and not has_policy:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Accelerate would return outputs, and so losses, in bf16 with its 8 bits.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
            output_dtype=torch.float32,
        )
    return plugin


def _check_world(accelerator: Accelerator, sharding: Any) -> None:
    launched, seen = num_launched(), accelerator.num_processes
    if launched > 1 and seen != launched:
        raise RuntimeError(
            f"The launcher started {launched} processes, but Accelerate sees {seen}: "
            "each would train a model of its own. On a machine without an accelerator "
            "device set ACCELERATE_USE_CPU=true; otherwise check the distributed type "
            "in `accelerate env`."
        )
    is_sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharding is not None and launched > 1 and not is_sharded:
        raise RuntimeError(
            "FSDP does not run on a CPU: Accelerate would use DDP there. Leave it out, "
            "or launch the script where there are GPUs."
        )


def _check_settings(accelerator: Accelerator) -> None:
    if (
        accelerator.mixed_precision == "fp16"
        and accelerator.device.type == "cpu"
        and accelerator.scaler is None
    ):
        warn(
            "mixed_precision='fp16' has no effect on a CPU: Accelerate trains in fp32 "
            "there. Use 'bf16', which a CPU supports."
        )
    loading = accelerator.dataloader_config
    for name in ("split_batches", "dispatch_batches"):
        if getattr(loading, name) and accelerator.num_processes > 1:
            raise ValueError(
                f"DataLoaderConfiguration({name}=True) is not what the trainer does: "
                "batch sizes are those of one process, and each process loads its own "
                "batches. Leave it out, and for the same updates divide the batch size "
                f"by the number of processes, {accelerator.num_processes}."
            )
    if accelerator.gradient_accumulation_steps != 1:
        # The trainer owns the accumulation window: Accelerate would divide once more.
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            warn(
                "Accelerate is configured with gradient_accumulation_steps="
                f"{accelerator.gradient_accumulation_steps}, which the trainer does "
                "not use; give gradient_accumulation_steps to train() instead."
            )
        accelerator.gradient_accumulation_steps = 1


@contextmanager
def precision_of_its_own(precision: str | None) -> Iterator[None]:
    """Let the accelerator that is created in the block have its own precision.

    Args:
        precision: What is asked for; None for that of the launcher.
    """
    state = compat.shared_state(AcceleratorState)
    is_ours_to_choose = not state or state.get(_IS_CHOSEN_BY_TRAINER, False)
    if precision is None and is_ours_to_choose:
        precision = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    if precision is not None:
        use_precision(str(precision))
    yield
    state[_IS_CHOSEN_BY_TRAINER] = precision is not None


def use_precision(precision: str) -> None:
    """Make a precision that of the process, where it can be changed.

    Another trainer may have changed it since the accelerator was created.
    """
    state = compat.shared_state(AcceleratorState)
    if state and state["distributed_type"] not in _FIXED_FOR:
        state["_mixed_precision"] = precision
