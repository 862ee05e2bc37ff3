"""Where a position of the chosen field of view lies in the instrument's largest field.

The state vector holds the chosen field as ``field_height_m``, ``field_width_m`` and ``field_rotation_rad``; an
instrument without these always works in its largest field. Both share their centre ``c``: the position ``p`` of a
field of extent ``e``, turned by ``r`` from +x towards +y, is ``c + R(r) (p - e / 2)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stemloop.core.instruction import turned


def chosen(state: Mapping[str, Any], largest_m: tuple[float, float]) -> tuple[tuple[float, float], float]:
    """((height, width) [m], rotation [rad]) of the field of view in which positions count."""
    height, width = state.get("field_height_m"), state.get("field_width_m")
    extent = (largest_m[0] if height is None else float(height), largest_m[1] if width is None else float(width))
    return extent, float(state.get("field_rotation_rad") or 0.0)


def absolute(positions_m: ArrayLike, state: Mapping[str, Any], largest_m: tuple[float, float]) -> NDArray[np.float64]:
    """Positions (..., 2) (y, x) [m] of the chosen field, as positions of the largest one.

    >>> absolute([(0.0, 0.0)], {"field_height_m": 2.0, "field_width_m": 2.0}, (4.0, 6.0)).tolist()
    [[1.0, 2.0]]
    """
    positions = np.asarray(positions_m, np.float64)
    extent, rotation_rad = chosen(state, largest_m)
    if extent == tuple(largest_m) and rotation_rad == 0:
        return positions
    shift = (np.array(largest_m, float) - np.array(extent)) / 2
    return turned(positions + shift, np.array(largest_m, float) / 2, rotation_rad)
