"""Processes of which one does not do its part."""

import os
import sys
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
from accelerate.utils import InitProcessGroupKwargs
from processes import FAULTS, Job, torchrun
from runs import AtNth
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer

TIMEOUT_SECONDS = 6


class RaisesInStep(Trainer):
    """Raises an error in one process, which the others wait for."""

    process = None

    def calculate_train_batch_loss(self, batch):
        if self._accelerator.process_index == self.process and self.num_updates == 7:
            raise ValueError("bad batch")
        return super().calculate_train_batch_loss(batch)


class Uneven:
    """A loader of the user's that yields more batches on one process."""

    is_split_by_process = True

    def __init__(self, process):
        self.num_batches = 5 + 2 * (int(os.environ["RANK"]) == process)

    def __iter__(self):
        yield from [(torch.ones(2, 6), torch.ones(2, 1))] * self.num_batches


IN_STEP, IN_EVALUATION = "on_train_step_start", "on_eval_step_start"
# In the second epoch, and in the first evaluation.
TIMES = {IN_STEP: 8, IN_EVALUATION: 1}


def train_together(process, event=IN_STEP, action=None, raises=False, uneven=False):
    def act(trainer):
        if action is not None and trainer._accelerator.process_index == process:
            action()

    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=TIMEOUT_SECONDS))
    trainer = RaisesInStep(
        model,
        nn.MSELoss(),
        torch.optim.SGD(model.parameters(), lr=0.01),
        callbacks=[AtNth(event, act, TIMES[event])],
        seed=0,
        accelerator_kwargs={"cpu": True, "kwargs_handlers": [timeout]},
    )
    trainer.process = process if raises else None
    samples = TensorDataset(torch.randn(30, 6), torch.randn(30, 1))
    num_processes = trainer._accelerator.num_processes
    trainer.train(
        Uneven(process) if uneven else samples,
        num_epochs=2,
        eval_dataset=samples,
        per_device_batch_size=6 // num_processes,
    )


def sleep():
    time.sleep(1000)


LOST = "Another process of the job has ended or hangs, or is elsewhere in the script"
AMID_TRAINING = "The run ended in epoch 2 (training), after 2 of its batches and 7 up"
AMID_EVALUATION = "The run ended in epoch 1 (evaluation)"
# What one process does, of how many, which one, and where the others stand.
TOGETHER = {
    "it hangs": (2, 1, {"action": sleep}, AMID_TRAINING),
    "the first hangs": (2, 0, {"action": sleep}, AMID_TRAINING),
    "one of three hangs": (3, 2, {"action": sleep}, AMID_TRAINING),
    "it hangs in an evaluation": (
        *(2, 1, {"event": IN_EVALUATION, "action": sleep}),
        AMID_EVALUATION,
    ),
    "it raises in a step": (2, 1, {"raises": True}, AMID_TRAINING),
    "the first raises in a step": (2, 0, {"raises": True}, AMID_TRAINING),
    "it leaves": (2, 1, {"action": partial(sys.exit, 3)}, ""),
    "it has more batches": (2, 1, {"uneven": True}, ""),
}


@pytest.mark.fault("one of several processes hangs, raises or leaves alone")
def test_the_others_end_within_the_timeout_and_say_where_they_stood(tmp_path, trials):
    started = [
        (name, process, where, together(process, kwargs, tmp_path / name, number))
        for name, (number, process, kwargs, where) in TOGETHER.items()
    ]
    for name, process, where, job in started:
        if failure := what_is_wrong(job, process, (where, LOST), "hangs" in name):
            failure = f"{name}: {failure}"
        trials.add(failure)


def together(process, kwargs, folder, num_processes):
    run = partial(train_together, process, **kwargs)
    return Job(run, folder / "log", num_processes)


def what_is_wrong(job, process, texts, hangs):
    """Say what is wrong with how the processes end, all but one that hangs."""
    deadline = time.monotonic() + TIMEOUT_SECONDS + 30
    due = {pid for rank, pid in enumerate(job.pids) if not (hangs and rank == process)}
    while not (job.poll() or due <= job.codes.keys()):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    codes = dict(job.codes)
    job.kill(9)
    job.wait()
    printed = job.log.read_text()
    if codes.keys() != due or not all(codes.values()):
        return f"of {job.pids} ended {codes}: {printed[-3000:]}"
    missing = [text for text in texts if text not in printed]
    return f"not said: {missing}: {printed[-3000:]}" if missing else None


@pytest.mark.fault("one of several processes hangs, raises or leaves alone")
def test_a_launcher_ends_a_job_of_which_one_process_hangs(tmp_path, trials):
    done = torchrun(FAULTS / "hang_script.py", seconds=TIMEOUT_SECONDS + 60)
    is_told = LOST in done.stderr and done.returncode == 1
    trials.add(None if is_told else f"{done.returncode}: {done.stderr[-3000:]}")
