"""Training with FSDP2 on processes without a GPU, and the same without it."""

import os
from functools import partial

import sharding_on_cpu  # noqa: F401 (FSDP has to run without a GPU)
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.tensor import DTensor
from train import create_data

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import ModelEmaCallback, TrainerCallback

NUM_EPOCHS = 3


def create_model():
    torch.manual_seed(0)
    # The last bias has one element: one of two processes has none of it.
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 7), nn.Linear(7, 1)
    )


def create_trainer(fsdp=True, callbacks=(), trainer_class=Trainer, **kwargs):
    settings = {"state_dict_type": "SHARDED_STATE_DICT", **kwargs.pop("plugin", {})}
    if fsdp:
        kwargs["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, **settings
        )
    model = create_model()
    return trainer_class(
        model,
        loss_func=nn.MSELoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.02),
        callbacks=callbacks,
        seed=3,
        accelerator_kwargs=kwargs,
    )


def batch_size():
    return 4 // int(os.environ.get("WORLD_SIZE", "1"))


def train(trainer, **kwargs):
    arguments = {"num_epochs": NUM_EPOCHS, "eval_dataset": create_data(10), **kwargs}
    return trainer.train(create_data(), per_device_batch_size=batch_size(), **arguments)


def weights(trainer):
    """Return the whole weights, in memory of their own."""
    return whole(trainer.get_model(keep_torch_compile=False))


def whole(model):
    state = {
        name: each.full_tensor() if isinstance(each, DTensor) else each
        for name, each in model.state_dict().items()
    }
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


class WithoutDropout(Trainer):
    """Processes drop other units than a single one would."""

    def train_epoch_start(self):
        super().train_epoch_start()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()


def find(trainer):
    """Try what a run could be made with, in between."""
    summary = trainer.summary(create_data(), per_device_batch_size=batch_size())
    curve = trainer.find_learning_rate(
        create_data(), num_updates=12, per_device_batch_size=batch_size()
    )
    return {"parameters": summary.num_parameters, "curve": curve.losses}


def result_of(folder=None, prepare=lambda _: None, **kwargs):
    arguments = kwargs.pop("arguments", {})
    trainer = create_trainer(trainer_class=WithoutDropout, **kwargs)
    found = prepare(trainer)
    history = train(trainer, **arguments)
    return {
        "weights": weights(trainer),
        "losses": list(history.get_metric_values("train_loss_epoch")),
        "eval_losses": list(history.get_metric_values("eval_loss_epoch")),
        "is_sharded": any(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "norm": trainer.gradient_norm,
        "found": found,
    }


CLIPPED = {"gradient_clip_norm": 0.3}
ACCUMULATED = {"gradient_accumulation_steps": 3}

plain = partial(result_of, fsdp=False)
plain_clipped = partial(plain, arguments=CLIPPED)
plain_accumulated = partial(plain, arguments=ACCUMULATED)
sharded = result_of
rehearsed = partial(result_of, prepare=find)
clipped = partial(result_of, arguments=CLIPPED)
accumulated = partial(result_of, arguments=ACCUMULATED)


class CountsItems(WithoutDropout):
    """Has gradients corrected when a window closes."""

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        return {**output, "num_items_in_batch": output["batch_size"] + 0}


def counted(folder):
    trainer = create_trainer(trainer_class=CountsItems)
    train(trainer, gradient_accumulation_steps=3)
    return {"weights": weights(trainer)}


def trained_again(trainer, evaluates=False):
    """Train twice, and evaluate in between if that is asked for."""
    train(trainer, num_epochs=1)
    evaluated = evaluates and trainer.evaluate(
        create_data(10), per_device_batch_size=batch_size()
    )
    history = train(trainer, num_epochs=1, reset_run_history=False)
    return {
        "evaluated": evaluated and evaluated["evaluation_loss"],
        "losses": list(history.get_metric_values("eval_loss_epoch")),
        "weights": weights(trainer),
    }


def evaluated_and_trained_again(folder):
    return trained_again(create_trainer(trainer_class=WithoutDropout), evaluates=True)


def trained_again_plainly(folder):
    return trained_again(create_trainer(fsdp=False, trainer_class=WithoutDropout))


def exported(folder):
    trainer = create_trainer()
    train(trainer, num_epochs=1)
    trainer.save_checkpoint(folder / "exported.pt")
    again = create_trainer()
    train(again, num_epochs=1, max_num_train_steps=1)
    again.load_checkpoint(folder / "exported.pt")
    trainer.save_model(folder / "exported")
    alone = create_trainer()
    train(alone, num_epochs=1, max_num_train_steps=1)
    alone.load_model(folder / "exported")
    return {
        "weights": weights(trainer),
        "loaded": weights(again),
        "loaded alone": weights(alone),
    }


class SaveOnce(TrainerCallback):
    def __init__(self, path, at_update):
        self.path = path
        self.at_update = at_update

    def on_train_step_end(self, trainer, **kwargs):
        if trainer.num_updates == self.at_update:
            trainer.save_training_state(self.path)


def _resumed(folder, kind):
    """Return what a run ends with that never stopped, and one that was resumed."""
    path, results = folder / f"state_{kind}", []
    for callbacks, resume_from in (([SaveOnce(path, 9)], None), ([], path)):
        ema = ModelEmaCallback(decay=0.8, save_path=folder / "average.pt")
        trainer = create_trainer(
            callbacks=[ema, *callbacks], plugin={"state_dict_type": kind}
        )
        history = train(trainer, resume_from=resume_from)
        losses = list(history.get_metric_values("train_loss_epoch"))
        average = whole(ema.ema_model.module)
        result = {"weights": weights(trainer), "average": average, "losses": losses}
        results.append(result)
    return results


resumed_from_parts = partial(_resumed, kind="SHARDED_STATE_DICT")
resumed_from_whole_state = partial(_resumed, kind="FULL_STATE_DICT")


def _averaged(folder, fsdp):
    save_path = folder / f"average_{fsdp}.pt"
    ema = ModelEmaCallback(decay=0.8, save_path=save_path)
    trainer = create_trainer(fsdp, [ema], WithoutDropout)
    history = train(trainer)
    trainer.save_model(folder / f"average_alone_{fsdp}", ema=True)
    return {
        "weights": whole(ema.ema_model.module),
        "is_sharded": isinstance(next(ema.ema_model.module.parameters()), DTensor),
        "losses": list(history.get_metric_values("ema_model_eval_loss_epoch")),
    }


averaged = partial(_averaged, fsdp=True)
plain_averaged = partial(_averaged, fsdp=False)


def low_precision(folder):
    class KeepsDtype(WithoutDropout):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            self.dtype = output["loss"].dtype
            return output

    trainer = create_trainer(trainer_class=KeepsDtype, mixed_precision="bf16")
    history = train(trainer)
    return {
        "loss_dtype": trainer.dtype,
        "losses": list(history.get_metric_values("train_loss_epoch")),
        "weights": weights(trainer),
    }


def refused(folder):
    try:
        train(create_trainer(), gradient_clip_value=0.1)
    except ValueError as error:
        return str(error)


def loaded_from_parts(folder):
    """On another number of processes, and without FSDP: see the test."""
    trainer = create_trainer(fsdp=False)
    trainer.load_training_state(folder / "state_SHARDED_STATE_DICT")
    return {"weights": weights(trainer), "optimizer": trainer.optimizer.state_dict()}
