"""What the processes of a job leave for each other to read when they fail.

A process that dies takes the others with it: their next exchange of tensors fails, with
an error that names an address or a time. Nothing here costs anything before that.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from typing import Any

import torch
from accelerate import PartialState

# Others that wait for the same process give up at about the same time; where a
# connection was closed, they do so at once.
_SECONDS_AFTER_TIMEOUT = 5.0
_SECONDS_AFTER_CLOSING = 2.0
# The store of the job may be out of reach, and then not answer at all.
_SECONDS_FOR_STORE = 2.0

_LOST = "lost contact"
_NOTHING = "has said nothing: it hangs, was killed, or ended outside of a run"
_ALL_WAIT = (
    "All processes wait for each other, in different places: do their loaders have "
    "different lengths, or is something that all must call, such as trainer.gather(), "
    "called by some only?"
)
_SIGNS_OF_LOST_CONTACT = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "gloo",
    "NCCL",
)

# Words of an earlier run that failed are not to be read again. All processes of a job
# run the same script, so they count alike.
_failed_runs = itertools.count()


def has_lost_contact(error: BaseException) -> bool:
    """Say whether an error means that another process did not do its part."""
    # torch may have been built without what connects processes.
    kinds = getattr(torch.distributed, "DistError", ())
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in _SIGNS_OF_LOST_CONTACT)
    )


def exchange(error: BaseException, where: str) -> list[str]:
    """Leave the last words of this process; if it has lost contact, return the others'.

    It waits for them for some seconds, and names the processes that say nothing. Never
    raises an error.

    Args:
        error: What ends the run of this process.
        where: Where its run stood, such as "in epoch 2".

    Returns:
        A sentence for each other process.
    """
    if PartialState().num_processes == 1:
        return []
    words, patience = f"raised {_shortened(repr(error))} {where}", 0.0
    if has_lost_contact(error):
        words = f"{_LOST} {where}"
        is_timeout = "Timed out" in str(error)
        patience = _SECONDS_AFTER_TIMEOUT if is_timeout else _SECONDS_AFTER_CLOSING
    name = f"last_words/{next(_failed_runs)}"
    sentences: list[str] = []
    thread = threading.Thread(
        target=_exchange, args=(name, words, patience, sentences), daemon=True
    )
    thread.start()
    thread.join(_SECONDS_FOR_STORE + patience)
    return list(sentences)


def _exchange(name: str, words: str, patience: float, sentences: list[str]) -> None:
    me, deadline = PartialState().process_index, time.monotonic() + patience
    try:
        c10d: Any = torch.distributed.distributed_c10d
        store = c10d.PrefixStore(name, c10d._get_default_store())
        store.set(str(me), words)
        if not patience:
            return
        all_have_lost = True
        for process in range(PartialState().num_processes):
            if process != me:
                said = _wait_for(str(process), store, deadline)
                sentences.append(f"Process {process} {said or _NOTHING}.")
                all_have_lost = all_have_lost and said.startswith(_LOST)
        if all_have_lost:
            sentences.append(_ALL_WAIT)
        if me == 0:
            time.sleep(0.5)  # others may be about to read what is kept here
    except Exception:
        sentences.append(f"{_owner_of_store()} has ended: see what it printed.")


def _wait_for(process: str, store: Any, deadline: float) -> str:
    while not store.check([process]):
        if time.monotonic() >= deadline:
            return ""
        time.sleep(0.05)
    said: bytes = store.get(process)
    return said.decode()


def _owner_of_store() -> str:
    """Return who keeps what the processes say to each other."""
    is_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return "The launcher" if is_launcher else "Process 0"


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."
