"""A finder or a summary changes nothing: a run after it is the run without it."""

import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset, IterableDataset
from toys import Keeps

from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    SaveTrainingStateCallback,
)
from pytorch_accelerated.trainer import DEFAULT_CALLBACKS, Trainer


class Drawing(Dataset):
    """Draws from the global generators, and from one of its own."""

    def __init__(self):
        self.own = np.random.default_rng(3)
        self.num_drawn = 0

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.num_drawn += 1
        noise = random.random() + np.random.rand() + self.own.random()
        inputs = torch.full((5,), index / 24) + torch.randn(5) + noise
        return inputs, inputs.sum(dim=0, keepdim=True)


class DrawingStream(IterableDataset):
    def __init__(self):
        self.samples = Drawing()
        self.own = torch.Generator().manual_seed(1)

    def __iter__(self):
        for index in torch.randperm(24, generator=self.own).tolist():
            inputs = torch.full((5,), index / 24)
            yield inputs, inputs[:1]


def shuffled():
    generator = torch.Generator().manual_seed(5)
    return DataLoader(Drawing(), batch_size=4, shuffle=True, generator=generator)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.sleeping_norm = nn.BatchNorm1d(6, affine=False).eval()
        self.last = nn.Linear(6, 1)
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.num_calls = 0
        self.outputs = []
        self.own = torch.Generator().manual_seed(9)

    def forward(self, inputs):
        self.num_calls += 1
        self.steps += 1
        hidden = self.norm(self.frozen(self.first(inputs)))
        hidden = self.sleeping_norm(hidden) + torch.rand(6, generator=self.own)
        outputs = self.last(torch.dropout(hidden, 0.3, self.training))
        self.outputs.append(outputs.detach().sum().item())
        self.steps = self.steps + 1  # another tensor under the same name
        return outputs


class Counting(Trainer):
    """Keeps what an own trainer may keep: numbers, lists, modules, an optimizer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metric = nn.BatchNorm1d(1)
        self.losses = []
        self.second_optimizer = torch.optim.Adam(self.metric.parameters(), lr=0.1)

    def training_run_start(self):
        super().training_run_start()
        if self._accelerator.num_processes == 1:  # DDP needs to know beforehand
            self.get_model().first.bias.requires_grad_(False)

    def training_run_end(self):
        super().training_run_end()
        if self.run_history.get_metric_names():  # not that of a rehearsal
            self.model.first.bias.requires_grad_(True)

    def calculate_train_batch_loss(self, batch):
        if len(batch[0]) > getattr(self, "most", math.inf):
            raise torch.OutOfMemoryError
        output = super().calculate_train_batch_loss(batch)
        self.second_optimizer.zero_grad()
        self.metric(output["model_outputs"].detach() + 1).square().mean().backward()
        self.second_optimizer.step()
        self.losses.append(output["loss"].item())
        return output


def find_learning_rate(trainer, data):
    return trainer.find_learning_rate(
        data, num_updates=20, gradient_accumulation_steps=2, gradient_clip_norm=1.0
    )


def summarize(trainer, data):
    return str(trainer.summary(data))


def find_batch_size(trainer, data):
    """Memory runs out on one of several processes alone."""
    trainer.most = 10 if trainer._accelerator.is_main_process else 5
    found = trainer.find_batch_size(data, 24, per_device_batch_size=2)
    del trainer.most
    return found


def fail_amid_updates(trainer, data):
    trainer.optimizer_step = lambda: (trainer.optimizer.step(), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        find_learning_rate(trainer, data)
    del trainer.optimizer_step


REHEARSALS = {
    "find_learning_rate": find_learning_rate,
    "find_batch_size": find_batch_size,
    "summary": summarize,
    "one that fails": fail_amid_updates,
}


def handles(model):
    """Return what a user may hold: weights, their gradients, and buffers."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.full_like(parameter, 2)
    gradients = [parameter.grad for parameter in model.parameters()]
    return [*model.parameters(), *gradients, *model.buffers()]


def run(folder, rehearse=None, data=None, seed=None, compiled=False):
    """Train twice, with a rehearsal before each; return all that there is then."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    data = Drawing() if data is None else data
    model = Network()
    optimizer = torch.optim.AdamW(
        [
            {"params": model.first.parameters(), "lr": 0.02},
            {"params": [*model.norm.parameters(), *model.last.parameters()]},
        ],
        lr=torch.tensor(0.05),
    )
    heard = Keeps("on_train_step_end", lambda trainer, **kwargs: kwargs["step"])
    callbacks = (
        *DEFAULT_CALLBACKS,
        heard,
        EarlyStoppingCallback(5, watch_metric="train_loss_epoch"),
        SaveTrainingStateCallback(folder),
    )
    trainer = Counting(model, nn.MSELoss(), optimizer, callbacks, seed=seed)
    ends = []
    for _ in range(2):
        if rehearse is not None:
            before = handles(model)
            rehearse(trainer, data)
            after = handles(model)
            assert all(a is b for a, b in zip(after, before, strict=True))
            assert all(p.grad.eq(2).all() for p in model.parameters())
            assert sum(p.requires_grad for p in model.parameters()) == 6
        trainer.train(
            data,
            num_epochs=2,
            per_device_batch_size=4,
            reset_run_history=False,
            train_dataloader_kwargs=None
            if isinstance(data, DataLoader)
            else {"num_workers": 0},
            create_scheduler_fn=partial(OneCycleLR, max_lr=0.1, total_steps=2 * 6),
        )
        ends.append(
            {
                "weights": {n: v.clone() for n, v in model.state_dict().items()},
                "own": [
                    model.steps.clone(),
                    model.num_calls,
                    list(model.outputs),
                    model.own.get_state(),
                ],
                "modes": [m.training for m in model.modules()],
                "frozen": [p.requires_grad for p in model.parameters()],
                "optimizer": optimizer.state_dict(),
                "trainer": [
                    list(trainer.losses),
                    trainer.second_optimizer.state_dict(),
                    trainer.metric.state_dict(),
                ],
                "metrics": {
                    n: list(trainer.run_history.get_metric_values(n))
                    for n in sorted(trainer.run_history.get_metric_names())
                },
                "counts": [
                    trainer._num_runs,
                    trainer.num_updates,
                    trainer.run_history.current_epoch,
                    list(heard.kept),
                ],
                "random": [torch.get_rng_state(), random.random(), np.random.rand()],
                "saved": sorted(path.name for path in folder.iterdir()),
            }
        )
    return ends


def assert_same(one, other):
    assert [end.pop("saved") for end in one] == [end.pop("saved") for end in other]
    torch.testing.assert_close(one, other, rtol=0, atol=0)


DATA = {"dataset": Drawing, "loader": shuffled, "stream": DrawingStream}


@pytest.mark.parametrize(
    ("name", "data", "seed"),
    [
        *((name, "dataset", None) for name in REHEARSALS),
        ("find_learning_rate", "dataset", 1),
        ("find_learning_rate", "loader", None),
        ("summary", "stream", None),
    ],
)
def test_a_run_after_a_rehearsal_is_the_run_without_it(
    name, data, seed, tmp_path, capsys
):
    folders = [tmp_path / "without", tmp_path / "with"]
    expected = run(folders[0], None, DATA[data](), seed=seed)
    printed = capsys.readouterr().out

    assert_same(run(folders[1], REHEARSALS[name], DATA[data](), seed=seed), expected)

    printed_now = capsys.readouterr().out
    if name != "summary":
        assert printed_now.count("\n") == printed.count("\n")


def test_the_scale_of_half_precision_is_put_back(noise, create_classifier):
    model = create_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=())
    scaler = torch.amp.GradScaler("cpu", growth_interval=2)
    trainer._accelerator.scaler = scaler

    assert len(trainer.find_learning_rate(noise(64), 1e-4, 0.1, 10).losses) == 10
    assert scaler.get_scale() == 65536

    trainer.train(noise(64), num_epochs=1)
    assert scaler.get_scale() == 65536 * 2**4


def test_two_processes_rehearse_together(on_processes, tmp_path):
    def both():
        folders = [tmp_path / name for name in ("without", "with")]
        found = []

        def rehearse(trainer, data):
            found.append(find_learning_rate(trainer, data))
            found.append(find_batch_size(trainer, data))
            found.append(summarize(trainer, data))

        return run(folders[0]), run(folders[1], rehearse), found

    (expected, first, found), (other, second, same) = on_processes(2, both)

    assert_same(first, expected)
    assert_same(second, other)
    assert found == same
    assert found[1] == 4
