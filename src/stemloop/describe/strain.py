"""Strain of a lattice: from its columns (peak pairs) and straight from the image (geometric phase).

Both compare the lattice at a place with a reference lattice: vectors ``a`` become ``F a``. The polar decomposition
``F = R U`` gives the rotation R and the strain ``U - 1``; to first order they are the ``e_xx``, ``e_yy``, ``e_xy`` and
``w`` of :mod:`stemloop.core.structure`, and a turn of any size makes no strain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage
from scipy.spatial import cKDTree

from stemloop.core.errors import InputError
from stemloop.core.structure import Assignment, Columns

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Columns within this many lattice vectors (of the longer one) take part in a column's local lattice.
REACH = 1.55
#: A neighbour farther than this part of a cell from where the lattice puts it is none.
_TOLERANCE = 0.25
#: Smallest ratio of the two spreads of a neighbourhood that still spans the plane.
_FLATTEST = 0.05


@dataclass(frozen=True)
class Strain:
    """Strain at each of ``n`` columns.

    e_xx, e_yy, e_xy, rotation : (n,), the rotation in radians from +x towards +y (clockwise on the screen); NaN where
    a column has no lattice around it. sigma : (n, 4) their 1-sigma deviations, in this order.
    """

    e_xx: Floats
    e_yy: Floats
    e_xy: Floats
    rotation: Floats
    sigma: Floats

    def __len__(self) -> int:
        return len(self.e_xx)

    @property
    def values(self) -> Floats:
        """(n, 4): e_xx, e_yy, e_xy, rotation."""
        return np.stack([self.e_xx, self.e_yy, self.e_xy, self.rotation], axis=1)


class LocalLattice(NamedTuple):
    """The lattice around each of ``n`` columns.

    vectors : (n, 2, 2) rows a1, a2 (row, col) [px], NaN where the neighbours do not span the plane.
    covariance : (n, 2, 2, 2): covariance of the components of a1 and a2 along rows ([..., 0]) and columns ([..., 1]).
    offset : (n, 2) [px] from the column to the middle of those that gave the vectors (0 inside, not at a rim).
    """

    vectors: Floats
    covariance: Floats
    offset: Floats


def local_lattice(columns: Columns, assignment: Assignment, reach: float = REACH) -> LocalLattice:
    """Lattice vectors around each column, by weighted least squares over the columns of the same grain near it.

    Each pair of columns is a whole number of cells apart plus the difference of their places in the cell; the number
    is read off the positions, not off the cells' running indices, so that a dislocation far away does not matter.
    Each site of the cell has its own free offset, so that a displacement of one sublattice against another is no
    strain. Weights are the inverse variances of the positions.
    """
    n, position = len(columns), columns.position
    nothing = LocalLattice(np.full((n, 2, 2), np.nan), np.full((n, 2, 2, 2), np.nan), np.full((n, 2), np.nan))
    if n == 0 or not assignment.grains:
        return nothing
    one, other, step = _pairs(position, assignment, reach)
    variance = _finite(columns.sigma) ** 2
    known = variance.mean(axis=1)
    weight = 1 / np.maximum(known, 0.1 * np.median(known)) if np.median(known) > 0 else np.ones(n)
    sites = int(assignment.site.max()) + 1
    group = one * sites + assignment.site[other]

    def summed(values: Floats, to: Integers = one, size: int = n) -> Floats:
        return np.bincount(to, values, minlength=size).astype(np.float64)

    w = weight[other]
    mass = summed(w, group, n * sites)
    centred = np.empty(step.shape)
    for axis in (0, 1):
        mean = summed(w * step[:, axis], group, n * sites) / np.maximum(mass, 1e-300)
        centred[:, axis] = step[:, axis] - mean[group]
    normal = np.empty((n, 2, 2))
    for a, b in ((0, 0), (0, 1), (1, 1)):
        normal[:, a, b] = normal[:, b, a] = summed(w * centred[:, a] * centred[:, b])
    spread = np.linalg.eigvalsh(normal)
    spans = spread[:, 0] > _FLATTEST * spread[:, 1].clip(1e-300)
    inverse = np.full((n, 2, 2), np.nan)
    inverse[spans] = np.linalg.inv(normal[spans])
    share = np.einsum("pab,pb->pa", inverse[one], w[:, None] * centred)  # what each neighbour adds to a1 and a2
    away = position[other] - position[one]
    vectors = np.stack([[summed(share[:, a] * away[:, c]) for c in (0, 1)] for a in (0, 1)]).transpose(2, 0, 1)
    covariance = np.empty((n, 2, 2, 2))
    for a, b in ((0, 0), (0, 1), (1, 1)):
        for c in (0, 1):
            covariance[:, a, b, c] = covariance[:, b, a, c] = summed(share[:, a] * share[:, b] * variance[other, c])
    count = np.maximum(summed(np.ones(len(one))), 1)
    offset = np.column_stack([summed(away[:, c]) / count for c in (0, 1)])
    vectors[~spans], covariance[~spans], offset[~spans] = np.nan, np.nan, np.nan
    return LocalLattice(vectors, covariance, offset)


def _finite(sigma: Floats) -> Floats:
    """``sigma`` (n, 2) with ten times the usual deviation where none is known, so that such a column hardly counts."""
    known = np.isfinite(sigma)
    usual = float(np.median(sigma[known])) if known.any() else 0.0
    return np.where(known, sigma, 10 * usual)


def _pairs(position: Floats, assignment: Assignment, reach: float) -> tuple[Integers, Integers, Floats]:
    """Columns (one, other) of the same grain near each other, each with itself too, and the cells (p, 2) from one to
    the other."""
    grain, site = assignment.grain, assignment.site
    sited = np.flatnonzero((grain >= 0) & (site >= 0))
    longest = np.array([np.hypot(*g.vectors.T).max() for g in assignment.grains])
    pair = cKDTree(position[sited]).query_pairs(reach * longest.max(), output_type="ndarray")
    one, other = sited[pair[:, 0]], sited[pair[:, 1]]
    kept = (grain[one] == grain[other]) & (np.hypot(*(position[other] - position[one]).T) < reach * longest[grain[one]])
    one, other = one[kept], other[kept]
    most = max(len(g.basis) for g in assignment.grains)
    inverse = np.array([np.linalg.inv(g.vectors) for g in assignment.grains])
    basis = np.zeros((len(assignment.grains), most, 2))
    for k, g in enumerate(assignment.grains):
        basis[k, : len(g.basis)] = g.basis
    cells = np.einsum("pa,pab->pb", position[other] - position[one], inverse[grain[one]])
    cells -= basis[grain[one], site[other]] - basis[grain[one], site[one]]
    step = np.rint(cells)
    fits = (np.abs(cells - step) < _TOLERANCE).all(axis=1)
    one, other, step = one[fits], other[fits], step[fits]
    return (
        np.concatenate([one, other, sited]),
        np.concatenate([other, one, sited]),
        np.concatenate([step, -step, np.zeros((len(sited), 2))]),
    )


def strain_of(
    columns: Columns, assignment: Assignment, reference: int | NDArray[Any] | None = None, reach: float = REACH
) -> Strain:
    """Strain at each column, from the columns of the same grain around it.

    Peak pairs (P. L. Galindo et al., Ultramicroscopy 107 (2007) 1186, doi:10.1016/j.ultramic.2006.10.004) with all
    pairs of a neighbourhood in one weighted fit (:func:`local_lattice`). A field that is linear in position is
    reproduced exactly; one of wavelength L is damped by about ``1 - (2 pi r / L)^2 / 8`` for neighbours within r.

    Parameters
    ----------
    columns, assignment : what was found, and which lattice site each column is.
    reference : the unstrained lattice: None, each grain's own mean lattice; a number, that grain's; or (2, 2) vectors
        a1, a2 as (row, col) [px], in the order in which the grains have them.
    reach : radius of a neighbourhood in units of the longer lattice vector, at least 1.05.

    Returns
    -------
    Strain : deviations are propagated from the positions' own. At a rim, where all neighbours are on one side, they
        also hold what the strain may change between the column and the middle of its neighbours, judged by how much
        it changes elsewhere in the grain. Neighbours of another grain never take part. The error of the reference is
        not in them.

    Raises
    ------
    InputError : a reference that is no grain or no lattice, or a reach under 1.05.
    """
    if reach < 1.05:
        raise InputError(f"a neighbourhood must reach the next cells: reach is {reach:g}, give at least 1.05.")
    if len(assignment) != len(columns):
        raise InputError(f"{len(columns)} columns have {len(assignment)} assignments: they are of different images.")
    local = local_lattice(columns, assignment, reach)
    unstrained = _references(assignment, reference)
    if len(unstrained) == 0:
        empty = np.full(len(columns), np.nan)
        return Strain(empty, empty.copy(), empty.copy(), empty.copy(), np.full((len(columns), 4), np.nan))
    inverse = np.linalg.inv(unstrained)[assignment.grain.clip(0)]
    deformation = np.einsum("nca,nar->nrc", inverse, local.vectors)
    values, turn = strain_and_rotation(deformation)
    cosine, sine = np.cos(turn) ** 2, np.sin(turn) ** 2
    spread = np.einsum("nca,ncb,nabr->ncr", inverse, inverse, local.covariance)  # of dF_rc: [n, c, r]
    along, across = spread[..., 0], spread[..., 1]
    along, across = cosine[:, None] * along + sine[:, None] * across, sine[:, None] * along + cosine[:, None] * across
    shear = (along[:, 1] + across[:, 0]) / 4
    variance = np.stack([across[:, 1], along[:, 0], shear, shear], axis=1)
    variance += _change(columns.position, assignment, values, variance) * (local.offset**2).sum(axis=1)[:, None]
    return Strain(values[:, 0], values[:, 1], values[:, 2], values[:, 3], np.sqrt(variance))


def _references(assignment: Assignment, reference: int | NDArray[Any] | None) -> Floats:
    """(grains, 2, 2): the unstrained vectors for each grain."""
    own = np.array([g.vectors for g in assignment.grains]).reshape(-1, 2, 2)
    if reference is None:
        return own
    if isinstance(reference, int | np.integer):
        if not 0 <= reference < len(own):
            raise InputError(f"there is no grain {reference}: the image has {len(own)}, numbered from 0.")
        return np.broadcast_to(own[reference], own.shape)
    vectors = np.asarray(reference, dtype=np.float64)
    if vectors.shape != (2, 2) or not np.isfinite(vectors).all() or abs(np.linalg.det(vectors)) < 1e-9:
        raise InputError("a reference lattice is two vectors (row, col) [px] that are not in line, as a (2, 2) array.")
    return np.broadcast_to(vectors, own.shape)


def strain_and_rotation(deformation: Floats) -> tuple[Floats, Floats]:
    """(..., 4) e_xx, e_yy, e_xy, rotation, and the rotation (...,) again, of F (..., 2, 2) over (row, col)."""
    (yy, yx), (xy, xx) = np.moveaxis(deformation, (-2, -1), (0, 1))  # yx = dy/dx
    turn = np.arctan2(yx - xy, xx + yy)
    c, s = np.cos(turn), np.sin(turn)
    e_xx, e_yy = c * xx + s * yx - 1, c * yy - s * xy - 1
    e_xy = (c * xy + s * yy + c * yx - s * xx) / 2
    return np.stack([e_xx, e_yy, e_xy, turn], axis=-1), turn


def _change(position: Floats, assignment: Assignment, values: Floats, variance: Floats) -> Floats:
    """(n, 4) mean square of the strain's change per pixel in each column's grain, beyond what noise makes.

    It is judged from columns four cells apart along either vector, which share no neighbours.
    """
    out = np.zeros_like(values)
    usable = np.isfinite(values).all(axis=1)
    if usable.sum() < 2:
        return out
    index = np.flatnonzero(usable)
    tree = cKDTree(position[index])
    for number, grain in enumerate(assignment.grains):
        own = index[assignment.grain[index] == number]
        for vector in grain.vectors:
            distance, near = (np.asarray(v) for v in tree.query(position[own] + 4 * vector))
            partner = index[near]
            met = (distance < 0.5 * np.hypot(*grain.vectors.T).min()) & (assignment.grain[partner] == number)
            left, right = own[met], partner[met]
            if len(left) >= 8:
                excess = (values[left] - values[right]) ** 2 - variance[left] - variance[right]
                change = excess / ((position[left] - position[right]) ** 2).sum(axis=1)[:, None]
                out[assignment.grain == number] += np.maximum(change.mean(axis=0), 0)
    return out


# ------------------------------------------------------------------------------------------- from the image itself

#: A Fourier mask ends where it has fallen to exp(-_END^2 / 2).
_END = 5.0
#: Reflections up to this order are tried; at most this many are used.
_ORDERS, _MOST = 2, 4
#: Places nearer to the border than this many resolutions see it and have no strain.
_RIM = 2.5
#: Over so many resolutions an image is faded out at its border.
_TAPER = 2.0
#: A deviation of strain above which nothing is said.
_UNKNOWN = 0.2
#: Where the reflections' amplitude is under this part of what it is elsewhere, there is no crystal of this lattice.
_FAINTEST = 0.25
#: Independent places (over all draws of noise) by which the deviations are judged.
_JUDGED = 250


@dataclass(frozen=True)
class StrainMap:
    """Strain at each pixel of an image.

    e_xx, e_yy, e_xy, rotation : (rows, columns), rotation in radians, positive from +x towards +y; NaN where the image
    does not say (no crystal, or too near to the border). sigma : (4, rows, columns) their 1-sigma deviations by the
    image's noise. resolution_px : standard deviation [px] of the Gaussian over which every value is averaged.
    reflections : (m, 2) the reciprocal vectors (row, col) [1/px] that were used.
    """

    e_xx: Floats
    e_yy: Floats
    e_xy: Floats
    rotation: Floats
    sigma: Floats
    resolution_px: float
    reflections: Floats


class _Wave(NamedTuple):
    """One reflection on a coarse mesh: amplitude and local frequency (2, ...) [1/px]."""

    amplitude: Floats
    frequency: Floats


def gpa(
    image: NDArray[Any],
    vectors: Assignment | NDArray[Any],
    resolution_px: float | None = None,
    reference: NDArray[Any] | None = None,
) -> StrainMap:
    """Strain by geometric phase analysis, straight from the image.

    A Gaussian mask around a reflection g leaves the wave ``A exp(i phi)`` of that set of planes. Its local frequency is
    ``q = grad(phi) / 2 pi = Im(conj(h) grad h) / (2 pi |h|^2)``, without any unwrapping; a lattice that is deformed by
    F has ``q = F^-T g``. The matrix is fitted to several reflections, each weighted by its local signal to noise
    (M. J. Hytch, E. Snoeck and R. Kilaas, Ultramicroscopy 74 (1998) 131, doi:10.1016/S0304-3991(98)00035-7).

    Parameters
    ----------
    image : (rows, columns) finite grey levels.
    vectors : the reference lattice: (2, 2) rows a1, a2 as (row, col) [px], or an assignment, whose first grain is
        taken; of several grains each needs its own call.
    resolution_px : standard deviation [px] of the Gaussian that averages; by default the longer lattice vector,
        at most an eighth of the image.
    reference : (rows, columns) bool, where the crystal is unstrained; the mean lattice there then is the reference.

    Returns
    -------
    StrainMap : deviations from the noise, which is measured where the image has no signal (above 0.5 / px); a phase's
        gradient has the variance ``v / (16 pi |A|^2 r^4)`` for white noise of variance v and the resolution r.

    Raises
    ------
    InputError : an image or vectors that cannot be used, no reflection above the noise, or a reference without crystal.
    """
    pixels, lattice = _usable(image, vectors)
    longest = min(float(np.hypot(*lattice.T).max()), min(pixels.shape) / 8)
    width = longest if resolution_px is None else float(resolution_px)
    if not 1 <= width <= min(pixels.shape) / 6:
        raise InputError(f"a resolution of {width:.3g} px does not fit an image of {pixels.shape} px.")
    taper = np.outer(*(_taper(n, _TAPER * width) for n in pixels.shape))
    spectrum = fft.fft2((pixels - (pixels * taper).sum() / taper.sum()) * taper)
    mesh = [int(fft.next_fast_len(max(8, round(1.5 * _END / np.pi * n / width)))) for n in pixels.shape]
    mesh = [min(m, n) for m, n in zip(mesh, pixels.shape, strict=True)]
    grain = _corner_noise(spectrum)
    noise = _local_variance(grain, width, mesh)
    g = _reflections(spectrum, np.asarray(np.linalg.inv(lattice).T, np.float64), noise, width, mesh)
    centre = g
    for _ in range(2):  # masks at the mean lattice: an amplitude that ends somewhere then does not shift the phase
        waves = [_wave(spectrum, c, width, mesh) for c in centre]
        weight = np.stack([w.amplitude**2 for w in waves]) * (64 * np.pi**3 * width**4) / noise
        covariance = _inverse(np.einsum("kij,ka,kb->ijab", weight, g, g))
        bent = _bent(waves, weight, g, covariance)
        doubt = np.trace(covariance, axis1=-2, axis2=-1)
        centre = g @ np.median(bent[doubt <= np.median(doubt)], axis=0).T
    where = _places(pixels.shape, mesh)
    inside = np.minimum.outer(*(_to_border(n) for n in pixels.shape)) >= _RIM * width
    sigma = np.sqrt(np.stack([covariance[..., 1, 1], covariance[..., 0, 0]]))
    sigma = np.stack([*sigma, *np.broadcast_to(np.hypot(*sigma) / 2, sigma.shape)])
    strength = sum(w.amplitude**2 for w in waves)
    regular = (sigma < _UNKNOWN).all(axis=0) & (np.abs(np.linalg.det(bent)) > 0.1)
    regular &= strength > _FAINTEST**2 * np.quantile(strength, 0.9)
    sigma *= _together(spectrum, grain, centre, bent, weight, g, covariance, regular, width)
    if reference is not None:
        bent = bent @ np.linalg.inv(_unstrained(bent, regular, reference, inside))
    values = _strain(bent, regular)
    known = ndimage.map_coordinates(regular.astype(np.float64), where, order=1, mode="grid-wrap") > 0.99
    known &= inside
    maps = [ndimage.map_coordinates(v, where, order=3, mode="grid-wrap") for v in values]
    spread = [ndimage.map_coordinates(s, where, order=1, mode="grid-wrap") for s in sigma]
    e_xx, e_yy, e_xy, rotation = (np.where(known, m, np.nan) for m in maps)
    return StrainMap(e_xx, e_yy, e_xy, rotation, np.where(known, np.array(spread), np.nan), width, g)


def _strain(bent: Floats, regular: NDArray[np.bool_]) -> Floats:
    """(4, ...) strain and rotation of ``F^-T``; zero where it is not ``regular``."""
    deformation = np.swapaxes(np.linalg.inv(np.where(regular[..., None, None], bent, np.eye(2))), -1, -2)
    return np.asarray(np.moveaxis(strain_and_rotation(deformation)[0], -1, 0))


def _together(
    spectrum: NDArray[np.complex128],
    grain: Floats,
    centre: Floats,
    bent: Floats,
    weight: Floats,
    g: Floats,
    covariance: Floats,
    regular: NDArray[np.bool_],
    width: float,
) -> Floats:
    """(4, 1, 1) how much larger the deviations are than for independent reflections.

    Counting noise is strong where the columns are, so that it is alike in all reflections. The image's own ``grain``
    with random signs is white noise of the same strength everywhere; it is added and what it changes is measured.
    """
    if not regular.any():
        return np.ones((4, 1, 1))
    rng = np.random.default_rng(0)
    before, changes = _strain(bent, regular), []
    mesh = list(bent.shape[:2])
    draws = int(np.clip(_JUDGED * 4 * np.pi * width**2 / spectrum.size, 2, 12))
    for _ in range(draws):
        noisy = spectrum + fft.fft2(grain * rng.choice([-1.0, 1.0], grain.shape))
        waves = [_wave(noisy, c, width, mesh) for c in centre]
        changes.append(_strain(_bent(waves, weight, g, covariance), regular) - before)
    expected = np.stack([covariance[..., 1, 1], covariance[..., 0, 0], *[np.trace(covariance, 0, -2, -1) / 4] * 2])
    ratio = np.mean(np.square(changes), axis=0) / expected
    return np.asarray(np.sqrt(np.maximum([r[regular].mean() for r in ratio], 0.25)))[:, None, None]


def _reflections(
    spectrum: NDArray[np.complex128], reciprocal: Floats, noise: Floats, width: float, mesh: list[int]
) -> Floats:
    """(m, 2) the reflections of the lattice that say most of it: amplitude over noise, times length."""
    seen = []
    for order in _half_plane(_ORDERS):
        g = order @ reciprocal
        if (np.abs(g) + _END / (2 * np.pi * width) < 0.5).all():
            square = _wave(spectrum, g, width, mesh).amplitude ** 2
            strength = float(np.quantile(square / noise, 0.9)) * 4 * np.pi * width**2
            if strength > 9:
                seen.append((strength * float(g @ g), g))
    best = np.array([g for _, g in sorted(seen, key=lambda s: -s[0])[:_MOST]]).reshape(-1, 2)
    if len(best) < 2 or np.linalg.matrix_rank(best, tol=1e-3 * np.abs(reciprocal).max()) < 2:
        raise InputError("the image shows no two reflections of this lattice above its noise: are the vectors right?")
    return best


def _inverse(normal: Floats) -> Floats:
    least = 1e-12 * np.trace(normal, axis1=-2, axis2=-1)[..., None, None]
    return np.asarray(np.linalg.inv(normal + (least + 1e-300) * np.eye(2)))


def _bent(waves: list[_Wave], weight: Floats, g: Floats, covariance: Floats) -> Floats:
    """(..., 2, 2) ``F^-T`` by least squares of ``q = F^-T g``."""
    right = np.einsum("kij,kcij,kb->ijcb", weight, np.stack([w.frequency for w in waves]), g)
    return np.asarray(right @ covariance)


def _usable(image: NDArray[Any], vectors: Assignment | NDArray[Any]) -> tuple[Floats, Floats]:
    pixels = np.asarray(image)
    if pixels.ndim != 2 or pixels.dtype.kind not in "biuf" or min(pixels.shape) < 32:
        raise InputError(f"strain needs an image (rows, columns) of at least 32 x 32 px; got the shape {pixels.shape}.")
    pixels = pixels.astype(np.float64)
    if not np.isfinite(pixels).all() or np.ptp(pixels) == 0:
        raise InputError("the image is constant or holds values that are not finite: crop or fill it.")
    if isinstance(vectors, Assignment):
        if not vectors.grains:
            raise InputError("the assignment holds no lattice: there is nothing to measure strain of.")
        vectors = vectors.grains[0].vectors
    lattice = np.asarray(vectors, dtype=np.float64)
    if lattice.shape != (2, 2) or not np.isfinite(lattice).all() or abs(np.linalg.det(lattice)) < 1e-6:
        raise InputError("a lattice is two vectors (row, col) [px] that are not in line, as a (2, 2) array.")
    return pixels, lattice


def _half_plane(most: int) -> Floats:
    """Orders (h, k) up to ``most``, one of each opposite pair."""
    return np.array([(h, k) for h in range(most + 1) for k in range(-most, most + 1) if h > 0 or k > 0], np.float64)


def _wave(spectrum: NDArray[np.complex128], g: Floats, width: float, mesh: list[int]) -> _Wave:
    """The wave around ``g``: the part of the spectrum under the mask, brought back on a mesh of few points."""
    index, frequency, mask = [], [], []
    for n, m, centre in zip(spectrum.shape, mesh, g, strict=True):
        offset = np.arange(-(m // 2), m - m // 2)
        k = (round(centre * n) + offset) / n
        index.append((round(centre * n) + offset) % n)
        frequency.append(fft.ifftshift(k))
        mask.append(np.exp(-0.5 * (2 * np.pi * width * (k - centre)) ** 2))
    part = fft.ifftshift(spectrum[np.ix_(*index)] * np.outer(*mask)) * (np.prod(mesh) / spectrum.size)
    wave = fft.ifft2(part)
    square = np.abs(wave) ** 2
    slopes = [fft.ifft2(part * k) for k in (frequency[0][:, None], frequency[1][None, :])]
    local = np.stack([(np.conj(wave) * slope).real / np.maximum(square, 1e-300) for slope in slopes])
    return _Wave(np.sqrt(square), local)


def _corner_noise(spectrum: NDArray[np.complex128]) -> Floats:
    """The image's noise alone, from the spectrum's corners, where no probe transfers, scaled to all frequencies."""
    rows, columns = (np.fft.fftfreq(n) for n in spectrum.shape)
    corner = np.hypot(rows[:, None], columns[None, :]) > 0.5
    least = 1e-6 * np.abs(spectrum).max() / spectrum.size
    return np.asarray(fft.ifft2(spectrum * corner).real / np.sqrt(corner.mean()) + least)


def _local_variance(grain: Floats, width: float, mesh: list[int]) -> Floats:
    """Variance of the noise around each mesh point."""
    smooth = ndimage.gaussian_filter(grain**2, 2 * width, mode="wrap", truncate=3)
    return np.asarray(smooth[_nearest(grain.shape, mesh)] + 1e-300)


def _nearest(shape: tuple[int, ...], mesh: list[int]) -> Any:
    """Index of the pixel nearest to each mesh point."""
    return np.ix_(*(np.rint(np.arange(m) * n / m).astype(int) % n for n, m in zip(shape, mesh, strict=True)))


def _places(shape: tuple[int, ...], mesh: list[int]) -> Floats:
    """Mesh coordinates (2, rows, columns) of each pixel."""
    return np.stack(np.meshgrid(*(np.arange(n) * m / n for n, m in zip(shape, mesh, strict=True)), indexing="ij"))


def _taper(n: int, width: float) -> Floats:
    """(n,) a rise from 0 to 1 over ``width`` pixels at both ends: a cut lattice would leak into its own reflections."""
    return np.asarray(np.sin(np.pi / 2 * np.minimum(1, (_to_border(n) + 0.5) / width)) ** 2)


def _to_border(n: int) -> Floats:
    return np.minimum(np.arange(n), np.arange(n)[::-1]).astype(np.float64)


def _unstrained(bent: Floats, regular: NDArray[np.bool_], reference: NDArray[Any], inside: NDArray[np.bool_]) -> Floats:
    """Mean of ``F^-T`` over the reference region, as far as it is ``inside``."""
    region = np.asarray(reference, dtype=bool)
    if region.shape != inside.shape:
        raise InputError(
            f"the reference region has the shape {region.shape}, the image {inside.shape}: make them alike."
        )
    chosen = (region & inside)[_nearest(inside.shape, list(regular.shape))] & regular
    if not chosen.any():
        raise InputError("the reference region holds no crystal off the border: choose another, or leave it out.")
    return np.asarray(bent[chosen].mean(axis=0))
