"""What the surroundings of a place look like, as a vector that does not change when the specimen is turned.

The surroundings are a disc of :data:`REACH` spacings. The image in it is sampled on rings about the place, and each
ring is a Fourier series in the angle: turning the specimen by an angle t multiplies the coefficient of order m by
exp(-i m t), mirroring it makes it conjugate. What stays the same, and is kept, are the orders' moduli, how the rings
stand against each other (Re a conj(b)) and how the orders stand against each other (Re a b conj(c), a bispectrum; see
R. Kakarala, J. Math. Imaging Vis. 44 (2012) 341, doi:10.1007/s10851-012-0330-6): all of degree one, so that they have
about the noise of the coefficients themselves. A matrix, learned once from simulated surroundings, then makes the
scatter of equal surroundings white and keeps the directions in which different ones differ most (R. A. Fisher,
Ann. Eugen. 7 (1936) 179, doi:10.1111/j.1469-1809.1936.tb02137.x): distances are in deviations.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage, stats
from scipy.spatial import QhullError, Voronoi

from stemloop.core.errors import InputError
from stemloop.core.structure import Columns

Floats = NDArray[np.float64]

#: Radius of the surroundings, in spacings (the root of the area a column has): 3 cells of a perovskite across.
REACH = 2.2
#: The spacing [nm] that is taken where the pixel size is trusted: the same disc in all materials.
SPACING_NM = 0.27
#: Every column is blurred to this width (1 sigma), in spacings, whatever the probe was; and blurred at least so much
#: that the rings miss no pixel's electrons.
_BLUR, _LEAST_BLUR = 0.25, 0.15
_RINGS, _ANGLES = 9, 48
_RADII = REACH * (np.arange(_RINGS) + 0.35) / _RINGS
#: Highest order of each ring: as fine along the ring as the blur lets through.
_ORDERS = np.minimum(12, np.floor(1.7 * _RADII / _BLUR)).astype(int)
_MOST = int(_ORDERS.max())
#: Share that each ring has in the whole: its area, and less towards the rim.
_SHARE = _RADII * np.exp(-0.5 * (_RADII / 1.4) ** 2)
#: Coefficients under about this size (the contrast is 1) are noise in many images; below it they count quadratically.
_SOFT = 0.01
_TRIPLES = ((1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (1, 4), (2, 4), (3, 3), (4, 4), (6, 6))
_WEIGHTS = Path(__file__).with_name("weights") / "fingerprint.npz"


class Whitening(NamedTuple):
    """``(invariants - middle) @ matrix`` is a fingerprint: ``middle`` (d,), ``matrix`` (d, DIMENSION)."""

    middle: Floats
    matrix: Floats


#: Numbers of a fingerprint, and which edition of them this is: to be raised whenever the invariants or the matrix
#: change, as those of two editions cannot be compared.
DIMENSION, VERSION = 48, 1


#: Places are worked on so many at a time.
_AT_ONCE = 4096


def fingerprints(
    image: NDArray[Any],
    columns: Columns,
    places: NDArray[Any] | None = None,
    *,
    pixel_size_nm: float | None = None,
) -> NDArray[np.float32]:
    """Fingerprints of the surroundings of ``places``.

    They stay the same, within noise, when the specimen is turned by any angle, mirrored or shifted, when brightness,
    contrast and a slope of the background change, and at any pixel size from 8 to 30 pm.

    Parameters
    ----------
    image : (rows, cols), finite, bright columns on dark. columns : found in it; they give the spacing and the probe.
    places : (n, 2) (row, col) [px], such as ``columns.vacant`` or a defect's; default: the columns themselves.
    pixel_size_nm : where it is trusted, the surroundings are 0.6 nm in radius in all materials; otherwise 2.2 spacings
        of the columns. Fingerprints of the two kinds must not be compared.

    Returns
    -------
    (n, 48) float32, in deviations of what they were learned from; rows are NaN where the disc leaves the image or
    comes too near to its border.

    Raises
    ------
    InputError : no image, or too few columns to have a spacing and no pixel size.
    """
    return whitened(invariants(image, columns, places, pixel_size_nm=pixel_size_nm))


def whitened(raw: Floats) -> NDArray[np.float32]:
    """Fingerprints (n, 48) of :func:`invariants` (n, d)."""
    rule = _whitening()
    return ((raw - rule.middle) @ rule.matrix).astype(np.float32)


@cache
def _whitening() -> Whitening:
    with np.load(_WEIGHTS) as stored:
        return Whitening(stored["middle"].astype(np.float64), stored["matrix"].astype(np.float64))


def spacing(position: NDArray[Any]) -> float:
    """Root of the area [px] that a column has: of the most frequent Voronoi cell; gaps and borders do not count.

    Raises InputError where fewer than a dozen columns, or columns in a line, leave it open.
    """
    points = np.asarray(position, dtype=np.float64)
    if len(points) >= 12:
        try:
            cells = Voronoi(points)
        except QhullError:
            cells = None
        areas = np.array([] if cells is None else _areas(cells))
        if len(areas) >= 4:
            return float(np.exp(0.5 * _most_frequent(np.log(areas))))
    raise InputError(f"{len(points)} columns do not say how far apart columns are; give pixel_size_nm.")


def _areas(cells: Voronoi) -> list[float]:
    areas = []
    low, high = cells.points.min(axis=0), cells.points.max(axis=0)
    for index in cells.point_region:
        corners = cells.regions[index]
        if not corners or -1 in corners:
            continue
        y, x = cells.vertices[corners].T
        if y.min() >= low[0] and x.min() >= low[1] and y.max() <= high[0] and x.max() <= high[1]:
            areas.append(0.5 * abs(float(y @ np.roll(x, 1) - x @ np.roll(y, 1))))
    return areas


def _most_frequent(x: Floats) -> float:
    """The mean of what lies within 0.12 of the top of the histogram, smoothed by 0.04."""
    step = 0.01
    low = x.min() - 0.2
    counts = np.bincount(((x - low) / step).astype(int), minlength=int((np.ptp(x) + 0.4) / step) + 1).astype(float)
    top = low + step * (0.5 + int(np.argmax(ndimage.gaussian_filter1d(counts, 4.0))))
    for _ in range(3):
        top = float(x[np.abs(x - top) < 0.12].mean())
    return top


def unit_px(columns: Columns, pixel_size_nm: float | None = None) -> float:
    """The length [px] that fingerprints and patches of this image are measured in."""
    if pixel_size_nm is None:
        return spacing(columns.position)
    if not np.isfinite(pixel_size_nm) or pixel_size_nm <= 0:
        raise InputError(f"a pixel of {pixel_size_nm} nm cannot be; give its size in nm, about 0.008 to 0.03.")
    return SPACING_NM / pixel_size_nm


def invariants(
    image: NDArray[Any],
    columns: Columns,
    places: NDArray[Any] | None = None,
    *,
    pixel_size_nm: float | None = None,
) -> Floats:
    """The invariants (n, d) that :func:`fingerprints` are made of, before whitening."""
    pixels, middles = _checked(image, columns.position if places is None else places)
    unit = unit_px(columns, pixel_size_nm)
    width = float(np.median(columns.width)) if len(columns) else _BLUR * unit
    return invariants_at(pixels, middles, unit, width)


def invariants_at(pixels: Floats, middles: Floats, unit: float, width: float) -> Floats:
    """As :func:`invariants`, for columns ``unit`` [px] apart and of ``width`` [px]."""
    blur = np.sqrt(max((_BLUR * unit) ** 2 - width**2, (_LEAST_BLUR * unit) ** 2))
    # what is blurred into the outermost ring must be of the image, too
    inside = np.flatnonzero(_inside(middles, pixels.shape, max(REACH * unit, _RADII[-1] * unit + 2.5 * blur)))
    out = np.full((len(middles), size()), np.nan)
    if len(inside):
        soft = ndimage.gaussian_filter(pixels, blur, mode="nearest")
        angle = 2 * np.pi * np.arange(_ANGLES) / _ANGLES
        around = np.stack([np.sin(angle), np.cos(angle)], axis=1)
        rings = unit * _RADII[:, None, None] * around
        spline = ndimage.spline_filter(soft, 3)
        for first in range(0, len(inside), _AT_ONCE):
            some = inside[first : first + _AT_ONCE]
            on_rings = sample(spline, np.ascontiguousarray(middles[some]), rings.reshape(-1, 2))
            series = np.fft.rfft(on_rings.reshape(-1, _RINGS, _ANGLES), axis=2)[..., : _MOST + 1] / _ANGLES
            out[some] = _invariants(series)
    return out


def patches(image: NDArray[Any], places: NDArray[Any], unit: float, size_px: int = 32) -> NDArray[np.float32]:
    """(n, size_px, size_px) pictures of the surroundings of ``places``, 2 x :data:`REACH` units of ``unit`` [px] a
    side, as they lie in the image; the nearest pixels go on beyond its border."""
    pixels, middles = _checked(image, places)
    step = 2 * REACH * unit / size_px
    soft = ndimage.gaussian_filter(pixels, 0.4 * step, mode="nearest") if step > 1.2 else pixels
    line = (np.arange(size_px) - (size_px - 1) / 2) * step
    grid = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    spline, seen = ndimage.spline_filter(soft, 3), np.empty((len(middles), len(grid)), np.float32)
    for first in range(0, len(middles), _AT_ONCE):
        seen[first : first + _AT_ONCE] = sample(spline, np.ascontiguousarray(middles[first : first + _AT_ONCE]), grid)
    return seen.reshape(-1, size_px, size_px)


def scatter(vectors: NDArray[Any], group: NDArray[Any]) -> float:
    """How far equal surroundings of one image lie apart, in units of the fingerprints' own deviation.

    The median over all places of the mean squared deviation from the median of the group (its sublattice): most places
    of a crystal are perfect. 1 is the scatter they were made white for (1e4 e/A^2 and small errors of place and
    scale); NaN rows do not count.

    >>> scatter(np.random.default_rng(0).normal(0, 2, (500, 64)), np.zeros(500)).__round__(1)
    2.0
    """
    squares = []
    for value in np.unique(group):
        own = np.asarray(vectors, dtype=np.float64)[np.asarray(group) == value]
        own = own[np.isfinite(own).all(axis=1)]
        if len(own) >= 5:
            squares.append(((own - np.median(own, axis=0)) ** 2).sum(axis=1))
    if not squares:
        return 1.0
    return float(np.sqrt(np.median(np.concatenate(squares)) / stats.chi2.median(np.shape(vectors)[1])))


def _checked(image: NDArray[Any], places: NDArray[Any]) -> tuple[Floats, Floats]:
    pixels = np.asarray(image)
    if pixels.ndim != 2 or min(pixels.shape) < 8 or pixels.dtype.kind not in "biuf":
        raise InputError(f"a fingerprint is of an image (rows, cols); got {pixels.dtype} of shape {pixels.shape}.")
    pixels = pixels.astype(np.float64)
    if not np.isfinite(pixels).all():
        raise InputError("pixels of the image are not finite; fill or crop them.")
    middles = np.asarray(places, dtype=np.float64)
    if middles.ndim != 2 or middles.shape[1] != 2:
        raise InputError(f"places are (n, 2) as (row, col) [px]; got the shape {middles.shape}.")
    return pixels, middles


def _inside(middles: Floats, shape: tuple[int, ...], reach: float) -> NDArray[np.bool_]:
    return np.asarray(((middles >= reach) & (middles <= np.array(shape) - 1 - reach)).all(axis=1))


@njit(cache=True, nogil=True)
def sample(spline: Floats, middles: Floats, offsets: Floats) -> Floats:
    """(n, m) values of the cubic spline with coefficients ``spline`` at each of ``middles`` + ``offsets``; the nearest
    coefficients go on beyond the border."""
    rows, cols = spline.shape
    out = np.empty((len(middles), len(offsets)))
    wy, wx = np.empty(4), np.empty(4)
    for k in range(len(middles)):
        for p in range(len(offsets)):
            y = min(max(middles[k, 0] + offsets[p, 0], 0.0), rows - 1.0)
            x = min(max(middles[k, 1] + offsets[p, 1], 0.0), cols - 1.0)
            top, left = int(y), int(x)
            for t, w in ((y - top, wy), (x - left, wx)):
                w[0] = (1 - t) ** 3 / 6
                w[1] = (4 - 6 * t * t + 3 * t**3) / 6
                w[3] = t**3 / 6
                w[2] = 1 - w[0] - w[1] - w[3]
            total = 0.0
            for i in range(4):
                row = min(max(top - 1 + i, 0), rows - 1)
                along = 0.0
                for j in range(4):
                    along += wx[j] * spline[row, min(max(left - 1 + j, 0), cols - 1)]
                total += wy[i] * along
            out[k, p] = total
    return out


def _normalised(series: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """Coefficients (n, rings, orders) of mean 0 and variance 1 over the disc, without the plane of the background,
    each ring scaled with the root of its share, so that the noise of all is about alike."""
    share = _SHARE / _SHARE.sum()
    z = series.copy()
    z[:, :, 0] -= (z[:, :, 0].real @ share)[:, None]
    z[:, :, 1] -= (z[:, :, 1] @ (share * _RADII) / (share @ _RADII**2))[:, None] * _RADII
    power = np.abs(z) ** 2
    contrast = np.sqrt((power[:, :, 0] + 2 * power[:, :, 1:].sum(axis=2)) @ share)
    z *= np.sqrt(share)[:, None] / np.maximum(contrast, 1e-300)[:, None, None]
    return z


def _invariants(series: NDArray[np.complex128]) -> Floats:
    """(n, d) of angular Fourier coefficients (n, rings, orders)."""
    z = _normalised(series)
    parts = [z[:, :, 0].real]
    for ring in range(_RINGS):
        top = _ORDERS[ring]
        own = z[:, ring, 1 : top + 1]
        parts.append(np.abs(own) ** 2 / np.sqrt(np.abs(own) ** 2 + _SOFT**2))
        for other in range(ring + 1, min(ring + 3, _RINGS)):
            parts.append(_together(own, z[:, other, 1 : top + 1].conj()))
        few = [(a, b) for a, b in _TRIPLES if a + b <= top]
        if few:
            a, b = np.array(few).T
            parts.append(_together(z[:, ring, a], z[:, ring, b], z[:, ring, a + b].conj()))
    return np.concatenate(parts, axis=1)


def _together(*factors: NDArray[np.complex128]) -> Floats:
    """Real part of the product, brought to degree one: it is never noisier than the factors are."""
    size = np.sqrt(sum((np.abs(f) ** 2 for f in factors), np.full(factors[0].shape, _SOFT**2)))
    return np.asarray(np.prod(factors, axis=0).real / size ** (len(factors) - 1))


@cache
def size() -> int:
    """Number of invariants, before whitening."""
    return int(_invariants(np.zeros((1, _RINGS, _MOST + 1), np.complex128)).shape[1])
