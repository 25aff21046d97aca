"""How long a run is, what it counts, and how it evaluates."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.schedulers import StatefulSchedulerBase
from pytorch_accelerated.tracking import InMemoryRunHistory
from pytorch_accelerated.trainer import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.utils import LimitBatches


class CountsUpdates(TrainerCallback):
    """Keeps the number of updates of each epoch."""

    def __init__(self):
        self.updates = []

    def on_train_epoch_start(self, trainer, **kwargs):
        self.updates.append(0)

    def on_train_update_end(self, trainer, **kwargs):
        self.updates[-1] += 1


@pytest.fixture
def counter():
    return CountsUpdates()


@pytest.fixture
def train(create_trainer, samples, counter):
    """Train on 4 batches in an epoch."""

    def train(num_epochs=2, trainer=None, **kwargs):
        trainer = trainer or create_trainer([counter])
        trainer.train(samples(8), num_epochs, per_device_batch_size=2, **kwargs)
        return trainer

    return train


# --- counts


def test_a_run_counts_its_updates_steps_and_samples(train):
    trainer = train(num_epochs=3, gradient_accumulation_steps=3)

    assert trainer.num_steps == 12
    assert trainer.num_updates == 6
    assert trainer.num_samples_seen == 24


def test_before_the_first_run_there_is_nothing_to_count(create_trainer):
    trainer = create_trainer()

    assert trainer.num_updates is None
    assert trainer.num_steps is None
    assert trainer.num_samples_seen is None


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ("on_train_step_start", [(0, 0, 0), (0, 1, 2), (1, 2, 4), (1, 3, 6)]),
        ("on_train_update_end", [(1, 2, 4), (2, 4, 8)]),
        ("on_train_step_end", [(0, 1, 2), (1, 2, 4), (1, 3, 6), (2, 4, 8)]),
    ],
)
def test_counts_in_the_events_of_a_step_are_those_of_what_is_done(
    create_trainer, train, event, expected
):
    counts = []

    def note(self, trainer, **kwargs):
        counts.append(
            (trainer.num_updates, trainer.num_steps, trainer.num_samples_seen)
        )

    notes = type("Notes", (TrainerCallback,), {event: note})
    train(1, create_trainer([notes]), gradient_accumulation_steps=2)

    assert counts == expected


def test_the_history_knows_the_number_of_updates_at_each_value(train):
    trainer = train(num_epochs=2)

    records = trainer.run_history.records("train_loss_epoch")
    assert [(record.epoch, record.step) for record in records] == [(1, 4), (2, 8)]


def test_no_epochs_make_a_run_without_training(train, counter):
    trainer = train(num_epochs=0)

    assert counter.updates == []
    assert trainer.num_updates == 0
    assert trainer.model.weight.item() == 1.0


# --- limits


@pytest.mark.parametrize(
    ("num_epochs", "limit", "expected"),
    [(2, None, [4, 4]), (3, 6, [4, 2]), (1, 12, [4]), (3, 8, [4, 4]), (5, 1, [1])],
)
def test_the_smaller_of_the_two_limits_ends_a_run(
    train, counter, num_epochs, limit, expected
):
    """Defect 17: with one epoch and a limit of 12 updates, 3 epochs were trained."""
    train(num_epochs, max_num_train_steps=limit)

    assert counter.updates == expected


def test_a_limit_counts_updates_and_not_batches(train, counter):
    """Defect 15: max_num_train_steps had no consistent meaning."""
    trainer = train(3, max_num_train_steps=3, gradient_accumulation_steps=2)

    assert counter.updates == [2, 1]
    assert trainer.num_steps == 6


def test_an_epoch_cut_short_has_its_loss_and_its_evaluation_recorded(train, samples):
    trainer = train(3, max_num_train_steps=5, eval_dataset=samples(2))

    history = trainer.run_history
    # The losses before updates 1 to 4, and before update 5.
    assert history.get_metric_values("train_loss_epoch") == [
        (1 + 1 / 4 + 1 / 16 + 1 / 64) / 4,
        1 / 256,
    ]
    assert history.get_metric_values("eval_loss_epoch") == [0.25**4, 0.25**5]
    assert history.current_epoch == 3


def test_the_limit_is_announced(train, capsys):
    train(3, max_num_train_steps=5)

    assert "after 5 updates, as max_num_train_steps asks" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [None, 6])
def test_limits_hold_for_each_call_also_where_the_history_goes_on(
    train, counter, limit
):
    """Defect 7: the limit was compared with the updates of the whole history."""
    trainer = train(2)
    train(3, trainer, max_num_train_steps=limit, reset_run_history=False)

    assert counter.updates[2:] == ([4, 4, 4] if limit is None else [4, 2])
    assert trainer.run_history.current_epoch == (6 if limit is None else 5)


def test_the_run_config_says_what_the_run_does(train, samples):
    trainer = train(
        3,
        max_num_train_steps=3,
        gradient_accumulation_steps=3,
        eval_dataset=samples(5),
        eval_per_device_batch_size=5,
        gradient_clip_norm=2.0,
    )

    config = trainer.run_config
    assert config.num_epochs == 2  # of two updates each
    assert config.num_update_steps_per_epoch == 2
    assert config.num_local_update_steps_per_epoch == 2
    assert config.max_num_train_steps == 3
    assert config.train_per_device_batch_size == 2
    assert config.train_total_batch_size == 6
    assert config.eval_per_device_batch_size == 5
    assert config.eval_total_batch_size == 5
    assert config.gradient_clip_norm == 2.0
    assert config.gradient_clip_value is None
    assert config.num_processes == 1
    assert not config.is_distributed
    assert config.mixed_precision == "no"


@pytest.mark.parametrize(
    ("limit", "length"), [(None, 8), (6, 6), (100, 8), (8, 8), (3, 3)]
)
def test_a_schedule_is_as_long_as_the_run(create_trainer, train, limit, length):
    """Defect 58: schedules ignored max_num_train_steps."""
    lengths = []

    def create(optimizer, num_updates):
        lengths.append(num_updates)
        return LambdaLR(optimizer, lambda update: 1.0)

    train(
        2,
        max_num_train_steps=limit,
        create_scheduler_fn=partial(
            create,
            num_updates=TrainerPlaceholderValues.NUM_EPOCHS
            * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
        ),
    )

    assert lengths == [length]


def test_a_schedule_is_as_long_as_a_run_on_a_few_batches(create_trainer, train):
    """Defect 58: with LimitBatches(2) a schedule was as long as all the data."""
    lengths = []

    def create(optimizer, num_updates):
        lengths.append(num_updates)
        return LambdaLR(optimizer, lambda update: 1.0)

    with LimitBatches(3):
        trainer = create_trainer()
    steps = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH
    train(2, trainer, create_scheduler_fn=partial(create, num_updates=steps))

    assert lengths == [3]


def test_placeholders_are_replaced_wherever_they_stand(create_trainer, train, samples):
    """Defect 36: positional and nested placeholders stayed, silently."""
    received = []

    def create(factor, optimizer, *, inner, lengths):
        received.append((factor, inner(), lengths))
        return LambdaLR(optimizer, lambda update: 1.0)

    names = TrainerPlaceholderValues
    factory = partial(
        create,
        2 * names.NUM_EPOCHS - 1,
        inner=partial(lambda warmup: warmup, names.NUM_UPDATE_STEPS_PER_EPOCH // 3),
        lengths=[names.TRAIN_DATALOADER_LEN, {"eval": names.EVAL_DATALOADER_LEN}],
    )
    train(2, eval_dataset=samples(5), create_scheduler_fn=factory)

    assert received == [(3, 1, [4, {"eval": 3}])]


def test_the_scheduler_is_stepped_once_per_update(train):
    rates = []

    class KeepsRates(Trainer):
        def optimizer_step(self):
            rates.append(self.optimizer.param_groups[0]["lr"])
            super().optimizer_step()

    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = KeepsRates(model, nn.MSELoss(), optimizer, callbacks=())
    train(
        2,
        trainer,
        gradient_accumulation_steps=2,
        create_scheduler_fn=partial(LambdaLR, lr_lambda=lambda update: 0.5**update),
    )

    assert rates == [1.0, 0.5, 0.25, 0.125]


@pytest.mark.parametrize("has_eval", [True, False])
def test_a_plateau_of_the_evaluation_loss_lowers_the_learning_rate(
    train, create_trainer, samples, has_eval
):
    trainer = create_trainer(lr=0.25)
    trainer.loss_func = lambda outputs, targets: outputs.mean() * 0 + 1.0
    train(
        4,
        trainer,
        eval_dataset=samples(2) if has_eval else None,
        create_scheduler_fn=partial(ReduceLROnPlateau, factor=0.5, patience=0),
    )

    # The first epoch sets the mark, and each later one is no better.
    assert trainer.optimizer.param_groups[0]["lr"] == 0.25 * 0.5**3


# --- evaluation


def test_evaluate_returns_its_metrics_and_adds_them_to_the_history(train, samples):
    """Defect 57: evaluate() wiped the history of the training."""
    trainer = train(1)

    metrics = trainer.evaluate(samples(3))
    trainer.evaluate(samples(3))

    assert metrics == {"evaluation_loss": 0.25**4}
    history = trainer.run_history
    assert history.get_metric_values("evaluation_loss") == [0.25**4] * 2
    assert len(history.get_metric_values("train_loss_epoch")) == 1
    assert history.current_epoch == 2


def test_evaluate_returns_what_callbacks_record_too(create_trainer, samples):
    class Records(TrainerCallback):
        def on_eval_epoch_end(self, trainer, **kwargs):
            trainer.run_history.update_metric("accuracy", 0.5)

    metrics = create_trainer([Records]).evaluate(samples(1))

    assert metrics == {"evaluation_loss": 1.0, "evaluation_accuracy": 0.5}


def test_evaluate_has_names_of_its_own_and_is_no_epoch(create_trainer, samples):
    """Found 97 and 115: its values were those of epoch 3 of 2, among the epochs'."""
    epochs = []

    class Accuracy(Trainer):
        def eval_epoch_end(self):
            epochs.append(self.run_history.current_epoch)
            self.run_history.update_metric("accuracy", len(epochs) / 4)
            self.run_history.update_metric("evaluation_f1", 0.5)

        def calculate_eval_batch_loss(self, batch):
            return {**super().calculate_eval_batch_loss(batch), "error": 0.125}

    trainer = create_trainer(trainer_class=Accuracy)
    history = trainer.train(samples(1), num_epochs=2, eval_dataset=samples(1))
    history.delete_metric("evaluation_f1")

    metrics = trainer.evaluate(samples(1))

    assert metrics == {
        "evaluation_loss": 0.25**2,
        "evaluation_error": 0.125,
        "evaluation_accuracy": 0.75,
        "evaluation_f1": 0.5,
    }
    assert [(r.value, r.epoch) for r in history.records("accuracy")] == [
        (0.25, 1),
        (0.5, 2),
    ]
    [record] = history.records("evaluation_accuracy")
    assert (record.value, record.epoch, record.step) == (0.75, None, 2)
    assert epochs == [1, 2, 1]
    assert history.current_epoch == 3
    assert history.metric_name_prefix == ""


def test_a_script_reads_what_evaluate_recorded_by_its_plain_name(
    create_trainer, samples
):
    """Found 97: under 0.1.61 evaluate() left nothing else to be read."""

    class Accuracy(Trainer):
        value = 0.5

        def eval_epoch_end(self):
            self.run_history.update_metric("accuracy", self.value)

    trainer = create_trainer(trainer_class=Accuracy)
    history = trainer.train(samples(1), 1, eval_dataset=samples(1))
    trainer.value = 0.75
    trainer.evaluate(samples(1))
    assert history.get_latest_metric("accuracy") == 0.75
    assert history.get_metric_values("accuracy") == [0.5]
    trainer.value = 0.625
    trainer.train(samples(1), 1, eval_dataset=samples(1), reset_run_history=False)
    assert history.get_latest_metric("accuracy") == 0.625


def test_numbers_with_an_underscore_are_not_recorded(create_trainer, samples):
    """Found 114: what a step returned for its own use became a metric."""

    class OwnUse(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            return {**output, "_image_id": 7, "accuracy": 0.5}

    history = create_trainer(trainer_class=OwnUse).train(samples(1), num_epochs=1)
    assert history.get_metric_names() == {"train_loss_epoch", "train_accuracy_epoch"}


def test_train_returns_the_run_history(create_trainer, samples):
    history = InMemoryRunHistory()

    assert create_trainer(run_history=history).train(samples(1), 1) is history


def test_evaluate_works_without_an_optimizer(samples):
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    trainer = Trainer(model, nn.MSELoss(), None, callbacks=())

    assert trainer.evaluate(samples(3)) == {"evaluation_loss": 1.0}


def test_evaluate_leaves_the_global_random_state_alone(create_trainer, samples):
    """Defect 9: evaluate() in a script reset the random state of its caller."""
    trainer = create_trainer(seed=3)
    before = torch.get_rng_state()

    trainer.evaluate(samples(4))

    assert torch.equal(torch.get_rng_state(), before)


class FrozenNorm(nn.Module):
    """A model whose batch norm is in evaluation mode on purpose."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(1)
        self.dropout = nn.Dropout(0.0)
        self.norm.eval()

    def forward(self, inputs):
        return self.dropout(self.norm(self.linear(inputs)))


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def test_a_frozen_batch_norm_stays_frozen_through_a_run(samples):
    model = FrozenNorm()
    before = modes(model)
    in_training = []

    class KeepsModes(TrainerCallback):
        def on_train_step_end(self, trainer, **kwargs):
            in_training.append(modes(trainer.get_model()))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.MSELoss(), optimizer, callbacks=[KeepsModes])
    trainer.train(samples(4), num_epochs=2, eval_dataset=samples(2))

    assert before["norm"] is False
    assert before["linear"] is True
    assert in_training == [before, before]
    assert modes(model) == before
    assert model.norm.num_batches_tracked == 0


def test_evaluate_puts_all_modules_back_into_the_modes_they_had(samples):
    model = FrozenNorm()
    before = modes(model)
    during = []

    class KeepsModes(TrainerCallback):
        def on_eval_step_end(self, trainer, **kwargs):
            during.append(any(modes(trainer.get_model()).values()))

    Trainer(model, nn.MSELoss(), None, callbacks=[KeepsModes]).evaluate(samples(2))

    assert during == [False]
    assert modes(model) == before


def test_an_evaluation_in_the_middle_of_an_epoch_changes_nothing_else(
    create_trainer, noise, create_classifier
):
    """Defect 12: dropout and batch norm were off for the rest of the epoch."""

    class Evaluates(TrainerCallback):
        def on_train_step_end(self, trainer, **kwargs):
            trainer._run_eval_epoch(trainer._eval_dataloader, is_intermediate=True)
            assert all(modes(trainer.get_model()).values())

    def train(callbacks):
        model = create_classifier(dropout=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(
            model, nn.CrossEntropyLoss(), optimizer, callbacks=callbacks, seed=1
        )
        history = trainer.train(noise(20), num_epochs=2, eval_dataset=noise(10))
        return model[0].weight, history.get_metric_values("train_loss_epoch"), history

    weight, losses, _ = train(())
    same_weight, same_losses, history = train([Evaluates])

    assert torch.equal(weight, same_weight)
    assert losses == same_losses
    assert len(history.get_metric_values("intermediate_eval_loss")) == 6


def test_modes_come_back_also_when_an_evaluation_fails(create_trainer, samples):
    """Defect 12: an evaluation that raised left its modes behind."""

    class Fails(Trainer):
        def calculate_eval_batch_loss(self, batch):
            raise RuntimeError("broken")

    trainer = create_trainer(trainer_class=Fails)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train(samples(2), num_epochs=1, eval_dataset=samples(2))

    assert trainer.model.training


def test_an_evaluation_can_be_limited_to_some_batches(create_trainer, samples):
    class Limits(TrainerCallback):
        def on_eval_epoch_start(self, trainer, **kwargs):
            trainer.eval_batch_limit = 2

        def on_eval_step_end(self, trainer, **kwargs):
            batches.append(trainer.run_history.current_epoch)

    batches = []
    create_trainer([Limits]).train(
        samples(2), num_epochs=1, eval_dataset=samples(8), per_device_batch_size=2
    )

    assert batches == [1, 1]


# --- data of other kinds


class Stream(IterableDataset):
    """Yields inputs of 1 and targets of 0; its length is unknown."""

    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __iter__(self):
        for _ in range(self.num_samples):
            yield torch.ones(1), torch.zeros(1)


class StreamWithLength(Stream):
    def __init__(self, num_samples, length):
        super().__init__(num_samples)
        self.length = length

    def __len__(self):
        return self.length


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_of_unknown_length_ends_the_epoch_where_it_ends(
    create_trainer, counter, num_workers
):
    """Defect 37: iterable datasets could not be used."""
    trainer = create_trainer([counter])

    trainer.train(
        Stream(5),
        num_epochs=2,
        eval_dataset=Stream(3),
        per_device_batch_size=2,
        train_dataloader_kwargs={"num_workers": num_workers},
    )

    assert counter.updates == [3, 3]
    assert trainer.model.weight.item() == 0.5**6
    assert trainer.num_samples_seen == 10
    assert trainer.run_config.num_update_steps_per_epoch is None
    values = trainer.run_history.get_metric_values("eval_loss_epoch")
    assert values == [0.25**3, 0.25**6]


@pytest.mark.parametrize(("limit", "expected"), [(2, [2]), (3, [3]), (4, [3, 1])])
def test_a_limit_ends_a_run_on_a_stream(create_trainer, counter, limit, expected):
    trainer = create_trainer([counter])

    trainer.train(
        Stream(5), num_epochs=3, per_device_batch_size=2, max_num_train_steps=limit
    )

    assert counter.updates == expected
    assert trainer.model.weight.item() == 0.5**limit


def test_the_last_window_of_a_stream_is_scaled_by_what_it_holds(
    create_trainer, counter
):
    """Defect 26: also where nobody knows that it is the last."""
    trainer = create_trainer([counter])

    trainer.train(
        Stream(7),
        num_epochs=1,
        per_device_batch_size=2,
        gradient_accumulation_steps=3,
    )

    assert counter.updates == [2]  # of 6 samples and of 1
    assert trainer.model.weight.item() == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("length", [4, 40])
@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_a_stream_may_be_longer_or_shorter_than_it_says(
    create_trainer, counter, length
):
    trainer = create_trainer([counter])

    trainer.train(
        StreamWithLength(8, length),
        num_epochs=1,
        per_device_batch_size=1,
        gradient_accumulation_steps=3,
    )

    assert counter.updates == [3]
    assert trainer.model.weight.item() == pytest.approx(0.125, rel=1e-6)


def test_an_empty_stream_is_an_error(create_trainer):
    """Defect 59: without a batch, a loss of NaN was recorded silently."""
    with pytest.raises(ValueError, match="yielded no batch"):
        create_trainer().train(Stream(0), num_epochs=1)


def test_a_ready_loader_is_used_as_it_is(create_trainer, noise, counter):
    inputs, _ = noise(4).tensors
    dataset = TensorDataset(inputs[:, :1], inputs[:, :1])
    seen = []

    class KeepsBatches(Trainer):
        def calculate_train_batch_loss(self, batch):
            seen.append(batch[0])
            return super().calculate_train_batch_loss(batch)

    loader = DataLoader(
        dataset,
        batch_size=3,
        shuffle=True,
        generator=torch.Generator().manual_seed(4),
    )
    trainer = create_trainer([counter], trainer_class=KeepsBatches)
    trainer.train(loader, num_epochs=1, eval_dataset=DataLoader(dataset, batch_size=4))

    again = DataLoader(
        dataset,
        batch_size=3,
        shuffle=True,
        generator=torch.Generator().manual_seed(4),
    )
    assert all(map(torch.equal, seen, [batch[0] for batch in again]))
    assert trainer.run_config.train_per_device_batch_size == 3
    assert trainer.run_config.eval_per_device_batch_size == 4
    assert counter.updates == [2]


def test_any_iterable_of_batches_can_come_from_an_override(create_trainer, counter):
    """Defect 37: an iterable without the attributes of a DataLoader failed."""

    class OwnLoader(Trainer):
        def create_train_dataloader(self, batch_size, train_dl_kwargs=None):
            return [(torch.ones(2, 1), torch.zeros(2, 1))] * 3

    trainer = create_trainer([counter], trainer_class=OwnLoader)
    trainer.train(None, num_epochs=2, gradient_accumulation_steps=2)

    assert counter.updates == [2, 2]
    assert trainer.model.weight.item() == 0.5**4
    assert trainer.run_config.train_per_device_batch_size == 8


# --- what is unusual, and works


def test_a_seed_may_be_a_number_of_numpy_found_104(noise):
    def train(seed):
        model = nn.Linear(6, 3, bias=False)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, (), seed=seed)
        trainer.train(noise(8), 1, per_device_batch_size=2)
        assert trainer.seed == 3
        return model.weight

    assert torch.equal(train(np.int64(3)), train(3))


def test_a_seed_that_is_no_whole_number_is_refused(create_trainer):
    with pytest.raises(TypeError, match=r"seed must be a whole number, got 0\.5"):
        create_trainer(seed=0.5)


class SignDescent(torch.optim.Optimizer):
    """Moves each weight by a fixed step; its groups have no ``lr``."""

    def __init__(self, parameters):
        super().__init__(parameters, {"stride": 0.25})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["stride"] * parameter.grad.sign()


class HalvesStride(StatefulSchedulerBase):
    def __init__(self, optimizer):
        super().__init__(optimizer, "stride")

    def get_updated_values(self, num_updates):
        return 0.25 * 0.5**num_updates


def test_an_optimizer_need_not_have_a_learning_rate_found_104(create_trainer, samples):
    trainer = create_trainer()
    trainer.optimizer = SignDescent(trainer.model.parameters())

    trainer.train(samples(2), num_epochs=2, create_scheduler_fn=HalvesStride)
    assert trainer.model.weight.item() == 1 - 0.25 - 0.125

    trainer.train(samples(2), num_epochs=1, create_scheduler_fn=HalvesStride)
    assert trainer.model.weight.item() == 1 - 0.25 - 0.125 - 0.25


@dataclass(frozen=True)
class FrozenError(Exception):
    code: int


@pytest.mark.parametrize("method", ["train", "evaluate"])
def test_an_error_that_cannot_be_written_to_is_raised_as_it_is_found_104(
    create_trainer, samples, capsys, method
):
    def fail(outputs, targets):
        raise FrozenError(3)

    trainer = create_trainer()
    trainer.loss_func = fail
    arguments = (1,) if method == "train" else ()

    with pytest.raises(FrozenError) as caught:
        getattr(trainer, method)(samples(2), *arguments)

    assert caught.value.code == 3
    assert "FrozenInstanceError" not in capsys.readouterr().out
    assert "The run ended in epoch 1" in caught.value.__notes__[0]


def test_an_evaluation_after_a_run_that_could_not_start(create_trainer, samples):
    trainer = create_trainer()
    with pytest.raises(ValueError, match="no batches"):
        trainer.train(samples(4), 1, train_dataloader_kwargs={"drop_last": True})

    assert trainer.evaluate(samples(4)) == {"evaluation_loss": 1.0}
