import re

import pytest
import torch

from pytorch_accelerated.console import (
    Table,
    brief,
    duration,
    in_lines,
    labels_of,
)

AROUND = {"lr": "0.01", "samples/s": "1,240", "time": "12.3s", "ETA": "1:05"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456789, "0.1235"),
        (0.5, "0.5000"),
        (1234.5678, "1235"),
        (123456.0, "1.235e+05"),
        (-0.0000123456, "-1.235e-05"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (0, "0"),
        (123456, "123456"),
        (10**15, "1.000e+15"),
        (torch.tensor(0.25), "0.2500"),
        (torch.ones(2, 3), "Tensor of shape (2, 3)"),
        ([0.5] * 100, "list of 100"),
        ("word " * 100, "word word word word word word word ..."),
        (None, "None"),
    ],
)
def test_a_value_is_brief(value, text):
    assert brief(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.04s"), (0.999, "1.0s"), (59.96, "1:00"), (3600.4, "1:00:00")],
)
def test_a_time_is_brief(seconds, text):
    assert duration(seconds) == text


def test_columns_stay_where_they_are_until_there_are_others():
    table = Table(["train_loss", "eval_loss"], epoch_width=5)

    def lines(**row):
        best = row.pop("best", ())
        table.add({**row, **AROUND}, best)
        return table.lines(100)

    shown = [
        *lines(epoch="@9", eval_loss=0.5),
        *lines(epoch=" 1/10", train_loss=0.25, eval_loss=0.5, best={"train_loss"}),
        *lines(epoch=" 2/10", train_loss=-1e-9, eval_loss=100.0, best={"eval_loss"}),
        *lines(epoch=" 3/10", f1=3, text="hello"),
        *lines(epoch=" 4/10", train_loss=0.5),
    ]
    assert shown == [
        "epoch  train_loss  eval_loss         lr  samples/s   time    ETA",
        "   @9                 0.5000       0.01      1,240  12.3s   1:05",
        " 1/10      0.2500*    0.5000       0.01      1,240  12.3s   1:05",
        " 2/10  -1.000e-09      100.0*      0.01      1,240  12.3s   1:05",
        "epoch  train_loss  eval_loss         f1         lr  samples/s   time    ETA",
        " 3/10                                 3       0.01      1,240  12.3s   1:05",
        "    text=hello",
        " 4/10      0.5000                             0.01      1,240  12.3s   1:05",
    ]


@pytest.mark.parametrize("width", [0, 20, 40, 60, 80, 100, 140, 1000])
def test_many_and_long_names_fit_any_width_and_no_metric_is_lost(width):
    metrics = {"train_loss": 0.5, "eval_loss": 0.25}
    metrics |= {f"f1_of_class_{i}": i / 40 for i in range(40)}
    metrics |= {f"{'long' * 14}_{i}": i / 7 for i in range(3)}
    table = Table()
    table.add({"epoch": "1/1", **metrics, **AROUND}, {"f1_of_class_39"})
    header, row, *rest = table.lines(width)
    assert max(map(len, (header, row, *rest))) <= max(width, 72)
    columns = dict(zip(header.split(), row.split(), strict=True))
    pairs = [pair.split("=") for line in rest for pair in line.split()]
    assert not columns.keys() & dict(pairs).keys()
    assert (width >= 40) == ("eval_loss" in columns and "time" in columns)
    assert {**columns, **dict(pairs)} == {
        "epoch": "1/1",
        **{name: brief(value) for name, value in metrics.items()},
        "f1_of_class_39": "0.9750*",
        **{name: AROUND[name] for name in AROUND if name in columns},
    }


def test_colours_are_around_the_text_and_change_no_place():
    def lines(**kwargs):
        table = Table(["loss"])
        table.add({"epoch": "1/1", "loss": 0.5, "other": 1}, {"loss"})
        return table.lines(80, **kwargs)

    styled = lines(is_styled=True)
    assert "   \033[1;32m0.5000*\033[0m" in styled[1]
    assert [re.sub(r"\033\[[\d;]+m", "", line) for line in styled] == lines()


def test_labels_leave_out_what_the_place_says_and_stay_apart():
    metrics = {
        "train_loss": 2,
        "train_loss_epoch": 1,
        "intermediate_eval_loss": 1,
        "evaluation_f1": 1,
        "f1": 1,
        "time": 77,
        "scores": {"f1": 1},
        "rate": 1,
        "rate_epoch": 1,
    }
    assert labels_of(metrics) == {
        "train_loss_epoch": "train_loss",
        "intermediate_eval_loss": "eval_loss",
        "evaluation_f1": "evaluation_f1",
        "f1": "f1",
        "time": "time_",
        "rate": "rate",
        "rate_epoch": "rate_epoch",
    }


def test_an_evaluation_is_a_line_and_more_where_it_needs_them():
    assert in_lines("evaluation", {"loss": 0.5, "f1": 0.25}, 80) == (
        "evaluation  loss=0.5000  f1=0.2500"
    )
    assert in_lines("evaluation", {"loss": 0.5, "f1": 0.25}, 24) == (
        "evaluation  loss=0.5000\n    f1=0.2500"
    )


def test_a_table_of_html_has_all_that_was_added_and_no_markup_of_others():
    table = Table(["train_loss"])
    table.add({"epoch": "1/2", "train_loss": 0.5, "<b>": 1}, {"train_loss"})
    table.add({"epoch": "2/2", "late": 0.5})
    html = table.to_html()
    assert re.findall(r"<t[hd]>(.*?)</t[hd]>", html.replace("&nbsp;", "")) == [
        *("epoch", "train_loss", "&lt;b&gt;", "late"),
        *("1/2", "<b>0.5000*</b>", "1", ""),
        *("2/2", "", "", "0.5000"),
    ]
