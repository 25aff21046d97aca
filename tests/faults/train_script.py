"""A training script for launchers; the second process dies once, after some updates.

``torchrun ... train_script.py FOLDER NUM_UPDATES``
"""

import os
import signal
import sys
from pathlib import Path

from runs import finish
from scenario import Scenario

from pytorch_accelerated.callbacks import TrainerCallback


class DieOnce(TrainerCallback):
    def __init__(self, num_updates: int, mark: Path) -> None:
        self.num_updates = num_updates
        self.mark = mark

    def on_train_step_start(self, trainer, **kwargs):
        is_due = trainer.num_updates == self.num_updates
        if is_due and os.environ["RANK"] == "1" and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dying = DieOnce(int(sys.argv[2]), folder / "has died")
    finish(Scenario(callbacks=(dying,)), folder)()
