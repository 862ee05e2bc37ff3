"""Images in MATLAB files (up to version 7), such as StatSTEM writes them. Runs in the child that reads."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import UnreadableFile
from stemloop.core.signal import Axis, Signal

_SMALLEST_PX = 16
_DEEPEST = 4


def read(path: str) -> list[Signal]:
    """The matrices of at least 16 x 16 numbers in a MATLAB file, fields of structures by their full name. A field
    ``dx`` beside ``obs`` is its step in angstrom (StatSTEM's convention). An :class:`UnreadableFile` if there is none.
    """
    from scipy.io import loadmat

    name = os.path.basename(path)
    try:
        content = loadmat(path, squeeze_me=True, struct_as_record=False)
    except Exception as error:
        raise UnreadableFile(f"{name} could not be read (MATLAB: {type(error).__name__}).") from None
    found: list[Signal] = []
    for key, value in content.items():
        if not key.startswith("__"):
            _collect(key, value, None, found, 0)
    if not found:
        raise UnreadableFile(f"{name} holds no image: no matrix of at least {_SMALLEST_PX} x {_SMALLEST_PX} numbers.")
    return found


def _collect(name: str, value: Any, step_A: float | None, found: list[Signal], depth: int) -> None:
    if isinstance(value, np.ndarray) and value.ndim in (2, 3) and value.dtype.kind in "buif":
        _add(name, value, step_A, found)
    elif depth < _DEEPEST:
        step = getattr(value, "dx", None)
        known = float(step) if isinstance(step, (int, float)) and math.isfinite(step) and step > 0 else None
        for key in getattr(value, "_fieldnames", None) or ():
            _collect(f"{name}.{key}", getattr(value, key), known if key == "obs" else None, found, depth + 1)


def _add(name: str, data: NDArray[Any], step_A: float | None, found: list[Signal]) -> None:
    if min(data.shape[:2]) < _SMALLEST_PX:
        return
    if data.ndim == 3:  # MATLAB keeps the frames last
        data = np.moveaxis(data, -1, 0)
    scale, unit = (step_A * 1e-10, "m") if step_A else (1.0, "px")
    y, x = (Axis(word, size, scale, 0.0, unit) for word, size in zip("yx", data.shape[-2:], strict=True))
    axes = (y, x) if data.ndim == 2 else (Axis("frame", len(data)), y, x)
    found.append(Signal(np.ascontiguousarray(data), axes, {"title": name, "reader": "MATLAB"}))
