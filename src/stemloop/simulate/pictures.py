"""Counted images of atom columns whose truth is known: layouts of crystal planes, and their exposure.

A column is a Gaussian (with a faint wider one under it, the probe's tail). No multislice calculation, but what the
description of images is trained on and measured against: every position, site and vacancy in it is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError, UnknownName

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
#: Moves points (n, 2) (row, col) [px]; a displacement field u gives ``points + u(points)``.
Warp = Callable[[Floats], Floats]

#: Mean counts at the top of a unit-weight column, per electron of dose through a square of 1 A: 18 counts at
#: 1e4 e/A^2 and 15 pm a pixel.
PEAK_OF_DOSE = 0.0796


@dataclass(frozen=True)
class Plane:
    """A crystal seen along a zone axis, as a lattice of columns.

    vectors_pm : (2, 2) rows a1, a2 as (row, col) [pm], a1 along +x (columns). basis : (k, 2) fractional places of the
    sites of a cell. weight : (k,) brightness, the brightest 1. width_pm : (k,) Gaussian width [pm].
    """

    name: str
    vectors_pm: Floats
    basis: Floats
    weight: Floats
    width_pm: Floats


def _plane(
    name: str, across: tuple[float, float], down: tuple[float, float], *sites: tuple[float, float, float]
) -> Plane:
    """``across`` and ``down`` are (row, col) [pm]; a site is (fraction of a1, fraction of a2, weight)."""
    table = np.array(sites, dtype=np.float64)
    weight = table[:, 2] / table[:, 2].max()
    return Plane(name, np.array([across, down], dtype=np.float64), table[:, :2], weight, 42.0 + 3.0 * weight)


def _hexagonal(a: float) -> tuple[tuple[float, float], tuple[float, float]]:
    return (0.0, a), (a * np.sqrt(3) / 2, a / 2)


_A_STO = 390.5
#: Weights go as the sum of Z^1.7 over a column per length of it; oxygen columns are left out where they are alone.
PLANES: dict[str, Plane] = {
    plane.name: plane
    for plane in (
        _plane("SrTiO3[001]", (0, _A_STO), (_A_STO, 0), (0, 0, 486.0), (0.5, 0.5, 226.0)),
        _plane("SrTiO3[110]", (0, _A_STO), (_A_STO / np.sqrt(2), 0), (0, 0, 520.0), (0.5, 0, 192.0)),
        _plane("PbTiO3[100]", (0, 390.4), (415.2, 0), (0, 0, 1840.0), (0.5, 0.5, 226.0)),
        _plane("LaCoO3[001]", (0, 382.0), (382.0, 0), (0, 0, 937.0), (0.5, 0.5, 307.0)),
        _plane("BaTiO3[100]", (0, 399.4), (403.8, 0), (0, 0, 913.0), (0.5, 0.5, 226.0)),
        _plane("TiO2[001]", (0, 459.4), (459.4, 0), (0, 0, 1.0), (0.5, 0.5, 1.0)),
        _plane("ZnO[0001]", *_hexagonal(325.0), (0, 0, 1.0), (1 / 3, 1 / 3, 1.0)),
        _plane("graphene", *_hexagonal(246.1), (0, 0, 1.0), (1 / 3, 1 / 3, 1.0)),
        _plane("MoS2", *_hexagonal(316.0), (0, 0, 576.0), (1 / 3, 1 / 3, 223.0)),
        _plane("WSe2", *_hexagonal(328.2), (0, 0, 1490.0), (1 / 3, 1 / 3, 830.0)),
        _plane("Fe[001]", (0, 286.6), (286.6, 0), (0, 0, 1.0), (0.5, 0.5, 1.0)),
        _plane("Fe[110]", (0, 286.6), (405.3, 0), (0, 0, 1.0), (0.5, 0.5, 1.0)),
        _plane("Au[001]", (0, 288.4), (288.4, 0), (0, 0, 1.0), (0.5, 0.5, 1.0)),
        _plane("Au[110]", (0, 407.8), (288.4, 0), (0, 0, 1.0), (0.5, 0.5, 1.0)),
        _plane("Si[110]", (0, 384.0), (543.1, 0), (0, 0, 1.0), (0, 0.25, 1.0), (0.5, 0.5, 1.0), (0.5, 0.75, 1.0)),
        _plane(
            "GaAs[110]", (0, 399.8), (565.3, 0), (0, 0, 342.0), (0, 0.25, 395.0), (0.5, 0.5, 342.0), (0.5, 0.75, 395.0)
        ),
    )
}


@dataclass(frozen=True)
class Layout:
    """Columns on a field of ``shape`` (rows, columns) [px] of ``pixel_pm`` [pm].

    position : (n, 2) (row, col) [px]. site, grain : (n,) int. cell : (n, 2) int. weight : (n,) brightness.
    width : (n,) [px]. vacant, vacant_site : the places (m, 2) from which a column was taken, and of which kind.
    """

    shape: tuple[int, int]
    pixel_pm: float
    position: Floats
    site: Integers
    grain: Integers
    cell: Integers
    weight: Floats
    width: Floats
    vacant: Floats = field(default_factory=lambda: np.zeros((0, 2)))
    vacant_site: Integers = field(default_factory=lambda: np.zeros(0, np.int64))

    def take(self, kept: NDArray[np.bool_] | Integers) -> Layout:
        """The columns at ``kept``."""
        parts: dict[str, Any] = {
            n: getattr(self, n)[kept] for n in ("position", "site", "grain", "cell", "weight", "width")
        }
        return replace(self, **parts)


def layout(
    plane: str | Plane,
    shape: tuple[int, int],
    pixel_pm: float,
    rotation_rad: float = 0.0,
    warp: Warp | None = None,
    grain: int = 0,
    margin: float = 1.0,
) -> Layout:
    """A perfect plane over the whole field, turned about its middle, then moved by ``warp``.

    Parameters
    ----------
    plane : a name of :data:`PLANES`, or a plane. rotation_rad : positive from +x towards +y (down).
    warp : takes places (n, 2) [px] and gives the moved places. grain : number given to all columns.
    margin : columns nearer to the border than this [px] are left out (negative: kept beyond it).
    """
    if isinstance(plane, str):
        if plane not in PLANES:
            raise UnknownName(f"no plane is called {plane!r}; known: {', '.join(PLANES)}.")
        plane = PLANES[plane]
    if min(shape) < 8 or pixel_pm <= 0:
        raise InputError(f"a picture needs at least 8 x 8 px of positive size; got {shape} px of {pixel_pm} pm.")
    c, s = np.cos(rotation_rad), np.sin(rotation_rad)
    turn = np.array([[c, s], [-s, c]])  # (row, col) -> (row c + col s, col c - row s)
    vectors = plane.vectors_pm / pixel_pm @ turn.T
    half = (np.array(shape) - 1) / 2
    reach = 1.25 * np.hypot(*half) + 8  # room for the warp
    most = int(np.ceil(reach * np.abs(np.linalg.inv(vectors)).sum(axis=0).max())) + 1
    i, j = (v.ravel() for v in np.meshgrid(np.arange(-most, most + 1), np.arange(-most, most + 1), indexing="ij"))
    cell = np.repeat(np.column_stack([i, j]), len(plane.basis), axis=0)
    site = np.tile(np.arange(len(plane.basis)), len(i))
    position = (cell + plane.basis[site]) @ vectors + half
    if warp is not None:
        position = np.asarray(warp(position), dtype=np.float64)
    inside = ((position >= margin) & (position <= np.array(shape) - 1 - margin)).all(axis=1)
    position, site, cell = position[inside], site[inside].astype(np.int64), cell[inside].astype(np.int64)
    return Layout(
        shape,
        pixel_pm,
        position,
        site,
        np.full(len(site), grain, np.int64),
        cell,
        plane.weight[site],
        plane.width_pm[site] / pixel_pm,
    )


def joined(*parts: Layout) -> Layout:
    """Several layouts on one field (grains, phases) as one."""
    names = ("position", "site", "grain", "cell", "weight", "width", "vacant", "vacant_site")
    together: dict[str, Any] = {n: np.concatenate([getattr(p, n) for p in parts]) for n in names}
    return replace(parts[0], **together)


def without(whole: Layout, share: float, site: int, rng: np.random.Generator) -> Layout:
    """Takes each column of ``site`` out with the chance ``share`` and notes its place as vacant."""
    gone = (whole.site == site) & (rng.random(len(whole.site)) < share)
    left = whole.take(~gone)
    return replace(
        left,
        vacant=np.concatenate([whole.vacant, whole.position[gone]]),
        vacant_site=np.concatenate([whole.vacant_site, whole.site[gone]]),
    )


def jittered(whole: Layout, sigma_pm: float, rng: np.random.Generator) -> Layout:
    """Static disorder: every coordinate moves by a Gaussian of ``sigma_pm``."""
    return replace(whole, position=whole.position + rng.normal(0, sigma_pm / whole.pixel_pm, whole.position.shape))


def mean_image(
    whole: Layout,
    dose: float,
    background: float = 0.1,
    tail: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    row_jitter: Floats | None = None,
) -> Floats:
    """Mean counts (rows, columns).

    Parameters
    ----------
    dose : electrons per A^2; a column of weight 1 has ``PEAK_OF_DOSE * dose * pixel^2`` counts at its top.
    background : of that peak. tail : share of a column's peak in a Gaussian of three times its width.
    shift : (row, col) [px] by which the whole specimen is displaced.
    row_jitter : (rows,) displacement [px] along x of what each scan line sees.
    """
    peak = dose * (whole.pixel_pm / 100) ** 2 * PEAK_OF_DOSE
    image = np.full(whole.shape, background * peak)
    offset = np.zeros(whole.shape[0]) if row_jitter is None else np.asarray(row_jitter, dtype=np.float64)
    place = whole.position + np.asarray(shift, dtype=np.float64)
    _add(image, place, whole.weight * peak * (1 - tail), whole.width, offset)
    if tail:
        _add(image, place, whole.weight * peak * tail, 3 * whole.width, offset)
    return image


def counted(mean: Floats, rng: np.random.Generator, read_noise: float = 0.0) -> Floats:
    """Poisson counts of ``mean``, with Gaussian ``read_noise`` [counts] on top."""
    image = rng.poisson(mean).astype(np.float64)
    return image + rng.normal(0, read_noise, mean.shape) if read_noise else image


def _add(image: Floats, position: Floats, amplitude: Floats, width: Floats, offset: Floats) -> None:
    """Adds Gaussians, each within six widths, to ``image``; line r sees them moved by ``offset[r]`` along x."""
    rows, columns = image.shape
    for (y, x), a, w in zip(position, amplitude, width, strict=True):
        reach = int(np.ceil(6 * w))
        top, bottom = max(0, int(y) - reach), min(rows, int(y) + reach + 2)
        left, right = max(0, int(x) - reach), min(columns, int(x) + reach + 2)
        if top >= bottom or left >= right:
            continue
        r, c = np.arange(top, bottom), np.arange(left, right)
        across = np.exp(-0.5 * ((c[None, :] - x - offset[top:bottom, None]) / w) ** 2)
        image[top:bottom, left:right] += a * np.exp(-0.5 * ((r - y) / w) ** 2)[:, None] * across


def drift(n: int, rng: np.random.Generator, speed: float = 0.3, jumps: int = 0, jump: float = 30.0) -> Floats:
    """(n, 2) shifts [px] of the frames of a stack: a random walk of ``speed`` px a frame with half of it steady, and
    ``jumps`` steps of up to ``jump`` px along each axis; their median is zero."""
    step = rng.normal(0, speed, (n, 2)) + 0.5 * speed * rng.choice([-1.0, 1.0], 2)
    if jumps:
        step[rng.choice(np.arange(1, n), jumps, replace=False)] += rng.uniform(-jump, jump, (jumps, 2))
    shift = np.cumsum(step, axis=0)
    return np.asarray(shift - np.median(shift, axis=0))
