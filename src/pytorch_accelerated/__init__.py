"""Train PyTorch models with one readable loop, on top of Hugging Face Accelerate.

>>> from pytorch_accelerated import Trainer
"""

import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from accelerate import notebook_launcher
from accelerate.utils import set_seed

from pytorch_accelerated import callbacks, run_config, tracking, trainer, utils
from pytorch_accelerated.trainer import Trainer, TrainerPlaceholderValues

try:
    __version__ = version("pytorch-accelerated")
except PackageNotFoundError:  # used from its source, without being installed
    __version__ = "unknown"

# Names that scripts written for 0.1.61 may import from here.
accelerate_notebook_launcher: Callable[..., Any] = notebook_launcher
logger: logging.Logger = logging.getLogger(__name__)

__all__ = [
    "Trainer",
    "TrainerPlaceholderValues",
    "__version__",
    "accelerate_notebook_launcher",
    "callbacks",
    "logger",
    "notebook_launcher",
    "run_config",
    "set_seed",
    "tracking",
    "trainer",
    "utils",
]
