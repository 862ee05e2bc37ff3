"""Centres of symmetry of a cell near the mean place of a site."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: How far a site may lie on average from a centre of inversion, from a three-fold axis or from a quarter of the cell
#: and still belong there, as a part of the shorter lattice vector.
NEAR_HALF, NEAR_THIRD, NEAR_QUARTER = 0.13, 0.06, 0.03


def symmetric(basis: Floats, vectors: Floats) -> Floats:
    """``basis`` (k, 2) with those sites set to a high-symmetry place of the cell that lie close to one.

    Half-cells (centres of inversion of any lattice) draw from 13 % of the shorter vector, further than ferroelectrics
    move their ions; the centres of the triangles of a hexagonal lattice from 6 %; quarters of the cell (the dumbbells
    of diamond and zinc blende along [110]) from 3 %. A site that is nowhere near stays where it is on average, and a
    uniform displacement of it is then part of ``basis``. The first site is (0, 0) and stays.
    """
    short = min(np.hypot(*v) for v in vectors)
    ratio = np.hypot(*vectors[0]) / np.hypot(*vectors[1])
    cosine = abs(vectors[0] @ vectors[1]) / (np.hypot(*vectors[0]) * np.hypot(*vectors[1]))
    rules = [(2, NEAR_HALF), (4, NEAR_QUARTER)]
    if abs(ratio - 1) < 0.08 and abs(cosine - 0.5) < 0.08:
        rules.insert(1, (3, NEAR_THIRD))
    out = np.array(basis, dtype=np.float64)
    for s in range(1, len(out)):
        for parts, reach in rules:
            place = np.rint(parts * out[s]) / parts
            if parts == 2 and np.allclose(place, np.rint(place)):
                continue  # the first site is there
            if np.hypot(*((out[s] - place) @ vectors)) < reach * short:
                out[s] = place
                break
    return out
