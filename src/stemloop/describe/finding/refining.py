"""Gaussians at the places that another finder gives."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage, special
from scipy.spatial import cKDTree

from stemloop.core.structure import Columns
from stemloop.describe.finding import filters, fitting, gaussians
from stemloop.describe.finding.brightness import sublattices
from stemloop.describe.finding.gaussians import Floats, Image
from stemloop.describe.finding.noise import Noise, noise_of
from stemloop.describe.finding.raster import raster_of
from stemloop.describe.finding.sites import Sites, expected, neighbourhoods

#: A fit is believed up to so many widths from its place, and this many times wider or narrower than told.
_NEAR, _ALIKE = 1.5, 2.2
#: Two columns nearer than this, in widths, are one.
_DOUBLED = 1.2
#: Of the places that are apart in an image of noise so many may hold as much light as a column by chance. A maximum has
#: been sought, which is as good as some forty places (R. J. Adler, 1981, doi:10.1137/1.9780898718980).
_FALSE = 0.3 / 40
#: Deviations of its amplitude that a column of a lattice has at least.
_SIGNIFICANT = 3.0
#: A place that stands out by fewer deviations is not fitted.
_LEAST = 2.0
#: Widths around a column over which the roughness beside it is measured, and the least part of them that is no column.
_NEARBY, _ROOM = 5.0, 0.3
#: Amplitude of the Gaussians that cover the columns there: to 1.9 widths all, from 3 on little.
_COVERS = -6.0
#: So many pixels a side tell the noise's spectrum.
_SAMPLE = 512


def refine(image: NDArray[Any], position: Floats, width_px: float) -> tuple[Columns, NDArray[np.int64]]:
    """Fit a Gaussian at each of the places that another finder gives, all of them together on a smooth background.

    Parameters
    ----------
    image : as of :func:`stemloop.describe.atoms.find_columns`. position : (n, 2) (row, col) [px]. width_px : about how
        wide a column is [px].

    Returns
    -------
    The columns whose fits are to be believed, and (m,) which of the places each is: not run away, not doubled, not far
    too wide or narrow, and with more light in the core than counting noise would hold by chance somewhere in the
    image: more than on the mean around, or, where the columns have a lattice, more than on the fitted background, and
    an amplitude of more than three deviations.

    Raises
    ------
    InputError : as of :func:`stemloop.describe.atoms.find_columns`.

    Notes
    -----
    The fit takes the noise of one pixel to know nothing of the next one's. Where somebody smoothed the image, or it was
    resampled, that is not so, and the deviations are multiplied by the root of the noise's power where columns have
    theirs, over that of white noise (at least 1). Without a lattice so they are where a support is rough:
    how far what lies beside the columns would pull at one is measured nearby, and compared with what noise does.
    """
    raster = raster_of(image)
    noise = noise_of(raster.sample(512, 4))
    pixels, measured = raster.levels((slice(None), slice(None)))
    soft = filters.smooth(pixels, 0.5 * width_px)
    places = np.asarray(position, np.float64).reshape(-1, 2)
    seen = _visible(pixels, soft, noise, places, width_px)
    seen[cKDTree(places).query_pairs(width_px, output_type="ndarray")[:, 1]] = False
    index = np.flatnonzero(seen)
    if len(index) == 0:
        none = np.zeros(0)
        return Columns(np.zeros((0, 2)), np.zeros((0, 2)), none, none, index), index
    start = _start(soft, places[index], width_px)
    known = fitting.prior(start)
    background: Floats = np.full((2, 2), float(np.percentile(pixels[::4, ::4], 10)))
    model = fitting.fit(
        pixels, (measured / noise.variance(soft)).astype(np.float32), start, background, width_px, known
    )
    weight = _doubted(pixels - model.image, measured, noise, model.image, width_px)
    model = fitting.fit(pixels, weight, model.columns, model.background, width_px, known)
    value, sigma = model.columns, fitting.deviations(model, weight, pixels, known)
    under = model.under(value[:, :2])
    good = _believable(value, sigma, start, width_px)
    there = measured.astype(np.float32)
    mean, count, _ = gaussians.core_means(value, pixels, there, 1.5 * np.exp(value[:, 3]))
    limit = np.log(_FALSE * 4 * np.pi * width_px**2 / pixels.size)
    light = _by_chance(mean, count, under, pixels, noise) < limit
    lattice = sites_of(value[good & light, :2], pixels.shape, width_px).spread > 0
    if lattice:
        light &= value[:, 2] > _SIGNIFICANT * sigma[:, 2]
    else:
        around = filters.smooth(pixels, 6 * width_px)[tuple(_pixels(value, pixels.shape).T)]
        light = _by_chance(mean, count, np.maximum(under, around), pixels, noise) < limit
    good &= light
    value, sigma, under = value[good], sigma[good], under[good]
    if len(value):
        counted = (measured / noise.variance(model.image)).astype(np.float32)
        sigma = sigma * _rough(pixels - model.image, weight, counted, value, lattice)[:, None]
    part, whole = gaussians.core_means(value, soft, there, 2 * np.exp(value[:, 3]))[1:]
    columns = Columns(
        value[:, :2],
        sigma[:, :2],
        value[:, 2] / raster.per,
        np.exp(value[:, 3]),
        sublattices(value[:, 2]),
        raster.low + under / raster.per,
        measured=part / np.maximum(whole, 1),
    )
    return columns, index[good]


def sites_of(position: Floats, shape: tuple[int, ...], width_px: float) -> Sites:
    """Where the lattice of the columns at ``position`` (n, 2) [px] expects another one; see
    :func:`stemloop.describe.finding.sites.expected`."""
    return expected(position, neighbourhoods(position, shape), shape, width_px)


def _visible(pixels: Image, soft: Image, noise: Noise, position: Floats, width: float) -> NDArray[np.bool_]:
    """Which of the places stand out of the noise at all, by the negative Laplacian there."""
    places = tuple(_pixels(position, pixels.shape).T)
    variance = noise.variance(soft[places]) * filters.laplacian_gain(width)
    return np.asarray(filters.negative_laplacian(pixels, width)[places] > _LEAST * np.sqrt(variance))


def _start(soft: Image, position: Floats, width: float) -> Floats:
    """First parameters (n, 4) of the columns at ``position``."""
    places = _pixels(position, soft.shape)
    low = filters.around(soft, places, int(np.ceil(2 * width)))[1]
    height = np.maximum(soft[tuple(places.T)] - low, 1e-3)
    return np.column_stack([position, height, np.full(len(position), np.log(width))])


def _pixels(value: Floats, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """(n, 2) the image's pixels nearest to the places of ``value``."""
    return np.clip(np.round(np.nan_to_num(value[:, :2])), 0, np.array(shape) - 1).astype(np.int64)


def _by_chance(mean: Floats, count: Floats, usual: Floats, pixels: Image, noise: Noise) -> Floats:
    """Logarithm of the chance that ``count`` pixels of a ``usual`` level come to a ``mean`` as high as this.

    The noise is that of a Poisson process of the same variance. An event adds the slope of the variance over the level;
    where there is no slope, as much as if the image began at zero.
    """
    variance = noise.variance(usual.astype(np.float32)).astype(np.float64)
    gain = noise.gain if noise.gain > 0 else float(variance.mean() / pixels.mean())
    awaited = np.maximum(count, 1) * variance / gain**2
    there = np.maximum(awaited + count * (mean - usual) / gain, 1e-3)
    few = np.log(special.gammainc(there, awaited) + 1e-300)
    return np.where(there > 1e4, special.log_ndtr((awaited - there) / np.sqrt(awaited)), few)


def _doubted(residual: Image, measured: NDArray[np.bool_], noise: Noise, mean: Image, width: float) -> Image:
    """One over the noise's variance, or over the residual's own where a first fit left more than noise."""
    weight = measured / noise.variance(mean)
    ratio = filters.smooth((weight * residual**2).astype(np.float32), width)
    chance = np.sqrt(2 / (4 * np.pi * width**2))
    return np.asarray(weight / np.where(ratio > 1 + 3 * chance, ratio, 1), np.float32)


def _believable(value: Floats, sigma: Floats, start: Floats, width: float) -> NDArray[np.bool_]:
    """Which fits stayed where and as wide as they should be, and are not doubled; of two the weaker goes."""
    good = (
        np.isfinite(value).all(axis=1)
        & np.isfinite(sigma).all(axis=1)
        & ((sigma[:, :2] > 0) & (sigma[:, :2] < width)).all(axis=1)
    )
    good &= (value[:, 2] > 0) & (np.abs(value[:, 3] - np.log(width)) < np.log(_ALIKE))
    good &= np.hypot(*(value[:, :2] - start[:, :2]).T) < _NEAR * width
    index = np.flatnonzero(good)
    pairs = index[cKDTree(value[index, :2]).query_pairs(_DOUBLED * width, output_type="ndarray")]
    good[np.where(value[pairs[:, 0], 2] < value[pairs[:, 1], 2], pairs[:, 0], pairs[:, 1])] = False
    return np.asarray(good)


def _rough(residual: Image, weight: Image, counted: Image, value: Floats, lattice: bool) -> Floats:
    """(n,) by how much more than noise of one over ``weight`` the ``residual`` pulls at the columns; at least 1.

    The place of a column of parameters ``value`` (n, 4) is told by the derivatives of a Gaussian of its width. Their
    response to the residual, over the deviation that counting (``counted``, one over its variance) gives, is averaged
    over what is around and no column. Where columns leave no such room, or have a lattice, which repeats itself between
    them and pulls at none, it is told by the whole image (:func:`_connected`).
    """
    usual = float(np.exp(np.median(value[:, 3])))
    everywhere = _connected(residual * np.sqrt(weight), usual)
    if lattice:
        return np.full(len(value), everywhere)
    beside = np.ones(residual.shape, np.float32)
    dark = np.tile([_COVERS, np.log(usual)], (len(value), 1))
    gaussians.paint(np.column_stack([value[:, :2], dark]), fitting.reach_of(usual), beside)
    beside = np.clip(beside, 0, 1)
    pull = np.zeros(residual.shape, np.float32)
    for order in ((0, 1), (1, 0)):
        pull += ndimage.gaussian_filter(residual * np.sqrt(counted), usual, order=order, truncate=3) ** 2
    white = 1 / (4 * np.pi * usual**4)  # of both derivatives of white noise
    room = filters.smooth(beside, _NEARBY * usual)
    local = filters.smooth(beside * pull, _NEARBY * usual) / np.maximum(room, 1e-6) / white
    places = tuple(_pixels(value, residual.shape).T)
    known = room[places] > _ROOM
    share = weight[places] / np.maximum(counted[places], 1e-30)  # what the fit knew already
    return np.asarray(np.where(known, np.sqrt(np.maximum(1, local[places] * share)), everywhere))


def _connected(residual: Image, width: float) -> float:
    """Root of the power of the ``residual`` (over its deviations) at the frequencies that place a column of ``width``
    [px]; at least 1, which white noise has.

    A Gaussian's place is told by frequencies around 1 / (2 pi width), but there the fit has taken its part of the
    residual. So the power is read at 2.5 and 3.5 times that frequency, and follows from there as that of smoothed
    noise does: its logarithm is a line in the squared frequency.
    """
    part = residual[tuple(slice(max(0, n // 2 - _SAMPLE // 2), n // 2 + _SAMPLE // 2) for n in residual.shape)]
    power = np.abs(fft.rfft2(part)) ** 2 / part.size
    frequency = np.hypot(*np.meshgrid(fft.fftfreq(part.shape[0]), fft.rfftfreq(part.shape[1]), indexing="ij"))
    frequency *= 2 * np.pi * width

    def ring(middle: float) -> float:
        there = power[(frequency > middle - 0.4) & (frequency < middle + 0.4)]
        return float(there.mean()) if there.size else 0.0

    near, far = ring(2.5), ring(3.5)
    fall = max(1.0, near / far) if far > 0 else 1.0
    return float(np.sqrt(max(1.0, near * fall ** ((2.5**2 - 1) / (3.5**2 - 2.5**2)))))
