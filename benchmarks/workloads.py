"""The work that is measured: the same models, data and optimizers for all contenders.

Data is not shuffled, so that every contender sees the same batches in the same order
and must end with the same parameters as the loop written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset


class OneByOne(Dataset):
    """The samples of a dataset, which can only be had one at a time."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""
        return self.dataset[index]


@dataclass
class Job:
    """A training run: its objects are new and the same each time one is created."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_func: Callable[[Tensor, Tensor], Tensor]
    dataset: Dataset
    eval_dataset: Dataset | None = None
    batch_size: int = 32
    num_epochs: int = 1
    accumulation: int = 1
    clip_norm: float | None = None
    checkpoint_every: int | None = None
    shows_progress: bool = False
    only_evaluates: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def num_steps(self) -> int:
        """The number of batches of the whole run."""
        data = self.eval_dataset if self.only_evaluates else self.dataset
        return self.num_epochs * -(-len(data) // self.batch_size)  # type: ignore[arg-type]


class Residual(nn.Module):
    """Two convolutions with a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return feature maps of the same shape."""
        return functional.relu(images + self.layers(images))


class Block(nn.Module):
    """Attention and a perceptron, each with a way around it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return states of the same shape, (batch, length, width)."""
        batch, length, width = x.shape
        heads = self.qkv(self.norms[0](x)).view(batch, length, 3, self.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.perceptron(self.norms[1](x))


class TinyGPT(nn.Module):
    """A language model of two blocks over 256 kinds of tokens."""

    def __init__(self, width: int = 64, length: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, (batch, 256, length), of the tokens that follow."""
        states = self.blocks(self.tokens(tokens) + self.positions)
        return self.head(states).transpose(1, 2)


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
    model = nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    return Job(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        nn.CrossEntropyLoss(),
        OneByOne(dataset) if one_by_one else dataset,
        **options,
    )


def _cnn_job(size: int) -> Job:
    generator = torch.Generator().manual_seed(0)
    count = 16 * max(4, size // 10)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        Residual(16),
        nn.MaxPool2d(2),
        Residual(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    return Job(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        nn.CrossEntropyLoss(),
        TensorDataset(images, torch.randint(10, (count,), generator=generator)),
        batch_size=16,
    )


def _gpt_job(size: int) -> Job:
    generator = torch.Generator().manual_seed(0)
    count = 8 * 4 * max(2, size // 20)
    text = torch.randint(256, (count, 65), generator=generator)
    torch.manual_seed(1)
    model = TinyGPT()
    return Job(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        nn.CrossEntropyLoss(),
        TensorDataset(text[:, :-1].contiguous(), text[:, 1:].contiguous()),
        batch_size=8,
        accumulation=4,
        clip_norm=1.0,
    )


@dataclass(frozen=True)
class Workload:
    """Some work, and how it is measured.

    Args:
        title: What the table calls it.
        create_job: Makes the job; its argument is about the number of steps.
        measure: "run": the call that trains; "process": a whole process, imports
            included; "import": a process that only imports.
    """

    title: str
    create_job: Callable[[int], Job]
    measure: str = "run"


WORKLOADS = {
    "a": Workload("tiny MLP, `TensorDataset`", _mlp_job),
    "b": Workload(
        "tiny MLP, sample by sample", lambda size: _mlp_job(size, one_by_one=True)
    ),
    "c": Workload(
        "tiny MLP, defaults: bars, logs, evaluation",
        lambda size: _mlp_job(size, with_eval=True, num_epochs=2, shows_progress=True),
    ),
    "d": Workload("small residual CNN", _cnn_job),
    "e": Workload("tiny GPT, AdamW, clipping, accumulation 4", _gpt_job),
    "f": Workload(
        "quick start as a process, sample by sample",
        lambda size: _mlp_job(
            4 * size,
            one_by_one=True,
            with_eval=True,
            num_epochs=2,
            shows_progress=True,
        ),
        measure="process",
    ),
    "g": Workload("import", _mlp_job, measure="import"),
    "g2": Workload("a run of one step", lambda size: _mlp_job(1)),
    "h": Workload(
        "tiny MLP, a checkpoint every 50 updates",
        lambda size: _mlp_job(size, checkpoint_every=50),
    ),
    "i": Workload(
        "tiny MLP, evaluation only",
        lambda size: _mlp_job(4 * size, with_eval=True, only_evaluates=True),
    ),
}
