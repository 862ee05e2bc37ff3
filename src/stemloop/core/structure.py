"""What a place of the specimen looks like: descriptors of diffraction patterns, and found atom columns.

Strain convention. Image axes: ``x`` to the right, ``y`` down, the beam along ``+z`` into the page (a right-handed
set). A displacement field ``u`` of the reference lattice gives, to first order,
``e_xx = du_x/dx``, ``e_yy = du_y/dy``, ``e_xy = (du_x/dy + du_y/dx)/2`` (tensor shear) and the rotation
``w = (du_y/dx - du_x/dy)/2``, positive from +x towards +y (clockwise on the screen).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError

#: The continuous quantities of a descriptor, in the order of ``mean`` and ``sigma``.
QUANTITIES = ("e_mean", "e_diff", "e_xy", "rotation_rad", "thickness_m", "tilt_y_rad", "tilt_x_rad")
#: What a place can be. ``vacuum`` is no specimen at all.
PHASES = ("MoS2", "graphene", "SrTiO3", "vacuum")
#: What the site under the probe can be.
SITES = ("pristine", "vacancy", "dopant")


@dataclass(frozen=True)
class Descriptors:
    """Structure descriptors of ``n`` diffraction patterns.

    mean, sigma : (n, 7) float64. Columns are :data:`QUANTITIES`: ``e_mean = (e_xx + e_yy)/2``,
        ``e_diff = (e_xx - e_yy)/2`` and ``e_xy`` (nearly uncorrelated by symmetry, which is why they are kept instead
        of e_xx and e_yy), rotation [rad], thickness [m], specimen tilt about the two axes [rad]; ``sigma`` is the
        1-sigma deviation of each.
    phase : (n, 4) probabilities over :data:`PHASES`. site : (n, 3) probabilities over :data:`SITES`.
    novelty : (n,) distance from what the network was trained on, in deviations (above about 4: do not trust).
    """

    mean: NDArray[np.float64]
    sigma: NDArray[np.float64]
    phase: NDArray[np.float64]
    site: NDArray[np.float64]
    novelty: NDArray[np.float64]

    def __post_init__(self) -> None:
        n = len(self.mean)
        wanted = {"mean": (n, 7), "sigma": (n, 7), "phase": (n, 4), "site": (n, 3), "novelty": (n,)}
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise InputError(f"{name} has shape {getattr(self, name).shape}; {n} descriptors need {shape}.")

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def strain(self) -> NDArray[np.float64]:
        """(n, 3): e_xx, e_yy, e_xy."""
        e_mean, e_diff, e_xy = self.mean[:, 0], self.mean[:, 1], self.mean[:, 2]
        return np.stack([e_mean + e_diff, e_mean - e_diff, e_xy], axis=1)

    @property
    def strain_covariance(self) -> NDArray[np.float64]:
        """(n, 3, 3): covariance of e_xx, e_yy, e_xy, from independent e_mean, e_diff, e_xy."""
        mix = np.array([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])
        return np.einsum("ij,nj,kj->nik", mix, self.sigma[:, :3] ** 2, mix)

    def take(self, index: Any) -> Descriptors:
        """The descriptors at ``index`` (anything that indexes the first axis and keeps it)."""
        return Descriptors(
            self.mean[index], self.sigma[index], self.phase[index], self.site[index], self.novelty[index]
        )


def _empty() -> NDArray[np.float64]:
    return np.zeros(0)


@dataclass(frozen=True)
class Columns:
    """Atom columns found in an image.

    position : (n, 2) as (row, col) [px]. sigma : (n, 2) their 1-sigma deviations [px].
    amplitude : (n,) and width : (n,) [px] of the fitted Gaussians. sublattice : (n,) int (0 is the brightest).
    background : (n,) intensity under each column; p_present : (n,) probability that a column is there at all.
    vacant : (m, 2) places [px] where the columns around expect one and none is. measured : (n,) share of the pixels of
    each column's core that count, neither missing nor saturated; under 1 the column is known by its rest. These may be
    left out.
    """

    position: NDArray[np.float64]
    sigma: NDArray[np.float64]
    amplitude: NDArray[np.float64]
    width: NDArray[np.float64]
    sublattice: NDArray[np.int64]
    background: NDArray[np.float64] = field(default_factory=_empty)
    p_present: NDArray[np.float64] = field(default_factory=_empty)
    vacant: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))
    measured: NDArray[np.float64] = field(default_factory=_empty)

    def __len__(self) -> int:
        return len(self.position)

    def table(self) -> NDArray[Any]:
        """(n,) structured array with ``row, col, sigma_row, sigma_col, amplitude, width, background, p_present,
        sublattice``; ``pandas.DataFrame(columns.table())`` takes it as it is."""
        numbers = ("row", "col", "sigma_row", "sigma_col", "amplitude", "width", "background", "p_present")
        table = np.zeros(len(self), dtype=[*((name, np.float64) for name in numbers), ("sublattice", np.int64)])
        table["row"], table["col"] = self.position.T
        table["sigma_row"], table["sigma_col"] = self.sigma.T
        table["sublattice"] = self.sublattice
        for name in ("amplitude", "width", "background", "p_present"):
            table[name] = getattr(self, name) if len(getattr(self, name)) else np.nan
        return table


@dataclass(frozen=True)
class Grain:
    """One crystal lattice of an image: site ``s`` of cell ``(i, j)`` lies at ``origin + (i + b) a1 + (j + c) a2`` with
    ``(b, c) = basis[s]``, before strain.

    vectors : (2, 2) rows a1, a2 as (row, col) [px], the shortest pair, a1 the one nearest to +x, a2 from it towards +y.
    sigma : (2, 2) their 1-sigma deviations [px]. origin : (2,) [px]. basis : (k, 2) fractional places of the sites of a
    cell, ``basis[0]`` is (0, 0): site 0 is the primary one (the brightest). amplitude, amplitude_sigma : (k,) mean
    brightness of each site's columns and the deviation of one column from it.
    """

    vectors: NDArray[np.float64]
    sigma: NDArray[np.float64]
    origin: NDArray[np.float64]
    basis: NDArray[np.float64]
    amplitude: NDArray[np.float64]
    amplitude_sigma: NDArray[np.float64]

    @property
    def rotation_rad(self) -> float:
        """Direction of a1 from +x towards +y (down)."""
        return float(np.arctan2(self.vectors[0, 0], self.vectors[0, 1]))


@dataclass(frozen=True)
class Assignment:
    """Which site of which lattice each of the ``n`` columns of an image is.

    grain : (n,) int, index into ``grains``; -1 where a column belongs to none.
    cell : (n, 2) int, (i, j) of its cell (0 where grain is -1). site : (n,) int, 0 the primary one, -1 if none.
    p_site : (n, k) probability of each site (k: the most sites of any grain; rows sum to 1, or are 0 where none).
    ideal : (n, 2) [px] where the columns around expect this one, from the local lattice without the column itself.
    displacement : (n, 2) [px] position minus ``ideal``; displacement_sigma : (n, 2) its 1-sigma deviation. These three
        are NaN where nothing is expected.
    boundary : (n,) bool, the column lies at the rim of its grain (some neighbours of the lattice are not there, or are
        of another grain).
    vacant : (m, 2) [px] places where a column is expected and none is; vacant_site, vacant_grain : (m,) int.
    grains : the lattices, the largest first; empty where the image shows no lattice.
    """

    grain: NDArray[np.int64]
    cell: NDArray[np.int64]
    site: NDArray[np.int64]
    p_site: NDArray[np.float64]
    ideal: NDArray[np.float64]
    displacement: NDArray[np.float64]
    displacement_sigma: NDArray[np.float64]
    boundary: NDArray[np.bool_]
    vacant: NDArray[np.float64]
    vacant_site: NDArray[np.int64]
    vacant_grain: NDArray[np.int64]
    grains: tuple[Grain, ...]

    def __len__(self) -> int:
        return len(self.grain)


@dataclass(frozen=True)
class Defect:
    """A departure from the perfect lattice.

    kind : ``vacancy``, ``dopant``, ``interstitial``, ``dislocation``, ``stacking-fault``, ``grain-boundary``,
        ``domain-wall`` or ``vortex``. place : (m, 2) (row, col) [px], one point, or the points of a line in order.
    p : probability that it is there, between 0 and 1. detail : plain numbers and strings, such as ``burgers``
        (row, col) [px], ``misorientation_deg`` and its ``sigma_deg``, ``winding``, ``site``, ``z_score``.
    """

    kind: str
    place: NDArray[np.float64]
    p: float
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Energies:
    """Energies [eV] of ``n`` places with their deviations.

    value : the energy; sigma : its 1-sigma deviation from the descriptor's, the calculator's interpolation and second
    order terms together; gradient : (n, 3) dE/d(e_xx, e_yy, e_xy) [eV] where the energy depends on strain, else zeros.
    """

    value: NDArray[np.float64]
    sigma: NDArray[np.float64]
    gradient: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.value)
