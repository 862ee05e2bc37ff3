"""A cheap stand-in for multislice, for tests of learning alone: discs at the places of the reflections."""

import numpy as np

from stemloop.core.structure import PHASES
from stemloop.core.units import ANGSTROM_M, wavelength_m
from stemloop.learn.examples import SCALE, Examples
from stemloop.learn.geometry import CENTRE, PIXEL_PER_A, SIZE, deformation, reflections

ENERGY_EV = 80e3


def discs(phase, stretch, radius_px):
    """(64, 64) expected fractions: a soft disc at each reflection, weaker with its length."""
    y, x = np.mgrid[:SIZE, :SIZE]
    g0 = reflections(phase)
    g = np.linalg.solve(deformation(np.asarray(stretch)[None])[0].T, g0.T).T / PIXEL_PER_A + CENTRE
    strength = 0.02 * np.exp(-((np.hypot(*g0.T) / 0.6) ** 2))
    strength[0] = 0.8
    distance = np.hypot(x - g[:, 0, None, None], y - g[:, 1, None, None])
    disc = np.clip(radius_px - distance + 0.5, 0, 1)
    return (strength[:, None, None] * disc / (np.pi * radius_px**2)).sum(0)


def examples(n, seed):
    rng = np.random.default_rng(seed)
    phase = np.arange(n) % 4
    radius = rng.uniform(3.0, 5.0, n)
    stretch = rng.normal(0, [0.01, 0.01, 0.01, 0.03], (n, 4))
    stretch[phase == PHASES.index("vacuum")] = 0
    y, x = np.mgrid[:SIZE, :SIZE] - CENTRE
    patterns = [
        discs(PHASES[p], s, r) if p < 3 else np.clip(r - np.hypot(x, y) + 0.5, 0, 1) / (np.pi * r**2)
        for p, s, r in zip(phase, stretch, radius)
    ]
    wavelength_A = wavelength_m(ENERGY_EV) / ANGSTROM_M
    return Examples(
        patterns=(np.array(patterns) * SCALE).astype(np.float16),
        deformation=deformation(stretch),
        thickness_m=np.where(phase == 2, 4e-9, 0.5e-9),
        tilt_rad=rng.normal(0, 0.01, (n, 2)),
        phase=phase,
        site=np.zeros(n, dtype=np.int64),
        energy_eV=np.full(n, ENERGY_EV),
        semiangle_rad=radius * PIXEL_PER_A * wavelength_A,
    )
