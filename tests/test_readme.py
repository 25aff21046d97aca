"""What the README says, is so."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_quick_start_runs_in_an_empty_folder_found_109(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    names: dict = {}

    exec(compile(PYTHON_BLOCKS[0], "README.md", "exec"), names)

    assert names["metrics"]["evaluation_accuracy"] > 0.97
    assert "Accuracy on unseen points: " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_no_link_is_dead_where_the_page_is_shown_without_the_files_found_109():
    """A package index shows the page; what a relative link points at is not there."""
    targets = re.findall(r"\]\(([^)]+)\)", README)

    assert targets
    assert [target for target in targets if not target.startswith("https://")] == []


def test_every_file_that_is_named_exists():
    folders = r"docs|examples|src|tests|benchmarks"
    named = re.findall(rf"`((?:{folders})/[\w./]+|[A-Z]+(?:\.md)?)`", README)

    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_file_tree_names_every_module_and_no_other():
    tree = README.partition("src/pytorch_accelerated/\n")[2].partition("\ntests/")[0]
    named = re.findall(r"^    (\S+)", tree, re.MULTILINE)
    package = ROOT / "src" / "pytorch_accelerated"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    packages = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}

    assert sorted(named) == sorted(modules | packages)


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    pages = [README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")]
    named = {name for page in pages for name in re.findall(r"`make ([a-z-]+)", page)}

    assert named
    assert named <= targets


def test_every_extra_that_is_named_exists():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"`pytorch-accelerated\[(\w+)\]`", README)

    assert extras
    for extra in extras:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


@pytest.mark.parametrize("page", ["README.md", "docs/installation.md"])
def test_what_the_examples_need_is_said_in_full_found_106(page):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^examples = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    text = (ROOT / page).read_text(encoding="utf-8")
    row = re.search(r"^\| `pytorch-accelerated\[examples\]`.*$", text, re.MULTILINE)[0]

    packages = re.findall(r'"([a-z]+)', listed)
    assert packages
    assert [package for package in packages if package not in row] == []
    assert "torchvision from the same place as torch" in re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("name", ["fastai", "timm", "PyTorch Lightning", "Accelerate"])
def test_those_who_inspired_it_are_thanked(name):
    assert f"[{name}]" in README.partition("## Acknowledgements")[2]
