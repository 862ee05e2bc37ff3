"""What exposures cost: whole electrons, of the run and by place on the specimen.

:class:`DoseLedger` reserves before an exposure and settles after it. With a :class:`~stemloop.instrument.limits.Region`
it also knows where: a :class:`Footprint` says which share of an exposure falls into which cell of a grid over the
specimen, and a :class:`DoseMap` adds them up. All sums are of whole numbers: they do not depend on the order, and the
cells of the map add up to the electrons that were spent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import DoseError, InputError, LimitError
from stemloop.core.field import absolute, chosen
from stemloop.core.instruction import Diffraction, Image, Instruction, Probe, Spectrum
from stemloop.core.protocols import InstrumentInfo
from stemloop.core.units import ANGSTROM_M
from stemloop.instrument.declaration import Region

_TILE = 64
#: A command whose electrons fall into more cells than this is refused.
MAX_CELLS = 4_000_000

Cells = NDArray[np.int64]


@dataclass(frozen=True)
class Footprint:
    """Where the electrons of one exposure go: ``cells`` (n, 2) (row, column) of the grid, each once, and their
    ``share`` (n,), which adds up to one."""

    cells: Cells
    share: NDArray[np.float64]

    def amounts(self, electrons: int) -> NDArray[np.int64]:
        """(n,): whole electrons of each cell, within one electron of its share; they add up to ``electrons``."""
        edges = np.rint(np.cumsum(self.share) * electrons).astype(np.int64)
        edges[-1] = electrons
        return np.diff(edges, prepend=0)


def _overlap(low: NDArray[np.float64], size: float) -> tuple[Cells, NDArray[np.float64]]:
    """Cells (n, k) that the intervals from ``low`` (n,) of length ``size`` meet, and the part (n, k) in each."""
    first = np.floor(low).astype(np.int64)
    cells = first[:, None] + np.arange(math.ceil(size) + 1)
    inside = np.minimum(cells + 1, (low + size)[:, None]) - np.maximum(cells, low[:, None])
    return cells, np.maximum(inside, 0.0) / size


def _gathered(cells: Cells, share: NDArray[np.float64], distinct: bool = False) -> Footprint:
    """Each cell once; ``distinct`` says that they are."""
    used = share > 0
    cells, share = cells[used], share[used]
    if distinct:
        return Footprint(cells, share / share.sum())
    low = cells.min(axis=0)
    width = int(cells[:, 1].max() - low[1]) + 1
    key, place = np.unique((cells[:, 0] - low[0]) * width + cells[:, 1] - low[1], return_inverse=True)
    total = np.bincount(place, share)
    return Footprint(np.stack(np.divmod(key, width), axis=1) + low, total / total.sum())


def _bounded(cells: float) -> None:
    if not cells <= MAX_CELLS:
        raise LimitError(
            f"the exposure covers {cells:.3g} parts of the dose grid, over the {MAX_CELLS} that are counted at a time: "
            "expose a smaller area at a time, or declare region with a larger cell_m."
        )


def _squares(places: NDArray[np.float64], side: float) -> Footprint:
    """Equal shares for squares of ``side`` around ``places`` (n, 2); all in cells."""
    _bounded(len(places) * (math.ceil(side) + 1) ** 2)
    (rows, in_row), (columns, in_column) = (_overlap(places[:, axis] - side / 2, side) for axis in (0, 1))
    cells = np.stack(np.broadcast_arrays(rows[:, :, None], columns[:, None, :]), axis=-1).reshape(-1, 2)
    return _gathered(cells, (in_row[:, :, None] * in_column[:, None, :]).ravel(), distinct=len(places) == 1)


def _rectangle(corner: NDArray[np.float64], down: NDArray[np.float64], along: NDArray[np.float64]) -> Footprint:
    """The rectangle from ``corner`` with the sides ``down`` and ``along`` (y, x), in cells; turned ones by sampling."""
    height, width = float(np.hypot(*down)), float(np.hypot(*along))
    if down[1] == 0 and along[0] == 0 and down[0] > 0 and along[1] > 0:
        _bounded((height + 2) * (width + 2))
        (rows, in_row), (columns, in_column) = _overlap(corner[:1], height), _overlap(corner[1:], width)
        cells = np.stack(np.meshgrid(rows[0], columns[0], indexing="ij"), axis=-1).reshape(-1, 2)
        return _gathered(cells, np.outer(in_row[0], in_column[0]).ravel(), distinct=True)
    counts = math.ceil(4 * height), math.ceil(4 * width)  # four samples a cell and direction
    _bounded(counts[0] * counts[1] / 16)
    s, t = ((np.arange(n) + 0.5) / n for n in counts)
    points = (corner + s[:, None, None] * down + t[None, :, None] * along).reshape(-1, 2)
    return _gathered(np.floor(points).astype(np.int64), np.ones(len(points)))


def footprint(
    asked: Instruction,
    region: Region,
    info: InstrumentInfo,
    state: Mapping[str, Any],
    exposed: int | None = None,
) -> Footprint:
    """Where the electrons of an exposing instruction (or of a beam left open at ``Probe``) go on the specimen.

    ``exposed`` is the number of positions that were exposed, from the first on, of one that was ended early.
    """
    stage = [float(state.get(f"stage_{axis}_m") or 0.0) for axis in "yx"] if region.follows_stage else [0.0, 0.0]

    def in_cells(positions: Any) -> NDArray[np.float64]:
        return np.asarray((absolute(positions, state, info.field_m) - stage) / region.cell_m)

    if isinstance(asked, Image):
        top_left, top_right, bottom_left = in_cells(asked.corners_m()[:3])
        done = asked.shape[0] if exposed is None else math.ceil(exposed / asked.shape[1])
        down, along = (bottom_left - top_left) * done / asked.shape[0], top_right - top_left
        if asked.rotation_rad == 0 and chosen(state, info.field_m)[1] == 0:
            down[1] = along[0] = 0.0  # rounding
        return _rectangle(top_left, down, along)
    side = math.sqrt(region.probe_area_m2) / region.cell_m
    if isinstance(asked, (Diffraction, Spectrum)):
        _bounded(asked.exposed_positions)
        positions = np.asarray(asked.positions_m, np.float64)[:exposed]
    elif isinstance(asked, Probe):
        positions = np.array([asked.position_m])
    else:
        raise InputError(f"{asked.kind} exposes no place.")
    return _squares(in_cells(positions), side)


class DoseMap:
    """Whole electrons in the cells of an unbounded grid."""

    def __init__(self) -> None:
        self._tiles: dict[tuple[int, int], NDArray[np.int64]] = {}

    def add(self, cells: Cells, amounts: NDArray[np.int64]) -> None:
        """Add ``amounts`` (n,) to ``cells`` (n, 2), each of which comes once."""
        for tile, index, chosen_ in self._split(cells):
            values = self._tiles.setdefault(tile, np.zeros((_TILE, _TILE), np.int64))
            values[index] += amounts[chosen_]

    def at(self, cells: Cells) -> NDArray[np.int64]:
        """(n,): the electrons in ``cells`` (n, 2)."""
        found = np.zeros(len(cells), np.int64)
        for tile, index, chosen_ in self._split(cells):
            if tile in self._tiles:
                found[chosen_] = self._tiles[tile][index]
        return found

    @staticmethod
    def _split(cells: Cells) -> Any:
        """(tile, index in it, which cells) for every tile that the cells meet."""
        tiles, places = np.divmod(cells, _TILE)
        low = tiles.min(axis=0)
        if len(cells) == 1 or (tiles == low).all():
            yield (int(low[0]), int(low[1])), (places[:, 0], places[:, 1]), slice(None)
            return
        key = (tiles[:, 0] - low[0]) * (int(tiles[:, 1].max() - low[1]) + 1) + tiles[:, 1] - low[1]
        order = np.argsort(key, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
            tile = tiles[group[0]]
            yield (int(tile[0]), int(tile[1])), (places[group, 0], places[group, 1]), group

    @property
    def worst(self) -> int:
        """The most electrons in one cell."""
        return max((int(tile.max()) for tile in self._tiles.values()), default=0)

    @property
    def total(self) -> int:
        """The electrons in all cells."""
        return sum(int(tile.sum()) for tile in self._tiles.values())

    def copy(self) -> DoseMap:
        """A map that changes without this one."""
        other = DoseMap()
        other._tiles = {tile: values.copy() for tile, values in self._tiles.items()}
        return other


class DoseLedger:
    """Counts electrons: reserved before an exposure, settled after it. Whole electrons, so that sums are exact.

    Each amount is rounded up to a whole electron. ``spent + reserved <= budget`` holds after every reservation, and
    with a ``region`` no cell's ``spent + reserved`` passes its limit; an instrument that gives more than was reserved
    is charged what it gave. ``spent`` and ``reserved`` are sums over all exposures.

    >>> ledger = DoseLedger(budget=1000)
    >>> ledger.reserve("a", 600.0)
    600
    >>> ledger.settle("a", 550.2)
    551
    >>> ledger.dose()["left"]
    449.0
    """

    def __init__(self, budget: float | None = None, spent: int = 0, region: Region | None = None) -> None:
        if budget is not None and not (math.isfinite(budget) and budget >= 0):
            raise InputError(f"the dose budget must be a number of electrons, zero or more; got {budget!r}.")
        self.budget = None if budget is None else math.floor(budget)
        self.spent = spent
        self.reserved = 0
        self.region = region
        self._reserved: dict[str, tuple[int, Footprint | None]] = {}
        self.committed = DoseMap()  # spent and reserved, by place
        self._cell_A2 = (region.cell_m / ANGSTROM_M) ** 2 if region else 1.0

    def footprint(
        self, asked: Instruction, info: InstrumentInfo, state: Mapping[str, Any], exposed: int | None = None
    ) -> Footprint | None:
        """Where an exposure goes (see :func:`footprint`); None where doses are not counted by place."""
        return None if self.region is None else footprint(asked, self.region, info, state, exposed)

    def reserve(self, command_id: str, electrons: float, where: Footprint | None = None) -> int:
        """Promise ``electrons`` to ``command_id``, or raise ``DoseError``; returns the whole electrons reserved."""
        amount = self._whole(electrons)
        if command_id in self._reserved:
            raise InputError(f"electrons are reserved for {command_id!r} already.")
        if self.budget is not None and self.spent + self.reserved + amount > self.budget:
            left = max(0, self.budget - self.spent - self.reserved)
            raise DoseError(
                f"the exposure needs {amount:.4g} electrons; {left:.4g} of the budget of {self.budget:.4g} are left. "
                "Ask for fewer positions or a shorter dwell, or start the server with a larger budget."
            )
        self._commit(where, amount, check=True)
        self._reserved[command_id] = amount, where
        self.reserved += amount
        return amount

    def settle(self, command_id: str, electrons: float | None = None, where: Footprint | None = None) -> int:
        """Charge what was given, or all that was reserved if nobody knows; returns the whole electrons charged.

        ``where`` they went is as reserved, unless it is given.
        """
        reserved, place = self._reserved[command_id]
        amount = reserved if electrons is None else self._whole(electrons)
        del self._reserved[command_id]
        self.reserved -= reserved
        self.spent += amount
        where = where or place
        if place is not None and (amount != reserved or where is not place):
            self.committed.add(place.cells, -place.amounts(reserved))
            self._commit(where, amount)
        return amount

    def recall(self, where: Footprint | None, electrons: int) -> None:
        """An exposure from before a restart: its electrons are in ``spent`` already, and were given at ``where``."""
        self._commit(where, electrons)

    def _commit(self, where: Footprint | None, amount: int, check: bool = False) -> None:
        if where is None or self.region is None or amount == 0:
            return
        amounts = where.amounts(amount)
        if check:
            densest = (self.committed.at(where.cells) + amounts) / self._cell_A2
            if (worst := int(np.argmax(densest))) >= 0 and densest[worst] > self.region.e_per_A2_max:
                self._refuse(where, worst, float(amounts[worst]) / self._cell_A2, float(densest[worst]))
        self.committed.add(where.cells, amounts)

    def _refuse(self, where: Footprint, worst: int, asked: float, total: float) -> None:
        assert self.region is not None
        y, x = (where.cells[worst] + 0.5) * self.region.cell_m
        raise DoseError(
            f"the exposure gives {asked:.4g} e/A^2 at (y, x) = ({y:.4g}, {x:.4g}) m of the specimen, which had "
            f"{total - asked:.4g} already; the limit is {self.region.e_per_A2_max:.4g} e/A^2. "
            "Expose another place, or ask for a shorter dwell, a lower current or a larger pixel."
        )

    @property
    def worst_e_per_A2(self) -> float:
        """The densest dose of any place [e/A^2], reservations included; 0 where doses are not counted by place."""
        return self.committed.worst / self._cell_A2 if self.region else 0.0

    def dose(self) -> dict[str, float]:
        """``budget``, ``spent``, ``reserved`` and ``left`` in electrons (``inf`` without a budget); with doses by place
        also ``e_per_A2`` and ``e_per_A2_max``, the densest and the limit."""
        budget = math.inf if self.budget is None else float(self.budget)
        left = max(0.0, budget - self.spent - self.reserved)
        dose = {"budget": budget, "spent": float(self.spent), "reserved": float(self.reserved), "left": left}
        if self.region is not None:
            dose.update(e_per_A2=self.worst_e_per_A2, e_per_A2_max=self.region.e_per_A2_max)
        return dose

    def copy(self) -> DoseLedger:
        """A ledger that goes on from here without this one: for plans that are only checked."""
        other = DoseLedger(self.budget, self.spent, self.region)
        other.reserved, other._reserved = self.reserved, dict(self._reserved)
        other.committed = self.committed.copy()
        return other

    @staticmethod
    def _whole(electrons: float) -> int:
        if not (math.isfinite(electrons) and electrons >= 0):
            raise InputError(f"a dose is a number of electrons, zero or more; got {electrons!r}.")
        return math.ceil(electrons)
