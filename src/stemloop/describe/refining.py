"""Gaussians at the places that another finder gives."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from stemloop.core.structure import Columns
from stemloop.describe import filters, fitting, gaussians
from stemloop.describe.brightness import sublattices
from stemloop.describe.gaussians import Floats, Image
from stemloop.describe.noise import Noise, noise_of
from stemloop.describe.raster import raster_of

#: A fit is believed up to so many widths from its place, and this many times wider or narrower than told.
_NEAR, _ALIKE = 1.5, 2.2
#: Two columns nearer than this, in widths, are one.
_DOUBLED = 1.2


def refine(image: NDArray[Any], position: Floats, width_px: float) -> tuple[Columns, NDArray[np.bool_], Floats]:
    """Fit a Gaussian at each of the places that another finder gives, all of them together on a smooth background.

    Parameters
    ----------
    image : as of :func:`stemloop.describe.atoms.find_columns`. position : (n, 2) (row, col) [px]. width_px : about how
        wide a column is [px].

    Returns
    -------
    The columns, in the order of ``position``; (n,) which of the fits are to be believed (not run away, not doubled, not
    far too wide or narrow); and (n,) how many of its deviations each amplitude is.

    Raises
    ------
    InputError : as of :func:`stemloop.describe.atoms.find_columns`.
    """
    raster = raster_of(image)
    noise = noise_of(raster.sample(512, 4))
    pixels, measured = raster.levels((slice(None), slice(None)))
    soft = filters.smooth(pixels, 0.5 * width_px)
    start = _start(soft, np.asarray(position, np.float64).reshape(-1, 2), width_px)
    known = fitting.prior(start) if len(start) else fitting.Prior(start, start, False)
    weight = measured / noise.variance(soft)
    background: Floats = np.full((2, 2), float(np.percentile(pixels[::4, ::4], 10)))
    if len(start):
        model = fitting.fit(pixels, weight, start, background, width_px, known)
        weight = _doubted(pixels - model.image, measured, noise, model.image, width_px)
        model = fitting.fit(pixels, weight, model.columns, model.background, width_px, known)
        value, sigma = model.columns, fitting.deviations(model, weight, pixels, known)
        under = model.under(value[:, :2])
        part, whole = gaussians.core_means(value, soft, measured.astype(np.float32), 2 * np.exp(value[:, 3]))[1:]
    else:
        value, sigma, under, part, whole = start, start, *np.zeros((3, 0))
    columns = Columns(
        value[:, :2],
        sigma[:, :2],
        value[:, 2] / raster.per,
        np.exp(value[:, 3]),
        sublattices(value[:, 2]),
        raster.low + under / raster.per,
        measured=part / np.maximum(whole, 1),
    )
    return columns, _believable(value, sigma, start, width_px), value[:, 2] / np.maximum(sigma[:, 2], 1e-150)


def _start(soft: Image, position: Floats, width: float) -> Floats:
    """First parameters (n, 4) of the columns at ``position``."""
    places = np.clip(np.round(position), 0, np.array(soft.shape) - 1).astype(np.int64)
    low = filters.around(soft, places, int(np.ceil(2 * width)))[1]
    height = np.maximum(soft[tuple(places.T)] - low, 1e-3)
    return np.column_stack([position, height, np.full(len(position), np.log(width))])


def _doubted(residual: Image, measured: NDArray[np.bool_], noise: Noise, mean: Image, width: float) -> Image:
    """One over the noise's variance, or over the residual's own where a first fit left more than noise."""
    weight = measured / noise.variance(mean)
    ratio = filters.smooth((weight * residual**2).astype(np.float32), width)
    chance = np.sqrt(2 / (4 * np.pi * width**2))
    return np.asarray(weight / np.where(ratio > 1 + 3 * chance, ratio, 1), np.float32)


def _believable(value: Floats, sigma: Floats, start: Floats, width: float) -> NDArray[np.bool_]:
    """Which fits stayed where and as wide as they should be, and are not doubled; of two the weaker goes."""
    good = np.isfinite(value).all(axis=1) & np.isfinite(sigma).all(axis=1) & (sigma[:, :2] < width).all(axis=1)
    good &= (value[:, 2] > 0) & (np.abs(value[:, 3] - np.log(width)) < np.log(_ALIKE))
    good &= np.hypot(*(value[:, :2] - start[:, :2]).T) < _NEAR * width
    index = np.flatnonzero(good)
    pairs = index[cKDTree(value[index, :2]).query_pairs(_DOUBLED * width, output_type="ndarray")]
    good[np.where(value[pairs[:, 0], 2] < value[pairs[:, 1], 2], pairs[:, 0], pairs[:, 1])] = False
    return np.asarray(good)
