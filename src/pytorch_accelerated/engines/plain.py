"""Weights, gradients and optimizer state that are torch's own, alone or with DDP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor, nn

from pytorch_accelerated import compat
from pytorch_accelerated.errors import CheckpointError

if TYPE_CHECKING:
    from pytorch_accelerated.run import Run


class Engine:
    """Weights, gradients and optimizer state are torch's own on every process.

    Args:
        accelerator: Accelerate's view of the job.
    """

    # The name of an engine that clips gradients by their norm only.
    clips_by_norm_only: str = ""
    # Whether gradients are out of reach between backward and the optimizer's step.
    owns_gradients: bool = False
    # Whether a process needs no other during a forward pass, nor, where gradients are
    # not synchronised, during a backward pass.
    computes_alone: bool = True
    # What of a training state every process writes a part of.
    saved_in_parts: frozenset[str] = frozenset()

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def check(self, run: Run, batch_size: int | None) -> None:
        """Raise ValueError if a run cannot be made as it was asked for.

        Args:
            run: What was asked for.
            batch_size: Samples in a batch of one process, if that is known.
        """
        if run.gradient_clip_value is not None and self.clips_by_norm_only:
            raise ValueError(
                f"gradient_clip_value={run.gradient_clip_value} was given, but "
                f"{self.clips_by_norm_only} clips gradients by their norm only. Use "
                "gradient_clip_norm."
            )

    def knows(self, model: nn.Module) -> bool:
        """Say whether an earlier run left the model in the engine's hands."""
        return False

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        """Hand a model and its optimizer to Accelerate for training."""
        prepared: tuple[Any, Any] = self.accelerator.prepare(model, optimizer)
        return prepared

    def wrap_again(self, model: Any) -> Any:
        """Return the prepared model as if it had been prepared now.

        DDP averages the gradients of those parameters alone that required some when it
        was given the model. Called on all processes.
        """
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            return model
        handler = self.accelerator.ddp_handler
        wrapped = nn.parallel.DistributedDataParallel(
            model.module,
            device_ids=model.device_ids,
            output_device=model.output_device,
            **({} if handler is None else handler.to_kwargs()),
        )
        if handler is not None:
            handler.register_comm_hook(wrapped)
        compat.remember_prepared(self.accelerator, wrapped)
        return wrapped

    def prepare_for_evaluation(self, model: nn.Module) -> Any:
        """Hand a model to Accelerate for evaluation alone."""
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def release(self, model: nn.Module) -> None:
        """Bring a plain model into the state in which it stays between runs."""

    def without_gradient_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Keep gradients on their process, for all but the last batch of a window."""
        if self.accelerator.num_processes == 1:
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.no_sync(model)
        return context

    def clip_by_norm(self, parameters: Iterable[Tensor], norm: float) -> Any:
        """Clip gradients by their total norm, and return that of before, 0-dim."""
        total = self.accelerator.clip_grad_norm_(parameters, norm)
        return total.full_tensor() if hasattr(total, "full_tensor") else total

    def whole(self, tree: Any, keep: bool = True) -> Any:
        """Return a state dict as if nothing were sharded. Called on all processes.

        Args:
            tree: A nested structure of dictionaries, lists and tensors.
            keep: Whether this process wants it.
        """
        return tree

    def model_state(self, model: nn.Module, keep: bool = True) -> dict[str, Any]:
        """Return the whole state dict of a plain model. Called on all processes.

        Args:
            model: Without wrappers of distributed training.
            keep: Whether this process wants it.
        """
        state: dict[str, Any] = self.whole(model.state_dict(), keep)
        return state

    def load_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Load a whole state dict into a plain model."""
        model.load_state_dict(state)

    def load_optimizer(
        self, optimizer: Any, state: Mapping[str, Any], *, keep_dtypes: bool = True
    ) -> None:
        """Load a whole state dict into an optimizer.

        Args:
            optimizer: The optimizer.
            state: What its ``state_dict`` returned.
            keep_dtypes: Whether tensors stay of the dtypes that they have in it. If
                not, they take those of the weights.
        """
        load_with_dtypes(optimizer, state, keep_dtypes=keep_dtypes)

    def save_parts(self, model: nn.Module, optimizer: Any, folder: Path) -> None:
        """Write this process's part of a training state. Called on all processes."""

    def load_parts(
        self, model: nn.Module, optimizer: Any, folder: Path, world_size: int
    ) -> None:
        """Load what FSDP's processes wrote, on any number of processes.

        Args:
            model: The plain model.
            optimizer: Its optimizer; None to load the weights alone.
            folder: What was given to :meth:`save_parts`.
            world_size: The number of processes that wrote it.

        Raises:
            CheckpointError: If another engine wrote it.
        """
        from pytorch_accelerated.engines import fsdp  # it takes a second to import

        files = list(folder.glob("part_*.pt"))
        if len(files) != world_size:
            raise CheckpointError(
                f"{folder} holds the parts of {len(files)} of {world_size} processes "
                "in the format of FSDP; those of DeepSpeed are loaded by DeepSpeed "
                "only. Load the training state with the engine that saved it."
            )
        contents = fsdp.read_parts(files)
        fsdp.load_model(model, contents["model"])
        if optimizer is not None:
            state = fsdp.optimizer_state_like(optimizer, contents["optimizer"])
            load_with_dtypes(optimizer, state)


def have_same_dtypes(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Say whether the weights in two state dicts of a model have the same dtypes."""
    return all(
        getattr(one.get(name), "dtype", None) == getattr(value, "dtype", None)
        for name, value in other.items()
    )


def load_with_dtypes(
    optimizer: Any, state: Mapping[str, Any], *, keep_dtypes: bool = True
) -> None:
    """Load a state dict into an optimizer, with the dtypes that are in it.

    torch gives all tensors the dtype of their weight: states in single precision of
    weights in half precision would be rounded.

    Args:
        optimizer: The optimizer.
        state: What its ``state_dict`` returned.
        keep_dtypes: False lets torch have its way: right for weights whose dtype is no
            longer that of the saved run.
    """
    optimizer.load_state_dict(state)
    # One that is made of several optimizers may have a state of another form.
    if not keep_dtypes or not {"param_groups", "state"} <= state.keys():
        return
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for number, weight in zip(numbers, weights, strict=True):
        if number in state["state"]:
            _restore_dtypes(optimizer.state[weight], state["state"][number])


def _restore_dtypes(loaded: Any, saved: Mapping[Any, Any]) -> None:
    for key, value in saved.items():
        now = loaded.get(key)
        if isinstance(value, Mapping) and isinstance(now, dict):
            _restore_dtypes(now, value)
        elif isinstance(value, Tensor) and isinstance(now, Tensor):
            loaded[key] = value.to(now.device) if now.dtype != value.dtype else now
