"""What was probably meant by an argument that there is not."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Names of other libraries for arguments of this one.
_OTHER_NAMES = {
    "per_device_batch_size": "batch_size train_batch_size per_device_train_batch_size",
    "eval_per_device_batch_size": (
        "eval_batch_size val_batch_size per_device_eval_batch_size"
    ),
    "num_epochs": "epochs n_epochs max_epochs num_train_epochs",
    "train_dataset": (
        "train_data train_loader train_dataloader train_dataloaders train_dl"
    ),
    "eval_dataset": (
        "val_dataset valid_dataset validation_dataset test_dataset val_data valid_data "
        "validation_data eval_data val_loader val_dataloader val_dataloaders val_dl "
        "eval_loader eval_dataloader"
    ),
    "dataset": (
        "eval_dataset val_dataset test_dataset test_data dataloader dataloaders "
        "test_loader test_dataloader"
    ),
    "max_num_train_steps": "max_steps num_steps max_num_steps total_steps",
    "gradient_accumulation_steps": (
        "accumulate_grad_batches grad_accum_steps accumulation_steps"
    ),
    "gradient_clip_norm": "max_grad_norm clip_grad_norm gradient_clip_val max_norm",
    "create_scheduler_fn": "scheduler lr_scheduler",
    "resume_from": "resume ckpt_path resume_from_checkpoint",
    "loss_func": "loss loss_fn loss_function criterion",
    "optimizer": "opt optim optimizers",
    "seed": "random_seed random_state",
    "early_stopping_patience": "patience",
    "early_stopping_threshold": "min_delta threshold",
    "watch_metric": "monitor metric metric_for_best_model",
    "greater_is_better": "mode maximize",
    "save_path": "filepath path",
    "save_dir": "dirpath output_dir",
    "max_checkpoints": "save_total_limit",
    "keep_best": "save_top_k",
}

# What is no argument at all, and where it goes.
_ELSEWHERE = {
    "lr learning_rate weight_decay momentum": (
        "Give it to the optimizer: torch.optim.AdamW(model.parameters(), lr=...)."
    ),
    "num_workers shuffle drop_last pin_memory sampler batch_sampler prefetch_factor "
    "persistent_workers": (
        "It is an argument of DataLoader: give it in the train_dataloader_kwargs or "
        "eval_dataloader_kwargs of train(), or in the dataloader_kwargs of evaluate()."
    ),
    "mixed_precision precision fp16 bf16": (
        "Give it to Accelerate: Trainer(accelerator_kwargs={'mixed_precision': 'bf16'})"
        ", or `accelerate launch --mixed_precision bf16`."
    ),
    "device accelerator": (
        "Accelerate chooses the device; for the CPU, give "
        "Trainer(accelerator_kwargs={'cpu': True})."
    ),
    "metrics compute_metrics": (
        "Return metrics beside the loss from an override of calculate_eval_batch_loss, "
        "or record them in a callback."
    ),
}

# Those of all functions that name what was meant, without self.
_parameters: dict[str, list[str]] = {}


def names_what_was_meant(
    func: Callable[Parameters, Result],
) -> Callable[Parameters, Result]:
    """Let a function that is given an unknown argument name the one that was meant."""
    name = func.__qualname__.removesuffix(".__init__")
    known = _parameters[name] = list(inspect.signature(func).parameters)[1:]

    @functools.wraps(func)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        for argument in kwargs:
            if argument not in known:
                raise TypeError(
                    f"{name}() got an unexpected keyword argument {argument!r}. "
                    f"{_advice(name, argument)}"
                )
        return func(*args, **kwargs)

    return wrapper


def _advice(name: str, argument: str) -> str:
    """Say what was probably meant by an argument that a function does not have."""
    known = _parameters[name]
    meant = [argument] + [
        ours for ours, others in _OTHER_NAMES.items() if argument in others.split()
    ]
    for candidate in meant:
        if candidate in known:
            return f"Did you mean {candidate}?"
    for candidate in meant:
        for owner, parameters in _parameters.items():
            if candidate in parameters:
                return f"Did you mean {candidate}, an argument of {owner}()?"
    for names, advice in _ELSEWHERE.items():
        if argument in names.split():
            return advice
    if close := difflib.get_close_matches(argument, known, n=1):
        return f"Did you mean {close[0]}?"
    return f"It takes: {', '.join(known)}."
