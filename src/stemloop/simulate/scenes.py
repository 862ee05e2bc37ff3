"""Random images of atom columns of many kinds, with their truth: what the network that finds columns learns from.

Crystals of :data:`stemloop.simulate.pictures.PLANES` with strain, waves, disorder, vacancies, dopants, steps, grains
and edges; single atoms, pairs, rafts and clumps on an amorphous support, which may have graphitic fringes; images with
no column at all. Then the microscope: probe and its tails, dose, background, displaced and uneven scan lines,
correlated noise. Every number is drawn anew for each scene.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage, sparse
from scipy.sparse import csgraph
from scipy.spatial import cKDTree

from stemloop.core.errors import UnknownName
from stemloop.simulate.pictures import PEAK_OF_DOSE, PLANES, Layout, jittered, joined, layout, without

Floats = NDArray[np.float64]

#: Kinds of scenes and how often each is drawn.
KINDS = {"lattice": 0.22, "grains": 0.06, "particle": 0.09, "single atoms": 0.48, "nothing": 0.15}
#: Pixel sizes [pm], probe widths relative to that of the planes, and doses [e/A^2]; all even on a logarithmic scale.
PIXEL_PM = (7.5, 34.0)
PROBE = (0.85, 1.7)
DOSE = (5e2, 3e5)
#: Nearest columns of a plane are at least so many widths apart: closer ones cannot be told apart by eye either.
_RESOLVED = 2.7
_LEAST_WIDTH_PX = 1.0
#: Probe widths where there is no crystal that would show how wide they are.
_WIDE_PROBE = (0.85, 3.0)
#: Nobody scans a film so finely that an atom is wider than this [px].
_FINEST_PX = 7.0
#: Atoms nearer than this, in widths, make one bump: two Gaussians show two maxima from two widths on (C. M. Sparrow,
#: 1916, doi:10.1086/142271).
_APART = 2.3
#: A film thinner than this part of its mean carries no atom.
_CARRIES = 0.15
#: A single atom's counts over their deviation within the probe are at least this (nobody could see a weaker one), and
#: in this share of the scenes they are at most that.
_VISIBLE, _FAINT, _FAINT_MOST = 4.0, 0.65, 14.0


@dataclass(frozen=True)
class Scene:
    """``image`` (rows, columns) [grey levels], its columns' ``position`` (n, 2) [px], ``width`` (n,) and ``amplitude``
    (n,), the ``probe`` width [px] of an ordinary column, ``pixel_pm`` and the ``kind``.

    ``shown`` (n, 2): where the columns are in the image, displaced with its lines and by a slow detector. ``flaws``:
    which of scan, tail, lines, readout, afterglow, smoothing took part.
    """

    image: Floats
    position: Floats
    width: Floats
    amplitude: Floats
    probe: float
    pixel_pm: float
    kind: str
    shown: Floats
    flaws: tuple[str, ...]


def scene(rng: np.random.Generator, side: float = 64.0, kind: str | None = None) -> Scene:
    """A random scene of ``side`` probe widths a side, of ``kind`` (one of :data:`KINDS`; default: drawn)."""
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values()))) if kind is None else kind
    if kind not in KINDS:
        raise UnknownName(f"no scene is called {kind!r}; known: {', '.join(KINDS)}.")
    pixel_pm, width_pm, plane = _optics(rng)
    if kind in ("single atoms", "nothing"):
        width_pm = 45.0 * _log_uniform(rng, *_WIDE_PROBE)
        pixel_pm = max(pixel_pm, width_pm / _FINEST_PX)
    width_pm = max(width_pm, _LEAST_WIDTH_PX * pixel_pm)
    probe = width_pm / pixel_pm
    n = max(24, round(side * probe))
    shape = (n, n)
    if kind == "single atoms":
        columns, ground = _single_atoms(rng, shape, pixel_pm, probe)
    elif kind == "nothing":
        columns, ground = _blank(shape, pixel_pm), _support(rng, shape, probe)
    else:
        columns = _crystal(rng, plane, shape, pixel_pm, kind == "grains")
        columns = replace(columns, width=columns.width * (probe * pixel_pm / 45.0))
        columns, ground = _surrounded(rng, columns, probe, kind == "particle")
    counts = _log_uniform(rng, *DOSE) * (pixel_pm / 100) ** 2 * PEAK_OF_DOSE
    if kind == "single atoms":
        unit = (0.5 + float(ground.mean())) / (np.pi * probe**2)
        seen = _log_uniform(rng, _VISIBLE, _FAINT_MOST) if rng.random() < _FAINT else _VISIBLE
        counts = seen**2 * unit if seen > _VISIBLE else max(counts, seen**2 * unit)
    image, shown, flaws = _exposed(rng, columns, ground, counts, probe, 2.5 if kind == "nothing" else 0.8)
    amplitude = columns.weight * counts
    return Scene(image, columns.position, columns.width, amplitude, probe, pixel_pm, kind, shown, flaws)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _optics(rng: np.random.Generator) -> tuple[float, float, str]:
    """Pixel size [pm], width of a column [pm] and a plane whose columns such a probe can tell apart."""
    while True:
        pixel_pm, width_pm = _log_uniform(rng, *PIXEL_PM), 45.0 * _log_uniform(rng, *PROBE)
        plane = str(rng.choice(list(PLANES)))
        if width_pm / pixel_pm > _LEAST_WIDTH_PX and _nearest_pm(plane) > _RESOLVED * width_pm:
            return pixel_pm, width_pm, plane


def _nearest_pm(plane: str) -> float:
    """Distance [pm] of the nearest columns of a plane."""
    known = PLANES[plane]
    cells = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), -1).reshape(-1, 2)
    places = (cells[:, None] + known.basis).reshape(-1, 2) @ known.vectors_pm
    near = np.asarray(cKDTree(places).query(known.basis @ known.vectors_pm, 2)[0])
    return float(near[:, 1].min())


def _blank(shape: tuple[int, int], pixel_pm: float) -> Layout:
    none = np.zeros(0, np.int64)
    return Layout(shape, pixel_pm, np.zeros((0, 2)), none, none, np.zeros((0, 2), np.int64), np.zeros(0), np.zeros(0))


# ------------------------------------------------------------------------------------------------------ specimens


def _warp(rng: np.random.Generator, shape: tuple[int, int]) -> Any:
    """Strain of a few per cent (the same everywhere) and one wave of up to one per cent."""
    middle = (np.array(shape) - 1) / 2
    strain = np.eye(2) + rng.normal(0, 0.02, (2, 2))
    along = rng.normal(size=2)
    along *= 2 * np.pi / (_log_uniform(rng, 0.5, 3.0) * shape[0]) / np.hypot(*along)
    wave = rng.normal(0, 0.01, 2) / np.hypot(*along)
    phase = rng.uniform(0, 2 * np.pi)

    def warp(points: Floats) -> Floats:
        moved = (points - middle) @ strain.T
        return moved + middle + np.sin(moved @ along + phase)[:, None] * wave

    return warp


def _crystal(rng: np.random.Generator, plane: str, shape: tuple[int, int], pixel_pm: float, grains: bool) -> Layout:
    """One crystal, or two that meet at a straight boundary; with disorder, vacancies, dopants and uneven thickness."""

    def grain(number: int) -> Layout:
        turn, warp = rng.uniform(0, 2 * np.pi), _warp(rng, shape)
        offset = rng.uniform(-20, 20, 2)
        return layout(plane, shape, pixel_pm, turn, lambda p: warp(p) + offset, number, margin=-12.0)

    columns = grain(0)
    if grains:
        angle, through = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 0.75, 2) * shape
        normal = np.array([np.sin(angle), np.cos(angle)])
        other = grain(1)
        columns = joined(
            columns.take((columns.position - through) @ normal < 0), other.take((other.position - through) @ normal > 0)
        )
        columns = columns.take(_roomy(columns.position, 0.6 * _nearest_pm(plane) / pixel_pm))
    columns = jittered(columns, rng.uniform(0, 8), rng)
    if rng.random() < 0.6:
        columns = without(columns, _log_uniform(rng, 0.005, 0.15), int(columns.site.max(initial=0)), rng)
    weight = columns.weight * np.exp(rng.normal(0, _log_uniform(rng, 0.01, 0.12), len(columns.weight)))
    if rng.random() < 0.35:
        doped = rng.random(len(weight)) < _log_uniform(rng, 0.003, 0.1)
        weight[doped] *= _log_uniform(rng, 0.35, 8.0)
    if rng.random() < 0.3:  # steps of thickness
        angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 0.8) * shape[0]
        along = columns.position @ np.array([np.sin(angle), np.cos(angle)])
        weight *= 1 + rng.uniform(0.1, 0.5) * np.floor((along - along.min(initial=0)) / period)
    return replace(columns, weight=weight / max(1e-9, float(np.percentile(weight, 90)) if len(weight) else 1.0))


def _roomy(position: Floats, distance: float) -> NDArray[np.bool_]:
    """Which of the points are kept so that no two are nearer than ``distance``."""
    kept = np.ones(len(position), bool)
    if len(position) > 1:
        for one, other in cKDTree(position).query_pairs(distance):
            if kept[one] and kept[other]:
                kept[other] = False
    return kept


def _surrounded(rng: np.random.Generator, columns: Layout, probe: float, particle: bool) -> tuple[Layout, Floats]:
    """Columns and what lies under them; a ``particle`` ends within the field, on vacuum or on a support."""
    shape = columns.shape
    if not particle:
        ground = np.full(shape, _log_uniform(rng, 0.01, 1.0))
        if rng.random() < 0.35:
            ground = ground * _support(rng, shape, probe)
        return columns, ground
    middle, radius = rng.uniform(0.1, 0.9, 2) * shape, rng.uniform(0.2, 0.6) * shape[0]
    corners = rng.integers(3, 9)
    angle = np.arctan2(*(columns.position - middle).T)
    facet = np.cos(np.pi / corners) / np.cos((angle % (2 * np.pi / corners)) - np.pi / corners)
    depth = 1 - np.hypot(*(columns.position - middle).T) / (radius * facet)
    columns = columns.take(depth > 0)
    if rng.random() < 0.7:  # thinner towards its edge
        columns = replace(columns, weight=columns.weight * np.minimum(1, 0.25 + rng.uniform(1, 5) * depth[depth > 0]))
    ground = _log_uniform(rng, 0.003, 0.5) * (_support(rng, shape, probe) if rng.random() < 0.6 else np.ones(shape))
    halo = np.zeros(shape)
    near = columns.position.round().astype(int)
    near = near[((near >= 0) & (near < shape)).all(axis=1)]
    halo[tuple(near.T)] = 1.0
    halo = ndimage.gaussian_filter(halo, 5 * probe)
    return columns, ground + rng.uniform(0, 0.6) * halo / max(1e-9, float(halo.max()))


def _support(rng: np.random.Generator, shape: tuple[int, int], probe: float) -> Floats:
    """An amorphous film, mean 1: speckle as fine as the probe, clouds of all sizes (their power falls with a power of
    the frequency, as that of carbon black does), things out of focus, slopes, holes and edges."""
    speckle = _cloud(rng, shape, probe * _log_uniform(rng, 0.7, 1.8)) * _log_uniform(rng, 0.01, 0.2)
    thickness = _fractal(rng, shape, rng.uniform(2.0, 4.5), probe) * _log_uniform(rng, 0.05, 0.8)
    tilt = (np.indices(shape) / shape[0] - 0.5).T @ rng.normal(0, 0.4, 2)
    film = np.exp(np.clip(thickness + tilt.T, -2, 2)) * np.maximum(1 + speckle, 0.02)
    if rng.random() < 0.15:  # graphitic: fringes that bend and fade
        angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(3, 9) * probe
        phase = np.tensordot(2 * np.pi / period * np.array([np.sin(angle), np.cos(angle)]), np.indices(shape), 1)
        fringes = np.cos(phase + 2 * _cloud(rng, shape, 8 * probe)) * _cloud(rng, shape, 5 * probe)
        film = film * np.maximum(1 + _log_uniform(rng, 0.01, 0.1) * fringes, 0.02)
    if rng.random() < 0.3:  # heavier things above or below the focus: no columns that could be placed
        blurred = np.zeros(shape)
        some = rng.poisson(_log_uniform(rng, 2, 40) * (shape[0] / (64 * probe)) ** 2)
        blurred[tuple(rng.integers(0, shape[0], (2, some)))] = rng.uniform(0.3, 1.0, some)
        size = rng.uniform(1.9, 3.5) * probe
        film = film + ndimage.gaussian_filter(blurred, size) * 2 * np.pi * size**2 * _log_uniform(rng, 0.03, 0.3)
    if rng.random() < 0.25:  # a rim: vacuum beyond it
        rim = _cloud(rng, shape, rng.uniform(5, 15) * probe)
        film = film * ndimage.gaussian_filter((rim > rng.normal(-0.7, 0.5)).astype(float), rng.uniform(0.7, 4) * probe)
        film = film + 0.02
    return film / float(film.mean())


def _fractal(rng: np.random.Generator, shape: tuple[int, int], fall: float, probe: float) -> Floats:
    """Gaussian noise of unit deviation whose power falls as frequency^-``fall``, seen by a ``probe`` [px]."""
    size = (fft.next_fast_len(shape[0], True), fft.next_fast_len(shape[1], True))
    f2 = fft.fftfreq(size[0])[:, None] ** 2 + fft.rfftfreq(size[1]) ** 2
    f2[0, 0] = np.inf
    spectrum = (
        fft.rfft2(rng.normal(size=size)) * f2 ** (-fall / 4) * np.exp(-2 * np.pi**2 * probe**2 * np.minimum(f2, 1))
    )
    spectrum[0, 0] = 0
    field = fft.irfft2(spectrum, size)[: shape[0], : shape[1]]
    return np.asarray(field / max(1e-12, float(field.std())))


def _cloud(rng: np.random.Generator, shape: tuple[int, int], size: float) -> Floats:
    """Gaussian noise of unit deviation, smoothed by a Gaussian of ``size`` [px]."""
    step = max(1, int(size / 3))
    coarse = rng.normal(size=tuple(-(-n // step) + 8 for n in shape))
    smooth = ndimage.gaussian_filter(coarse, size / step, mode="wrap")
    smooth /= max(1e-12, float(smooth.std()))
    if step > 1:
        smooth = ndimage.zoom(smooth, step, order=1)
    return np.asarray(smooth[: shape[0], : shape[1]])


def _single_atoms(
    rng: np.random.Generator, shape: tuple[int, int], pixel_pm: float, probe: float
) -> tuple[Layout, Floats]:
    """Heavy atoms here and there on a film, some in pairs, rafts or clumps; brightness 1 is that of an ordinary one."""
    ground = _support(rng, shape, probe) * _log_uniform(rng, 0.4, 8.0)
    expected = _log_uniform(rng, 2.0, 40.0) * (shape[0] / (64 * probe)) ** 2
    place = rng.uniform(-2 * probe, np.array(shape) + 2 * probe, (rng.poisson(expected), 2))
    if rng.random() < 0.4:
        beside = place[rng.random(len(place)) < 0.4]
        place = np.concatenate([place, beside + rng.normal(0, 5 * probe, beside.shape)])
    if rng.random() < 0.25:
        for middle in rng.uniform(0, np.array(shape), (rng.integers(1, 5), 2)):
            members = int(rng.integers(3, 12))
            raft = rng.normal(0, rng.uniform(0.8, 2.2) * np.sqrt(members) * probe, (members, 2))
            place = np.concatenate([place, middle + raft])
    under = ground[tuple(np.clip(place.round().astype(int), 0, np.array(shape) - 1).T)]
    place = place[under > _CARRIES * ground.mean()]
    weight = np.exp(rng.normal(0, rng.uniform(0.05, 0.3), len(place)))
    place, weight, spread = _bumps(place, weight, _APART * probe)
    n = len(place)
    width = np.hypot(probe * np.exp(rng.normal(0, rng.uniform(0.02, 0.15), n)), spread)  # not all in focus
    weight *= (probe / width) ** 2
    columns = replace(_blank(shape, pixel_pm), position=place, weight=weight, width=width)
    return replace(columns, site=np.zeros(n, np.int64), grain=np.zeros(n, np.int64)), ground


def _bumps(place: Floats, weight: Floats, distance: float) -> tuple[Floats, Floats, Floats]:
    """Places (m, 2), weights (m,) and extents (m,) of what is seen of atoms at ``place`` (n, 2): those nearer than
    ``distance`` to one another are one."""
    if len(place) < 2:
        return place, weight, np.zeros(len(place))
    one, other = cKDTree(place).query_pairs(distance, output_type="ndarray").T
    graph = sparse.coo_array((np.ones(len(one)), (one, other)), shape=(len(place),) * 2)
    group = csgraph.connected_components(graph, directed=False)[1]
    total = np.bincount(group, weight)
    middle = np.column_stack([np.bincount(group, weight * along) / total for along in place.T])
    away = ((place - middle[group]) ** 2).sum(axis=1)
    return middle, np.asarray(total), np.asarray(np.sqrt(np.bincount(group, weight * away) / total / 2))


# --------------------------------------------------------------------------------------------------- microscope


def _painted(columns: Layout, shift: Floats) -> Floats:
    """The sum of the columns, the one of weight 1 with peak 1; line r sees all of them moved by ``shift[r]`` [px]."""
    rows, cols = columns.shape
    if len(columns.position) == 0:
        return np.zeros(columns.shape)
    y, x = columns.position.T
    down = np.exp(-0.5 * ((np.arange(rows)[:, None] - y) / columns.width) ** 2) * columns.weight
    along = np.exp(-0.5 * ((np.arange(cols)[:, None] - x) / columns.width) ** 2)
    image = down @ along.T
    if not shift.any():
        return image
    padded = np.pad(image, ((0, 0), (0, fft.next_fast_len(cols + 16, True) - cols)), mode="edge")
    frequency = fft.rfftfreq(padded.shape[1])
    turned = fft.rfft(padded, axis=1) * np.exp(-2j * np.pi * frequency * shift[:, None])
    return np.maximum(fft.irfft(turned, padded.shape[1], axis=1)[:, :cols], 0)


def _exposed(
    rng: np.random.Generator, columns: Layout, ground: Floats, counts: float, probe: float, smoothest: float
) -> tuple[Floats, Floats, tuple[str, ...]]:
    """What the detector writes, where it shows the columns (n, 2), and what was not perfect: ``counts`` is the mean at
    the top of a column of weight 1, ``smoothest`` the strongest smoothing, in widths of the probe."""
    rows = columns.shape[0]
    shift, flaws = np.zeros(rows), []
    if rng.random() < 0.5:
        step = rng.normal(0, _log_uniform(rng, 0.02, 0.25) * probe, rows)
        shift = ndimage.gaussian_filter1d(step, rng.choice([0.01, 1.0, 4.0])) if rng.random() < 0.7 else step
        flaws.append("scan")
    image = _painted(columns, shift)
    shown = _displaced(columns, shift)
    if rng.random() < 0.5:  # the probe's tail
        tail = rng.uniform(0.02, 0.3)
        image = (1 - tail) * image + 9 * tail * ndimage.gaussian_filter(image, np.sqrt(8) * probe, truncate=3)
        flaws.append("tail")
    mean = counts * (image + ground)
    if rng.random() < 0.5:
        mean = mean * (1 + rng.normal(0, _log_uniform(rng, 0.003, 0.05), rows))[:, None]
        flaws.append("lines")
    taken = rng.poisson(np.maximum(mean, 0)).astype(np.float64)
    if rng.random() < 0.4:
        taken += rng.normal(0, _log_uniform(rng, 0.05, 1.0) * np.sqrt(mean.mean() + 0.1), taken.shape)
        flaws.append("readout")
    if rng.random() < 0.15:  # a detector that glows after
        a = rng.uniform(0.1, 0.6)
        taken = ndimage.convolve1d(taken, np.array([0.0, 0.0, 1.0, a, a**2]), axis=1)
        shown[:, 1] += (a + 2 * a**2) / (1 + a + a**2)
        flaws.append("afterglow")
    if rng.random() < 0.25 * smoothest:  # somebody smoothed it
        taken = ndimage.gaussian_filter(taken, rng.uniform(0.3, smoothest) * probe)
        flaws.append("smoothing")
    return taken, shown, tuple(flaws)


def _displaced(columns: Layout, shift: Floats) -> Floats:
    """(n, 2) where columns are seen whose line r is moved by ``shift[r]`` [px]: the mean over their lines, each counted
    by the light that it holds."""
    place = columns.position.copy()
    if shift.any() and len(place):
        away = (np.arange(len(shift)) - place[:, :1]) / columns.width[:, None]
        light = np.exp(-0.5 * away**2) + 1e-300
        place[:, 1] += light @ shift / light.sum(axis=1)
    return place
