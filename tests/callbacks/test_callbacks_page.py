"""The code of docs/callbacks.md runs."""

import re
from pathlib import Path

import torch
from torch import nn

from pytorch_accelerated import Trainer, callbacks
from pytorch_accelerated.trainer import DEFAULT_CALLBACKS

PAGE = Path(__file__).parents[2] / "docs" / "callbacks.md"


def test_the_code_of_the_page_runs(samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(1, 1)
    names = {
        "model": model,
        "loss_func": nn.MSELoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "train_dataset": samples(2),
        "validation": samples(2),
        "test_dataset": samples(2),
        "Trainer": Trainer,
        "TrainerCallback": callbacks.TrainerCallback,
        "DEFAULT_CALLBACKS": DEFAULT_CALLBACKS,
    }
    Trainer(model, None, None, None).save_checkpoint("ema_model.pt")
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(code.replace("num_epochs=90", "num_epochs=2"), names)

    names["MyTrainer"].num_predicted = 2
    trainer = names["MyTrainer"](
        model,
        names["loss_func"],
        names["optimizer"],
        callbacks=[
            names["GradientNorms"],
            names["StopAfterMinutes"](5),
            names["CountSamples"],
            names["ShowPredictions"],
        ],
    )
    history = trainer.train(
        samples(2), num_epochs=1, eval_dataset=samples(2), gradient_clip_norm=1.0
    )
    assert history.get_latest_metric("train_gradient_norm") >= 0
    assert trainer.callback_handler.state_dict() == {"CountSamples": {"count": 2}}


def test_all_callbacks_and_events_are_on_the_page():
    page = PAGE.read_text()
    named = [name for name in callbacks.__all__ if name.endswith("Callback")]
    events = [name for name in vars(callbacks.TrainerCallback) if name[:3] == "on_"]
    assert [name for name in (*named, *events) if name not in page] == []
