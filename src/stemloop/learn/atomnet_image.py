"""Images as the network that finds atom columns sees them, and its maps read back as places.

Every image is resampled until its columns have a Gaussian width of :data:`WIDTH` pixels, and its grey levels are
measured from the local mean in units of the local deviation. The network answers on a grid of half that resolution:
the chance that a column is there, where in the cell it is, and how wide it is. Training and inference share this page.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float64]

#: Gaussian width (1 sigma) of a column [px] at the network's own scale.
WIDTH = 2.0
#: Pixels a side of a cell of the network's maps.
CELL = 2
#: Side [px] of the square (applied twice, so that it is a tent) over which mean and deviation are local.
_LOCAL = 41
#: The maps of a member, in order: logit of the chance, offset (row, col) in cells, logarithm of width / WIDTH.
MAPS = 4


def resampled(image: NDArray[np.floating[Any]], factor: float) -> tuple[NDArray[np.float32], Floats]:
    """``image`` with ``factor`` as many pixels a side, and the exact factors (rows, columns) after rounding.

    Where pixels get fewer they are averaged (a Gaussian of the new pixel's extent), so that no dose is thrown away.
    """
    goal = np.maximum(1, np.round(np.array(image.shape) * factor))
    exact = goal / np.array(image.shape)
    if factor < 1:
        image = ndimage.gaussian_filter(image, 0.5 * np.sqrt(1 / factor**2 - 1), truncate=2.5)
    moved = ndimage.zoom(image, exact, order=1, mode="nearest", grid_mode=True)
    return moved.astype(np.float32), exact


def to_network(position: Floats, exact: Floats) -> Floats:
    """Places (n, 2) [px of the image] as places on the resampled image; pixel 0 is centred at 0 on both."""
    return (position + 0.5) * exact - 0.5


def from_network(position: Floats, exact: Floats) -> Floats:
    """The inverse of :func:`to_network`."""
    return (position + 0.5) / exact - 0.5


def normalised(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The image minus its local mean, in units of its local deviation; a constant image becomes zero."""

    def local(values: Floats) -> Floats:
        for _ in range(2):
            values = ndimage.uniform_filter(values, _LOCAL, mode="reflect")
        return values

    pixels = image.astype(np.float64) - float(image.mean())
    above = pixels - local(pixels)
    variance = local(above**2)
    floor = 1e-2 * float(variance.mean()) + 1e-300
    return (above / np.sqrt(variance + floor)).astype(np.float32)


def probability(logit: Floats) -> Floats:
    """The logistic function of ``logit``."""
    return np.asarray(1 / (1 + np.exp(-np.clip(logit, -60, 60))))


def peaks(maps: NDArray[np.float32], least: float) -> Floats:
    """(n, 4) row, col [px of the resampled image], chance and log of width / WIDTH at the maxima of ``maps``.

    ``maps`` is (MAPS, rows, columns). A maximum is the highest of its 3 x 3 cells and at least ``least``; of two that
    are nearer than a cell and a half after their offsets the lower one is left out.
    """
    logit = maps[0]
    top = logit == ndimage.maximum_filter(logit, 3, mode="constant", cval=-np.inf)
    row, col = np.nonzero(top & (logit > np.log(least / (1 - least))))
    offset = np.clip(maps[1:3, row, col], -1.5, 1.5)
    place = (np.column_stack([row, col]) + offset.T + 0.5) * CELL - 0.5
    found = np.column_stack([place, probability(logit[row, col].astype(np.float64)), maps[3, row, col]])
    return _apart(found[np.argsort(-found[:, 2], kind="stable")], 1.5 * CELL)


def _apart(found: Floats, distance: float) -> Floats:
    """``found``, best first, without those that are nearer than ``distance`` to a better one."""
    from scipy.spatial import cKDTree

    if len(found) < 2:
        return found
    kept = np.ones(len(found), bool)
    for one, other in sorted(map(tuple, cKDTree(found[:, :2]).query_pairs(distance, output_type="ndarray").tolist())):
        if kept[one]:
            kept[other] = False
    return found[kept]
