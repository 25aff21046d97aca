"""Real traces of real steps."""

import gzip
import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated.callbacks import ProfilerCallback, TrainerCallback
from pytorch_accelerated.trainer import Trainer

DATA = TensorDataset(torch.ones(8, 4), torch.zeros(8, 4))


def train(callbacks, trainer=None, **kwargs):
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = trainer or Trainer(model, nn.MSELoss(), optimizer, callbacks)
    trainer.train(DATA, 1, DATA, per_device_batch_size=1, **kwargs)
    return trainer


def steps_in(folder):
    """Return the numbers of the steps in each trace."""
    traces = []
    for file in sorted(folder.glob("process_0.*.pt.trace.json.gz")):
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        names = {str(event.get("name")) for event in events}
        assert "aten::addmm" in names
        traces.append(sorted(n for n in names if n.startswith("ProfilerStep#")))
    return traces


def test_the_steps_asked_for_are_traced_in_each_run(tmp_path, capfd):
    profiled = []

    class Notes(TrainerCallback):
        def on_train_step_start(self, trainer, **kwargs):
            profiled.append(callback._profiler is not None)

    callback = ProfilerCallback(tmp_path / "new", wait=2, warmup=1, active=2)
    trainer = train([callback, Notes])
    assert profiled == [True] * 5 + [False] * 3, "a profiler takes time"
    assert steps_in(tmp_path / "new") == [["ProfilerStep#3", "ProfilerStep#4"]]
    assert "aten::addmm" in callback.table
    printed = capfd.readouterr().out
    assert callback.table in printed
    assert f"Trace in {tmp_path / 'new'}: open it in" in printed

    train((), trainer)
    assert len(steps_in(tmp_path / "new")) == 2
    assert callback._profiler is None


def test_a_run_that_ends_amid_the_steps_leaves_what_there_is(tmp_path, capsys):
    callback = ProfilerCallback(tmp_path / "limit", wait=0, warmup=1, active=9)
    train([callback], max_num_train_steps=3)
    names = ["ProfilerStep#1", "ProfilerStep#2", "ProfilerStep#3"]  # one that began
    assert steps_in(tmp_path / "limit") == [names]

    class Fails(TrainerCallback):
        def on_train_step_start(self, trainer, **kwargs):
            if trainer.num_steps == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train([ProfilerCallback(tmp_path / "error", active=9), Fails])
    assert len(steps_in(tmp_path / "error")) == 1

    train([ProfilerCallback(tmp_path / "short")], max_num_train_steps=1)
    assert "ended before the steps to be profiled" in capsys.readouterr().out


def test_lengths_are_checked():
    for arguments in ({"active": 0}, {"wait": -1}):
        with pytest.raises(ValueError, match="active at least 1"):
            ProfilerCallback(**arguments)


def test_the_run_goes_on_where_the_profiler_cannot(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    trainer = train([ProfilerCallback(tmp_path / "file" / "folder")])
    assert trainer.num_updates == 8
    assert "goes on without the profiler: RuntimeError" in capsys.readouterr().out
