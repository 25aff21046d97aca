"""Metrics of whole epochs, checked against torchmetrics and numpy on the whole set."""

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
)
from toys import At, Stream, overriding

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import ModelEmaCallback, StepBasedEvaluationCallback
from pytorch_accelerated.errors import StopTrainingError


def balanced_accuracy(predictions, targets):
    """A metric that is no mean over the samples."""
    hits = predictions.argmax(-1) == targets
    return float(np.mean([hits[targets == c].float().mean() for c in range(3)]))


METRICS = {
    "accuracy": MulticlassAccuracy(3, average="micro"),
    "auroc": MulticlassAUROC(3),
    "quality": torchmetrics.MetricCollection(
        {
            "f1": MulticlassF1Score(3),
            "precision": MulticlassPrecision(3),
            "confusion": MulticlassConfusionMatrix(3),
        }
    ),
    "balanced": balanced_accuracy,
    "count": lambda predictions, targets: len(targets),
}
# Used before, for something else.
METRICS["accuracy"].update(torch.zeros(9, 3), torch.ones(9).long())


def by_hand(model, dataset):
    """Return the metrics of all samples at once."""
    inputs, targets = dataset.tensors
    with torch.no_grad():
        outputs = model(inputs)
    f1, confusion = MulticlassF1Score(3), MulticlassConfusionMatrix(3)
    return {
        "accuracy": float((outputs.argmax(1) == targets).float().mean()),
        "auroc": MulticlassAUROC(3)(outputs, targets).item(),
        "quality_precision": MulticlassPrecision(3)(outputs, targets).item(),
        "quality_f1": f1(outputs, targets).item(),
        "quality_confusion": confusion(outputs, targets).tolist(),
        "balanced": balanced_accuracy(outputs, targets),
        "count": len(targets),
    }


def create_trainer(model, callbacks=(), lr=0.0, trainer_class=Trainer, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss = nn.CrossEntropyLoss()
    return trainer_class(model, loss, optimizer, callbacks, seed=1, **kwargs)


def assert_are(history, before, expected, after="", which=-1):
    for name, value in expected.items():
        found = history.get_metric_values(f"{before}{name}{after}")[which]
        assert np.allclose(found, value), (name, found, value)


def train_and_evaluate(model, dataset, num_processes):
    """Nothing is learned, so that the metrics of training are those of the model."""
    expected = by_hand(model, dataset)
    trainer = create_trainer(model, metrics=METRICS, train_metrics=True)
    batch_size = 8 // num_processes
    stream = DataLoader(Stream(dataset), batch_size)
    for data in (dataset, stream):
        history = trainer.train(data, 2, data, per_device_batch_size=batch_size)
        trainer.evaluate(data, per_device_batch_size=batch_size)
        assert_are(history, "evaluation_", expected)
        for epoch in (0, 1):
            assert_are(history, "train_", expected, "_epoch", epoch)
            assert_are(history, "eval_", expected, "_epoch", epoch)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_metrics_are_those_of_the_whole_set(
    num_processes, create_classifier, noise, on_processes
):
    """In the last step there is one sample, so that one of two processes has none."""
    arguments = (create_classifier(), noise(33), num_processes)

    on_processes(num_processes, train_and_evaluate, *arguments)


def test_evaluations_amid_a_run_have_metrics_of_their_own(
    create_classifier, noise, tmp_path
):
    dataset, other = noise(33), TensorDataset(*noise(40)[33:])
    model = create_classifier()
    average = ModelEmaCallback(decay=0.5, save_path=tmp_path / "ema.pt")
    evaluate = At(on_train_step_end=lambda trainer, **_: trainer.evaluate(other))
    callbacks = [evaluate, StepBasedEvaluationCallback(3), average]
    trainer = create_trainer(
        model, callbacks, lr=0.5, metrics=METRICS, train_metrics=True
    )
    history = trainer.train(dataset, 1, dataset, gradient_accumulation_steps=2)

    alone = create_trainer(
        create_classifier(), lr=0.5, metrics=METRICS, train_metrics=METRICS
    ).train(dataset, 1, gradient_accumulation_steps=2)
    for name in by_hand(model, dataset):
        found, expected = (
            each.get_metric_values(f"train_{name}_epoch") for each in (history, alone)
        )
        np.testing.assert_array_equal(found, expected)
    assert_are(history, "eval_", by_hand(model, dataset), "_epoch")
    ema = average.ema_model.module
    assert_are(history, "ema_model_eval_", by_hand(ema, dataset), "_epoch")
    assert_are(history, "evaluation_", by_hand(model, other))
    (record,) = history.records("intermediate_eval_balanced")
    assert (record.epoch, record.step) == (1, 1)
    assert not any(metric.update_called for metric in METRICS["quality"].values())


def stop_at(step, folder):
    def save_and_stop(trainer, **kwargs):
        if trainer.num_steps == step:
            trainer.save_training_state(folder)
            raise StopTrainingError("stopped")

    return At(on_train_step_end=save_and_stop)


def train_and_resume(create_classifier, dataset, folder, num_processes):
    def train(callbacks=(), **kwargs):
        model = create_classifier()
        trainer = create_trainer(model, callbacks, 0.1, train_metrics=METRICS)
        batch_size = 8 // num_processes
        return trainer.train(dataset, 2, per_device_batch_size=batch_size, **kwargs)

    expected = train()
    train([stop_at(9, folder)])
    resumed = train(resume_from=folder)

    assert resumed.get_metric_names() == expected.get_metric_names()
    for name in expected.get_metric_names():
        found, wanted = (each.get_metric_values(name) for each in (resumed, expected))
        np.testing.assert_array_equal(found, wanted, err_msg=name)
    assert expected.get_metric_values("train_count_epoch") == [33, 33]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_resumed_epoch_has_the_metrics_of_one_never_stopped(
    num_processes, create_classifier, noise, tmp_path, on_processes
):
    arguments = (create_classifier, noise(33), tmp_path / "state", num_processes)

    on_processes(num_processes, train_and_resume, *arguments)


def test_a_resumed_epoch_says_which_batches_its_new_metrics_have_seen(
    create_classifier, noise, tmp_path
):
    dataset, callbacks = noise(33), [stop_at(2, tmp_path / "state")]
    create_trainer(create_classifier(), callbacks).train(dataset, 1)
    counts = {name: METRICS[name] for name in ("count", "accuracy")}
    trainer = create_trainer(create_classifier(), train_metrics=counts)

    with pytest.warns(UserWarning, match="count only what comes from here"):
        history = trainer.train(dataset, 1, resume_from=tmp_path / "state")

    assert history.get_latest_metric("train_count_epoch") == 33 - 2 * 8


class ReturnsLoss(nn.Module):
    """Returns what models of transformers do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, labels):
        logits = self.model(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def named(samples):
    inputs, labels = zip(*samples, strict=True)
    return {"inputs": torch.stack(inputs), "labels": torch.stack(labels)}


def test_batches_with_names_and_outputs_with_logits_need_no_override(
    create_classifier, noise
):
    model, dataset = create_classifier(), noise(33)
    trainer = Trainer(ReturnsLoss(model), None, None, (), metrics=METRICS)

    found = trainer.evaluate(dataset, collate_fn=named)

    assert found["evaluation_balanced"] == by_hand(model, dataset)["balanced"]
    assert_are(trainer.run_history, "evaluation_", by_hand(model, dataset))


def test_an_override_says_what_metrics_are_given(create_classifier, noise):
    def calculate_metric_inputs(self, batch, batch_output):
        return batch_output["model_outputs"].argmax(1), batch[1], batch[1].float()

    def weighted(classes, targets, weights):
        return float(((classes == targets) * weights).sum() / weights.sum())

    model, dataset = create_classifier(), noise(33)
    trainer = create_trainer(
        model,
        trainer_class=overriding(calculate_metric_inputs=calculate_metric_inputs),
        metrics={"weighted": weighted},
    )
    classes, targets = model(dataset.tensors[0]).argmax(1), dataset.tensors[1]

    metrics = trainer.evaluate(dataset)

    assert metrics["evaluation_weighted"] == weighted(classes, targets, targets.float())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"metrics": [MulticlassAccuracy(3)]}, TypeError, 'such as {"accuracy": '),
        ({"metrics": MulticlassAccuracy(3)}, TypeError, 'such as {"accuracy": '),
        ({"metrics": {"a": MulticlassAccuracy}}, TypeError, "an instance"),
        ({"metrics": {"a": 0.5}}, TypeError, r"metrics\['a'\].*accelerated\[metrics\]"),
        ({"metrics": {"loss": balanced_accuracy}}, ValueError, "named 'loss'"),
        ({"train_metrics": True}, ValueError, "needs metrics"),
        ({"compute_metrics": {}}, TypeError, "Did you mean metrics?"),
    ],
)
def test_what_is_no_metric_is_refused_by_the_constructor(
    arguments, error, message, create_classifier
):
    with pytest.raises(error, match=message):
        create_trainer(create_classifier(), **arguments)


def test_errors_name_the_metric_and_what_it_was_given(create_classifier, noise):
    def fails(predictions, targets):
        raise KeyError("no such class")

    for metric in (MulticlassAccuracy(5), fails):
        trainer = create_trainer(create_classifier(), metrics={"top": metric})
        with pytest.raises(ValueError, match=r"'top' failed on .*\(., 3\)") as raised:
            trainer.evaluate(TensorDataset(*noise(33)[:8]))
        assert raised.value.__cause__ is not None


def test_a_step_without_outputs_or_targets_says_which_method_to_override(noise):
    class OwnStep(Trainer):
        def calculate_eval_batch_loss(self, batch):
            return {"loss": torch.zeros(()), "batch_size": 8, "balanced": 1.0}

    metrics = torchmetrics.MetricCollection({"balanced": MulticlassAccuracy(3)})
    trainer = OwnStep(nn.Linear(1, 1), None, None, (), metrics=metrics)
    with pytest.raises(ValueError, match="Override calculate_metric_inputs"):
        trainer.evaluate(noise(8))

    num_batches = []
    OwnStep.calculate_metric_inputs = lambda self, batch, output: (
        num_batches.append(1) or (batch[1], batch[1])
    )
    with pytest.raises(ValueError, match="a number named 'balanced'"):
        trainer.evaluate(noise(24))
    assert len(num_batches) == 1


class KeepsAll(torchmetrics.Metric):
    def __init__(self):
        super().__init__()
        self.add_state("all", [], dist_reduce_fx="cat")

    def update(self, predictions, targets):
        self.all.append(predictions)

    def compute(self):
        return len(torch.cat(self.all))


def test_nothing_of_the_graph_is_kept(create_classifier, noise):
    kept = []

    def look(trainer, **kwargs):
        metrics = trainer._run.means.metrics
        kept.extend([*metrics._inputs[-1], *metrics._metrics["all"].all])

    history = create_trainer(
        create_classifier(),
        [At(on_train_step_end=look)],
        train_metrics={"all": KeepsAll(), "balanced": balanced_accuracy},
    ).train(noise(33), 1)

    assert history.get_latest_metric("train_all_epoch") == 33
    assert kept
    assert not any(tensor.requires_grad for tensor in kept)
