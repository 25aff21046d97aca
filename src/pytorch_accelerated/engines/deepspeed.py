"""DeepSpeed, which owns gradients and optimizer state."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pytorch_accelerated import compat
from pytorch_accelerated.engines.plain import Engine
from pytorch_accelerated.errors import CheckpointError

if TYPE_CHECKING:
    from pytorch_accelerated.run import Run


class DeepSpeedEngine(Engine):
    """DeepSpeed: it owns gradients and steps, and spreads them by the stage of ZeRO.

    A model stays with the engine of its first run, because DeepSpeed replaces what the
    optimizer holds.
    """

    clips_by_norm_only: str = "DeepSpeed"
    owns_gradients: bool = True
    computes_alone: bool = False
    # With the weights that it holds.
    saved_in_parts: frozenset[str] = frozenset(("optimizer",))

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._plugin = accelerator.deepspeed_plugin
        # Accelerate fills in the blanks of the config for good.
        self._asked: dict[str, Any] = copy.deepcopy(self._plugin.deepspeed_config)
        self._arguments: dict[str, Any] = {}
        self._model: nn.Module | None = None
        self._engine: Any = None
        self._optimizer: Any = None

    def check(self, run: Run, batch_size: int | None) -> None:
        """Raise ValueError if the run contradicts the config of DeepSpeed."""
        super().check(run, batch_size)
        steps, clip_norm = run.gradient_accumulation_steps, run.gradient_clip_norm
        if batch_size is None:
            raise ValueError("DeepSpeed needs batches of a size that is known ahead.")
        total = batch_size * steps * self.accelerator.num_processes
        per_update = "per_device_batch_size * gradient_accumulation_steps * processes"
        for key, name, value in (
            ("train_micro_batch_size_per_gpu", "per_device_batch_size", batch_size),
            ("gradient_clipping", "gradient_clip_norm", clip_norm),
            ("train_batch_size", per_update, total),
            (*("gradient_accumulation_steps",) * 2, steps),
        ):
            asked = self._asked.get(key, "auto")
            # Accelerate writes 1 step where nothing is said.
            is_default = key == "gradient_accumulation_steps" and asked == 1
            if value is not None and asked not in ("auto", value) and not is_default:
                raise ValueError(
                    f"The DeepSpeed config says {key}={asked}, but the run was asked "
                    f'for {name}={value}. Write "auto" into the config, or give the '
                    "same value in both places."
                )
        asked_clip = self._asked.get("gradient_clipping", "auto")
        default_clip = 0.0 if asked_clip == "auto" else asked_clip
        arguments = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_clipping": default_clip if clip_norm is None else clip_norm,
        }
        if self._model is not None and arguments != self._arguments:
            raise ValueError(
                f"DeepSpeed was set up for {self._arguments} by the first run of this "
                f"trainer, and cannot change to {arguments}. Create a new trainer in a "
                "new job for it."
            )
        self._arguments = arguments

    def knows(self, model: nn.Module) -> bool:
        """Say whether the model was prepared by an earlier run."""
        return self._model is model

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        """Create DeepSpeed's engine, or take that of an earlier run."""
        if not self.knows(model):
            self._plugin.deepspeed_config.update(
                self._arguments,
                # The trainer says where a window ends and weights its losses itself.
                gradient_accumulation_steps=1,
                train_batch_size=self._arguments["train_micro_batch_size_per_gpu"]
                * self.accelerator.num_processes,
            )
            self._engine, self._optimizer = super().prepare(model, optimizer)
            self._model = model
        compat.remember_prepared(self.accelerator, self._engine, self._optimizer)
        return self._engine, self._optimizer

    def prepare_for_evaluation(self, model: nn.Module) -> Any:
        """Take the engine of an earlier run, or the model as it is."""
        if self.knows(model):
            return self._engine
        return super().prepare_for_evaluation(model)

    @contextmanager
    def without_gradient_sync(self, model: nn.Module) -> Iterator[None]:
        """Tell DeepSpeed that a window goes on."""
        compat.set_sync_gradients(self.accelerator, syncs=False)
        try:
            yield
        finally:
            compat.set_sync_gradients(self.accelerator, syncs=True)

    def clip_by_norm(self, parameters: Iterable[Tensor], norm: float) -> Any:
        """Return the norm; DeepSpeed has clipped by the number in its config."""
        total = self.accelerator.clip_grad_norm_(parameters, norm)
        return None if total is None else torch.as_tensor(total)

    def model_state(self, model: nn.Module, keep: bool = True) -> dict[str, Any]:
        """Return the whole state dict of a model, gathered under ZeRO 3. Collective."""
        state: dict[str, Any] = model.state_dict()
        if self._plugin.zero_stage < 3 or not self.knows(model):
            return state
        import deepspeed  # type: ignore[import-not-found,unused-ignore]

        for name, parameter in model.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                if keep and name in state:
                    state[name] = parameter.detach().cpu().clone()
        return state

    def load_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Load whole weights; DeepSpeed's own copies of them are made anew."""
        if self.knows(model) and self._plugin.zero_stage == 3:
            raise CheckpointError(
                "Under ZeRO 3 weights can be loaded before the first run of a trainer, "
                "or with load_training_state()."
            )
        super().load_model(model, state)
        if self.knows(model) and hasattr(self._engine.optimizer, "refresh_fp32_params"):
            self._engine.optimizer.refresh_fp32_params()

    def save_parts(self, model: nn.Module, optimizer: Any, folder: Path) -> None:
        """Let DeepSpeed write its files; it does so on all processes."""
        self._engine.save_checkpoint(str(folder), tag="state", save_latest=False)

    def load_parts(
        self, model: nn.Module, optimizer: Any, folder: Path, world_size: int
    ) -> None:
        """Let DeepSpeed read its files.

        Raises:
            CheckpointError: If they were written by another number of processes.
        """
        now = self.accelerator.num_processes
        if world_size != now:
            raise CheckpointError(
                f"{folder.parent} was written by {world_size} processes, and DeepSpeed "
                f"cannot load it on {now}. Start as many processes as then, or load "
                "only the weights, from the model file in that folder."
            )
        path, _ = self._engine.load_checkpoint(str(folder), tag="state")
        if path is None:
            raise CheckpointError(f"DeepSpeed found nothing to load in {folder}.")
