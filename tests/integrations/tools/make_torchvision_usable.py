"""Make PyPI's torchvision usable beside a CPU build of torch. For tests only.

    python make_torchvision_usable.py FOLDER
    PYTHONPATH=FOLDER python -m pytest ...

PyPI's wheels of torchvision for Linux are built for CUDA. Beside a CPU build of torch
they cannot be loaded: their CPU kernels are all there, but the functions of CUDA that
they call are not. This compiles stand-ins for those functions, which are never reached
on a CPU, and writes a ``sitecustomize.py`` that loads them when torchvision is
imported, in child processes too.

Does nothing if torch is built for CUDA. Needs ``gcc``, ``nm`` and the package
``nvidia-cuda-runtime`` of CUDA 13.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])

# Symbols of libc10_cuda and libtorch_cuda, as C++ compilers spell them.
NAMESPACES = ("_ZN3c104cuda", "_ZNK3c104cuda", "_ZN2at4cuda")

LIBRARIES = ("libc10_cuda.so", "libtorch_cuda.so")

SITECUSTOMIZE = '''\
import ctypes
import importlib.abc
import sys
import sysconfig
from pathlib import Path


class LoadStandIns(importlib.abc.MetaPathFinder):
    """Loads the stand-ins before torchvision, and finds nothing itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch  # torchvision expects its libraries to be loaded

            site_packages = Path(sysconfig.get_paths()["purelib"])
            libraries = list(site_packages.glob("nvidia/*/lib/libcudart.so.13"))
            libraries += sorted(Path(__file__).parent.glob("*.so"))
            for library in libraries:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        return None


sys.meta_path.insert(0, LoadStandIns())
'''


def missing_symbols():
    """Return the symbols of CUDA that torchvision's libraries want."""
    symbols = set()
    for library in (SITE_PACKAGES / "torchvision").glob("*.so"):
        listing = subprocess.run(
            ["nm", "-D", "--undefined-only", str(library)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        names = (line.split()[-1].split("@")[0] for line in listing.splitlines())
        symbols.update(name for name in names if name.startswith(NAMESPACES))
    return sorted(symbols)


def stand_in(symbol):
    """Return a definition in C of what torchvision may touch on a CPU: very little."""
    if "device_count" in symbol:
        return f"signed char {symbol}(void) {{ return 0; }}"
    if symbol.endswith("9allocatorE"):
        return f"void *{symbol};"
    return f"void {symbol}(void) {{ abort(); }}"


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    if torch.version.cuda is not None:
        return
    source = folder / "stand_ins.c"
    definitions = [stand_in(symbol) for symbol in missing_symbols()]
    source.write_text("\n".join(["#include <stdlib.h>", *definitions]) + "\n")
    for library in LIBRARIES:
        soname = f"-Wl,-soname,{library}"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", soname, "-o", folder / library, source],
            check=True,
        )
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
