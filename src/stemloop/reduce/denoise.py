"""Images with less noise whose atoms stay where the data put them.

Three steps:

1. The generalised Anscombe transform makes the noise even (:mod:`stemloop.core.noise`).
2. Each pixel becomes the mean of the pixels whose surroundings look like its own: from its neighbourhood (non-local
   means; A. Buades, B. Coll and J.-M. Morel, Multiscale Model. Simul. 4 (2005) 490, doi:10.1137/040616024), or from the
   places that the image's own repetition names (N. Mevenkamp et al., Adv. Struct. Chem. Imaging 1 (2015) 3,
   doi:10.1186/s40679-015-0004-8, for periodic images).
3. Averages pull what differs towards what is usual: a displaced column towards its site, a vacancy towards a column.
   So the image itself is asked how bright each place is and how far it is displaced, by least squares within about
   one column, and the average is moved and scaled accordingly. The shape of a column is then that of many, its place
   and brightness are its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import fft, ndimage

from stemloop.core.errors import InputError, UnknownName
from stemloop.core.noise import Noise, noise_of, restored, stabilised
from stemloop.reduce.register import placed

Floats = NDArray[np.float64]

METHODS = ("nlm", "lattice")
_SMALLEST = 16
#: Non-local means look at least and at most this far [px].
_SEARCH, _FARTHEST = 10, 32
#: The lattice's translations that are used: the shortest.
_TRANSLATIONS = 48
#: A place's own brightness and displacement are read within this many widths of a column.
_WINDOW = 1.2


def denoise(
    image: NDArray[Any], *, method: str = "nlm", gain: float | None = None, floor: float | None = None
) -> Floats:
    """Take noise off a counted image without moving its atoms.

    Parameters
    ----------
    image : (rows, columns) of finite numbers, at least 16 x 16.
    method : ``nlm``: non-local means. ``lattice``: means over the translations of the image's lattice, weighted by how
        alike the surroundings are; where the image shows no lattice it is the same as ``nlm``.
    gain, floor : the noise has the variance ``gain * level + floor``; read from the image where they are left out.

    Returns
    -------
    (rows, columns) array in the image's own grey levels. The noise that is left is smooth: deviations of what is fitted
    to it must be taken from the image as it was.

    Raises
    ------
    InputError : not a two-dimensional image of finite real numbers, or too small. UnknownName : no such method.
    """
    if method not in METHODS:
        raise UnknownName(f"no way to denoise is called {method!r}; known: {', '.join(METHODS)}.")
    pixels = _checked(image)
    if np.ptp(pixels) == 0:
        return pixels
    noise = noise_of(pixels)
    if gain is not None or floor is not None:
        noise = Noise(noise.gain if gain is None else float(gain), 0.0 if floor is None else float(floor))
    if noise.variance(pixels).max() <= 0:
        return pixels
    level = stabilised(pixels, noise)
    width = column_width(pixels)
    moves = translations(pixels)
    if method == "lattice" and len(moves):
        mean = repeated(level, moves, width)
    else:
        mean = _nonlocal(level, width, float(np.linalg.norm(moves[0])) if len(moves) else 0.0)
    level = restored(mean, noise)
    level *= pixels.mean() / level.mean() if level.mean() > 0 and pixels.mean() > 0 else 1.0
    return _kept(pixels, limited(level, width), noise, width)


def _checked(image: NDArray[Any]) -> Floats:
    pixels = np.asarray(image)
    if pixels.ndim != 2 or min(pixels.shape) < _SMALLEST:
        raise InputError(
            f"an image (rows, columns) of at least {_SMALLEST} x {_SMALLEST} px is denoised; got {pixels.shape}."
        )
    if pixels.dtype.kind not in "biuf":
        raise InputError(f"the image holds {pixels.dtype}; give real numbers.")
    pixels = pixels.astype(np.float64)
    bad = int(np.count_nonzero(~np.isfinite(pixels)))
    if bad:
        raise InputError(f"{bad} of the image's {pixels.size} pixels are not finite; fill or crop them.")
    return pixels


# ---------------------------------------------------------------------------------------------- what the image is


class _Alike(NamedTuple):
    """Autocorrelation of an image (0 lag in the middle) with its sampling deviation; the lag 0 is left out."""

    value: Floats
    sigma: float


def _autocorrelation(pixels: Floats) -> _Alike:
    """Of the image without slow background, each lag over the pixels that it joins."""
    flat = pixels - ndimage.gaussian_filter(pixels, np.array(pixels.shape) / 8.0, mode="reflect")
    flat -= flat.mean()
    wide = tuple(fft.next_fast_len(2 * size, real=True) for size in pixels.shape)
    value = fft.irfft2(np.abs(fft.rfft2(flat, wide)) ** 2, wide)
    joined = fft.irfft2(np.abs(fft.rfft2(np.ones_like(flat), wide)) ** 2, wide)
    value = np.where(joined > 0.25 * flat.size, value / np.maximum(joined, 1), 0.0) / max(float(flat.var()), 1e-300)
    rows, columns = (size * 2 // 3 for size in pixels.shape)
    value = np.roll(value, (rows, columns), axis=(0, 1))[: 2 * rows + 1, : 2 * columns + 1]
    return _Alike(value, 1 / np.sqrt(flat.size))


def column_width(pixels: Floats) -> float:
    """Gaussian width [px] of what an image (rows, columns) is made of, between 1 and 12, from how fast its
    autocorrelation falls off (lag 0, where the noise is, left out); 3 where nothing is seen."""
    alike = _autocorrelation(pixels)
    middle = np.array(alike.value.shape) // 2
    reach = int(min(middle.min(), 20))
    window = alike.value[middle[0] - reach : middle[0] + reach + 1, middle[1] - reach : middle[1] + reach + 1]
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    r = np.hypot(y, x)
    ring = np.array([window[(r > k - 0.5) & (r <= k + 0.5)].mean() for k in range(1, reach + 1)])
    if ring[0] < 6 * alike.sigma:
        return 3.0
    bottom = min(float(ring.min()), 0.0)
    top = ring[0] - bottom
    below = np.flatnonzero(ring - bottom < 0.6 * top)
    if not len(below) or below[0] == 0:
        return 1.0 if len(below) else 12.0
    k = int(below[0])
    at = k + (ring[k - 1] - bottom - 0.6 * top) / max(ring[k - 1] - ring[k], 1e-12)  # lag of the 60 % level
    # a Gaussian of width w has the autocorrelation exp(-r^2 / 4 w^2), here scaled to one at r = 1
    return float(np.clip(np.sqrt((at**2 - 1) / (4 * np.log(1 / 0.6))), 1.0, 12.0))


def translations(pixels: NDArray[Any]) -> Floats:
    """(m, 2) the shortest translations (row, col) [px] under which an image (rows, columns) repeats itself, shortest
    first, each with its opposite; empty where there is no lattice.

    They are the maxima of the autocorrelation above 0.4 of the highest away from the middle and above six deviations.
    """
    image = np.asarray(pixels, dtype=np.float64)
    if np.ptp(image) == 0:
        return np.zeros((0, 2))
    alike = _autocorrelation(image)
    width = column_width(image)
    soft = ndimage.gaussian_filter(alike.value, 0.7 * width)
    middle = np.array(soft.shape) // 2
    peak = soft == ndimage.maximum_filter(soft, size=2 * int(np.ceil(1.5 * width)) + 1)
    y, x = np.indices(soft.shape)
    lag = np.hypot(y - middle[0], x - middle[1])
    # the noise's own peak, softened, reaches three widths from the middle
    peak &= (lag > 3 * width) & (soft > 6 * alike.sigma / np.sqrt(4 * np.pi * (0.7 * width) ** 2))
    peak[[0, -1]], peak[:, [0, -1]] = False, False
    if np.count_nonzero(peak) < 4:
        return np.zeros((0, 2))
    peak &= soft > 0.7 * soft[peak].max()
    at = np.argwhere(peak)
    order = np.argsort(lag[peak], kind="stable")[:_TRANSLATIONS]
    at = at[order]
    if len(at) < 4:
        return np.zeros((0, 2))
    return at - middle + _vertex(soft, at)


def _vertex(field: Floats, at: NDArray[np.int64]) -> Floats:
    out = np.zeros(at.shape)
    for axis in (0, 1):
        step = np.array([1 - axis, axis])
        left, mid, right = (field[tuple((at + d * step).T)] for d in (-1, 0, 1))
        bend = left - 2 * mid + right
        out[:, axis] = np.where(bend < 0, 0.5 * (left - right) / np.where(bend == 0, 1, bend), 0.0)
    return np.clip(out, -0.5, 0.5)


# -------------------------------------------------------------------------------------------- means of what is alike


def limited(field: Floats, width: float) -> Floats:
    """Without the frequencies that nothing of Gaussian ``width`` [px] reaches (under half a percent of its mean)."""
    passed = _passed(field.shape, width)
    return np.asarray(fft.idctn(fft.dctn(field, norm="ortho") * passed, norm="ortho"))


def _passed(shape: tuple[int, ...], width: float) -> Floats:
    rows, columns = (np.arange(size) / (2 * size) for size in shape)
    radius = np.hypot(rows[:, None], columns[None, :])
    return np.asarray(1 / (1 + (radius * width / 0.52) ** 16))


def _nonlocal(level: Floats, width: float, cell: float) -> Floats:
    """Mean of the neighbours whose patches are alike, as far away as 1.3 of the image's own period ``cell`` [px]."""
    patch = int(np.clip(np.rint(1.2 * width), 2, 6))
    search = int(np.clip(np.ceil(1.3 * cell), _SEARCH, _FARTHEST))
    variance = float((_passed(level.shape, width) ** 2).mean())
    return _nonlocal_sum(level, limited(level, width), patch, search, variance)


@njit(cache=True, nogil=True, fastmath=True)
def _nonlocal_sum(  # noqa: C901, PLR0912 - one loop nest, compiled
    level: Floats, guide: Floats, patch: int, search: int, variance: float
) -> Floats:
    """Non-local means: weights from the squared difference of ``guide`` over patches of 2 ``patch`` + 1 px a side, less
    what its noise (``variance``) makes of it."""
    rows, columns = level.shape
    total, weight = level.copy(), np.ones(level.shape)
    column_sum = np.empty(columns)
    for dy in range(search + 1):
        for dx in range(-search, search + 1):
            if dy * dy + dx * dx > search * search or (dy == 0 and dx <= 0):
                continue
            left, right = max(0, -dx), min(columns, columns - dx)
            bottom = rows - dy
            if bottom <= 0 or right <= left:
                continue
            column_sum[:] = 0.0
            for top in range(min(patch, bottom)):
                for j in range(left, right):
                    column_sum[j] += (guide[top, j] - guide[top + dy, j + dx]) ** 2
            for i in range(bottom):
                if i + patch < bottom:
                    for j in range(left, right):
                        column_sum[j] += (guide[i + patch, j] - guide[i + patch + dy, j + dx]) ** 2
                if i - patch - 1 >= 0:
                    for j in range(left, right):
                        column_sum[j] -= (guide[i - patch - 1, j] - guide[i - patch - 1 + dy, j + dx]) ** 2
                tall = min(i + patch, bottom - 1) - max(i - patch, 0) + 1
                run = 0.0
                for j in range(left, min(left + patch, right)):
                    run += column_sum[j]
                for j in range(left, right):
                    if j + patch < right:
                        run += column_sum[j + patch]
                    if j - patch - 1 >= left:
                        run -= column_sum[j - patch - 1]
                    wide = min(j + patch, right - 1) - max(j - patch, left) + 1
                    excess = run / (tall * wide) / (2 * variance) - 1
                    w = np.exp(-3.0 * max(excess, 0.0)) if excess < 4 else 0.0
                    total[i, j] += w * level[i + dy, j + dx]
                    weight[i, j] += w
                    total[i + dy, j + dx] += w * level[i, j]
                    weight[i + dy, j + dx] += w
    return total / weight


def _moves(level: Floats, moves: Floats) -> Iterator[tuple[Floats, Floats]]:
    """The image moved back by each translation, and where that shows anything."""
    for move in moves:
        yield placed(level, move)


def repeated(level: Floats, moves: Floats, width: float, own: bool = True) -> Floats:
    """Mean of the places that the lattice's translations lead to, weighted by how alike their surroundings (within
    two columns' widths) are; without the place itself where ``own`` is false."""
    wide = 2 * width
    guide = limited(level, width)
    variance = float((_passed(level.shape, width) ** 2).mean())
    first = 1.0 if own else 1e-6
    total, weight = first * level, np.full(level.shape, first)
    for value, seen in _moves(level, moves):
        away = ndimage.gaussian_filter(seen * (guide - limited(value, width)) ** 2, wide)
        known = np.maximum(ndimage.gaussian_filter(seen, wide), 1e-6)
        excess = away / known / (2 * variance) - 1
        w = seen * np.exp(-2 * np.maximum(excess - 0.2, 0.0))
        total += w * value
        weight += w
    return total / weight


# ------------------------------------------------------------------------------------------- what is kept as it was


def _kept(pixels: Floats, mean: Floats, noise: Noise, width: float) -> Floats:
    """The mean, with each place's own brightness and displacement: ``b + a (m - b) - u . grad m`` by least squares in a
    Gaussian window of ``_WINDOW`` widths, weighted by the noise; twice, as the displacement is not small."""
    weight = 1 / np.maximum(noise.variance(mean), 1e-300)
    for _ in range(2):
        shape = mean - ndimage.gaussian_filter(mean, 4 * width, mode="reflect")
        down, across = np.gradient(mean)
        parts = np.stack([shape, -down, -across])
        rest = pixels - mean

        def soft(field: Floats) -> Floats:
            return np.asarray(ndimage.gaussian_filter(field, _WINDOW * width, mode="reflect", truncate=3.0))

        normal = np.empty((*mean.shape, 3, 3))
        goal = np.empty((*mean.shape, 3))
        for i in range(3):
            goal[..., i] = soft(weight * parts[i] * rest)
            for j in range(i, 3):
                normal[..., i, j] = normal[..., j, i] = soft(weight * parts[i] * parts[j])
        scale = np.sqrt(np.maximum(np.einsum("yxii->yxi", normal), 1e-300))
        normal /= scale[..., :, None] * scale[..., None, :]
        normal += 1e-4 * np.eye(3)
        answer = np.linalg.solve(normal, (goal / scale)[..., None])[..., 0] / scale
        mean = limited(mean + np.einsum("yxi,iyx->yx", answer, parts), width)
    return mean
