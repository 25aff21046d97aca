"""Training through the trainer gives, bit for bit, the weights of a loop by hand."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from pytorch_accelerated.data import epoch_order
from pytorch_accelerated.trainer import Trainer, TrainerPlaceholderValues

NUM_SAMPLES, BATCH_SIZE, NUM_EPOCHS, SEED = 22, 4, 2, 7


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def batches_of(dataset, epoch):
    order = epoch_order(len(dataset), SEED, epoch)
    for indices in order.split(BATCH_SIZE):
        samples = [dataset[index] for index in indices.tolist()]
        yield tuple(torch.stack(column) for column in zip(*samples, strict=True))


def train_by_hand(model, create_optimizer, dataset, clip=None, create_scheduler=None):
    optimizer = create_optimizer(model)
    scheduler = create_scheduler(optimizer) if create_scheduler else None
    loss_func = nn.CrossEntropyLoss()
    torch.manual_seed(SEED)
    losses = []
    model.train()
    for epoch in range(1, NUM_EPOCHS + 1):
        for inputs, targets in batches_of(dataset, epoch):
            loss = loss_func(model(inputs), targets)
            loss.backward()
            if clip is not None:
                clip(model.parameters())
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return model, optimizer, losses


class KeepsLosses(Trainer):
    def training_run_start(self):
        self.losses = []

    def backward_step(self, loss):
        self.losses.append(loss.detach())
        super().backward_step(loss)


def train_with_trainer(model, create_optimizer, dataset, **kwargs):
    optimizer = create_optimizer(model)
    trainer = KeepsLosses(
        model, nn.CrossEntropyLoss(), optimizer, callbacks=(), seed=SEED
    )
    trainer.train(
        dataset, num_epochs=NUM_EPOCHS, per_device_batch_size=BATCH_SIZE, **kwargs
    )
    return model, optimizer, trainer.losses


def assert_same_bits(actual, expected):
    model, optimizer, losses = actual
    hand_model, hand_optimizer, hand_losses = expected
    for name, tensor in hand_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.pop("last_scheduled_lr", None)  # tells whether the user sets one later
    torch.testing.assert_close(state, hand_optimizer.state_dict(), rtol=0, atol=0)
    assert torch.equal(torch.stack(losses), torch.stack(hand_losses))


@pytest.mark.parametrize("create_optimizer", [sgd, adamw])
@pytest.mark.parametrize("fetching", ["whole batches", "sample by sample"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_weights_losses_and_optimizer_are_those_of_the_loop_by_hand(
    noise, create_classifier, one_by_one, create_optimizer, fetching, dropout
):
    dataset = noise(NUM_SAMPLES)
    if fetching == "sample by sample":
        dataset = one_by_one(dataset)

    assert_same_bits(
        train_with_trainer(create_classifier(dropout), create_optimizer, dataset),
        train_by_hand(create_classifier(dropout), create_optimizer, dataset),
    )


@pytest.mark.parametrize(
    ("arguments", "clip"),
    [
        (
            {"gradient_clip_value": 0.02},
            partial(nn.utils.clip_grad_value_, clip_value=0.02),
        ),
        ({"gradient_clip_norm": 0.1}, partial(nn.utils.clip_grad_norm_, max_norm=0.1)),
    ],
)
def test_clipped_training_is_the_same_as_by_hand(
    noise, create_classifier, arguments, clip
):
    dataset = noise(NUM_SAMPLES)
    clipped = train_by_hand(create_classifier(), sgd, dataset, clip)
    unclipped = train_by_hand(create_classifier(), sgd, dataset)

    assert_same_bits(
        train_with_trainer(create_classifier(), sgd, dataset, **arguments), clipped
    )
    assert not torch.equal(clipped[0][0].weight, unclipped[0][0].weight)


def test_training_with_a_scheduler_of_torch_is_the_same_as_by_hand(
    noise, create_classifier
):
    dataset = noise(NUM_SAMPLES)  # 6 batches in an epoch
    placeholders = partial(
        OneCycleLR,
        max_lr=0.2,
        epochs=TrainerPlaceholderValues.NUM_EPOCHS,
        steps_per_epoch=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
    )
    numbers = partial(OneCycleLR, max_lr=0.2, epochs=NUM_EPOCHS, steps_per_epoch=6)

    assert_same_bits(
        train_with_trainer(
            create_classifier(), sgd, dataset, create_scheduler_fn=placeholders
        ),
        train_by_hand(create_classifier(), sgd, dataset, create_scheduler=numbers),
    )


def test_an_evaluation_between_epochs_does_not_change_the_training(
    noise, create_classifier
):
    dataset = noise(NUM_SAMPLES)

    assert_same_bits(
        train_with_trainer(
            create_classifier(0.5), sgd, dataset, eval_dataset=noise(10)
        ),
        train_by_hand(create_classifier(0.5), sgd, dataset),
    )


def test_without_a_seed_a_run_can_be_repeated_from_the_global_generator(
    noise, create_classifier
):
    def train():
        torch.manual_seed(3)
        model = create_classifier(0.5)
        trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model), callbacks=())
        trainer.train(noise(NUM_SAMPLES), num_epochs=1)
        return model[0].weight

    assert torch.equal(train(), train())


def test_the_recorded_data_seed_gives_the_order_of_a_run_without_a_seed(
    noise, create_classifier
):
    seen = []

    class KeepsBatches(Trainer):
        def calculate_train_batch_loss(self, batch):
            seen.append(batch[0])
            return super().calculate_train_batch_loss(batch)

    model, dataset = create_classifier(), noise(NUM_SAMPLES)
    trainer = KeepsBatches(model, nn.CrossEntropyLoss(), sgd(model), callbacks=())
    trainer.train(dataset, num_epochs=1)

    order = epoch_order(NUM_SAMPLES, trainer.run_config.data_seed, 1)
    assert torch.equal(torch.cat(seen), dataset.tensors[0][order])
