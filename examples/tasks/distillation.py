"""A small network learns from a large one, and needs no label.

The student is to give the same probabilities as the teacher, softened by a temperature
(Hinton et al., 2015, https://arxiv.org/abs/1503.02531). The teacher is an attribute of
the trainer: a default callback moves it to the device, and as it is frozen and no part
of the model, nothing trains, saves or wraps it.
"""

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from digits import accuracy, create_model, load_digits, train_classifier
from pytorch_accelerated import Trainer

TEMPERATURE = 4.0


class DistillationTrainer(Trainer):
    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False)

    def calculate_train_batch_loss(self, batch):
        images, _ = batch
        outputs = self.model(images)
        loss = kl_div(
            log_softmax(outputs / TEMPERATURE, dim=1),
            softmax(self.teacher(images) / TEMPERATURE, dim=1),
            reduction="batchmean",
        )
        # Times its square, for gradients as large as without a temperature.
        loss = loss * TEMPERATURE**2
        return {"loss": loss, "model_outputs": outputs, "batch_size": len(images)}


def main(num_epochs=10):
    torch.manual_seed(0)
    train_dataset, validation_dataset, test_dataset = load_digits()
    teacher = train_classifier(create_model(num_channels=32), train_dataset, num_epochs)

    student = create_model(num_channels=2)  # 746 parameters, not 28,000
    trainer = DistillationTrainer(
        student,
        loss_func=cross_entropy,  # for the evaluation, which has labels
        optimizer=torch.optim.AdamW(student.parameters(), lr=1e-2),
        metrics={"accuracy": accuracy},
        seed=0,
        teacher=teacher,
    )
    trainer.train(
        train_dataset, num_epochs, validation_dataset, per_device_batch_size=32
    )
    right = trainer.evaluate(test_dataset)["evaluation_accuracy"]
    trainer.print(f"\nThe student has {right:.1%} of unseen digits right")
    return right


if __name__ == "__main__":
    main()
