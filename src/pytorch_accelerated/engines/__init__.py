"""What holds the weights, gradients and optimizer state of a run.

Usually it is torch itself, alone or with DDP: ``plain``. ``fsdp`` and ``deepspeed``
spread them over the processes, and then preparing, saving and loading differ. How the
job was started is for ``launch`` to see.
"""

from __future__ import annotations

from accelerate import Accelerator, DistributedType

from pytorch_accelerated.engines.plain import (
    Engine,
    have_same_dtypes,
    load_with_dtypes,
)

__all__ = ["Engine", "create_engine", "have_same_dtypes", "load_with_dtypes"]


def create_engine(accelerator: Accelerator) -> Engine:
    """Return the engine that an accelerator is configured for."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from pytorch_accelerated.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(accelerator)
    if accelerator.is_fsdp2:
        from pytorch_accelerated.engines.fsdp import ShardedEngine

        return ShardedEngine(accelerator)
    return Engine(accelerator)
