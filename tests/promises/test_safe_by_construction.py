"""The library evaluates no strings, unpickles nothing by itself, and stays offline."""

import ast
from pathlib import Path

import pytest

import pytorch_accelerated

SOURCES = sorted(Path(pytorch_accelerated.__file__).parent.rglob("*.py"))

NETWORK = {"ftplib", "http", "requests", "smtplib", "socket", "ssl", "urllib"}
UNPICKLERS = {"pickle.load", "pickle.loads", "pickle.Unpickler"}


@pytest.fixture(scope="module")
def nodes():
    """All nodes of the syntax trees, with the file of each."""
    root = Path(pytorch_accelerated.__file__).parent
    return [
        (path.relative_to(root).as_posix(), node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]


def imported(node):
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return {(node.module or "").partition(".")[0]}
    return set()


def name_of(function):
    if isinstance(function, ast.Name):
        return function.id
    if isinstance(function, ast.Attribute):
        return f"{name_of(function.value)}.{function.attr}"
    return ""


def calls_of(names, nodes):
    return [
        (file, node)
        for file, node in nodes
        if isinstance(node, ast.Call) and name_of(node.func) in names
    ]


def test_no_string_is_evaluated(nodes):
    """Defect 36: placeholders were strings that were evaluated."""
    assert calls_of({"eval", "exec"}, nodes) == []


def test_no_network_is_used(nodes):
    assert [file for file, node in nodes if imported(node) & NETWORK] == []


def test_nothing_is_unpickled(nodes):
    assert calls_of(UNPICKLERS, nodes) == []
    for file, node in calls_of({"torch.load"}, nodes):
        arguments = {word.arg: word.value for word in node.keywords}
        assert arguments["weights_only"].value is True, file
