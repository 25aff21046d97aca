"""A run on torchdata's StatefulDataLoader that is killed goes on where it was."""

import multiprocessing
import os
import signal
from functools import partial

import pytest
import torch
from processes import Job
from torch import nn
from torch.utils.data import Dataset
from toys import At

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback

loaders = pytest.importorskip("torchdata.stateful_dataloader")

# torchdata 0.11 was written for an older torch.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

NUM_SAMPLES, BATCH_SIZE, NUM_EPOCHS = 40, 4, 3


class Counted(Dataset):
    """Samples that are functions of their number; counts how many are fetched."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        with self.count.get_lock():
            self.count.value += 1
        generator = torch.Generator().manual_seed(index)
        return torch.randn(6, generator=generator), torch.tensor(index % 3)


def train(folder, count, num_workers, kill_at):
    def kill(trainer, num_updates, **kwargs):
        if num_updates == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3))
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters(), lr=0.01),
        callbacks=[
            SaveTrainingStateCallback(folder / "states", save_every_n_steps=1),
            At(on_train_update_end=kill),
        ],
        seed=0,
        accelerator_kwargs={"cpu": True},
    )
    loader = loaders.StatefulDataLoader(
        Counted(count), BATCH_SIZE, shuffle=True, num_workers=num_workers
    )
    trainer.train(loader, NUM_EPOCHS, resume_from="auto")
    if trainer._accelerator.is_main_process:
        torch.save(model.state_dict(), folder / "weights.pt")


@pytest.fixture(scope="module", autouse=True)
def _everything_is_imported(tmp_path_factory):
    """Train once, so that what is imported late need not be by each forked process."""
    count = multiprocessing.Value("i", 0)
    train(tmp_path_factory.mktemp("warm"), count, num_workers=0, kill_at=None)


@pytest.fixture
def run(tmp_path):
    """Train in processes of their own; return exit codes and how many were fetched."""

    def run_it(name, num_workers=0, kill_at=None, num_processes=1):
        folder = tmp_path / name
        count = multiprocessing.Value("i", 0)
        job = Job(
            partial(train, folder, count, num_workers, kill_at),
            folder / "log",
            num_processes,
        )
        codes = job.wait()
        assert codes in ([0] * num_processes, [-signal.SIGKILL] * num_processes), (
            job.log.read_text()
        )
        return codes[0], count.value

    return run_it


def assert_same_weights(tmp_path):
    whole, killed = (
        torch.load(tmp_path / name / "weights.pt") for name in ("whole", "killed")
    )
    for name, tensor in whole.items():
        assert torch.equal(killed[name], tensor), name


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kill_at", [4, 13])
def test_a_killed_run_goes_on_without_loading_a_batch_again(
    num_workers, kill_at, run, tmp_path
):
    assert run("whole", num_workers) == (0, NUM_EPOCHS * NUM_SAMPLES)
    code, _ = run("killed", num_workers, kill_at)
    assert code == -signal.SIGKILL
    _, num_fetched = run("killed", num_workers)
    # The last update that was saved is the one before.
    num_done = (kill_at - 1) * BATCH_SIZE
    assert num_fetched == NUM_EPOCHS * NUM_SAMPLES - num_done
    assert_same_weights(tmp_path)


@pytest.mark.filterwarnings("ignore:To find its place")
def test_two_processes_end_the_same(run, tmp_path):
    run("whole", num_processes=2)
    code, _ = run("killed", kill_at=8, num_processes=2)
    assert code == -signal.SIGKILL
    run("killed", num_processes=2)
    assert_same_weights(tmp_path)
