"""Predictions, one batch after the other."""

import gc
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import At, create_trainer

from pytorch_accelerated.trainer import Trainer


class KeepsSizes(Trainer):
    sizes = ()

    def calculate_predictions(self, batch):
        self.sizes = [*self.sizes, len(batch[0])]
        return super().calculate_predictions(batch)

    def calculate_eval_batch_loss(self, batch):
        self.sizes = [*self.sizes, len(batch[0])]
        return super().calculate_eval_batch_loss(batch)


def data(count):
    inputs = torch.arange(float(count)).unsqueeze(1)
    return TensorDataset(inputs, inputs)


def create(callbacks=(), precision="no"):
    return create_trainer(
        callbacks,
        model=nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)),
        lr=1e-3,
        trainer_class=KeepsSizes,
        accelerator_kwargs={"mixed_precision": precision},
    )


def iterate():
    trainer = create()
    batches = list(trainer.iterate_predictions(data(11), 2))
    whole = trainer.predict(data(11), 2)
    return {
        "lengths": [len(batch) for batch in batches],
        "same": torch.equal(torch.cat(batches), whole),
        "whole": torch.equal(whole, trainer.model.eval()(data(11).tensors[0])),
        "plain": not any(batch.requires_grad for batch in batches),
    }


@pytest.mark.parametrize("num_processes", [1, 2])
def test_batches_come_in_order_and_together_are_all_predictions(
    on_processes, num_processes
):
    for result in on_processes(num_processes, iterate):
        assert sum(result["lengths"]) == 11
        assert max(result["lengths"]) == 2 * num_processes
        assert result["same"]
        assert result["whole"]
        assert result["plain"]


def test_what_is_left_half_way_gives_the_model_back():
    trainer = create(precision="bf16")
    for _ in trainer.iterate_predictions(data(9), 2):
        assert not trainer.model.training
        # What the caller does with a batch is its own.
        assert torch.is_grad_enabled()
        assert "forward" in vars(trainer.model)
        with pytest.raises(RuntimeError, match=r"train\(\) was called while predict"):
            trainer.train(data(4), 1)
        trainer.evaluate(data(4), 2)
        break
    assert all(module.training for module in trainer.model.modules())
    assert "forward" not in vars(trainer.model)
    assert not trainer._run.is_under_way

    opened = trainer.iterate_predictions(data(9))
    next(opened)
    del opened
    gc.collect()
    trainer.train(data(4), 1)
    with pytest.raises(ZeroDivisionError):
        [1 / 0 for _ in trainer.iterate_predictions(data(9))]
    trainer.train(data(4), 1)


def test_predictions_amid_a_run_leave_it_as_it_was():
    def predict(trainer, **kwargs):
        next(trainer.iterate_predictions(data(9)))

    with torch.random.fork_rng():
        weights = []
        for callbacks in ((), (At(on_train_step_end=predict),)):
            torch.manual_seed(1)
            trainer = create(callbacks)
            trainer.train(data(8), 2, data(4), per_device_batch_size=2)
            weights.append(trainer.model[0].weight.item())
    assert weights[0] == weights[1]


def test_two_are_gone_through_one_after_the_other_and_nothing_is_refused_at_once():
    trainer = create()
    pairs = zip(
        trainer.iterate_predictions(data(9)),
        trainer.iterate_predictions(data(9)),
        strict=True,
    )
    with pytest.raises(RuntimeError, match="one after the other"):
        list(pairs)
    del pairs
    gc.collect()
    assert not trainer._run.is_under_way
    with pytest.raises(ValueError, match="A dataset or a DataLoader is needed"):
        trainer.iterate_predictions(None)


def sizes_of(act):
    """Return the sizes of the batches after each of some runs."""
    trainer, found = create(), []
    for run in (
        lambda: None,
        lambda: trainer.train(data(4), 1, per_device_batch_size=3),
        lambda: trainer.train(data(4), 1, train_dataloader_kwargs={"batch_size": 4}),
        lambda: trainer.train(DataLoader(data(4), batch_size=2), 1),
        lambda: trainer.train(data(4), 1, data(4), 2, eval_per_device_batch_size=6),
        lambda: trainer.train(data(4), 1, None, 2, eval_per_device_batch_size=7),
        lambda: trainer.evaluate(data(40), 9),
        lambda: trainer.evaluate(data(40), dataloader_kwargs={"batch_size": 5}),
    ):
        run()
        trainer.sizes = []
        act(trainer)
        found.append(trainer.sizes[0])
    return found


@pytest.mark.parametrize(
    "act",
    [lambda trainer: trainer.predict(data(40)), lambda t: t.evaluate(data(40))],
    ids=["predict", "evaluate"],
)
def test_the_size_of_batches_is_that_of_the_last_run(act):
    assert sizes_of(act) == [8, 3, 4, 2, 6, 7, 9, 5]


def test_the_code_of_the_page_writes_predictions_to_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "loop.md").read_text()
    trainer, dataset = create(), data(10)
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, {"trainer": trainer, "dataset": dataset})
    files = sorted(tmp_path.glob("predictions_*.safetensors"))
    read = [safetensors.torch.load_file(file)["outputs"] for file in files]
    assert len(read) == 2
    assert torch.equal(torch.cat(read), trainer.predict(dataset))
