"""A notebook shows a table that grows, and keeps it when it is saved."""

import re

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

CELLS = [
    "import pytorch_accelerated",  # Accelerate may warn here that there are no widgets
    """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from pytorch_accelerated import Trainer

model = nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
dataset = TensorDataset(torch.ones(8, 1), torch.zeros(8, 1))
trainer = Trainer(model, nn.MSELoss(), optimizer)
trainer.train(dataset, num_epochs=2, eval_dataset=dataset, per_device_batch_size=2);
""",
    "trainer.evaluate(dataset);",
    "trainer.train(dataset, num_epochs=1);",
]


@pytest.fixture(scope="module")
def notebook():
    """The cells, executed, with all that was shown in the first run."""
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    executed = nbformat.v4.new_notebook(cells=cells)
    shown = []

    class Client(nbclient.NotebookClient):
        def process_message(self, message, cell, cell_index):
            if cell_index == 1 and "data" in message["content"]:
                shown.append(message["content"]["data"].get("text/html", ""))
            return super().process_message(message, cell, cell_index)

    Client(executed, timeout=120).execute()
    executed.shown = shown
    return executed


def text_of(cell):
    """Return what a saved notebook shows, the words of a table row on a line."""
    html = "\n".join(
        output.get("text") or output["data"].get("text/html", "")
        for output in cell.outputs
    )
    words = re.sub(r"<[^>]*>", " ", html.replace("</tr>", "\n")).replace("&nbsp;", "")
    return [" ".join(line.split()) for line in words.splitlines() if line.strip()]


def test_the_saved_notebook_has_one_table_and_no_bar(notebook):
    start, header, *rows, end = text_of(notebook.cells[1])
    assert start == "Training starts: epoch 1/2, update 0/8, cpu"
    assert header == "epoch train_loss eval_loss lr samples/s time ETA"
    assert [row.split()[0] for row in rows] == ["1/2", "2/2"]
    assert end.startswith("Training ends: epoch 2/2, update 8/8, ")


def test_meanwhile_a_bar_is_shown(notebook):
    assert any("epoch 1/2   0%|" in html for html in notebook.shown)
    assert all("widget" not in html for html in notebook.shown)


def test_each_cell_has_its_own_output(notebook):
    (evaluation,) = text_of(notebook.cells[2])
    assert re.fullmatch(r"evaluation loss=\S+ time=\S+s", evaluation)
    assert [row.split()[0] for row in text_of(notebook.cells[3])] == [
        "Training",
        "epoch",
        "1/1",
        "Training",
    ]
