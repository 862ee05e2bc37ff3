"""How good a finished map is, against a truth that the loop never saw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RegularGridInterpolator

from stemloop.core.structure import PHASES, SITES, Descriptors


class TruthFile:
    """The twin's truth: descriptors on a fine grid, read at any position by bicubic interpolation."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as stored:
            self._arrays = {name: stored[name] for name in stored.files}

    def descriptors(self, positions_m: NDArray[np.float64]) -> Descriptors:
        """Descriptors (sigma 0) at ``positions_m`` (n, 2) (y, x) [m]."""
        axes = self._arrays["y_m"], self._arrays["x_m"]
        mean = RegularGridInterpolator(axes, self._arrays["mean"], method="cubic")(positions_m)
        nearest = tuple(np.abs(axis[None, :] - positions_m[:, i, None]).argmin(1) for i, axis in enumerate(axes))
        n = len(positions_m)
        site = np.eye(len(SITES))[self._arrays["site"][nearest]]
        phase = np.tile(np.eye(len(PHASES))[PHASES.index(str(self._arrays["name"]))], (n, 1))
        return Descriptors(mean, np.zeros((n, 7)), phase, site, np.zeros(n))


@dataclass(frozen=True)
class Score:
    """Root-mean-square error of the map and the share of its places whose truth lies within two deviations."""

    rmse: float
    coverage_2sigma: float


def score(mean: NDArray[np.float64], sigma: NDArray[np.float64], truth: NDArray[np.float64]) -> Score:
    """Compare a map with the truth at the same places; all (n,), in one unit.

    >>> score(np.array([0.0, 1.0]), np.array([1.0, 0.1]), np.array([1.0, 2.0])).coverage_2sigma
    0.5
    """
    error = mean - truth
    return Score(float(np.sqrt(np.mean(error**2))), float(np.mean(np.abs(error) <= 2 * sigma)))
