"""The code of the pages can be copied: what it uses is imported on the same page."""

import ast
import builtins
import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# What a reader has: a model, data and what goes with them.
READERS_OWN = {
    *("model", "loss_func", "optimizer", "trainer", "train", "num_epochs", "tokenizer"),
    *("dataset", "train_dataset", "validation_dataset", "validation", "test_dataset"),
    "tokenized_dataset",
}


def code_of(page):
    fence = r"```(?:python|\{code-block\} python)\n(.*?)```"
    return "\n".join(re.findall(fence, page.read_text("utf-8"), re.DOTALL))


def names_in(code):
    """Return the names that the code uses, and those that it makes."""
    used, made = set(), set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.alias):
            made.add((node.asname or node.name).partition(".")[0])
    return used, made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_imports_what_its_code_uses_found_109(page):
    used, made = names_in(code_of(page))

    assert used - made - READERS_OWN - set(dir(builtins)) == set()


def test_the_code_of_the_page_about_checkpoints_runs_found_109(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(1, 1)
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}

    old = tmp_path / "training_states" / "epoch_5"
    old.mkdir(parents=True)
    torch.save(model.state_dict(), old / "pytorch_model.bin")

    exec(compile(code_of(ROOT / "docs" / "checkpoints.md"), "page", "exec"), names)

    assert (tmp_path / "checkpoints" / "step_100" / "optimizer.pt").exists()


def test_the_code_of_the_page_about_tracking_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    exec(compile(code_of(ROOT / "docs" / "tracking.md"), "page", "exec"), {})

    assert (tmp_path / "metrics.jsonl").exists()
