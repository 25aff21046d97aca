"""Values of numpy in files, which numpy itself is not allowed to build.

Scripts stored numpy numbers and arrays in files of version 0.1.61, where they could be
saved but not loaded. What stands for numpy while a file is unpickled makes a value of
what the file says; a dtype with forged flags, for one, cannot be made of that.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np


class _Dtype:
    def __init__(self, code: str, *flags: Any) -> None:
        if not re.fullmatch(r"[?biufc]\d*", code):
            raise ValueError(f"numpy values of the dtype {code!r} are not read")
        self.value: Any = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, *rest = state
        super().__setstate__((version, shape, dtype.value, *rest))


def _create_array(*arguments: Any) -> Any:
    return _Array(0)


def _create_number(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.value)[0]


STAND_INS: list[Any] = [
    (_Array, "numpy.ndarray"),
    (_Dtype, "numpy.dtype"),
    (_create_array, "numpy.core.multiarray._reconstruct"),
    (_create_array, "numpy._core.multiarray._reconstruct"),
    (_create_number, "numpy.core.multiarray.scalar"),
    (_create_number, "numpy._core.multiarray.scalar"),
]
