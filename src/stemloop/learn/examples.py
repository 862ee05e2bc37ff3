"""Labelled patterns without noise, kept in shards, and the noise they meet on every visit.

A shard is one ``.npz`` of one simulated field. ``patterns`` (n, 64, 64) float16 are expected fractions of the incident
electrons times 1000 (so that float16 keeps the weak pixels), on the canonical grid. The labels: ``deformation``
(n, 2, 2) on (x, y), ``thickness_m``, ``tilt_rad`` (n, 2) as (y, x), ``phase`` and ``site`` indices into
:data:`stemloop.core.structure.PHASES` and :data:`~stemloop.core.structure.SITES`, and the beam: ``energy_eV``,
``semiangle_rad``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from stemloop.core.errors import InputError
from stemloop.core.structure import PHASES
from stemloop.core.units import ANGSTROM_M, wavelength_m
from stemloop.learn.features import condition, disc_maps, radius_px
from stemloop.learn.geometry import MIRRORS, mirrored, polar, transposed

SCALE = 1000.0
#: Electrons a pattern: training draws log-uniformly between these.
DOSE_RANGE = (1e4, 3e6)
#: The largest weight of each neighbour in the random detector blur: a Gaussian of at most sqrt(2 * 0.15) = 0.55 px.
BLUR_WEIGHT = 0.15


@dataclass(frozen=True)
class Examples:
    """``n`` labelled patterns without noise; see the page's head for shapes and units."""

    patterns: NDArray[np.float16]
    deformation: NDArray[np.float64]
    thickness_m: NDArray[np.float64]
    tilt_rad: NDArray[np.float64]
    phase: NDArray[np.int64]
    site: NDArray[np.int64]
    energy_eV: NDArray[np.float64]
    semiangle_rad: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.phase)

    def take(self, index: Any) -> Examples:
        """The examples at ``index``."""
        return Examples(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @property
    def labels(self) -> NDArray[np.float64]:
        """(n, 7) ``(v_mean, v_diff, v_xy, phi, thickness_m, tilt_y, tilt_x)``."""
        return np.column_stack([polar(self.deformation), self.thickness_m, self.tilt_rad])

    @property
    def radius_px(self) -> NDArray[np.float64]:
        """(n,) disc radii [canonical pixels]."""
        return radius_px(self.semiangle_rad, self.wavelength_A)

    @property
    def wavelength_A(self) -> NDArray[np.float64]:
        """(n,) electron wavelengths [A]."""
        return np.array([wavelength_m(e) for e in self.energy_eV]) / ANGSTROM_M


def load(folder: Path) -> Examples:
    """All shards of ``folder``, in the order of their names."""
    shards = sorted(Path(folder).glob("*.npz"))
    if not shards:
        raise InputError(f"no training shards in {folder}: make some with ./scripts/train cbed --examples N.")
    names = [f.name for f in fields(Examples)]
    parts: dict[str, list[Any]] = {name: [] for name in names}
    for path in shards:
        with np.load(path) as shard:
            for name in names:
                parts[name].append(shard[name])
    return Examples(**{name: np.concatenate(arrays) for name, arrays in parts.items()})


def _blurred(patterns: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    w = weight[:, None, None]
    for axis in (1, 2):
        around = np.roll(patterns, 1, axis) + np.roll(patterns, -1, axis)
        patterns = (1 - 2 * w) * patterns + w * around
    return patterns


def poisson(expected: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Counts of mean ``expected``; above 50 a rounded normal of the same mean and variance, which is faster."""
    counts = expected + np.sqrt(expected) * rng.standard_normal(expected.shape, dtype=np.float32)
    counts = np.maximum(np.rint(counts), 0)
    few = expected < 50
    counts[few] = rng.poisson(expected[few])
    return np.asarray(counts, dtype=np.float32)


def exposed(
    examples: Examples,
    rng: np.random.Generator,
    dose: NDArray[np.float64] | None = None,
    blur_px: float | None = None,
    mirrors: bool = True,
) -> dict[str, NDArray[Any]]:
    """One exposure of each example: blurred, mirrored, counted, and turned into what the network takes.

    ``dose`` (n,) electrons; drawn log-uniformly over :data:`DOSE_RANGE` if None. ``blur_px`` is the rms of a Gaussian
    detector blur [px]; drawn, up to that of :data:`BLUR_WEIGHT`, if None. Returns ``counts``, ``maps``,
    ``condition``, ``labels`` (n, 7), ``phase``, ``site``, ``dose``.
    """
    n = len(examples)
    low, high = np.log(DOSE_RANGE)
    dose = np.exp(rng.uniform(low, high, n)) if dose is None else np.asarray(dose, dtype=np.float64)
    clean = examples.patterns.astype(np.float32)
    labels = examples.labels
    if blur_px is None:
        clean = _blurred(clean, rng.uniform(0, BLUR_WEIGHT, n).astype(np.float32))
    elif blur_px > 0:
        clean = gaussian_filter1d(gaussian_filter1d(clean, blur_px, axis=1), blur_px, axis=2)
    if mirrors:
        clean, labels = _scattered(clean, labels, examples.phase, rng)
    counts = poisson(clean * (dose / SCALE)[:, None, None].astype(np.float32), rng)
    radius = examples.radius_px
    return {
        "counts": counts,
        "maps": disc_maps(counts, radius, dose),
        "condition": condition(radius, dose, examples.wavelength_A),
        "labels": labels,
        "phase": examples.phase,
        "site": examples.site,
        "dose": dose,
    }


def _scattered(
    clean: NDArray[np.float32], labels: NDArray[np.float64], phase: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Each pattern under a random mirror; those of square lattices also transposed, at random."""
    clean, labels = clean.copy(), labels.copy()
    moving = [0, 1, 2, 3, 5, 6]
    choice = rng.integers(len(MIRRORS), size=len(clean))
    for number, name in enumerate(MIRRORS):
        chosen = choice == number
        flipped, moved = mirrored(clean[chosen], labels[chosen][:, moving], name)
        clean[chosen] = flipped
        labels[np.ix_(chosen, moving)] = moved
    square = (phase == PHASES.index("SrTiO3")) & (rng.uniform(size=len(clean)) < 0.5)
    flipped, moved = transposed(clean[square], labels[square][:, moving])
    clean[square] = flipped
    labels[np.ix_(square, moving)] = moved
    return clean, labels
