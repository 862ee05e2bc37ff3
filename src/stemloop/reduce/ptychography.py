"""Single-sideband ptychography of a weak phase object.

J. M. Rodenburg, B. C. McCallum and P. D. Nellist, Ultramicroscopy 48 (1993) 304, doi:10.1016/0304-3991(93)90105-7;
T. J. Pennycook et al., Ultramicroscopy 151 (2015) 160, doi:10.1016/j.ultramic.2014.09.013.

For a transmission ``1 + i phi(r)`` and a probe with the aperture function ``A(K) exp(-i chi(K))`` the intensity at
detector frequency K and probe position R is, to first order and in units of the disk's intensity,
``|A|^2 + sum_Q i phi_Q exp(2 pi i Q R) [A*(K) A(K - Q) - A(K) A*(K + Q)]``. So the Fourier transform over R is
``i phi_Q`` times the bracket. Without aberrations the bracket is +1 or -1 where two of the three disks overlap and
zero where all three do. ``phi_Q`` is the least-squares estimate over the pixels K in double overlap.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from stemloop.core import units
from stemloop.core.errors import InputError
from stemloop.core.protocols import Block, Camera
from stemloop.reduce.engine import Maps, Rows

Array = NDArray[np.float64]

#: The bright disk is kept in at most about so many pixels across; finer ones are added up in squares.
ACROSS = 32


@dataclass(frozen=True)
class SingleSideband:
    """A fold to the phase: ``ssb_phase`` [rad] (mean zero), ``ssb_phase_sigma`` (one number for all positions: the
    counting noise) and ``ssb_transfer`` (scan rows, scan columns), the share of the disk in double overlap at each
    spatial frequency (in the order of ``numpy.fft.fftfreq``; zero where nothing is transferred).

    camera : calibrated, with the disk's centre. semiangle_rad : of the probe. step_m : of the scan, (y, x) or one
    number [m]. C10_m : defocus as in :class:`~stemloop.core.instruction.Optics` (``chi = pi/lambda C10 theta^2``).
    rotation_rad : of the camera against the scan, from :func:`stemloop.reduce.dpc.rotation`.

    Whole counts of the (binned) pixels of the bright disk are kept for every position, 4 bytes each: at most about
    3.3 kB a position. The scan must be complete when it is finished, else the phase is NaN.
    """

    camera: Camera
    semiangle_rad: float
    step_m: float | tuple[float, float]
    energy_eV: float
    C10_m: float = 0.0
    rotation_rad: float = 0.0

    @functools.cached_property
    def _pixels(self) -> tuple[NDArray[np.int64], Array, Array]:
        """(rows, columns): which of k pixels (squares) of the bright disk each pixel belongs to, k for none; and the
        angles (y, x) (k,) [rad] of their middles."""
        rows, columns = self.camera.shape
        radius = self.semiangle_rad / self.camera.pixel_rad
        if radius < 2:
            raise InputError(f"the bright disk has a radius of {radius:.1f} pixels; single sidebands need at least 2.")
        size = max(1, int(np.ceil(2 * radius / ACROSS)))
        first = [round(c) - size * int(np.ceil(radius / size)) - size // 2 for c in self.camera.centre_px]
        cell_y, cell_x = ((np.arange(n) - f) // size for n, f in zip((rows, columns), first, strict=True))
        y, x = (
            (f + c * size + (size - 1) / 2 - centre) * self.camera.pixel_rad
            for f, c, centre in zip(first, (cell_y, cell_x), self.camera.centre_px, strict=True)
        )
        cells = (cell_y - cell_y[0])[:, None] * columns + (cell_x - cell_x[0])[None, :]
        _, place, label, area = np.unique(cells, return_index=True, return_inverse=True, return_counts=True)
        at_y, at_x = y[place // columns], x[place % columns]
        inside = (np.hypot(at_y, at_x) <= self.semiangle_rad - 0.5 * size * self.camera.pixel_rad) & (
            area == size * size
        )
        k = int(inside.sum())
        number = np.where(inside, np.cumsum(inside) - 1, k)
        return number[label].reshape(rows, columns), at_y[inside], at_x[inside]

    def init(self, scan: tuple[int, int], shape: tuple[int, int]) -> Rows:
        if tuple(shape) != tuple(self.camera.shape):
            raise InputError(f"the camera has {self.camera.shape} pixels, the frames {tuple(shape)}.")
        return Rows(scan)

    def step(self, part: Rows, block: Block, first: int) -> Rows:
        labels, y, _ = self._pixels
        sums = np.zeros((block.frames, len(y) + 1), dtype=np.uint32)
        for i in range(block.frames):
            _add_up(block.frame(i), labels, sums[i])
        return part.add(first, sums[:, :-1])

    def merge(self, one: Rows, other: Rows) -> Rows:
        return one.join(other)

    def finish(self, part: Rows) -> Maps:
        _, y, x = self._pixels
        counts = part.table(len(y))
        phase, sigma, transfer = side_bands(
            counts, y, x, self.semiangle_rad, self.step_m, self.energy_eV, self.C10_m, self.rotation_rad
        )
        return {"ssb_phase": phase, "ssb_phase_sigma": np.array(sigma), "ssb_transfer": transfer}


@numba.njit(cache=True, nogil=True)
def _add_up(frame, labels, sums):  # type: ignore[no-untyped-def]
    for r in range(frame.shape[0]):
        for c in range(frame.shape[1]):
            sums[labels[r, c]] += frame[r, c]


def side_bands(
    counts: Array,
    angle_y: Array,
    angle_x: Array,
    semiangle_rad: float,
    step_m: float | tuple[float, float],
    energy_eV: float,
    C10_m: float = 0.0,
    rotation_rad: float = 0.0,
) -> tuple[Array, float, Array]:
    """Phase map [rad], its deviation, and the transfer, from ``counts`` (scan rows, scan columns, k) of k pixels of
    the bright disk at angles (``angle_y``, ``angle_x``) [rad]; see :class:`SingleSideband` for the rest.

    With I the mean counts of a pixel and N positions the noise of a Fourier component is ``I N`` and
    ``var phi = sum_Q 1/(I N sum_K |bracket|^2)`` over the transferred Q.
    """
    rows, columns, k = counts.shape
    steps = (step_m, step_m) if isinstance(step_m, (int, float)) else step_m
    wavelength = units.wavelength_m(energy_eV)
    if not (min(steps) > 0 and semiangle_rad > 0 and k > 0):
        raise InputError("single sidebands need a scan step, a semiangle above zero, and pixels of the bright disk.")
    mean = float(np.mean(counts))
    if not mean > 0:  # nothing counted, or positions are missing
        nothing = np.full((rows, columns), np.nan)
        return nothing, float("nan"), np.zeros((rows, columns))
    c, s = np.cos(rotation_rad), np.sin(rotation_rad)
    ky, kx = (c * angle_y - s * angle_x) / wavelength, (c * angle_x + s * angle_y) / wavelength
    cut, curve = semiangle_rad / wavelength, np.pi * C10_m * wavelength

    spectrum = np.empty((k, rows * columns), dtype=np.complex128)
    for i in range(k):
        spectrum[i] = np.fft.fft2(counts[..., i]).ravel() / (mean * rows * columns)
    qy = np.repeat(np.fft.fftfreq(rows, steps[0]), columns)
    qx = np.tile(np.fft.fftfreq(columns, steps[1]), rows)
    middle = np.exp(-1j * curve * (ky**2 + kx**2))
    found = np.zeros(rows * columns, dtype=np.complex128)
    weight = np.zeros(rows * columns)
    wanted = np.flatnonzero((np.hypot(qy, qx) < 2 * cut) & (np.hypot(qy, qx) > 0))
    for q in np.array_split(wanted, max(1, len(wanted) * k // 2**20)):
        bands = []
        for sign in (-1, 1):
            y, x = ky[:, None] + sign * qy[q], kx[:, None] + sign * qx[q]
            square = y**2 + x**2
            bands.append(np.where(square <= cut**2, np.exp(-1j * curve * square), 0.0))
        double = (np.abs(bands[0]) > 0) ^ (np.abs(bands[1]) > 0)
        bracket = 1j * double * (middle.conj()[:, None] * bands[0] - middle[:, None] * bands[1].conj())
        found[q] = (bracket.conj() * spectrum[:, q]).sum(axis=0)
        weight[q] = (np.abs(bracket) ** 2).sum(axis=0)
    used = weight > 0
    found[used] /= weight[used]
    phase = np.fft.ifft2(found.reshape(rows, columns)).real * rows * columns
    sigma = float(np.sqrt(np.sum(1.0 / weight[used]) / (mean * rows * columns)))
    return np.asarray(phase), sigma, (weight / k).reshape(rows, columns)
