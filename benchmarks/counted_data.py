"""Counted 4D-STEM data for the benchmarks: SrTiO3[001], 8 nm, 200 kV, 25 mrad, by multislice, 16 x 16 probe positions
a unit cell; 12 % of the electrons lie in a broad diffuse tail. A scan repeats the cell; each frame is drawn electron by
electron (the number is Poisson distributed). Patterns are 128 x 128 and are kept in the user's cache folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

SHAPE = (128, 128)
CELL = 16


def patterns() -> np.ndarray:
    """(256, 16384): the probability of each pixel at each of the 16 x 16 positions of a cell."""
    cached = Path(os.environ.get("STEMLOOP_BENCH_CACHE", tempfile.gettempdir())) / "stemloop-srtio3-cbed-128.npy"
    if cached.exists():
        return np.load(cached)
    from ase import Atoms

    from stemloop.core.units import ANGSTROM_M
    from stemloop.simulate.imaging import Scattering

    a = 4.0  # SrTiO3's 3.905 A, stretched so that the cell is a whole number of grid points
    cell = Atoms("SrTiO3", scaled_positions=[(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)],
                 cell=[a, a, a], pbc=True)  # fmt: skip
    n = 160  # 40 A window: +-1.6 / A in 128 pixels
    scattering = Scattering(cell.repeat((10, 10, 20)), 200e3, phonons=(2, 1), window_A=40.0, slice_A=2.0)
    kept = np.arange(-SHAPE[0] // 2, SHAPE[0] // 2) % n
    radius = np.hypot(*(np.indices(SHAPE) - 64.0))
    tail = np.exp(-radius / 20.0)
    tail /= tail.sum()
    out = np.empty((CELL * CELL, SHAPE[0] * SHAPE[1]))
    for number in range(CELL * CELL):
        position = (number // CELL * a / CELL * ANGSTROM_M, number % CELL * a / CELL * ANGSTROM_M)
        total = np.zeros(SHAPE)
        for configuration in range(scattering.configurations):
            wave = scattering.exit_spectrum(position, 25e-3, configuration=configuration)
            total += np.abs(wave[np.ix_(kept, kept)]) ** 2
        out[number] = (0.88 * total / total.sum() + 0.12 * tail).ravel()
    np.save(cached, out)
    return out


def events(electrons: float, scan: int = 256, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """``(indptr, index)`` of a ``scan`` x ``scan`` scan with ``electrons`` a frame on the average."""
    rng = np.random.default_rng(seed)
    numbers = rng.poisson(electrons, scan * scan)
    indptr = np.concatenate([[0], np.cumsum(numbers)])
    index = np.empty(indptr[-1], np.uint16)
    cumulative = np.cumsum(patterns(), axis=1)
    y, x = np.divmod(np.arange(scan * scan), scan)
    which = (y % CELL) * CELL + x % CELL
    for k in range(CELL * CELL):
        for f in np.flatnonzero(which == k):
            at = np.searchsorted(cumulative[k] / cumulative[k, -1], np.sort(rng.random(numbers[f])))
            index[indptr[f] : indptr[f + 1]] = np.minimum(at, SHAPE[0] * SHAPE[1] - 1)
    return indptr, index


def entropies(electrons: float) -> tuple[float, float]:
    """Bits an electron of Poisson counts, exactly: with the pattern of every position known, and with the mean pattern
    of all positions in its place (the cross entropy of the counts under it)."""
    from scipy.stats import poisson

    p = patterns()
    p = p / p.sum(axis=1, keepdims=True)
    mean = p.mean(axis=0)
    k = np.arange(0, 60)
    known = static = 0.0
    for pattern in p:
        rate = electrons * pattern
        pmf = poisson.pmf(k[:, None], rate)
        known -= float(np.sum(np.where(pmf > 0, pmf * np.log2(np.maximum(pmf, 1e-300)), 0)))
        logq = poisson.logpmf(k[:, None], electrons * mean) / np.log(2)
        static -= float(np.sum(pmf * logq))
    return known / len(p) / electrons, static / len(p) / electrons
