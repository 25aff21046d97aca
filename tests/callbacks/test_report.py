"""The page about a run, read as a browser would read it."""

import math
import re
import subprocess
import warnings
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from pytorch_accelerated.callbacks import (
    ReportCallback,
    SaveBestModelCallback,
    StepBasedEvaluationCallback,
    TrainerCallback,
)
from pytorch_accelerated.callbacks.report import chart
from pytorch_accelerated.errors import (
    NonFiniteLossError,
    StopTrainingError,
    TrainingInterruptedError,
    TrainingWarning,
)
from pytorch_accelerated.tracking import MetricRecord
from pytorch_accelerated.trainer import Trainer

VOID = {"meta", "br"}


class Page(HTMLParser):
    """The tags of a page, and its text by the heading that it is under."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.text, self.curves = [], [], {}, []
        self.heading = ""
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == [], "tags are left open"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "path" and dict(attributes)["class"].startswith("curve"):
            self.curves.append(dict(attributes))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.heading, self.text[data] = data, ""
            return
        words = f"{self.text.get(self.heading, '')} {data}".split()
        self.text[self.heading] = " ".join(words)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Odd(Trainer):
    """Records a metric with a name and values out of the ordinary."""

    def eval_epoch_end(self):
        epoch = self.run_history.current_epoch
        self.run_history.update_metric("<script>alert('&')</script>", epoch)
        self.run_history.update_metric("gaps", math.nan if epoch in (2, 4) else epoch)
        self.run_history.update_metric("never", math.inf)
        self.run_history.update_metric("matrix", [[1, 2], [3, 4]])
        if epoch == 2:
            warnings.warn("<b>mind</b>", UserWarning, stacklevel=1)


def test_a_page_has_all_about_a_run(create_trainer, samples, folder):
    callbacks = [
        ReportCallback("reports/run.html", title="A <run>"),
        SaveBestModelCallback("best.pt"),
        StepBasedEvaluationCallback(3),
    ]
    trainer = create_trainer(callbacks, trainer_class=Odd)
    with pytest.warns(UserWarning, match="mind") as given:
        trainer.train(samples(4), 5, eval_dataset=samples(2), per_device_batch_size=1)
    assert len(given) == 2, "the warnings were shown as before"
    trainer.evaluate(samples(1))

    page = Page(folder / "reports" / "run.html")
    assert list(page.text)[1:] == [
        "A <run>",
        *("Curves", "Evaluation", "Epochs", "Warnings", "Checkpoints"),
        *("Configuration", "Environment"),
    ]
    assert page.text["A <run>"].startswith("finished after 20 of 20 updates, with 20")
    assert "eval_loss_epoch 9.095e-13 best 9.095e-13 at 20" in page.text["Curves"]
    assert "evaluation_loss" in page.text["Evaluation"]
    columns = {"train_loss", "<script>alert('&')</script>", "gaps", "samples/s", "time"}
    best = {"7.731e-11*", "9.095e-13*"}
    assert columns | best <= set(page.text["Epochs"].split())
    assert page.text["Warnings"].startswith("2 x UserWarning: <b>mind</b>")
    assert str(folder / "best.pt") in page.text["Checkpoints"]
    assert "optimizer_arguments/lr 0.25" in page.text["Configuration"]
    assert "ReportCallback, SaveBestModelCallback" in page.text["Configuration"]
    assert "torch 2." in page.text["Environment"]
    # Nothing is fetched, run, or left behind.
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img"})
    assert not re.search(r"(src|href|url)\s*[=(]", page.source)
    assert [file.name for file in (folder / "reports").iterdir()] == ["run.html"]


def test_training_and_evaluation_are_in_one_chart_with_gaps_for_nan(
    create_trainer, samples, folder
):
    trainer = create_trainer([ReportCallback], trainer_class=Odd)
    with pytest.warns(UserWarning, match="mind"):
        trainer.train(samples(2), 5, eval_dataset=samples(2), per_device_batch_size=1)

    page = Page(folder / "report.html")
    charts = page.source.split("<figure>")[1:]
    titles = [re.search("<h3>(.*?)</h3>", chart).group(1) for chart in charts]
    script = "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;"
    assert titles == ["loss", script, "gaps", "never"]
    assert [curve["class"] for curve in page.curves[:2]] == [
        "curve train",
        "curve eval",
    ]
    # Epochs 1, 3 and 5 by themselves: dots from the bottom left to the top right.
    assert page.curves[3]["d"] == "M66.0 180.0h0M205.0 94.0h0M344.0 8.0h0"
    assert page.curves[4]["d"] == ""


def test_many_values_of_many_metrics_fit(create_trainer, samples, folder):
    class Many(Trainer):
        def train_epoch_end(self):
            for number in range(40):
                self.run_history.update_metric(f"train_metric_{number}", number)

    create_trainer([ReportCallback], trainer_class=Many).train(samples(1), 1)
    page = Page(folder / "report.html")
    assert len(page.curves) == 41
    assert all("nan" not in curve["d"] for curve in page.curves)

    long = [MetricRecord("loss", n % 7, n // 100, n, 0.0) for n in range(100_000)]
    assert len(chart("loss", [long])) < 20_000


class Raises(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_train_update_end(self, trainer, **kwargs):
        warnings.warn("before the end", TrainingWarning, stacklevel=1)
        raise self.error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("no <luck>"), "failed: RuntimeError: no <luck>"),
        (KeyboardInterrupt("by the user"), "failed: KeyboardInterrupt: by the user"),
        (NonFiniteLossError("nan"), "failed: NonFiniteLossError: nan"),
        (StopTrainingError("enough"), "stopped early"),
        (TrainingInterruptedError("a signal"), "interrupted"),
    ],
)
def test_a_run_that_ends_before_its_time_says_so(
    create_trainer, samples, folder, reaches_the_caller, error, status
):
    trainer = create_trainer([Raises(error), ReportCallback("report.html", "Run")])

    def run():
        show = warnings.showwarning
        with reaches_the_caller(error):
            trainer.train(samples(2), 1)
        assert warnings.showwarning is show

    with pytest.warns(TrainingWarning, match="before the end"):
        run()
    page = Page(folder / "report.html")
    assert status in page.text["Run"]
    assert "before the end" in page.text["Warnings"]


def test_each_run_of_a_trainer_has_a_page_which_grows_with_it(
    create_trainer, samples, folder, monkeypatch
):
    pages = []

    class Looks(TrainerCallback):
        called_last = ("on_training_run_start", "on_training_run_epoch_end")

        def on_training_run_start(self, trainer, **kwargs):
            pages.append(Page(folder / "report.html").text)

        on_training_run_epoch_end = on_training_run_start

    now = SimpleNamespace(value=0.0)
    monkeypatch.setattr("time.monotonic", lambda: now.value)  # writing takes no time
    trainer = create_trainer([ReportCallback("report.html", "Run"), Looks()])
    trainer.train(samples(1), 2)

    assert ["running" in page["Run"] for page in pages] == [True] * 3
    assert ["Epochs" in page for page in pages] == [False, True, True]
    first = (folder / "report.html").read_text()
    trainer.train(samples(1), 1)
    trainer.evaluate(samples(1))
    assert (folder / "report.html").read_text() == first
    assert "Evaluation" in Page(folder / "report_2.html").text


def test_a_page_that_cannot_be_written_is_warned_of_once(
    create_trainer, samples, folder, own_history
):
    (folder / "file").write_text("")
    callbacks = [ReportCallback("file/report.html"), ReportCallback("good.html")]
    trainer = create_trainer(callbacks, run_history=own_history())
    with pytest.warns(TrainingWarning, match="report of the run could not") as given:
        trainer.train(samples(2), 2, eval_dataset=samples(1))

    assert len(given) == 1
    page = Page(folder / "good.html")
    assert [curve["class"] for curve in page.curves] == ["curve train", "curve eval"]


def test_the_commit_is_that_of_the_folder_and_git_may_be_missing(
    create_trainer, samples, folder, monkeypatch
):
    def commit_of_run():
        create_trainer([ReportCallback]).train(samples(1), 1)
        environment = Page(folder / "report.html").text["Environment"]
        return re.search(r"git commit (\S+)", environment).group(1)

    assert commit_of_run() == "unknown"
    for command in (
        "init -q",
        "-c user.name=n -c user.email=e commit -q --allow-empty -m first",
    ):
        subprocess.run(["git", *command.split()], check=True)
    assert re.fullmatch("[0-9a-f]{40}", commit_of_run())
    (folder / "code.py").write_text("1")
    subprocess.run(["git", "add", "code.py"], check=True)
    assert re.fullmatch("[0-9a-f]{40}-dirty", commit_of_run())
    monkeypatch.setenv("PATH", "")
    assert commit_of_run() == "unknown"
