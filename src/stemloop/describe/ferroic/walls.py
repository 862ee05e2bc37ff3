"""Walls between the domains of a grid of cells: traced, and what they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from stemloop.core.structure import Defect
from stemloop.describe.ferroic.winding import smallest

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: How many cells that are not polar may lie between a wall and each of its domains (the middle of a wide wall).
_BRIDGE = 3
#: How far [cells] on each side of a wall its domains are looked at.
_DEEP = 6
_NEAR_DEG = 20.0
#: A domain has at least this many cells.
_SMALLEST = 6


class _Edges(NamedTuple):
    """Pairs of neighbouring cells of different variants: ``one`` and ``other`` (n, 2) grid places, the variant of
    ``one`` the smaller; ``ends`` (n, 2, 2) grid corners between which the wall runs there; ``pair`` (n, 2)."""

    one: Integers
    other: Integers
    ends: Integers
    pair: Integers


def walls_of(
    table: Integers,
    place: Floats,
    vector: Floats,
    sigma: Floats,
    variant: Integers,
    p_variant: Floats,
    fewest: int,
) -> list[Defect]:
    """Walls of one grid; ``table`` (rows, columns) says which cell lies where, -1 where none."""
    if not table.size or p_variant.shape[1] < 2:
        return []
    label = _without_islands(np.where(table >= 0, variant[table], -2))
    label[(label == -2) & (_around(table >= 0).sum(axis=0) >= 3)] = -1  # single cells that were not measured
    label = _bridged(label)
    where = _places(table, place)
    edges = _edges(label)
    found: list[Defect] = []
    for a, b in np.unique(edges.pair, axis=0).tolist():
        own = np.flatnonzero((edges.pair == (a, b)).all(axis=1))
        for path, closed in _paths(edges.ends[own]):
            line = own[path]
            if (
                len(path) >= fewest
                and np.isfinite(where[tuple(edges.one[line].T)] + where[tuple(edges.other[line].T)]).all()
            ):
                part = _Edges(*(field[line] for field in edges))
                found.append(_wall(part, closed, label, table, where, place, vector, sigma, p_variant))
    return found


def _without_islands(label: Integers) -> Integers:
    """``label`` with domains of a few cells taken out (-1)."""
    label = label.copy()
    for v in range(int(label.max(initial=-1)) + 1):
        number, _ = ndimage.label(label == v)
        label[(number > 0) & (np.bincount(number.ravel())[number] < _SMALLEST)] = -1
    return label


def _around(grid: NDArray[Any], outside: Any = 0) -> NDArray[Any]:
    """(4, ...) the values before and after each place along both axes."""
    padded = np.pad(grid, ((1, 1), (1, 1), *((0, 0),) * (grid.ndim - 2)), constant_values=outside)
    return np.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])


def _places(table: Integers, place: Floats) -> Floats:
    """(rows, columns, 2) where each cell lies; where none was measured, midway between those on its two sides."""
    where = np.where((table >= 0)[..., None], place[table], np.nan)
    before, after, left, right = _around(where, np.nan)
    pairs = np.stack([(before + after) / 2, (left + right) / 2])
    there = np.isfinite(pairs)
    mean = np.where(there, pairs, 0.0).sum(axis=0) / np.maximum(there.sum(axis=0), 1)
    return np.where((table < 0)[..., None] & there.any(axis=0), mean, where)


def _bridged(label: Integers) -> Integers:
    """``label`` grown into the cells that are not polar (-1), a few cells far: each takes its neighbours' majority."""
    label = label.copy()
    for _ in range(_BRIDGE):
        near = _around(label, -2)
        votes = np.stack([(near == v).sum(axis=0) for v in range(int(label.max(initial=-1)) + 1)] or [near[0] * 0])
        grown = (label == -1) & (votes.max(axis=0) > 0)
        label[grown] = votes.argmax(axis=0)[grown]
    return label


def _edges(label: Integers) -> _Edges:
    one, other, ends = [], [], []
    for axis in (0, 1):
        first, second = np.delete(label, -1, axis), np.delete(label, 0, axis)
        at = np.argwhere((first != second) & (first >= 0) & (second >= 0))
        step = np.eye(2, dtype=np.int64)
        swapped = (first[tuple(at.T)] > second[tuple(at.T)])[:, None]
        one.append(np.where(swapped, at + step[axis], at))
        other.append(np.where(swapped, at, at + step[axis]))
        corner = at + step[axis]
        ends.append(np.stack([corner, corner + step[1 - axis]], axis=1))
    all_one, all_other = np.concatenate(one), np.concatenate(other)
    pair = np.stack([label[tuple(all_one.T)], label[tuple(all_other.T)]], axis=1)
    return _Edges(all_one, all_other, np.concatenate(ends), pair)


def _paths(ends: Integers) -> list[tuple[Integers, bool]]:
    """Edges (n, 2, 2) strung on lines that break where not exactly two meet: (indices in order, closed)."""
    at: dict[tuple[int, int], list[int]] = {}
    corner = [(tuple(a), tuple(b)) for a, b in ends.tolist()]
    for k, both in enumerate(corner):
        for c in both:
            at.setdefault(c, []).append(k)
    free = set(range(len(corner)))
    starts = [(c, k) for c, here in at.items() if len(here) != 2 for k in here]
    paths: list[tuple[Integers, bool]] = []

    def walk(c: tuple[int, int], k: int) -> list[int]:
        path = []
        while k in free:
            free.remove(k)
            path.append(k)
            c = corner[k][1] if corner[k][0] == c else corner[k][0]
            here = at[c]
            if len(here) != 2:
                break
            k = here[0] if here[1] == k else here[1]
        return path

    for c, k in starts:
        if k in free:
            paths.append((np.array(walk(c, k)), False))
    while free:
        k = min(free)
        paths.append((np.array(walk(corner[k][0], k)), True))
    return paths


class _Side(NamedTuple):
    """The cells on one side of a wall: their number, the edge from which they were reached, how many cells deep, and
    how far from the line [px], negative on the first side."""

    cell: Integers
    edge: Integers
    depth: Integers
    away: Floats


def _wall(
    edges: _Edges,
    closed: bool,
    label: Integers,
    table: Integers,
    where: Floats,
    place: Floats,
    vector: Floats,
    sigma: Floats,
    p_variant: Floats,
) -> Defect:
    first, second = where[tuple(edges.one.T)], where[tuple(edges.other.T)]
    line = _softened((first + second) / 2, closed)
    normal = _normals(line, second - first)
    inner = _side(edges.one, edges.other, label, table, place, line, normal)
    outer = _side(edges.other, edges.one, label, table, place, line, normal)
    before, doubt = _mean(inner, vector)
    after, doubt_after = _mean(outer, vector)
    angle = np.rad2deg(abs(float(smallest(np.arctan2(*before) - np.arctan2(*after)))))
    width, width_sigma = _width(inner, outer, before, after, vector, sigma)
    a, b = edges.pair[0].tolist()
    detail: dict[str, Any] = {
        "angle_deg": float(angle),
        "sigma_deg": float(np.rad2deg(np.hypot(doubt, doubt_after))),
        "type": next((str(t) for t in (180, 90) if abs(angle - t) < _NEAR_DEG), str(round(angle))),
        "charge": _charge(before, after, normal),
        "variants": (a, b),
        "cells": len(edges.one),
        "closed": closed,
        "width_px": width,
        "width_sigma_px": width_sigma,
    }
    p = _sure(inner, p_variant[:, a]) * _sure(outer, p_variant[:, b])
    return Defect("domain-wall", np.concatenate([line, line[:1]]) if closed else line, p, detail)


def _softened(line: Floats, closed: bool) -> Floats:
    """The middles of a stair's steps, each averaged with its two neighbours, twice; ends stay."""
    for _ in range(2):
        if closed:
            line = (np.roll(line, 1, axis=0) + 2 * line + np.roll(line, -1, axis=0)) / 4
        else:
            line = np.concatenate([line[:1], (line[:-2] + 2 * line[1:-1] + line[2:]) / 4, line[-1:]])
    return line


def _normals(line: Floats, towards: Floats) -> Floats:
    """(n, 2) unit normals of a line, on the side of ``towards``."""
    slope = np.gradient(line, axis=0)
    normal = np.column_stack([-slope[:, 1], slope[:, 0]])
    normal *= np.where((normal * towards).sum(axis=1) < 0, -1.0, 1.0)[:, None]
    size = np.hypot(*normal.T)[:, None]
    return np.asarray(normal / np.where(size > 0, size, 1.0))


def _side(
    start: Integers, opposite: Integers, label: Integers, table: Integers, place: Floats, line: Floats, normal: Floats
) -> _Side:
    """Cells straight away from a wall as long as they are of the same domain, each counted at its nearest edge."""
    step, at = start - opposite, start
    alive = np.ones(len(start), dtype=bool)
    size = np.array(label.shape)
    wanted = label[tuple(start.T)]
    cell, edge, depth = [], [], []
    for deep in range(_DEEP):
        inside: NDArray[np.bool_] = np.asarray(((at >= 0) & (at < size)).all(axis=1))
        safe = np.where(inside[:, None], at, 0)
        alive &= inside & (label[tuple(safe.T)] == wanted)
        number = table[tuple(safe.T)]
        measured = np.flatnonzero(alive & (number >= 0))
        cell.append(number[measured])
        edge.append(measured)
        depth.append(np.full(len(measured), deep))
        at = at + step
    cells, edges, depths = np.concatenate(cell), np.concatenate(edge), np.concatenate(depth)
    away = ((place[cells] - line[edges]) * normal[edges]).sum(axis=1)
    order = np.lexsort([np.abs(away), cells])
    nearest = order[np.unique(cells[order], return_index=True)[1]]
    return _Side(cells[nearest], edges[nearest], depths[nearest], away[nearest])


def _mean(side: _Side, vector: Floats) -> tuple[Floats, float]:
    """Mean vector behind a wall (its own first cells left out where there are more) and the deviation of its angle."""
    chosen = (side.depth >= 1) & (side.depth <= 4)
    if chosen.sum() < 3:
        chosen = side.depth >= 0
    v = vector[side.cell[chosen]]
    mean = v.mean(axis=0)
    size = float(np.hypot(*mean)) + 1e-12
    across = v @ np.array([-mean[1], mean[0]]) / size
    return mean, float(np.sqrt((across**2).mean() / len(v))) / size


def _sure(side: _Side, p: Floats) -> float:
    """Mean along the wall of the highest probability of the variant straight behind it."""
    best = np.zeros(int(side.edge.max()) + 1)
    np.maximum.at(best, side.edge, p[side.cell])
    return float(best[np.unique(side.edge)].mean())


def _charge(before: Floats, after: Floats, normal: Floats) -> str:
    """Whether the displacement's normal component jumps: a wall that carries bound charge."""
    jump = before - after
    share = float((normal @ jump).mean()) / (float(np.hypot(*jump)) + 1e-12)
    if abs(share) < 0.5:
        return "neutral"
    return "head-to-head" if share > 0 else "tail-to-tail"


def _width(
    inner: _Side, outer: _Side, before: Floats, after: Floats, vector: Floats, sigma: Floats
) -> tuple[float, float]:
    """2 xi and its deviation [px] of the profile tanh((x - x0) / xi) of the component that the wall reverses.

    Mean and deviation of the posterior over xi with every xi up to a third of the depth equally likely beforehand; its
    height is fitted and x0 maximised. An abrupt wall so gives a width of about its deviation.
    """
    jump = after - before
    half = float(np.hypot(*jump)) / 2
    cell = np.concatenate([inner.cell, outer.cell])
    x = np.concatenate([inner.away, outer.away])
    if len(x) < 8 or half == 0:
        return np.nan, np.nan
    along = jump / (2 * half)
    y = (vector[cell] - (before + after) / 2) @ along
    weight = 1 / ((sigma[cell] * along) ** 2).sum(axis=1)
    if len(x) > 600:
        every = -(-len(x) // 600)
        x, y, weight = x[::every], y[::every], weight[::every] * every
    deep = float(np.abs(x).max())
    xi = deep / 3 * (np.arange(40) + 0.5) / 40
    shift = deep / 6 * np.linspace(-1, 1, 13)
    shape = np.tanh((x - shift[:, None]) / xi[:, None, None])  # (xi, x0, points)
    height = (shape * (weight * y)).sum(-1) / np.maximum((shape**2 * weight).sum(-1), 1e-30)
    price = (weight * (y - height[..., None] * shape) ** 2).sum(-1).min(axis=1)
    price = (price - price.min()) / max(1.0, float(price.min()) / max(len(x) - 3, 1))
    likely = np.exp(-price / 2)
    mean = float((likely * xi).sum() / likely.sum())
    return 2 * mean, 2 * float(np.sqrt((likely * (xi - mean) ** 2).sum() / likely.sum()))
