"""A model with two losses, both recorded, and drawn when the run is over.

    pip install 'pytorch-accelerated[plot]'

The model is a variational autoencoder (Kingma and Welling, 2013,
https://arxiv.org/abs/1312.6114): one loss is for images that come back as they were,
the other for codes that are distributed like noise, so that noise makes images.
"""

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy

from digits import load_digits
from pytorch_accelerated import Trainer
from pytorch_accelerated.utils import world_process_zero_only


class Autoencoder(nn.Module):
    def __init__(self, num_codes=8):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * num_codes)
        )
        self.decoder = nn.Sequential(
            nn.Linear(num_codes, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid()
        )

    def forward(self, images):
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        noise = torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(mean + noise).view_as(images), mean, log_variance


class AutoencoderTrainer(Trainer):
    def calculate_train_batch_loss(self, batch):
        images, _ = batch
        restored, mean, log_variance = self.model(images)
        reconstruction = binary_cross_entropy(restored, images, reduction="sum")
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum() / 2
        return {
            "loss": (reconstruction + divergence) / len(images),
            "batch_size": len(images),
            "loss_reconstruction": reconstruction / len(images),
            "loss_divergence": divergence / len(images),
        }

    def calculate_eval_batch_loss(self, batch):
        return self.calculate_train_batch_loss(batch)


def main(num_epochs=20):
    torch.manual_seed(0)
    train_dataset, validation_dataset, _ = load_digits()
    model = Autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    trainer = AutoencoderTrainer(model, None, optimizer, seed=0)
    history = trainer.train(
        train_dataset, num_epochs, validation_dataset, per_device_batch_size=32
    )
    # A line for training and one for evaluation, under each name.
    draw = world_process_zero_only(lambda: history.plot().savefig("losses.png"))
    draw()
    return history


if __name__ == "__main__":
    main()
