"""Training examples: diffraction patterns of random places of random small specimens, with everything known of them.

Each specimen ("field") is a patch of one material with a random uniform strain and rotation, random smooth strain on
top, defects, thickness and tilt, seen at a random beam energy; each of its positions has one of eight random beams
(semiangle, defocus, source). :class:`Ranges` says how much of each. A field is drawn from (seed, number) alone, so
any part of a set can be made again, on any machine, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.durable import writing
from stemloop.core.structure import PHASES
from stemloop.core.units import ANGSTROM_M, wavelength_m
from stemloop.simulate.crystals import crystal
from stemloop.simulate.elasticity import Field, Periodic, Uniform, long_waves, relax, strain_and_rotation
from stemloop.simulate.imaging import CBED_PIXELS, WINDOW_A, Scattering
from stemloop.simulate.specimens import MARGIN_A, Sample, box_A, build

Array = NDArray[np.float64]

#: Side of a field [A], positions on it, and beams that are shared by them.
FIELD_A = 60.0
POSITIONS = {"MoS2": 200, "graphene": 200, "SrTiO3": 80, "vacuum": 200}
BEAMS = 8
#: Frozen-phonon configurations of a field, each seen by one point of the source.
PHONONS = {"MoS2": 6, "graphene": 6, "SrTiO3": 3}
#: The largest number of vacancies in a field and its margin (12500 A^2).
VACANCIES = {"MoS2": 90, "graphene": 40}
#: What is usual for each material: energy [eV] and semiangle [rad]. Two of five beams are drawn around it.
USUAL = {"MoS2": (80e3, 7e-3), "graphene": (60e3, 9e-3), "SrTiO3": (200e3, 3e-3), "vacuum": (80e3, 7e-3)}


@dataclass(frozen=True)
class Ranges:
    """What is drawn at random.

    strain, rotation_rad, tilt_rad : (deviation, bound) of the normal deviates of each component of the uniform
    strain, the whole rotation and each tilt. waves, shortest_A : (least, largest) rms of a component of the smooth
    strain, and shortest wavelength [A]. energy_eV, radius_per_A (semiangle / wavelength), C10_m, source_m (FWHM),
    layers (repeats of SrTiO3, 3.905 A each) : (least, largest). usual : share of energies and of semiangles that are
    drawn around :data:`USUAL`.
    """

    strain: tuple[float, float] = (0.016, 0.042)
    rotation_rad: tuple[float, float] = (math.radians(4.0), math.radians(8.0))
    tilt_rad: tuple[float, float] = (math.radians(0.65), math.radians(1.5))
    waves: tuple[float, float] = (0.001, 0.012)
    shortest_A: tuple[float, float] = (22.0, 60.0)
    energy_eV: tuple[float, float] = (60e3, 300e3)
    radius_per_A: tuple[float, float] = (0.08, 0.28)
    C10_m: tuple[float, float] = (-30e-9, 30e-9)
    source_m: tuple[float, float] = (0.0, 1.5e-10)
    layers: tuple[int, int] = (3, 15)
    usual: float = 0.4


USUALLY = Ranges()


class _Together:
    """Two displacements, added."""

    def __init__(self, first: Field, second: Field) -> None:
        self._parts = (first, second)

    def displacement(self, points: Array) -> Array:
        return self._parts[0].displacement(points) + self._parts[1].displacement(points)

    def gradient(self, points: Array) -> Array:
        return self._parts[0].gradient(points) + self._parts[1].gradient(points)


def _bounded(rng: np.random.Generator, deviation_and_bound: tuple[float, float], n: int) -> Array:
    deviation, bound = deviation_and_bound
    drawn = deviation * rng.normal(size=n)
    while np.any(np.abs(drawn) > bound):
        drawn = np.where(np.abs(drawn) > bound, deviation * rng.normal(size=n), drawn)
    return drawn


def _waves(rng: np.random.Generator, ranges: Ranges, poisson: float, side_A: float) -> Periodic:
    box = 1.7 * side_A
    wave = relax(long_waves(rng, 128, box, rng.uniform(*ranges.shortest_A)), box, poisson)
    points = MARGIN_A + rng.uniform(0, FIELD_A, (200, 2))
    strain, _ = strain_and_rotation(wave.gradient(points))
    return wave.scaled(rng.uniform(*ranges.waves) / float(strain.std()))


def random_field(material: str, rng: np.random.Generator, ranges: Ranges = USUALLY) -> Sample:
    """A random specimen of ``material``."""
    size = box_A((FIELD_A, FIELD_A))
    e_xx, e_yy, e_xy = _bounded(rng, ranges.strain, 3) * np.array([1, 1, 0.7])
    middle = (size[0] / 2, size[1] / 2)
    waves = _waves(rng, ranges, crystal(material).poisson, size[0])
    strain = _Together(Uniform(e_xx, e_yy, e_xy, centre_A=middle), waves)
    holes, strangers, layers, shuffle = 0, 0, None, None
    if material == "SrTiO3":
        layers = int(rng.integers(ranges.layers[0], ranges.layers[1] + 1))
        polar = rng.choice([0.0, 1.0]) * rng.uniform(-0.2, 0.2, 2)
        shuffle = {"Ti": lambda points: np.broadcast_to(polar, points.shape)}
    else:
        holes = int(rng.integers(0, VACANCIES[material]))
        strangers = int(rng.integers(0, 30)) if material == "graphene" else 0
    return build(
        material,
        (FIELD_A, FIELD_A),
        strain,
        seed=int(rng.integers(2**31)),
        rotation_rad=float(_bounded(rng, ranges.rotation_rad, 1)[0]),
        vacancies=holes,
        dopants=strangers,
        layers=layers,
        shuffle=shuffle,
    )


def _energy(material: str, rng: np.random.Generator, ranges: Ranges) -> float:
    if rng.uniform() < ranges.usual:
        return USUAL[material][0]
    return float(np.exp(rng.uniform(*np.log(ranges.energy_eV))))


def _beam(material: str, energy_eV: float, rng: np.random.Generator, ranges: Ranges) -> tuple[float, float, float]:
    """(semiangle [rad], C10 [m], source FWHM [m]) of a random beam."""
    wavelength_A = wavelength_m(energy_eV) / ANGSTROM_M
    usual_eV, usual_rad = USUAL[material]
    radius = float(rng.uniform(*ranges.radius_per_A))
    if rng.uniform() < ranges.usual:
        radius = float(usual_rad / (wavelength_m(usual_eV) / ANGSTROM_M) * rng.uniform(0.9, 1.1))
    defocus = rng.uniform(*ranges.C10_m) * rng.choice([0.15, 1.0])
    return radius * wavelength_A, float(defocus), float(rng.uniform(*ranges.source_m))


def _positions(sample: Sample, n: int, rng: np.random.Generator) -> Array:
    """(n, 2) [m]: random, three of ten of them close to a defect."""
    positions = rng.uniform(0, FIELD_A * ANGSTROM_M, (n, 2))
    if sample.defects:
        near = np.flatnonzero(rng.uniform(size=n) < 0.3)
        sites = np.array([d["position_m"] for d in sample.defects])[rng.integers(len(sample.defects), size=len(near))]
        positions[near] = np.clip(sites + rng.normal(0, 1e-10, sites.shape), 0, FIELD_A * ANGSTROM_M)
    return positions


def deformation(sample: Sample, positions: Array) -> Array:
    """(n, 2, 2) on (x, y): what carries the lattice along +x to the lattice at ``positions`` (n, 2) (y, x) [m]."""
    truth = sample.truth(positions)
    e_xx, e_yy, e_xy = truth.strain.T
    w = truth.mean[:, 3]
    gradient = np.stack([np.stack([1 + e_xx, e_xy - w], -1), np.stack([e_xy + w, 1 + e_yy], -1)], -2)
    c, s = np.cos(sample.rotation_rad), np.sin(sample.rotation_rad)
    return np.asarray(gradient @ np.array([[c, -s], [s, c]]))


def examples(
    material: str, number: int, seed: int, ranges: Ranges = USUALLY, positions: int | None = None
) -> dict[str, NDArray[Any]]:
    """All patterns of field ``number`` of ``material`` and their labels, as arrays with one entry a position.

    ``patterns`` float16: fraction of the incident electrons in each pixel, times 1000. ``deformation``,
    ``thickness_m``, ``tilt_rad`` (y, x), ``phase``, ``site``, ``energy_eV``, ``semiangle_rad``, ``C10_m``,
    ``source_fwhm_m``.
    """
    rng = np.random.default_rng([seed, PHASES.index(material), number])
    n, energy_eV = positions or POSITIONS[material], _energy(material, rng, ranges)
    beams = [_beam(material, energy_eV, rng, ranges) for _ in range(BEAMS)]
    which = rng.integers(BEAMS, size=n)
    tilt = _bounded(rng, ranges.tilt_rad, 2 * BEAMS).reshape(BEAMS, 2)
    labels: dict[str, NDArray[Any]] = {
        "tilt_rad": tilt[which],
        "phase": np.full(n, PHASES.index(material)),
        "energy_eV": np.full(n, energy_eV),
        **{
            key: np.array([b[i] for b in beams])[which]
            for i, key in enumerate(("semiangle_rad", "C10_m", "source_fwhm_m"))
        },
    }
    if material == "vacuum":
        patterns = np.stack([vacuum(beams[b][0], energy_eV) for b in which])
        nothing = {"deformation": np.tile(np.eye(2), (n, 1, 1)), "thickness_m": np.zeros(n), "site": np.zeros(n, int)}
        return {**labels, **nothing, "tilt_rad": np.zeros((n, 2)), "patterns": _small(patterns)}
    sample = random_field(material, rng, ranges)
    places = _positions(sample, n, rng)
    count = PHONONS[material]
    scattering = Scattering(sample, energy_eV, phonons=(count, int(rng.integers(2**31))), source_points=count)
    patterns = np.empty((n, CBED_PIXELS, CBED_PIXELS), np.float32)
    for b in range(BEAMS):
        for i in np.flatnonzero(which == b):
            semiangle, defocus, source = beams[b]
            y, x = places[i]
            patterns[i] = scattering.cbed((y, x), semiangle, defocus, (tilt[b, 0], tilt[b, 1]), source)
    labels["deformation"] = deformation(sample, places)
    labels["thickness_m"] = np.full(n, sample.thickness_m)
    labels["site"] = sample.truth(places).site.argmax(axis=1)
    return {**labels, "patterns": _small(patterns)}


def vacuum(semiangle_rad: float, energy_eV: float) -> NDArray[np.float32]:
    """The pattern (64, 64) of the beam alone: its disc, whose edge pixels carry their share, of sum one."""
    k = np.arange(-CBED_PIXELS // 2, CBED_PIXELS // 2) / WINDOW_A
    pixel = 1 / WINDOW_A
    radius = semiangle_rad / (wavelength_m(energy_eV) / ANGSTROM_M)
    disc = np.clip((radius - np.hypot(k[:, None], k)) / pixel + 0.5, 0, 1) ** 2
    return np.asarray(disc / disc.sum(), dtype=np.float32)


def _small(patterns: NDArray[np.float32]) -> NDArray[np.float16]:
    return (patterns * 1000).astype(np.float16)


def write(
    folder: Path, fields: dict[str, int], seed: int, ranges: Ranges = USUALLY, positions: int | None = None
) -> Iterator[tuple[int, int]]:
    """Write a shard for each of the asked number of ``fields`` of each material; those that are in ``folder`` stay.

    ``positions`` of each field, default :data:`POSITIONS`. Materials take turns, so that a set that is interrupted is
    balanced. Yields (shards done, shards in all).
    """
    folder.mkdir(parents=True, exist_ok=True)
    turns = sorted((number / count, m, number) for m, count in fields.items() for number in range(count))
    for done, (_, material, number) in enumerate(turns):
        path = folder / f"{material}-{seed}-{number:05d}.npz"
        if not path.exists():
            made = examples(material, number, seed, ranges, positions)
            with writing(path) as file:
                np.savez(file, **made)  # type: ignore[arg-type]
        yield done + 1, len(turns)
