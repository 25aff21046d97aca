"""Find a learning rate, look at its curve, and train with it.

``find_learning_rate`` trains for some updates with a learning rate that grows, and puts
everything back as it was. The suggestion is where the loss falls fastest.
"""

import torch
from torch import nn

from digits import accuracy, create_model, load_digits
from pytorch_accelerated import Trainer
from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.utils import world_process_zero_only


def draw(curve):
    curve.plot().figure.savefig("learning_rate.png")


def main(num_epochs=8):
    torch.manual_seed(0)
    train_dataset, validation_dataset, test_dataset = load_digits()
    model = create_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    trainer = Trainer(
        model, nn.CrossEntropyLoss(), optimizer, metrics={"accuracy": accuracy}, seed=0
    )

    curve = trainer.find_learning_rate(train_dataset, per_device_batch_size=32)
    trainer.print(f"Suggested learning rate: {curve.suggestion:.2g}")
    world_process_zero_only(draw)(curve)

    for group in optimizer.param_groups:
        group["lr"] = curve.suggestion
    trainer.train(
        train_dataset,
        num_epochs,
        validation_dataset,
        per_device_batch_size=32,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(),
    )
    right = trainer.evaluate(test_dataset)["evaluation_accuracy"]
    trainer.print(f"\n{right:.1%} of unseen digits are right")
    return right, curve.suggestion


if __name__ == "__main__":
    main()
