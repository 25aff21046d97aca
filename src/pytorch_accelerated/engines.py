"""What holds the weights, gradients and optimizer state of a run.

Usually it is torch itself, alone or with DDP: :class:`Engine`. FSDP2 and DeepSpeed
spread them over the processes, and then preparing, saving and loading differ.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from pytorch_accelerated.errors import CheckpointError


def create_engine(accelerator: Accelerator) -> Engine:
    """Return the engine that an accelerator is configured for."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeedEngine(accelerator)
    if accelerator.is_fsdp2:
        return ShardedEngine(accelerator)
    return Engine(accelerator)


class Engine:
    """Weights, gradients and optimizer state are torch's own on every process.

    Args:
        accelerator: Accelerate's view of the job.
    """

    # Whether gradients are out of reach between backward and the optimizer's step.
    owns_gradients = False
    # Whether a process needs no other during a forward pass, nor, where gradients are
    # not synchronised, during a backward pass.
    computes_alone = True

    @property
    def saved_in_parts(self) -> frozenset[str]:
        """What of a training state every process writes a part of."""
        return frozenset()

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def check_arguments(
        self,
        batch_size: int | None,
        accumulation_steps: int,
        clip_value: float | None,
        clip_norm: float | None,
    ) -> None:
        """Raise ValueError if a run cannot be made with these arguments."""

    def knows(self, model: nn.Module) -> bool:
        """Say whether an earlier run left the model in the engine's hands."""
        return False

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        """Hand a model and its optimizer to Accelerate for training."""
        prepared: tuple[Any, Any] = self.accelerator.prepare(model, optimizer)
        return prepared

    def prepare_for_evaluation(self, model: nn.Module) -> Any:
        """Hand a model to Accelerate for evaluation alone."""
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def release(self, model: nn.Module) -> None:
        """Bring a plain model into the state in which it stays between runs."""

    @contextmanager
    def without_gradient_sync(self, model: nn.Module) -> Iterator[None]:
        """Keep gradients on their process, for all but the last batch of a window."""
        with self.accelerator.no_sync(model):
            yield

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
        """Load what :class:`ShardedEngine` wrote, on any number of processes.

        Args:
            model: The plain model.
            optimizer: Its optimizer; None to load the weights alone.
            folder: What was given to :meth:`save_parts`.
            world_size: The number of processes that wrote it.

        Raises:
            CheckpointError: If another engine wrote it.
        """
        from pytorch_accelerated import sharding

        files = list(folder.glob("part_*.pt"))
        if len(files) != world_size:
            raise CheckpointError(
                f"{folder} holds the parts of {len(files)} of {world_size} processes "
                "in the format of FSDP; those of DeepSpeed are loaded by DeepSpeed "
                "only. Load the training state with the engine that saved it."
            )
        contents = sharding.read_parts(files)
        sharding.load_model(model, contents["model"])
        if optimizer is not None:
            load_with_dtypes(
                optimizer,
                sharding.optimizer_state_like(optimizer, contents["optimizer"]),
            )


class ShardedEngine(Engine):
    """FSDP2: each process holds a part of each weight, gradient and state.

    Weights are sharded in place, by the first run, and stay so: a model that is trained
    like this may not fit into the memory of one process.
    """

    computes_alone = False

    @property
    def saved_in_parts(self) -> frozenset[str]:
        """Everything, unless the plugin asks for whole states."""
        kind: str = self.accelerator.state.fsdp_plugin.state_dict_type.name
        return frozenset(() if kind == "FULL_STATE_DICT" else ("model", "optimizer"))

    def check_arguments(
        self,
        batch_size: int | None,
        accumulation_steps: int,
        clip_value: float | None,
        clip_norm: float | None,
    ) -> None:
        """Raise ValueError for clipping by value, which Accelerate does not do here."""
        _refuse_clip_value(clip_value, "FSDP")

    def knows(self, model: nn.Module) -> bool:
        """Say whether an earlier run has sharded the model."""
        from pytorch_accelerated import sharding

        return sharding.is_sharded(model)

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        """Shard the weights, unless an earlier run did."""
        if self.knows(model):
            # Accelerate tells weights apart by their place in memory, which is the same
            # for all those of which this process has nothing.
            self.accelerator._models.append(model)
            return model, optimizer
        from torch.distributed.fsdp import MixedPrecisionPolicy

        from pytorch_accelerated import sharding

        blueprint = sharding.blueprint_of(model)
        prepared = super().prepare(model, optimizer)
        if self.knows(model):
            plugin = self.accelerator.state.fsdp_plugin
            sharding.make_copyable(
                model,
                blueprint,
                reshard_after_forward=plugin.reshard_after_forward,
                offload_policy=plugin.cpu_offload,
                mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
            )
        return prepared

    def release(self, model: nn.Module) -> None:
        """Let go of whole weights that an evaluation has gathered."""
        from pytorch_accelerated import sharding

        sharding.settle(model)

    def whole(self, tree: Any, keep: bool = True) -> Any:
        """Return a state dict with whole tensors. Collective."""
        from pytorch_accelerated import sharding

        return sharding.whole(tree, keep)

    def load_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Load whole weights; each process takes its part."""
        from pytorch_accelerated import sharding

        sharding.load_model(model, state)

    def load_optimizer(
        self, optimizer: Any, state: Mapping[str, Any], *, keep_dtypes: bool = True
    ) -> None:
        """Load a whole state; each process takes its part."""
        from pytorch_accelerated import sharding

        state = sharding.optimizer_state_like(optimizer, state)
        super().load_optimizer(optimizer, state, keep_dtypes=keep_dtypes)

    def save_parts(self, model: nn.Module, optimizer: Any, folder: Path) -> None:
        """Write this process's part of the weights and of the optimizer's state."""
        from pytorch_accelerated import sharding

        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            "model": sharding.parts(model.state_dict()),
            "optimizer": sharding.parts(optimizer.state_dict()),
        }
        torch.save(contents, folder / f"part_{self.accelerator.process_index:05d}.pt")


class DeepSpeedEngine(Engine):
    """DeepSpeed: it owns gradients and steps, and spreads them by the stage of ZeRO.

    A model stays with the engine of its first run, because DeepSpeed replaces what the
    optimizer holds.
    """

    owns_gradients = True
    computes_alone = False

    @property
    def saved_in_parts(self) -> frozenset[str]:
        """The optimizer's state, with the weights that it holds."""
        return frozenset(("optimizer",))

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._plugin = accelerator.deepspeed_plugin
        # Accelerate fills in the blanks of the config for good.
        self._asked: dict[str, Any] = copy.deepcopy(self._plugin.deepspeed_config)
        self._arguments: dict[str, Any] = {}
        self._prepared: tuple[nn.Module, Any, Any] | None = None

    def check_arguments(
        self,
        batch_size: int | None,
        accumulation_steps: int,
        clip_value: float | None,
        clip_norm: float | None,
    ) -> None:
        """Raise ValueError if arguments contradict the config of DeepSpeed."""
        _refuse_clip_value(clip_value, "DeepSpeed")
        if batch_size is None:
            raise ValueError("DeepSpeed needs batches of a size that is known ahead.")
        total = batch_size * accumulation_steps * self.accelerator.num_processes
        arguments: dict[str, tuple[str, Any]] = {
            "train_micro_batch_size_per_gpu": ("per_device_batch_size", batch_size),
            "gradient_accumulation_steps": (
                "gradient_accumulation_steps",
                accumulation_steps,
            ),
            "gradient_clipping": ("gradient_clip_norm", clip_norm),
            "train_batch_size": (
                "per_device_batch_size * gradient_accumulation_steps * processes",
                total,
            ),
        }
        for key, (name, value) in arguments.items():
            asked = self._asked.get(key, "auto")
            # Accelerate writes 1 step where nothing is said.
            is_default = key == "gradient_accumulation_steps" and asked == 1
            if asked == "auto" or value is None or is_default:
                continue
            if asked != value:
                raise ValueError(
                    f"The DeepSpeed config says {key}={asked}, but the run was asked "
                    f'for {name}={value}. Write "auto" into the config, or give the '
                    "same value in both places."
                )
        asked_clip = self._asked.get("gradient_clipping", "auto")
        given = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_clipping": clip_norm
            if clip_norm is not None
            else (0.0 if asked_clip == "auto" else asked_clip),
        }
        if self._prepared is not None and given != self._arguments:
            raise ValueError(
                f"DeepSpeed was set up for {self._arguments} by the first run of this "
                f"trainer, and cannot change to {given}. Create a new trainer in a new "
                "job for it."
            )
        self._arguments = given

    def knows(self, model: nn.Module) -> bool:
        """Say whether the model was prepared by an earlier run."""
        return self._prepared is not None and self._prepared[0] is model

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        """Create DeepSpeed's engine, or take that of an earlier run."""
        if self._prepared is None or self._prepared[0] is not model:
            self._plugin.deepspeed_config.update(
                self._arguments,
                # The trainer says where a window ends and weights its losses itself.
                gradient_accumulation_steps=1,
                train_batch_size=self._arguments["train_micro_batch_size_per_gpu"]
                * self.accelerator.num_processes,
            )
            engine, wrapper = super().prepare(model, optimizer)
            self._prepared = (model, engine, wrapper)
        _, engine, wrapper = self._prepared
        self.accelerator._models = [engine]
        self.accelerator._optimizers = [wrapper]
        return engine, wrapper

    def prepare_for_evaluation(self, model: nn.Module) -> Any:
        """Take the engine of an earlier run, or the model as it is."""
        if self._prepared is not None and self.knows(model):
            return self._prepared[1]
        return super().prepare_for_evaluation(model)

    @contextmanager
    def without_gradient_sync(self, model: nn.Module) -> Iterator[None]:
        """Tell DeepSpeed that a window goes on."""
        gradient_state = self.accelerator.gradient_state
        gradient_state._set_sync_gradients(False)
        try:
            yield
        finally:
            gradient_state._set_sync_gradients(True)

    def clip_by_norm(self, parameters: Iterable[Tensor], norm: float) -> Any:
        """Return the norm; DeepSpeed has clipped by the number in its config."""
        total = self.accelerator.clip_grad_norm_(parameters, norm)
        return None if total is None else torch.as_tensor(total)

    def model_state(self, model: nn.Module, keep: bool = True) -> dict[str, Any]:
        """Return the whole state dict of a model, gathered under ZeRO 3. Collective."""
        if self._plugin.zero_stage < 3 or not self.knows(model):
            return super().model_state(model, keep)
        import deepspeed  # type: ignore[import-not-found,unused-ignore]

        state: dict[str, Any] = model.state_dict()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                if keep and name in state:
                    state[name] = parameter.detach().cpu().clone()
        return state

    def load_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Load whole weights; DeepSpeed's own copies of them are made anew."""
        if not self.knows(model):
            super().load_model(model, state)
            return
        if self._plugin.zero_stage == 3:
            raise CheckpointError(
                "Under ZeRO 3 weights can be loaded before the first run of a trainer, "
                "or with load_training_state()."
            )
        super().load_model(model, state)
        assert self._prepared is not None
        refresh = getattr(
            self._prepared[1].optimizer, "refresh_fp32_params", lambda: None
        )
        refresh()

    def save_parts(self, model: nn.Module, optimizer: Any, folder: Path) -> None:
        """Let DeepSpeed write its files; it does so on all processes."""
        assert self._prepared is not None
        self._prepared[1].save_checkpoint(str(folder), tag="state", save_latest=False)

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
        assert self._prepared is not None
        path, _ = self._prepared[1].load_checkpoint(str(folder), tag="state")
        if path is None:
            raise CheckpointError(f"DeepSpeed found nothing to load in {folder}.")


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
        elif (
            isinstance(value, Tensor)
            and isinstance(now, Tensor)
            and now.dtype != value.dtype
        ):
            loaded[key] = value.to(now.device)


def _refuse_clip_value(clip_value: float | None, engine: str) -> None:
    if clip_value is not None:
        raise ValueError(
            f"gradient_clip_value={clip_value} was given, but {engine} clips gradients "
            "by their norm only. Use gradient_clip_norm."
        )
