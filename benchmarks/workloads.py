"""The work that is measured: the same models, data and optimizers for all contenders.

Data is not shuffled, so that every contender sees the same batches in the same order
and must end with the same parameters as the loop written by hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from models import (
    GPT,
    NextTokenLoss,
    ResNet,
    create_perceptron,
    create_small_residual_network,
)
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset


class OneByOne(Dataset):
    """The samples of a dataset, which can only be had one at a time.

    Args:
        dataset: Where they are.
        times: How often it begins anew.
    """

    def __init__(self, dataset: TensorDataset, times: int = 1) -> None:
        self.dataset = dataset
        self.times = times

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset) * self.times

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""
        return self.dataset[index % len(self.dataset)]


class TimedLoss(nn.Module):
    """A loss function that notes when it is called for the n-th time.

    Everybody calls it once a step, whatever else they do there. Work that a GPU still
    has to do is waited for when the time is noted, and only then.

    Args:
        loss_func: The loss function.
        calls: The two calls at which to note the time, from 1.
    """

    def __init__(self, loss_func: nn.Module, calls: tuple[int, int]) -> None:
        super().__init__()
        self.loss_func = loss_func
        self.noted_calls = calls
        self.num_calls = 0
        self.times: list[float] = []

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss."""
        self.num_calls += 1
        if self.num_calls in self.noted_calls:
            self.times.append(time_when_done(outputs.device))
        return self.loss_func(outputs, targets)


def time_when_done(device: torch.device) -> float:
    """Return the time once a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


@dataclass
class Job:
    """A training run: its objects are new and the same each time one is created.

    Args:
        model: The model.
        optimizer: Its optimizer.
        loss_func: The loss function, a mean over samples.
        dataset: What it is trained on, not shuffled.
        eval_dataset: What it is evaluated on, after each epoch.
        batch_size: Samples of a batch.
        num_epochs: Epochs of the run.
        accumulation: Batches that make up an update.
        clip_norm: The norm that gradients are clipped to.
        checkpoint_every: Updates from a checkpoint of model and optimizer to the next.
        saves_in_background: Whether training goes on while a checkpoint is written.
        shows_progress: Whether to show the bars and logs that a library has.
        with_accuracy: Whether evaluations calculate torchmetrics' accuracy too, and
            what is recorded is written to a file as the run goes.
        task: "train"; or "evaluate": the loss on ``eval_dataset``, and "predict": the
            outputs for it, both of which are returned.
        in_bf16: Whether to train in mixed precision.
        num_workers: Processes that load data.
        device: Where to train.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_func: nn.Module
    dataset: Any
    eval_dataset: Any = None
    batch_size: int = 32
    num_epochs: int = 1
    accumulation: int = 1
    clip_norm: float | None = None
    checkpoint_every: int | None = None
    saves_in_background: bool = False
    shows_progress: bool = False
    with_accuracy: bool = False
    task: str = "train"
    in_bf16: bool = False
    num_workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def num_steps(self) -> int:
        """The number of batches of the whole run."""
        data = self.dataset if self.task == "train" else self.eval_dataset
        return self.num_epochs * -(-len(data) // self.batch_size)

    @property
    def loader_options(self) -> dict[str, Any]:
        """The arguments of the loader, besides the size of batches."""
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self.device.type == "cuda",
        }


def _mlp_job(size: int, *, one_by_one: bool = False, **options: Any) -> Job:
    generator = torch.Generator().manual_seed(0)
    count = 32 * size
    images = torch.randn(count, 784, generator=generator)
    dataset: Any = TensorDataset(
        images, torch.randint(10, (count,), generator=generator)
    )
    if options.pop("with_eval", False):
        rest = torch.randn(count // 4, 784, generator=generator)
        labels = torch.randint(10, (count // 4,), generator=generator)
        options["eval_dataset"] = TensorDataset(rest, labels)
        if one_by_one:
            options["eval_dataset"] = OneByOne(options["eval_dataset"])
    torch.manual_seed(1)
    model = create_perceptron()
    return Job(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        nn.CrossEntropyLoss(),
        OneByOne(dataset) if one_by_one else dataset,
        **options,
    )


def _with_bars(size: int, **options: Any) -> Job:
    return _mlp_job(size, with_eval=True, num_epochs=2, shows_progress=True, **options)


def _with_checkpoints(size: int, *, in_background: bool = False) -> Job:
    return _mlp_job(size, checkpoint_every=50, saves_in_background=in_background)


def _without_training(size: int, task: str) -> Job:
    job = _mlp_job(size, task=task)
    job.eval_dataset = job.dataset
    return job


def _cnn_job(size: int, batch_size: int = 16) -> Job:
    generator = torch.Generator().manual_seed(0)
    count = batch_size * size
    images = torch.randn(count, 3, 32, 32, generator=generator)
    torch.manual_seed(1)
    model = create_small_residual_network()
    return Job(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        nn.CrossEntropyLoss(),
        TensorDataset(images, torch.randint(10, (count,), generator=generator)),
        batch_size=batch_size,
    )


def _random_text(count: int, length: int, vocabulary: int) -> TensorDataset:
    """Return token sequences, each with that of the tokens that follow."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(vocabulary, (count, length + 1), generator=generator)
    return TensorDataset(text[:, :-1].contiguous(), text[:, 1:].contiguous())


def _gpt_job(
    size: int, *, batch_size: int = 8, width: int = 64, num_blocks: int = 2
) -> Job:
    torch.manual_seed(1)
    model = GPT(256, length=64, width=width, num_blocks=num_blocks, num_heads=4)
    return Job(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        NextTokenLoss(),
        _random_text(batch_size * size, 64, 256),
        batch_size=batch_size,
        accumulation=4,
        clip_norm=1.0,
    )


def _resnet_job(
    size: int,
    *,
    batch_size: int = 128,
    resolution: int = 224,
    num_workers: int = 8,
    **of_model: Any,
) -> Job:
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, 3, resolution, resolution)
    images = torch.randn(shape, generator=generator)
    labels = torch.randint(10, (batch_size,), generator=generator)
    torch.manual_seed(1)
    model = ResNet(**of_model)
    return Job(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        TimedLoss(nn.CrossEntropyLoss(), (size // 4 + 1, size)),
        OneByOne(TensorDataset(images, labels), times=size),
        batch_size=batch_size,
        in_bf16=True,
        num_workers=num_workers,
    )


def _gpt2_job(size: int, *, batch_size: int = 8, **of_model: Any) -> Job:
    torch.manual_seed(1)
    model = GPT(**of_model)
    vocabulary, length = model.head.out_features, len(model.positions)
    # What an earlier run has compiled would count against the limit on recompilation.
    torch.compiler.reset()
    return Job(
        torch.compile(model),  # type: ignore[arg-type]
        torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        TimedLoss(NextTokenLoss(), (size // 4 + 1, size)),
        _random_text(batch_size * size, length, vocabulary),
        batch_size=batch_size,
        in_bf16=True,
    )


def _tiny_resnet_job(size: int) -> Job:
    return _resnet_job(
        size, batch_size=4, resolution=32, num_workers=0, num_blocks=(1, 1), width=8
    )


def _tiny_gpt2_job(size: int) -> Job:
    return _gpt2_job(
        size,
        batch_size=2,
        vocabulary=64,
        length=8,
        width=16,
        num_blocks=1,
        num_heads=2,
    )


# How to create the job of each workload, and that of a quick try. The arguments are
# numbers of steps.
JOBS: dict[str, tuple[Callable[[], Job], Callable[[], Job]]] = {
    "a": (lambda: _mlp_job(1875), lambda: _mlp_job(20)),  # 60,000 samples, as in MNIST
    "b": (
        lambda: _mlp_job(1875, one_by_one=True),
        lambda: _mlp_job(20, one_by_one=True),
    ),
    "c": (lambda: _with_bars(200), lambda: _with_bars(20)),
    "c2": (
        lambda: _with_bars(200, with_accuracy=True),
        lambda: _with_bars(20, with_accuracy=True),
    ),
    "d": (lambda: _cnn_job(40), lambda: _cnn_job(4)),
    "e": (lambda: _gpt_job(80), lambda: _gpt_job(8)),
    "f": (
        lambda: _with_bars(1600, one_by_one=True),
        lambda: _with_bars(20, one_by_one=True),
    ),
    "g": (lambda: _mlp_job(1), lambda: _mlp_job(1)),
    "g2": (lambda: _mlp_job(1), lambda: _mlp_job(1)),
    "h": (lambda: _with_checkpoints(300), lambda: _with_checkpoints(60)),
    "h2": (
        lambda: _with_checkpoints(300, in_background=True),
        lambda: _with_checkpoints(60, in_background=True),
    ),
    "i": (
        lambda: _without_training(300, "evaluate"),
        lambda: _without_training(20, "evaluate"),
    ),
    "i2": (
        lambda: _without_training(300, "predict"),
        lambda: _without_training(20, "predict"),
    ),
    "m": (lambda: _cnn_job(3, batch_size=512), lambda: _cnn_job(4)),
    "m2": (
        lambda: _gpt_job(8, batch_size=4, width=512, num_blocks=3),
        lambda: _gpt_job(8),
    ),
    "j": (lambda: _resnet_job(60), lambda: _tiny_resnet_job(8)),
    "k": (lambda: _gpt2_job(60), lambda: _tiny_gpt2_job(8)),
}
