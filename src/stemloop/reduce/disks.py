"""Diffraction disks: found by correlation with the probe, then placed by maximum likelihood.

The correlation is a matched filter: the probe's image less its mean over a surround, so that an even background adds
nothing, divided by the counting deviation of the same sum (``sqrt(sum of filter^2 x counts)``), which makes the
threshold a number of deviations. Each peak starts a fit of ``mu = A T(r - p) + B`` by Fisher scoring of the Poisson
likelihood; the inverse of the Fisher information at the end is the covariance of the position, which no unbiased
estimate can undercut (H. Cramér, C. R. Rao; for disks in nano-beam diffraction see T. C. Pekin et al., Ultramicroscopy
176 (2017) 170, doi:10.1016/j.ultramic.2016.12.021, who compare correlations).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from stemloop.core.errors import InputError
from stemloop.core.protocols import Block
from stemloop.reduce.detectors import disk_area
from stemloop.reduce.engine import Maps

Array = NDArray[np.float64]

#: Samples a pixel at which a template is kept; between them it is interpolated linearly.
FINE = 16


@dataclass(frozen=True)
class Template:
    """The probe's image on the detector, kept finer than pixels.

    fine : (FINE h + 1, FINE h + 1) for a half width: ``fine[i, j]`` is the intensity (the plateau is 1) in a pixel
    whose middle lies ``(i, j)/FINE - half`` from the disk's centre. half : half width of the window [px].
    """

    fine: Array
    half: int

    @classmethod
    def disk(cls, radius_px: float, edge_px: float = 0.0) -> Template:
        """A round, evenly filled disk; ``edge_px`` is the rms width of its edge (the detector's point spread)."""
        if not radius_px > 0.5:
            raise InputError(f"a disk to be found has a radius above half a pixel; got {radius_px}.")
        half = int(np.ceil(radius_px + 3 * edge_px + 1.5))
        n = 2 * half * FINE + 1
        # a disk FINE times as large, its share of fine pixels, averaged over a pixel's width and smeared
        image = disk_area((n + 2 * FINE,) * 2, ((n + 2 * FINE - 1) / 2,) * 2, radius_px * FINE)
        box = np.ones(FINE + 1) / FINE
        box[[0, -1]] /= 2
        for axis in (0, 1):
            image = ndimage.convolve1d(image, box, axis=axis, mode="constant")
        if edge_px > 0:
            image = ndimage.gaussian_filter(image, edge_px * FINE, mode="constant", truncate=6)
        return cls(image[FINE:-FINE, FINE:-FINE], half)

    @classmethod
    def measured(cls, image: NDArray[Any], centre_px: tuple[float, float], radius_px: float) -> Template:
        """A probe that was recorded through vacuum; ``image`` less the median of its surround, the plateau set to 1."""
        half = int(np.ceil(radius_px + 2.5))
        grid = np.arange(-half * FINE, half * FINE + 1) / FINE
        y, x = np.meshgrid(grid + centre_px[0], grid + centre_px[1], indexing="ij")
        fine = ndimage.map_coordinates(np.asarray(image, np.float64), [y, x], order=3, mode="nearest")
        far = np.hypot(y - centre_px[0], x - centre_px[1])
        fine = fine - np.median(fine[far > radius_px + 1])
        plateau = np.median(fine[far < 0.7 * radius_px])
        if not plateau > 0:
            raise InputError("the recorded probe is not brighter than its surround: give its centre and radius.")
        return cls(np.maximum(fine / plateau, 0.0) * (far <= half), half)

    @functools.cached_property
    def tables(self) -> Array:
        """(3, ...): ``fine`` and its derivatives by the disk's own position (y, x) [1/px]."""
        y, x = np.gradient(self.fine, 1 / FINE)
        return np.ascontiguousarray(np.stack([self.fine, -y, -x]))

    def at(self, y: Array, x: Array) -> Array:
        """Intensity in pixels whose middles lie (``y``, ``x``) [px] from the disk's centre."""
        places = [(y + self.half) * FINE, (x + self.half) * FINE]
        return np.asarray(ndimage.map_coordinates(self.fine, places, order=1, mode="constant"))

    @functools.cached_property
    def matched(self) -> Array:
        """(2 half + 3, 2 half + 3): the filter of the search, with sum zero."""
        reach = np.arange(-self.half - 1, self.half + 2.0)
        y, x = np.meshgrid(reach, reach, indexing="ij")
        image = self.at(y, x)
        near = np.hypot(y, x) <= self.half + 1
        return np.asarray(np.where(near, image - image[near].mean(), 0.0))

    @functools.cached_property
    def _spectra(self) -> dict[tuple[int, ...], tuple[tuple[int, ...], NDArray[Any], NDArray[Any]]]:
        return {}

    def search(self, image: Array) -> Array:
        """(rows, columns): significance [deviations] of a disk at each pixel of an image of counts."""
        matched = self.matched
        edge = len(matched) // 2
        if image.shape not in self._spectra:
            size = tuple(fft.next_fast_len(n + 4 * edge, real=True) for n in image.shape)
            both = [fft.rfft2(kernel[::-1, ::-1], size) for kernel in (matched, matched**2)]
            self._spectra[image.shape] = (size, both[0], both[1])
        size, filtered, squared = self._spectra[image.shape]
        spectrum = fft.rfft2(np.pad(image, edge, mode="reflect"), size)
        keep = tuple(slice(2 * edge, 2 * edge + n) for n in image.shape)
        found, variance = (fft.irfft2(spectrum * kernel, size)[keep] for kernel in (filtered, squared))
        # where next to nothing was counted, one count spread over the filter is the least doubt
        return np.asarray(found / np.sqrt(np.maximum(variance, np.mean(matched**2))))


@dataclass(frozen=True)
class Disks:
    """Disks of many frames, ordered by frame.

    frame : (n,) the frame's number. position : (n, 2) (row, col) [px]. covariance : (n, 2, 2) [px^2] of it.
    height, height_sigma : (n,) counts a pixel on the plateau. significance : (n,) of the search [deviations].
    """

    frame: NDArray[np.int64]
    position: Array
    covariance: Array
    height: Array
    height_sigma: Array
    significance: Array

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def sigma(self) -> Array:
        """(n, 2): 1-sigma deviation of each position [px]."""
        return np.sqrt(np.diagonal(self.covariance, axis1=1, axis2=2))

    def of(self, frame: int) -> Disks:
        """The disks of one frame."""
        return self.take(slice(*np.searchsorted(self.frame, [frame, frame + 1])))

    def take(self, index: Any) -> Disks:
        """The disks at ``index``."""
        return Disks(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @staticmethod
    def join(parts: list[Disks]) -> Disks:
        """All disks of ``parts``, ordered by frame."""
        if not parts:
            none = np.empty(0)
            return Disks(np.empty(0, np.int64), np.empty((0, 2)), np.empty((0, 2, 2)), none, none, none)
        names = Disks.__dataclass_fields__
        whole = Disks(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
        return whole.take(np.argsort(whole.frame, kind="stable"))


def find_disks(
    pattern: NDArray[Any],
    template: Template,
    threshold: float = 6.0,
    most: int = 100,
    start: NDArray[Any] | None = None,
    frame: int = 0,
) -> Disks:
    """Disks in one pattern (rows, columns) of counts.

    Parameters
    ----------
    template : the probe's image.
    threshold : least significance of a peak of the matched filter [deviations].
    most : at most so many disks, the most significant.
    start : (n, 2) places to begin the fits instead of a search.
    frame : number to write on the disks.

    Returns
    -------
    Disks. Those whose fit leaves the start by more than half a disk's width, or the frame, are dropped. The deviation
    holds for counted electrons; where counts are in other units, scale them to electrons first.
    """
    image = np.asarray(pattern, dtype=np.float64)
    if image.ndim != 2 or not np.isfinite(image).all() or image.min(initial=0.0) < 0:
        raise InputError(f"disks are found in one pattern of counts, finite and not negative; got {image.shape}.")
    if start is None:
        places, significance = _peaks(image, template, threshold, most)
    else:
        places = np.asarray(start, dtype=np.float64).reshape(-1, 2)
        significance = np.full(len(places), np.nan)
    if len(places) == 0:
        return Disks.join([])
    n = len(places)
    value, covariance, good = np.zeros((n, 4)), np.zeros((n, 4, 4)), np.zeros(n, dtype=np.bool_)
    _fit(image, places, template.tables, template.half, value, covariance, good)
    away = np.hypot(*(value[:, 2:] - places).T) > template.half / 2
    good &= ~away & (value[:, 0] > 0) & np.isfinite(value).all(axis=1)
    return Disks(
        np.full(int(good.sum()), frame, dtype=np.int64),
        value[good, 2:],
        covariance[good][:, 2:, 2:],
        value[good, 0],
        np.sqrt(covariance[good, 0, 0]),
        significance[good],
    )


def _peaks(image: Array, template: Template, threshold: float, most: int) -> tuple[Array, Array]:
    """Places and significances of the matched filter's maxima, one a disk's width."""
    if min(image.shape) <= len(template.matched):
        raise InputError(f"frames of {image.shape} are too small for a probe of {len(template.matched)} pixels.")
    ratio = template.search(image)
    local = ndimage.maximum_filter(ratio, size=2 * (template.half // 2) + 1) == ratio
    rows, columns = np.nonzero(local & (ratio > threshold))
    order = np.argsort(-ratio[rows, columns], kind="stable")
    chosen: list[int] = []
    for i in order:
        if all(np.hypot(rows[i] - rows[j], columns[i] - columns[j]) > template.half for j in chosen):
            chosen.append(int(i))
        if len(chosen) == most:
            break
    return np.column_stack([rows[chosen], columns[chosen]]).astype(np.float64), ratio[rows[chosen], columns[chosen]]


@numba.njit(cache=True, nogil=True)
def _fit(image, places, tables, half, value, covariance, good):  # type: ignore[no-untyped-def]
    """Fisher scoring of A, B, y, x for each disk of a frame, in a window around its start; pixels nearer to another
    disk's start are left out. Fills ``value`` (n, 4), ``covariance`` (n, 4, 4) and ``good`` (n,)."""
    rows, columns, counts = np.empty((3, (2 * half + 4) ** 2))
    for d in range(len(places)):
        n = _window(image, places, d, half + 1, rows, columns, counts)
        a, b = _levels(tables[0], half, places[d], rows[:n], columns[:n], counts[:n])
        y0, x0 = places[d]
        for iteration in range(40):
            fisher, score = _score(a, b, rows[:n] - y0 + half, columns[:n] - x0 + half, counts[:n], tables)
            if fisher[0, 0] <= 0 or fisher[2, 2] <= 0 or fisher[3, 3] <= 0:
                break
            inverse = np.linalg.inv(fisher)
            step = inverse @ score
            size = max(abs(step[2]), abs(step[3]))
            enough = 0.01 if iteration < 39 else 0.3  # deviations
            good[d] = size < 1e-4 or size < enough * np.sqrt(min(inverse[2, 2], inverse[3, 3]))
            # the likelihood of a sharp edge is not smooth: do not go to and fro
            step *= min(1.0, 0.5 / max(size, 1e-12)) * min(1.0, 6.0 / max(iteration, 1))
            # no background is zero: one count in the window is the least that could be known of it
            a, b = max(a + step[0], 1e-6), max(b + step[1], 1.0 / n)
            y0, x0 = y0 + step[2], x0 + step[3]
            if good[d]:
                covariance[d] = inverse
                break
        value[d, 0], value[d, 1], value[d, 2], value[d, 3] = a, b, y0, x0


@numba.njit(cache=True, nogil=True)
def _window(image, places, d, reach, rows, columns, counts):  # type: ignore[no-untyped-def]
    """Write the pixels that belong to disk ``d`` and return how many they are."""
    n = 0
    y, x = places[d]
    for r in range(max(0, int(y) - reach), min(image.shape[0], int(y) + reach + 2)):
        for c in range(max(0, int(x) - reach), min(image.shape[1], int(x) + reach + 2)):
            far = (r - y) ** 2 + (c - x) ** 2
            own = far <= reach * reach
            for e in range(len(places)):
                own = own and (e == d or far <= (r - places[e, 0]) ** 2 + (c - places[e, 1]) ** 2)
            if own:
                rows[n], columns[n], counts[n] = r, c, image[r, c]
                n += 1
    return n


@numba.njit(cache=True, nogil=True)
def _levels(fine, half, place, rows, columns, counts):  # type: ignore[no-untyped-def]
    """A and B to begin with: mean counts on the plateau and around the disk."""
    core, rim, in_core, in_rim = 0.0, 0.0, 0, 0
    for i in range(len(rows)):
        u, v = int((rows[i] - place[0] + half) * FINE + 0.5), int((columns[i] - place[1] + half) * FINE + 0.5)
        shape = fine[u, v] if 0 <= u < len(fine) and 0 <= v < len(fine) else 0.0
        if shape > 0.9:
            core, in_core = core + counts[i], in_core + 1
        elif shape < 0.02:
            rim, in_rim = rim + counts[i], in_rim + 1
    b = max(rim / max(in_rim, 1), 1e-3)
    return max(core / max(in_core, 1) - b, 1e-3), b


@numba.njit(cache=True, nogil=True)
def _score(a, b, y, x, counts, tables):  # type: ignore[no-untyped-def]
    """Fisher information (4, 4) of A, B, y, x and the gradient (4,) of the log likelihood."""
    fisher, score, jacobian = np.zeros((4, 4)), np.zeros(4), np.empty(4)
    last = tables.shape[1] - 1
    for i in range(len(y)):
        jacobian[:] = 0.0
        jacobian[1] = 1.0
        p, q = y[i] * FINE, x[i] * FINE
        if 0 <= p < last and 0 <= q < last:
            u, v = int(p), int(q)
            p, q = p - u, q - v
            w00, w01, w10, w11 = (1 - p) * (1 - q), (1 - p) * q, p * (1 - q), p * q
            for t in range(3):
                above = w00 * tables[t, u, v] + w01 * tables[t, u, v + 1]
                whole = above + w10 * tables[t, u + 1, v] + w11 * tables[t, u + 1, v + 1]
                jacobian[0 if t == 0 else t + 1] = whole if t == 0 else a * whole
        mean = max(a * jacobian[0] + b, 1e-9)
        for k in range(4):
            score[k] += jacobian[k] * (counts[i] - mean) / mean
            for m in range(4):
                fisher[k, m] += jacobian[k] * jacobian[m] / mean
    for k in range(4):
        fisher[k, k] *= 1 + 1e-12
    return fisher, score


@dataclass(frozen=True)
class FindDisks:
    """A fold that finds the disks of every frame: arrays ``disk_frame``, ``disk_position``, ``disk_covariance``,
    ``disk_height``, ``disk_height_sigma``, ``disk_significance`` as in :class:`Disks`, ordered by position number."""

    template: Template
    threshold: float = 6.0
    most: int = 100

    def init(self, scan: tuple[int, int], shape: tuple[int, int]) -> list[Disks]:
        return []

    def step(self, part: list[Disks], block: Block, first: int) -> list[Disks]:
        for i in range(block.frames):
            part.append(find_disks(block.frame(i), self.template, self.threshold, self.most, frame=first + i))
        return part

    def merge(self, one: list[Disks], other: list[Disks]) -> list[Disks]:
        return one + other

    def finish(self, part: list[Disks]) -> Maps:
        disks = Disks.join(part)
        return {f"disk_{name}": getattr(disks, name) for name in Disks.__dataclass_fields__}
