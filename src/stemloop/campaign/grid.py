"""The map: the places for which the property is wanted, which are also the places that may be measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stemloop.core.protocols import InstrumentInfo
from stemloop.core.units import probe_fwhm_m


@dataclass(frozen=True)
class Grid:
    """``positions_m`` (ny * nx, 2) (y, x) [m] of a map's pixels, row by row; ``shape`` (ny, nx); ``extent_m``."""

    positions_m: NDArray[np.float64]
    shape: tuple[int, int]
    extent_m: tuple[float, float]

    def __len__(self) -> int:
        return len(self.positions_m)

    def paint(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The values (ny * nx,) as an image (ny, nx)."""
        return np.asarray(values, float).reshape(self.shape)


def nyquist_grid(info: InstrumentInfo, semiangle_rad: float) -> Grid:
    """The raster over the whole field whose pitch is half the probe's FWHM, never finer (it is widened to fit the
    field evenly). Pixels sit at the centres of their cells."""
    finest = probe_fwhm_m(info.energy_eV, semiangle_rad, info.source_fwhm_m) / 2
    height, width = info.field_m
    shape = max(1, math.floor(height / finest)), max(1, math.floor(width / finest))
    y = (np.arange(shape[0]) + 0.5) * height / shape[0]
    x = (np.arange(shape[1]) + 0.5) * width / shape[1]
    positions = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1).reshape(-1, 2)
    return Grid(positions, shape, info.field_m)


def recorded_grid(info: InstrumentInfo) -> Grid:
    """The positions of a recording, which are all that it can answer."""
    assert info.positions_m is not None
    positions = np.asarray(info.positions_m, float)
    shape = len(np.unique(positions[:, 0])), len(np.unique(positions[:, 1]))
    order = np.lexsort((positions[:, 1], positions[:, 0]))
    return Grid(positions[order], shape, info.field_m)
