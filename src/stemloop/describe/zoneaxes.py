"""Crystals seen along a zone axis: the lattice of bright columns that an annular detector shows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stemloop.describe.vectors import standard, wrapped

Floats = NDArray[np.float64]

#: Brightness goes as Z to this power (between 1.6 and 2 for usual detectors; S. J. Pennycook, Ultramicroscopy 30 (1989)
#: 58, doi:10.1016/0304-3991(89)90173-3); columns fainter than a tenth of the brightest are not seen, and columns of
#: light elements (up to oxygen) not beside those four times as bright.
_POWER, _SEEN, _LIGHT, _LIGHT_SEEN = 1.7, 0.1, 8, 0.25
#: Columns closer than this [A] are one; columns that differ by less than this part are alike.
_ONE_COLUMN, _ALIKE = 0.45, 0.04

#: Atomic numbers of the elements below.
NUMBER = {
    "B": 5, "C": 6, "N": 7, "O": 8, "Al": 13, "Si": 14, "S": 16, "Ti": 22, "Cr": 24, "Mn": 25, "Fe": 26, "Co": 27,
    "Ni": 28, "Cu": 29, "Zn": 30, "Ga": 31, "Ge": 32, "As": 33, "Se": 34, "Sr": 38, "Mo": 42, "Ru": 44, "Pd": 46,
    "Ag": 47, "In": 49, "Ba": 56, "La": 57, "W": 74, "Ir": 77, "Pt": 78, "Au": 79, "Pb": 82, "Bi": 83,
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """Columns of a material along a zone axis.

    vectors_A : (2, 2) rows a1, a2 [A] of the lattice of what is seen. basis : (k, 2) fractional places, the brightest
    first at (0, 0). weight : (k,) brightness, the brightest 1.
    """

    material: str
    zone_axis: str
    vectors_A: Floats
    basis: Floats
    weight: Floats

    @property
    def name(self) -> str:
        return f"{self.material}{self.zone_axis}"


def projected(
    material: str, cell: Floats, atoms: list[tuple[str, float, float, float]], zone: tuple[int, int, int], name: str
) -> Candidate:
    """The columns of a crystal along ``zone`` (in its cell's own vectors).

    Parameters
    ----------
    cell : (3, 3) rows [A]. atoms : (element, and its fractional place) of each atom of the cell.
    """
    along = np.array(zone) @ cell
    plane = _plane(along)
    flat = cell @ plane.T
    vectors = _flat_lattice(flat, float(abs(np.linalg.det(cell)) / np.hypot(np.hypot(*along[:2]), along[2])))
    places = np.array([a[1:] for a in atoms]) @ flat
    bright = np.array([NUMBER[a[0]] ** _POWER for a in atoms])
    place, weight = _columns(places, bright, vectors)
    heavy = np.array([NUMBER[a[0]] > _LIGHT for a in atoms])
    seen = weight >= _LIGHT_SEEN * weight.max()
    if heavy.any():
        off = wrapped((place[:, None] - places[heavy][None]) @ np.linalg.inv(vectors), vectors)
        has_heavy = (np.hypot(off[..., 0], off[..., 1]) < _ONE_COLUMN).any(axis=1)
        seen |= has_heavy & (weight >= _SEEN * weight.max())
    place, weight = place[seen], weight[seen]
    vectors = _finest(place, weight, vectors)
    place, weight = _columns(place, weight, vectors)
    order = np.argsort(-weight, kind="stable")
    basis = (place[order] - place[order[0]]) @ np.linalg.inv(vectors)
    return Candidate(material, name, vectors, basis - np.floor(basis + 1e-6), weight[order] / weight.max())


def _plane(along: Floats) -> Floats:
    """(2, 3) unit vectors perpendicular to ``along`` and to each other."""
    unit = along / np.linalg.norm(along)
    first = np.eye(3)[int(np.argmin(np.abs(unit)))]
    one = first - (first @ unit) * unit
    one /= np.linalg.norm(one)
    return np.stack([one, np.cross(unit, one)])


def _flat_lattice(flat: Floats, area: float) -> Floats:
    """Reduced pair of the plane lattice that three projected vectors (3, 2) make; ``area`` [A^2] is its cell's."""
    several = [np.array(n) @ flat for n in itertools.product(range(-3, 4), repeat=3)]
    several = sorted((v for v in several if np.hypot(*v) > 1e-3), key=lambda v: float(np.hypot(*v)))
    for u, v in itertools.combinations(several[:60], 2):
        if abs(abs(u[0] * v[1] - u[1] * v[0]) - area) < 1e-3 * area:
            pair = np.array([u, v])
            return np.asarray(standard(pair, 1.12) @ pair)
    raise ValueError("the zone axis is not a lattice vector without common factor")


def _columns(places: Floats, bright: Floats, vectors: Floats) -> tuple[Floats, Floats]:
    """Atoms one behind the other as one column: mean places and summed brightness."""
    left = list(range(len(places)))
    where, weight = [], []
    while left:
        off = wrapped((places[left] - places[left[0]]) @ np.linalg.inv(vectors), vectors)
        same = [k for k, d in zip(left, np.hypot(*off.T), strict=True) if d < _ONE_COLUMN]
        share = bright[same] / bright[same].sum()
        where.append(places[left[0]] + share @ off[[left.index(k) for k in same]])
        weight.append(float(bright[same].sum()))
        left = [k for k in left if k not in same]
    return np.array(where), np.array(weight)


def _finest(places: Floats, weight: Floats, vectors: Floats) -> Floats:
    """The lattice with all shifts that take each column to one that is alike."""
    inverse = np.linalg.inv(vectors)
    for shift in places[1:] - places[0]:
        off = wrapped((places[:, None] + shift - places[None]) @ inverse, vectors)
        near = np.hypot(off[..., 0], off[..., 1])
        to = near.argmin(axis=1)
        if (near.min(axis=1) < 0.1).all() and (np.abs(weight[to] / weight - 1) < _ALIKE).all():
            several = [
                i * vectors[0] + j * vectors[1] + k * shift for i, j, k in itertools.product(range(-4, 5), repeat=3)
            ]
            short = sorted((v for v in several if np.hypot(*v) > 0.3), key=lambda v: float(np.hypot(*v)))[:40]
            first = short[0]
            second = next(v for v in short if abs(first[0] * v[1] - first[1] * v[0]) > 0.1 * first @ first)
            pair = np.array([first, second])
            reduced = np.asarray(standard(pair, 1.12) @ pair)
            kept = _columns(places, np.ones(len(places)), reduced)[0]
            again = [int(np.hypot(*wrapped((places - p) @ np.linalg.inv(reduced), reduced).T).argmin()) for p in kept]
            return _finest(places[again], weight[again], reduced)
    return vectors
