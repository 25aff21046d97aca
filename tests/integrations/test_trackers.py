"""What is in the files of TensorBoard, Weights & Biases, MLflow and Trackio."""

import contextlib
import json
import os
import re
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from toys import At, create_trainer, ones

from pytorch_accelerated.callbacks import TrackerCallback
from pytorch_accelerated.trainer import Trainer


class Draws(Trainer):
    """Records a matrix and a figure."""

    def eval_epoch_end(self):
        self.run_history.update_metric("acc@5", 0.5)
        self.run_history.update_metric("confusion", torch.eye(2))
        figure = Figure(figsize=(2, 1), dpi=50, facecolor="#ff0000")
        self.run_history.update_metric("figure", figure)


def train(callbacks=(), num_epochs=2, trainer=None, resume_from=None, **kwargs):
    """Halve a weight at each update, of which an epoch has four."""
    trainer = trainer or create_trainer(callbacks, trainer_class=Draws, **kwargs)
    loading = {"per_device_batch_size": 1, "resume_from": resume_from}
    trainer.train(ones(4), num_epochs, ones(1), **loading)
    return trainer


def run_and_resume(tracker, folder, **kwargs):
    """Break off a run after 8 updates, resume it at 6, and evaluate it after 12."""

    def save(trainer, *, num_updates, **kwargs):
        if num_updates == 6:
            trainer.save_training_state(folder / "state")

    def stop(trainer, **kwargs):
        if trainer.run_history.current_epoch == 2:
            raise RuntimeError("power cut")

    stopping = At(on_train_update_end=save, on_training_run_epoch_end=stop)
    with pytest.raises(RuntimeError, match="power cut"):
        train([TrackerCallback(tracker, **kwargs), stopping], 3)
    tracking = TrackerCallback(tracker, **kwargs)
    trainer = train([tracking], 3, resume_from=folder / "state")
    trainer.evaluate(ones(1))


ONCE = [(4, 0.25**4), (8, 0.25**8), (12, 0.25**12)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --------------------------------------------------------------------- TensorBoard


def events_in(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def scalars(events, name):
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard(folder):
    tracker = TrackerCallback(
        "tensorboard", "digits", run_name="light", config={"augment": {"flip": True}}
    )
    train(num_epochs=1, trainer=train([tracker]))

    first, second = sorted((folder / "runs" / "digits").glob("light_*"))
    events = events_in(first)
    assert scalars(events, "eval_loss_epoch") == ONCE[:2]
    assert scalars(events, "learning_rate") == [(4, 0.25), (8, 0.25)]
    for picture, size in (("confusion", (256, 256)), ("figure", (100, 50))):
        images = events.Images(picture)
        assert [image.step for image in images] == [4, 8]
        assert (images[0].width, images[0].height) == size
    (settings,) = first.glob("*/hparams.yml")
    assert "augment/flip: true" in settings.read_text()
    (hparams,) = [file.parent for file in first.glob("*/events.*")]
    assert "_hparams_/session_start_info" in events_in(hparams).PluginTagToContent(
        "hparams"
    )
    assert scalars(events_in(second), "eval_loss_epoch") == [(4, 0.25**12)]


def test_tensorboard_goes_on_where_the_state_was_saved(folder):
    run_and_resume("tensorboard", folder, every_n_updates=1)

    (run,) = (folder / "runs" / "pytorch-accelerated").iterdir()
    events = events_in(run)
    assert scalars(events, "train_loss") == [(k, 0.25 ** (k - 1)) for k in range(1, 13)]
    assert scalars(events, "eval_loss_epoch") == ONCE
    assert scalars(events, "evaluation_loss") == [(12, 0.25**12)]


def test_log_with_needs_no_callback_found_103(folder):
    train(accelerator_kwargs={"log_with": "tensorboard"})
    (run,) = (folder / "runs" / "pytorch-accelerated").iterdir()
    assert scalars(events_in(run), "eval_loss_epoch") == ONCE[:2]

    train(accelerator_kwargs={"log_with": ["tensorboard"], "project_dir": "here"})
    assert (folder / "here" / "pytorch-accelerated").exists()


def test_the_code_of_the_page(folder):
    page = (Path(__file__).parents[2] / "docs" / "trackers.md").read_text()
    model = nn.Linear(1, 1)
    names = {
        "model": model,
        "loss_func": nn.MSELoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        **dict.fromkeys(
            ("train_dataset", "validation_dataset", "test_dataset"), ones(4)
        ),
    }
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], names)

    (run,) = (folder / "runs" / "digits").iterdir()
    tags = events_in(run).Tags()["scalars"]
    assert {"train_loss_epoch", "eval_loss_epoch", "evaluation_loss"} <= set(tags)


# ---------------------------------------------------------------- Weights & Biases


def records_in(file):
    """Yield the records of a run that was not synchronised: a log of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = file.read_bytes(), 7, b""
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def items(entries):
    return {
        entry.key or "/".join(entry.nested_key): json.loads(entry.value_json)
        for entry in entries
    }


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # the session of another test has its folder and its settings
    return wandb


def runs_of_wandb(wandb, folder):
    """Yield for each file: the run, its config, and the rows of its history."""
    wandb.teardown()  # waits for its process, which writes the files
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
        records = list(records_in(file))
        (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        config = {}
        for record in records:
            config.update(items(record.config.update))
        yield run, config, [items(r.history.item) for r in records if r.history.item]


def of(rows, name):
    return [(row["num_updates"], row[name]) for row in rows if name in row]


def test_wandb(folder, wandb):
    run_and_resume(
        "wandb",
        folder,
        project="digits",
        run_name="light",
        config={"augment": {"flip": True}},
        init_kwargs={"wandb": {"tags": ["a tag"]}},
    )

    broken, resumed, evaluated = runs_of_wandb(wandb, folder)
    assert {run.run_id for run, _, _ in (broken, resumed, evaluated)} == {
        broken[0].run_id
    }
    run, config, rows = broken
    assert (run.project, run.display_name, run.tags) == ("digits", "light", ["a tag"])
    assert config["augment/flip"] is True
    assert config["optimizer_arguments/lr"] == 0.25
    assert of(rows, "eval_loss_epoch") == ONCE[:2]
    assert of(rows, "acc@5") == [(4, 0.5), (8, 0.5)]
    for picture in ("confusion", "figure"):
        assert [step for step, _ in of(rows, f"{picture}/filenames")] == [4, 8]
    assert of(resumed[2], "eval_loss_epoch") == ONCE[1:]
    assert of(evaluated[2], "evaluation_loss") == [(12, 0.25**12)]
    assert wandb.run is None


def test_a_run_of_wandb_that_the_script_has_started_stays_open(folder, wandb):
    with wandb.init(project="mine") as run:
        train([TrackerCallback("wandb")])
        run.log({"after": 1, "num_updates": 8})
    ((_, _, rows),) = runs_of_wandb(wandb, folder)
    assert of(rows, "eval_loss_epoch") == ONCE[:2]
    assert of(rows, "after") == [(8, 1)]


# -------------------------------------------------------------------------- MLflow


@pytest.fixture
def client(folder):
    mlflow = pytest.importorskip("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


# Given by SQLAlchemy, about what MLflow asks of it.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:sqlalchemy")
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_mlflow(folder, client):
    run_and_resume(
        "mlflow",
        folder,
        project="digits",
        run_name="light",
        config={"augment": {"flip": True}},
        every_n_updates=2,
    )

    experiment = client.get_experiment_by_name("digits")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("light", "FINISHED")
    assert run.data.params["augment/flip"] == "True"
    assert run.data.params["num_epochs"] == "3"

    def values_of(name):
        history = client.get_metric_history(run.info.run_id, name)
        return sorted({(metric.step, metric.value) for metric in history})

    assert values_of("eval_loss_epoch") == ONCE
    assert values_of("acc_5") == [(4, 0.5), (8, 0.5), (12, 0.5)]
    assert values_of("train_loss")[-1] == (12, (0.25**10 + 0.25**11) / 2)
    assert values_of("evaluation_loss") == [(12, 0.25**12)]
    files = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert [f"figure_{step}.png" in files for step in (4, 8, 12)] == [True] * 3


# ------------------------------------------------------------------------- Trackio


def test_trackio(folder):
    """In an environment of its own: it wants an older Pillow than the others."""
    python = Path(sys.prefix) / "trackio" / "bin" / "python"
    if not python.exists():
        pytest.skip("There is no Trackio: make test-integrations")
    code = (
        "from test_trackers import *\n"
        "kwargs = {'project': 'digits', 'run_name': 'light', 'every_n_updates': 1}\n"
        "run_and_resume('trackio', Path.cwd(), config={'flip': True}, **kwargs)"
    )
    paths = [path for path in sys.path if not path.endswith("site-packages")]
    paths.insert(0, str(Path(__file__).parent))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run(
        [python, "-c", code],
        env={**environment, "TRACKIO_DIR": str(folder)},
        check=True,
    )

    with contextlib.closing(sqlite3.connect(folder / "digits.db")) as database:
        rows = database.execute(
            "SELECT run_name, step, metrics FROM metrics"
        ).fetchall()
        ((config,),) = database.execute("SELECT config FROM configs").fetchall()
    assert {run for run, _, _ in rows} == {"light"}
    recorded = [(step, json.loads(metrics)) for _, step, metrics in rows]

    def values_of(name):
        return sorted({(step, row[name]) for step, row in recorded if name in row})

    assert values_of("eval_loss_epoch") == ONCE
    assert values_of("evaluation_loss") == [(12, 0.25**12)]
    assert values_of("train_loss")[-1] == (12, 0.25**11)
    assert json.loads(config)["flip"] is True
    assert json.loads(config)["num_epochs"] == 3
