"""A generator of digits and a discriminator, each with an optimizer of its own.

Both are one module whose ``forward`` returns both losses, so that whatever wraps a
model (DDP, mixed precision) wraps this one too. In the generator's loss the
discriminator has detached weights: so one backward pass gives each of them the
gradients of its own loss alone.
"""

import torch
from torch import nn, optim
from torch.func import functional_call
from torch.nn.functional import one_hot, softplus

from digits import accuracy, create_model, load_digits, train_classifier
from pytorch_accelerated import Trainer


def create_network(num_inputs, num_outputs, *last):
    layers = [nn.Linear(num_inputs, 128), nn.LeakyReLU(0.2)]
    layers += [nn.Linear(128, 128), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(128, num_outputs), *last)


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = create_network(16 + 10, 64, nn.Sigmoid())
        self.discriminator = create_network(64 + 10, 1)

    def generate(self, labels):
        noise = torch.randn(len(labels), 16, device=labels.device)
        return self.generator(torch.cat([noise, one_hot(labels, 10)], dim=1))

    def forward(self, images, labels):
        weights = dict(self.discriminator.named_parameters())
        detached = {name: weight.detach() for name, weight in weights.items()}

        def judge(images, weights):
            inputs = torch.cat([images.flatten(1), one_hot(labels, 10)], dim=1)
            return functional_call(self.discriminator, weights, inputs)

        made = self.generate(labels)
        real, fake = judge(images, weights), judge(made.detach(), weights)
        loss_discriminator = softplus(-real).mean() + softplus(fake).mean()
        return loss_discriminator, softplus(-judge(made, detached)).mean()


class GanTrainer(Trainer):
    def calculate_train_batch_loss(self, batch):
        discriminator, generator = self.model(*batch)
        return {
            "loss": discriminator + generator,
            "batch_size": len(batch[0]),
            "loss_discriminator": discriminator,
            "loss_generator": generator,
        }

    def optimizer_step(self):
        super().optimizer_step()
        self.generator_optimizer.step()
        self.generator_optimizer.zero_grad()


def main(num_epochs=40):
    torch.manual_seed(0)
    train_dataset, _, _ = load_digits()
    gan, adam = Gan(), {"lr": 2e-3, "betas": (0.5, 0.99)}
    optimizer = optim.Adam(gan.discriminator.parameters(), **adam)
    trainer = GanTrainer(gan, loss_func=None, optimizer=optimizer, seed=0)
    trainer.generator_optimizer = optim.Adam(gan.generator.parameters(), **adam)
    trainer.train(train_dataset, num_epochs, per_device_batch_size=32)

    # Does a network that has learned from real digits recognise those made?
    judge = train_classifier(create_model(), train_dataset, num_epochs=5)
    labels = torch.arange(10, device=trainer.device).repeat(50)
    with torch.no_grad():
        made = gan.generate(labels).view(-1, 1, 8, 8)
        recognised = accuracy(judge(made), labels).item()
    for row in made[:10, 0].transpose(0, 1):
        trainer.print(*("".join(" .:+#@"[int(v * 5.99)] for v in d) for d in row))
    trainer.print(f"{recognised:.1%} of the digits made are recognised")
    return recognised


if __name__ == "__main__":
    main()
