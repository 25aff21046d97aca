import json
import math
import struct
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytorch_accelerated.tracking import (
    InMemoryRunHistory,
    MetricRecord,
    compare_histories,
    is_greater_better,
)


class Celsius(float):
    """A float of another type than float."""


@pytest.fixture
def history():
    return InMemoryRunHistory()


@pytest.fixture
def two_epoch_history(history):
    history.current_step = 10
    history.update_metric("train_loss_epoch", 0.5)
    history.update_metric("accuracy", 0.25)
    history._increment_epoch()
    history.current_step = 20
    history.update_metric("train_loss_epoch", 0.375)
    return history


def float_bits(value):
    return struct.pack("<d", value)


# --- a history of the user's own


def test_a_history_of_the_users_own_moves_forward_and_has_a_state(own_history):
    """Defect 44: a new abstract method broke the histories that users had written."""
    history = own_history()
    assert history.current_step == 0
    history.update_metric("loss", 1.0)
    for epoch in (4, 2):  # going back would lose metrics
        history._set_epoch(epoch)
        assert history.current_epoch == 4
        assert history.get_metric_values("loss") == [1.0]

    history.current_step = 40
    restored = own_history()
    restored.load_state_dict(history.state_dict())
    assert (restored.current_epoch, restored.current_step) == (4, 40)


# --- recording and reading


def test_names_keep_the_order_of_their_first_recording_and_equal_a_set(history):
    """Defect 45: the order of metrics depended on PYTHONHASHSEED."""
    recorded = [f"metric_{n}" for n in (7, 3, 9, 1, 5, 2)]
    for name in [*recorded, *reversed(recorded)]:
        history.update_metric(name, 1.0)

    assert list(history.get_metric_names()) == recorded
    assert history.get_metric_names() == set(recorded)


def test_reading_an_unknown_metric_creates_nothing(two_epoch_history):
    """Defect 45: a read created the metric, which crashed the logging later."""
    before = two_epoch_history.to_dict()

    assert two_epoch_history.get_metric_values("f1") == []
    assert two_epoch_history.records("f1") == []
    with pytest.raises(ValueError, match=r"'f1'.*so far: train_loss_epoch, accuracy"):
        two_epoch_history.get_latest_metric("f1")

    assert two_epoch_history.get_metric_names() == {"train_loss_epoch", "accuracy"}
    assert two_epoch_history.to_dict() == before
    assert "f1" not in two_epoch_history._metrics


def test_returned_lists_and_names_are_copies(two_epoch_history):
    """Defect 45: the lists returned were the history's own."""
    names = two_epoch_history.get_metric_names()
    two_epoch_history.get_metric_values("accuracy").append(99.0)
    two_epoch_history.records("accuracy").clear()
    two_epoch_history.to_dict()["metrics"]["accuracy"]["value"].append(99.0)
    two_epoch_history.update_metric("later", 1.0)

    assert two_epoch_history.get_metric_values("accuracy") == [0.25]
    assert names == {"train_loss_epoch", "accuracy"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        (0.1, 0.1),
        (True, 1),
        (Celsius(0.1), 0.1),
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.array(0.25), 0.25),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5]), 0.5),
        (torch.tensor(7), 7),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (math.inf, math.inf),
    ],
)
def test_numbers_of_any_kind_are_recorded_as_plain_python_numbers(
    history, value, expected
):
    history.update_metric("metric", value)

    recorded = history.get_latest_metric("metric")
    assert recorded == expected
    assert isinstance(recorded, float) is isinstance(expected, float)
    assert f"{recorded:.3f}" == f"{expected:.3f}"
    assert json.loads(json.dumps(recorded)) == expected
    if hasattr(value, "item"):
        # Found 112: scripts ask for it, as 0.1.61 kept the tensor itself.
        assert type(recorded.item()) is type(expected)
    assert history.to_dict()["metrics"]["metric"]["value"] == [expected]


def test_what_is_not_one_number_is_kept_as_it_was(history):
    """Found 111: a dictionary of scores was a TypeError."""
    scores = {"f1": torch.tensor(0.5), "acc": 0.75, "labels": ["a", "b"]}
    matrix, array = torch.eye(2, requires_grad=True), np.array([1, 2])
    with history.prefixed("ema_"):
        history.update_metric("scores", scores)
    history.update_metric("matrix", matrix)
    history.update_metric("array", array)
    with torch.no_grad():
        matrix.zero_()
    array[:] = 0

    assert history.get_latest_metric("ema_scores") == scores
    # Its numbers are metrics too.
    assert history.get_latest_metric("ema_scores_f1").item() == 0.5
    assert history.get_latest_metric("ema_scores_acc") == 0.75
    names = ["ema_scores", "ema_scores_f1", "ema_scores_acc", "matrix", "array"]
    assert list(history.get_metric_names()) == names
    kept = history.get_latest_metric("matrix")
    assert torch.equal(kept, torch.eye(2))
    assert not kept.requires_grad
    assert history.get_latest_metric("array").tolist() == [1, 2]


def test_what_is_not_one_number_is_written_as_lists_and_dictionaries(history, tmp_path):
    """Found 111."""
    history.update_metric("matrix", torch.eye(2))
    history.update_metric("scores", {"f1": torch.tensor(0.5), "note": "good"})
    history.update_metric("figure", object())
    history.save_jsonl(tmp_path / "metrics.jsonl")
    for restored in (
        InMemoryRunHistory.load_jsonl(tmp_path / "metrics.jsonl"),
        InMemoryRunHistory.from_dict(history.to_dict()),
    ):
        assert restored.get_latest_metric("matrix") == [[1.0, 0.0], [0.0, 1.0]]
        assert restored.get_latest_metric("scores") == {"f1": 0.5, "note": "good"}
        assert "figure" not in restored.get_metric_names()
    assert list(history.to_pandas()["name"]) == ["scores_f1"]


def test_no_origin_is_lost_when_threads_record(history):
    """Found 94."""

    def record():
        for _ in range(2000):
            history.update_metric("metric", 1.0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=record) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    records = history.records("metric")
    assert len(records) == 8000
    assert all(record.epoch == 1 for record in records)


def test_a_file_is_replaced_only_by_a_whole_one(history, tmp_path, monkeypatch):
    """Found 94: a write that failed left half a file."""
    path = tmp_path / "metrics.jsonl"
    history.update_metric("metric", 1.0)
    history.save_jsonl(path)
    before = path.read_bytes()

    def fail(self, text, **kwargs):
        self.write_bytes(text.encode()[:5])
        raise OSError("disk full")

    history.update_metric("metric", 2.0)
    monkeypatch.setattr("pathlib.Path.write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        history.save_jsonl(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- prefix, deletion, reset


def test_the_prefix_is_put_before_names_that_are_recorded_or_deleted(history):
    """Defect 45: delete_metric ignored it, and an unknown name was a bare KeyError."""
    history.update_metric("loss", 2.0)
    history.update_metric("accuracy", 3.0)
    history.set_metric_name_prefix("ema_")
    history.update_metric("loss", 1.0)

    assert history.metric_name_prefix == "ema_"
    assert history.get_metric_values("ema_loss") == [1.0]
    assert history.get_metric_values("loss") == [2.0]
    history.delete_metric("loss")
    assert history.get_metric_names() == {"loss", "accuracy"}
    with pytest.raises(KeyError, match=r"'ema_accuracy'.*so far: loss, accuracy"):
        history.delete_metric("accuracy")


def test_prefixed_brings_back_the_old_prefix_also_after_an_error(history):
    history.set_metric_name_prefix("outer_")
    with pytest.raises(TypeError), history.prefixed("inner_"):
        history.update_metric("loss")
    with history.prefixed("inner_"):
        history.update_metric("loss", 1.0)

    assert history.metric_name_prefix == "outer_"
    assert history.get_metric_names() == {"inner_loss"}


@pytest.mark.parametrize(
    ("forget", "names"),
    [
        (lambda h, name: h.delete_metric(name), ["accuracy", "train_loss_epoch"]),
        (lambda h, name: h._metrics[name].clear(), ["train_loss_epoch", "accuracy"]),
    ],
    ids=["deleted", "by a script"],
)
def test_values_that_are_removed_take_their_epochs_with_them(
    two_epoch_history, forget, names
):
    forget(two_epoch_history, "train_loss_epoch")
    two_epoch_history.update_metric("train_loss_epoch", 2.0)

    assert list(two_epoch_history.get_metric_names()) == names
    [record] = two_epoch_history.records("train_loss_epoch")
    assert record[:4] == ("train_loss_epoch", 2.0, 2, 20)


def test_reset_forgets_metrics_and_counters_and_keeps_the_prefix(two_epoch_history):
    two_epoch_history.set_metric_name_prefix("ema_")
    two_epoch_history.reset()

    assert two_epoch_history.get_metric_names() == set()
    assert two_epoch_history.records() == []
    assert two_epoch_history.current_epoch == 1
    assert two_epoch_history.current_step == 0
    assert two_epoch_history.metric_name_prefix == "ema_"


# --- when a value was recorded


def test_each_value_is_kept_with_its_epoch_step_and_time(history, monkeypatch):
    times = iter([1000.5, 1001.25, 1002.0])
    monkeypatch.setattr("pytorch_accelerated.tracking.time.time", lambda: next(times))
    history.current_step = 10
    history.update_metric("loss", 0.5)
    history.update_metric("accuracy", 0.25)
    history._increment_epoch()
    history.current_step = 20
    history.update_metric("loss", 0.375)

    assert history.records() == [
        MetricRecord("loss", 0.5, epoch=1, step=10, unix_time=1000.5),
        MetricRecord("loss", 0.375, epoch=2, step=20, unix_time=1002.0),
        MetricRecord("accuracy", 0.25, epoch=1, step=10, unix_time=1001.25),
    ]
    assert history.records("accuracy") == history.records()[2:]


def test_values_that_scripts_append_themselves_have_no_epoch(history):
    assert history._metrics["loss"] == []  # a list that was only looked at
    assert history.get_metric_names() == set()
    assert history.records() == []
    history._metrics["loss"].extend([3.0, 2.0])
    history.update_metric("loss", 1.0)
    history._metrics["loss"].append(0.5)

    assert history.get_metric_values("loss") == [3.0, 2.0, 1.0, 0.5]
    assert [record.epoch for record in history.records("loss")] == [None, None, 1, None]


# --- writing and reading back


def types_in(value):
    if not isinstance(value, dict | list):
        return {type(value)}
    members = [*value, *value.values()] if isinstance(value, dict) else value
    return {type(value)}.union(*map(types_in, members))


@given(
    st.lists(
        st.tuples(
            st.text(max_size=5),
            st.floats() | st.integers(-(2**70), 2**70),
            st.integers(0, 2**40),
        ),
        max_size=10,
    ),
)
def test_a_history_comes_back_from_its_dict_to_the_last_bit(recordings):
    history = InMemoryRunHistory()
    history._set_epoch(3)
    history.set_metric_name_prefix("p_")
    for name, value, step in recordings:
        history.current_step = step
        history.update_metric(name, value)
    history._metrics["appended"].append(np.float64(0.1))

    state = history.to_dict()
    restored = InMemoryRunHistory.from_dict(state)

    assert types_in(state) <= {dict, list, int, float, str, type(None)}
    assert list(restored.get_metric_names()) == list(history.get_metric_names())
    assert (restored.current_epoch, restored.current_step) == (3, history.current_step)
    assert restored.metric_name_prefix == "p_"
    for before, after in zip(history.records(), restored.records(), strict=True):
        assert before[2:] == after[2:]
        assert isinstance(after.value, type(before.value)) or before.name == "appended"
        if isinstance(before.value, float):
            assert float_bits(before.value) == float_bits(after.value)
        else:
            assert before.value == after.value


def test_a_state_replaces_all_there_was_and_one_that_lacks_entries_nothing(
    two_epoch_history,
):
    other = InMemoryRunHistory()
    other.set_metric_name_prefix("old_")
    other.update_metric("gone", 1.0)
    before, state = other.to_dict(), two_epoch_history.state_dict()
    with pytest.raises(KeyError, match="epoch"):
        other.load_state_dict({**state, "metrics": {"loss": {"value": [1.0]}}})
    assert other.to_dict() == before

    other.load_state_dict(state)

    assert other.to_dict() == two_epoch_history.to_dict()
    two_epoch_history.update_metric("accuracy", 1.0)
    assert other.get_metric_values("accuracy") == [0.25]


def test_json_lines_hold_one_record_each_and_are_read_back_exactly(
    two_epoch_history, tmp_path
):
    """Found 94: a blank line broke reading."""
    two_epoch_history.update_metric("Genauigkeit in Prozent, größer", 0.1 + 0.2)
    two_epoch_history.update_metric("diverged", -math.inf)
    path = tmp_path / "made" / "on the way" / "metrics.jsonl"
    two_epoch_history.save_jsonl(path)

    lines = path.read_text("utf-8").splitlines()
    assert len(lines) == 5
    first = json.loads(lines[0])
    assert first.pop("unix_time") > 0
    assert first == {"name": "train_loss_epoch", "value": 0.5, "epoch": 1, "step": 10}
    path.write_text("\n".join([*lines, "", ""]), "utf-8")
    restored = InMemoryRunHistory.load_jsonl(path)
    assert restored.to_dict() == two_epoch_history.to_dict()


def test_pandas_gets_a_row_for_each_record(two_epoch_history):
    pytest.importorskip("pandas")
    table = two_epoch_history.to_pandas()

    assert list(table.columns) == ["name", "value", "epoch", "step", "unix_time"]
    assert table["value"].tolist() == [0.5, 0.375, 0.25]
    assert table["step"].tolist() == [10, 20, 10]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train_loss_epoch", False),
        ("ema_model_eval_MulticlassAccuracy_epoch", True),
        ("evaluation_BinaryF1Score", True),
        ("eval_f1_epoch", True),
        ("map_50", True),
        ("eval_acc1_epoch", True),
        ("eval_top5_error_epoch", False),
        ("brier_score", False),
        ("MeanSquaredError", False),
        ("learning_rate", None),
        ("glossary", None),
    ],
)
def test_whether_greater_is_better_is_known_by_the_words_of_a_name(name, expected):
    assert is_greater_better(name) is expected


# --- what is left out of the records, plots and summaries


@pytest.fixture
def run_history(history):
    """Two epochs of 10 updates, with evaluations amid them and one afterwards."""
    for epoch in (1, 2):
        for step in (5, 10):
            history.current_step = 10 * (epoch - 1) + step
            history.update_metric("intermediate_eval_loss", 1 / history.current_step)
        history.update_metric("train_loss_epoch", 2 / epoch)
        history.update_metric("eval_loss_epoch", 3 / epoch)
        history.update_metric("eval_accuracy_epoch", 0.5)
        history.update_metric("eval_confusion_epoch", torch.eye(2))
        history._increment_epoch()
    with history._evaluation():
        history.update_metric("loss", 0.25)
    return history


def points_of(figure):
    return {
        axes.get_title(): {
            line.get_label(): [*zip(*line.get_data(), strict=True)]
            for line in axes.get_lines()
        }
        for axes in figure.axes
    }


def test_records_can_be_had_without_those_that_are_known(two_epoch_history):
    new = two_epoch_history.records(skip={"train_loss_epoch": 1})

    assert [(each.name, each.value) for each in new] == [
        ("train_loss_epoch", 0.375),
        ("accuracy", 0.25),
    ]


def test_a_plot_has_training_and_evaluation_of_a_metric_in_the_same_axes(run_history):
    assert points_of(run_history.plot()) == {
        "loss": {
            "intermediate_eval_loss": [(5, 0.2), (10, 0.1), (15, 1 / 15), (20, 0.05)],
            "train_loss_epoch": [(10, 2), (20, 1)],
            "eval_loss_epoch": [(10, 3), (20, 1.5)],
            "evaluation_loss": [(20, 0.25)],
        },
        "accuracy": {"eval_accuracy_epoch": [(1, 0.5), (2, 0.5)]},
    }


def test_a_plot_of_chosen_metrics_has_no_others(run_history):
    figure = run_history.plot("accuracy", "train_loss_epoch")

    assert {title: [*lines] for title, lines in points_of(figure).items()} == {
        "loss": ["train_loss_epoch"],
        "accuracy": ["eval_accuracy_epoch"],
    }
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch", "epoch"]


def test_values_recorded_by_a_script_are_plotted_by_their_number(history):
    for value in (3.0, math.nan, math.inf, 1.0):
        history.update_metric("mine", value)
    figure = history.plot()

    assert [x for x, _ in points_of(figure)["mine"]["mine"]] == [1, 2, 3, 4]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_drawn_says_why(run_history, monkeypatch):
    with pytest.raises(ValueError, match=r"'?lr'? has not been recorded.*: .*accuracy"):
        run_history.plot("loss", "lr")
    with pytest.raises(ValueError, match="recorded so far: nothing"):
        InMemoryRunHistory().plot()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pytorch-accelerated\[plot\]"):
        run_history.plot()


def test_runs_are_drawn_over_each_other(run_history, two_epoch_history, tmp_path):
    file = tmp_path / "first.jsonl"
    run_history.save_jsonl(file)
    metrics = ["train_loss_epoch"]

    by_name = compare_histories({"a": file, "b": two_epoch_history}, metrics=metrics)
    listed = compare_histories([str(file), two_epoch_history], metrics=metrics)
    named = compare_histories([file, file], names=["x", "y"], metrics=metrics)

    lines = by_name.axes[0].get_lines()
    assert [each.get_label() for each in lines] == [
        "a train_loss_epoch",
        "b train_loss_epoch",
    ]
    assert lines[0].get_color() != lines[1].get_color()
    assert [*points_of(listed)["loss"]] == [
        f"{file} train_loss_epoch",
        "run 2 train_loss_epoch",
    ]
    assert [*points_of(named)["loss"]] == ["x train_loss_epoch", "y train_loss_epoch"]


def test_a_summary_has_the_last_and_the_first_best_value_of_each_metric(run_history):
    run_history.update_metric("eval_accuracy_epoch", math.inf)
    run_history.update_metric("eval_loss_epoch", 1.75)
    run_history.update_metric("lr", 0.1)
    summary = run_history.summary()

    last, best = summary["eval_loss_epoch"]
    assert (last.value, best.value, best.epoch, best.step) == (1.75, 1.5, 2, 20)
    last, best = summary["eval_accuracy_epoch"]
    assert (last.value, best.value, best.epoch) == (math.inf, 0.5, 1)
    assert summary["lr"].best is None
    assert "eval_confusion_epoch" not in summary
    text = str(summary).splitlines()
    assert text[0].split() == ["metric", "last", "best", "epoch", "update"]
    assert ["eval_loss_epoch", "1.75", "1.5", "2", "20"] in map(str.split, text)
    assert ["lr", "0.1"] in map(str.split, text)


def test_a_history_says_what_it_has_in_a_line():
    history = InMemoryRunHistory()
    assert repr(history) == "InMemoryRunHistory(epoch 1, update 0: nothing recorded)"
    history.update_metric("f1", 1.0)
    assert repr(history) == "InMemoryRunHistory(epoch 1, update 0: f1)"


def test_a_file_of_another_kind_is_named(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("name,value,epoch,step,unix_time\n")
    with pytest.raises(ValueError, match=r"metrics.csv has a line .*read_csv"):
        InMemoryRunHistory.load_jsonl(file)
