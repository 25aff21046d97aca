"""R3, R11: two processes train the model that one would, given the same batches."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset
from toys import Sent, noise, seeded

from pytorch_accelerated.callbacks import TrackerCallback
from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.trainer import Trainer, TrainerPlaceholderValues

NUM_EPOCHS, SEED = 4, 13

one_cycle = partial(
    OneCycleLR,
    max_lr=0.1,
    epochs=TrainerPlaceholderValues.NUM_EPOCHS,
    steps_per_epoch=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
)

CASES = [
    {"num_samples": 32},
    {"num_samples": 37},  # the last step is smaller, and not the same on both
    {"num_samples": 33},  # the last step has one sample: one process has none
    {"num_samples": 37, "gradient_accumulation_steps": 3},
    {"num_samples": 37, "optimizer": "adamw", "create_scheduler_fn": one_cycle},
    {
        "num_samples": 33,
        "gradient_accumulation_steps": 2,
        "gradient_clip_norm": 0.5,
        "create_scheduler_fn": CosineLrScheduler.create_scheduler_fn(
            num_warmup_epochs=1
        ),
    },
    {"num_samples": 37, "gradient_clip_value": 0.01},
    {"num_samples": 37, "max_num_train_steps": 7},
    {"num_samples": 37, "train_dataloader_kwargs": {"drop_last": True}},
    {"num_samples": 37, "train_dataloader_kwargs": {"shuffle": False}},
]


def create_model():
    layers = nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    return nn.Sequential(*layers)


def train(case, num_processes, callbacks=()):
    """Train with 4 samples a step, however many processes share them."""
    case = dict(case)
    inputs, targets = noise(case.pop("num_samples"), 8).tensors
    dataset = TensorDataset(inputs.unsqueeze(1), targets)
    model = seeded(create_model)
    if case.pop("optimizer", "sgd") == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks, seed=SEED)
    history = trainer.train(
        dataset,
        num_epochs=NUM_EPOCHS,
        per_device_batch_size=4 // num_processes,
        eval_dataset=dataset,
        eval_per_device_batch_size=8 // num_processes,
        **case,
    )
    return {
        "weights": nn.utils.parameters_to_vector(model.parameters()).detach(),
        "losses": [
            history.get_metric_values(name)
            for name in ("train_loss_epoch", "eval_loss_epoch")
        ],
        "updates": trainer.num_updates,
        "samples": trainer.num_samples_seen,
        "lr": optimizer.param_groups[0]["lr"],
    }


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_the_model_that_one_would(on_processes, num_processes):
    """Defect 1, among others."""
    expected = [train(case, 1) for case in CASES]
    runs = on_processes(
        num_processes, lambda: [train(case, num_processes) for case in CASES]
    )
    for process in runs:
        for case, run, one in zip(CASES, process, expected, strict=True):
            torch.testing.assert_close(
                run["weights"], one["weights"], rtol=0, atol=1e-6, msg=str(case)
            )
            assert run["losses"][0] == pytest.approx(one["losses"][0], rel=1e-5)
            assert run["losses"][1] == pytest.approx(one["losses"][1], rel=1e-5)
            for name in ("updates", "samples", "lr"):
                assert run[name] == one[name], (case, name)


def test_one_of_several_processes_sends_the_losses_of_all_to_a_tracker(on_processes):
    def sent(num_processes):
        tracker = Sent()
        callback = TrackerCallback(tracker, every_n_updates=2)
        train({"num_samples": 33}, num_processes, [callback])
        losses = ("train_loss", "eval_loss_epoch")
        return [
            (step, values[name])
            for step, values in tracker.sent
            for name in losses
            if name in values
        ]

    expected = sent(1)
    first, second = on_processes(2, sent, 2)
    assert len(expected) == NUM_EPOCHS * 5 + NUM_EPOCHS
    assert [step for step, _ in first] == [step for step, _ in expected]
    assert [loss for _, loss in first] == pytest.approx(
        [loss for _, loss in expected], rel=1e-5
    )
    assert second == []
