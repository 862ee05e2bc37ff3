"""What a perfect finder and a perfect assignment would say of a layout whose truth is known."""

import numpy as np
from scipy.spatial import cKDTree

from stemloop.core.structure import Assignment, Columns, Grain
from stemloop.simulate.pictures import PEAK_OF_DOSE, Layout


def columns_of(
    layout: Layout, dose: float = 1e4, background: float = 0.1, seed: int = 0, noise: bool = True
) -> Columns:
    """The columns of ``layout`` as they would be found at ``dose`` [e/A^2], each at its precision bound.

    The bound of a Gaussian on a background b under its peak A: (w / sqrt N) sqrt(1 + 4 b / A), N = 2 pi w^2 A counts.
    """
    rng = np.random.default_rng(seed)
    peak = dose * (layout.pixel_pm / 100) ** 2 * PEAK_OF_DOSE
    amplitude = layout.weight * peak
    counts = 2 * np.pi * layout.width**2 * amplitude
    relative = np.sqrt((1 + 4 * background / layout.weight) / counts)
    sigma = (layout.width * relative)[:, None] * np.ones(2)
    position, bright = layout.position, amplitude
    if noise:
        position = position + sigma * rng.standard_normal(position.shape)
        bright = amplitude * (1 + np.sqrt(2) * relative * rng.standard_normal(len(amplitude)))
    return Columns(
        position,
        sigma,
        bright,
        layout.width.copy(),
        layout.site.copy(),
        np.full(len(amplitude), background * peak),
        np.ones(len(amplitude)),
        layout.vacant.copy(),
    )


def assignment_of(layout: Layout, columns: Columns | None = None) -> Assignment:
    """The assignment of ``layout``: sites, cells and grains as they were laid out, places from ``columns``.

    ``ideal`` is the affine fit of the same grain's columns within 1.2 of the longer vector, without the column itself.
    """
    columns = columns_of(layout, noise=False) if columns is None else columns
    n, sites = len(columns), int(layout.site.max()) + 1
    ideal, left = np.full((n, 2), np.nan), np.full((n, 2), np.nan)
    boundary = np.ones(n, dtype=bool)
    grains = []
    for g in sorted(set(layout.grain.tolist()), key=lambda g: -int((layout.grain == g).sum())):
        own = np.flatnonzero(layout.grain == g)
        grain = _grain(layout, columns, own)
        grains.append(grain)
        lattice = layout.cell[own] + grain.basis[layout.site[own]]
        place = columns.position[own]
        near = cKDTree(place).query_ball_point(place, 1.2 * float(np.hypot(*grain.vectors.T).max()))
        taken = {(*cell, site) for cell, site in zip(layout.cell[own].tolist(), layout.site[own].tolist())}
        for k, around in enumerate(near):
            others = np.array([a for a in around if a != k])
            if len(others) < 4:
                continue
            design = np.column_stack([np.ones(len(others)), lattice[others] - lattice[k]])
            if np.linalg.matrix_rank(design) < 3:
                continue
            weights = np.linalg.pinv(design)[0]
            ideal[own[k]] = weights @ place[others]
            left[own[k]] = np.sqrt(columns.sigma[own[k]] ** 2 + weights**2 @ columns.sigma[own[others]] ** 2)
            (i, j), s = layout.cell[own[k]].tolist(), int(layout.site[own[k]])
            beside = [(i + 1, j, s), (i - 1, j, s), (i, j + 1, s), (i, j - 1, s)]
            boundary[own[k]] = not all(b in taken for b in beside)
    order = sorted(set(layout.grain.tolist()), key=lambda g: -int((layout.grain == g).sum()))
    number = {g: k for k, g in enumerate(order)}
    return Assignment(
        np.array([number[g] for g in layout.grain.tolist()], dtype=np.int64),
        layout.cell.copy(),
        layout.site.copy(),
        np.eye(sites)[layout.site],
        ideal,
        columns.position - ideal,
        left,
        boundary,
        layout.vacant.copy(),
        layout.vacant_site.copy(),
        np.zeros(len(layout.vacant), np.int64),
        tuple(grains),
    )


def _grain(layout: Layout, columns: Columns, own: np.ndarray) -> Grain:
    """Least squares of ``position = offset[site] + i a1 + j a2`` over the columns ``own``."""
    sites = int(layout.site[own].max()) + 1
    design = np.column_stack([layout.cell[own], np.eye(sites)[layout.site[own]]])
    solved, *_ = np.linalg.lstsq(design, columns.position[own], rcond=None)
    vectors, offset = solved[:2], solved[2:]
    residual = columns.position[own] - design @ solved
    covariance = np.linalg.inv(design.T @ design) * (residual**2).mean()
    basis = (offset - offset[0]) @ np.linalg.inv(vectors)
    bright = [columns.amplitude[own][layout.site[own] == s] for s in range(sites)]
    return Grain(
        vectors,
        np.sqrt(np.diag(covariance)[:2])[:, None] * np.ones(2),
        offset[0],
        basis,
        np.array([b.mean() for b in bright]),
        np.array([b.std() for b in bright]),
    )
