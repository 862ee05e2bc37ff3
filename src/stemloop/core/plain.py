"""Values as JSON can say them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def jsonable(value: Any, digits: int | None = None) -> Any:
    """``value`` in the words of JSON (RFC 8259), for every file and answer of ours that other programs read.

    A number that is not finite (NaN, infinity) is null: JSON has no word for it. Arrays, tuples and lists are lists,
    numpy's numbers are numbers, keys are strings, and what JSON does not know (a date, bytes, a complex number) is its
    ``str``. Floats are rounded to ``digits`` significant digits if they are given.

    >>> jsonable({"a": np.array([1.0, np.nan]), 2: (np.int64(3), True, None)})
    {'a': [1.0, None], '2': [3, True, None]}
    >>> jsonable(2 / 3, digits=3)
    0.667
    """
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): jsonable(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item, digits) for item in value]
    if isinstance(value, (float, np.floating)):
        return _number(float(value), digits)
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _number(value: float, digits: int | None) -> float | None:
    if not math.isfinite(value):
        return None
    return value if digits is None else float(f"{value:.{digits}g}")
