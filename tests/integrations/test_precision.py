"""Mixed precision, and Accelerate's other settings, reach what they are meant for."""

import math

import pytest
import torch
from accelerate.utils import AutocastKwargs, ParallelismConfig, ProfileKwargs
from torch import nn
from torch.utils.checkpoint import checkpoint
from train import create_data, create_model

from pytorch_accelerated import Trainer


class KeepsDtypes(Trainer):
    """Records in which precision the first layer computed."""

    def training_run_start(self):
        self.dtypes = set()
        self.model[0].register_forward_hook(
            lambda module, inputs, output: self.dtypes.add(output.dtype)
        )


def create_trainer(model=None, trainer_class=KeepsDtypes, **accelerator_kwargs):
    model = model or create_model()
    return trainer_class(
        model,
        loss_func=nn.MSELoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
        callbacks=(),
        seed=3,
        accelerator_kwargs=accelerator_kwargs,
    )


def train(trainer):
    history = trainer.train(
        create_data(),
        num_epochs=2,
        eval_dataset=create_data(10),
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_clip_norm=10.0,
    )
    return list(history.get_metric_values("train_loss_epoch"))


def test_bf16_computes_in_bf16_and_trains_about_the_same():
    full, low = create_trainer(), create_trainer(mixed_precision="bf16")
    expected, losses = train(full), train(low)
    assert low.dtypes == {torch.bfloat16}
    assert full.dtypes == {torch.float32}
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses != expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_on_a_gpu_trains_about_the_same(precision):
    expected = train(create_trainer())
    trainer = create_trainer(mixed_precision=precision)
    losses = train(trainer)
    assert trainer.dtypes == {torch.float16 if precision == "fp16" else torch.bfloat16}
    assert (trainer._accelerator.scaler is not None) == (precision == "fp16")
    assert losses == pytest.approx(expected, rel=0.05)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 works here")
def test_fp16_on_a_cpu_is_said_to_have_no_effect():
    with pytest.warns(UserWarning, match="no effect on a CPU.*Use 'bf16'"):
        trainer = create_trainer(mixed_precision="fp16")
    train(trainer)
    assert trainer.dtypes == {torch.float32}


def test_what_accelerate_refuses_is_refused_with_its_own_words():
    with pytest.raises(ValueError, match="fp8"):
        create_trainer(mixed_precision="fp8")


def test_handlers_and_plugins_reach_accelerate(tmp_path):
    profile = ProfileKwargs(output_trace_dir=str(tmp_path))
    trainer = create_trainer(
        mixed_precision="bf16",
        kwargs_handlers=[AutocastKwargs(enabled=False), profile],
    )
    with trainer._accelerator.profile():
        train(trainer)
    assert trainer.dtypes == {torch.float32}
    assert list(tmp_path.iterdir())


def test_settings_for_parallelism_reach_accelerate():
    """It makes a mesh of processes for them, which needs a launcher."""
    with pytest.raises(ValueError, match="RANK expected"):
        create_trainer(parallelism_config=ParallelismConfig(dp_shard_size=2))


class Recomputes(nn.Module):
    """Keeps no activations of its layers, as large models do."""

    def __init__(self):
        super().__init__()
        self.layers = create_model()

    def forward(self, inputs):
        return checkpoint(self.layers, inputs, use_reentrant=False)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradient_checkpointing_changes_no_number(precision):
    losses = {
        kind: train(create_trainer(model, Trainer, mixed_precision=precision))
        for kind, model in (("plain", create_model()), ("again", Recomputes()))
    }
    assert losses["plain"] == losses["again"]
    assert all(map(math.isfinite, losses["plain"]))
