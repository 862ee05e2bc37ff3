"""From a material's name to atoms: reference cells, strained supercells and defects.

Strain is applied as ``F = I + e`` in the plane: cell and positions follow affinely, the third axis stays. Strain is
referred to the *calculator's own* equilibrium lattice (:func:`equilibrium`), found once for each supercell size, since
a calculator that samples only Gamma has a slightly different lattice in each supercell and none has the experimental
one (GFN1-xTB: MoS2 at 3.28 A instead of 3.16 A).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk, graphene, mx2
from numpy.typing import NDArray
from scipy.optimize import minimize, root

from stemloop.core.errors import CalculationError, InputError
from stemloop.core.registry import Registry
from stemloop.energetics.calculators import CALCULATORS, Result, Task

#: Height [A] of the cell of a sheet.
SHEET_CELL_A = 20.0

#: The slope dE/d ln(length) [eV a cell] at which the search for an equilibrium ends.
RESIDUAL_EV = 1.2e-3

Run = Callable[[Sequence[Task]], list[Result]]


@dataclass(frozen=True)
class Defect:
    """One atom of ``element`` is taken away and, for a dopant, one of ``by`` put in its place."""

    element: str
    by: str | None = None


@dataclass(frozen=True)
class Material:
    """A material as the calculators see it, seen along the beam: its a axis along +x.

    build : primitive cell from the lattice lengths [A]. start : lengths that the search for the equilibrium begins at.
    symmetry : of the plane, ``hexagonal`` or ``square``. supercell : repeats (n, n) that each calculator needs, by
    name (chosen by ``benchmarks/energetics.py``). defects : by the name of the site's class
    (:data:`stemloop.core.structure.SITES`); defect_supercell : repeats for them.
    """

    name: str
    calculator: str
    symmetry: str
    build: Callable[..., Atoms]
    start: dict[str, tuple[float, ...]]
    supercell: dict[str, int]
    defects: dict[str, Defect] = field(default_factory=dict)
    defect_supercell: int = 1
    sheet: bool = True


#: Every material by name.
MATERIALS: Registry[Material] = Registry("material")


def _sheet(atoms: Atoms) -> Atoms:
    atoms.set_cell([*atoms.cell.lengths()[:2], SHEET_CELL_A, *atoms.cell.angles()])
    atoms.center(axis=2)
    atoms.pbc = True
    return atoms


def _mos2(a: float, thickness: float) -> Atoms:
    return _sheet(mx2("MoS2", kind="2H", a=a, thickness=thickness, vacuum=1.0))


def _graphene(a: float) -> Atoms:
    return _sheet(graphene(a=a, vacuum=1.0))


def _srtio3(a: float) -> Atoms:
    sites = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]
    return Atoms("SrTiO3", scaled_positions=sites, cell=[a, a, a], pbc=True)


MATERIALS.register("MoS2")(
    Material(
        "MoS2",
        "GFN1-xTB",
        "hexagonal",
        _mos2,
        {"GFN1-xTB": (3.28280, 3.13711), "CHGNet": (3.19, 3.13)},
        {"GFN1-xTB": 5, "CHGNet": 1},
        {"vacancy": Defect("S"), "dopant": Defect("S", "Se")},
        defect_supercell=4,
    )
)
MATERIALS.register("graphene")(
    Material(
        "graphene",
        "GFN1-xTB",
        "hexagonal",
        _graphene,
        {"GFN1-xTB": (2.45715,), "CHGNet": (2.47,)},
        {"GFN1-xTB": 5, "CHGNet": 1},
        {"vacancy": Defect("C"), "dopant": Defect("C", "Si")},
        defect_supercell=5,
    )
)
MATERIALS.register("SrTiO3")(
    Material("SrTiO3", "CHGNet", "square", _srtio3, {"CHGNet": (3.943,)}, {"CHGNet": 1}, sheet=False)
)


def deformed(atoms: Atoms, strain: Sequence[float] | NDArray[np.float64]) -> Atoms:
    """``atoms`` under the in-plane strain (e_xx, e_yy, e_xy): cell and positions by ``F = I + e``."""
    F = deformation(strain)
    strained = atoms.copy()
    strained.set_cell(atoms.cell.array @ F.T, scale_atoms=True)
    return strained


def deformation(strain: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, 3): ``F = I + e`` for the in-plane strain (e_xx, e_yy, e_xy)."""
    e_xx, e_yy, e_xy = (float(e) for e in strain)
    return np.eye(3) + np.array([[e_xx, e_xy, 0.0], [e_xy, e_yy, 0.0], [0.0, 0.0, 0.0]])


def strain_gradient(result: Result, cell: NDArray[np.float64], strain: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3,): dE/d(e_xx, e_yy, e_xy) [eV] of the cell, from its Cauchy stress: ``dE/dF = V s F^-T``."""
    P = abs(np.linalg.det(cell)) * result.stress @ np.linalg.inv(deformation(strain)).T
    return np.array([P[0, 0], P[1, 1], P[0, 1] + P[1, 0]])


@dataclass(frozen=True)
class Equilibrium:
    """The calculator's own minimum: lattice ``lengths`` [A], ``energy`` [eV a primitive cell] and the primitive
    ``cell`` there; ``repeats`` is the supercell (n, n) that it was found in."""

    lengths: tuple[float, ...]
    energy: float
    cell: Atoms
    repeats: int

    @property
    def supercell(self) -> Atoms:
        """The unstrained supercell."""
        return supercell(self.cell, self.repeats)


def supercell(cell: Atoms, repeats: int) -> Atoms:
    """``cell`` repeated (n, n) in the plane; a bulk cell that is one high stays so."""
    return cell.repeat((repeats, repeats, 1))


def equilibrium(material: Material, calculator: str, repeats: int, run: Run) -> Equilibrium:
    """Minimise the energy of ``material``'s ``repeats`` x ``repeats`` supercell over its lattice lengths.

    BFGS in ``12 ln(length / start)`` (there a covalent sheet's curvature [eV] is near one) with the exact gradient
    ``dE/dp = V s : L - sum f . (dr/dp - L r)``, ``L`` the rate at which the cell deforms with the length ``p``. Ends
    below 1.2 meV a unit strain (6 ueV at 0.5 %), which places the lattice within 1e-5 of itself; lengths are rounded to
    1e-5 A.

    Raises
    ------
    CalculationError : no minimum within 40 calculations, or one more than 8 % away from where the search began.
    """
    start = np.array(material.start.get(calculator, material.start[material.calculator]))

    def lengths(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return start * np.exp(x / 12)

    def build(p: NDArray[np.float64]) -> Atoms:
        return supercell(material.build(*p), repeats)

    def solve(p: NDArray[np.float64]) -> Result:
        return run([Task.of(build(p), calculator)])[0]

    origin = solve(start).energy

    def objective(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        p = lengths(x)
        result, atoms, slope = solve(p), build(p), np.empty(len(p))
        for i in range(len(p)):
            step = np.zeros(len(p))
            step[i] = 1e-4
            above, below = build(p + step), build(p - step)
            rate = np.linalg.inv(atoms.cell.array) @ (above.cell.array - below.cell.array) / 2e-4
            drift = (above.positions - below.positions) / 2e-4 - atoms.positions @ rate
            slope[i] = atoms.get_volume() * np.sum(result.stress * rate) - np.sum(result.forces * drift)
        return (result.energy - origin) / repeats**2, slope * p / 12 / repeats**2

    found = minimize(
        objective, np.zeros(len(start)), jac=True, method="BFGS", options={"gtol": RESIDUAL_EV / 12, "maxiter": 20}
    )
    if np.abs(found.jac).max() > RESIDUAL_EV / 12:
        # energies in single precision are too coarse to search by near the minimum; their gradients are not
        # (the stubs of scipy know no function with a gradient of any float type)
        search: Any = root
        zero = search(lambda x: objective(x)[1], found.x, options={"eps": 1e-2, "xtol": 1e-6, "maxfev": 20})
        found.x, found.jac = zero.x, zero.fun
    if np.abs(found.jac).max() > 1e-3 or np.abs(found.x).max() > 12 * 0.08:
        raise CalculationError(
            f"{calculator} has no equilibrium of {material.name} near {start} A in a {repeats} x {repeats} supercell. "
            "Choose another supercell or calculator."
        )
    p = np.round(lengths(found.x), 5)
    energy = solve(p).energy / repeats**2
    return Equilibrium(tuple(p.tolist()), energy, material.build(*p), repeats)


# ------------------------------------------------------------------------------------------------------ defects


def defect_cell(perfect: Atoms, defect: Defect) -> Atoms:
    """``perfect`` with ``defect`` at the site nearest to its middle (the highest one where several are as near).

    The neighbours are moved by up to 0.02 A, always the same way, so that a relaxation can leave a symmetric saddle.
    """
    candidates = [i for i, symbol in enumerate(perfect.symbols) if symbol == defect.element]
    if not candidates:
        raise InputError(f"{perfect.get_chemical_formula()} has no {defect.element} to take away.")
    middle = perfect.cell.array.sum(axis=0) / 2
    apart = perfect.positions[candidates, :2] - middle[:2]
    far = np.round(np.hypot(apart[:, 0], apart[:, 1]), 3)
    site = candidates[int(np.lexsort((-perfect.positions[candidates, 2], far))[0])]
    damaged = perfect.copy()
    near = [i for i in range(len(perfect)) if i != site and perfect.get_distance(i, site, mic=True) < 3.0]
    damaged.positions[near] += np.random.default_rng(7).uniform(-0.02, 0.02, (len(near), 3))
    if defect.by is None:
        del damaged[site]
    else:
        damaged.symbols[site] = defect.by
    return damaged


def _ring(element: str, bond: float, angle_deg: float) -> Atoms:
    """A crown of eight atoms (S8, Se8): bond [A], bond angle [degrees]."""
    chord = 2 * bond * np.sin(np.radians(angle_deg) / 2)  # between second neighbours, on one of two squares
    radius = chord / np.sqrt(2)
    lift = np.sqrt(max(bond**2 - (2 * radius * np.sin(np.pi / 8)) ** 2, 0.0)) / 2
    turn = np.arange(8) * np.pi / 4
    positions = np.stack([radius * np.cos(turn), radius * np.sin(turn), lift * (-1.0) ** np.arange(8)], axis=1)
    return Atoms(f"{element}8", positions=positions)


def reference_task(element: str, calculator: str) -> Task:
    """The calculation that ``element``'s chemical potential comes from (energy of the cell over its atoms).

    S and Se: the relaxed eight-membered ring in a box of 16 A (their molecular solids are made of rings; cohesion
    between rings, about 0.1 eV an atom, is left out). Si: the diamond crystal in a cubic cell of 64 atoms at the
    experimental lattice constant of 5.431 A.
    """
    CALCULATORS[calculator].require()
    if element in ("S", "Se"):
        ring = _ring(element, 2.05 if element == "S" else 2.34, 108.0)
        ring.set_cell([16.0, 16.0, 16.0])
        ring.center()
        ring.pbc = True
        return Task.of(ring, calculator, relax_steps=60, fmax=0.02)
    if element == "Si":
        return Task.of(bulk("Si", "diamond", a=5.431, cubic=True).repeat(2), calculator)
    raise InputError(f"no reference for the chemical potential of {element}; known: S, Se, Si.")
