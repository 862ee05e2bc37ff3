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

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from stemloop.core.errors import InputError
from stemloop.core.protocols import Block
from stemloop.reduce.detectors import disk_area
from stemloop.reduce.engine import Maps

Array = NDArray[np.float64]

#: Samples a pixel at which a template is kept; between them it is interpolated by cubic splines.
FINE = 8


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
    def _spline(self) -> Array:
        return np.asarray(ndimage.spline_filter(self.fine, order=3))

    def at(self, y: Array, x: Array) -> Array:
        """Intensity in pixels whose middles lie (``y``, ``x``) [px] from the disk's centre."""
        places = [(y + self.half) * FINE, (x + self.half) * FINE]
        return np.asarray(ndimage.map_coordinates(self._spline, places, order=3, prefilter=False, mode="constant"))

    @functools.cached_property
    def matched(self) -> Array:
        """(2 half + 3, 2 half + 3): the filter of the search, with sum zero."""
        reach = np.arange(-self.half - 1, self.half + 2.0)
        y, x = np.meshgrid(reach, reach, indexing="ij")
        image = self.at(y, x)
        near = np.hypot(y, x) <= self.half + 1
        return np.asarray(np.where(near, image - image[near].mean(), 0.0))


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
    value, covariance, good = _fit(image, template, places)
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
    matched = template.matched
    if min(image.shape) <= len(matched):
        raise InputError(f"frames of {image.shape} are too small for a probe of {len(matched)} pixels.")
    size = [n + len(matched) for n in image.shape]
    spectrum = np.fft.rfft2(image, size)
    edge = len(matched) // 2
    keep = tuple(slice(edge, edge + n) for n in image.shape)
    found, variance = (
        np.fft.irfft2(spectrum * np.fft.rfft2(kernel[::-1, ::-1], size), size)[keep]
        for kernel in (matched, matched**2)
    )
    # where next to nothing was counted, one count spread over the filter is the least doubt
    ratio = found / np.sqrt(np.maximum(variance, np.sum(matched**2) / matched.size + 1e-12))
    local = ndimage.maximum_filter(found, size=2 * (template.half // 2) + 1) == found
    rows, columns = np.nonzero(local & (ratio > threshold))
    order = np.argsort(-ratio[rows, columns], kind="stable")
    chosen: list[int] = []
    for i in order:
        if all(np.hypot(rows[i] - rows[j], columns[i] - columns[j]) > template.half for j in chosen):
            chosen.append(int(i))
        if len(chosen) == most:
            break
    return np.column_stack([rows[chosen], columns[chosen]]).astype(np.float64), ratio[rows[chosen], columns[chosen]]


def _fit(image: Array, template: Template, places: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Fisher scoring of A, B, y, x for all disks of a frame at once; each in a window around its start.

    Pixels nearer to another disk's start are left out. Returns values (n, 4), covariances (n, 4, 4) and which
    converged.
    """
    n, reach = len(places), template.half + 1
    near = np.arange(-reach, reach + 1)
    middle = np.rint(places).astype(int)
    rows, columns = middle[:, 0, None, None] + near[:, None], middle[:, 1, None, None] + near[None, :]
    rows, columns = np.broadcast_arrays(rows, columns)
    inside = (rows >= 0) & (rows < image.shape[0]) & (columns >= 0) & (columns < image.shape[1])
    far = np.hypot(rows - places[:, 0, None, None], columns - places[:, 1, None, None])
    inside &= far <= reach
    for other in places:
        inside &= (far <= np.hypot(rows - other[0], columns - other[1])) | (
            np.hypot(rows - other[0], columns - other[1]) > reach
        )
    counts = image[np.clip(rows, 0, image.shape[0] - 1), np.clip(columns, 0, image.shape[1] - 1)]
    weight = inside.reshape(n, -1).astype(np.float64)
    counts, rows, columns = (a.reshape(n, -1) for a in (counts, rows, columns))

    value = np.empty((n, 4))
    shape = template.at(rows - places[:, :1], columns - places[:, 1:])
    core, rim = weight * (shape > 0.9), weight * (shape < 0.02)
    value[:, 1] = np.maximum((rim * counts).sum(1) / np.maximum(rim.sum(1), 1), 1e-3)
    value[:, 0] = np.maximum((core * counts).sum(1) / np.maximum(core.sum(1), 1) - value[:, 1], 1e-3)
    value[:, 2:] = places
    converged = np.zeros(n, dtype=bool)
    fisher = np.zeros((n, 4, 4))
    for _ in range(30):
        y, x = rows - value[:, 2:3], columns - value[:, 3:]
        shape = template.at(y, x)
        h = 0.5 / FINE
        slope_y = (template.at(y - h, x) - template.at(y + h, x)) / (2 * h)
        slope_x = (template.at(y, x - h) - template.at(y, x + h)) / (2 * h)
        a, b = value[:, :1], value[:, 1:2]
        mean = np.maximum(a * shape + b, 1e-9)
        jacobian = np.stack([shape, np.ones_like(shape), a * slope_y, a * slope_x], axis=2)
        scaled = jacobian * (weight / mean)[:, :, None]
        fisher = np.einsum("npi,npj->nij", scaled, jacobian)
        score = np.einsum("npi,np->ni", scaled, counts - mean)
        fisher += np.eye(4) * 1e-12 * np.trace(fisher, axis1=1, axis2=2)[:, None, None]
        step = np.linalg.solve(fisher, score[:, :, None])[:, :, 0]
        step[:, 2:] = np.clip(step[:, 2:], -0.5, 0.5)
        step[converged] = 0.0
        value = value + step
        value[:, 0] = np.maximum(value[:, 0], 1e-6)
        # a background never falls to zero: one count in the window is the least that could be known of it
        value[:, 1] = np.maximum(value[:, 1], 1.0 / np.maximum(weight.sum(1), 1))
        converged |= np.abs(step[:, 2:]).max(axis=1) < 1e-4
        if converged.all():
            break
    return value, np.linalg.inv(fisher), converged


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
