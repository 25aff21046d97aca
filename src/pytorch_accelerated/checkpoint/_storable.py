"""Turns what users put into checkpoints into what loads again without running code."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pytorch_accelerated.checkpoint._guards import DEEPEST_NESTING

_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    torch.dtype,
    torch.device,
    torch.Size,
)


def to_storable(obj: Any, what: str = "value", *, copy: bool = False) -> Any:
    """Convert nested values into tensors on the CPU and plain Python values.

    The result can be saved and loaded with ``torch.load(..., weights_only=True)``.

    ============================================ =======================================
    from                                         to
    ============================================ =======================================
    tensor, parameter                            tensor on the CPU (shared memory stays
                                                 shared)
    numpy number / array                         Python number / tensor (strings: list)
    ``Path``                                     ``str``
    ``datetime``, ``date``, ``time``             ISO 8601 text
    ``timedelta``                                seconds
    ``Enum``                                     its value
    dataclass                                    ``dict`` of its fields
    ``frozenset``                                ``set``
    named tuple                                  ``tuple``
    any other mapping                            ``dict`` (an ``OrderedDict`` stays one)
    ============================================ =======================================

    Args:
        obj: What to convert; it is not changed.
        what: What ``obj`` is called in an error message, e.g. ``"checkpoint_kwargs"``.
        copy: Copy tensors that are on the CPU already, so that the result is a
            snapshot that training does not change (needed for writing in the
            background).

    Raises:
        TypeError: For anything else; the message names the key and the type.
    """
    return _Converter(copy).convert(obj, what)


class _Converter:
    """Converts one structure; remembers storages, so that sharing is kept."""

    def __init__(self, copy: bool) -> None:
        self._copy = copy
        self._storages: dict[
            int, tuple[torch.UntypedStorage, torch.UntypedStorage]
        ] = {}
        self._open: set[int] = set()
        self._kinds: list[tuple[type, Callable[[Any, str], Any]]] = [
            (torch.Tensor, self._tensor),
            (enum.Enum, lambda value, what: self.convert(value.value, what)),
            (np.generic, self._numpy_number),
            (np.ndarray, self._array),
            (PurePath, lambda value, what: os.fspath(value)),
            (datetime.timedelta, lambda value, what: value.total_seconds()),
            (datetime.date, lambda value, what: value.isoformat()),
            (datetime.time, lambda value, what: value.isoformat()),
            (Mapping, self._mapping),
            (tuple, lambda value, what: tuple(self._items(value, what))),
            (list, self._items),
            (set, self._set),
            (frozenset, self._set),
            # subclasses, such as a str with methods
            (int, lambda value, what: int(value)),
            (float, lambda value, what: float(value)),
            (str, lambda value, what: str.__str__(value)),
        ]

    def convert(self, value: Any, what: str) -> Any:
        if type(value) in _PLAIN:
            return value
        if id(value) in self._open:
            raise TypeError(f"{what} contains itself, so it cannot be stored.")
        if len(self._open) > DEEPEST_NESTING:
            raise TypeError(
                f"{what[:200]}... is nested more than {DEEPEST_NESTING} levels deep, "
                "which would be refused when it is loaded. Store something flatter."
            )
        self._open.add(id(value))
        try:
            return self._convert_other(value, what)
        finally:
            self._open.discard(id(value))

    def _convert_other(self, value: Any, what: str) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return self._mapping(fields, what)
        for kind, convert in self._kinds:
            if isinstance(value, kind):
                return convert(value, what)
        raise self._refusal(value, what)

    def _refusal(self, value: Any, what: str) -> TypeError:
        return TypeError(
            f"{what} is a {type(value).__module__}.{type(value).__qualname__}, which "
            "cannot be stored in a checkpoint: loading it would mean running code from "
            "the file. Store a tensor, a number, a str, or a list or dict of these "
            "instead (for an object: its state_dict() or vars())."
        )

    def _items(self, values: Any, what: str) -> list[Any]:
        return [self.convert(item, f"{what}[{i}]") for i, item in enumerate(values)]

    def _set(self, values: Any, what: str) -> set[Any]:
        return {self.convert(item, f"{what} item {item!r}") for item in values}

    def _mapping(self, mapping: Mapping[Any, Any], what: str) -> dict[Any, Any]:
        kind: type[dict[Any, Any]] = dict
        for known in (OrderedDict, Counter):
            kind = known if isinstance(mapping, known) else kind
        converted = kind()
        for key, value in mapping.items():
            where = f"{what}[{key!r}]"
            new_key = self.convert(key, f"the key {key!r} of {what}")
            if new_key in converted:
                raise TypeError(f"{where}: two keys are stored as {new_key!r}.")
            converted[new_key] = self.convert(value, where)
        # the versions of a model's modules, which torch hangs on its state dicts
        versions = getattr(mapping, "_metadata", None)
        if versions is not None and kind is OrderedDict:
            converted._metadata = self.convert(versions, f"{what}._metadata")  # type: ignore[attr-defined]
        return converted

    def _numpy_number(self, number: np.generic, what: str) -> Any:
        plain = number.item()
        if isinstance(plain, np.generic):  # longdouble: Python has no such number
            raise self._refusal(number, what)
        return self.convert(plain, what)

    def _array(self, array: np.ndarray[Any, Any], what: str) -> Any:
        native = array.astype(array.dtype.newbyteorder("="), order="C")
        try:
            return torch.from_numpy(native)
        except TypeError:  # text, dates and objects have no tensor
            return self.convert(array.tolist(), what)

    def _tensor(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        if tensor.is_meta:
            raise TypeError(
                f"{what} is a tensor on the meta device: it has no data to store."
            )
        if is_traceable_wrapper_subclass(tensor):
            raise TypeError(
                f"{what} is a {type(tensor).__qualname__}, which cannot be stored as "
                "it is. Store a plain tensor: full_tensor() of a sharded one, "
                "dequantize() of a quantized one."
            )
        tensor = tensor.detach().as_subclass(torch.Tensor)
        tensor = tensor.resolve_conj().resolve_neg()
        if tensor.layout is not torch.strided or tensor.is_quantized:
            return tensor.to("cpu", copy=self._copy)
        storage = self._storage(tensor.untyped_storage())
        plain = torch.empty(0, dtype=tensor.dtype, device="cpu")
        return plain.set_(
            storage, tensor.storage_offset(), tensor.size(), tensor.stride()
        )

    def _storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        number = storage._cdata
        if number not in self._storages:
            host = storage.cpu()  # type: ignore[no-untyped-call]
            if self._copy and host.data_ptr() == storage.data_ptr():
                host = storage.clone()  # type: ignore[no-untyped-call]
            # the original is kept too, so that its number is not given to another
            self._storages[number] = (storage, host)
        return self._storages[number][1]
