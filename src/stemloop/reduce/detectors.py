"""Virtual detectors, patterns of a whole scan, and radial profiles, as folds.

A mask is the share of each pixel's area that a detector covers. Masks are rounded to multiples of 2^-16 (:func:`grid`)
so that the sums of counts under them are exact in float64 whatever the order of the additions; the rounding moves a
weight by at most 8e-6.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.protocols import Block, Camera
from stemloop.reduce.engine import Maps, Rows

Array = NDArray[np.float64]

#: Weights of masks are whole multiples of 1/WHOLE.
WHOLE = 2**16
#: Float64 adds whole numbers without error up to here.
EXACT = 2.0**53


def grid(masks: NDArray[Any]) -> Array:
    """``masks`` rounded to multiples of 2^-16."""
    return np.rint(np.asarray(masks, dtype=np.float64) * WHOLE) / WHOLE


def weigh(block: Block, masks: Array) -> Array:
    """(frames, k): ``block.dot(masks)`` without a rounding error; ``masks`` are multiples of 2^-16.

    Masks of whole numbers are passed on as they are (blocks add those fastest), the others times 2^16.
    """
    scale = np.where((masks == np.rint(masks)).all(axis=(1, 2)), 1.0, WHOLE)
    sums = block.dot(masks * scale[:, None, None])
    if sums.size and np.abs(sums).max() >= EXACT:
        raise InputError("the counts of a frame are too large to be added without error (2^53): scale them down.")
    return sums / scale


# ---------------------------------------------------------------------------------------------------------- masks


def disk_area(shape: tuple[int, int], centre_px: tuple[float, float], radius_px: float) -> Array:
    """(rows, columns): the area [px] of each pixel inside a disk, in closed form.

    The area of the disk to the upper left of a corner (x, y) is ``A(x) + sign(y) H(x, |y|)``, where with
    ``s(u) = sqrt(R^2 - u^2)`` the integrals over u from -R to x of ``s`` and of ``min(s, |y|)`` are elementary; a pixel
    is the difference over its four corners. The pixels add up to pi R^2 where the disk lies inside the frame.

    >>> round(float(disk_area((32, 32), (15.3, 16.1), 7.0).sum() / np.pi), 9)
    49.0
    """
    if radius_px <= 0:
        return np.zeros(shape)
    radius = float(radius_px)
    y = (np.arange(shape[0] + 1) - 0.5 - centre_px[0])[:, None]
    x = (np.arange(shape[1] + 1) - 0.5 - centre_px[1])[None, :]

    def under(u: NDArray[Any]) -> NDArray[Any]:
        """Integral of s from 0 to u."""
        u = np.clip(u, -radius, radius)
        return np.asarray((u * np.sqrt(radius**2 - u**2) + radius**2 * np.arcsin(u / radius)) / 2)

    high = np.minimum(np.abs(y), radius)
    chord = np.sqrt(radius**2 - high**2)
    ends = under(np.array(-radius))
    flat = high * (np.clip(x, -chord, chord) + chord)
    sides = under(np.minimum(x, -chord)) - ends + under(np.maximum(x, chord)) - under(chord)
    corner = under(x) - ends + np.sign(y) * (flat + sides)
    return np.clip(np.diff(np.diff(corner, axis=0), axis=1), 0.0, 1.0)


def ring(camera: Camera, inner_rad: float, outer_rad: float) -> Array:
    """The mask of a ring detector from ``inner_rad`` to ``outer_rad`` [rad]; its edges cut pixels in parts."""
    if not 0 <= inner_rad < outer_rad:
        raise InputError(f"a ring needs 0 <= inner < outer angle; got {inner_rad} and {outer_rad} rad.")
    areas = [disk_area(camera.shape, camera.centre_px, angle / camera.pixel_rad) for angle in (inner_rad, outer_rad)]
    return grid(areas[1] - areas[0])


def segments(camera: Camera, inner_rad: float, outer_rad: float, n: int = 4, start_rad: float = 0.0) -> Array:
    """(n, rows, columns): a ring cut into ``n`` equal sectors that add up to :func:`ring` exactly.

    Sector k covers azimuths from ``start_rad + 2 pi k/n`` to ``start_rad + 2 pi (k+1)/n``, counted from +x (columns)
    towards +y (rows). Pixels on a border are shared by 16 x 16 points.
    """
    if n < 1:
        raise InputError(f"a detector has at least one segment; got {n}.")
    fine = (np.arange(16) + 0.5) / 16 - 0.5
    y = (np.arange(camera.shape[0])[:, None] + fine - camera.centre_px[0])[:, None, :, None]
    x = (np.arange(camera.shape[1])[:, None] + fine - camera.centre_px[1])[None, :, None, :]
    sector = np.floor(np.mod(np.arctan2(y, x) - start_rad, 2 * np.pi) * n / (2 * np.pi)).astype(int) % n
    up_to = np.stack([(sector <= k).mean(axis=(2, 3)) for k in range(n)])
    return np.diff(grid(up_to * ring(camera, inner_rad, outer_rad)), axis=0, prepend=0)


def standard(camera: Camera, semiangle_rad: float) -> dict[str, Array]:
    """The usual detectors for a probe of ``semiangle_rad`` a: BF 0-a, ABF a/2-a (S. D. Findlay et al.,
    Ultramicroscopy 110 (2010) 903, doi:10.1016/j.ultramic.2010.04.004), ADF 1.1a-3a, HAADF from 3a to the corner.
    A ring that no pixel reaches is left out."""
    rows, columns = camera.shape
    y, x = camera.centre_px
    corner = np.hypot(max(y, rows - 1 - y) + 1, max(x, columns - 1 - x) + 1) * camera.pixel_rad
    a = semiangle_rad
    edges = {"bf": (0.0, a), "abf": (a / 2, a), "adf": (1.1 * a, 3 * a), "haadf": (3 * a, max(corner, 3.1 * a))}
    masks = {name: ring(camera, *angles) for name, angles in edges.items()}
    return {name: mask for name, mask in masks.items() if mask.any()}


def find_disk(pattern: NDArray[Any]) -> tuple[tuple[float, float], float]:
    """Centre (row, col) [px] and radius [px] of the bright disk in a mean pattern.

    The radius is that of a disk as large as the area above half of the disk's height, which is the median of the
    pixels above half of the maximum; the centre is the centre of mass of that area. InputError if there is no disk.
    """
    image = np.asarray(pattern, dtype=np.float64)
    peak = np.nanmax(image, initial=0.0)
    if not peak > 0:
        raise InputError("the mean pattern is empty: there is no bright disk in it.")
    from scipy import ndimage

    height = np.median(image[image > peak / 2])
    labels, _ = ndimage.label(image > height / 2)
    brightest = labels.flat[int(np.argmax(np.where(labels > 0, ndimage.uniform_filter(image, 3), -np.inf)))]
    inside = labels == brightest
    row, col = np.argwhere(inside).mean(axis=0)
    return (float(row), float(col)), float(np.sqrt(np.count_nonzero(inside) / np.pi))


# ---------------------------------------------------------------------------------------------------------- folds


@dataclass(frozen=True)
class Virtual:
    """Maps of the counts under any masks, each with its deviation ``<name>_sigma``.

    masks : name -> (rows, columns). The deviation is that of counted electrons: ``sqrt(sum of mask^2 x counts)``.
    """

    masks: Mapping[str, NDArray[Any]]
    sigma: bool = True

    def init(self, scan: tuple[int, int], shape: tuple[int, int]) -> Rows:
        for name, mask in self.masks.items():
            if np.shape(mask) != tuple(shape):
                raise InputError(f"the mask {name} is {np.shape(mask)}, the frames are {tuple(shape)}.")
        return Rows(scan)

    @functools.cached_property
    def _weights(self) -> tuple[Array, list[int]]:
        """The masks, followed by the squares of those that are not only 0 and 1, and which these are."""
        masks = grid(np.stack(list(self.masks.values())))
        partial = [k for k in range(len(masks)) if self.sigma and not np.array_equal(masks[k] ** 2, masks[k])]
        return np.concatenate([masks, grid(masks[partial] ** 2)]), partial

    def step(self, part: Rows, block: Block, first: int) -> Rows:
        weights, partial = self._weights
        found, k = weigh(block, weights), len(self.masks)
        if not self.sigma:
            return part.add(first, found)
        variance = found[:, :k].copy()
        variance[:, partial] = found[:, k:]
        return part.add(first, np.concatenate([found[:, :k], np.sqrt(np.maximum(variance, 0))], axis=1))

    def merge(self, one: Rows, other: Rows) -> Rows:
        return one.join(other)

    def finish(self, part: Rows) -> Maps:
        k = len(self.masks)
        table = part.table(2 * k if self.sigma else k)
        maps = {name: table[..., i] for i, name in enumerate(self.masks)}
        if self.sigma:
            maps |= {f"{name}_sigma": table[..., k + i] for i, name in enumerate(self.masks)}
        return maps


@dataclass(frozen=True)
class _Moments:
    frames: int
    total: NDArray[np.int64]
    squares: NDArray[np.int64]
    peak: NDArray[np.int64]


@dataclass(frozen=True)
class Patterns:
    """``mean_pattern``, ``maximum_pattern``, ``variance_pattern`` (unbiased, over the positions) and
    ``sum_pattern`` of a scan, from whole-number sums of counts and of their squares.

    With ``q, r = divmod(sum, n)`` the variance is ``(sum (x - q)^2 - r^2/n)/(n - 1)``, which loses no digits.
    """

    extremes: bool = True

    def init(self, scan: tuple[int, int], shape: tuple[int, int]) -> _Moments:
        return _Moments(0, *(np.zeros(shape, dtype=np.int64) for _ in range(3)))

    def step(self, part: _Moments, block: Block, first: int) -> _Moments:
        total = part.total + block.total().astype(np.int64)
        if not self.extremes:
            return _Moments(part.frames + block.frames, total, part.squares, part.peak)
        squares, peak = part.squares.copy(), part.peak.copy()
        for i in range(block.frames):  # one frame is dense at a time, whatever the block's form
            _extremes(block.frame(i), squares, peak)
        return _Moments(part.frames + block.frames, total, squares, peak)

    def merge(self, one: _Moments, other: _Moments) -> _Moments:
        return _Moments(
            one.frames + other.frames,
            one.total + other.total,
            one.squares + other.squares,
            np.maximum(one.peak, other.peak),
        )

    def finish(self, part: _Moments) -> Maps:
        n = part.frames
        maps: Maps = {"sum_pattern": part.total, "mean_pattern": part.total / n if n else part.total * np.nan}
        if self.extremes:
            q, r = np.divmod(part.total, max(n, 1))
            spread = part.squares - 2 * q * part.total + n * q * q
            maps["maximum_pattern"] = part.peak
            maps["variance_pattern"] = (spread - r * r / max(n, 1)) / (n - 1) if n > 1 else part.total * np.nan
        return maps


@numba.njit(cache=True, nogil=True)
def _extremes(frame, squares, peak):  # type: ignore[no-untyped-def]
    for r in range(frame.shape[0]):
        for c in range(frame.shape[1]):
            count = np.int64(frame[r, c])
            squares[r, c] += count * count
            peak[r, c] = max(peak[r, c], count)


@dataclass(frozen=True)
class Radial:
    """Radial profiles: ``radial`` (scan rows, scan columns, bins), the mean counts a pixel in rings of ``step_rad``
    around the camera's centre, with ``radial_sigma``, and ``radial_angle`` (bins,), the middle of each ring [rad].

    Pixels are shared between rings by area, so rings x their areas add up to all counts inside the last ring.
    """

    camera: Camera
    step_rad: float
    bins: int

    @functools.cached_property
    def rings(self) -> Array:
        """(bins, rows, columns): the masks, which add up to one disk."""
        if self.bins < 1 or self.step_rad <= 0:
            raise InputError(f"radial profiles need a step above zero and bins; got {self.step_rad}, {self.bins}.")
        radii = np.arange(1, self.bins + 1) * self.step_rad / self.camera.pixel_rad
        disks = np.stack([disk_area(self.camera.shape, self.camera.centre_px, radius) for radius in radii])
        return np.diff(grid(disks), axis=0, prepend=0)

    @functools.cached_property
    def _weights(self) -> Array:
        return np.concatenate([self.rings, grid(self.rings**2)])

    def init(self, scan: tuple[int, int], shape: tuple[int, int]) -> Rows:
        if tuple(shape) != tuple(self.camera.shape):
            raise InputError(f"the camera has {self.camera.shape} pixels, the frames {tuple(shape)}.")
        return Rows(scan)

    def step(self, part: Rows, block: Block, first: int) -> Rows:
        return part.add(first, weigh(block, self._weights))

    def merge(self, one: Rows, other: Rows) -> Rows:
        return one.join(other)

    def finish(self, part: Rows) -> Maps:
        table = part.table(2 * self.bins)
        area = self.rings.sum(axis=(1, 2))
        area = np.where(area > 0, area, np.nan)
        return {
            "radial": table[..., : self.bins] / area,
            "radial_sigma": np.sqrt(table[..., self.bins :]) / area,
            "radial_angle": (np.arange(self.bins) + 0.5) * self.step_rad,
        }
