"""Saves with file_log.so preloaded, which writes down every change to the files.

``python record_a_save.py FOLDER KIND ...`` leaves a folder for each kind, and in it
``before`` and ``live``, what was saved before and after, and ``log``. The kinds:
"prune" saves a second training state and deletes the first; "replace" saves one over
the first; "file" saves a file over another.
"""

import ctypes
import os
import shutil
import sys
from pathlib import Path

from runs import SMALL, save_with, train_another_epoch

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback


def main(folder: Path, *kinds: str) -> None:
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    for kind in kinds:
        trainer = SMALL.with_(save_best=True).run(folder / kind / "run")
        live = folder / kind / "live"
        save = {"prune": save_second, "replace": save_again, "file": save_file}[kind]
        save(trainer, live, 1)
        shutil.copytree(live, folder / kind / "before")
        train_another_epoch(trainer, folder / kind / "run" / "states" / "final")
        mark_states(trainer, shim)
        shim.log_start(os.fsencode(folder / kind / "log"), os.fsencode(live))
        save(trainer, live, 2)
        shim.log_mark(b"saved")
        shim.log_stop()


def mark_states(trainer: Trainer, shim: ctypes.CDLL) -> None:
    save_state = trainer.save_training_state

    def save_state_and_mark(*args, **kwargs) -> None:
        save_state(*args, **kwargs)
        shim.log_mark(b"saved")

    trainer.save_training_state = save_state_and_mark


def save_second(trainer: Trainer, folder: Path, number: int) -> None:
    saving = SaveTrainingStateCallback(folder, max_checkpoints=1, on_save_error="raise")
    save_with(saving, trainer, f"step_{number}")


def save_again(trainer: Trainer, folder: Path, number: int) -> None:
    trainer.save_training_state(folder / "step_1")


def save_file(trainer: Trainer, folder: Path, number: int) -> None:
    trainer.save_checkpoint(folder / "best.pt", {"number": number})


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
