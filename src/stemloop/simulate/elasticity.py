"""Displacement fields: smooth strain that is the exact gradient of a displacement.

A field answers at points (n, 2) as (y, x) [A]: ``displacement`` (n, 2) [A] and ``gradient`` (n, 2, 2), where
``gradient[:, i, j] = du_i/dr_j`` with i, j over (y, x). Points are those of the reference (undeformed) lattice: an
atom at ``X`` goes to ``X + u(X)``.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Field(Protocol):
    """A displacement field and its gradient."""

    def displacement(self, points: Array) -> Array: ...

    def gradient(self, points: Array) -> Array: ...


class Uniform:
    """The same strain everywhere: ``u = (e + w) (r - centre)``.

    Strains ``e_xx``, ``e_yy``, ``e_xy`` (tensor shear) and rotation ``rotation_rad`` as in
    :mod:`stemloop.core.structure`; ``centre_A`` (y, x) [A] stays where it is.

    >>> import numpy as np
    >>> Uniform(e_xx=0.01).displacement(np.array([[0.0, 50.0]])).tolist()
    [[0.0, 0.5]]
    """

    def __init__(
        self,
        e_xx: float = 0.0,
        e_yy: float = 0.0,
        e_xy: float = 0.0,
        rotation_rad: float = 0.0,
        centre_A: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self._matrix = np.array([[e_yy, e_xy + rotation_rad], [e_xy - rotation_rad, e_xx]])
        self._centre = np.asarray(centre_A, dtype=np.float64)

    def displacement(self, points: Array) -> Array:
        return (points - self._centre) @ self._matrix.T

    def gradient(self, points: Array) -> Array:
        return np.broadcast_to(self._matrix, (len(points), 2, 2)).copy()


class Periodic:
    """A displacement that is a trigonometric polynomial on a periodic square box.

    ``coefficients`` (2, m, m) complex: amplitudes of u_y, u_x [A] over wave numbers ``-M..M`` (m = 2M + 1) of the box
    ``box_A`` [A]. It is summed exactly at any point, and so is its derivative.
    """

    def __init__(self, coefficients: NDArray[np.complex128], box_A: float) -> None:
        modes = coefficients.shape[-1] // 2
        self.box_A = box_A
        self._coefficients = coefficients
        self._k = 2 * np.pi / box_A * np.arange(-modes, modes + 1)

    def __add__(self, other: Periodic) -> Periodic:
        return Periodic(self._coefficients + other._coefficients, self.box_A)

    def scaled(self, factor: float) -> Periodic:
        """The same field ``factor`` times as strong (linear elasticity)."""
        return Periodic(self._coefficients * factor, self.box_A)

    def _sum(self, coefficients: NDArray[np.complex128], points: Array) -> Array:
        out = np.empty((len(points), len(coefficients)))
        for start in range(0, len(points), 2048):
            part = slice(start, start + 2048)
            along_y = np.exp(1j * points[part, :1] * self._k)
            along_x = np.exp(1j * points[part, 1:] * self._k)
            for i, c in enumerate(coefficients):
                out[part, i] = np.einsum("nk,nk->n", along_y @ c, along_x).real
        return out

    def displacement(self, points: Array) -> Array:
        return self._sum(self._coefficients, points)

    def gradient(self, points: Array) -> Array:
        d_y, d_x = 1j * self._k[:, None], 1j * self._k[None, :]
        u_y, u_x = self._coefficients
        stacked = np.stack([u_y * d_y, u_y * d_x, u_x * d_y, u_x * d_x])
        return self._sum(stacked, points).reshape(-1, 2, 2)


class EdgeDislocation:
    """An edge dislocation in an isotropic sheet in plane strain, after Volterra.

    With x along the Burgers vector and y at right angles to it (towards +y where x is +x):
    ``u_x = b/2pi [atan2(y, x) + xy / (2 (1 - nu) r^2)]`` and
    ``u_y = -b/2pi [(1 - 2 nu) / (4 (1 - nu)) ln r^2 + (x^2 - y^2) / (4 (1 - nu) r^2)]``
    (J. P. Hirth and J. Lothe, *Theory of Dislocations*, 2nd ed. (1982), section 3.4). The closed integral of ``du``
    from +x towards +y is the Burgers vector; the jump is on the half-line opposite to it.

    Parameters
    ----------
    core_A, burgers_A : (y, x) [A]. poisson : Poisson ratio, -1 to 0.5.
    """

    def __init__(self, core_A: tuple[float, float], burgers_A: tuple[float, float], poisson: float = 0.25) -> None:
        self._core = np.asarray(core_A, dtype=np.float64)
        self._size = float(np.hypot(*burgers_A))
        along_y, along_x = np.asarray(burgers_A, dtype=np.float64) / self._size
        self._turn = np.array([[along_x, -along_y], [along_y, along_x]])  # (y, x) -> across and along b
        self._poisson = poisson

    def _local(self, points: Array) -> tuple[Array, Array, Array]:
        y, x = ((points - self._core) @ self._turn.T).T
        return y, x, np.maximum(x**2 + y**2, 1e-12)

    def displacement(self, points: Array) -> Array:
        y, x, r2 = self._local(points)
        nu = self._poisson
        along = np.arctan2(y, x) + x * y / (2 * (1 - nu) * r2)
        across = -(1 - 2 * nu) / (4 * (1 - nu)) * np.log(r2) - (x**2 - y**2) / (4 * (1 - nu) * r2)
        return self._size / (2 * np.pi) * np.stack([across, along], axis=1) @ self._turn

    def gradient(self, points: Array) -> Array:
        y, x, r2 = self._local(points)
        nu = self._poisson
        one, two = 1 / (2 * (1 - nu)), (1 - 2 * nu) / (2 * (1 - nu))
        xx = -y / r2 + one * y * (y**2 - x**2) / r2**2
        xy = x / r2 + one * x * (x**2 - y**2) / r2**2
        yx = -two * x / r2 - 2 * one * x * y**2 / r2**2
        yy = -two * y / r2 + 2 * one * x**2 * y / r2**2
        local = np.stack([np.stack([yy, yx], -1), np.stack([xy, xx], -1)], axis=-2)
        return self._size / (2 * np.pi) * self._turn.T @ local @ self._turn


def strain_and_rotation(gradient: Array) -> tuple[Array, Array]:
    """Strain (n, 3) as e_xx, e_yy, e_xy and rotation (n,) [rad] of a gradient (n, 2, 2) over (y, x)."""
    (yy, yx), (xy, xx) = np.moveaxis(gradient, 0, -1)
    return np.stack([xx, yy, (xy + yx) / 2], axis=1), (yx - xy) / 2


def relax(eigenstrain: Array, box_A: float, poisson: float, shortest_A: float = 6.0) -> Periodic:
    """Displacement of an isotropic sheet (plane stress) that holds a given eigenstrain and is in equilibrium.

    The stress is ``s = C : (e - e*)`` with ``div s = 0``. In Fourier space the acoustic tensor of the sheet is
    inverted in closed form: ``u(k) = -i [1 - (1 + nu)/2 kk/k^2] / (mu k^2) . (C : e*) k`` (T. Mura, *Micromechanics of
    Defects in Solids* (1987), chapter 1, doi:10.1007/978-94-009-3489-4). The mean strain is zero: the box is clamped.

    Parameters
    ----------
    eigenstrain : (3, n, n) e*_xx, e*_yy, e*_xy on the grid of the box, rows along y.
    box_A : side of the periodic box [A].
    poisson : Poisson ratio, -1 to 0.5.
    shortest_A : the shortest wavelength that is kept [A].
    """
    n = eigenstrain.shape[-1]
    modes = min(int(box_A / shortest_A), (n - 1) // 2)
    kept = np.arange(-modes, modes + 1)
    e_xx, e_yy, e_xy = (np.fft.fft2(e)[np.ix_(kept % n, kept % n)] / n**2 for e in eigenstrain)
    k = 2 * np.pi / box_A * kept
    k_y, k_x = k[:, None], k[None, :]
    k2 = k_y**2 + k_x**2
    k2[modes, modes] = 1.0
    lame = 2 * poisson / (1 - poisson)  # of plane stress, in units of the shear modulus
    trace = lame * (e_xx + e_yy)
    f_y = (trace + 2 * e_yy) * k_y + 2 * e_xy * k_x
    f_x = (trace + 2 * e_xx) * k_x + 2 * e_xy * k_y
    along = (1 + poisson) / 2 * (f_y * k_y + f_x * k_x) / k2
    u = -1j * np.stack([f_y - along * k_y, f_x - along * k_x]) / k2
    u[:, modes, modes] = 0.0
    return Periodic(u, box_A)


def long_waves(rng: np.random.Generator, n: int, box_A: float, shortest_A: float) -> Array:
    """A random smooth eigenstrain (3, n, n) of unit variance with wavelengths of at least ``shortest_A`` [A]."""
    f = np.fft.fftfreq(n, box_A / n)
    band = np.hypot(f[:, None], f[None, :]) <= 1 / shortest_A
    band[0, 0] = False
    waves = np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, n, n))) * band).real
    return np.asarray(waves / waves.std(axis=(1, 2), keepdims=True))
