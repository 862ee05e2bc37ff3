"""Learning the matrix that makes fingerprints white: ``python -m stemloop.campaign.images.whitening`` (two minutes).

Random surroundings (planes with columns taken out, replaced, split, moved; halves turned, shifted or of another plane)
are each seen several times: turned, mirrored, at other pixel sizes, probe widths and backgrounds, with slightly wrong
middles and scales, counted at 1e4 e/A^2. The scatter between views of one scene is made white, and the directions are
kept in which scenes differ most.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from stemloop.describe import fingerprints
from stemloop.simulate.pictures import PLANES, Layout, Plane, counted, mean_image

Floats = NDArray[np.float64]
_DOSE = 1e4


def unit_pm(plane: Plane) -> float:
    """Root of the area [pm] that a column of ``plane`` has."""
    return float(np.sqrt(abs(np.linalg.det(plane.vectors_pm)) / len(plane.basis)))


def _whole(plane: Plane, radius_pm: float, site: int, turn: float = 0.0) -> Floats:
    """Columns (n, 4) about a column of ``site`` at the origin: row, col [pm], weight, width [pm]."""
    most = int(np.ceil(radius_pm * np.abs(np.linalg.inv(plane.vectors_pm)).sum(axis=0).max())) + 2
    i, j = (v.ravel() for v in np.meshgrid(np.arange(-most, most + 1), np.arange(-most, most + 1)))
    parts = []
    for k, (b, c) in enumerate(plane.basis - plane.basis[site]):
        place = np.column_stack([i + b, j + c]) @ plane.vectors_pm
        parts.append(np.column_stack([place, np.full((len(i), 2), (plane.weight[k], plane.width_pm[k]))]))
    columns = np.concatenate(parts)
    columns[:, :2] = columns[:, :2] @ _turned(turn)
    return columns[np.hypot(columns[:, 0], columns[:, 1]) < radius_pm]


def _turned(angle: float) -> Floats:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, s], [-s, c]])


def scene(rng: np.random.Generator) -> tuple[Floats, float]:
    """Random surroundings of the origin, columns (n, 4), and their unit [pm]."""
    plane = PLANES[str(rng.choice(list(PLANES)))]
    unit = unit_pm(plane)
    radius = (fingerprints.REACH + 1.5) * unit
    columns = _whole(plane, radius, int(rng.integers(len(plane.basis))))
    away = np.hypot(columns[:, 0], columns[:, 1])
    kind = rng.choice(["perfect", "middle", "middle", "split", "others", "moved", "halves", "dislocation"])
    middle = int(np.argmin(away))
    if kind == "middle":
        columns[middle, 2] *= rng.choice([0.0, rng.uniform(0.3, 2.5)])
    elif kind == "split":
        half = rng.uniform(0.15, 0.35) * unit * np.array([np.cos(t := rng.uniform(0, np.pi)), np.sin(t)])
        pair = columns[[middle, middle]]
        pair[:, :2] += [half, -half]
        columns = np.concatenate([np.delete(columns, middle, axis=0), pair])
    elif kind == "others":
        near = np.flatnonzero(away < fingerprints.REACH * unit)
        some = rng.choice(near, int(rng.integers(1, 4)), replace=False)
        columns[some, 2] *= rng.choice([0.0, 0.4, 2.0], len(some))
    elif kind == "moved":
        columns[:, :2] += rng.normal(0, rng.uniform(0.03, 0.12) * unit, (len(columns), 2))
    elif kind == "halves":
        columns = _halves(columns, plane, radius, rng)
    elif kind == "dislocation":
        core = rng.uniform(-0.7, 0.7, 2) * unit
        angle = np.arctan2(columns[:, 0] - core[0], columns[:, 1] - core[1])
        columns[:, :2] += angle[:, None] / (2 * np.pi) * plane.vectors_pm[rng.integers(2)] @ _turned(0)
    return columns[columns[:, 2] > 0], unit


def _halves(columns: Floats, plane: Plane, radius: float, rng: np.random.Generator) -> Floats:
    """One half replaced by the plane shifted, turned, or by another plane."""
    other = plane if rng.random() < 0.7 else PLANES[str(rng.choice(list(PLANES)))]
    turn = rng.uniform(0, np.pi / 2) if rng.random() < 0.6 else 0.0
    second = _whole(other, 2 * radius, 0, turn)
    second[:, :2] += rng.uniform(0, 1, 2) @ other.vectors_pm
    normal, offset = rng.normal(size=2), rng.uniform(-0.2, 0.8) * radius / 2
    normal /= np.hypot(*normal)
    gap = 0.3 * unit_pm(plane)
    kept = [columns[columns[:, :2] @ normal < offset], second[second[:, :2] @ normal > offset + gap]]
    return np.concatenate(kept)


def view(columns: Floats, unit: float, rng: np.random.Generator, dose: float = _DOSE) -> Floats:
    """Invariants (d,) of one counted image of ``columns``, under random circumstances."""
    pixel = rng.uniform(8, 30)
    half = (fingerprints.REACH + 0.4) * unit / pixel
    shape = (2 * int(np.ceil(half)) + 1,) * 2
    middle = (shape[0] - 1) / 2 + rng.uniform(-0.5, 0.5, 2)
    mirror = np.array([rng.choice([-1.0, 1.0]), 1.0])
    place = (columns[:, :2] * mirror) @ _turned(rng.uniform(0, 2 * np.pi)) + rng.normal(0, 3.0, (len(columns), 2))
    none = np.zeros(len(columns), np.int64)
    wider = rng.uniform(0.9, 1.2)
    seen = Layout(
        shape,
        pixel,
        place / pixel + middle,
        none,
        none,
        np.zeros((len(columns), 2), np.int64),
        columns[:, 2],
        np.maximum(columns[:, 3] * wider / pixel, 0.8),
    )
    image = mean_image(seen, dose, background=rng.uniform(0.05, 0.3), tail=rng.choice([0.0, 0.1]))
    slope = rng.uniform(-0.15, 0.15, 2) / shape[0]
    image *= 1 + (np.indices(shape) - middle[:, None, None]).transpose(1, 2, 0) @ slope
    error = rng.normal(0, 0.03 * unit / pixel, 2)
    scale = unit / pixel * np.exp(rng.normal(0, 0.008))
    width = float(np.median(seen.width)) * np.exp(rng.normal(0, 0.03))
    return fingerprints.invariants_at(counted(image, rng), (middle + error)[None], scale, width)[0]


def learn(scenes: int = 1500, views: int = 6, seed: int = 0) -> fingerprints.Whitening:
    """The matrix from ``scenes`` x ``views`` images."""
    rng = np.random.default_rng(seed)
    raw = np.array([[view(c, u, rng) for _ in range(views)] for c, u in (scene(rng) for _ in range(scenes))])
    mean = raw.mean(axis=1)
    off = (raw - mean[:, None]).reshape(-1, raw.shape[2])
    within = off.T @ off / (scenes * (views - 1))
    within += 0.05 * np.diag(np.diag(within)) + 1e-3 * np.trace(within) / len(within) * np.eye(len(within))
    between = np.cov(mean.T) - within / views
    _, vectors = linalg.eigh(between, within)
    matrix = vectors[:, : -fingerprints.DIMENSION - 1 : -1]
    return fingerprints.Whitening(mean.mean(axis=0), matrix)


def main(out: str | None = None) -> None:
    """Learn, and write the file that :mod:`stemloop.describe.fingerprints` reads."""
    path = Path(out) if out else Path(fingerprints.__file__).with_name("weights") / "fingerprint.npz"
    rule = learn()
    np.savez_compressed(path, middle=rule.middle.astype(np.float32), matrix=rule.matrix.astype(np.float32))


if __name__ == "__main__":
    main(*sys.argv[1:])
