"""Turns what users put into checkpoints into what loads again without running code."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import io
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pytorch_accelerated.checkpoint._guards import DEEPEST_NESTING
from pytorch_accelerated.errors import CheckpointError

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
_LAYOUTS = {
    torch.strided,
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
}
# torch's safe loader reads no number of more than 255 bytes.
_LARGEST_BITS = 2039


class NotStorableError(CheckpointError, TypeError):
    """Something could not be loaded from a checkpoint again safely.

    Both ``except CheckpointError`` and ``except TypeError`` catch it.
    """


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
        NotStorableError: A TypeError, for anything else; the message names the key and
            the type.
    """
    converter = _Converter(copy)
    storable = converter.convert(obj, what)
    converter.fill()
    return storable


def check_storable(obj: Any, what: str) -> None:
    """Find out whether :func:`to_storable` would convert something, at little cost.

    Sharded tensors pass: they are put together before they are stored.

    Args:
        obj: What is to be stored.
        what: What it is called in an error message.

    Raises:
        NotStorableError: If it cannot be; the message names the key and the type.
    """
    _Checker(copy=False).convert(obj, what)


class _Converter:
    """Converts one structure; remembers storages, so that sharing is kept."""

    def __init__(self, copy: bool) -> None:
        self._copy = copy
        # What there will be of each storage, and what it is to hold.
        self._views: dict[
            tuple[int, torch.dtype], list[tuple[torch.Tensor, torch.Tensor]]
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
            (int, lambda value, what: self.convert(int(value), what)),
            (float, lambda value, what: float(value)),
            (str, lambda value, what: str.__str__(value)),
        ]

    def convert(self, value: Any, what: str) -> Any:
        if type(value) in _PLAIN:
            if type(value) is int and value.bit_length() > _LARGEST_BITS:
                raise NotStorableError(
                    f"{what} is a number of {value.bit_length()} bits; up to "
                    f"{_LARGEST_BITS} can be loaded again. Store it as text."
                )
            return value
        if id(value) in self._open:
            raise NotStorableError(f"{what} contains itself, so it cannot be stored.")
        if len(self._open) >= DEEPEST_NESTING:
            raise NotStorableError(
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

    def _refusal(self, value: Any, what: str) -> NotStorableError:
        return NotStorableError(
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
                raise NotStorableError(f"{where}: two keys are stored as {new_key!r}.")
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
        _refuse_if_unloadable(tensor, what)
        if is_traceable_wrapper_subclass(tensor):
            return self._wrapper(tensor, what)
        tensor = tensor.detach()
        is_plain = tensor.layout is torch.strided and not tensor.is_nested
        if not is_plain or tensor.is_quantized:
            return tensor.to("cpu", copy=self._copy)
        tensor = tensor.as_subclass(torch.Tensor).resolve_conj().resolve_neg()
        first, end = _span(tensor)
        if end - first < tensor.nbytes:  # expanded: its elements share memory
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        plain = torch.empty(0, dtype=tensor.dtype, device="cpu")
        # torch saves a storage as one of elements of one kind.
        place = tensor.untyped_storage()._cdata, tensor.dtype
        self._views.setdefault(place, []).append((plain, tensor))
        return plain

    def _wrapper(self, tensor: Any, what: str) -> torch.Tensor:
        """Convert a tensor that is made of others, such as a quantized one."""
        names, context = tensor.__tensor_flatten__()
        inner = {
            name: to_storable(getattr(tensor, name), f"{what}.{name}", copy=self._copy)
            for name in names
        }
        plain: torch.Tensor = type(tensor).__tensor_unflatten__(
            inner, context, tensor.size(), tensor.stride()
        )
        return plain

    def fill(self) -> None:
        """Give the tensors their values, of each storage only what they use."""
        for views in self._views.values():
            spans = [_span(tensor) for _, tensor in views]
            first = min(start for start, _ in spans)
            host = self._on_host(views[0][1], first, max(end for _, end in spans))
            for plain, tensor in views:
                offset = tensor.storage_offset() - first // tensor.element_size()
                plain.set_(host, offset, tensor.size(), tensor.stride())

    def _on_host(
        self, tensor: torch.Tensor, first: int, end: int
    ) -> torch.UntypedStorage:
        """Return some bytes of the storage of a tensor in the host's memory."""
        storage = tensor.untyped_storage()
        is_whole = first == 0 and end == storage.nbytes()
        if is_whole and storage.device.type == "cpu" and not self._copy:
            return storage
        part = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        part.set_(storage, first, (end - first,), (1,))
        return part.to("cpu", copy=True).untyped_storage()


class _Checker(_Converter):
    """Finds what cannot be stored, and copies no tensor for it."""

    def _tensor(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        if not hasattr(tensor, "full_tensor"):  # a sharded one is put together later
            _refuse_if_unloadable(tensor, what)
        return tensor


def _refuse_if_unloadable(tensor: torch.Tensor, what: str) -> None:
    kind = type(tensor).__qualname__
    if is_lazy(tensor):
        raise NotStorableError(
            f"{what} is a parameter of a lazy module, which has no shape yet. Let the "
            "model see a batch first."
        )
    if tensor.is_meta:
        raise NotStorableError(
            f"{what} is a tensor on the meta device: it has no data to store."
        )
    if is_traceable_wrapper_subclass(tensor) and (
        hasattr(tensor, "full_tensor")
        or type(tensor) not in torch.serialization.get_safe_globals()
    ):
        raise NotStorableError(
            f"{what} is a {kind}, which cannot be stored as it is. Store a plain "
            "tensor: full_tensor() of a sharded one, dequantize() of a quantized one. "
            "Or, if you trust its code, let torch load such tensors with "
            f"torch.serialization.add_safe_globals([{kind}])."
        )
    if tensor.layout not in _LAYOUTS:
        raise NotStorableError(
            f"{what} is a tensor with the layout {tensor.layout}, which cannot be "
            "stored. Store a plain tensor: to_dense() returns one."
        )
    if not tensor.is_quantized and not _can_be_saved(tensor.dtype):
        raise NotStorableError(
            f"{what} is a tensor of {tensor.dtype}, which torch cannot save. Store its "
            "bytes: view(torch.uint8)."
        )


@functools.cache
def _can_be_saved(dtype: torch.dtype) -> bool:
    try:
        torch.save(torch.empty(0, dtype=dtype), io.BytesIO())
    except KeyError:
        return False
    return True


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where in its storage a tensor starts and ends, in bytes."""
    first = tensor.storage_offset()
    if tensor.numel() == 0:
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = first + sum((n - 1) * step for n, step in steps)
    return int(first) * tensor.element_size(), int(last + 1) * tensor.element_size()
