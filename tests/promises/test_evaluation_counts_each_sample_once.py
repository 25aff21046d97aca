"""R9: each sample counts once in an evaluation, on any number of processes."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from toys import OneByOne, noise, seeded

from pytorch_accelerated.callbacks import MoveModulesToDeviceCallback
from pytorch_accelerated.data import BatchPlan
from pytorch_accelerated.trainer import Trainer

NUM_CLASSES = 3


# ------------------------------------------------------------ the arithmetic, for all


def all_cases():
    for length in range(1, 41):
        for batch_size in range(1, 10):
            for num_processes in (1, 2, 3):
                yield length, batch_size, num_processes


def test_the_plan_gives_each_sample_to_one_batch_of_one_process():
    num_refused = 0
    for length, batch_size, num_processes in all_cases():
        steps = math.ceil(length / (num_processes * batch_size))
        if num_processes > 1 and length < num_processes * steps:
            num_refused += 1
            with pytest.raises(ValueError, match=f"at least {num_processes * steps}"):
                BatchPlan(length, batch_size, num_processes, even=True)
            continue
        plan = BatchPlan(length, batch_size, num_processes, even=True)
        assert len(plan) == steps  # on every process, so none waits for another
        positions, sizes = [], []
        for step in range(steps):
            for process in range(num_processes):
                first, last = plan.bounds(step, process)
                positions += range(first, last)
                sizes.append(last - first)
        assert positions == list(range(length))
        assert min(sizes) >= 1
        assert max(sizes) <= batch_size
        if num_processes > 1:
            assert max(sizes) - min(sizes) <= 1
    assert num_refused > 0
    with pytest.raises(ValueError, match="Use a larger batch size or fewer processes"):
        BatchPlan(5, 1, 3, even=True)


# ----------------------------------------------------------------- real evaluations


def classified(length):
    return OneByOne(noise(length, 4, seed=length))


def metrics_named(prefix=""):
    return MetricCollection(
        {
            f"{prefix}accuracy": MulticlassAccuracy(NUM_CLASSES),
            f"{prefix}f1": MulticlassF1Score(NUM_CLASSES),
        }
    )


class WithMetrics(Trainer):
    """Keeps metrics of torchmetrics, and gathers what each batch is about."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metrics = metrics_named()
        self.gathered = []

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        self.metrics.update(output["model_outputs"], batch[1])
        self.gathered.append(self.gather({"inputs": batch[0], "targets": [batch[1]]}))
        return output

    def eval_epoch_end(self):
        for name, value in self.metrics.compute().items():
            self.run_history.update_metric(name, value)
        self.metrics.reset()


def create_model():
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, NUM_CLASSES)
        )
    )


def create_trainer(callbacks=(MoveModulesToDeviceCallback,), **kwargs):
    return WithMetrics(create_model(), nn.CrossEntropyLoss(), None, callbacks, **kwargs)


def evaluate(length, batch_size):
    trainer = create_trainer()
    dataset, no_workers = classified(length), {"num_workers": 0}
    metrics = trainer.evaluate(dataset, batch_size, dataloader_kwargs=no_workers)
    predictions = trainer.predict(dataset, batch_size, dataloader_kwargs=no_workers)
    inputs = torch.cat([batch["inputs"] for batch in trainer.gathered])
    targets = torch.cat([batch["targets"][0] for batch in trainer.gathered])
    return {
        "metrics": metrics,
        "predictions": predictions,
        "inputs": inputs,
        "targets": targets,
        "modes": [module.training for module in trainer.model.modules()],
    }


def expected_of(length):
    inputs, targets = noise(length, 4, seed=length).tensors
    with torch.no_grad():
        outputs = create_model().eval()(inputs)
    metrics = metrics_named("evaluation_")(outputs, targets)
    values = {name: value.item() for name, value in metrics.items()}
    loss = nn.functional.cross_entropy(outputs.double(), targets).item()
    return inputs, targets, outputs, {"evaluation_loss": loss, **values}


def check(result, length):
    inputs, targets, outputs, metrics = expected_of(length)
    assert result["metrics"] == pytest.approx(metrics, rel=1e-5)
    assert torch.equal(result["inputs"], inputs)  # once each, and in order
    assert torch.equal(result["targets"], targets)
    torch.testing.assert_close(result["predictions"], outputs)
    assert all(result["modes"])


FEW = [(1, 1), (7, 3), (12, 4), (13, 4), (40, 9)]
MANY = [(length, size) for length in range(1, 41) for size in (1, 2, 3, 5, 9)]


def check_on(on_processes, num_processes, cases):
    possible = [
        (length, size)
        for length, size in cases
        if length >= num_processes * math.ceil(length / (num_processes * size))
    ]
    assert len(possible) > len(cases) / 3
    runs = on_processes(num_processes, lambda: [evaluate(*case) for case in possible])
    for process in runs:
        for result, (length, _) in zip(process, possible, strict=True):
            check(result, length)


def test_one_process_counts_each_sample_once():
    for length, batch_size in FEW:
        check(evaluate(length, batch_size), length)


def test_two_processes_count_each_sample_once(on_processes):
    """Defect 50."""
    check_on(on_processes, 2, [*FEW, (2, 1), (3, 3), (11, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_count_each_sample_once_for_all_sizes(
    on_processes, num_processes
):
    check_on(on_processes, num_processes, MANY)


def test_too_few_samples_for_all_processes_are_refused_on_all_of_them(on_processes):
    def run():
        try:
            create_trainer().evaluate(classified(3), per_device_batch_size=1)
        except ValueError as error:
            return str(error)
        return ""

    for message in on_processes(2, run):
        assert "at least 4 samples are needed" in message


# ------------------------------------------------------------------------- gathering


def gather_all():
    trainer = create_trainer()
    rank = trainer._accelerator.process_index
    uneven = torch.arange(rank * 10, rank * 10 + 3 - rank * 2)  # 0, 1, 2 and 10
    nothing = torch.zeros(rank * 2, 2)
    padding_like = torch.full((rank + 1, 1), -1.0)
    return [
        trainer.gather(uneven),
        trainer.gather({"a": [uneven.float()], "b": (nothing,)}),
        trainer.gather(torch.tensor(float(rank))),
        trainer.gather(padding_like, padding_value=-1),
    ]


def test_gather_joins_what_has_another_length_on_each_process(on_processes):
    """Defects 50 and 53: rows that equal the padding value stay."""
    for flat, nested, scalars, padding_like in on_processes(2, gather_all):
        assert flat.tolist() == [0, 1, 2, 10]
        assert nested["a"][0].tolist() == [0.0, 1.0, 2.0, 10.0]
        assert nested["b"][0].shape == (2, 2)
        assert scalars.tolist() == [0.0, 1.0]
        assert padding_like.shape == (3, 1)


# ----------------------------------------------------------------------- predictions


def test_predict_needs_no_targets_and_records_nothing():
    trainer = create_trainer(callbacks=())
    inputs, _ = noise(7, 4).tensors
    for dataset in (TensorDataset(inputs), inputs, [{"input": row} for row in inputs]):
        predictions = trainer.predict(dataset, per_device_batch_size=3)
        expected = create_model().eval()(inputs)
        torch.testing.assert_close(predictions, expected.detach())
        assert not predictions.requires_grad
    assert trainer.run_history.get_metric_names() == set()


def test_what_is_predicted_can_be_chosen():
    class Probabilities(Trainer):
        def calculate_predictions(self, batch):
            logits = super().calculate_predictions(batch)
            return {"p": logits.softmax(1), "parts": (logits.argmax(1), batch[1])}

    dataset = noise(5, 4)
    trainer = Probabilities(create_model(), None, None, callbacks=())
    predictions = trainer.predict(dataset, per_device_batch_size=2)
    assert predictions["p"].sum(1).tolist() == pytest.approx([1.0] * 5)
    assert torch.equal(predictions["parts"][1], dataset.tensors[1])


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple
    loss: torch.Tensor | None = None


class ReturnsOutput(nn.Module):
    def forward(self, inputs):
        return Output(inputs * 2, (inputs, inputs + 1))


def predict_outputs():
    inputs = torch.arange(5.0).unsqueeze(1)
    trainer = Trainer(ReturnsOutput(), None, None, callbacks=())
    return vars(trainer.predict(inputs, per_device_batch_size=2))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_outputs_may_be_dataclasses_found_104(on_processes, num_processes):
    for predicted in on_processes(num_processes, predict_outputs):
        assert predicted["logits"].flatten().tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
        first, second = predicted["hidden"]
        assert torch.equal(first + 1, second)
        assert predicted["loss"] is None


def test_what_cannot_be_predicted_is_refused_found_104():
    class Words(Trainer):
        def calculate_predictions(self, batch):
            return {"p": batch[0], "text": "words"}

    with pytest.raises(TypeError, match=r"got a str\. Leave it out of"):
        Words(create_model(), None, None, callbacks=()).predict(classified(2))
    with pytest.raises(ValueError, match="empty"):
        create_trainer().predict([])
