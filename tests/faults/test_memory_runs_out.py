"""Memory runs out: the run goes on with smaller batches, and with the same updates."""

import sys

import pytest
import torch
from processes import Job, keep_to_memory
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from pytorch_accelerated import Trainer

NUM_SAMPLES, BATCH_SIZE = 20, 4


class Exhaust(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


class OutOfMemoryOnce(Trainer):
    """Has no memory left in one of its passes."""

    where, at_pass = "", -1
    num_passes = 0

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        self.num_passes += 1
        if self.num_passes == self.at_pass:
            if self.where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory")
            output["loss"] = Exhaust.apply(output["loss"])
        return output


def train(where="", at_pass=-1, batch_size=BATCH_SIZE, accumulation=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = OutOfMemoryOnce(model, nn.MSELoss(), optimizer, (), seed=1)
    trainer.where, trainer.at_pass = where, at_pass
    inputs = torch.randn(NUM_SAMPLES, 3, generator=torch.Generator().manual_seed(1))
    trainer.train(
        TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)),
        num_epochs=2,
        per_device_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        halve_batch_if_out_of_memory=True,
    )
    return nn.utils.parameters_to_vector(model.parameters()).detach(), trainer


@pytest.mark.fault("memory runs out in a pass, at each pass of a run")
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_run_ends_as_one_that_started_with_smaller_batches(where, trials):
    expected, small = train(batch_size=BATCH_SIZE // 2, accumulation=4)
    for at_pass in range(1, 2 * NUM_SAMPLES // BATCH_SIZE + 1):
        weights, trainer = train(where, at_pass)
        same = torch.allclose(weights, expected, rtol=1e-5, atol=1e-6)
        counts = [
            (each.num_updates, each.num_samples_seen) for each in (trainer, small)
        ]
        was_halved = trainer.run_config.train_per_device_batch_size == BATCH_SIZE // 2
        ok = same and counts[0] == counts[1] and was_halved
        trials.add(None if ok else f"{where} {at_pass}: {counts}, {weights - expected}")


class Wide(Dataset):
    """Samples of 2 MB."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(500_000, generator=generator), torch.ones(1)


class KeepsActivations(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, inputs):
        for weight in self.weights:
            inputs = torch.sin(inputs * weight)
        return inputs.mean(dim=1, keepdim=True)


def train_wide(folder, name, batch_size, accumulation):
    model = KeepsActivations()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = Trainer(model, nn.MSELoss(), optimizer, (), seed=1)
    trainer.train(
        Wide(),
        num_epochs=1,
        per_device_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        train_dataloader_kwargs={"num_workers": 0},
        halve_batch_if_out_of_memory=True,
    )
    torch.save(
        (model.state_dict(), trainer.run_config.train_per_device_batch_size),
        folder / name,
    )


@pytest.mark.fault("memory runs out for real (RLIMIT_AS)")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_lack_of_memory(tmp_path, trials):
    def with_little_memory():
        keep_to_memory(400 << 20)
        train_wide(tmp_path, "little", batch_size=32, accumulation=1)

    trials.add(Job(with_little_memory, tmp_path / "log").wait_or_explain())
    weights, batch_size = torch.load(tmp_path / "little", weights_only=True)
    assert batch_size < 32
    train_wide(tmp_path, "enough", batch_size, accumulation=32 // batch_size)
    expected, _ = torch.load(tmp_path / "enough", weights_only=True)
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
