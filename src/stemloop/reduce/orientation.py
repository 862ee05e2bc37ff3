"""Orientation of a crystal from its spot pattern: a library of kinematic templates, then maximum likelihood.

Templates are compared in polar coordinates, where a turn about the beam is a shift and all turns are tried at once by
Fourier transforms (C. Ophus et al., Microscopy and Microanalysis 28 (2022) 390, doi:10.1017/S1431927622000101; the
templates of E. F. Rauch and L. Dupuy, Archives of Metallurgy and Materials 50 (2005) 87). The best few are refined on
the counts themselves by Fisher scoring of a Poisson likelihood, which gives the deviation of the three angles.

A spot g has the intensity ``|F_g|^2 exp(-(pi t s)^2 / 3)``: the kinematic ``sinc^2(pi t s)`` of a crystal of thickness
t at the excitation error s, as the Gaussian of the same curvature (L. Reimer and H. Kohl, *Transmission Electron
Microscopy* (2008), doi:10.1007/978-0-387-40093-8, chapter 7). Dynamical scattering is not in it. Above some nanometres
spots have other strengths than the model says: ``misfit`` is then above 1, and since a wrong strength is wrong on all
pixels of its spot together, deviations are widened and likelihoods tempered by its excess on the spots times their
pixels.

Laboratory axes: x right (columns), y down (rows), z along the beam. A rotation matrix takes crystal to laboratory axes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from stemloop.core import units
from stemloop.core.errors import InputError
from stemloop.core.protocols import Block, Camera
from stemloop.reduce.disks import FINE, Template
from stemloop.reduce.engine import Maps, Rows

Array = NDArray[np.float64]

#: Azimuths of the polar transform.
TURNS = 240
#: Spots whose Gaussian of the excitation error is below this are left out.
_FAINT = 1e-4
#: Small turns about the laboratory's axes, for derivatives.
_NUDGE_RAD = 5e-4
_NUDGES = Rotation.from_rotvec(_NUDGE_RAD * np.eye(3)).as_matrix()


@dataclass(frozen=True)
class Reflections:
    """Reciprocal lattice points of a crystal: ``index`` (n, 3) hkl, ``g`` (n, 3) [1/m] in crystal axes (the Cartesian
    axes of the cell), ``strength`` (n,) |F|^2 relative to the strongest; ``basis`` (3, 3) rows a*, b*, c* [1/m]."""

    index: NDArray[np.int64]
    g: Array
    strength: Array
    basis: Array

    @functools.cached_property
    def symmetry(self) -> Array:
        """(m, 3, 3): the rotations that take the reflections with their strengths into themselves (the proper part of
        the Laue class; kinematic patterns cannot tell a crystal from its inverse)."""
        length = np.linalg.norm(self.basis, axis=1)
        near = np.array(list(itertools.product(range(-2, 3), repeat=3))) @ self.basis
        size = np.linalg.norm(near, axis=1)
        images = [near[np.abs(size - n) < 1e-6 * n] for n in length]
        inverse, gram = np.linalg.inv(self.basis), self.basis @ self.basis.T
        found = []
        for a, b, c in itertools.product(*images):
            image = np.stack([a, b, c])
            if np.abs(image @ image.T - gram).max() > 1e-6 * gram.max():
                continue
            turn = (inverse @ image).T
            if np.linalg.det(turn) > 0 and self._kept_by(turn):
                found.append(turn)
        return np.stack(found)

    def _kept_by(self, turn: Array) -> bool:
        index = np.rint(self.g @ turn.T @ np.linalg.inv(self.basis)).astype(np.int64)
        known = {tuple(hkl): strength for hkl, strength in zip(self.index.tolist(), self.strength, strict=True)}
        inside = np.linalg.norm(self.g, axis=1) < 0.999 * np.linalg.norm(self.g, axis=1).max()
        return all(
            abs(known.get(tuple(hkl), 0.0) - strength) < 1e-6
            for hkl, strength in zip(index[inside].tolist(), self.strength[inside], strict=True)
        )


def reflections(
    cell_m: NDArray[Any],
    symbols: Sequence[str],
    fractions: NDArray[Any],
    reach_per_m: float,
    factor: Callable[[str, Array], Array] | None = None,
) -> Reflections:
    """The reflections of a crystal up to ``|g| = reach_per_m`` [1/m] with ``F = sum f_j(g) exp(2 pi i g r_j)``.

    cell_m : (3, 3) rows a, b, c [m]. symbols, fractions : (n,) elements and (n, 3) fractional coordinates.
    factor : (symbol, g [1/m]) -> electron scattering factor; default that of I. Lobato and D. Van Dyck, Acta Cryst. A70
    (2014) 636, doi:10.1107/S205327331401643X. Those below 1e-5 of the strongest (extinct) are left out.
    """
    cell = np.asarray(cell_m, dtype=np.float64)
    if cell.shape != (3, 3) or abs(np.linalg.det(cell)) == 0 or len(symbols) != len(fractions):
        raise InputError("a crystal has three cell vectors that span space, and a fraction (3) for each symbol.")
    basis = np.asarray(np.linalg.inv(cell).T, dtype=np.float64)
    most = [int(np.ceil(reach_per_m * np.linalg.norm(row))) for row in cell]
    index = np.array(list(itertools.product(*(range(-m, m + 1) for m in most))))
    g = index @ basis
    size = np.linalg.norm(g, axis=1)
    keep = (size > 0) & (size <= reach_per_m)
    index, g, size = index[keep], g[keep], size[keep]
    scattering = factor or _lobato()
    amplitude = np.zeros(len(g), dtype=np.complex128)
    for symbol, place in zip(symbols, np.asarray(fractions, np.float64), strict=True):
        amplitude += scattering(symbol, size) * np.exp(2j * np.pi * (index @ place))
    strength = np.abs(amplitude) ** 2
    if not strength.size or strength.max() == 0:
        raise InputError(f"no reflection lies within {reach_per_m:g} 1/m: reach further.")
    strength = strength / strength.max()
    seen = strength > 1e-5
    return Reflections(index[seen], g[seen], strength[seen], basis)


def _lobato() -> Callable[[str, Array], Array]:
    from abtem.parametrizations import LobatoParametrization

    table = LobatoParametrization()
    return lambda symbol, g: np.asarray(table.scattering_factor(symbol)((g * units.ANGSTROM_M) ** 2), dtype=np.float64)


@dataclass(frozen=True)
class Orientation:
    """One crystal's orientation.

    rotation : (3, 3) from crystal to laboratory axes, one of the equivalent ones. sigma_rad : (3,) deviations of small
    turns about the laboratory's x, y and z [rad] (the first two tilt the crystal, the third turns the pattern).
    score : correlation with the template that it was refined from (1: perfect). ambiguity : likelihood of the best
    other orientation that was refined, relative to this one (0: none comes near; 1: both explain it). Do not believe an
    orientation whose ambiguity is above about 0.1.
    misfit : Pearson's chi2 a degree of freedom of the refined model (NaN where nothing could be refined).
    """

    rotation: Array
    sigma_rad: Array
    score: float
    ambiguity: float
    misfit: float


@dataclass(frozen=True)
class Matcher:
    """Finds orientations of one crystal in spot patterns.

    crystal : its reflections. camera, energy_eV : of the patterns. template : the probe's image. thickness_m : of the
    crystal. spacing_rad : between the zone axes of the library (default 3 degrees). tries : candidates to refine.

    The library's spots are as wide in excitation error as its spacing needs, as those of a thinner crystal; a
    refinement begins there and ends with the crystal's own thickness.
    """

    crystal: Reflections
    camera: Camera
    energy_eV: float
    template: Template
    thickness_m: float
    spacing_rad: float = np.pi / 60
    tries: int = 8

    @property
    def _blunt_m(self) -> float:
        """Thickness [m] at which half a spacing's tilt, at 2/3 of the reach, moves a spot by one rms width."""
        reach = np.linalg.norm(self.crystal.g, axis=1).max() * 2 / 3
        return float(min(self.thickness_m, np.sqrt(1.5) / (np.pi * reach * self.spacing_rad / 2)))

    def spots(self, rotation: NDArray[Any], thickness_m: float | None = None) -> tuple[Array, Array]:
        """Places (n, 2) (row, col) [px] and strengths (n,) of the spots of a crystal turned by ``rotation``.

        ``s = -(g^2 + 2 g_z / lambda) / (2 |k + g|)`` with k along the beam.
        """
        wavelength = units.wavelength_m(self.energy_eV)
        g = self.crystal.g @ np.asarray(rotation).T
        out = np.sqrt(g[:, 0] ** 2 + g[:, 1] ** 2 + (1 / wavelength + g[:, 2]) ** 2)
        error = -(np.sum(g**2, axis=1) + 2 * g[:, 2] / wavelength) / (2 * out)
        damping = np.exp(-((np.pi * (thickness_m or self.thickness_m) * error) ** 2) / 3)
        seen = damping > _FAINT
        pixels = g[seen, 1::-1] * wavelength / self.camera.pixel_rad
        return pixels + np.array(self.camera.centre_px), self.crystal.strength[seen] * damping[seen]

    def image(self, rotation: NDArray[Any], thickness_m: float | None = None) -> Array:
        """(rows, columns): the spots' image; a spot of strength 1 has a plateau of 1. Without the direct beam."""
        places, strength = self.spots(rotation, thickness_m)
        image = np.zeros(self.camera.shape)
        _stamp(places, strength, self.template.fine, self.template.half, image)
        return image

    # ---------------------------------------------------------------------------------------------- the library

    @functools.cached_property
    def _axes(self) -> Array:
        """(n, 3): zone axes, evenly over the sphere (a Fibonacci spiral), one of each set of equivalent ones."""
        n = int(np.ceil(4 * np.pi / self.spacing_rad**2))
        z = 1 - (2 * np.arange(n) + 1) / n
        turn = np.arange(n) * np.pi * (3 - np.sqrt(5))
        axes = np.stack([np.sqrt(1 - z**2) * np.cos(turn), np.sqrt(1 - z**2) * np.sin(turn), z], axis=1)
        general = np.array([0.8, 0.55, 0.24])
        own = axes @ general
        others = np.stack([axes @ (turn.T @ general) for turn in self.crystal.symmetry])
        return axes[own >= others.max(axis=0) - self.spacing_rad / 2]

    @functools.cached_property
    def _rotations(self) -> Array:
        """(n, 3, 3): for each zone axis a rotation that puts it along the beam."""
        found = []
        for axis in self._axes:
            side = np.cross(axis, np.eye(3)[np.argmin(np.abs(axis))])
            side /= np.linalg.norm(side)
            found.append(np.stack([side, np.cross(axis, side), axis]))
        return np.stack(found)

    @functools.cached_property
    def _radii(self) -> Array:
        """Radii [px] of the polar transform: from outside the direct beam to the nearest edge of the frame."""
        (rows, columns), (y, x) = self.camera.shape, self.camera.centre_px
        edge = min(y, x, rows - 1 - y, columns - 1 - x)
        inner = 1.2 * self.template.half
        if edge < 2 * inner:
            raise InputError("the frame shows no more than the direct beam: orientations need diffracted spots.")
        return np.arange(inner, edge, max(1.0, self.template.half / 4))

    @functools.cached_property
    def _library(self) -> NDArray[np.complex64]:
        """(n, radii, TURNS/2): the templates' transforms along the azimuth, each of unit norm, without their mean."""
        width = self.template.half / 2
        radii, azimuth = self._radii[:, None, None], (np.arange(TURNS) * 2 * np.pi / TURNS)[None, :, None]
        library = np.empty((len(self._rotations), len(self._radii), TURNS // 2), dtype=np.complex64)
        for n, rotation in enumerate(self._rotations):
            places, strength = self.spots(rotation, self._blunt_m)
            y, x = (places - np.array(self.camera.centre_px)).T
            r, phi = np.hypot(y, x), np.arctan2(y, x)
            seen = (r > self._radii[0] - 2 * width) & (r < self._radii[-1] + 2 * width)
            r, phi, strength = r[seen], phi[seen], np.sqrt(strength[seen])
            across = radii**2 + r**2 - 2 * radii * r * np.cos(azimuth - phi)
            polar = (strength * np.exp(-across / (2 * width**2))).sum(axis=2) * np.sqrt(self._radii)[:, None]
            spectrum = np.fft.rfft(polar, axis=1)[:, 1 : TURNS // 2 + 1]
            norm = np.sqrt(np.sum(np.abs(spectrum) ** 2))
            library[n] = spectrum / norm if norm > 0 else 0
        return library

    def _polar(self, pattern: Array) -> NDArray[np.complex128]:
        """The pattern like a template."""
        smooth = np.sqrt(np.maximum(ndimage.gaussian_filter(pattern, self.template.half / 4), 0))
        azimuth = np.arange(TURNS) * 2 * np.pi / TURNS
        y = self.camera.centre_px[0] + self._radii[:, None] * np.sin(azimuth)
        x = self.camera.centre_px[1] + self._radii[:, None] * np.cos(azimuth)
        polar = ndimage.map_coordinates(smooth, [y, x], order=1) * np.sqrt(self._radii)[:, None]
        spectrum = np.fft.rfft(polar, axis=1)[:, 1 : TURNS // 2 + 1]
        norm = np.sqrt(np.sum(np.abs(spectrum) ** 2))
        return spectrum / norm if norm > 0 else spectrum

    # ------------------------------------------------------------------------------------------------- matching

    def misorientation(self, one: NDArray[Any], other: NDArray[Any]) -> float:
        """The smallest angle [rad] between two orientations, over the crystal's symmetry."""
        traces = np.einsum("ij,nkj,ik->n", np.asarray(one), self.crystal.symmetry, np.asarray(other))
        return float(np.arccos(np.clip((traces.max() - 1) / 2, -1, 1)))

    def candidates(self, pattern: NDArray[Any], most: int) -> list[tuple[float, Array]]:
        """The best (score, rotation), each more than 1.2 spacings from the better ones."""
        spectrum = self._polar(np.asarray(pattern, dtype=np.float64))
        product = np.einsum("nrk,rk->nk", self._library.conj(), spectrum)
        full = np.zeros((len(product), TURNS // 2 + 1), dtype=np.complex128)
        full[:, 1:] = product
        full[:, -1] /= 2
        score = np.fft.irfft(full, TURNS, axis=1) * TURNS / 2
        peak = (score > np.roll(score, 1, axis=1)) & (score >= np.roll(score, -1, axis=1))
        which, turns = np.nonzero(peak)
        order = np.argsort(-score[which, turns], kind="stable")[:400]
        found: list[tuple[float, Array]] = []
        for i in order:
            angle = turns[i] * 2 * np.pi / TURNS
            c, s = np.cos(angle), np.sin(angle)
            rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ self._rotations[which[i]]
            if all(self.misorientation(rotation, other) > 1.2 * self.spacing_rad for _, other in found):
                found.append((float(score[which[i], turns[i]]), rotation))
            if len(found) == most:
                break
        return found

    def match(self, pattern: NDArray[Any]) -> Orientation:
        """The orientation that explains one pattern (rows, columns) of counts best."""
        counts = np.asarray(pattern, dtype=np.float64)
        if counts.shape != tuple(self.camera.shape) or not np.isfinite(counts).all() or counts.min(initial=0) < 0:
            raise InputError(f"patterns are counts of {self.camera.shape} pixels, finite and not negative.")
        starts = self.candidates(counts, self.tries)
        fits = [(score, *self._refine(counts, rotation)) for score, rotation in starts if score > 0]
        fits = sorted((fit for fit in fits if np.isfinite(fit[-1])), key=lambda fit: fit[-1])
        if not fits:
            return Orientation(np.full((3, 3), np.nan), np.full(3, np.nan), 0.0, np.nan, np.nan)
        score, rotation, sigma, misfit, inflation, deviance = fits[0]
        others = [f[-1] for f in fits if self.misorientation(rotation, f[1]) > self.spacing_rad / 2]
        worse = (min(others) - deviance) / inflation if others else np.inf
        return Orientation(rotation, sigma, score, float(np.exp(-worse / 2)), misfit)

    def _refine(self, counts: Array, rotation: Array) -> tuple[Array, Array, float, float, float]:
        """Fisher scoring of the turn (3), the spots' height and an even background, outside the direct beam. Returns
        the rotation, its deviations, Pearson's chi2 a degree of freedom, what variances are multiplied with for it,
        and the deviance."""
        y, x = np.indices(counts.shape)
        use = np.hypot(y - self.camera.centre_px[0], x - self.camera.centre_px[1]) > self._radii[0]
        data = counts[use]
        b = max(float(np.median(data)), 1.0 / data.size, 0.2 * data.mean())
        a, sigma = -1.0, np.full(3, np.nan)
        for thickness, most in ((self._blunt_m, 8), (self.thickness_m, 20)):
            image = self.image(rotation, thickness)[use]
            if a < 0:
                a = max(float(image @ (data - b) / max(image @ image, 1e-300)), 1e-3)
            for iteration in range(most):
                slopes = []
                for nudge in _NUDGES:
                    forth, back = (self.image(turn @ rotation, thickness)[use] for turn in (nudge, nudge.T))
                    slopes.append((forth - back) * (a / (2 * _NUDGE_RAD)))
                mean = np.maximum(a * image + b, 1e-9)
                jacobian = np.stack([*slopes, image, np.ones_like(image)])
                scaled = jacobian / mean
                try:
                    covariance = np.linalg.inv(scaled @ jacobian.T)
                except np.linalg.LinAlgError:
                    return rotation, sigma, np.nan, np.nan, np.nan
                step = covariance @ (scaled @ (data - mean))
                size = np.abs(step[:3]).max()
                step *= min(1.0 if iteration < 10 else 0.5, 0.3 * self.spacing_rad / max(size, 1e-12))
                rotation = Rotation.from_rotvec(step[:3]).as_matrix() @ rotation
                a, b = max(a + step[3], 1e-3), max(b + step[4], 1.0 / data.size)
                image = self.image(rotation, thickness)[use]
                sigma = np.sqrt(np.maximum(np.diag(covariance)[:3], 0))
                if size < 0.02 * sigma.min() or size < 1e-6:
                    break
        mean = np.maximum(a * image + b, 1e-9)
        misfit = float(np.sum((data - mean) ** 2 / mean) / (data.size - 5))
        weight = (a * image) ** 2 / mean  # the spots, by what they tell
        among = float(weight @ ((data - mean) ** 2 / mean) / weight.sum())
        chance = np.sqrt(weight**2 @ (2 + 1 / mean)) / weight.sum()  # of a model that is right
        inflation = 1 + max(among - 1 - 3 * chance, 0.0) * np.pi * self.template.half**2
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(data > 0, data * np.log(data / mean), 0.0)
        return rotation, sigma * np.sqrt(inflation), misfit, inflation, float(2 * np.sum(logs - data + mean))


@numba.njit(cache=True, nogil=True)
def _stamp(places, strength, fine, half, image):  # type: ignore[no-untyped-def]
    """Add the probe's image, taken linearly from ``fine``, at each place."""
    last = len(fine) - 1
    for n in range(len(places)):
        y, x = places[n]
        for r in range(max(0, int(np.ceil(y - half))), min(image.shape[0], int(np.floor(y + half)) + 1)):
            p = (r - y + half) * FINE
            u = min(int(p), last - 1)
            for c in range(max(0, int(np.ceil(x - half))), min(image.shape[1], int(np.floor(x + half)) + 1)):
                q = (c - x + half) * FINE
                v = min(int(q), last - 1)
                above = (1 - q + v) * fine[u, v] + (q - v) * fine[u, v + 1]
                below = (1 - q + v) * fine[u + 1, v] + (q - v) * fine[u + 1, v + 1]
                image[r, c] += strength[n] * ((1 - p + u) * above + (p - u) * below)


@dataclass(frozen=True)
class OrientationMap:
    """A fold to ``orientation`` (scan rows, scan columns, 3, 3), ``orientation_sigma`` (..., 3) [rad],
    ``orientation_score``, ``orientation_ambiguity`` and ``orientation_misfit``: see :class:`Orientation`."""

    matcher: Matcher

    def init(self, scan: tuple[int, int], shape: tuple[int, int]) -> Rows:
        return Rows(scan)

    def step(self, part: Rows, block: Block, first: int) -> Rows:
        rows = np.empty((block.frames, 15))
        for i in range(block.frames):
            found = self.matcher.match(block.frame(i))
            rows[i, :9], rows[i, 9:12] = found.rotation.ravel(), found.sigma_rad
            rows[i, 12:] = found.score, found.ambiguity, found.misfit
        return part.add(first, rows)

    def merge(self, one: Rows, other: Rows) -> Rows:
        return one.join(other)

    def finish(self, part: Rows) -> Maps:
        table = part.table(15)
        return {
            "orientation": table[..., :9].reshape(*part.scan, 3, 3),
            "orientation_sigma": table[..., 9:12],
            "orientation_score": table[..., 12],
            "orientation_ambiguity": table[..., 13],
            "orientation_misfit": table[..., 14],
        }
