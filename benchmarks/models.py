"""The models that are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def create_perceptron() -> nn.Module:
    """Return a perceptron for images of 28x28 and ten classes."""
    return nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


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


def create_small_residual_network() -> nn.Module:
    """Return a residual network for images of 32x32 and ten classes."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        Residual(16),
        nn.MaxPool2d(2),
        Residual(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


class Bottleneck(nn.Module):
    """Three convolutions, narrow in the middle, with a way around them."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.way_around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.way_around = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return feature maps, smaller by the stride."""
        return functional.relu(self.layers(images) + self.way_around(images))


class ResNet(nn.Module):
    """The residual network of He et al. (2015); by default the one of 50 layers.

    It works in the channels-last format, into which it brings its inputs.

    Args:
        num_blocks: Blocks of each of the stages.
        width: Channels of the first stage, which double from stage to stage.
        num_classes: Classes to tell apart.
    """

    def __init__(
        self,
        num_blocks: tuple[int, ...] = (3, 4, 6, 3),
        width: int = 64,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
        inputs = width
        for stage, count in enumerate(num_blocks):
            of_stage = width * 2**stage
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(inputs, of_stage, stride))
                inputs = 4 * of_stage
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (batch, classes), for images, (batch, 3, height, width)."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.head(self.features(images).mean(dim=(2, 3)))


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


class GPT(nn.Module):
    """A language model; by default of the size of GPT-2 small."""

    def __init__(
        self,
        vocabulary: int = 50257,
        length: int = 1024,
        width: int = 768,
        num_blocks: int = 12,
        num_heads: int = 12,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(
            *(Block(width, num_heads) for _ in range(num_blocks))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, (batch, length, vocabulary), of the tokens that follow."""
        states = self.blocks(self.tokens(tokens) + self.positions)
        return self.head(self.norm(states))


class NextTokenLoss(nn.CrossEntropyLoss):
    """The mean cross entropy over all tokens."""

    def forward(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Return the loss of logits, (batch, length, vocabulary)."""
        return super().forward(logits.flatten(0, 1), tokens.flatten())
