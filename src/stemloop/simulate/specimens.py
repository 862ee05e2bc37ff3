"""Specimens whose truth is known: strained, defective sheets and films, each from a seed.

A sample covers its field of view and a margin of at least :data:`MARGIN_A` around it. The top-left corner of the
field lies at (x, y) = (MARGIN_A, MARGIN_A) of its atoms' coordinates. Strain is the exact gradient of the displacement
that moved the atoms (:mod:`stemloop.simulate.elasticity`), taken at the place of the reference lattice that lies under
the asked position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.fft
from ase import Atoms
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.registry import Registry
from stemloop.core.structure import PHASES, SITES, Descriptors
from stemloop.core.units import ANGSTROM_M
from stemloop.simulate.crystals import Crystal, crystal
from stemloop.simulate.elasticity import Array, Field, Periodic, Uniform, long_waves, relax, strain_and_rotation

#: Crystal around the field of view [A]: half a CBED window (16 A) and room for stage drift.
MARGIN_A = 26.0
#: Sampling of the potentials that will be built [A]; a sample's size is a whole number of these.
SAMPLING_A = 0.25
#: A probe within this distance [A] of a defect looks at the defect's site: half the width of a nano-beam.
SITE_RADIUS_A = 1.5

PlaneField = Callable[[Array], Array]
Sites = int | Array
_LIGHT = {"MoS2": "S", "graphene": "C"}


def _no_tilt(points: Array) -> Array:
    return np.zeros((len(points), 2))


@dataclass(frozen=True)
class Sample:
    """A strained crystal with defects; implements :class:`stemloop.core.protocols.Specimen`.

    atoms : :class:`ase.Atoms` [A] over field and margin, (x, y) = (MARGIN_A, MARGIN_A) is the field's top-left corner.
    defects : dictionaries with ``kind`` (``vacancy`` or ``dopant``), ``element`` (that left, or that came) and
        ``position_m`` (y, x) from the field's corner; some lie in the margin.
    displacement : the field that strained the reference lattice.
    tilt_rad : specimen tilt (n, 2) as (y, x) at points of the reference lattice: the zone axis leans towards +y, +x.
    """

    name: str
    material: str
    field_m: tuple[float, float]
    rotation_rad: float
    seed: int
    atoms: Atoms = field(repr=False)
    defects: list[dict[str, Any]] = field(repr=False)
    crystal: Crystal = field(repr=False)
    thickness_m: float
    displacement: Field = field(repr=False)
    tilt_rad: PlaneField = field(default=_no_tilt, repr=False)

    def _reference(self, positions: Array) -> Array:
        lab = np.asarray(positions, dtype=np.float64) / ANGSTROM_M + MARGIN_A
        points = lab
        for _ in range(6):  # X = x - u(X) contracts by the strain, at most a few per cent a turn
            points = lab - self.displacement.displacement(points)
        return points

    def truth(self, positions: Array) -> Descriptors:
        """The descriptors at ``positions`` (n, 2) (y, x) [m], with sigma zero; rotation is relative to
        ``rotation_rad``; the site is that of a defect within :data:`SITE_RADIUS_A`, else pristine."""
        positions = np.atleast_2d(np.asarray(positions, dtype=np.float64))
        points = self._reference(positions)
        strain, rotation = strain_and_rotation(self.displacement.gradient(points))
        e_xx, e_yy, e_xy = strain.T
        thickness = np.full(len(points), self.thickness_m)
        tilt = self.tilt_rad(points)
        mean = np.column_stack([(e_xx + e_yy) / 2, (e_xx - e_yy) / 2, e_xy, rotation, thickness, tilt])
        site = np.zeros(len(points), dtype=np.int64)
        if self.defects:
            where = np.array([d["position_m"] for d in self.defects])
            kind = np.array([SITES.index(d["kind"]) for d in self.defects])
            distance = np.linalg.norm(positions[:, None] - where, axis=2)
            near = distance.argmin(axis=1)
            close = distance[np.arange(len(points)), near] < SITE_RADIUS_A * ANGSTROM_M
            site = np.where(close, kind[near], 0)
        phase = np.tile(np.eye(len(PHASES))[PHASES.index(self.material)], (len(points), 1))
        return Descriptors(mean, np.zeros_like(mean), phase, np.eye(len(SITES))[site], np.zeros(len(points)))

    def position_m(self, indices: NDArray[np.int64]) -> Array:
        """Positions (n, 2) (y, x) [m] of the atoms at ``indices``, from the field's corner."""
        return np.asarray((self.atoms.positions[indices, 1::-1] - MARGIN_A) * ANGSTROM_M)

    def without(self, indices: NDArray[np.int64]) -> Sample:
        """The sample after the atoms at ``indices`` of ``atoms`` were knocked out."""
        gone = [_defect("vacancy", self.atoms.symbols[i], self.atoms.positions[i]) for i in indices]
        left = self.atoms.copy()
        del left[np.asarray(indices, dtype=np.int64)]
        return replace(self, atoms=left, defects=self.defects + gone)

    def write_truth(self, path: str, points: int = 128) -> None:
        """Write descriptors on a grid of ``points`` x ``points``, the defects and the seed to ``path`` (npz)."""
        axes = [np.linspace(0, extent, points) for extent in self.field_m]
        y, x = np.meshgrid(*axes, indexing="ij")
        truth = self.truth(np.column_stack([y.ravel(), x.ravel()]))
        grid = (points, points)
        np.savez_compressed(
            path,
            y_m=axes[0],
            x_m=axes[1],
            mean=truth.mean.reshape(*grid, -1),
            strain=truth.strain.reshape(*grid, 3),
            site=truth.site.argmax(axis=1).reshape(grid),
            defect_kind=np.array([d["kind"] for d in self.defects], dtype=str),
            defect_element=np.array([d["element"] for d in self.defects], dtype=str),
            defect_position_m=np.array([d["position_m"] for d in self.defects]).reshape(-1, 2),
            rotation_rad=self.rotation_rad,
            seed=self.seed,
            name=self.name,
        )


def box_A(field_A: tuple[float, float]) -> tuple[float, float]:
    """Size (height, width) [A] of the atoms' box: field and margin, rounded up to a grid that transforms fast."""
    height, width = (
        scipy.fft.next_fast_len(int(np.ceil((extent + 2 * MARGIN_A) / SAMPLING_A))) * SAMPLING_A for extent in field_A
    )
    return height, width


def build(
    material: str,
    field_A: tuple[float, float],
    displacement: Field | None = None,
    *,
    seed: int = 0,
    rotation_rad: float = 0.0,
    vacancies: Sites = 0,
    dopants: Sites = 0,
    layers: int | None = None,
    tilt_rad: PlaneField = _no_tilt,
    shuffle: dict[str, PlaneField] | None = None,
    name: str | None = None,
) -> Sample:
    """Build a sample from its parts: the one place where atoms are laid out.

    Parameters
    ----------
    material : a name of :data:`stemloop.simulate.crystals.CRYSTALS`.
    field_A : (height, width) of the field of view [A].
    displacement : the field that strains the crystal, default none. Its points are (y, x) [A] in the atoms' box.
    seed : of the lattice's place and of the sites of defects.
    rotation_rad : turns the reference lattice from +x towards +y.
    vacancies, dopants : S (MoS2) or C (graphene) atoms that are taken out, or replaced by Si: a number, or points
        (n, 2) (y, x) [A] of the atoms' box, each of which takes the nearest such atom.
    layers : repeats along the beam, default the nominal specimen.
    tilt_rad : zone axis' tilt (n, 2) as (y, x) at points, carried out by shearing the crystal about its mid-plane.
    shuffle : further displacement (n, 2) [A] of single elements, such as polar titanium; it is no strain.
    """
    rng = np.random.default_rng(seed)
    kind = crystal(material)
    size = box_A(field_A)
    atoms = kind.lattice(size, rotation_rad, (rng.uniform(0, 4), rng.uniform(0, 4)), layers)
    strain = displacement or Uniform()
    reference = atoms.positions[:, 1::-1].copy()
    replaced, removed = _defect_sites(atoms, material, dopants, vacancies, size, rng)
    atoms.symbols[replaced] = "Si"
    positions = reference + _once_a_column(strain.displacement, reference)
    depth = atoms.positions[:, 2] - atoms.cell[2, 2] / 2
    if tilt_rad is not _no_tilt:
        positions += depth[:, None] * np.tan(_once_a_column(tilt_rad, reference))
    for element, shift in (shuffle or {}).items():
        chosen = atoms.symbols == element
        positions[chosen] += shift(reference[chosen])
    atoms.positions[:, 1::-1] = positions
    defects = [_defect("dopant", "Si", atoms.positions[i]) for i in replaced]
    defects += [_defect("vacancy", atoms.symbols[i], atoms.positions[i]) for i in removed]
    gone = np.any((positions < 0) | (positions >= size), axis=1)
    gone[removed] = True
    del atoms[gone]
    thickness = kind.thickness_A * (1 if layers is None else layers / kind.layers) * ANGSTROM_M
    field_m = (field_A[0] * ANGSTROM_M, field_A[1] * ANGSTROM_M)
    return Sample(
        name or material, material, field_m, rotation_rad, seed, atoms, defects, kind, thickness, strain, tilt_rad
    )


def _once_a_column(function: PlaneField, points: Array) -> Array:
    columns, back = np.unique(points, axis=0, return_inverse=True)
    return function(columns)[back.ravel()]


def _defect(kind: str, element: str, position_A: Array) -> dict[str, Any]:
    y, x = (position_A[1::-1] - MARGIN_A) * ANGSTROM_M
    return {"kind": kind, "element": element, "position_m": (float(y), float(x))}


def _defect_sites(
    atoms: Atoms, material: str, dopants: Sites, vacancies: Sites, size: tuple[float, float], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    numbers = [sites if isinstance(sites, int) else len(sites) for sites in (dopants, vacancies)]
    empty = np.zeros(0, dtype=np.int64)
    if sum(numbers) == 0:
        return empty, empty
    if material not in _LIGHT:
        raise InputError(f"point defects are known for {', '.join(_LIGHT)}; build {material} without.")
    plane = atoms.positions[:, 1::-1]
    free = np.flatnonzero((atoms.symbols == _LIGHT[material]) & np.all((plane >= 0) & (plane < size), axis=1))
    if sum(numbers) > len(free):
        raise InputError(f"{sum(numbers)} defects were asked for in {len(free)} sites; ask for fewer.")
    chosen = []
    for sites in (dopants, vacancies):
        if isinstance(sites, int):
            shuffled = rng.permutation(free)  # one atom a column
            _, first = np.unique(plane[shuffled].round(3), axis=0, return_index=True)
            picked = rng.choice(shuffled[first], sites, replace=False)
        else:
            distance = np.linalg.norm(plane[free][:, None] - sites, axis=2)
            picked = np.unique(free[distance.argmin(axis=0)])
        free = np.setdiff1d(free, picked)
        chosen.append(picked.astype(np.int64))
    return chosen[0], chosen[1]


# ------------------------------------------------------------------------------------------------ the three specimens

SPECIMENS: Registry[Callable[[int], Sample]] = Registry("specimen")


def _grid(box: float, n: int) -> tuple[Array, Array]:
    axis = np.arange(n) * box / n
    return axis[:, None], axis[None, :]


def _peaked(wave: Periodic, peak: float, size: tuple[float, float], percentile: float = 100.0) -> Periodic:
    """``wave`` scaled so that ``percentile`` of the largest principal strains over the field is ``peak``."""
    axes = [np.linspace(MARGIN_A, extent - MARGIN_A, 48) for extent in size]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    strain, _ = strain_and_rotation(wave.gradient(points))
    e_xx, e_yy, e_xy = strain.T
    principal = np.abs((e_xx + e_yy) / 2) + np.hypot((e_xx - e_yy) / 2, e_xy)
    return wave.scaled(peak / float(np.percentile(principal, percentile)))


def _weak_waves(
    rng: np.random.Generator, n: int, box: float, poisson: float, rms: float, shortest_A: float
) -> Periodic:
    wave = relax(long_waves(rng, n, box, shortest_A), box, poisson)
    axis = np.linspace(0, box, 48, endpoint=False)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    strain, _ = strain_and_rotation(wave.gradient(points))
    return wave.scaled(rms / float(strain.std()))


@SPECIMENS.register("MoS2")
def mos2(seed: int) -> Sample:
    """A MoS2 monolayer, 10 x 10 nm, with a misfitting ellipse and sulphur vacancies.

    The ellipse (axes 2.4 to 4.2 nm, edge of 0.8 nm, any orientation) has an anisotropic eigenstrain scaled so that the
    largest principal strain is about 3 %; random waves of at least 3 nm add 0.35 % rms; 1.5 % of the S are missing.
    """
    rng = np.random.default_rng([seed, 1])
    field_A, n, poisson = (100.0, 100.0), 256, crystal("MoS2").poisson
    size = box_A(field_A)
    box = 1.7 * max(size)
    y, x = _grid(box, n)
    centre = MARGIN_A + rng.uniform(0.3, 0.7, 2) * field_A
    turn, half = rng.uniform(0, np.pi), rng.uniform((17.0, 12.0), (21.0, 15.0))
    along = (x - centre[1]) * np.cos(turn) + (y - centre[0]) * np.sin(turn)
    across = (y - centre[0]) * np.cos(turn) - (x - centre[1]) * np.sin(turn)
    radius = np.hypot(along / half[0], across / half[1])
    inside = 0.5 * (1 - np.tanh((radius - 1) * half.mean() / 4.0))
    sign, anisotropy, axis = rng.choice([-1.0, 1.0]), rng.uniform(0.2, 0.6), rng.uniform(0, np.pi)
    misfit = sign * np.array(
        [1 + anisotropy * np.cos(2 * axis), 1 - anisotropy * np.cos(2 * axis), anisotropy * np.sin(2 * axis)]
    )
    ellipse = _peaked(relax(misfit[:, None, None] * inside, box, poisson), 0.028, size)
    strain = ellipse + _weak_waves(rng, n, box, poisson, 0.0035, 30.0)
    sulphur = 2 * size[0] * size[1] / (3.16**2 * 3**0.5 / 2)
    return build("MoS2", field_A, strain, seed=seed, rotation_rad=_small_turn(rng), vacancies=round(0.015 * sulphur))


@SPECIMENS.register("graphene")
def graphene(seed: int) -> Sample:
    """A graphene sheet, 9 x 9 nm, with smooth folds, silicon dopants and single vacancies.

    One or two folds (bands of compression about 3 nm wide) reach 2.5 %; each Si is a centre of dilatation and each
    vacancy one of contraction, smeared over 1.6 nm (FWHM) and worth at most 1 %; random waves of at least 3 nm
    add 0.3 %.
    """
    rng = np.random.default_rng([seed, 2])
    field_A, n, poisson = (90.0, 90.0), 256, crystal("graphene").poisson
    size = box_A(field_A)
    box = 1.7 * max(size)
    y, x = _grid(box, n)
    folds = np.zeros((3, n, n))
    for _ in range(rng.integers(1, 3)):
        turn, centre = rng.uniform(0, np.pi), MARGIN_A + rng.uniform(0.25, 0.75, 2) * field_A
        along = (x - centre[1]) * np.cos(turn) + (y - centre[0]) * np.sin(turn)
        across = (y - centre[0]) * np.cos(turn) - (x - centre[1]) * np.sin(turn)
        band = np.exp(-((across / 14.0) ** 2) / 2 - (along / 40.0) ** 2 / 2)
        normal = np.array([np.sin(turn) ** 2, np.cos(turn) ** 2, -np.sin(turn) * np.cos(turn)])
        folds += rng.choice([-1.0, 1.0]) * normal[:, None, None] * band
    points = MARGIN_A * 0.5 + rng.uniform(0, 1, (28, 2)) * (np.array(size) - MARGIN_A)
    silicon, holes = points[:18], points[18:]
    centres = np.zeros((3, n, n))
    for sites, misfit in ((silicon, 1.0), (holes, -1.0)):
        for site in sites:
            centres[:2] += misfit * np.exp(-((y - site[0]) ** 2 + (x - site[1]) ** 2) / (2 * 7.0**2))
    strain = (
        _peaked(relax(folds, box, poisson), 0.024, size)
        + _peaked(relax(centres, box, poisson), 0.01, size)
        + _weak_waves(rng, n, box, poisson, 0.003, 30.0)
    )
    return build(
        "graphene", field_A, strain, seed=seed, rotation_rad=_small_turn(rng), dopants=silicon, vacancies=holes
    )


@SPECIMENS.register("SrTiO3")
def srtio3(seed: int) -> Sample:
    """A SrTiO3 film, [001], 14 x 14 nm and 10 cells (3.9 nm) thick, with a polar tetragonal domain.

    The domain is a stripe 4 to 6 nm wide with soft walls (tanh, 1.6 nm); its eigenstrain (elongated along the
    stripe's polar axis) is scaled to a principal strain of 1.8 %; Ti is displaced along that axis by 0.12 to 0.18 A;
    waves of at least 4 nm add 0.25 % rms; the zone axis' tilt changes linearly by up to 4 mrad from the middle to an
    edge.
    """
    rng = np.random.default_rng([seed, 3])
    field_A, n, kind = (140.0, 140.0), 256, crystal("SrTiO3")
    size = box_A(field_A)
    box = 1.7 * max(size)
    turn, rotation = rng.uniform(0, np.pi), _small_turn(rng)
    centre, half_width = MARGIN_A + rng.uniform(0.35, 0.65, 2) * field_A, rng.uniform(20.0, 30.0)

    def domain(points: Array) -> Array:
        across = (points[..., 0] - centre[0]) * np.cos(turn) - (points[..., 1] - centre[1]) * np.sin(turn)
        along = (points[..., 1] - centre[1]) * np.cos(turn) + (points[..., 0] - centre[0]) * np.sin(turn)
        stripe = 0.5 * (np.tanh((across + half_width) / 8.0) - np.tanh((across - half_width) / 8.0))
        return np.asarray(stripe * 0.5 * (1 - np.tanh((np.abs(along) - 0.6 * max(size)) / 10.0)))

    grid = np.stack(np.broadcast_arrays(*_grid(box, n)), axis=-1)
    axis = rotation + rng.integers(0, 4) * np.pi / 2
    c, s = np.cos(axis), np.sin(axis)
    misfit = np.array([c * c - 0.5 * s * s, s * s - 0.5 * c * c, 1.5 * c * s])
    strain = _peaked(relax(misfit[:, None, None] * domain(grid), box, kind.poisson), 0.018, size) + _weak_waves(
        rng, n, box, kind.poisson, 0.0025, 40.0
    )
    polar = rng.uniform(0.12, 0.18) * np.array([s, c])
    slope = rng.uniform(-4e-3, 4e-3, 2) / (field_A[0] / 2)
    middle = np.array(size) / 2

    def tilt_rad(points: Array) -> Array:
        return slope * (points - middle)

    return build(
        "SrTiO3",
        field_A,
        strain,
        seed=seed,
        rotation_rad=rotation,
        tilt_rad=tilt_rad,
        shuffle={"Ti": lambda points: domain(points)[:, None] * polar},
    )


def _small_turn(rng: np.random.Generator) -> float:
    return float(np.deg2rad(rng.uniform(-3.0, 3.0)))
