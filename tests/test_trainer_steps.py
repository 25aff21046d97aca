"""What a step takes and returns: batches and losses."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

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


def test_an_evaluation_loss_that_is_not_reduced_is_refused_with_advice(
    create_trainer, samples
):
    trainer = create_trainer()
    trainer.loss_func = nn.MSELoss(reduction="none")

    with pytest.raises(ValueError, match=r"shape \(2, 1\). Reduce it to the mean"):
        trainer.evaluate(samples(2))


# --- plain batches


class LanguageModel(nn.Module):
    """Takes and returns what models of transformers do."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.head(self.embedding(input_ids) * attention_mask[..., None])
        outputs = {"logits": logits}
        if labels is not None:
            outputs["loss"] = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten()
            )
        return outputs


class Sentences(Dataset):
    def __init__(self, has_labels=True):
        self.has_labels = has_labels

    def __len__(self):
        return 10

    def __getitem__(self, index):
        ids = torch.tensor([index % 5, (index + 1) % 5])
        sentence = {"input_ids": ids, "attention_mask": torch.ones(2)}
        return {**sentence, "labels": ids} if self.has_labels else sentence


def test_a_model_that_returns_its_loss_is_trained_on_batches_of_named_tensors():
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = Trainer(model, None, optimizer, callbacks=(), seed=1)

    history = trainer.train(
        Sentences(), num_epochs=15, eval_dataset=Sentences(), per_device_batch_size=4
    )

    losses = history.get_metric_values("train_loss_epoch")
    assert losses[0] > math.log(5) * 0.8
    assert losses[-1] < losses[0] / 2
    assert history.get_latest_metric("eval_loss_epoch") < losses[0] / 2
    assert trainer.num_samples_seen == 150


def test_a_model_that_returned_no_loss_is_explained():
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = Trainer(model, None, optimizer, callbacks=())

    with pytest.raises(ValueError, match=r"have no loss.*batch has 'labels'"):
        trainer.train(Sentences(has_labels=False), num_epochs=1)
