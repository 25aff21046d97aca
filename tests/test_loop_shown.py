"""The loop that is shown is the one that runs."""

import re

import torch
from torch import nn

from pytorch_accelerated import trainer as trainer_module
from pytorch_accelerated.callbacks import ProgressBarCallback, TrainerCallback
from pytorch_accelerated.trainer import Trainer

MAP = re.findall(r"\bon_\w+|\b\w+(?=\()", trainer_module.__doc__.partition("::")[2])


def recording(name, calls, base=None):
    def method(self, *args, **kwargs):
        calls.append(name)
        return getattr(base, name)(self, *args, **kwargs) if base else None

    return method


def test_the_map_has_what_a_run_calls_in_its_order(samples):
    """Events are all those of a run; methods are all that the map names."""
    calls = []
    hooks = [name for name in MAP if not name.startswith("on_")]
    events = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    methods = {name: recording(name, calls, Trainer) for name in hooks}
    own = type("Own", (Trainer,), methods)
    notes = type("N", (TrainerCallback,), {n: recording(n, calls) for n in events})
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = own(model, nn.MSELoss(), optimizer, [notes])
    calls.clear()
    trainer.train(
        samples(4),
        2,
        eval_dataset=samples(2),
        gradient_accumulation_steps=2,
        create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.StepLR(
            optimizer, 1
        ),
    )

    assert list(dict.fromkeys(calls)) == MAP
    shown = trainer.show_loop()
    assert [n for n in re.findall(r"^ *(\w+)", shown, re.MULTILINE) if n in MAP] == MAP
    # Each of them is the user's own here.
    place = r"  (?:Own|N), \S*test_loop_shown\.py:\d+ \*$"
    assert len(re.findall(place, shown, re.MULTILINE)) == len(MAP)


class Scales(Trainer):
    def calculate_train_batch_loss(self, batch):
        return super().calculate_train_batch_loss(batch)

    def create_train_dataloader(self, *args, **kwargs):
        return super().create_train_dataloader(*args, **kwargs)

    def helper(self):
        """Nothing of the library's."""


class Listens(TrainerCallback):
    called_first = ("on_train_step_end",)

    def on_train_step_end(self, trainer, **kwargs):
        pass


def test_own_methods_and_who_hears_what_are_marked_in_order(create_trainer, capsys):
    trainer = create_trainer([ProgressBarCallback, Listens()], trainer_class=Scales)
    trainer.scheduler_step = lambda: None
    shown = trainer.show_loop()

    assert capsys.readouterr().out == f"{shown}\n"
    lines = shown.splitlines()
    place = r"\S*test_loop_shown\.py:\d+ \*$"

    def line_of(text):
        return next(i for i, line in enumerate(lines) if line.lstrip().startswith(text))

    def at(text, after=0):
        return lines[line_of(text) + after]

    assert re.search(rf"  Scales, {place}", at("calculate_train_batch_loss(batch)"))
    assert re.search(rf"  {place}", at("scheduler_step()"))
    assert re.search(r"  Trainer, .*/trainer\.py:\d+$", at("backward_step(loss)"))
    assert re.search(rf"  Listens, {place}", at("on_train_step_end"))
    assert re.search(
        r"^ +ProgressBarCallback, .*/progress\.py:\d+$", at("on_train_step_end", 1)
    )
    assert at("on_train_step_start").endswith(" -")
    besides = lines[line_of("replaced besides") + 1 :]
    assert re.fullmatch(
        rf"    create_train_dataloader\(\) +Scales, {place}", besides[0]
    )
    assert besides[1:] == ["", "* not of the library"]
