"""Checkpoints that are whole or absent, and that run no code when they are loaded.

Works with torch alone; the trainer uses it, and so can any other loop.

==================== ===================================================================
single files         :func:`save_file`, :func:`load_file`, :func:`to_storable`,
                     :func:`check_storable`
weights of a model   :func:`save_weights`, :func:`load_weights`, :func:`fit_to_model`,
                     :func:`explain_mismatch`
random generators    :func:`get_random_states`, :func:`set_random_states`
checkpoint folders   :class:`CheckpointWriter`, :class:`Checkpoint`,
                     :func:`list_checkpoints`, :func:`newest`, :func:`best`,
                     :func:`prune`, :func:`clean_leftovers`, :func:`new_token`
writing meanwhile    :class:`BackgroundWriter`
one run at a time    :class:`DirectoryLock`
states of 0.1.61     :func:`read_legacy_training_state`,
                     :func:`is_legacy_training_state`
==================== ===================================================================

``python -m pytorch_accelerated.checkpoint DIRECTORY`` lists checkpoints and, with
``--verify``, checks every file of them.
"""

from pytorch_accelerated.checkpoint._background import BackgroundWriter
from pytorch_accelerated.checkpoint._checkpoint import (
    Checkpoint,
    best,
    list_checkpoints,
    newest,
    prune,
)
from pytorch_accelerated.checkpoint._disk import new_token
from pytorch_accelerated.checkpoint._files import (
    CheckpointNotFoundError,
    load_file,
    save_file,
)
from pytorch_accelerated.checkpoint._legacy import (
    LegacyTrainingState,
    is_legacy_training_state,
    read_legacy_training_state,
)
from pytorch_accelerated.checkpoint._lock import DirectoryLock
from pytorch_accelerated.checkpoint._random_states import (
    get_random_states,
    set_random_states,
)
from pytorch_accelerated.checkpoint._storable import (
    NotStorableError,
    check_storable,
    to_storable,
)
from pytorch_accelerated.checkpoint._weights import (
    explain_mismatch,
    fit_to_model,
    load_weights,
    save_weights,
)
from pytorch_accelerated.checkpoint._writer import CheckpointWriter, clean_leftovers

__all__ = [
    "BackgroundWriter",
    "Checkpoint",
    "CheckpointNotFoundError",
    "CheckpointWriter",
    "DirectoryLock",
    "LegacyTrainingState",
    "NotStorableError",
    "best",
    "check_storable",
    "clean_leftovers",
    "explain_mismatch",
    "fit_to_model",
    "get_random_states",
    "is_legacy_training_state",
    "list_checkpoints",
    "load_file",
    "load_weights",
    "new_token",
    "newest",
    "prune",
    "read_legacy_training_state",
    "save_file",
    "save_weights",
    "set_random_states",
    "to_storable",
]
