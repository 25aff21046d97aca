"""The command line: ``python -m pytorch_accelerated.checkpoint DIRECTORY``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_accelerated.checkpoint._checkpoint import Checkpoint, scan
from pytorch_accelerated.checkpoint._manifest import MANIFEST_NAME


def main(arguments: Sequence[str] | None = None) -> int:
    """List the checkpoints of a directory.

    Returns:
        The exit status: 1 if ``--verify`` found a broken checkpoint, 2 if there is no
        such directory, else 0.
    """
    options = _create_parser().parse_args(arguments)
    if not options.directory.is_dir():
        sys.stderr.write(f"There is no directory {options.directory}.\n")
        return 2
    rows = _describe_all(options.directory, options.verify)
    sys.stdout.write(json.dumps(rows, indent=1) if options.json else _as_text(rows))
    sys.stdout.write("\n")
    return int(options.verify and any(row["problem"] for row in rows))


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pytorch_accelerated.checkpoint",
        description="List checkpoints, oldest first, and say what each holds.",
    )
    parser.add_argument("directory", type=Path, help="where checkpoints are kept")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the checksum of every file; exit with 1 if a checkpoint is "
        "broken (without it only sizes are compared)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _describe_all(directory: Path, verify: bool) -> list[dict[str, Any]]:
    if (directory / MANIFEST_NAME).exists():
        return [_describe(Checkpoint(directory), verify)]
    checkpoints, unreadable = scan(directory)
    rows = [{"path": str(path), "problem": reason} for path, reason in unreadable]
    return rows + [_describe(checkpoint, verify) for checkpoint in checkpoints]


def _describe(checkpoint: Checkpoint, verify: bool) -> dict[str, Any]:
    problem = checkpoint.why_broken(checksums=verify)
    row: dict[str, Any] = {"path": str(checkpoint.path), "problem": problem}
    if problem is None:
        row["num_bytes"] = checkpoint.num_bytes
        for key in ("progress", "world_size", "library_version", "saved_at", "files"):
            row[key] = checkpoint.manifest[key]
    return row


def _as_text(rows: list[dict[str, Any]]) -> str:
    return "\n".join(map(_as_line, rows)) or "no checkpoints"


def _as_line(row: dict[str, Any]) -> str:
    name = Path(row["path"]).name
    if row["problem"]:
        return f"{name}  BROKEN: {row['problem']}"
    facts = [
        f"{key} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in row["progress"].items()
    ]
    processes = f"{row['world_size']} process{'es' if row['world_size'] > 1 else ''}"
    size = f"{row['num_bytes'] / 1e6:,.1f} MB"
    return "  ".join([name, *facts, size, processes, f"saved {row['saved_at'][:19]}"])


if __name__ == "__main__":
    sys.exit(main())
