"""The columns of a grain by the place that they have in its lattice."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stemloop.core.structure import Assignment, Grain

Integers = NDArray[np.int64]

#: The nearest columns around a place are those nearer than this times the nearest of them.
_NEAREST = 1.35
#: Their middle must be that of the secondary site within this part of the nearest distance.
_CENTRED = 0.3


class CellTable:
    """Columns of grain ``number`` by (i, j, site).

    low : (2,) smallest (i, j). table : (rows, columns, sites) index of a column, or -1. Where two columns claim one
    place, the one with the higher probability has it.
    """

    def __init__(self, assignment: Assignment, number: int) -> None:
        own = np.flatnonzero((assignment.grain == number) & (assignment.site >= 0))
        cell, site = assignment.cell[own], assignment.site[own]
        sites = len(assignment.grains[number].basis)
        self.own = own
        self.low = cell.min(axis=0) if len(own) else np.zeros(2, np.int64)
        size = cell.max(axis=0) - self.low + 1 if len(own) else np.zeros(2, np.int64)
        self.table = np.full((int(size[0]), int(size[1]), sites), -1, dtype=np.int64)
        order = np.argsort(assignment.p_site[own, site], kind="stable")
        i, j = (cell[order] - self.low).T
        self.table[i, j, site[order]] = own[order]

    def at(self, cell: Integers, site: Integers | int) -> Integers:
        """Index of the column at ``cell`` (..., 2) and ``site``, -1 where none is."""
        i, j = np.moveaxis(cell - self.low, -1, 0)
        rows, columns, _ = self.table.shape
        inside = (i >= 0) & (i < rows) & (j >= 0) & (j < columns)
        if not self.table.size:
            return np.full(inside.shape, -1, dtype=np.int64)
        found = self.table[np.where(inside, i, 0), np.where(inside, j, 0), site]
        return np.where(inside, found, -1)


def corners_of(grain: Grain, site: int) -> Integers | None:
    """(m, 2) cells of the primary columns around ``site``, whose middle it is; None if there are no such."""
    if site >= len(grain.basis):
        return None
    steps = nearest(grain, site, 0)
    away = _away(grain, steps, site, 0)
    centred = float(np.hypot(*away.mean(axis=0))) < _CENTRED * np.hypot(*away.T).min()
    return steps if len(steps) >= 2 and centred else None


def nearest(grain: Grain, site: int, other: int) -> Integers:
    """(m, 2) steps to the cells of the nearest columns of ``other`` around a column of ``site``."""
    steps = np.stack(np.meshgrid(np.arange(-3, 4), np.arange(-3, 4), indexing="ij"), axis=-1).reshape(-1, 2)
    distance = np.hypot(*_away(grain, steps, site, other).T)
    return steps[distance < _NEAREST * distance.min()].astype(np.int64)


def _away(grain: Grain, steps: Integers, site: int, other: int) -> NDArray[np.float64]:
    return (steps + grain.basis[other] - grain.basis[site]) @ grain.vectors
