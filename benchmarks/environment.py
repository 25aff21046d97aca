"""The environment of the benchmarks: the library and its peers, in benchmarks/.venv."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from plan import PEERS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENVIRONMENT = HERE / ".venv"
REQUIREMENTS = HERE / "requirements.txt"


class Environment:
    """A virtual environment that is either whole or built anew.

    A file in it says what it has. While something is installed there is another one: if
    that is found at the start, an installation was cut short, and nothing in there can
    be trusted.

    Args:
        folder: Where it is, or will be.
    """

    def __init__(self, folder: Path = ENVIRONMENT) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self._contents_file = folder / "contents.json"
        self._unfinished_file = folder / "unfinished"
        self._contents: dict[str, Any] = {}

    def build(self, peers: list[str]) -> dict[str, str]:
        """Install what is missing; return why peers could not be installed."""
        requirements = read_requirements(REQUIREMENTS.read_text(encoding="utf-8"))
        base = [
            requirement
            for package, requirement in requirements.items()
            if package == "accelerate" or package not in PEERS.values()
        ]
        self._contents = self.read_contents()
        if self._contents.get("base") != [sys.version, *base]:
            self._begin(base)
        self._install_library(base)
        reasons = {}
        for peer in peers:
            requirement = requirements[PEERS[peer]]
            if requirement in self._contents["installed"]:
                continue
            print(f"Installing {requirement}", file=sys.stderr, flush=True)
            error = self._install(requirement, *base)
            if error:
                # Not noted: it is tried again the next time.
                reasons[peer] = f"not installed: {error}"
            else:
                self._note(installed=[*self._contents["installed"], requirement])
        self._drop_unusable_torchvision()
        return reasons

    def read_contents(self) -> dict[str, Any]:
        """Return what it has, which is nothing if it is not whole."""
        if self._unfinished_file.exists() or not self._contents_file.exists():
            return {}
        contents: dict[str, Any] = json.loads(self._contents_file.read_text())
        return contents

    def _begin(self, base: list[str]) -> None:
        """Make it anew, with torch and accelerate."""
        print(f"Building {self.folder}", file=sys.stderr, flush=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        self._unfinished_file.touch()
        subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        error = self._install(*base, "editables", "hatchling")
        if error:
            sys.exit(f"The benchmarks need {' and '.join(base)}. {error}")
        self._note(base=[sys.version, *base], installed=base, library="")

    def _install_library(self, base: list[str]) -> None:
        """Install this library, in place, if what it depends on may have changed."""
        digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
        if self._contents["library"] == digest:
            return
        error = self._install("--no-build-isolation", "-e", str(ROOT), *base)
        if error:
            sys.exit(f"This library could not be installed. {error}")
        self._note(library=digest)

    def _install(self, *arguments: str) -> str:
        """Install something; return what went wrong, or ""."""
        self._unfinished_file.touch()
        command = [
            str(self.python),
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
        ]
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, check=False
        )
        # Pip has ended by itself. If it failed it has told so, and what it may have
        # left behind is not taken for installed.
        self._unfinished_file.unlink()
        return "" if done.returncode == 0 else reason_of(done.stdout + done.stderr)

    def _note(self, **contents: Any) -> None:
        self._contents.update(contents)
        new_file = self._contents_file.with_suffix(".new")
        new_file.write_text(json.dumps(self._contents, indent=2) + "\n")
        os.replace(new_file, self._contents_file)

    def _drop_unusable_torchvision(self) -> None:
        """Remove a torchvision for another torch: some peers import one if they can."""
        imports = [str(self.python), "-c", "import torchvision"]
        if subprocess.run(imports, capture_output=True, check=False).returncode != 0:
            command = [str(self.python), "-m", "pip", "uninstall", "--quiet", "-y"]
            subprocess.run([*command, "torchvision"], capture_output=True, check=False)


def read_requirements(text: str) -> dict[str, str]:
    """Return the lines of a requirements file by the name of the package."""
    lines = [line.strip() for line in text.splitlines()]
    return {
        re.split("[=<>! ]", line, maxsplit=1)[0]: line
        for line in lines
        if line and not line.startswith("#")
    }


def reason_of(output: str) -> str:
    """Return, of all that pip says when it fails, the line that says why."""
    lines = [line.strip() for line in output.splitlines()]
    conflicts = [line for line in lines if re.search(r" depends on torch\b", line)]
    errors = [line.removeprefix("ERROR: ") for line in lines if "ERROR: " in line]
    return (conflicts or errors or lines or ["pip failed"])[0]
