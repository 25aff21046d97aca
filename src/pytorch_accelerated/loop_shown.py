"""The loop as a trainer will run it: who defines each step, and who hears each event.

What is shown is the map of a run in the documentation of the module ``trainer``, with
what a trainer has in the place of each name in it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_PACKAGE = Path(__file__).parent
_EVENT_OR_METHOD = re.compile(r"\bon_\w+|\b\w+(?=\()")
_INDENT = " " * 4


class Shown(str):
    """A text that has been printed, and that a notebook shows no second time."""

    __slots__ = ()

    def _ipython_display_(self) -> None:
        """Show nothing."""


def loop_of(trainer: Trainer, map_of_run: str) -> Shown:
    """Return the loop of a trainer as text.

    Args:
        trainer: The trainer.
        map_of_run: The documentation whose indented lines are the map.
    """
    rows = list(_rows(trainer, map_of_run))
    width = max((len(left) for left, right in rows if right), default=0) + 2
    lines = [f"{left:{width}}{right}" if right else left for left, right in rows]
    return Shown("\n".join([*lines, "", "* not of the library"]))


def _rows(trainer: Trainer, map_of_run: str) -> Iterator[tuple[str, str]]:
    """Yield the lines: what happens, and where it is written."""
    shown = set()
    for line in map_of_run.splitlines():
        text = line.strip()
        if not line.startswith(_INDENT) or not text:
            continue
        indent = line[len(_INDENT) : -len(line.lstrip())]
        for part in text.split(", ") if _EVENT_OR_METHOD.search(text) else [text]:
            left, places = indent + re.sub(" {2,}", "  ", part), [""]
            if found := _EVENT_OR_METHOD.search(part):
                shown.add(found[0])
                places = _places(trainer, found[0]) or ["-"]
            for place in places:
                yield left, place
                left = ""
    others = [name for name in _overridden(trainer) if name not in shown]
    if others:
        yield "", ""
        yield "replaced besides", ""
    for name in others:
        yield f"{_INDENT}{name}()", _place(getattr(trainer, name))


def _places(trainer: Trainer, name: str) -> list[str]:
    if name.startswith("on_"):
        return list(map(_place, trainer.callback_handler.listeners(name)))
    return [_place(getattr(trainer, name))]


def _place(member: Any) -> str:
    """Return the class, the file and the line of a method, marked if it is a user's."""
    function = inspect.unwrap(getattr(member, "__func__", member))
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{member!r} *"
    owner = function.__qualname__.rpartition(".")[0].rpartition("<locals>")[2]
    if not owner and hasattr(member, "__self__"):  # a function that was put there
        owner = type(member.__self__).__name__
    path, mark = Path(code.co_filename), " *"
    if path.is_relative_to(_PACKAGE):
        path, mark = path.relative_to(_PACKAGE.parent), ""
    elif path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    words = (owner.lstrip("."), f"{path}:{code.co_firstlineno}{mark}")
    return ", ".join(filter(None, words))


def _overridden(trainer: Trainer) -> Iterator[str]:
    """Yield the names of the library's methods that a user's class has replaced."""
    package, classes = __name__.partition(".")[0], type(trainer).__mro__
    ours = next(k for k in classes if k.__module__.partition(".")[0] == package)
    for each in classes[: classes.index(ours)]:
        for name, value in vars(each).items():
            if name[:2] != "__" and inspect.isroutine(value) and hasattr(ours, name):
                yield name
