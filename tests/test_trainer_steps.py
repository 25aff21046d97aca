"""What a step computes: batches, losses, accumulation and clipping."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.trainer import Trainer


def losses_by_hand(weight, factor, num_updates):
    """Losses of the model with one weight, which each update multiplies."""
    return [(weight * factor**update) ** 2 for update in range(num_updates)]


# --- recorded losses


@pytest.mark.parametrize("num_accumulated", [1, 2, 3, 4])
def test_train_loss_is_the_mean_over_all_samples_whatever_the_accumulation(
    create_trainer, samples, num_accumulated
):
    """Defect 16: the recorded loss was divided by the accumulation steps."""
    trainer = create_trainer(lr=0.0)
    trainer.model.weight.data.fill_(3.0)

    history = trainer.train(
        samples(10),
        num_epochs=1,
        per_device_batch_size=3,
        gradient_accumulation_steps=num_accumulated,
    )

    assert history.get_metric_values("train_loss_epoch") == [9.0]


def test_losses_of_batches_of_unequal_size_are_weighted_by_their_size(create_trainer):
    trainer = create_trainer(lr=0.0)
    inputs = torch.tensor([[1.0], [1.0], [1.0], [4.0]])
    dataset = TensorDataset(inputs, torch.zeros(4, 1))

    history = trainer.train(
        dataset,
        num_epochs=1,
        eval_dataset=dataset,
        per_device_batch_size=3,
        train_dataloader_kwargs={"shuffle": False},
    )

    # Batch means are 1 and 16: their mean would be 8.5.
    assert history.get_latest_metric("train_loss_epoch") == 19 / 4
    assert history.get_latest_metric("eval_loss_epoch") == 19 / 4


def test_the_loss_is_a_mean_over_items_where_a_step_says_how_many(create_trainer):
    class Tokens(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            return {**output, "num_items_in_batch": batch[0].sum()}

    trainer = create_trainer(lr=0.0, trainer_class=Tokens)
    inputs = torch.tensor([[1.0], [3.0]])

    history = trainer.train(
        TensorDataset(inputs, torch.zeros(2, 1)), num_epochs=1, per_device_batch_size=1
    )

    # Losses 1 and 9, of 1 and 3 items.
    assert history.get_latest_metric("train_loss_epoch") == (1 * 1 + 9 * 3) / 4


def test_other_scalars_of_a_step_are_averaged_and_recorded(create_trainer):
    class TwoLosses(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            return {**output, **self.scalars_of(batch)}

        def calculate_eval_batch_loss(self, batch):
            output = super().calculate_eval_batch_loss(batch)
            return {**output, **self.scalars_of(batch)}

        def scalars_of(self, batch):
            return {
                "largest": batch[0].max(),
                "number": 2,
                "per_sample": batch[0],
                "names": ["a"],
            }

    trainer = create_trainer(lr=0.0, trainer_class=TwoLosses)
    inputs = torch.tensor([[1.0], [2.0], [3.0]])
    dataset = TensorDataset(inputs, torch.zeros(3, 1))
    arguments = {"shuffle": False, "batch_size": 2}

    history = trainer.train(
        dataset,
        num_epochs=1,
        eval_dataset=dataset,
        train_dataloader_kwargs=arguments,
        eval_dataloader_kwargs=arguments,
    )
    metrics = trainer.evaluate(dataset, dataloader_kwargs=arguments)

    expected = (2 * 2 + 3 * 1) / 3  # the largest of each batch, weighted by size
    assert history.get_metric_values("train_largest_epoch") == [expected]
    assert history.get_metric_values("eval_largest_epoch") == [expected]
    assert history.get_metric_values("train_number_epoch") == [2.0]
    assert metrics == {
        "evaluation_loss": pytest.approx(14 / 3),
        "evaluation_largest": expected,
        "evaluation_number": 2.0,
    }
    assert not any("per_sample" in name for name in history.get_metric_names())
    assert not any("names" in name for name in history.get_metric_names())


def test_the_scalars_of_an_evaluation_do_not_mix_with_those_of_training(
    create_trainer, samples
):
    class OnlyTrain(Trainer):
        def calculate_train_batch_loss(self, batch):
            return {**super().calculate_train_batch_loss(batch), "extra": 1.0}

    history = create_trainer(trainer_class=OnlyTrain).train(
        samples(2), num_epochs=2, eval_dataset=samples(2)
    )

    assert history.get_metric_values("train_extra_epoch") == [1.0, 1.0]
    assert "eval_extra_epoch" not in history.get_metric_names()


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


@pytest.mark.parametrize("last", [torch.sqrt, torch.exp, torch.sigmoid])
def test_losses_whose_last_operation_keeps_its_output_can_be_accumulated(
    create_trainer, samples, last
):
    """Defect 16: such losses failed with "modified by an inplace operation"."""
    trainer = create_trainer(lr=0.1)
    trainer.loss_func = lambda outputs, targets: last(outputs.mean())

    trainer.train(
        samples(4),
        num_epochs=1,
        per_device_batch_size=1,
        gradient_accumulation_steps=2,
    )

    assert trainer.model.weight.item() < 1.0


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


# --- accumulation and left gradients


def test_an_incomplete_last_window_is_scaled_by_what_it_holds(create_trainer, samples):
    """Defect 26: 5 equal batches in windows of 2 gave gradients 2, 2 and 1."""
    gradients = []

    class KeepsGradients(Trainer):
        def optimizer_step(self):
            gradients.append(self.model.weight.grad.item())
            super().optimizer_step()

    create_trainer(lr=0.0, trainer_class=KeepsGradients).train(
        samples(5),
        num_epochs=1,
        per_device_batch_size=1,
        gradient_accumulation_steps=2,
    )

    assert gradients == [2.0, 2.0, 2.0]


def test_gradients_that_were_there_before_the_run_have_no_effect(
    create_trainer, samples
):
    """Defect 29: a gradient left by a learning rate finder entered the first update."""
    trainer = create_trainer()
    trainer.model.weight.grad = torch.full((1, 1), 100.0)

    trainer.train(samples(2), num_epochs=1)

    assert trainer.model.weight.item() == 0.5


def test_the_gradient_of_a_window_that_was_not_finished_does_not_enter_the_next_run(
    create_trainer, samples
):
    """Defect 29: a run stopped inside a window leaked its gradient into the next."""

    class StopsAtFirstBatch(TrainerCallback):
        def on_train_step_end(self, trainer, step, **kwargs):
            if trainer.is_to_be_stopped:
                raise KeyboardInterrupt

    trainer = create_trainer([StopsAtFirstBatch])
    trainer.is_to_be_stopped = True
    arguments = {
        "num_epochs": 1,
        "per_device_batch_size": 1,
        "gradient_accumulation_steps": 2,
    }
    with pytest.raises(KeyboardInterrupt):
        trainer.train(samples(2), **arguments)
    trainer.is_to_be_stopped = False
    trainer.train(samples(2), **arguments)

    assert trainer.model.weight.item() == 0.5


# --- clipping


def dataset_with_gradients(*gradients):
    """Samples whose loss, the product of weight and input, has these gradients."""
    inputs = torch.tensor(gradients).reshape(-1, 1)
    return TensorDataset(inputs, torch.zeros(len(gradients), 1))


@pytest.fixture
def train_with_gradients(create_trainer):
    def train(*gradients, trainer_class=Trainer, **kwargs):
        trainer = create_trainer(lr=1.0, trainer_class=trainer_class)
        trainer.model.weight.data.zero_()
        trainer.loss_func = lambda outputs, targets: outputs.mean()
        trainer.train(
            dataset_with_gradients(*gradients),
            num_epochs=1,
            per_device_batch_size=1,
            train_dataloader_kwargs={"shuffle": False},
            **kwargs,
        )
        return trainer

    return train


def test_gradients_are_clipped_once_per_update_after_accumulation(train_with_gradients):
    """Defect 4: clipped one by one, 4 and -3.5 gave 0 in place of their mean 0.25."""
    trainer = train_with_gradients(
        4.0, -3.5, gradient_accumulation_steps=2, gradient_clip_value=1.0
    )

    assert trainer.model.weight.item() == -0.25


@pytest.mark.parametrize("kind", ["gradient_clip_value", "gradient_clip_norm"])
def test_a_large_gradient_is_clipped(train_with_gradients, kind):
    trainer = train_with_gradients(4.0, **{kind: 1.0})

    assert trainer.model.weight.item() == pytest.approx(-1.0)


def test_the_norm_before_clipping_can_be_read(train_with_gradients):
    norms = []

    class KeepsNorms(Trainer):
        def optimizer_step(self):
            norms.append(self.gradient_norm)
            super().optimizer_step()

    train_with_gradients(4.0, -3.0, trainer_class=KeepsNorms, gradient_clip_norm=3.5)

    assert [norm.item() for norm in norms] == [4.0, 3.0]
    assert all(norm.dim() == 0 for norm in norms)


def test_there_is_no_norm_without_clipping_by_norm(train_with_gradients):
    assert train_with_gradients(4.0).gradient_norm is None
    assert train_with_gradients(4.0, gradient_clip_value=1.0).gradient_norm is None


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


def test_a_batch_may_have_any_nested_structure(create_trainer):
    class Nested(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            image = {"pixels": torch.ones(1), "size": (2, 3)}
            return {"image": image, "boxes": [torch.zeros(1)]}, f"name {index}"

    batches = []

    class TakesNested(Trainer):
        def calculate_train_batch_loss(self, batch):
            batches.append(batch)
            (sample, names) = batch
            outputs = self.model(sample["image"]["pixels"])
            loss = self.loss_func(outputs, sample["boxes"][0])
            return {"loss": loss, "model_outputs": outputs, "batch_size": len(names)}

    trainer = create_trainer(trainer_class=TakesNested)
    trainer.train(
        Nested(),
        num_epochs=1,
        per_device_batch_size=2,
        train_dataloader_kwargs={"shuffle": False},
    )

    assert trainer.model.weight.item() == 0.25
    assert [names for _, names in batches] == [
        ("name 0", "name 1"),
        ("name 2", "name 3"),
    ]
    assert batches[0][0]["image"]["size"][1].tolist() == [3, 3]
