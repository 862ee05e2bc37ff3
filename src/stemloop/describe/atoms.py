"""From an image to its atom columns: found by significance, refined by Gaussians, told apart by brightness.

The image says everything that is needed. Its power spectrum gives the scale, its highest frequencies (where a probe of
any real microscope transfers nothing) give the noise, and the noise decides what is a column.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage, stats
from scipy.spatial import cKDTree

from stemloop.core.errors import InputError
from stemloop.core.structure import Columns
from stemloop.describe import gaussians
from stemloop.describe.sites import expected, presence

Floats = NDArray[np.float64]

#: Standard deviation [nm] of a column's image under a sub-angstrom probe; used only where the image shows no period.
_COLUMN_SIGMA_NM = 0.045
#: Spread of a column's log-width around the median of all (a prior: it decides only where noise leaves width open).
_LOG_WIDTH_SPREAD = 0.07
#: A peak under this part of the bright columns' amplitude is a tail of the probe or a wave of the background.
_LEAST_AMPLITUDE = 0.1
_SMALLEST_PX = 16
_TILE = 512
_STEPS = 8


class _Noise(NamedTuple):
    """Variance of the noise, ``gain * intensity + floor``."""

    gain: float
    floor: float

    def variance(self, intensity: Floats) -> Floats:
        mean = self.gain * float(intensity.mean()) + self.floor
        return np.maximum(self.gain * intensity + self.floor, 0.05 * mean)


class _Prior(NamedTuple):
    """What is known of the parameters before the fit: Gaussians of ``middle`` (n, 4) and ``precision`` (n, 4)."""

    middle: Floats
    precision: Floats

    def cost(self, columns: Floats) -> float:
        """Twice the negative logarithm of its density, but for a constant."""
        return float((self.precision * (columns - self.middle) ** 2).sum())


class _Fit(NamedTuple):
    """Fitted Gaussians ``A exp(-r^2 / 2 w^2)``: columns of ``value`` and ``sigma`` (n, 4) are y, x, A, ln w."""

    value: Floats
    sigma: Floats


def find_columns(image: NDArray[Any], pixel_size_nm: float | None = None) -> Columns:
    """Find the atom columns of a HAADF image and measure where they are.

    A column is a local maximum of the matched-filtered image (blind to constants and slopes) that noise alone would
    make about once in an image, and whose fitted amplitude is more than four of its deviations. All columns are then
    fitted together, each a Gaussian, on a smooth background, weighted by the noise (Levenberg-Marquardt, the steps by
    conjugate gradients), so that overlapping neighbours do not pull at each other.

    Parameters
    ----------
    image : (rows, columns) array of finite numbers, at least 16 x 16, bright columns on dark. Meant for 8 to 40 pm a
        pixel; a column's Gaussian should be at least 0.9 px wide (1 sigma).
    pixel_size_nm : size of a pixel [nm]; only needed where the columns have no period (single atoms on a support).

    Returns
    -------
    Columns : positions (row, col) [px] with 1-sigma deviations from the fit's covariance (times the root of the
        reduced chi-square where that is above one), amplitude and background [grey levels], Gaussian width [px], the
        probability that the column is there, and the sublattice by a mixture of Gaussians of the amplitudes (0 is the
        brightest; one sublattice where the data say so). ``table()`` gives all of it by name. Where the columns around
        expect one that is not significant by itself, the image is asked there: it is a column or a vacant place, by
        Bayes' rule from its amplitude. No column at all is a valid answer. Columns cut by the border (nearer than one
        width) are left out.

    Raises
    ------
    InputError : not two-dimensional, too small, not finite, or constant.

    Notes
    -----
    Precision: the deviation of a Gaussian's centre by counting noise is w / sqrt(N) for N counts in the column on no
    background (the Cramer-Rao bound; A. J. den Dekker et al., Ultramicroscopy 104 (2005) 83,
    doi:10.1016/j.ultramic.2005.03.001).
    """
    pixels = _checked(image)
    noise = _noise(pixels)
    width = _blob_width(pixels, noise, pixel_size_nm)
    excess, value, mesh = 1.0, np.zeros((0, 4)), np.full((2, 2), np.percentile(pixels[::4, ::4], 10))
    for steps in (3, _STEPS):
        soft = gaussians.smooth(pixels, 0.5 * width)
        variance = noise.variance(soft)
        around = noise.variance(gaussians.smooth(pixels, 2 * width))  # a peak is judged by the noise without it
        start = _start(soft, _peaks(pixels, around, width, excess), width, value)
        if len(start) == 0:
            return _columns(start, start)
        prior = _prior(start)
        model = _fit(pixels, variance, start, mesh, width, steps, prior)
        fit = _judged(model, variance, pixels, prior, draws=0)
        value, mesh = fit.value[_believable(fit, width, pixels.shape)], model.mesh
        if len(value) == 0:
            return _columns(value, value)
        width = float(np.exp(np.median(value[:, 3])))
        excess = _unexplained(pixels - model.image, variance, width)
    return _finished(pixels, noise, value, mesh, width)


def _finished(pixels: Floats, noise: _Noise, value: Floats, mesh: Floats, width: float) -> Columns:
    """The last fit: with the columns that the lattice expects and that are there, weighted by the model's noise."""
    model = _Model(value, _remeshed(mesh, _nodes(pixels.shape, width)), pixels.shape, width)
    variance = _doubted(pixels - model.image, noise.variance(model.image), width)
    sites = expected(value[:, :2], pixels.shape, width)
    amplitude, sigma = _amplitudes(pixels - model.image, 1 / variance, sites.position, width)
    share = min(0.99, max(0.5, 1 - len(amplitude) / len(value)))
    there = presence(amplitude, sigma, value[:, 2], share) > 0.5 if len(amplitude) else np.zeros(0, bool)
    more = np.column_stack([sites.position, amplitude, np.full(len(amplitude), np.log(width))])[there]
    start = np.concatenate([value, more])
    prior = _prior(start, len(more), sites.spread)
    model = _fit(pixels, variance, start, mesh, width, _STEPS, prior)
    fit = _judged(model, variance, pixels, prior, draws=2)
    chance = presence(fit.value[:, 2], fit.sigma[:, 2], fit.value[: len(value), 2], share)
    guided = np.arange(len(start)) >= len(value)
    inside = ((fit.value[:, :2] >= width) & (fit.value[:, :2] <= np.array(pixels.shape) - 1 - width)).all(axis=1)
    good = _believable(fit, width, pixels.shape, guided) & (chance > 0.5) & inside
    vacant = np.concatenate([sites.position[~there], more[guided[len(value) :] & ~good[len(value) :], :2]])
    return _columns(fit.value[good], fit.sigma[good], model.background(fit.value[good]), chance[good], vacant)


def _amplitudes(residual: Floats, weight: Floats, position: Floats, width: float) -> tuple[Floats, Floats]:
    """What a column of ``width`` at each of ``position`` (n, 2) would explain of the residual, and its deviation."""
    if len(position) == 0:
        return np.zeros(0), np.zeros(0)
    columns = np.column_stack([position, np.ones(len(position)), np.full(len(position), np.log(width))])
    reach = int(np.ceil(3 * width))
    information = gaussians.normal(columns, weight, reach)[:, 2, 2]
    return gaussians.gather(columns, weight * residual, reach)[:, 2] / information, information**-0.5


def _checked(image: NDArray[Any]) -> Floats:
    pixels = np.asarray(image)
    if pixels.ndim != 2 or min(pixels.shape) < _SMALLEST_PX:
        raise InputError(
            f"atom columns are found in an image (rows, columns) of at least {_SMALLEST_PX} x {_SMALLEST_PX} px; "
            f"got the shape {pixels.shape}."
        )
    if pixels.dtype.kind not in "biuf":
        raise InputError(f"the image holds {pixels.dtype}; give real numbers.")
    pixels = pixels.astype(np.float64)
    bad = int(np.count_nonzero(~np.isfinite(pixels)))
    if bad:
        raise InputError(f"{bad} of the image's {pixels.size} pixels are not finite; fill or crop them.")
    if np.ptp(pixels) == 0:
        raise InputError(f"all pixels of the image are {pixels.flat[0]:g}: there is nothing to find.")
    return pixels


def _frequencies(shape: tuple[int, ...]) -> Floats:
    """Length of the spatial frequency [1/px] of each element of ``fft2``."""
    return np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1])[None, :])


def _noise(pixels: Floats) -> _Noise:
    """White noise from the spectrum's corners (above 0.5 / px), its variance as a line in the local intensity.

    What passes the corners has, at each pixel, the variance of the noise averaged with the squared filter; so it is
    compared with the intensity averaged likewise.
    """
    tiles = list(_tiles(pixels))
    tiles = tiles[:: -(-len(tiles) // 4)]
    corner = _frequencies(tiles[0].shape) > 0.5
    kernel = fft.ifft2(corner).real ** 2
    half = tiles[0].shape[1] // 2 + 1
    passed, averaging = corner[:, :half], fft.rfft2(kernel / kernel.sum())
    spectra = [fft.rfft2(tile) for tile in tiles]
    square = np.array([fft.irfft2(f * passed, tiles[0].shape) ** 2 for f in spectra]).ravel() / corner.mean()
    local = np.array([fft.irfft2(f * averaging, tiles[0].shape) for f in spectra]).ravel()
    order = np.argsort(np.array([gaussians.smooth(tile, 2.0) for tile in tiles]), axis=None)
    bins = np.array_split(order, 16)
    x = np.array([local[b].mean() for b in bins])
    y = np.array([square[b].mean() for b in bins])
    least = (1e-4 * np.ptp(pixels)) ** 2
    if np.ptp(x) == 0:
        return _Noise(0.0, max(float(y.mean()), least))
    gain, floor = np.polyfit(x, y, 1, w=1 / np.maximum(y, least))
    if gain <= 0 or gain * x[0] + floor <= 0:
        gain, floor = 0.0, float(y.mean())
    return _Noise(float(gain), max(float(floor), least) if gain == 0 else float(floor) + least)


def _blob_width(pixels: Floats, noise: _Noise, pixel_size_nm: float | None) -> float:
    """A first width [px] of the columns: 1 / (2 pi) over the rms frequency of what stands out of the spectrum.

    Sharp peaks are judged against the median of their ring, so shapes and slopes of the specimen do not count. An
    image of isolated Gaussians, whose spectrum is exp(-(2 pi w f)^2), has the rms frequency 1 / (2 pi w).
    """
    tiles = list(_tiles(pixels))
    shape = tiles[0].shape
    window = np.outer(np.hanning(shape[0]), np.hanning(shape[1]))
    mean = [float((tile * window).sum() / window.sum()) for tile in tiles]
    power = np.mean([np.abs(fft.fft2((t - m) * window)) ** 2 for t, m in zip(tiles, mean, strict=True)], axis=0)
    white = float(np.mean([(noise.variance(tile) * window**2).sum() for tile in tiles]))
    frequency = _frequencies(shape)
    ring = np.round(frequency * min(shape)).astype(int)
    medians = np.asarray(ndimage.median(power, ring, np.arange(ring.max() + 1))) / np.log(2)
    seen = (frequency > 1 / 64) & (frequency < 0.45)
    chance = np.log(power.size / 0.01)  # noise alone passes it in one image of a hundred
    sharp = np.where(seen, np.maximum(power - chance * np.maximum(medians[ring], white), 0), 0)
    if sharp.any():
        return float(np.clip(np.sqrt(sharp.sum() / (sharp * frequency**2).sum()) / (2 * np.pi), 0.95, 12))
    if pixel_size_nm:
        return float(np.clip(_COLUMN_SIGMA_NM / pixel_size_nm, 0.95, 12))
    return 2.5


def _tiles(pixels: Floats) -> Iterator[Floats]:
    """The image in squares of at most 512 px a side whose spectra are averaged (P. D. Welch, IEEE Trans. Audio
    Electroacoust. 15 (1967) 70, doi:10.1109/TAU.1967.1161901); they overlap where the sides are no multiple."""
    side = [min(n, _TILE) for n in pixels.shape]
    starts = [np.linspace(0, n - m, -(-n // m)).astype(int) for n, m in zip(pixels.shape, side, strict=True)]
    for top, left in itertools.product(*starts):
        yield pixels[top : top + side[0], left : left + side[1]]


def _peaks(pixels: Floats, variance: Floats, width: float, excess: float) -> Floats:
    """(n, 2) maxima of the negative Laplacian of a Gaussian of ``width`` that noise would hardly make.

    The filter is blind to constants and slopes. ``excess`` is how much the image's own residual exceeds the noise.
    """
    response = gaussians.negative_laplacian(pixels, width)
    z = response / (excess * np.sqrt(_filtered_variance(variance, width)))
    threshold = float(stats.norm.isf(min(0.5, 4 * np.pi * width**2 / pixels.size)))
    size = 2 * max(1, round(width)) + 1
    top = (response == ndimage.maximum_filter(response, size, mode="nearest")) & (z > threshold)
    top[[0, -1], :] = top[:, [0, -1]] = False
    return np.argwhere(top).astype(np.float64)


def _filtered_variance(variance: Floats, width: float) -> Floats:
    """Variance of white noise after the Laplacian of a Gaussian."""
    reach = int(np.ceil(5 * width))
    delta = np.zeros((2 * reach + 1, 2 * reach + 1))
    delta[reach, reach] = 1.0
    kernel = ndimage.gaussian_laplace(delta, width)
    return gaussians.smooth(variance, width) * float((kernel**2).sum())


def _unexplained(residual: Floats, variance: Floats, width: float) -> float:
    """Robust ratio of the residual's matched-filter response to what white noise would give, at least 1."""
    z = gaussians.negative_laplacian(residual, width) / np.sqrt(_filtered_variance(variance, width))
    return max(1.0, 1.4826 * float(np.median(np.abs(z - np.median(z)))))


def _doubted(residual: Floats, variance: Floats, width: float) -> Floats:
    """The variance, raised to the residual's own where a first fit left more than noise (cut columns, odd shapes)."""
    ratio = gaussians.smooth(residual**2 / variance, width)
    chance = np.sqrt(2 / (4 * np.pi * width**2))
    return np.where(ratio > 1 + 3 * chance, variance * ratio, variance)


def _start(soft: Floats, peaks: Floats, width: float, known: Floats) -> Floats:
    """First parameters (n, 4) of the columns at ``peaks``; those that were fitted before go on from there."""
    low = ndimage.minimum_filter(soft, 2 * int(np.ceil(2 * width)) + 1)
    at = tuple(peaks.astype(int).T)
    height = np.maximum(soft[at] - low[at], 1e-9 * np.ptp(soft))
    start = np.column_stack([peaks, height, np.full(len(peaks), np.log(width))])
    if len(known):
        far, which = (np.asarray(v) for v in cKDTree(known[:, :2]).query(peaks))
        again = far < width
        start[again] = known[which[again]]
        start = start[
            np.sort(np.unique(np.where(again, which, len(known) + np.arange(len(peaks))), return_index=True)[1])
        ]
    return start


class _Model:
    """The image as a sum: a bilinear background on a coarse mesh and one Gaussian a column.

    The linear algebra of the fit is done without a matrix: :meth:`times` is J v, :meth:`transposed` is J^T u for the
    Jacobian J of the image by all parameters together, each column's four (y, x, A, ln w) and each mesh point's one.
    """

    def __init__(self, columns: Floats, mesh: Floats, shape: tuple[int, ...], width: float) -> None:
        self.shape, self.columns, self.mesh = shape, columns, mesh
        self.reach = max(2, int(np.ceil(3.5 * width)))
        alone = np.zeros_like(columns)
        alone[:, 2] = columns[:, 2]
        self.image = self._paint(alone, mesh)

    def _paint(self, steps: Floats, mesh: Floats) -> Floats:
        image = np.zeros(self.shape)
        gaussians.paint_mesh(mesh, image)
        gaussians.paint(self.columns, np.ascontiguousarray(steps), self.reach, image)
        return image

    def background(self, columns: Floats) -> Floats:
        """(n,) the mesh under each of ``columns``."""
        place = columns[:, :2] * (np.array(self.mesh.shape) - 1) / (np.array(self.shape) - 1)
        return np.asarray(ndimage.map_coordinates(self.mesh, place.T, order=1, mode="nearest"))

    def times(self, v: Floats) -> Floats:
        """J v, an image."""
        return self._paint(*self.split(v))

    def transposed(self, u: Floats) -> Floats:
        """J^T u of an image, a vector of parameters."""
        mesh = gaussians.gather_mesh(u, self.mesh.shape[0], self.mesh.shape[1], False)
        return np.concatenate([gaussians.gather(self.columns, u, self.reach).ravel(), mesh.ravel()])

    def split(self, v: Floats) -> tuple[Floats, Floats]:
        """A vector of parameters as (n, 4) of the columns and the mesh."""
        n = 4 * len(self.columns)
        return v[:n].reshape(-1, 4), v[n:].reshape(self.mesh.shape)

    def blocks(self, weight: Floats) -> tuple[Floats, Floats]:
        """Diagonal of J^T W J: (n, 4, 4) of the columns alone, and of each mesh point."""
        mesh = gaussians.gather_mesh(weight, self.mesh.shape[0], self.mesh.shape[1], True)
        return gaussians.normal(self.columns, weight, self.reach), mesh


class _Equations:
    """Damped normal equations of one Gauss-Newton step, solved by conjugate gradients."""

    def __init__(self, model: _Model, weight: Floats, prior: _Prior, damping: float) -> None:
        self.model, self.weight, self.precision, self.damping = model, weight, prior.precision, damping
        columns, mesh = model.blocks(weight)
        columns[:, range(4), range(4)] += self.precision
        self.diagonal = np.concatenate([np.diagonal(columns, axis1=1, axis2=2).ravel(), mesh.ravel()])
        scale = np.sqrt(np.diagonal(columns, axis1=1, axis2=2)) + 1e-150
        relative = columns / (scale[:, :, None] * scale[:, None, :]) + (damping + 1e-9) * np.eye(4)
        self.inverse = np.linalg.inv(relative) / (scale[:, :, None] * scale[:, None, :])
        self.mesh_inverse = 1 / np.maximum(mesh, 1e-9 * mesh.max())

    def _times(self, v: Floats) -> Floats:
        out = self.model.transposed(self.weight * self.model.times(v)) + self.damping * self.diagonal * v
        self.model.split(out)[0][:] += self.model.split(v)[0] * self.precision
        return out

    def _roughly(self, v: Floats) -> Floats:
        columns, mesh = self.model.split(v)
        return np.concatenate([(self.inverse @ columns[:, :, None]).ravel(), (self.mesh_inverse * mesh).ravel()])

    def solve(self, right: Floats, precision: float, most: int = 60) -> Floats:
        """Conjugate gradients, preconditioned by each column's own block, to a relative ``precision``."""
        x, r = np.zeros_like(right), right.copy()
        z = self._roughly(r)
        p, rz = z.copy(), float(r @ z)
        enough = rz * precision**2
        for _ in range(most):
            if rz <= enough or rz == 0:
                break
            q = self._times(p)
            step = rz / float(p @ q)
            x += step * p
            r -= step * q
            z = self._roughly(r)
            rz, old = float(r @ z), rz
            p = z + rz / old * p
        return x


def _nodes(shape: tuple[int, ...], width: float) -> tuple[int, int]:
    """Nodes of the background's mesh, eight widths apart."""
    return max(2, round(shape[0] / (8 * width)) + 1), max(2, round(shape[1] / (8 * width)) + 1)


def _remeshed(mesh: Floats, nodes: tuple[int, int]) -> Floats:
    """The mesh's interpolation at other nodes."""
    new = np.zeros(nodes)
    gaussians.paint_mesh(mesh, new)
    return new


def _prior(columns: Floats, guided: int = 0, spread: float = 1.0) -> _Prior:
    """Widths are alike; the last ``guided`` columns are near where they start, give or take ``spread`` [px]."""
    middle, precision = columns.copy(), np.zeros_like(columns)
    middle[:, 3] = np.median(columns[:, 3])
    precision[:, 3] = _LOG_WIDTH_SPREAD**-2
    if guided:
        precision[-guided:, :2] = spread**-2
    return _Prior(middle, precision)


def _fit(
    pixels: Floats, variance: Floats, start: Floats, mesh: Floats, width: float, steps: int, prior: _Prior
) -> _Model:
    """Fit all columns and the background together (Levenberg-Marquardt), from ``start`` and ``mesh``."""
    weight = 1 / variance
    model = _Model(start, _remeshed(mesh, _nodes(pixels.shape, width)), pixels.shape, width)
    damping = 1e-3
    for _ in range(steps):
        prior.middle[:, 3] = np.median(model.columns[:, 3])
        price = float((weight * (pixels - model.image) ** 2).sum()) + prior.cost(model.columns)
        slope = model.transposed(weight * (pixels - model.image))
        model.split(slope)[0][:] -= prior.precision * (model.columns - prior.middle)
        step, lift = model.split(_Equations(model, weight, prior, damping).solve(slope, 0.05))
        room = 0.5 * np.exp(model.columns[:, 3:4])
        step[:, :2] = step[:, :2].clip(-room, room)
        step[:, 3] = step[:, 3].clip(-0.3, 0.3)
        columns = model.columns + step
        columns[:, 2] = np.maximum(columns[:, 2], 0.02 * model.columns[:, 2])
        trial = _Model(columns, model.mesh + lift, pixels.shape, width)
        gain = price - float((weight * (pixels - trial.image) ** 2).sum()) - prior.cost(columns)
        if gain < 0:
            damping *= 20
            continue
        model, damping = trial, damping / 5
        if gain < 0.005 * len(start):
            break
    return model


def _judged(model: _Model, variance: Floats, pixels: Floats, prior: _Prior, draws: int) -> _Fit:
    """The model's columns with their deviations (see :func:`_deviations`)."""
    return _Fit(model.columns, _deviations(model, 1 / variance, pixels, prior, draws))


def _deviations(model: _Model, weight: Floats, pixels: Floats, prior: _Prior, draws: int) -> Floats:
    """(n, 4) 1-sigma deviations of the columns' parameters.

    Each column's own block of the normal matrix gives its deviations as if its neighbours were known. How much wider
    the neighbours make them is measured once for all: noise, drawn ``draws`` times (0: neighbours count as known) and
    sent through the full equations, spreads as their inverse.
    Where a column's window holds more than noise, its reduced chi-square widens it further.
    """
    equations = _Equations(model, weight, prior, 0.0)
    alone = np.sqrt(np.maximum(np.diagonal(equations.inverse, axis1=1, axis2=2), 0))
    rng = np.random.default_rng(0)
    spread = [np.ones_like(alone)]
    for _ in range(draws):
        right = model.transposed(np.sqrt(weight) * rng.standard_normal(pixels.shape))
        model.split(right)[0][:] += rng.standard_normal(alone.shape) * np.sqrt(prior.precision)
        spread.append(model.split(equations.solve(right, 0.05))[0] / alone)
    wider = np.maximum(np.sqrt(np.mean(np.square(spread[-draws:]), axis=(0, 1))), 1.0)
    chi2 = weight * (pixels - model.image) ** 2
    local, count = gaussians.core_mean(model.columns, chi2, 2 * np.exp(model.columns[:, 3]))
    few = np.sqrt(2 / np.maximum(count, 1))
    return alone * wider * np.sqrt(np.maximum(local / (1 + few), 1.0))[:, None]


def _believable(
    fit: _Fit, width: float, shape: tuple[int, ...], expected: NDArray[np.bool_] | bool = False
) -> NDArray[np.bool_]:
    """Which fits are columns: significant (if not ``expected``), not far too weak, wide or narrow, on the image, not
    doubled."""
    value, sigma = fit
    good = np.isfinite(value).all(axis=1) & np.isfinite(sigma).all(axis=1)
    good &= (value[:, 2] > 4 * sigma[:, 2]) | expected
    good &= (sigma[:, :2] < 0.5 * width).all(axis=1)
    good &= np.abs(value[:, 3] - np.log(width)) < np.log(2.2)
    good &= ((value[:, :2] >= -1) & (value[:, :2] <= shape)).all(axis=1)
    if good.any():
        good &= value[:, 2] > _LEAST_AMPLITUDE * float(np.percentile(value[good, 2], 75))
    index = np.flatnonzero(good)
    doubled = index[cKDTree(value[index, :2]).query_pairs(1.2 * width, output_type="ndarray")]
    weaker = np.where(value[doubled[:, 0], 2] < value[doubled[:, 1], 2], doubled[:, 0], doubled[:, 1])
    good[weaker] = False
    return good


def refine(image: NDArray[Any], position: Floats, width_px: float) -> tuple[Columns, NDArray[np.bool_]]:
    """Fit a Gaussian at each of the places that another finder gives, all of them together on a smooth background.

    Parameters
    ----------
    image : as of :func:`find_columns`. position : (n, 2) (row, col) [px]. width_px : about how wide a column is [px].

    Returns
    -------
    The columns, in the order of ``position``, and (n,) which of the fits are to be believed: not run away, not doubled,
    not far too weak, wide or narrow.
    """
    pixels = _checked(image)
    noise = _noise(pixels)
    soft = gaussians.smooth(pixels, 0.5 * width_px)
    start = _start(soft, np.asarray(position, dtype=np.float64), width_px, np.zeros((0, 4)))
    if len(start) == 0:
        return _columns(start, start), np.zeros(0, bool)
    prior = _prior(start)
    mesh = np.full((2, 2), np.percentile(pixels[::4, ::4], 10))
    model = _fit(pixels, noise.variance(soft), start, mesh, width_px, _STEPS, prior)
    variance = _doubted(pixels - model.image, noise.variance(model.image), width_px)
    model = _fit(pixels, variance, model.columns, model.mesh, width_px, _STEPS, prior)
    fit = _judged(model, variance, pixels, prior, draws=2)
    near = np.hypot(*(fit.value[:, :2] - start[:, :2]).T) < 1.5 * width_px
    good = _believable(fit, width_px, pixels.shape, expected=True) & near
    return _columns(fit.value, fit.sigma, model.background(fit.value)), good


def _columns(
    value: Floats, sigma: Floats, background: Floats | None = None, chance: Floats | None = None, vacant: Any = ()
) -> Columns:
    return Columns(
        value[:, :2],
        sigma[:, :2],
        value[:, 2],
        np.exp(value[:, 3]),
        sublattices(value[:, 2]),
        np.zeros(len(value)) if background is None else background,
        np.zeros(len(value)) if chance is None else chance,
        np.asarray(vacant, dtype=np.float64).reshape(-1, 2),
    )


def sublattices(amplitude: Floats, most: int = 3) -> NDArray[np.int64]:
    """Sort columns into classes of brightness, 0 the brightest.

    One-dimensional mixtures of 1 to ``most`` Gaussians are fitted by expectation maximisation; the Bayesian
    information criterion chooses the number (G. Schwarz, Ann. Statist. 6 (1978) 461, doi:10.1214/aos/1176344136).
    Classes must also be apart (Ashman's D above 2: K. M. Ashman et al., Astron. J. 108 (1994) 2348,
    doi:10.1086/117248) and each hold a twentieth of the columns, so that a slope of thickness makes no sublattice.

    Parameters
    ----------
    amplitude : (n,) brightness, any unit.
    most : largest number of classes.

    Returns
    -------
    (n,) class of each column.

    >>> sublattices(np.array([1.0, 9.1, 1.1, 8.9, 0.9, 9.0, 1.05, 9.05] * 4))[:4]
    array([1, 0, 1, 0])
    """
    n = len(amplitude)
    chosen = np.zeros(n, dtype=np.int64)
    if n < 8 or np.ptp(amplitude) == 0:
        return chosen
    best = -2 * float(stats.norm.logpdf(amplitude, amplitude.mean(), amplitude.std()).sum()) + 2 * np.log(n)
    for k in range(2, most + 1):
        share, mean, spread, log_likelihood, member = _mixture(amplitude, k)
        bic = -2 * log_likelihood + (3 * k - 1) * np.log(n)
        order = np.argsort(-mean)
        gap = -np.diff(mean[order])
        apart = np.sqrt(2) * gap / np.hypot(spread[order][1:], spread[order][:-1])
        if bic < best - 10 and apart.min() > 2 and share.min() > 0.05:
            best, chosen = bic, np.argsort(order)[member].astype(np.int64)
    return chosen


def _mixture(x: Floats, k: int) -> tuple[Floats, Floats, Floats, float, NDArray[np.int64]]:
    """Shares, means, deviations, log-likelihood and most likely class of a mixture of ``k`` Gaussians."""
    mean = np.percentile(x, 100 * (np.arange(k) + 0.5) / k)
    for _ in range(20):  # k-means gives the start
        member = np.abs(x[:, None] - mean).argmin(axis=1)
        mean = np.array([x[member == j].mean() if (member == j).any() else mean[j] for j in range(k)])
    least = 1e-3 * float(x.std())
    spread = np.array([max(x[member == j].std() if (member == j).any() else 0, least) for j in range(k)])
    share = np.maximum(np.bincount(member, minlength=k) / len(x), 1e-3)
    last = -np.inf
    log_likelihood = last
    density = np.zeros((len(x), k))
    for _ in range(300):
        density = np.log(share) + stats.norm.logpdf(x[:, None], mean, spread)
        top = density.max(axis=1, keepdims=True)
        part = np.exp(density - top)
        log_likelihood = float((top[:, 0] + np.log(part.sum(axis=1))).sum())
        part /= part.sum(axis=1, keepdims=True)
        mass = part.sum(axis=0) + 1e-12
        share, mean = mass / mass.sum(), (part * x[:, None]).sum(axis=0) / mass
        spread = np.maximum(np.sqrt((part * (x[:, None] - mean) ** 2).sum(axis=0) / mass), least)
        if log_likelihood - last < 1e-6 * len(x):
            break
        last = log_likelihood
    return share, mean, spread, log_likelihood, density.argmax(axis=1)
