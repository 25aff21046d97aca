"""Training through the trainer gives, bit for bit, the weights of a loop by hand."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from toys import create_trainer, overriding

from pytorch_accelerated.data import epoch_order
from pytorch_accelerated.trainer import Trainer

NUM_SAMPLES, BATCH_SIZE, NUM_EPOCHS, SEED = 22, 4, 2, 7  # 6 batches in an epoch
MAX_NORM = 0.1

create_scheduler = partial(OneCycleLR, max_lr=0.2, total_steps=6 * NUM_EPOCHS)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def batches_of(dataset, epoch):
    order = epoch_order(len(dataset), SEED, epoch)
    for indices in order.split(BATCH_SIZE):
        samples = [dataset[index] for index in indices.tolist()]
        yield tuple(torch.stack(column) for column in zip(*samples, strict=True))


def train_by_hand(model, create_optimizer, dataset, has_more):
    optimizer = create_optimizer(model)
    scheduler = create_scheduler(optimizer) if has_more else None
    loss_func = nn.CrossEntropyLoss()
    torch.manual_seed(SEED)
    losses = []
    model.train()
    for epoch in range(1, NUM_EPOCHS + 1):
        for inputs, targets in batches_of(dataset, epoch):
            loss = loss_func(model(inputs), targets)
            loss.backward()
            if has_more:
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            if has_more:
                scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return model, optimizer, losses


def train_with_trainer(model, create_optimizer, dataset, **kwargs):
    losses = []

    def backward_step(trainer, loss):
        losses.append(loss.detach())
        Trainer.backward_step(trainer, loss)

    trainer = create_trainer(
        model=model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=create_optimizer(model),
        trainer_class=overriding(backward_step=backward_step),
        seed=SEED,
    )
    trainer.train(dataset, NUM_EPOCHS, per_device_batch_size=BATCH_SIZE, **kwargs)
    return model, trainer.optimizer, losses


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
@pytest.mark.parametrize("has_more", [False, True])
def test_weights_losses_and_optimizer_are_those_of_the_loop_by_hand(
    noise, create_classifier, one_by_one, create_optimizer, fetching, has_more
):
    """With dropout; more are clipping, a schedule, and evaluations between epochs."""
    dataset = noise(NUM_SAMPLES)
    if fetching == "sample by sample":
        dataset = one_by_one(dataset)
    more = {
        "gradient_clip_norm": MAX_NORM,
        "create_scheduler_fn": create_scheduler,
        "eval_dataset": noise(10),
    }

    assert_same_bits(
        train_with_trainer(
            create_classifier(0.5),
            create_optimizer,
            dataset,
            **more if has_more else {},
        ),
        train_by_hand(create_classifier(0.5), create_optimizer, dataset, has_more),
    )
