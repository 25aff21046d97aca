"""What would go unnoticed is warned of once, and nothing that is meant is."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.errors import TrainingWarning
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.trainer import Trainer


@pytest.fixture
def train(noise):
    """Train a network of three layers for an epoch; warnings are errors by default."""

    def train(trainer, num_epochs=1):
        return trainer.train(noise(8), num_epochs)

    return train


@pytest.fixture
def network():
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))


def create(network, optimizer, callbacks=(), trainer_class=Trainer):
    return trainer_class(network, nn.CrossEntropyLoss(), optimizer, callbacks)


# --- parameters that no optimizer holds


def test_a_head_that_was_replaced_after_the_optimizer_was_made_found_101(
    train, network
):
    optimizer = SGD(network.parameters(), lr=0.1)
    network[2] = nn.Linear(4, 3)
    trainer = create(network, optimizer)

    with pytest.warns(
        TrainingWarning,
        match=r"will not be trained: 2\.weight, 2\.bias \(2 in all\).*has now\. If",
    ) as caught:
        train(trainer)

    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_the_first_names_and_the_number_of_many_are_said_found_101(train):
    network = nn.Sequential(*(nn.Linear(6, 6) for _ in range(20)), nn.Linear(6, 3))
    trainer = create(network, SGD(network[-1].parameters(), lr=0.1))

    with pytest.warns(TrainingWarning, match=r"0\.bias, 1\.weight, \.\.\. \(40 in"):
        train(trainer)


def test_a_compiled_model_is_looked_into_found_101(network, train):
    compiled = torch.compile(network, backend="eager")
    trainer = create(compiled, SGD(network[0].parameters(), lr=0.1))

    with pytest.warns(TrainingWarning, match=r"not be trained: 2\.weight, 2\.bias"):
        train(trainer)


def test_layers_that_are_unfrozen_later_are_no_oversight(train, network):
    freezer = ModelFreezer(network)
    freezer.freeze()
    optimizer = SGD(freezer.get_trainable_parameters(), lr=0.1)

    class Unfreezes(TrainerCallback):
        def on_train_epoch_end(self, trainer, **kwargs):
            for group in freezer.unfreeze().values():
                trainer.optimizer.add_param_group(group)

    trainer = create(network, optimizer, [Unfreezes])
    train(trainer, num_epochs=2)
    train(trainer)


def test_groups_that_a_callback_adds_at_the_start_are_no_oversight(train, network):
    class Adds(TrainerCallback):
        def on_training_run_start(self, trainer, **kwargs):
            trainer.optimizer.add_param_group({"params": network[2].parameters()})

    train(create(network, SGD(network[0].parameters(), lr=0.1), [Adds]))


def test_weights_that_are_tied_count_once(train):
    network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    network[1].weight = network[0].weight

    train(create(network, SGD(network.parameters(), lr=0.1)))


@pytest.mark.parametrize(
    "keep",
    [
        lambda owner, optimizer: setattr(owner, "second", optimizer),
        lambda owner, optimizer: setattr(owner, "more", {"d": [optimizer]}),
    ],
)
@pytest.mark.parametrize("is_callback", [False, True])
def test_a_second_optimizer_may_hold_the_rest(train, network, keep, is_callback):
    callback = TrainerCallback()
    trainer = create(network, SGD(network[0].parameters(), lr=0.1), [callback])
    owner = callback if is_callback else trainer

    keep(owner, SGD(network[2].parameters(), lr=0.1))

    train(trainer)


# --- names that nobody calls


@pytest.mark.parametrize(
    ("bases", "name", "meant"),
    [
        ((TrainerCallback,), "on_train_epoch_finish", "on_train_epoch_end"),
        ((TrainerCallback,), "on_training_step_end", "on_train_step_end"),
        ((TrainerCallback,), "on_train_batch_end", "on_train_step_end"),
        # In what only looks like a callback.
        ((), "on_epoch_end", "on_training_run_epoch_end"),
        ((Trainer,), "training_step", "calculate_train_batch_loss"),
        ((Trainer,), "calculate_train_loss", "calculate_train_batch_loss"),
        ((Trainer,), "validation_step", "calculate_eval_batch_loss"),
        ((Trainer,), "train_epoch_starts", "train_epoch_start"),
        ((Trainer,), "on_train_epoch_end", "train_epoch_end"),
        ((Trainer,), "on_epoch_end", "training_run_epoch_end"),
        ((Trainer,), "on_train_batch_end", "on_train_step_end"),
    ],
)
def test_a_misspelt_event_or_method_is_warned_of_once_found_102(
    create_trainer, samples, bases, name, meant
):
    misspelt = type("Mine", bases, {name: lambda self, *args, **kwargs: None})
    is_trainer = Trainer in bases
    arguments = {"trainer_class": misspelt} if is_trainer else {"callbacks": [misspelt]}
    trainer = create_trainer(**arguments)

    with pytest.warns(
        TrainingWarning, match=rf"Mine\.{name} is not what.*mean {meant}\?"
    ) as caught:
        trainer.train(samples(2), 1)
    trainer.train(samples(2), 1)

    assert [warning.filename for warning in caught] == [__file__]


def test_names_that_are_meant_are_no_oversight(create_trainer, samples):
    class Mine(Trainer):
        def train_step(self, batch):
            return super().calculate_train_batch_loss(batch)

        def calculate_train_batch_loss(self, batch):
            return self.train_step(batch)

        def create_test_dataloader(self):
            """Called by the user."""

        def calculate_test_batch_loss(self, batch):
            """Called by the user."""

        def save_checkpoints(self):
            """Called by the user."""

        @property
        def eval_epoch_starts(self):
            return 1

    class Logs(TrainerCallback):
        def on_train_epoch_end(self, trainer, **kwargs):
            self.on_train_epoch_finish()

        def on_train_epoch_finish(self):
            """Called by itself."""

        def on_average_moved(self, trainer, **kwargs):
            """Like no other event."""

    class ForTwoLibraries(TrainerCallback):
        def on_train_step_end(self, trainer, **kwargs):
            pass

        def on_train_batch_end(self, trainer, **kwargs):
            """What another library calls."""

    create_trainer([Logs, ForTwoLibraries], trainer_class=Mine).train(samples(2), 1)


def test_events_of_a_trainer_s_own_may_have_any_name(create_trainer, samples):
    class HasEvents(Trainer):
        def train_epoch_end(self):
            for word in ("finish", "finished"):
                self.callback_handler.call_event(f"on_train_epoch_{word}", self)

    heard = []

    class Hears(TrainerCallback):
        def on_train_epoch_finish(self, trainer, **kwargs):
            heard.append(1)

    create_trainer([Hears], trainer_class=HasEvents).train(samples(2), 1)

    assert heard == [1]
