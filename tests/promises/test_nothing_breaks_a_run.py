"""What looks at a run, or is tried before it, breaks nothing: not even if it fails."""

import copy
import os
import sys
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from toys import At, Sent, Stream, create_trainer, ones

from pytorch_accelerated.callbacks import (
    LogMetricsCallback,
    PreemptionCallback,
    ProgressBarCallback,
    RecordHistoryCallback,
    ReportCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    SwaCallback,
    ThroughputCallback,
    TrackerCallback,
    UnfreezeCallback,
)
from pytorch_accelerated.checkpoint import save_weights
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.metrics import EpochMetrics
from pytorch_accelerated.tracking import InMemoryRunHistory
from pytorch_accelerated.trainer import DEFAULT_CALLBACKS, Trainer


class OddHistory(InMemoryRunHistory):
    """Has values without an epoch and a step."""

    def update_metric(self, metric_name, metric_value):
        self._metrics[self._full_name(metric_name)].append(metric_value)


ODD = (torch.tensor(1 + 2j), np.array("text"), dict, 10**400, "text", None)


def record_odd_values(trainer, **kwargs):
    for number, value in enumerate(ODD):
        trainer.run_history.update_metric(f"précision {number}", value)


class Tee:
    """What scripts put in the place of a stream."""

    encoding = "ascii"

    def write(self, text):
        text.encode(self.encoding)

    def flush(self):
        pass


@pytest.mark.filterwarnings("ignore:The report of the run")  # an int too large for it
@pytest.mark.parametrize("history", [InMemoryRunHistory, OddHistory])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_odd_values_streams_and_histories_end_no_run(
    monkeypatch, tmp_path, history, stream
):
    callbacks = [
        At(on_train_epoch_end=record_odd_values),
        *DEFAULT_CALLBACKS,
        ThroughputCallback(),
        TrackerCallback(Sent()),
        ReportCallback(tmp_path / "report.html"),
    ]
    trainer = create_trainer(callbacks, run_history=history())
    monkeypatch.setattr(sys, stream, Tee())
    # The length of the loader is that of a stream without one.
    trainer.train(ones(4), 2, DataLoader(Stream(ones(4)), batch_size=2))
    assert len(list(trainer.run_history.get_metric_values("eval_loss_epoch"))) == 2


def test_all_that_look_at_a_run_do_so_together(capsys, tmp_path):
    """Names of one were missing in the report of another."""
    path = tmp_path / "report.html"
    callbacks = [
        *DEFAULT_CALLBACKS,
        RecordHistoryCallback(tmp_path / "history.jsonl", every_n_updates=1),
        ThroughputCallback(),
        TrackerCallback(Sent(), every_n_updates=1),
        StepBasedEvaluationCallback(1),
        ReportCallback(path),
    ]
    trainer = create_trainer(callbacks)
    trainer.train(ones(4), 2, ones(2), 2)
    trainer.evaluate(ones(2))
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("epoch"))
    assert header.split().count("train_loss") == 1
    assert {"lr", "time"} < {*header.split()}
    assert "learning_rate" not in header
    page = path.read_text()
    for name in trainer.run_history.get_metric_names():
        label = name.removeprefix("evaluation_").removeprefix("intermediate_eval_")
        assert label.removesuffix("_epoch").removeprefix("train_") in page


def test_a_report_says_the_words_of_an_error_and_gives_warnings_back(tmp_path):
    def fail(trainer, **kwargs):
        warnings.showwarning("by hand", UserWarning, "file", 1, file=sys.stderr)
        raise RuntimeError("nothing was running there")

    show = warnings.showwarning
    report = ReportCallback(tmp_path / "report.html")
    trainer = create_trainer([report, At(on_train_epoch_end=fail)])
    with pytest.raises(RuntimeError):
        trainer.train(ones(1), 1)
    assert "nothing was running there" in (tmp_path / "report.html").read_text()
    assert warnings.showwarning is show


def test_a_resumed_run_logs_and_sends_what_is_new(tmp_path):
    class Log(LogMetricsCallback):
        logged = ()

        def log_metrics(self, trainer, metrics):
            self.logged = [*self.logged, metrics]

    class Elsewhere(OddHistory):
        """Keeps its metrics elsewhere, and is empty when a run is resumed."""

        def state_dict(self):
            return {"current_epoch": self.current_epoch, "current_step": 0}

        def load_state_dict(self, state):
            self._current_epoch = state["current_epoch"]

    def end(trainer, **kwargs):
        if trainer.num_updates == 3:
            raise KeyboardInterrupt

    def train(history, *others, **kwargs):
        log, sends = Log(), Sent()
        saving = SaveTrainingStateCallback(tmp_path / history.__name__, 1)
        callbacks = [log, TrackerCallback(sends), saving, *others]
        trainer = create_trainer(callbacks, run_history=history())
        trainer.train(ones(1), 4, ones(1), **kwargs)
        steps = [step for step, sent in sends.sent if "train_loss_epoch" in sent]
        return log.logged, steps

    for history in (InMemoryRunHistory, Elsewhere):
        with pytest.raises(KeyboardInterrupt):
            train(history, At(on_train_step_end=end))
        logged, steps = train(history, resume_from="auto")
        assert [list(metrics) for metrics in logged[:1]] == [["train_loss_epoch"]]
        assert sum("train_loss_epoch" in metrics for metrics in logged) == 2
        assert steps == [3, 4]


def test_a_state_of_after_the_training_of_an_epoch_has_lost_no_metric(tmp_path):
    """That they count only what comes from there was warned of, where nothing came."""
    saves = At(on_train_epoch_end=lambda t, **_: t.save_training_state(tmp_path / "s"))

    def train(*callbacks, **kwargs):
        metrics = {"largest": lambda predictions, targets: predictions.max()}
        trainer = create_trainer(callbacks, train_metrics=metrics)
        history = trainer.train(ones(2), 2, ones(1), **kwargs)
        return history.get_metric_values("train_largest_epoch")

    assert train(saves) == train(resume_from=tmp_path / "s")


def test_an_evaluation_that_fails_amid_a_run_ends_nothing_of_it(tmp_path):
    """What was caught made the run one that has failed: nothing final was saved."""
    saving = SaveTrainingStateCallback(tmp_path / "states")
    bar, signals = ProgressBarCallback(), PreemptionCallback()
    seen = []

    def evaluate(trainer, **kwargs):
        with pytest.raises(TypeError):
            trainer.evaluate([1])
        is_there = (tmp_path / "states" / ".lock").exists()
        seen.append((is_there, bar.pbar is not None, bool(signals._replaced)))

    trainer = create_trainer([saving, bar, signals, At(on_train_step_end=evaluate)])
    trainer.train(ones(1), 1)
    assert seen == [(True, True, True)]
    assert not trainer.has_failed
    assert os.listdir(tmp_path / "states") == ["final"]


def test_empty_tensors_are_each_in_the_file(tmp_path):
    state = {"a": torch.empty(0), "b": torch.empty(0), "c": torch.empty(2, 0)}
    save_weights(state, tmp_path / "weights.safetensors")
    assert load_file(tmp_path / "weights.safetensors").keys() == state.keys()


def test_what_cannot_be_rehearsed_leaves_the_trainer_as_it_was():
    trainer = create_trainer()
    trainer.odd = {"values": torch.ones(1).expand(3)}  # cannot be put back
    trainer.lazy = nn.LazyLinear(1)
    history, handler = trainer.run_history, trainer.callback_handler
    with pytest.raises(ValueError, match="uninitialized"):
        trainer.summary(ones(1))
    assert "print" not in vars(trainer)
    assert trainer.run_history is history
    assert trainer.callback_handler is handler
    compiled = []
    torch.compile(torch.square, backend=lambda graph, _: compiled.append(1) or graph)(
        torch.ones(1)
    )
    assert compiled  # and is not left to be eager for good


class OnlyOnTheFirst(IterableDataset):
    is_split_by_process = True

    def __iter__(self):
        rank = int(os.environ["RANK"])
        return iter([] if rank else [(torch.ones(2, 1), torch.zeros(2, 1))])


@dataclass
class Output:
    logits: torch.Tensor


class WithOutput(Trainer):
    def calculate_metric_inputs(self, batch, batch_output):
        outputs, targets = super().calculate_metric_inputs(batch, batch_output)
        return Output(outputs), targets


def evaluate_on_one(function):
    trainer = create_trainer(trainer_class=WithOutput, metrics={"f": function})
    return trainer.evaluate(DataLoader(OnlyOnTheFirst(), batch_size=None))


def test_a_process_without_batches_takes_part_in_a_metric_of_all(on_processes):
    """The other one waited for it until the time was over."""
    results = on_processes(2, evaluate_on_one, lambda p, t: float((p.logits - t).sum()))
    assert [result["evaluation_f"] for result in results] == [2.0, 2.0]


def test_inputs_of_metrics_hold_no_graph_and_are_copied_by_reference():
    metrics = EpochMetrics({"f": len}, torch.device("cpu"))
    logits = torch.ones(2, requires_grad=True) * 2
    metrics.update(2, (Output(logits), torch.ones(2)))
    ((output, _),) = metrics._inputs
    assert not output.logits.requires_grad
    twin = copy.deepcopy(metrics)
    assert twin._inputs is not metrics._inputs
    assert twin._inputs[0] is metrics._inputs[0]


def test_a_metric_that_changes_what_it_is_given_changes_no_other():
    metrics = {
        "zeroed": lambda predictions, targets: predictions.zero_().sum(),
        "sum": lambda predictions, targets: predictions.sum(),
    }
    trainer = create_trainer(metrics=metrics)
    assert trainer.evaluate(ones(3))["evaluation_sum"] == 3


def test_a_callback_that_adds_parameters_later_has_them_in_the_schedule():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    freezer = ModelFreezer(model)
    freezer.freeze()
    optimizer = torch.optim.SGD(freezer.get_trainable_parameters(), lr=0.1)
    callbacks = [UnfreezeCallback(freezer, {2: 0})]
    trainer = create_trainer(callbacks, model=model, optimizer=optimizer)
    create_scheduler_fn = partial(LambdaLR, lr_lambda=lambda number: 1 / (1 + number))
    trainer.train(ones(1), 3, create_scheduler_fn=create_scheduler_fn)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.025]


def test_batch_norms_keep_their_momentum_if_measuring_them_fails():
    class Fails(Trainer):
        num_losses = 0

        def calculate_train_batch_loss(self, batch):
            self.num_losses += 1
            if self.num_losses > 2:
                raise RuntimeError("measuring fails")
            return super().calculate_train_batch_loss(batch)

    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    trainer = create_trainer([SwaCallback(1)], model=model, trainer_class=Fails)
    data = TensorDataset(torch.randn(4, 1), torch.zeros(4, 1))
    with pytest.raises(RuntimeError, match="measuring fails"):
        trainer.train(data, 2)
    assert model[0].momentum == 0.1


def test_the_file_of_a_history_has_what_is_left_after_a_deletion(tmp_path):
    def delete(trainer, **kwargs):
        if trainer.run_history.current_epoch == 3:
            trainer.run_history.delete_metric("train_loss_epoch")

    path = tmp_path / "history.jsonl"
    deletes = At(on_training_run_epoch_end=delete)
    trainer = create_trainer([RecordHistoryCallback(path), deletes])
    history = trainer.train(ones(1), 5)
    written = InMemoryRunHistory.load_jsonl(path).records("train_loss_epoch")
    assert written == history.records("train_loss_epoch")
    assert [record.epoch for record in written] == [4, 5]


def test_a_run_that_cannot_be_made_forgets_no_history():
    trainer = create_trainer()
    trainer.train(ones(1), 1)
    with pytest.raises(ValueError, match="num_workers"):
        trainer.train(ones(1), 1, train_dataloader_kwargs={"num_workers": -1})
    assert trainer.run_history.get_metric_values("train_loss_epoch") == [1.0]


def count_items(folder):
    class Counts(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            return {**output, "num_items_in_batch": len(batch[0])}

    trainer = create_trainer([ThroughputCallback()], trainer_class=Counts)
    trainer.train(ones(7), 1, None, 3)
    history = trainer.run_history
    items = history.get_latest_metric("train_items_per_second")
    return items / history.get_latest_metric("train_samples_per_second")


def test_what_only_keeps_others_company_is_no_throughput(on_processes, tmp_path):
    assert on_processes(2, count_items, tmp_path) == pytest.approx([1, 1])
