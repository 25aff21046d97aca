"""Training with DeepSpeed on processes without a GPU, and the same without it."""

import os
from functools import partial

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from sharded_cases import (
    CountsItems,
    SaveOnce,
    WithoutDropout,
    create_model,
    train,
    trained_again,
    weights,
)
from torch import nn

from pytorch_accelerated import Trainer

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def create_trainer(stage, callbacks=(), trainer_class=WithoutDropout, **settings):
    kwargs = {}
    if stage is not None:
        config = {
            "zero_optimization": {"stage": stage},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            **settings,
        }
        kwargs["deepspeed_plugin"] = DeepSpeedPlugin(
            hf_ds_config=config, zero3_init_flag=False
        )
        if not torch.cuda.is_available():
            kwargs["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
    model = create_model()
    return trainer_class(
        model,
        loss_func=nn.MSELoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.02),
        callbacks=callbacks,
        seed=3,
        accelerator_kwargs=kwargs,
    )


def result_of(folder, stage, trainer_class=WithoutDropout, **arguments):
    trainer = create_trainer(stage, trainer_class=trainer_class)
    history = train(trainer, **arguments)
    return {
        "type": str(trainer._accelerator.distributed_type),
        "weights": weights(trainer),
        "losses": list(history.get_metric_values("train_loss_epoch")),
        "eval_losses": list(history.get_metric_values("eval_loss_epoch")),
        "norm": trainer.gradient_norm,
        "num_updates": trainer.num_updates,
    }


CLIPPED = {"gradient_clip_norm": 0.3}
ACCUMULATED = {"gradient_accumulation_steps": 3}

plain = partial(result_of, stage=None)
plain_clipped = partial(plain, **CLIPPED)
plain_accumulated = partial(plain, **ACCUMULATED)
zero_1, zero_2, zero_3 = (partial(result_of, stage=stage) for stage in (1, 2, 3))
clipped = partial(zero_2, **CLIPPED)
accumulated_1 = partial(zero_1, **ACCUMULATED)
accumulated_2 = partial(zero_2, **ACCUMULATED)
accumulated_3 = partial(zero_3, **ACCUMULATED)
counted = partial(accumulated_2, trainer_class=CountsItems)


def _saved(folder, stage):
    path = folder / f"state_{stage}"
    trainer = create_trainer(stage, [SaveOnce(path, 9)], Trainer)
    train(trainer)
    return {"weights": weights(trainer)}


def _resumed(folder, stage):
    trainer = create_trainer(stage, (), Trainer)
    train(trainer, resume_from=folder / f"state_{stage}")
    return {"weights": weights(trainer)}


saved_2, saved_3 = (partial(_saved, stage=stage) for stage in (2, 3))
resumed_2, resumed_3 = (partial(_resumed, stage=stage) for stage in (2, 3))


def again(folder):
    trainer = create_trainer(2)
    result = trained_again(trainer, evaluates=True)
    trainer.save_checkpoint(folder / "exported.pt", save_optimizer=False)
    return result


def plain_again(folder):
    return trained_again(create_trainer(None))


def refused(folder):
    messages = []
    for settings, arguments in (
        ({"gradient_clipping": 1.0}, {"gradient_clip_norm": 0.3}),
        ({"gradient_accumulation_steps": 4}, {"gradient_accumulation_steps": 3}),
        ({"train_micro_batch_size_per_gpu": 16}, {}),
        ({}, {"gradient_clip_value": 0.3}),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = create_trainer(2, **settings)
        try:
            train(trainer, **arguments)
        except ValueError as error:
            messages.append(str(error))
    return messages
