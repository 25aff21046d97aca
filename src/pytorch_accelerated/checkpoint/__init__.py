"""Checkpoints that are whole or absent, and that run no code when they are loaded.

Works with torch alone; the trainer uses it, and so can any other loop.

==================== ===================================================================
single files         :func:`save_file`, :func:`load_file`, :func:`to_storable`
checkpoint folders   :class:`CheckpointWriter`, :class:`Checkpoint`
weights of a model   :func:`save_weights`, :func:`read_weights`, :func:`fit_to_model`
writing meanwhile    :class:`BackgroundWriter`
many of them         :func:`list_checkpoints`, :func:`newest`, :func:`prune`
one run at a time    :class:`DirectoryLock`, :func:`clean_leftovers`
random generators    :func:`get_random_states`, :func:`set_random_states`
states of 0.1.61     :func:`read_legacy_training_state`,
                     :func:`is_legacy_training_state`
==================== ===================================================================
"""

from pytorch_accelerated.checkpoint.directory import (
    DirectoryLock,
    clean_leftovers,
    list_checkpoints,
    newest,
    prune,
)
from pytorch_accelerated.checkpoint.files import (
    CheckpointNotFoundError,
    NotStorableError,
    load_file,
    save_file,
    to_storable,
)
from pytorch_accelerated.checkpoint.folder import (
    BackgroundWriter,
    Checkpoint,
    CheckpointWriter,
    fit_to_model,
    read_weights,
    save_weights,
)
from pytorch_accelerated.checkpoint.legacy import (
    is_legacy_training_state,
    read_legacy_training_state,
)
from pytorch_accelerated.checkpoint.random_states import (
    get_random_states,
    set_random_states,
)

__all__ = [
    "BackgroundWriter",
    "Checkpoint",
    "CheckpointNotFoundError",
    "CheckpointWriter",
    "DirectoryLock",
    "NotStorableError",
    "clean_leftovers",
    "fit_to_model",
    "get_random_states",
    "is_legacy_training_state",
    "list_checkpoints",
    "load_file",
    "newest",
    "prune",
    "read_legacy_training_state",
    "read_weights",
    "save_file",
    "save_weights",
    "set_random_states",
    "to_storable",
]
