"""Train on two processes; the weights are those of one process.

    torchrun --nproc_per_node 2 examples/two_processes.py
    accelerate launch --multi_gpu --num_processes 2 examples/two_processes.py
    python examples/two_processes.py --per-device-batch-size 64   # the same, alone

Without a GPU, the first two run on the CPU as well.

Look for what is not there: nothing in this file knows how many processes there are.
Each takes its half of every 64 samples, metrics are means over the samples of both, and
``trainer.print`` prints once. Two processes with 32 samples each make the same updates
as one with 64; the sum of the weights that is printed at the end shows it.
"""

import argparse

import torch
from torch import nn, optim

from pytorch_accelerated import Trainer
from quickstart import create_model, load_digits


def main(num_epochs=3, per_device_batch_size=32):
    torch.manual_seed(0)  # all processes start with the same weights
    model = create_model()
    trainer = Trainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        seed=0,
    )
    trainer.train(
        load_digits(),
        num_epochs=num_epochs,
        per_device_batch_size=per_device_batch_size,
    )

    config = trainer.run_config
    checksum = sum(parameter.sum().item() for parameter in model.parameters())
    trainer.print(
        f"\nProcesses: {config.num_processes}, updates: {trainer.num_updates} of "
        f"{config.train_total_batch_size} samples; sum of the weights: {checksum:.4f}"
    )
    return checksum


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-epochs", type=int, default=3)
    parser.add_argument("--per-device-batch-size", type=int, default=32)
    main(**vars(parser.parse_args()))
