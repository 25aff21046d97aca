"""A training script to press Ctrl-C in: ``python interrupt_script.py FOLDER SECONDS``.

A training state is written in the background for that long.
"""

import os
import sys
import time
from pathlib import Path

from scenario import Scenario

from pytorch_accelerated.callbacks import TrainerCallback

FLUSH = os.fsync


class WriteForLong(TrainerCallback):
    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds

    def on_train_update_end(self, trainer, **kwargs):
        os.fsync = self._flush_slowly
        trainer.save_training_state(self.folder / "state", asynchronous=True)
        print("writing", flush=True)  # noqa: T201 (for the test to read)
        time.sleep(60)

    def _flush_slowly(self, descriptor):
        os.fsync = FLUSH
        time.sleep(self.seconds)
        print("written", flush=True)  # noqa: T201

    def on_exception(self, trainer, **kwargs):
        print("cleaning up", flush=True)  # noqa: T201
        time.sleep(0.5)


if __name__ == "__main__":
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    try:
        Scenario(callbacks=(WriteForLong(folder, seconds),)).run(folder)
    finally:
        print("train() has ended", flush=True)  # noqa: T201
