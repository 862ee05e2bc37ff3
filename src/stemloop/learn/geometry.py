"""Where a strained, turned lattice puts its reflections, and what mirrors do to its labels.

A crystal place is described by the deformation ``F`` (2, 2) on (x, y) that carries the reference lattice (along +x of
the image) to the lattice there. Its left polar decomposition ``F = V R(phi)`` holds the stretch ``V`` in image axes
and the whole rotation ``phi`` (from +x towards +y, y down). Reflections move as ``g = F^-T g0 = V^-1 R(phi) g0``.
The four numbers ``(v_mean, v_diff, v_xy, phi)`` with ``V = 1 + [[v_mean + v_diff, v_xy], [v_xy, v_mean - v_diff]]``
are what a pattern shows directly; :func:`strain_of` turns them into the strain against a known reference rotation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Canonical patterns: 64 x 64 pixels of exactly 1/32 A^-1 with the undiffracted beam at index (32, 32).
SIZE = 64
CENTRE = 32
PIXEL_PER_A = 1.0 / 32.0

#: In-plane lattice constants [A] and the kind of lattice, a along +x.
LATTICES = {"MoS2": (3.16, "hexagonal"), "graphene": (2.46, "hexagonal"), "SrTiO3": (3.905, "square")}
#: Reflections farther out [1/A] than this are not looked at.
REACH_PER_A = {"MoS2": 0.80, "graphene": 0.95, "SrTiO3": 0.93}


def reflections(phase: str) -> Array:
    """(m, 2) reciprocal vectors (x, y) [1/A] of the reference lattice of ``phase``, nearest first, (0, 0) among them.

    >>> len(reflections("graphene"))
    19
    """
    a, kind = LATTICES[phase]
    b1, b2 = ((1 / a, 0.0), (0.0, 1 / a)) if kind == "square" else ((1 / a, -1 / a / 3**0.5), (0.0, 2 / a / 3**0.5))
    h, k = np.meshgrid(np.arange(-6, 7), np.arange(-6, 7), indexing="ij")
    g = h.reshape(-1, 1) * np.array(b1) + k.reshape(-1, 1) * np.array(b2)
    length = np.hypot(g[:, 0], g[:, 1])
    order = np.lexsort((np.arctan2(g[:, 1], g[:, 0]).round(6), length.round(6)))
    return np.asarray(g[order][length[order] <= REACH_PER_A[phase]], dtype=np.float64)


def rotation(phi: Array) -> Array:
    """(..., 2, 2) matrices on (x, y) that turn by ``phi`` [rad] from +x towards +y."""
    c, s = np.cos(phi), np.sin(phi)
    return np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)


def polar(deformation: Array) -> Array:
    """(n, 4) ``(v_mean, v_diff, v_xy, phi)`` of deformations (n, 2, 2): ``F = V R(phi)``.

    >>> polar(np.array([[[1.02, 0.0], [0.0, 0.98]]])).round(3) + 0.0
    array([[0.  , 0.02, 0.  , 0.  ]])
    """
    f = np.asarray(deformation, dtype=np.float64)
    phi = np.arctan2(f[:, 1, 0] - f[:, 0, 1], f[:, 0, 0] + f[:, 1, 1])
    v = f @ np.swapaxes(rotation(phi), -1, -2)
    return np.stack([(v[:, 0, 0] + v[:, 1, 1]) / 2 - 1, (v[:, 0, 0] - v[:, 1, 1]) / 2, v[:, 0, 1], phi], axis=1)


def deformation(stretch: Array) -> Array:
    """(n, 2, 2) ``F = V R(phi)`` of ``stretch`` (n, 4) ``(v_mean, v_diff, v_xy, phi)``; inverse of :func:`polar`."""
    m, d, s = stretch[:, 0], stretch[:, 1], stretch[:, 2]
    v = np.stack([np.stack([1 + m + d, s], -1), np.stack([s, 1 + m - d], -1)], -2)
    return np.asarray(v @ rotation(stretch[:, 3]), dtype=np.float64)


def strain_of(stretch: Array, rotation_rad: float) -> Array:
    """(n, 4) ``(e_mean, e_diff, e_xy, w)`` against a reference lattice turned by ``rotation_rad``.

    The lattice is ``(1 + e + W) R(rotation_rad)`` with ``W`` antisymmetric, as in :mod:`stemloop.core.structure`, so
    ``1 + e + W = V R(phi - rotation_rad)`` exactly, for rotations that are not small too.
    """
    rest = np.column_stack([stretch[:, :3], stretch[:, 3] - rotation_rad])
    h = deformation(rest) - np.eye(2)
    return np.stack(
        [
            (h[:, 0, 0] + h[:, 1, 1]) / 2,
            (h[:, 0, 0] - h[:, 1, 1]) / 2,
            (h[:, 0, 1] + h[:, 1, 0]) / 2,
            (h[:, 1, 0] - h[:, 0, 1]) / 2,
        ],
        axis=1,
    )


def turned(stretch: Array, angle_rad: float) -> Array:
    """The labels after the whole pattern was turned by ``angle_rad``: ``V`` becomes ``R V R^T``, ``phi`` grows."""
    c, s = np.cos(2 * angle_rad), np.sin(2 * angle_rad)
    d, xy = stretch[:, 1], stretch[:, 2]
    return np.stack([stretch[:, 0], c * d - s * xy, s * d + c * xy, stretch[:, 3] + angle_rad], axis=1)


#: Exact symmetries of label and pattern: name -> signs of (v_mean, v_diff, v_xy, phi, tilt_y, tilt_x).
MIRRORS = {
    "none": (1, 1, 1, 1, 1, 1),
    "x": (1, 1, -1, -1, 1, -1),
    "y": (1, 1, -1, -1, -1, 1),
    "half-turn": (1, 1, 1, 1, -1, -1),
}


def mirrored(patterns: NDArray[np.float32], labels: Array, mirror: str) -> tuple[NDArray[np.float32], Array]:
    """Patterns (n, 64, 64) and labels (n, 6) ``(v_mean, v_diff, v_xy, phi, tilt_y, tilt_x)`` after a mirror.

    ``"x"`` sends +x to -x about the undiffracted beam, ``"y"`` +y to -y, ``"half-turn"`` both. Row and column 0 have
    no partner on this grid and stay where they are; nothing looks at them (:func:`stemloop.learn.features.disc_maps`).
    """
    if mirror in ("x", "half-turn"):
        patterns = np.roll(patterns[:, :, ::-1], 1, axis=2)
    if mirror in ("y", "half-turn"):
        patterns = np.roll(patterns[:, ::-1, :], 1, axis=1)
    return patterns, labels * np.array(MIRRORS[mirror], dtype=np.float64)


def transposed(patterns: NDArray[np.float32], labels: Array) -> tuple[NDArray[np.float32], Array]:
    """Patterns and labels after x and y were exchanged: a symmetry of square lattices only."""
    swapped = labels[:, [0, 1, 2, 3, 5, 4]] * np.array([1, -1, 1, -1, 1, 1])
    return np.swapaxes(patterns, 1, 2), swapped
