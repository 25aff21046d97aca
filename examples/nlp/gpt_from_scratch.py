"""Train a small GPT from scratch on the sources of Python's standard library.

    python examples/nlp/gpt_from_scratch.py --num-files 300 --num-epochs 2

Needs nothing but the library. Look at

- ``gradient_accumulation_steps``: four batches of eight make the update of one of 32;
- the WSD schedule: the learning rate warms up, stays, and decays before the run ends;
- ``WSDCheckpointCallback``: the training state before the decay is kept, so that a
  longer run later goes on from there as if it had never decayed
  (``WSDCheckpointCallback(initial_checkpoint=...)``).

A token is a byte, so there is no tokenizer: the loss is in nats per byte, and dividing
it by log(2) gives bits per byte.
"""

import argparse
import math
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, random_split

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import WSDCheckpointCallback, get_default_callbacks
from pytorch_accelerated.schedulers import WSDLrScheduler


class StandardLibrary(Dataset):
    """Pieces of the sources, each with the same piece one byte later."""

    def __init__(self, num_files, length):
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:num_files]
        text = b"\n".join(file.read_bytes() for file in files)
        self.tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.length = length

    def __len__(self):
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index):
        start = index * self.length
        piece = self.tokens[start : start + self.length + 1].long()
        return piece[:-1], piece[1:]


class Block(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_output = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        x = x + self.attend(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))

    def attend(self, x):
        shape = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (
            part.reshape(shape).transpose(1, 2)
            for part in self.to_qkv(x).chunk(3, dim=-1)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.to_output(y.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """Predicts, at each place, the next byte from all before it."""

    def __init__(self, length, width=128, num_heads=4, depth=4):
        super().__init__()
        self.token_embedding = nn.Embedding(256, width)
        self.place_embedding = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.apply(self.initialise)

    @staticmethod
    def initialise(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.place_embedding(places)
        return self.head(self.norm(self.blocks(x)))


def loss_per_byte(logits, targets):
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main(num_files=300, num_epochs=2, length=128, width=128, save_dir="checkpoints"):
    dataset = StandardLibrary(num_files, length)
    train_dataset, eval_dataset = random_split(
        dataset, [0.95, 0.05], torch.Generator().manual_seed(0)
    )

    torch.manual_seed(0)
    model = GPT(length, width)
    trainer = Trainer(
        model,
        loss_func=loss_per_byte,
        optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1),
        callbacks=[*get_default_callbacks(), WSDCheckpointCallback(save_dir)],
        seed=0,
    )
    trainer.train(
        train_dataset,
        num_epochs=num_epochs,
        eval_dataset=eval_dataset,
        per_device_batch_size=8,
        gradient_accumulation_steps=4,
        gradient_clip_norm=1.0,
        create_scheduler_fn=WSDLrScheduler.create_scheduler_fn(
            num_warmup_epochs=0.1, decay_phase_ratio=0.2
        ),
    )
    bits = trainer.run_history.get_latest_metric("eval_loss_epoch") / math.log(2)
    trainer.print(f"\n{bits:.3f} bits per byte on unseen pieces (unpredicted: 8)")
    return bits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-files", type=int, default=300)
    parser.add_argument("--num-epochs", type=int, default=2)
    main(**vars(parser.parse_args()))
