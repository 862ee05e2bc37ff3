"""From atom columns, or straight from an image, to the lattice: its vectors, its orientation, what departs from it.

Angles follow ``core.structure``: positive from +x towards +y (clockwise on the screen, y down).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components
from scipy.spatial import cKDTree

from stemloop.core.errors import InputError, UnknownName
from stemloop.core.structure import Columns
from stemloop.describe.vectors import angle as direction
from stemloop.describe.vectors import standard

Floats = NDArray[np.float64]

#: Class of the projected lattice of each known material: hexagonal repeats every 60 degrees, square every 90.
SYMMETRY = {"MoS2": "hexagonal", "graphene": "hexagonal", "SrTiO3": "square"}
_TURN = {"hexagonal": np.pi / 3, "square": np.pi / 2}
#: Lattice constant a [m] of each, to know the rings of the spectrum by their size where the pixel size is known.
_CONSTANT_M = {"MoS2": 0.3160e-9, "graphene": 0.2461e-9, "SrTiO3": 0.3905e-9}


@dataclass(frozen=True)
class Lattice:
    """A two-dimensional lattice ``origin + i a1 + j a2`` fitted to points (row, col) [px].

    a1, a2 : (2,) reduced lattice vectors [px]; a1 is the one nearest to +x, a2 follows a1 towards +y.
    origin : (2,) a lattice point [px]. sigma : (2, 2) 1-sigma deviations of a1 (first row) and a2 [px].
    symmetry : ``"hexagonal"``, ``"square"`` or ``"oblique"`` (neither within 4 %).
    rotation_rad, rotation_sigma_rad : rotation of the undistorted lattice of that symmetry (a1 along +x) against +x,
        from the polar decomposition of the deformation, reduced to the smallest equivalent angle; for an oblique
        lattice the direction of a1.
    index : (n, 2) int, the lattice point (i, j) of each point; basis : (n,) int, which of the lattice's interlocking
        copies it belongs to (a honeycomb has two), -1 for points that belong to none.
    residual : (n, 2) position minus fit [px]; NaN where ``basis`` is -1.
    """

    a1: Floats
    a2: Floats
    origin: Floats
    sigma: Floats
    symmetry: str
    rotation_rad: float
    rotation_sigma_rad: float
    index: NDArray[np.int64]
    basis: NDArray[np.int64]
    residual: Floats


def fit_lattice(position: NDArray[Any], tolerance: float = 0.2) -> Lattice:
    """Fit one lattice to the positions of atom columns, deaf to inclusions, vacancies and false columns.

    The lattice vectors are the shortest differences that nearly all points share (so a honeycomb gives its hexagonal
    Bravais lattice and two copies). Each point gets its index by walking from neighbour to neighbour, which follows a
    slow strain however far; least squares with Tukey's biweight then fit what most points agree on.

    Parameters
    ----------
    position : (n, 2) finite (row, col) [px] of at least 8 points.
    tolerance : how far a neighbour may lie from where the lattice puts it, as a part of the shorter vector (0 to 0.5).

    Returns
    -------
    Lattice

    Raises
    ------
    InputError : too few points, not finite, or no two differences repeat.
    """
    points = np.asarray(position, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 8:
        raise InputError(f"a lattice needs at least 8 positions (row, col); got the shape {points.shape}.")
    if not np.isfinite(points).all():
        raise InputError("some positions are not finite; leave those columns out.")
    first, second = _repeats(points)
    index, basis = _walk(points, first, second, tolerance)
    vectors, _, _, _ = _robust(points, index, basis)
    change = standard(vectors)
    index = np.where(basis[:, None] >= 0, index @ np.rint(np.linalg.inv(change)).astype(np.int64), 0)
    vectors, origins, covariance, residual = _robust(points, index, basis)
    symmetry = _symmetry(vectors)
    rotation = _rotation(vectors, symmetry)
    sigma = np.sqrt(np.maximum(np.diag(covariance), 0))[:, None] * np.ones(2)
    lengths = np.hypot(*vectors.T)
    return Lattice(
        vectors[0],
        vectors[1],
        origins[0],
        sigma,
        symmetry,
        rotation,
        float(np.sqrt((sigma[0, 0] / lengths[0]) ** 2 + (sigma[1, 0] / lengths[1]) ** 2) / 2),
        index,
        basis,
        residual,
    )


def orientation(
    source: NDArray[Any] | Columns, material: str, pixel_size_m: float | None = None
) -> tuple[float, float]:
    """Rotation of the material's reference lattice against +x, and its 1-sigma deviation, both [rad].

    The reference (rotation 0) has its zigzag direction, the lattice vector a1 of the hexagonal Bravais lattice, along
    +x; for SrTiO3 it has [100] along +x. From an image it is found by the sharp peaks of its power spectrum, each
    located to a part of a pixel, indexed together, and turned into a rotation by polar decomposition, so that strain
    and shear do not pass for rotation. From columns it is :func:`fit_lattice` of the brightest sublattice.

    Parameters
    ----------
    source : image (rows, columns), or the columns found in it.
    material : one of ``MoS2``, ``graphene``, ``SrTiO3``.
    pixel_size_m : size of a pixel [m], good to a tenth. It tells the rings of the spectrum apart, which are otherwise
        told apart by which of them are there, and the half cell of SrTiO3 whose columns all look alike from the whole.

    Returns
    -------
    (rotation, sigma) : rotation in (-30, 30] degrees (hexagonal) or (-45, 45] degrees (square), in radians.

    Raises
    ------
    UnknownName : no such material. InputError : the image shows no lattice of the material's symmetry.
    """
    if material not in SYMMETRY:
        raise UnknownName(f"no lattice is known for {material!r}; known: {', '.join(SYMMETRY)}.")
    symmetry = SYMMETRY[material]
    if isinstance(source, Columns):
        bright = source.sublattice == 0
        lattice = fit_lattice(source.position[bright] if bright.sum() >= 8 else source.position)
        vectors = np.stack([lattice.a1, lattice.a2])
        if (
            symmetry == "square"
            and pixel_size_m
            and np.hypot(*lattice.a1) * pixel_size_m < 0.85 * _CONSTANT_M[material]
        ):
            vectors = np.stack([vectors[0] - vectors[1], vectors[0] + vectors[1]])  # all columns alike: half the cell
        if lattice.symmetry != symmetry and _misfit(vectors, symmetry) > 0.12:
            raise InputError(f"the columns form a {lattice.symmetry} lattice; {material} is {symmetry}.")
        return _rotation(vectors, symmetry), lattice.rotation_sigma_rad
    longest = 1.15 * pixel_size_m / _CONSTANT_M[material] if pixel_size_m else None
    return _from_spectrum(np.asarray(source, dtype=np.float64), symmetry, longest)


# ------------------------------------------------------------------------------------------------- from points


def _repeats(points: Floats) -> tuple[Floats, Floats]:
    """The two shortest difference vectors shared by most points."""
    n = len(points)
    tree = cKDTree(points)
    distance, neighbour = (np.asarray(v) for v in tree.query(points, min(n, 20)))
    difference = (points[neighbour[:, 1:]] - points[:, None, :]).reshape(-1, 2)
    near = float(np.median(distance[:, 1]))
    difference = difference[np.hypot(*difference.T) < 3.2 * near]
    cluster = cKDTree(difference)
    radius = 0.15 * near
    sample = difference[np.linspace(0, len(difference) - 1, min(len(difference), 4000)).astype(int)]
    count = np.array([len(c) for c in cluster.query_ball_point(sample, radius)])
    order = np.argsort(-count)
    centres: list[Floats] = []
    counts: list[int] = []
    for k in order:
        if all(np.hypot(*(sample[k] - c)) > 2 * radius for c in centres):
            members = difference[cluster.query_ball_point(sample[k], radius)]
            centres.append(np.median(members, axis=0))
            counts.append(int(count[k]))
        if len(centres) == 24:
            break
    found, weight = np.array(centres), np.array(counts)
    shared = found[weight > 0.7 * weight.max()] if weight.max() > max(3, 0.3 * n) else found[:0]
    shared = shared[np.argsort(np.hypot(*shared.T))]
    for second in shared[1:]:
        area = abs(shared[0, 0] * second[1] - shared[0, 1] * second[0])
        if area > 0.3 * np.hypot(*shared[0]) * np.hypot(*second):
            return shared[0], second
    raise InputError("the columns show no lattice: no two differences in position repeat among most of them.")


def _walk(
    points: Floats, first: Floats, second: Floats, tolerance: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (n, 2) by steps along the lattice vectors, and the copy (component) that each point belongs to."""
    n = len(points)
    tree = cKDTree(points)
    reach = tolerance * min(np.hypot(*first), np.hypot(*second))
    steps = [(1, 0), (0, 1), (1, 1), (1, -1)]
    start, end, kind = [], [], []
    for number, (i, j) in enumerate(steps):
        distance, other = (
            np.asarray(v) for v in tree.query(points + i * first + j * second, distance_upper_bound=reach)
        )
        met = np.flatnonzero(np.isfinite(distance))
        start.append(met)
        end.append(other[met])
        kind.append(np.full(len(met), number))
    source, target, which = np.concatenate(start), np.concatenate(end), np.concatenate(kind)
    graph = coo_matrix((np.ones(len(source)), (source, target)), shape=(n, n)).tocsr()
    count, label = connected_components(graph, directed=False)
    step_of = {(int(a), int(b)): np.array(steps[k]) for a, b, k in zip(source, target, which, strict=True)}
    step_of.update({(b, a): -step for (a, b), step in list(step_of.items())})
    index = np.zeros((n, 2), dtype=np.int64)
    sizes = np.bincount(label, minlength=count)
    basis = np.full(n, -1, dtype=np.int64)
    for rank, component in enumerate(np.argsort(-sizes)):
        members = np.flatnonzero(label == component)
        if len(members) < max(3, 0.02 * n):
            break
        basis[members] = rank
        order, before = breadth_first_order(graph, members[0], directed=False)
        for node in order[1:]:
            index[node] = index[before[node]] + step_of[int(before[node]), int(node)]
    return index, basis


def _robust(
    points: Floats, index: NDArray[np.int64], basis: NDArray[np.int64]
) -> tuple[Floats, Floats, Floats, Floats]:
    """Vectors (2, 2), origins (copies, 2), covariance (2, 2) of the vectors' components [px^2], residuals (n, 2)."""
    used = np.flatnonzero(basis >= 0)
    copies = int(basis.max()) + 1
    if copies == 0 or len(used) < 8:
        raise InputError("the columns show no lattice: too few of them can be reached by its vectors.")
    design = np.column_stack([index[used], np.eye(copies)[basis[used]]]).astype(np.float64)
    weight = np.ones(len(used))
    solution: Floats = np.zeros((2 + copies, 2))
    left: Floats = np.zeros((len(used), 2))
    for _ in range(25):
        normal = (design * weight[:, None]).T @ design
        solution = np.asarray(np.linalg.solve(normal, (design * weight[:, None]).T @ points[used]), dtype=np.float64)
        left = points[used] - design @ solution
        size = np.hypot(*left.T)
        scale = max(float(np.median(size)) / 1.1774, 1e-9)
        updated = np.clip(1 - (size / (4.685 * scale)) ** 2, 0, 1) ** 2
        if float(np.abs(updated - weight).max()) < 1e-4:
            break
        weight = updated
    spread = float((weight * size**2).sum() / max(2 * weight.sum() - 2 * len(solution), 1))
    inverse = np.linalg.inv((design * weight[:, None]).T @ design)
    covariance: Floats = np.asarray(inverse[:2, :2] * spread, dtype=np.float64)
    residual = np.full(points.shape, np.nan)
    residual[used] = left
    return solution[:2], solution[2:], covariance, residual


def _symmetry(vectors: Floats) -> str:
    misfit = {name: _misfit(vectors, name) for name in _TURN}
    best = min(misfit, key=lambda name: misfit[name])
    return best if misfit[best] < 0.04 else "oblique"


def _deformation(vectors: Floats, symmetry: str) -> Floats:
    """F (2, 2) in (x, y) that takes the unit lattice of the symmetry, a1 along +x, to the vectors."""
    turn = _TURN[symmetry]
    reference = np.array([[1.0, np.cos(turn)], [0.0, np.sin(turn)]])
    return np.asarray(vectors[:, ::-1].T @ np.linalg.inv(reference))


def _misfit(vectors: Floats, symmetry: str) -> float:
    """Half the relative difference of the principal stretches: 0 for a lattice of exactly this symmetry."""
    large, small = np.linalg.svd(_deformation(vectors, symmetry), compute_uv=False)
    return float((large - small) / (large + small))


def _rotation(vectors: Floats, symmetry: str) -> float:
    """Rotation [rad] in the polar decomposition of the deformation, reduced to the smallest equivalent angle."""
    if symmetry not in _TURN:
        return direction(vectors[0])
    f = _deformation(vectors, symmetry)
    return _smallest(float(np.arctan2(f[1, 0] - f[0, 1], f[0, 0] + f[1, 1])), _TURN[symmetry])


def _smallest(angle: float, turn: float) -> float:
    return angle - turn * np.ceil(angle / turn - 0.5)


# ---------------------------------------------------------------------------------------------- from the spectrum


def _from_spectrum(image: Floats, symmetry: str, longest: float | None) -> tuple[float, float]:
    """Rotation and deviation from the peaks of the power spectrum; ``longest`` [1/px] bounds the first ring."""
    peaks, power = _bragg_peaks(image)
    length = np.hypot(*peaks.T)
    turn = _TURN[symmetry]
    if longest is not None:
        longest /= np.sin(turn)
    least = 2.5 / min(image.shape)
    best, basis = 0.0, np.zeros((2, 2))
    for p, q in zip(peaks, length, strict=True):
        if longest is not None and not 0.75 * longest < q < longest:
            continue
        partner = _turned(p, turn)
        near = np.hypot(*(peaks - partner).T)
        if near.min() > max(0.18 * q, 2 / min(image.shape)):
            continue
        pair = np.stack([p, peaks[near.argmin()]])
        whole = peaks @ np.linalg.inv(pair)
        miss = np.hypot(*((whole - np.rint(whole)) @ pair).T)
        explained = float(power[miss < max(0.05 * q, least / 2)].sum()) * (1 + 0.1 * q / length.max())
        if explained > best:
            best, basis = explained, pair
    if best == 0:
        raise InputError(f"the image shows no {symmetry} lattice: no two sharp peaks of its spectrum are in line.")
    return _indexed_rotation(peaks, power, basis, symmetry, image.shape)


def _indexed_rotation(
    peaks: Floats, power: Floats, basis: Floats, symmetry: str, shape: tuple[int, ...]
) -> tuple[float, float]:
    """Least-squares reciprocal lattice through all peaks that ``basis`` indexes, as a rotation."""
    weight = np.sqrt(power / power.max())
    size = float(np.hypot(*basis[0]))
    for _ in range(4):
        h = np.rint(peaks @ np.linalg.inv(basis))
        miss = np.hypot(*(peaks - h @ basis).T)
        used = (miss < max(0.06 * size, 1.5 / min(shape))) & (np.abs(h).sum(axis=1) > 0)
        design = h[used] * weight[used, None]
        basis = np.linalg.lstsq(design, peaks[used] * weight[used, None], rcond=None)[0]
    left = (peaks[used] - h[used] @ basis) * weight[used, None]
    # opposite peaks are the same measurement, and three directions are needed for a residual at all
    measured = used.sum() / 2
    spread = np.sqrt((left**2).sum() / 2 / max(2 * measured - 4, 1))
    spread = max(float(spread), 0.02 / max(shape))
    covariance = np.linalg.inv(design.T @ design / 2) * spread**2
    turn = _TURN[symmetry]
    # the reciprocal of the direct lattice rotated by w is the reciprocal lattice rotated by w
    direct: Floats = np.asarray(np.linalg.inv(basis).T, dtype=np.float64)
    if direct[0, 1] * direct[1, 0] - direct[0, 0] * direct[1, 1] < 0:
        direct = direct[::-1]
    direct = standard(direct) @ direct
    sigma = float(np.sqrt(np.trace(covariance) / 2) / size)
    return _smallest(_rotation(direct, symmetry), turn), sigma


def _turned(vector: Floats, angle: float) -> Floats:
    """(row, col) turned by ``angle`` from +x towards +y."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([c * vector[0] + s * vector[1], c * vector[1] - s * vector[0]])


def _bragg_peaks(image: Floats, most: int = 40) -> tuple[Floats, Floats]:
    """Sharp peaks of the windowed power spectrum: frequencies (n, 2) (row, col) [1/px] and powers (n,).

    A peak must exceed the median of its ring by 25 times (noise alone does so with a chance of 3e-8 a pixel). Hann's
    window turns a peak into a shape whose logarithm is a parabola near its top, which gives its place to about a
    fiftieth of a frequency step.
    """
    if image.ndim != 2 or min(image.shape) < 32:
        raise InputError(f"an orientation needs an image of at least 32 x 32 px; got the shape {image.shape}.")
    if not np.isfinite(image).all() or np.ptp(image) == 0:
        raise InputError("the image is constant or holds values that are not finite: it shows no lattice.")
    flat = image - ndimage.gaussian_filter(image, min(image.shape) / 8)
    window = np.outer(np.hanning(image.shape[0]), np.hanning(image.shape[1]))
    flat = (flat - (flat * window).sum() / window.sum()) * window
    power = np.fft.fftshift(np.abs(np.fft.fft2(flat)) ** 2)
    fy = np.fft.fftshift(np.fft.fftfreq(image.shape[0]))
    fx = np.fft.fftshift(np.fft.fftfreq(image.shape[1]))
    frequency = np.hypot(fy[:, None], fx[None, :])
    ring = np.round(frequency * min(image.shape)).astype(int)
    floor = np.asarray(ndimage.median(power, ring, np.arange(ring.max() + 1)))[ring] + 1e-12 * power.max()
    top = (power == ndimage.maximum_filter(power, 5)) & (power > 25 * floor)
    top &= (frequency > 3.5 / min(image.shape)) & (frequency < 0.48)
    top[[0, -1], :] = top[:, [0, -1]] = False
    rows, cols = np.nonzero(top)
    strongest = np.argsort(-power[rows, cols])[:most]
    rows, cols = rows[strongest], cols[strongest]
    log = np.log(np.maximum(power, 1e-300))

    def shift(before: Floats, middle: Floats, after: Floats) -> Floats:
        bend = before - 2 * middle + after
        return np.where(bend < 0, 0.5 * (before - after) / np.where(bend < 0, bend, -1), 0).clip(-0.5, 0.5)

    dy = shift(log[rows - 1, cols], log[rows, cols], log[rows + 1, cols])
    dx = shift(log[rows, cols - 1], log[rows, cols], log[rows, cols + 1])
    place = np.stack([fy[rows] + dy / image.shape[0], fx[cols] + dx / image.shape[1]], axis=1)
    strong = power[rows, cols]
    keep = strong > 1e-3 * strong.max() if len(strong) else strong > 0
    return place[keep], strong[keep]
