"""A precision for each trainer, where Accelerate has one for the whole process.

Accelerate refuses another precision than that of the first accelerator of the process,
and gives it to all that do not ask for one. So a trainer with ``"bf16"`` would make all
later ones compute in bfloat16. Here every trainer has the precision that it asks for,
or that of its launcher; only the precision of an accelerator that the user has created
is taken over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import parse_choice_from_env

# Kept in Accelerate's state, to be gone when that is reset.
_IS_CHOSEN_BY_TRAINER = "_is_precision_chosen_by_trainer"

# They build the precision into what they share between processes.
_FIXED_FOR = (
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
    DistributedType.MEGATRON_LM,
)


@contextmanager
def precision_of_its_own(precision: str | None) -> Iterator[None]:
    """Let the accelerator that is created in the block have its own precision.

    Args:
        precision: What is asked for; None for that of the launcher.
    """
    state = AcceleratorState._shared_state
    is_ours_to_choose = not state or state.get(_IS_CHOSEN_BY_TRAINER, False)
    if precision is None and is_ours_to_choose:
        precision = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    if precision is not None:
        _set(str(precision))
    yield
    state[_IS_CHOSEN_BY_TRAINER] = precision is not None


def use_precision(accelerator: Accelerator, precision: str) -> None:
    """Make the precision of a trainer's accelerator that of the process.

    Another trainer may have changed it since the accelerator was created.
    """
    if accelerator.mixed_precision != precision:
        _set(precision)


def _set(precision: str) -> None:
    state = AcceleratorState._shared_state
    if state and state["distributed_type"] not in _FIXED_FOR:
        state["_mixed_precision"] = precision
