"""A run that has too little memory for its batches ends as one with smaller ones."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import At, Keeps, Numbers, create_trainer, noise, overriding, seeded

from pytorch_accelerated.callbacks import (
    LimitBatchesCallback,
    SaveTrainingStateCallback,
)

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB"


def data(num_samples=44):
    inputs, _ = noise(num_samples, 5).tensors
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))


class ExhaustInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)


class SmallMemory(nn.Module):
    """Runs out of memory when it is trained on more samples than fit.

    It has what a pass changes besides gradients: batch norm's buffers, and the random
    state that dropout draws from.
    """

    def __init__(self, model, fits, where="forward", from_pass=0):
        super().__init__()
        self.model = model
        self.fits = fits
        self.where = where
        self.from_pass = from_pass
        self.num_passes = 0
        self.sizes = []

    def forward(self, inputs):
        if not self.training:
            return self.model(inputs)
        self.num_passes += 1
        outputs = self.model(inputs)
        if len(inputs) > self.fits and self.num_passes > self.from_pass:
            if self.where == "forward":
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            return ExhaustInBackward.apply(outputs)
        self.sizes.append(len(inputs))
        return outputs


def create_model(*layers):
    return seeded(lambda: nn.Sequential(nn.Linear(5, 6), *layers, nn.Linear(6, 1)))


def with_dropout_and_batch_norm():
    return create_model(nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3))


def train(model, batch_size, accumulation=1, dataset=None, callbacks=(), **kwargs):
    """Train for three epochs and return what the run ends with."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = create_trainer(callbacks, model=model, optimizer=optimizer, seed=3)
    history = trainer.train(
        data() if dataset is None else dataset,
        num_epochs=3,
        eval_dataset=data(10),
        per_device_batch_size=batch_size,
        eval_per_device_batch_size=5,
        gradient_accumulation_steps=accumulation,
        **kwargs,
    )
    return {
        "weights": {
            name.removeprefix("model."): value
            for name, value in model.state_dict().items()
        },
        "optimizer": [
            state["exp_avg"] for state in optimizer.state_dict()["state"].values()
        ],
        "losses": history.get_metric_values("train_loss_epoch"),
        "eval losses": history.get_metric_values("eval_loss_epoch"),
        "updates": trainer.num_updates,
        "samples": trainer.num_samples_seen,
        "random state": torch.get_rng_state(),
        "accumulation": trainer.run_config.gradient_accumulation_steps,
    }


halving = partial(train, halve_batch_if_out_of_memory=True)


def assert_same(run, expected):
    torch.testing.assert_close(run, expected, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_that_starts_too_large_equals_one_with_batches_that_fit(where, capsys):
    expected = train(with_dropout_and_batch_norm(), batch_size=4, accumulation=4)
    model = SmallMemory(with_dropout_and_batch_norm(), fits=4, where=where)
    run = halving(model, batch_size=16)
    assert_same(run, expected)
    assert "going on with 8, and gradient_accumulation_steps=2" in (
        capsys.readouterr().out
    )


def test_a_window_in_the_middle_of_an_epoch_is_done_again():
    """The memory suffices for a full epoch and three batches, then no more."""
    expected = train(create_model(), batch_size=4, accumulation=2)
    model = SmallMemory(create_model(), fits=2, from_pass=11 + 3)
    run = halving(model, batch_size=4, accumulation=2)
    # It ran out in the second batch of a window; 12 samples of that epoch are over.
    assert model.sizes[11:15] == [4, 4, 4, 2]
    assert run["accumulation"] == 4
    assert run["updates"] == expected["updates"]
    assert run["samples"] == expected["samples"] == 3 * 44
    torch.testing.assert_close(run["weights"], expected["weights"])
    assert run["losses"] == pytest.approx(expected["losses"], rel=1e-5)


class Numbered(Numbers):
    def __getitem__(self, index):
        return index, *data()[index]


def loss_of_numbered(self, batch):
    indices, inputs, targets = batch
    loss = self.loss_func(self.model(inputs), targets)
    return {"loss": loss, "batch_size": len(inputs), "index": indices}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_each_update_keeps_its_samples(drop_last, num_workers):
    def train_on_indices(model, **kwargs):
        noted, updates = [], []

        def note(trainer, batch_output, **kwargs):
            noted.extend(batch_output["index"].tolist())
            if trainer.num_updates > len(updates):
                updates.append(sorted(noted))
                noted.clear()

        trainer = create_trainer(
            [At(on_train_step_end=note)],
            lr=0.01,
            model=model,
            trainer_class=overriding(calculate_train_batch_loss=loss_of_numbered),
            seed=3,
        )
        loader = {"drop_last": drop_last, "num_workers": num_workers}
        trainer.train(
            Numbered(44),
            num_epochs=2,
            per_device_batch_size=6,
            gradient_accumulation_steps=2,
            train_dataloader_kwargs=loader,
            **kwargs,
        )
        return updates

    expected = train_on_indices(create_model())
    model = SmallMemory(create_model(), fits=1, from_pass=4)
    updates = train_on_indices(model, halve_batch_if_out_of_memory=True)
    # What a window had done before memory ran out is done again, and noted twice.
    assert [sorted(set(update)) for update in updates] == expected
    assert model.sizes[-1] == 1
    assert len({index for update in updates[4:] for index in update}) == (
        42 if drop_last else 44
    )


def test_augmentation_differs_before_and_after():
    class Noise(Numbers):
        def __getitem__(self, index):
            return torch.randn(5), torch.zeros(1)

    keep = Keeps("on_train_step_end", lambda trainer, batch, **_: batch[0])
    model = SmallMemory(create_model(), fits=2, from_pass=2)
    halving(model, 4, dataset=Noise(16), callbacks=[keep])
    first_epoch = torch.cat(keep.kept[: 2 + 4])
    assert len(first_epoch) == 16
    assert len(torch.unique(first_epoch, dim=0)) == 16


def test_the_default_is_an_error_that_names_the_option():
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(SmallMemory(create_model(), fits=4), batch_size=8)
    assert "halve_batch_if_out_of_memory" in "\n".join(caught.value.__notes__)


def test_batches_of_one_sample_cannot_be_made_smaller():
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        halving(SmallMemory(create_model(), fits=0), batch_size=3)


def test_other_errors_are_raised_as_they_are():
    for_other_inputs = nn.Linear(3, 1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        halving(for_other_inputs, batch_size=4)


def test_memory_that_runs_out_in_the_optimizer_ends_the_run():
    """Weights may have moved halfway by then: there is no way back."""

    def exhaust(trainer):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    trainer = create_trainer(
        model=create_model(), trainer_class=overriding(optimizer_step=exhaust)
    )
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train(data(), num_epochs=1, halve_batch_if_out_of_memory=True)


@pytest.mark.parametrize(
    ("dataset", "callbacks"),
    [(DataLoader(data(), batch_size=4), ()), (data(), [LimitBatchesCallback(2)])],
    ids=["a loader of the user's", "a limit on the batches"],
)
def test_what_cannot_be_made_smaller_is_refused(dataset, callbacks):
    with pytest.raises(ValueError, match="needs batches that the trainer makes"):
        halving(create_model(), batch_size=4, dataset=dataset, callbacks=callbacks)


def test_a_run_that_was_made_smaller_can_be_resumed(tmp_path):
    def callbacks():
        return [SaveTrainingStateCallback(tmp_path, save_every_n_steps=1)]

    def model():
        return SmallMemory(create_model(), fits=2, from_pass=5)

    expected = halving(model(), 4, callbacks=callbacks())
    # Saved after the first update with smaller batches, amid the first epoch.
    state = tmp_path / "step_6"
    run = train(
        model(), batch_size=2, accumulation=2, callbacks=callbacks(), resume_from=state
    )
    assert_same(run["weights"], expected["weights"])
    with pytest.warns(UserWarning, match="batch size 4 instead of 2"):
        run = halving(
            SmallMemory(create_model(), fits=2),
            4,
            callbacks=callbacks(),
            resume_from=state,
        )
    torch.testing.assert_close(run["weights"], expected["weights"])


class FitsOnMainProcess(SmallMemory):
    """Only the second process runs out of memory."""

    def forward(self, inputs):
        if torch.distributed.get_rank() == 0:
            return self.model(inputs)
        return super().forward(inputs)


def test_two_processes_make_their_batches_smaller_together(on_processes):
    def both():
        ends = []
        for where in ("forward", "backward"):
            model = FitsOnMainProcess(with_dropout_and_batch_norm(), 2, where)
            ends.append(halving(model, batch_size=8))
        expected = train(with_dropout_and_batch_norm(), batch_size=2, accumulation=4)
        later = FitsOnMainProcess(create_model(), fits=2, from_pass=4)
        ends.append(halving(later, batch_size=4))
        plain = train(create_model(), batch_size=4)
        return ends, expected, plain

    for (forward, backward, later), expected, plain in on_processes(2, both):
        assert_same(forward, expected)
        assert_same(backward, expected)
        assert later["accumulation"] == 2
        assert later["updates"] == plain["updates"]
        torch.testing.assert_close(later["weights"], plain["weights"])


class RemembersLastBatch(nn.Module):
    """Uses a buffer that DDP gives all processes the main process's value of."""

    def __init__(self):
        super().__init__()
        self.model = with_dropout_and_batch_norm()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, inputs):
        outputs = self.model(inputs - self.mean)
        if self.training:
            self.mean.copy_(inputs.mean(dim=0))
        return outputs


def test_nothing_else_changes_for_two_processes_with_enough_memory(on_processes):
    def both():
        cases = {"batch_size": 4, "accumulation": 2}
        return [
            train(RemembersLastBatch(), halve_batch_if_out_of_memory=halve, **cases)
            for halve in (False, True)
        ]

    for plain, guarded in on_processes(2, both):
        assert_same(guarded, plain)


class UsesOneLayerOnEachProcess(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 1) for _ in range(2)])

    def forward(self, inputs):
        return self.layers[torch.distributed.get_rank()](inputs)


def test_a_gradient_of_one_process_is_halved_by_two(on_processes):
    def one():
        torch.manual_seed(0)
        model = UsesOneLayerOnEachProcess()
        before = [layer.weight.detach().clone() for layer in model.layers]
        inputs = torch.ones(2, 5)
        with torch.no_grad():
            expected = [
                0.1 * (layer(inputs[:1]) - 3.0) * inputs[:1] for layer in model.layers
            ]
        trainer = create_trainer(model=model, lr=0.1, seed=3)
        trainer.train(
            TensorDataset(inputs, torch.full((2, 1), 3.0)),
            num_epochs=1,
            per_device_batch_size=1,
            halve_batch_if_out_of_memory=True,
        )
        moves = [
            b - layer.weight.detach()
            for b, layer in zip(before, model.layers, strict=True)
        ]
        return moves, expected

    for moves, expected in on_processes(2, one):
        # The gradient of (y - t)^2 is 2 (y - t) x, halved by the mean over processes.
        torch.testing.assert_close(moves, expected)


def test_an_end_without_a_way_out_comes_on_all_processes(on_processes):
    def one():
        model = FitsOnMainProcess(create_model(), fits=0)
        try:
            halving(model, batch_size=2)
        except Exception as error:
            return type(error).__name__, str(error)

    (first, text), (second, _) = on_processes(2, one)
    assert first == "RuntimeError"
    assert "Process 1 raised OutOfMemoryError" in text
    assert second == "OutOfMemoryError"
