"""Ideal crystals seen from above: reference lattices that specimens are made of.

Coordinates are ASE's (x, y, z) [A]: x to the right (columns), y down (rows), z along the beam (into the page).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from stemloop.core.errors import UnknownName


@dataclass(frozen=True)
class Crystal:
    """A crystal with its zone axis along the beam, cut into slices for multislice.

    Parameters
    ----------
    cell_A : ((x, y), (x, y)) the two in-plane lattice vectors; the first is the reference direction (zigzag, [100]).
    basis : (element, fraction along the first vector, along the second, z [A]) of each atom of a repeat.
    repeat_A : height of a repeat along the beam [A]; slice_A : thickness of a slice, a whole fraction of it.
    layers : number of repeats in the nominal specimen; thickness_A : its nominal thickness [A].
    vibration_A : rms thermal displacement along one direction at 300 K [A] of each element; see ``CRYSTALS``.
    poisson : Poisson ratio of the sheet.
    """

    name: str
    cell_A: tuple[tuple[float, float], tuple[float, float]]
    basis: tuple[tuple[str, float, float, float], ...]
    repeat_A: float
    slice_A: float
    layers: int
    thickness_A: float
    poisson: float
    vibration_A: dict[str, float] = field(hash=False)

    def lattice(
        self, size_A: tuple[float, float], rotation_rad: float, shift_A: tuple[float, float], layers: int | None = None
    ) -> Atoms:
        """The undeformed crystal over ``size_A`` (height, width) and 4 A around it.

        ``rotation_rad`` turns the first lattice vector from +x towards +y, ``shift_A`` (y, x) moves the lattice.
        Atoms are ordered repeat by repeat, so that the atoms of a column have equal (x, y).
        """
        turn = np.array([[np.cos(rotation_rad), -np.sin(rotation_rad)], [np.sin(rotation_rad), np.cos(rotation_rad)]])
        vectors = np.array(self.cell_A) @ turn.T
        high = np.array([size_A[1], size_A[0]])
        corners = np.array([[0, 0], [high[0], 0], [0, high[1]], high]) - np.array(shift_A[::-1])
        index = corners @ np.linalg.inv(vectors)
        first, last = np.floor(index.min(0)).astype(int) - 4, np.ceil(index.max(0)).astype(int) + 4
        i, j = np.meshgrid(np.arange(first[0], last[0]), np.arange(first[1], last[1]), indexing="ij")
        fractions = np.array([b[1:3] for b in self.basis])
        cells = np.stack([i.ravel(), j.ravel()], axis=1)
        plane = ((cells[:, None] + fractions) @ vectors).reshape(-1, 2) + np.array(shift_A[::-1])
        element = np.tile([b[0] for b in self.basis], len(cells))
        height = np.tile([b[3] for b in self.basis], len(cells))
        inside = np.all((plane > -4) & (plane < high + 4), axis=1)
        plane, element, height = plane[inside], element[inside], height[inside]
        n = self.layers if layers is None else layers
        z = (height + self.repeat_A * np.arange(n)[:, None]).ravel()
        positions = np.column_stack([np.tile(plane, (n, 1)), z])
        return Atoms(np.tile(element, n), positions=positions, cell=[*high, n * self.repeat_A], pbc=False)


def _hexagon(a: float) -> tuple[tuple[float, float], tuple[float, float]]:
    return (a, 0.0), (a / 2, a * 3**0.5 / 2)


#: Lattice constants and rms vibrations (rounded) after Schoenfeld et al. (1983), doi:10.1107/S0108768183002645 (MoS2),
#: Abramov et al. (1995), doi:10.1107/S0108768195003752 (SrTiO3); graphene's in-plane vibration is about 0.063 A and
#: silicon in graphene is given 0.07 A.
CRYSTALS = {
    "MoS2": Crystal(
        "MoS2",
        _hexagon(3.16),
        (("S", 1 / 3, 1 / 3, 0.7975), ("Mo", 0.0, 0.0, 2.3925), ("S", 1 / 3, 1 / 3, 3.9875)),
        repeat_A=4.785,
        slice_A=1.595,
        layers=1,
        thickness_A=6.15,
        poisson=0.25,
        vibration_A={"Mo": 0.06, "S": 0.07},
    ),
    "graphene": Crystal(
        "graphene",
        _hexagon(2.46),
        (("C", 0.0, 0.0, 1.0), ("C", 1 / 3, 1 / 3, 1.0)),
        repeat_A=2.0,
        slice_A=2.0,
        layers=1,
        thickness_A=3.35,
        poisson=0.17,
        vibration_A={"C": 0.063, "Si": 0.07},
    ),
    "SrTiO3": Crystal(
        "SrTiO3",
        ((3.905, 0.0), (0.0, 3.905)),
        (
            ("Sr", 0.0, 0.0, 0.97625),
            ("O", 0.5, 0.5, 0.97625),
            ("Ti", 0.5, 0.5, 2.92875),
            ("O", 0.5, 0.0, 2.92875),
            ("O", 0.0, 0.5, 2.92875),
        ),
        repeat_A=3.905,
        slice_A=1.9525,
        layers=10,
        thickness_A=39.05,
        poisson=0.23,
        vibration_A={"Sr": 0.089, "Ti": 0.075, "O": 0.096},
    ),
}


def crystal(name: str) -> Crystal:
    """The crystal called ``name``, or an :class:`~stemloop.core.errors.UnknownName`."""
    if name not in CRYSTALS:
        raise UnknownName(f"unknown material {name!r}; known: {', '.join(sorted(CRYSTALS))}.")
    return CRYSTALS[name]


def vibrating(atoms: Atoms, vibration_A: dict[str, float], rng: np.random.Generator) -> NDArray[np.float64]:
    """Positions (n, 3) [A] of one frozen-phonon configuration: independent (Einstein) normal displacements in the
    plane of each atom, of rms ``vibration_A`` a direction (those along the beam do not change the projection)."""
    rms = np.array([vibration_A.get(symbol, 0.0) for symbol in atoms.symbols])
    positions = atoms.get_positions()
    positions[:, :2] += rms[:, None] * rng.normal(size=(len(atoms), 2))
    return np.asarray(positions)
