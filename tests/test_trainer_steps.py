"""What a step takes and returns: batches and losses."""

import pytest
import torch
from torch import nn

from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.trainer import Trainer

# --- recorded losses


def test_what_a_step_returned_is_not_changed(create_trainer, samples):
    """Defect 16: the division by the accumulation steps was done in place."""
    kept = []

    class KeepsLoss(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            kept.append(output["loss"])
            return output

    class Listens(TrainerCallback):
        def on_train_step_end(self, trainer, batch_output, **kwargs):
            assert batch_output["loss"] is kept[-1]
            assert batch_output["loss"].item() == 9.0

    trainer = create_trainer([Listens], lr=0.0, trainer_class=KeepsLoss)
    trainer.model.weight.data.fill_(3.0)

    trainer.train(
        samples(4),
        num_epochs=1,
        per_device_batch_size=1,
        gradient_accumulation_steps=2,
    )

    assert [loss.item() for loss in kept] == [9.0] * 4


def test_a_loss_with_one_element_in_a_dimension_counts_as_a_number(
    create_trainer, samples
):
    trainer = create_trainer()
    trainer.loss_func = lambda outputs, targets: outputs.pow(2).mean().reshape(1)

    history = trainer.train(samples(2), num_epochs=1)

    assert history.get_metric_values("train_loss_epoch") == [1.0]
    assert trainer.model.weight.item() == 0.5


# --- plain batches


class WithLoss(nn.Linear):
    """One weight; takes named tensors and returns what models of transformers do."""

    def __init__(self):
        super().__init__(1, 1, bias=False)
        nn.init.ones_(self.weight)

    def forward(self, inputs, labels=None):
        logits = super().forward(inputs)
        outputs = {"logits": logits}
        if labels is not None:
            outputs["loss"] = nn.functional.mse_loss(logits, labels)
        return outputs


def named_samples(**more):
    return [{"inputs": torch.ones(1), **more}] * 8


def create_trainer_of_a_model_with_loss():
    model = WithLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    return Trainer(model, None, optimizer, callbacks=())


def test_a_model_that_returns_its_loss_is_trained_on_batches_of_named_tensors():
    data = named_samples(labels=torch.zeros(1))
    trainer = create_trainer_of_a_model_with_loss()

    history = trainer.train(data, 2, eval_dataset=data, per_device_batch_size=8)

    assert history.get_metric_values("train_loss_epoch") == [1.0, 0.25]
    assert history.get_metric_values("eval_loss_epoch") == [0.25, 0.25**2]
    assert trainer.num_samples_seen == 16


def test_a_model_that_returned_no_loss_is_explained():
    with pytest.raises(ValueError, match=r"have no loss.*batch has 'labels'"):
        create_trainer_of_a_model_with_loss().train(named_samples(), num_epochs=1)
