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

# Others that wait for the same process give up at about the same time.
_SECONDS_FOR_OTHERS = 3.0
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
    """Leave the last words of this process, and return those of the others.

    One that has lost contact waits for them for some seconds, and names those that say
    nothing. Never raises an error.

    Args:
        error: What ends the run of this process.
        where: Where its run stood, such as "in epoch 2".

    Returns:
        A sentence for each other process.
    """
    if PartialState().num_processes == 1:
        return []
    is_victim = has_lost_contact(error)
    words = _LOST if is_victim else f"raised {_shortened(repr(error))}"
    sentences: list[str] = []
    thread = threading.Thread(
        target=_exchange,
        args=(f"last_words/{next(_failed_runs)}", f"{words} {where}", sentences),
        daemon=True,
    )
    thread.start()
    thread.join(_SECONDS_FOR_STORE + is_victim * _SECONDS_FOR_OTHERS)
    return list(sentences)


def _exchange(name: str, words: str, sentences: list[str]) -> None:
    state, is_victim = PartialState(), words.startswith(_LOST)
    deadline = time.monotonic() + is_victim * _SECONDS_FOR_OTHERS
    has_culprit = not is_victim
    try:
        c10d: Any = torch.distributed.distributed_c10d
        store = c10d.PrefixStore(name, c10d._get_default_store())
        store.set(str(state.process_index), words)
        for process in range(state.num_processes):
            if process == state.process_index:
                continue
            said = _wait_for(str(process), store, deadline)
            if said or is_victim:
                sentences.append(f"Process {process} {said or _NOTHING}.")
            has_culprit = has_culprit or not said.startswith(_LOST)
        if not has_culprit:
            sentences.append(_ALL_WAIT)
        if is_victim and state.process_index == 0:
            time.sleep(1)  # others may be about to read what is kept here
    except Exception:
        if is_victim:
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
