"""Pairs of lattice vectors: the reduced pair and its standard order.

Angles follow ``core.structure``: positive from +x towards +y (clockwise on the screen, y down).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def angle(vector: Floats) -> float:
    """Direction [rad] of (row, col), positive from +x towards +y."""
    return float(np.arctan2(vector[0], vector[1]))


def standard(vectors: Floats, alike: float = 1.25) -> NDArray[np.int64]:
    """Whole-number matrix (2, 2) that turns two lattice vectors (rows) into the reduced pair in standard order.

    Gauss's reduction gives the shortest pair. Among the vectors at most ``alike`` times longer than its longer one, a1
    is the one nearest to +x and a2 the next from it towards +y, so that a slightly strained square or hexagonal lattice
    keeps its order.
    """
    change = np.eye(2, dtype=np.int64)
    while True:
        u, v = change @ vectors
        if u @ u > v @ v * (1 + 1e-12):
            change = change[::-1]
            continue
        times = round(float(u @ v) / float(u @ u))
        if times == 0:
            break
        change = np.stack([change[0], change[1] - times * change[0]])
    u, v = change @ vectors
    short = [np.array(c) for c in ((1, 0), (0, 1), (1, 1), (1, -1))]
    longest = alike * max(np.hypot(*u), np.hypot(*v))
    short = [sign * c @ change for c in short if np.hypot(*(c @ change @ vectors)) < longest for sign in (1, -1)]
    direction = [angle(c @ vectors) for c in short]
    one = int(np.argmin(np.abs(direction)))
    turn = (np.array(direction) - direction[one]) % (2 * np.pi)
    behind = [k for k in range(len(short)) if 0.1 < turn[k] < np.pi - 0.1]
    two = min(behind, key=lambda k: turn[k])
    return np.stack([short[one], short[two]])


def wrapped(fraction: Floats, vectors: Floats) -> Floats:
    """Places (..., 2) [px] of fractional places, moved by whole vectors next to the origin (for a reduced pair)."""
    return (fraction - np.rint(fraction)) @ vectors
