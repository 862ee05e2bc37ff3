"""Known defects planted in a plane of columns, far enough from each other to be told apart."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.simulate.pictures import PLANES, Layout, Plane, Warp, layout

Floats = NDArray[np.float64]

#: What can be planted. The number is the site of the cell that it is on; ``half`` and ``double`` are columns of half
#: and of one and three quarters the brightness, ``split`` two columns in the place of one, along a1.
KINDS = (
    "vacancy-0",
    "vacancy-1",
    "half-0",
    "double-0",
    "double-1",
    "antisite-1",
    "split-0",
    "split-1",
    "interstitial",
    "pair",
    "dislocation",
)


#: Arrangements that are tried before the field is called too small.
_TRIES = 20


class Planted(NamedTuple):
    """``layout`` with one of each kind; ``place`` (row, col) [px] of each."""

    layout: Layout
    place: dict[str, Floats]


def edge_dislocation(core: Floats, burgers: Floats, poisson: float = 0.3) -> Warp:
    """Moves a perfect lattice as an edge dislocation at ``core`` with the Burgers vector ``burgers`` (row, col) [px] in
    an isotropic medium does (J. P. Hirth, J. Lothe, Theory of Dislocations (1982), eq. 3-45)."""
    size = float(np.hypot(*burgers))
    along = np.asarray(burgers) / size
    across = np.array([along[1], -along[0]])

    def warp(points: Floats) -> Floats:
        x, y = (points - core) @ along, (points - core) @ across
        r2 = np.maximum(x**2 + y**2, (0.1 * size) ** 2)
        u = np.arctan2(y, x) + x * y / (2 * (1 - poisson) * r2)
        v = -((1 - 2 * poisson) * np.log(r2 / size**2) + (x**2 - y**2) / r2) / (4 * (1 - poisson))
        moved = (u[:, None] * along + v[:, None] * across) * size / (2 * np.pi)
        return np.asarray(points + moved)

    return warp


def planted(
    plane: str | Plane,
    shape: tuple[int, int],
    pixel_pm: float,
    rotation_rad: float,
    kinds: tuple[str, ...],
    rng: np.random.Generator,
    apart: float = 4.6,
    margin: float = 3.2,
) -> Planted:
    """A plane with one defect of each of ``kinds``, at random places at least ``apart`` from each other and ``margin``
    from the border, both in spacings (roots of the area of a column).

    Raises InputError where the field has no room for them, or a kind is unknown or needs a second site.
    """
    plane = PLANES[plane] if isinstance(plane, str) else plane
    unknown = [k for k in kinds if k not in KINDS or (k.endswith("-1") and len(plane.basis) < 2)]
    if unknown:
        raise InputError(f"{unknown[0]!r} cannot be planted in {plane.name}; known: {', '.join(KINDS)}.")
    unit = np.sqrt(abs(np.linalg.det(plane.vectors_pm)) / len(plane.basis)) / pixel_pm
    c, s = np.cos(rotation_rad), np.sin(rotation_rad)
    vectors = plane.vectors_pm / pixel_pm @ np.array([[c, -s], [s, c]])  # rows (row, col), turned from +x to +y
    for _ in range(_TRIES):
        whole, places = layout(plane, shape, pixel_pm, rotation_rad), dict[str, Floats]()
        for kind in sorted(kinds, key=lambda k: k != "dislocation"):
            free = _free(whole, int(kind.endswith("-1")), places, apart * unit, margin * unit)
            if len(free) == 0:
                break
            at = int(rng.choice(free))
            places[kind] = whole.position[at].copy()
            if kind == "dislocation":
                places[kind] += 0.25 * vectors[0] + 0.25 * vectors[1]
                warp = edge_dislocation(places[kind], vectors[0])
                whole = layout(plane, shape, pixel_pm, rotation_rad, warp)
            else:
                whole, places[kind] = _changed(whole, at, kind, vectors, unit)
        else:
            return Planted(whole, places)
    raise InputError(f"a field of {shape} px has no room for {len(kinds)} defects {apart} spacings apart; enlarge it.")


def _free(whole: Layout, site: int, taken: dict[str, Floats], apart: float, margin: float) -> NDArray[np.int64]:
    """Columns of ``site`` that are far from the border and from all that is planted already."""
    room = (whole.position > margin).all(axis=1) & (whole.position < np.array(whole.shape) - 1 - margin).all(axis=1)
    room &= whole.site == site
    for kind, place in taken.items():
        room &= np.hypot(*(whole.position - place).T) > (1.5 * apart if kind == "dislocation" else apart)
    return np.flatnonzero(room)


def _changed(whole: Layout, at: int, kind: str, vectors: Floats, unit: float) -> tuple[Layout, Floats]:
    place, weight = whole.position[at].copy(), whole.weight.copy()
    everything = np.arange(len(weight))
    if kind.startswith("vacancy"):
        return _without(whole, [at]), place
    if kind == "pair":
        away = np.hypot(*(whole.position - place).T)
        away[at] = np.inf
        other = int(np.argmin(away))
        return _without(whole, [at, other]), (place + whole.position[other]) / 2
    if kind.startswith("split"):
        half = 0.27 * unit * vectors[0] / np.hypot(*vectors[0])
        two = whole.take(np.append(everything, at))
        position = two.position.copy()
        position[[at, -1]] = place + half, place - half
        return replace(two, position=position), place
    if kind == "interstitial":
        more = whole.take(np.append(everything, at))
        position = more.position.copy()
        position[-1] = place + 0.5 * vectors[0]
        return replace(more, position=position), position[-1].copy()
    antisite = float(np.median(whole.weight[whole.site == 0]))
    weight[at] = {"half-0": 0.5 * weight[at], "antisite-1": antisite}.get(kind, 1.75 * weight[at])
    return replace(whole, weight=weight), place


def _without(whole: Layout, gone: list[int]) -> Layout:
    left = whole.take(np.setdiff1d(np.arange(len(whole.weight)), gone))
    return replace(
        left,
        vacant=np.concatenate([whole.vacant, whole.position[gone]]),
        vacant_site=np.concatenate([whole.vacant_site, whole.site[gone]]),
    )
