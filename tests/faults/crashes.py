"""What a loss of power may leave of a log of file operations.

After the method of Pillai et al., "All File Systems Are Not Created Equal" (OSDI
2014). Nothing is certain to be on the disk but what was flushed: the data of a file
after an fsync of the file, a name after an fsync of its folder. Whatever else was done
before the crash may be there or not, in any combination, and the data of a write may be
there in part, or as zeros.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

# From the path of each file to its content, and of each folder to None.
Tree = dict[str, bytes | None]

WHOLE, ZEROS, HALF = "whole", "zeros", "half"


@dataclass(frozen=True)
class Operation:
    """One line of the log, with numbers in place of the files and folders in it."""

    kind: str
    node: int = 0  # the file that is written, the folder of the name, what is flushed
    name: str = ""
    new_name: str = ""
    child: int = 0
    place: int = 0
    data: bytes = b""

    @property
    def is_data(self) -> bool:
        return self.kind in ("write", "resize")

    @property
    def is_name(self) -> bool:
        return self.kind in ("link", "remove", "rename")


class Log:
    """The operations of a log, and the states in which a crash may leave the disk.

    Args:
        root: The folder whose files were watched.
        before: A copy of it as it was before.
        log: What file_log.so wrote.
    """

    def __init__(self, root: Path, before: Path, log: Path) -> None:
        self._root = root
        self._folders: dict[int, dict[str, int]] = {0: {}}
        self._contents: dict[int, bytes] = {}
        self._number = 0
        for path in sorted(before.rglob("*")):
            folder = self._find(self._folders, path.parent.relative_to(before).parts)
            self._folders[folder][path.name] = self._new(path.is_dir())
            if path.is_file():
                number = self._find(self._folders, path.relative_to(before).parts)
                self._contents[number] = path.read_bytes()
        self._live = {number: dict(names) for number, names in self._folders.items()}
        lines = log.read_text().splitlines()
        self.operations = [self._parse(*line.split("\t")) for line in lines]

    def _new(self, is_folder: bool) -> int:
        self._number += 1
        if is_folder:
            self._folders[self._number] = {}
        else:
            self._contents[self._number] = b""
        return self._number

    @staticmethod
    def _find(folders: dict[int, dict[str, int]], parts: tuple[str, ...]) -> int:
        number = 0
        for part in parts:
            number = folders[number][part]
        return number

    def _parts(self, path: str) -> tuple[str, ...]:
        return Path(path).relative_to(self._root).parts

    def _parse(self, kind: str, path: str, *rest: str) -> Operation:
        if kind == "mark":
            return Operation(kind, name=path)
        parts = self._parts(path)
        folder = self._find(self._live, parts[:-1]) if parts else 0
        name = parts[-1] if parts else ""
        names = self._live[folder]
        if kind == "rename":
            *where, new_name = self._parts(rest[0])
            assert tuple(where) == parts[:-1], "not atomic: between two folders"
            names[new_name] = names.pop(name)
            return Operation(kind, folder, name, new_name)
        if kind == "remove":
            del names[name]
            return Operation(kind, folder, name)
        if kind in ("create", "mkdir"):
            names[name] = child = self._new(kind == "mkdir")
            if kind == "mkdir":
                self._live[child] = {}
            return Operation("link", folder, name, child=child)
        node = names[name] if parts else 0
        if kind == "write":
            place, data = int(rest[0]), bytes.fromhex(rest[1])
            return Operation(kind, node, place=place, data=data)
        place = int(rest[0]) if kind == "resize" else 0
        kind = "resize" if kind == "empty" else kind
        return Operation(kind, node, place=place)

    def is_after(self, mark: str, length: int) -> bool:
        """Say whether a mark is among the first operations."""
        return any(each.name == mark for each in self._marks(length))

    def _marks(self, length: int) -> list[Operation]:
        return [each for each in self.operations[:length] if each.kind == "mark"]

    def pending(self, length: int) -> list[int]:
        """Return which of the first operations are not certain to be on the disk."""
        flushed: set[int] = set()
        found = []
        for index in reversed(range(length)):
            operation = self.operations[index]
            if operation.kind == "sync":
                flushed.add(operation.node)
            elif operation.kind != "mark" and operation.node not in flushed:
                found.append(index)
        return found[::-1]

    def tree(
        self, length: int, lost: Set[int] = frozenset(), data: str = WHOLE
    ) -> Tree:
        """Return what is on the disk after some operations.

        Args:
            length: How many were made before the crash.
            lost: Which of them never came to the disk.
            data: How much of the data of those that are not certain did.
        """
        folders = {number: dict(names) for number, names in self._folders.items()}
        contents = dict(self._contents)
        unsure = set() if data == WHOLE else set(self.pending(length))
        for index, each in enumerate(self.operations[:length]):
            if index in lost:
                continue
            if each.is_data:
                how = data if index in unsure else WHOLE
                contents[each.node] = _changed(contents[each.node], each, how)
            elif each.kind == "link":
                folders[each.node][each.name] = each.child
            elif each.kind == "remove":
                folders[each.node].pop(each.name, None)
            elif each.kind == "rename" and each.name in folders[each.node]:
                names = folders[each.node]
                names[each.new_name] = names.pop(each.name)
        return _paths(0, folders, contents)

    def states(self, length: int, num_random: int) -> Iterator[Tree]:
        """Yield what a crash after some operations may leave.

        Args:
            length: How many operations were made.
            num_random: How many combinations to draw, besides the systematic ones.
        """
        pending = self.pending(length)
        names = {index for index in pending if self.operations[index].is_name}
        everything = set(pending)
        yield self.tree(length)
        for lost in (everything, names, everything - names):
            yield self.tree(length, lost)
        for data in (ZEROS, HALF):
            yield self.tree(length, data=data)
        for index in pending:
            yield self.tree(length, {index})
            yield self.tree(length, everything - {index})
        for _ in range(num_random if pending else 0):
            lost = {index for index in pending if random.random() < 0.5}
            yield self.tree(length, lost, random.choice([WHOLE, ZEROS, HALF]))


def _changed(content: bytes, operation: Operation, how: str) -> bytes:
    if operation.kind == "resize":
        return content[: operation.place].ljust(operation.place, b"\0")
    data = operation.data
    if how == ZEROS:
        data = bytes(len(data))
    elif how == HALF:
        data = data[: len(data) // 2]
    before = content[: operation.place].ljust(operation.place, b"\0")
    return before + data + content[operation.place + len(data) :]


def _paths(
    folder: int, folders: dict[int, dict[str, int]], contents: dict[int, bytes]
) -> Tree:
    tree: Tree = {}
    for name, number in sorted(folders[folder].items()):
        tree[name] = contents.get(number)
        if number in folders:
            below = _paths(number, folders, contents)
            tree.update({f"{name}/{path}": each for path, each in below.items()})
    return tree


def read_tree(folder: Path) -> Tree:
    """Return the files and folders below a folder."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def write_tree(tree: Tree, folder: Path) -> None:
    """Create a folder with what a tree says."""
    folder.mkdir()
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
