"""Say how large the library is: lines of code, methods, long functions, attributes.

    make size              this checkout
    make size OLD=main     beside the sizes at a commit

Lines of code are those that are not blank, comments or docstrings.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "src/pytorch_accelerated"
NUM_LONGEST = 10
NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """The source of a module.

    Args:
        name: Its path in the package.
        text: The source.
    """

    name: str
    text: str

    @property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    def lines(self) -> set[int]:
        """Return the numbers of the lines of code."""
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in NO_CODE:
                lines.update(range(token.start[0], token.end[0] + 1))
        return lines - set(docstring_lines(self.tree))

    def functions(self) -> list[tuple[str, int]]:
        """Return the functions and methods, each with its number of lines of code."""
        lines = self.lines()
        return [
            (f"{self.name}: {name}", len(lines & set(lines_of(function))))
            for name, function in functions_in(self.tree)
        ]


def docstring_lines(tree: ast.Module) -> Iterator[int]:
    """Yield the numbers of the lines of all docstrings."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | Function)
            and ast.get_docstring(node, clean=False) is not None
        ):
            yield from lines_of(node.body[0])


def lines_of(node: ast.stmt) -> range:
    """Return the numbers of the lines of a statement."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def functions_in(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Yield all functions with their qualified names."""
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}{getattr(child, 'name', '')}"
        if isinstance(child, Function):
            yield name, child
        is_named = isinstance(child, Function | ast.ClassDef)
        yield from functions_in(child, f"{name}." if is_named else prefix)


def private_attributes(module: Module, class_name: str) -> list[str]:
    """Return the attributes with an underscore that the methods of a class assign."""
    found: dict[str, None] = {}
    for cls in ast.walk(module.tree):
        if isinstance(cls, ast.ClassDef) and cls.name == class_name:
            for node in ast.walk(cls):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "self"
                    and node.attr.startswith("_")
                ):
                    found[node.attr] = None
    return list(found)


def modules_here() -> dict[str, Module]:
    """Return the modules of this checkout by their names."""
    package = ROOT / PACKAGE
    return {
        name: Module(name, path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
        for name in [str(path.relative_to(package))]
    }


def modules_at(ref: str) -> dict[str, Module]:
    """Return the modules at a commit by their names."""
    names = git("ls-tree", "-r", "--name-only", f"{ref}:{PACKAGE}").splitlines()
    return {
        name: Module(name, git("show", f"{ref}:{PACKAGE}/{name}"))
        for name in names
        if name.endswith(".py")
    }


def git(*arguments: str) -> str:
    """Return what git prints."""
    run = subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return run.stdout


def sizes(modules: dict[str, Module]) -> dict[str, tuple[int, int]]:
    """Return the lines of code and the number of functions of each, and the sums."""
    found = {
        name: (len(module.lines()), len(module.functions()))
        for name, module in modules.items()
    }
    sums = [sum(column) for column in zip(*found.values(), strict=True)]
    return {**found, "all": (sums[0], sums[1])}


def print_all(modules: dict[str, Module]) -> None:
    """Print what is long, and what the trainer keeps to itself."""
    functions = [each for module in modules.values() for each in module.functions()]
    print("\nThe longest functions:")
    for name, size in sorted(functions, key=lambda each: -each[1])[:NUM_LONGEST]:
        print(f"{size:6}  {name}")
    attributes = private_attributes(modules["trainer.py"], "Trainer")
    print(f"\nPrivate attributes of Trainer: {len(attributes)}")
    print("\n".join(f"        {name}" for name in attributes))


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", metavar="REF", help="a commit to show beside it")
    old_ref = parser.parse_args().old
    modules = modules_here()
    new, old = sizes(modules), sizes(modules_at(old_ref)) if old_ref else {}
    print(" lines  functions" + (f"   at {old_ref}" if old else ""))
    nothing = (0, 0)
    for name in [*sorted((new | old).keys() - {"all"}), "all"]:
        row = "{:6} {:10}".format(*new.get(name, nothing))
        if old:
            row += "   {:6} {:5}".format(*old.get(name, nothing))
        print(f"{row}  {name}")
    print_all(modules)
    return 0


if __name__ == "__main__":
    sys.exit(main())
