"""Reads numpy values from files of torch without letting a file build numpy's objects.

Scripts stored numpy numbers and arrays in files of version 0.1.61, where they could be
saved but not loaded. What stands for numpy while a file is unpickled only notes what is
said of them; a dtype with forged flags, for one, cannot be made of that.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

_NUMBERS = re.compile(r"[?biufc]\d*")


class _Dtype:
    def __init__(self, code: str, *flags: Any) -> None:
        self._code = code
        self._order: Any = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]

    def value(self) -> Any:
        if not _NUMBERS.fullmatch(self._code):
            raise ValueError(f"numpy values of the dtype {self._code!r} are not read")
        return np.dtype(self._code).newbyteorder(self._order)


class _Array:
    def __init__(self, *arguments: Any) -> None:
        self._state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._state = state

    def value(self) -> Any:
        _, shape, dtype, is_fortran, data = self._state
        flat = np.frombuffer(data, dtype.value())
        shaped = flat.reshape(shape[::-1]).T if is_fortran else flat.reshape(shape)
        return shaped.copy()


class _Scalar:
    def __init__(self, dtype: _Dtype, data: bytes) -> None:
        self._dtype, self._data = dtype, data

    def value(self) -> Any:
        return np.frombuffer(self._data, self._dtype.value())[0]


class _ArrayClass:
    """Stands for ``numpy.ndarray`` where it is an argument."""


STAND_INS: list[Any] = [
    (_Dtype, "numpy.dtype"),
    (_ArrayClass, "numpy.ndarray"),
    *(
        (stand_in, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for stand_in, name in ((_Array, "_reconstruct"), (_Scalar, "scalar"))
    ),
]


def with_numpy_values(content: Any) -> Any:
    """Return what was unpickled with the values in place of what stands for them."""
    return _replaced(content, {})


def _replaced(value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, _Dtype | _Array | _Scalar):
        return value.value()
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) not in known:
        known[id(value)] = value
        if isinstance(value, tuple):
            members = [_replaced(member, known) for member in value]
            if any(new is not old for new, old in zip(members, value, strict=True)):
                known[id(value)] = tuple(members)
        else:
            places = value.items() if isinstance(value, dict) else enumerate(value)
            for key, member in list(places):
                value[key] = _replaced(member, known)
    return known[id(value)]
