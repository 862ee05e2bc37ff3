"""Walls between the domains of a grid of cells: traced, and what they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import curve_fit

from stemloop.core.structure import Defect
from stemloop.describe.winding import smallest

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: How many cells that are not polar may lie between a wall and each of its domains (the middle of a wide wall).
_BRIDGE = 3
#: How far [cells] on each side of a wall its domains are looked at.
_DEEP = 6
_NEAR_DEG = 20.0


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
    label = np.where(table >= 0, variant[table], -2)
    label = _bridged(label)
    edges = _edges(label)
    found: list[Defect] = []
    for a, b in np.unique(edges.pair, axis=0).tolist():
        own = np.flatnonzero((edges.pair == (a, b)).all(axis=1))
        for path, closed in _paths(edges.ends[own]):
            if len(path) >= fewest:
                line = own[path]
                part = _Edges(*(field[line] for field in edges))
                found.append(_wall(part, closed, label, table, place, vector, sigma, p_variant))
    return found


def _bridged(label: Integers) -> Integers:
    """``label`` grown into the cells that are not polar (-1), a few cells far: each takes its neighbours' majority."""
    label = label.copy()
    for _ in range(_BRIDGE):
        padded = np.pad(label, 1, constant_values=-2)
        near = np.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
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
    place: Floats,
    vector: Floats,
    sigma: Floats,
    p_variant: Floats,
) -> Defect:
    first, second = place[table[tuple(edges.one.T)]], place[table[tuple(edges.other.T)]]
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
    wanted = label[tuple(start.T)]
    cell, edge, depth = [], [], []
    for deep in range(_DEEP):
        inside = ((at >= 0) & (at < label.shape)).all(axis=1)
        safe = np.where(inside[:, None], at, 0)
        alive &= inside & (label[tuple(safe.T)] == wanted)
        cell.append(table[tuple(safe[alive].T)])
        edge.append(np.flatnonzero(alive))
        depth.append(np.full(int(alive.sum()), deep))
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
    """2 xi and its deviation [px] of the profile tanh((x - x0) / xi) of the component that the wall reverses."""
    jump = after - before
    half = float(np.hypot(*jump)) / 2
    cell = np.concatenate([inner.cell, outer.cell])
    x = np.concatenate([inner.away, outer.away])
    if len(x) < 8 or half == 0:
        return np.nan, np.nan
    along = jump / (2 * half)
    y = (vector[cell] - (before + after) / 2) @ along
    noise = np.hypot(*(sigma[cell] * along).T)
    start = (half, 0.0, float(np.median(np.abs(x))) / 4 + 1e-6)

    def profile(x: Floats, size: float, middle: float, xi: float) -> Floats:
        return np.asarray(size * np.tanh((x - middle) / xi))

    try:
        solved, covariance = curve_fit(profile, x, y, start, noise, maxfev=300)
    except RuntimeError:  # it found no least squares: there is no such profile
        return np.nan, np.nan
    xi, left = abs(float(solved[2])), float(np.sqrt(covariance[2, 2]))
    return (2 * xi, 2 * left) if np.isfinite(left) and xi < np.ptp(x) else (np.nan, np.nan)
