"""Where crystals meet: grain boundaries (the lattice turns) and stacking faults (it jumps)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from stemloop.core.structure import Defect, Grain
from stemloop.describe.faults.bonds import Net, crossings
from stemloop.describe.strain import strain_and_rotation

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Grains turned by less than this [rad] and strained by less than this are one crystal, with faults or misfit in it.
_SAME_TURN, _SAME_SIZE = np.deg2rad(3.0), 0.12
#: A bond is of no lattice vector if it misses all by this part of the shorter vector, and by so many deviations of the
#: bonds' own spread; a fault's mean jump must be larger by a quarter.
_JUMP, _DEVIATIONS = 0.2, 5.0
#: A line of fewer bonds, or shorter than this many vectors, is none.
_FEWEST_BONDS, _SHORTEST = 5, 3.0
#: Pieces of a fault are joined over this many vectors if their jumps differ by at most this part of a cell.
_GAP, _SAME_JUMP = 2.5, 0.15
#: Least resultant length of the jumps along a fault (1 if all are equal).
_ALIKE = 0.8
#: A column most of whose bonds jump is itself out of place.
_ODD = 0.7

_EVERY = np.array(list(itertools.product(range(-2, 3), repeat=4)), dtype=np.int64).reshape(-1, 2, 2)
_SIZE = np.rint(np.linalg.det(_EVERY)).astype(np.int64)
#: Other choices of a lattice's vectors, and vectors of every second to fourth point of it.
_MATRICES, _SPARSE = _EVERY[_SIZE == 1], _EVERY[(_SIZE > 1) & (_SIZE <= 4)]


class Turn(NamedTuple):
    """How one lattice becomes another: by a rotation [rad] from +x towards +y and its deviation, after which
    ``misfit`` (the largest principal strain) is left."""

    rotation: float
    sigma: float
    misfit: float


def turn_between(one: Grain, other: Grain) -> Turn:
    """The smallest of the equivalent rotations that take the lattice ``one`` to ``other``.

    All choices of vectors of the other lattice are compared; those that leave the least strain (or 0.05 more, for
    images are distorted) are equivalent by the symmetry of the lattice. A distortion of the size of the strain that is
    left turns vectors by up to half of it, which is in the deviation with those of the vectors.
    """
    rotation, strain = _compared(one.vectors, _MATRICES @ other.vectors)
    alike = np.flatnonzero(strain < strain.min() + 0.05)
    best = alike[np.argmin(np.abs(rotation[alike]))]
    misfit = float(strain[best])
    sigma = np.linalg.norm([_turn_sigma(one), _turn_sigma(other), misfit / 2])
    return Turn(float(rotation[best]), float(sigma), misfit)


def _compared(vectors: Floats, choices: Floats) -> tuple[Floats, Floats]:
    """Rotation (m,) [rad] and largest principal strain (m,) that take ``vectors`` to each of ``choices`` (m, 2, 2)."""
    values, rotation = strain_and_rotation(np.swapaxes(np.linalg.inv(vectors) @ choices, -1, -2))
    mean, half = (values[:, 0] + values[:, 1]) / 2, np.hypot((values[:, 0] - values[:, 1]) / 2, values[:, 2])
    return rotation, np.abs(mean) + half


def _commensurate(one: Grain, other: Grain) -> bool:
    """Whether one lattice is every second, third or fourth point of the other: the same crystal, seen more coarsely."""
    for fine, coarse in ((one, other), (other, one)):
        rotation, strain = _compared(coarse.vectors, _SPARSE @ fine.vectors)
        if ((np.abs(rotation) < _SAME_TURN) & (strain < _SAME_SIZE)).any():
            return True
    return False


def _turn_sigma(grain: Grain) -> float:
    """Deviation of a lattice's rotation: the mean of its two vectors' directions."""
    relative = np.sqrt((grain.sigma**2).mean(axis=1)) / np.hypot(*grain.vectors.T)
    return float(np.hypot(*relative) / 2)


def primitive(grain: Grain) -> tuple[Grain, Integers]:
    """The grain with its shortest vectors, and for each of its sites (k,) the first site that is alike.

    A cell may be larger than what repeats: a centred cell, or one that noise made appear doubled. Differences of places
    that take every site to one about as bright (within a quarter) are lattice vectors too.
    """
    basis, bright = grain.basis, grain.amplitude
    first = np.arange(len(basis))
    shifts = []
    near = 0.1 * float(np.hypot(*grain.vectors.T).min()) / np.sqrt(len(basis))
    for shift in basis[1:] - basis[0]:
        away = basis[:, None, :] + shift - basis[None, :, :]
        away = np.hypot(*np.moveaxis((away - np.rint(away)) @ grain.vectors, -1, 0))
        to = away.argmin(axis=1)
        if (away.min(axis=1) < near).all() and (np.abs(bright[to] - bright) < 0.25 * np.abs(bright)).all():
            shifts.append(np.rint(shift * len(basis)) / len(basis))
            for s, t in enumerate(to):
                first[first == first[max(s, t)]] = min(first[s], first[t])
    if not shifts:
        return grain, first.astype(np.int64)
    choices = np.array([np.array(c) for c in itertools.product((-1, 0, 1), repeat=2)], dtype=np.float64)
    every = np.concatenate([choices, *(choices + shift for shift in shifts)])
    every = every[np.argsort(np.hypot(*(every @ grain.vectors).T), kind="stable")][1:]
    size = 1 / (len(shifts) + 1)
    one = every[0]
    two = next(v for v in every if abs(abs(one[0] * v[1] - one[1] * v[0]) - size) < 0.01)
    change = np.stack([one, two if one[0] * two[1] > one[1] * two[0] else -two])
    sigma = np.sqrt(change**2 @ grain.sigma**2)
    return replace(grain, vectors=change @ grain.vectors, sigma=sigma), first.astype(np.int64)


def crystals(grains: tuple[Grain, ...]) -> tuple[Integers, Integers]:
    """Which grains are one crystal: for each the number of the largest like it, and the (2, 2) whole-number change of
    its vectors into that one's. The grains are primitive. Twins that a strain relates, such as the variants of a
    ferroelastic, are one crystal."""
    first = np.arange(len(grains))
    change = np.tile(np.eye(2, dtype=np.int64), (len(grains), 1, 1))
    for k in range(1, len(grains)):
        for j in sorted(set(first[:k].tolist())):
            rotation, strain = _compared(grains[j].vectors, _MATRICES @ grains[k].vectors)
            strain = np.where(np.abs(rotation) < _SAME_TURN, strain, np.inf)
            if strain.min() < _SAME_SIZE:
                first[k], change[k] = j, _MATRICES[strain.argmin()]
                break
    return first, change


def grain_boundaries(position: Floats, crystal: Integers, grains: tuple[Grain, ...], whole: Net) -> tuple[Defect, ...]:
    """Lines between crystals that are turned against each other.

    Parameters
    ----------
    position : (n, 2) [px] and crystal : (n,) number of the grain of each point of the net ``whole``.

    Returns
    -------
    Defects of kind ``grain-boundary``: place, the line in order; detail ``grains``, ``misorientation_deg`` (the
    smallest equivalent turn, without sign) with ``sigma_deg``, ``misfit`` (the strain that is left between the two
    lattices) and ``length_px``.
    """
    found = []
    turns: dict[tuple[int, int], Turn | None] = {}
    pair = np.sort(crystal[whole.bond], axis=1)
    for line, _ in crossings(whole, pair[:, 0] != pair[:, 1]):
        one, other = (int(g) for g in pair[line[0]])
        place = _smooth(position[whole.bond[line]].mean(axis=1))
        size = min(float(np.hypot(*grains[g].vectors.T).min()) for g in (one, other))
        if len(line) < _FEWEST_BONDS or _extent(place) < _SHORTEST * size:
            continue
        if (one, other) not in turns:
            alike = _commensurate(grains[one], grains[other])
            turns[one, other] = None if alike else turn_between(grains[one], grains[other])
        turn = turns[one, other]
        if turn is None or abs(turn.rotation) < _SAME_TURN:
            continue
        found.append(
            Defect(
                "grain-boundary",
                place,
                float(1 - 2 * stats.norm.sf(abs(turn.rotation) / max(turn.sigma, 1e-9))),
                {
                    "grains": (one, other),
                    "misorientation_deg": float(np.rad2deg(abs(turn.rotation))),
                    "sigma_deg": float(np.rad2deg(turn.sigma)),
                    "misfit": turn.misfit,
                    "length_px": _length(place),
                },
            )
        )
    return tuple(found)


def jumping(whole: Net, vectors: Floats) -> NDArray[np.bool_]:
    """(e,) bonds that are far from every lattice vector, but for those of columns that are themselves out of place."""
    miss = np.hypot(*(whole.miss @ vectors).T) > _least_jump(whole, vectors)
    points = int(whole.bond.max()) + 1 if len(whole.bond) else 0
    ends = whole.bond.ravel()
    jumps = np.bincount(ends, np.repeat(miss, 2), minlength=points)
    odd = jumps > _ODD * np.bincount(ends, minlength=points)
    return np.asarray(miss & ~odd[whole.bond].any(axis=1))


def _least_jump(whole: Net, vectors: Floats) -> float:
    """How far [px] a bond must be from all lattice vectors."""
    if len(whole.bond) == 0:
        return np.inf
    spread = 1.4826 * float(np.median(np.abs(whole.miss @ vectors)))
    return max(_JUMP * float(np.hypot(*vectors.T).min()), _DEVIATIONS * spread)


def stacking_faults(position: Floats, vectors: Floats, whole: Net) -> tuple[Defect, ...]:
    """Lines across which the lattice jumps by what is no lattice vector.

    Parameters
    ----------
    position : (n, 2) [px] points of the net ``whole``, one to a cell. vectors : (2, 2) the crystal's vectors [px].

    Returns
    -------
    Defects of kind ``stacking-fault`` (antiphase boundaries and inserted layers are such): place, the line in order;
    detail ``displacement`` (row, col) [px] of the side that ``normal`` (row, col) points to against the other, the
    shortest of those that differ by lattice vectors, with ``sigma_px``; ``length_px``; and ``along_scan``: True where
    the line runs along the scan lines and the jump too, which a jump of the probe does as well.
    """
    found = []
    shortest, least = float(np.hypot(*vectors.T).min()), _least_jump(whole, vectors)
    pieces = [_Piece(line, sense) for line, sense in crossings(whole, jumping(whole, vectors)) if len(line) > 1]
    for line, sense in _joined(pieces, position, whole, _GAP * shortest):
        place = _smooth(position[whole.bond[line]].mean(axis=1))
        if len(line) < _FEWEST_BONDS or _extent(place) < _SHORTEST * shortest:
            continue
        phase = _phase(_Piece(line, sense), whole)
        if np.abs(phase).min() < _ALIKE:
            continue
        jump = _shortest(np.angle(phase) / (2 * np.pi), vectors)
        sigma = np.sqrt(-2 * np.log(np.abs(phase).clip(1e-9, 1 - 1e-9)) / len(line)) / (2 * np.pi)
        across = _across(_Piece(line, sense), position, whole)
        step = jump @ vectors
        if np.hypot(*step) < 1.25 * least:
            continue
        sigma_px = float(np.hypot(*(sigma @ np.abs(vectors))))
        along = place[-1] - place[0]
        found.append(
            Defect(
                "stacking-fault",
                place,
                float(1 - 2 * stats.norm.sf(np.hypot(*step) / max(sigma_px, 1e-9))),
                {
                    "displacement": tuple(step.tolist()),
                    "sigma_px": sigma_px,
                    "normal": tuple((across / np.hypot(*across)).tolist()),
                    "length_px": _length(place),
                    "along_scan": bool(abs(along[0]) < 0.05 * abs(along[1]) and abs(step[0]) < 0.2 * abs(step[1])),
                },
            )
        )
    return tuple(found)


class _Piece(NamedTuple):
    """Bonds across a line in order, and the signs with which they all run from one side of it to the other."""

    line: Integers
    sense: Integers


def _phase(piece: _Piece, whole: Net) -> NDArray[np.complex128]:
    """(2,) mean of ``exp(2 pi i t)`` of the jumps t [cells], which does not mind lattice vectors."""
    return np.asarray(np.exp(2j * np.pi * whole.miss[piece.line] * piece.sense[:, None]).mean(axis=0))


def _across(piece: _Piece, position: Floats, whole: Net) -> Floats:
    """(2,) mean way of the bonds [px]."""
    way = position[whole.bond[piece.line, 1]] - position[whole.bond[piece.line, 0]]
    return np.asarray((way * piece.sense[:, None]).mean(axis=0))


def _joined(pieces: list[_Piece], position: Floats, whole: Net, gap: float) -> list[_Piece]:
    """Pieces that end next to each other with the same jump, as one: noise may hide a bond of a fault."""
    whole_lines: list[_Piece] = []
    for piece in sorted(pieces, key=lambda p: -len(p.line)):
        for k, other in enumerate(whole_lines):
            joint = _joint(other, piece, position, whole, gap)
            if joint is not None:
                whole_lines[k] = joint
                break
        else:
            whole_lines.append(piece)
    return whole_lines if len(whole_lines) == len(pieces) else _joined(whole_lines, position, whole, gap)


def _joint(one: _Piece, other: _Piece, position: Floats, whole: Net, gap: float) -> _Piece | None:
    """``one`` and then ``other``, either way round, if they belong together."""
    if _across(one, position, whole) @ _across(other, position, whole) < 0:
        other = _Piece(other.line, -other.sense)
    apart = np.angle(_phase(one, whole) * np.conj(_phase(other, whole))) / (2 * np.pi)
    ways = [
        (a, b)
        for a in (one, _Piece(one.line[::-1], one.sense[::-1]))
        for b in (other, _Piece(other.line[::-1], other.sense[::-1]))
    ]
    ends = [position[whole.bond[[a.line[-1], b.line[0]]]].mean(axis=1) for a, b in ways]
    distance = [float(np.hypot(*(e[0] - e[1]))) for e in ends]
    best = int(np.argmin(distance))
    if distance[best] > gap or np.abs(apart).max() > _SAME_JUMP:
        return None
    a, b = ways[best]
    return _Piece(np.concatenate([a.line, b.line]), np.concatenate([a.sense, b.sense]))


def _shortest(cells: Floats, vectors: Floats) -> Floats:
    """``cells`` (2,) plus the lattice vector that makes it shortest."""
    choices = cells + np.array(list(itertools.product((-1, 0, 1), repeat=2)))
    return np.asarray(choices[np.argmin(np.hypot(*(choices @ vectors).T))])


def _smooth(line: Floats) -> Floats:
    """Each point's mean with those before and after it: a line through bonds zigzags."""
    if len(line) < 3:
        return line
    return np.concatenate([line[:1], (line[:-2] + line[1:-1] + line[2:]) / 3, line[-1:]])


def _length(line: Floats) -> float:
    return float(np.hypot(*np.diff(line, axis=0).T).sum())


def _extent(line: Floats) -> float:
    return float(np.hypot(*np.ptp(line, axis=0)))
