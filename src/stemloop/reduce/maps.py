"""An image laid over a coarse map of the same area, such as one taken with spectra: shift, scale, turn and shear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from stemloop.core.errors import InputError

Floats = NDArray[np.float64]

#: How far, before anything is measured, scale, turn and shear may be from the guess (1 sigma).
_DOUBT = 0.03
_FEWEST = 24
#: The search looks at the image so finely that a pixel of the map is this many pixels.
_FINE = 3


@dataclass(frozen=True)
class MapRegistration:
    """Where the pixels of a map lie on an image: ``image place = matrix @ map place + offset``, both (row, col) [px].

    matrix, matrix_sigma : (2, 2). offset, offset_sigma : (2,) [px of the image], of the map's pixel (0, 0). sigma are
        1-sigma deviations. correlation : between the map and the image as the map would show it, -1 to 1 (negative
        where one is dark where the other is bright). rival : the best correlation of any other place, in size;
        z_score : the correlation over its deviation by chance; log_odds : how much likelier [natural logarithm] this
        place is than the rival. Both count neighbouring residuals that go together as one, and so do the deviations.
    """

    matrix: Floats
    offset: Floats
    matrix_sigma: Floats
    offset_sigma: Floats
    correlation: float
    rival: float
    z_score: float
    log_odds: float

    @property
    def trusted(self) -> bool:
        """Whether the place is clear: a z_score above 5 and log_odds above 10."""
        return bool(self.z_score > 5 and self.log_odds > 10)

    @property
    def sigma(self) -> Floats:
        """(2, 3): deviations of matrix and offset side by side."""
        return np.column_stack([self.matrix_sigma, self.offset_sigma])

    def on_image(self, place: NDArray[Any]) -> Floats:
        """Places (n, 2) of the map [px of the map] on the image [px of the image]."""
        return np.asarray(np.asarray(place, dtype=np.float64) @ self.matrix.T + self.offset)

    def on_map(self, place: NDArray[Any]) -> Floats:
        """Places (n, 2) of the image [px of the image] on the map [px of the map]."""
        return np.asarray((np.asarray(place, dtype=np.float64) - self.offset) @ np.linalg.inv(self.matrix).T)


def register_to_map(
    image: NDArray[Any],
    map_image: NDArray[Any],
    pixel_ratio: float | tuple[float, float] | None = None,
    *,
    turn_rad: float = 0.1,
    scale_doubt: float = 0.05,
) -> MapRegistration:
    """Find where a coarse map lies on an image of the same area.

    Parameters
    ----------
    image : (rows, columns), finer than the map. map_image : (rows, columns), at least 24 pixels; one number a pixel,
        such as the sum of each spectrum.
    pixel_ratio : pixels of the image a pixel of the map, one number or (rows, columns); where it is left out the map
        covers the whole image.
    turn_rad, scale_doubt : the search covers turns up to ``turn_rad`` either way and scales up to ``scale_doubt`` from
        the guess.

    Returns
    -------
    MapRegistration : of the greatest absolute correlation (a map may be dark where the image is bright), refined by
        least squares in all six numbers with free brightness and level; a pixel of the map is the mean of the image
        over its area. Scale, turn and shear have a prior of 3 % around the place that the search found: where a thin
        map says little of them their deviation stays near that.

    Raises
    ------
    InputError : not images of finite numbers, a map that is constant, too small, or larger than the image.
    """
    picture, chart = _checked(image, "image"), _checked(map_image, "map")
    if chart.size < _FEWEST:
        raise InputError(f"a map needs at least {_FEWEST} pixels to be laid over an image; got {chart.shape}.")
    if pixel_ratio is None:
        ratio = np.array(picture.shape) / np.array(chart.shape)
    else:
        ratio = np.array(np.broadcast_to(np.asarray(pixel_ratio, dtype=np.float64), 2))
    if not (ratio > 0.5).all():
        raise InputError(
            f"the image should be finer than the map; got {ratio.tolist()} pixels of it a pixel of the map."
        )
    found = _searched(picture, chart, ratio, turn_rad, scale_doubt)
    return _refined(picture, chart, ratio, found)


def _checked(image: NDArray[Any], name: str) -> Floats:
    pixels = np.asarray(image)
    if pixels.ndim != 2 or pixels.dtype.kind not in "biuf":
        raise InputError(f"the {name} must be (rows, columns) of real numbers; got {pixels.dtype} of {pixels.shape}.")
    pixels = pixels.astype(np.float64)
    if not np.isfinite(pixels).all():
        raise InputError(f"the {name} has pixels that are not finite; fill or crop them.")
    if pixels.size == 0 or np.ptp(pixels) == 0:
        raise InputError(f"the {name} shows nothing: all its pixels are equal.")
    return pixels


def _blurred(image: Floats, ratio: Floats) -> Floats:
    """The image averaged over the area of a map's pixel, at each of its own pixels."""
    out = image
    for axis in (0, 1):
        width = float(ratio[axis])
        whole = int(np.ceil((width - 1) / 2))
        line = np.ones(2 * whole + 1)
        if whole:
            line[0] = line[-1] = max((width - (2 * whole - 1)) / 2, 0.0)
        out = ndimage.convolve1d(out, line / line.sum(), axis=axis, mode="reflect")
    return out


def _turned(angle: float, scale: float) -> Floats:
    """(2, 2) for (row, col), positive from +x towards +y."""
    c, s = np.cos(angle), np.sin(angle)
    return scale * np.array([[c, s], [-s, c]])


class _Found(NamedTuple):
    """A place of the map; ``rival`` the best correlation elsewhere."""

    matrix: Floats
    offset: Floats
    rival: float


def _searched(picture: Floats, chart: Floats, ratio: Floats, turn: float, doubt: float) -> _Found:
    """The best of all places, turns and scales, to about half a pixel of the map."""
    soft = _blurred(picture, ratio)
    step = np.maximum(ratio / _FINE, 1.0)
    size = np.maximum((np.array(picture.shape) / step).astype(int), 1)
    grid = np.meshgrid(*(np.arange(n) * s for n, s in zip(size, step, strict=True)), indexing="ij")
    view = ndimage.map_coordinates(soft, grid, order=1, mode="nearest")
    half = np.hypot(*chart.shape) / 2
    turns = _grid(turn, 0.7 / half)
    scales = 1 + _grid(doubt, 0.7 / half)
    best = (0.0, np.diag(ratio), np.array(picture.shape) / 2)
    lists: list[tuple[float, Floats]] = []
    for angle in turns:
        for scale in scales:
            matrix = np.diag(ratio) @ _turned(angle, scale)
            value = _correlated(view, chart, matrix, step)
            order = np.argsort(np.abs(value), axis=None)[::-1][:200]
            at = np.column_stack(np.unravel_index(order, value.shape))
            lists += [(abs(float(v)), p * step) for v, p in zip(value.flat[order[:200]], at, strict=True)]
            if abs(value.flat[order[0]]) > best[0]:
                best = (abs(float(value.flat[order[0]])), matrix, at[0] * step)
    centre = (np.array(chart.shape) - 1) / 2
    away = [v for v, p in lists if (np.abs(p - best[2]) > 2.0 * ratio).any()]
    return _Found(best[1], best[2] - best[1] @ centre, max(away, default=0.0))


def _grid(reach: float, step: float) -> Floats:
    half = int(np.ceil(reach / step)) if reach > 0 else 0
    half = min(half, 8)
    return np.linspace(-reach, reach, 2 * half + 1) if half else np.zeros(1)


def _correlated(view: Floats, chart: Floats, matrix: Floats, step: Floats) -> Floats:
    """Correlation of the map with ``view`` (pixels of ``step``), for each place of the map's centre on it.
    Places where more than a fifth of the map lies beyond the image count as zero."""
    inverse = np.linalg.inv(matrix) * step[None, :]
    centre = (np.array(chart.shape) - 1) / 2
    reach = np.ceil(np.abs(matrix / step[:, None]) @ (np.array(chart.shape) / 2)).astype(int)
    grid = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"))
    place = np.einsum("ij,jyx->iyx", inverse, grid.astype(np.float64)) + centre[:, None, None]
    limit = np.array(chart.shape)[:, None, None]
    inside = ((place > -0.5) & (place < limit - 0.5)).all(axis=0).astype(np.float64)
    shown = ndimage.map_coordinates(chart - chart.mean(), place, order=1, mode="nearest") * inside
    wide = tuple(fft.next_fast_len(v + 2 * int(r) + 1, real=True) for v, r in zip(view.shape, reach, strict=True))

    def slide(field: Floats, mask: Floats) -> Floats:
        got = fft.irfft2(fft.rfft2(field, wide) * np.conj(fft.rfft2(mask, wide)), wide)
        return np.asarray(np.roll(got, tuple(reach), axis=(0, 1))[: view.shape[0], : view.shape[1]])

    level = view - view.mean()
    count = slide(np.ones_like(view), inside)
    enough = count > 0.8 * inside.sum()
    many = np.maximum(count, 1)
    first, second = slide(level, inside), slide(level**2, inside)
    one, two = slide(np.ones_like(view), shown), slide(np.ones_like(view), shown**2)
    spread = np.maximum(second - first**2 / many, 0) * np.maximum(two - one**2 / many, 0)
    value = (slide(level, shown) - first * one / many) / np.sqrt(
        np.maximum(spread, 1e-12 * max(float(spread.max()), 1e-300))
    )
    return np.where(enough, value, 0.0)


def _refined(picture: Floats, chart: Floats, ratio: Floats, found: _Found) -> MapRegistration:
    """Least squares of the map's pixels in matrix, offset, brightness and level."""
    soft = _blurred(picture, ratio)
    coefficients = ndimage.spline_filter(soft, order=3, mode="nearest")
    down, across = (ndimage.spline_filter(np.gradient(soft, axis=axis), order=3, mode="nearest") for axis in (0, 1))
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in chart.shape), indexing="ij"), axis=-1).reshape(-1, 2)
    middle = (np.array(chart.shape) - 1) / 2
    away = (grid - middle).astype(np.float64)
    value = chart.ravel()
    start, m, c = found.matrix, found.matrix.copy(), found.offset + found.matrix @ middle
    size = np.abs(start) @ np.ones(2) * _DOUBT
    prior = np.zeros(6)
    prior[:4] = np.repeat(size, 2) ** -2.0
    covariance, alike, used, independent = np.full((6, 6), np.nan), 0.0, 0, 1.0
    for _ in range(30):
        place = away @ m.T + c
        seen = np.asarray(((place >= -0.5) & (place <= np.array(picture.shape) - 0.5)).all(axis=1))
        used = int(seen.sum())
        if used < 12:
            break

        def read(field: Floats, at: Floats = place[seen].T) -> Floats:
            return np.asarray(ndimage.map_coordinates(field, at, order=3, mode="nearest", prefilter=False))

        told = read(coefficients)
        basis = np.column_stack([told, np.ones(used)])
        (gain, level), *_ = np.linalg.lstsq(basis, value[seen], rcond=None)
        rest = value[seen] - gain * told - level
        slope = gain * np.column_stack([read(down), read(across)])
        slopes = np.column_stack([slope[:, :1] * away[seen], slope[:, 1:] * away[seen], slope])
        slopes = slopes - basis @ np.linalg.lstsq(basis, slopes, rcond=None)[0]
        variance = max(float((rest**2).sum()) / max(used - 8, 1), 1e-12 * float(value.var()))
        normal = slopes.T @ slopes / variance + np.diag(prior)
        pull = np.concatenate([prior[:4] * (start - m).ravel(), np.zeros(2)])
        covariance = np.linalg.inv(normal)
        independent = _independent(rest, seen, chart.shape)
        step = covariance @ (slopes.T @ rest / variance + pull)
        most = max(float(np.abs(step[4:]).max()), float(np.abs(step[:4]).max()) * float(middle.max()))
        step *= min(1.0, 0.3 * float(ratio.min()) / max(most, 1e-12))
        m, c = m + step[:4].reshape(2, 2), c + step[4:]
        alike = float(np.corrcoef(told, value[seen])[0, 1]) if np.ptp(told) > 0 else 0.0
        if most < 1e-4 * float(ratio.min()):
            break
    # residuals that go together count as fewer; the prior stays what it is
    covariance = np.linalg.inv((np.linalg.inv(covariance) - np.diag(prior)) * independent + np.diag(prior))
    # the offset is of pixel (0, 0): its deviation takes the matrix's part along
    turn = np.hstack([-np.kron(np.eye(2), middle[None, :]), np.eye(2)])
    spread = np.sqrt(np.maximum(np.diag(turn @ covariance @ turn.T), 0))
    count = max(used * independent - 9, 1.0)
    z = float(np.arctanh(min(abs(alike), 1 - 1e-12)) * np.sqrt(count))
    odds = 0.5 * count * float(np.log(max(1 - found.rival**2, 1e-12) / max(1 - alike**2, 1e-12)))
    deviation = np.sqrt(np.diag(covariance))[:4].reshape(2, 2)
    return MapRegistration(m, c - m @ middle, deviation, spread, alike, found.rival, z, odds)


def _independent(rest: Floats, seen: NDArray[np.bool_], shape: tuple[int, ...]) -> float:
    """Share of the residuals that counts: less where neighbours go together."""
    whole = np.zeros(len(seen))
    whole[seen] = rest
    field = whole.reshape(shape)
    power = max(float((field**2).mean()), 1e-300)
    share = 1.0
    for one, other in ((field[1:], field[:-1]), (field[:, 1:], field[:, :-1])):
        along = min(max(float((one * other).mean()) / power, 0.0), 0.95) if one.size else 0.0
        share *= (1 - along) / (1 + along)
    return share
