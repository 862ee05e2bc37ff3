"""An energy surface over in-plane strain that asks the calculator when it does not know.

The energy a primitive cell depends on strain through ``m = (e_xx + e_yy)/2``, ``d = (e_xx - e_yy)/2`` and
``x = e_xy`` in crystal axes. A crystal axis turned by theta turns (d, x) by 2 theta, so a plane group's energy is a
polynomial in the invariants ``m, d^2 + x^2, d^3 - 3 d x^2`` (hexagonal) or ``m, d^2, x^2`` (square), and in nothing
else. The surface is the Gaussian process whose kernel is that polynomial: Bayesian linear regression on all products
of invariants of total degree 2 to ``degree``, weights ``w ~ N(0, A^2)`` in units of a strain of ``SCALE``, fitted to
calculated energies *and* stresses; ``A`` maximises the marginal likelihood on a fixed grid (C. E. Rasmussen and
C. K. I. Williams, *Gaussian Processes for Machine Learning* (2006), doi:10.7551/mitpress/3206.001.0001, ch. 2 and 5).
There is no term of degree 0 or 1: E(0) = 0 is the minimum, because strain is referred to the equilibrium.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement, product

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull

from stemloop.core.errors import CalculationError, InputError

Array = NDArray[np.float64]

#: Strain at which terms of all degrees are believed to weigh the same: where bonds change their nature.
SCALE = 0.1
#: Spacing of the lattice of nodes, in (m, d, x).
SPACING = 0.01
#: The largest |e_mean| and the largest sqrt(e_diff^2 + e_xy^2) that the surface answers for.
LIMIT = 0.06
#: (m, d, x) from (e_xx, e_yy, e_xy).
NATURAL = np.array([[0.5, 0.5, 0.0], [0.5, -0.5, 0.0], [0.0, 0.0, 1.0]])

_GENERATORS: dict[str, tuple[dict[tuple[int, int, int], float], ...]] = {
    "hexagonal": ({(1, 0, 0): 1.0}, {(0, 2, 0): 1.0, (0, 0, 2): 1.0}, {(0, 3, 0): 1.0, (0, 1, 2): -3.0}),
    "square": ({(1, 0, 0): 1.0}, {(0, 2, 0): 1.0}, {(0, 0, 2): 1.0}),
    "none": ({(1, 0, 0): 1.0}, {(0, 1, 0): 1.0}, {(0, 0, 1): 1.0}),
}


def _turn(angle: float) -> Array:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def images(symmetry: str) -> Array:
    """(g, 3, 3): the maps of (m, d, x) under which the energy does not change."""
    flip = np.diag([1.0, 1.0, -1.0])
    turns = {"hexagonal": 3, "square": 2, "none": 1}[symmetry]
    rotations = [_turn(2 * np.pi * k / turns) for k in range(turns)]
    return np.array(rotations if symmetry == "none" else [r @ f for r in rotations for f in (np.eye(3), flip)])


def _times(
    a: dict[tuple[int, int, int], float], b: dict[tuple[int, int, int], float]
) -> dict[tuple[int, int, int], float]:
    found: dict[tuple[int, int, int], float] = {}
    for (p, q, r), u in a.items():
        for (s, t, v), w in b.items():
            key = (p + s, q + t, r + v)
            found[key] = found.get(key, 0.0) + u * w
    return found


class Invariants:
    """All products of a symmetry's invariants with total degree 2 to ``degree``, with two derivatives."""

    def __init__(self, symmetry: str, degree: int = 6) -> None:
        if symmetry not in _GENERATORS:
            raise InputError(f"unknown symmetry {symmetry!r}; known: {', '.join(sorted(_GENERATORS))}.")
        generators = _GENERATORS[symmetry]
        degrees = [sum(next(iter(g))) for g in generators]
        terms = []
        for powers in product(range(degree + 1), repeat=3):
            if 2 <= sum(n * k for n, k in zip(powers, degrees, strict=True)) <= degree:
                term = {(0, 0, 0): 1.0}
                for generator, n in zip(generators, powers, strict=True):
                    for _ in range(n):
                        term = _times(term, generator)
                terms.append(term)
        monomials = sorted({exponents for term in terms for exponents in term})
        self._exponents = np.array(monomials)
        self._mix = np.array([[term.get(exponents, 0.0) for exponents in monomials] for term in terms])

    def __len__(self) -> int:
        return len(self._mix)

    def derivative(self, u: Array, orders: tuple[int, int, int]) -> Array:
        """(n, features): the derivative of each feature at ``u`` (n, 3), ``orders`` times along each axis."""
        values = np.ones((len(self._exponents), len(u)))
        for axis, order in enumerate(orders):
            powers = np.ones((int(self._exponents[:, axis].max()) + 1, len(u)))
            for k in range(1, len(powers)):
                powers[k] = powers[k - 1] * u[:, axis]
            power = self._exponents[:, axis]
            for _ in range(order):
                values *= power[:, None]
                power = power - 1
            values *= powers[np.maximum(power, 0)]
        return (self._mix @ values).T

    def jacobian(self, u: Array) -> Array:
        """(n, 3, features)."""
        return np.stack([self.derivative(u, orders) for orders in ((1, 0, 0), (0, 1, 0), (0, 0, 1))], axis=1)

    def hessian(self, u: Array) -> Array:
        """(n, 3, 3, features)."""
        found = np.empty((len(u), 3, 3, len(self)))
        for i, j in combinations_with_replacement(range(3), 2):
            orders = [0, 0, 0]
            orders[i] += 1
            orders[j] += 1
            found[:, i, j] = found[:, j, i] = self.derivative(u, (orders[0], orders[1], orders[2]))
        return found


@dataclass(frozen=True)
class Answer:
    """Energy (n,) [eV a cell], its deviation (n,), gradient (n, 3) and Hessian (n, 3, 3) in e_xx, e_yy, e_xy."""

    energy: Array
    sigma: Array
    gradient: Array
    hessian: Array


class Surface:
    """The energy of one material over in-plane strain.

    Parameters
    ----------
    calculate : takes strains (k, 3) as (e_xx, e_yy, e_xy) in crystal axes, and returns energies (k,) [eV a cell]
        above the equilibrium and their gradients (k, 3) [eV], from a calculator.
    symmetry : ``hexagonal``, ``square`` or ``none`` (of the plane).
    noise_eV, noise_gradient_eV : the calculator's numerical noise (1 sigma).
    rotation_rad : angle of the crystal's a axis from +x towards +y, in the axes that strains are given in.
    degree : of the polynomial. residual_eV : largest slope dE/d(e_mean) that the search for the equilibrium may have
        left [eV]; the surface has no such term, so it counts as ``residual_eV |e_mean|`` of deviation.

    Nodes lie on a fixed lattice of strains (``SPACING``), so that runs share their results. Which nodes are asked for
    depends only on the strains that were asked before, in their order: not on what a cache holds nor on timing.
    """

    def __init__(
        self,
        calculate: Callable[[Array], tuple[Array, Array]],
        symmetry: str,
        noise_eV: float = 2e-6,
        noise_gradient_eV: float = 2e-3,
        rotation_rad: float = 0.0,
        degree: int = 6,
        residual_eV: float = 0.0,
    ) -> None:
        self._residual = residual_eV
        self._calculate = calculate
        self._features = Invariants(symmetry, degree)
        self._images = images(symmetry)
        self._noise = np.array([noise_eV, *(3 * [noise_gradient_eV])])
        self._axes = _turn(-2 * rotation_rad) @ NATURAL
        self.nodes = np.zeros((0, 3))
        self._energies = np.zeros(0)
        self._gradients = np.zeros((0, 3))
        self._amplitude = 1.0
        self._weights = np.zeros(len(self._features))
        self._hull = np.zeros((0, 4))

    # -------------------------------------------------------------------------------------------------- asking

    def fork(self) -> Surface:
        """A surface that starts from these nodes and goes its own way (to score a map without touching a run)."""
        return copy.copy(self)

    def energies(self, strain: Array, tolerance_eV: float | None = 3e-4) -> tuple[Array, Array]:
        """Energy and deviation (m,), (m,) [eV a cell] at strains (m, 3) as (e_xx, e_yy, e_xy).

        With ``tolerance_eV`` the calculator is asked where the deviation is larger, or where a strain is outside the
        nodes' hull. With None nothing is calculated, and outside the hull the deviation is infinite.
        """
        if tolerance_eV is None:
            answer = self.answer(strain)
            return answer.energy, np.where(self.inside(strain), answer.sigma, np.inf)
        self.refine(strain, np.full(len(strain), tolerance_eV))
        answer = self.answer(strain)
        return answer.energy, answer.sigma

    def answer(self, strain: Array) -> Answer:
        """What the surface believes at strains (n, 3), from the nodes that it has."""
        axes, u = self._axes, self._natural(strain) / SCALE
        to_strain = axes / SCALE
        values, slopes, bends = (
            self._features.derivative(u, (0, 0, 0)),
            self._features.jacobian(u) @ self._weights,
            self._features.hessian(u) @ self._weights,
        )
        return Answer(
            values @ self._weights,
            np.hypot(self._deviation(u, self._precision(self.nodes)), self._residual * SCALE * np.abs(u[:, 0])),
            slopes @ to_strain,
            np.einsum("ai,nab,bj->nij", to_strain, bends, to_strain),
        )

    def inside(self, strain: Array) -> NDArray[np.bool_]:
        """(n,): whether each strain is within the hull of the nodes and their images."""
        return self._within(self._natural(strain), self._hull)

    def within_limit(self, strain: Array) -> Array:
        """(n, 3): the strains, those beyond ``LIMIT`` drawn back to it along the ray to zero."""
        s = strain @ NATURAL.T
        excess = np.maximum(np.abs(s[:, 0]), np.hypot(s[:, 1], s[:, 2])) / LIMIT
        return strain / np.maximum(excess, 1.0)[:, None]

    def _natural(self, strain: Array) -> Array:
        return np.atleast_2d(np.asarray(strain, float)) @ self._axes.T

    # ------------------------------------------------------------------------------------------------ learning

    def refine(self, strain: Array, tolerance_eV: Array) -> None:
        """Ask the calculator until each of ``strain`` (n, 3) is inside the hull and known to ``tolerance_eV`` (n,).

        Each round plans nodes for the worst strain first: of the eight lattice points around it the one that leaves it
        the smallest deviation (which needs no value, so that a round's nodes can be calculated together). It ends when
        all are known, or when all eight points around the others are nodes.

        Raises
        ------
        CalculationError : a strain is beyond ``LIMIT``.
        """
        s = self._natural(strain)
        reach = np.maximum(np.abs(s[:, 0]), np.hypot(s[:, 1], s[:, 2])) if len(s) else np.zeros(0)
        if not (reach <= LIMIT * (1 + 1e-9)).all():
            raise CalculationError(
                f"a strain of {reach.max():.3g} is beyond {LIMIT:g}, where the energy surface ends. "
                "Leave such points out, or check the descriptor."
            )
        if not len(self.nodes):
            self._learn(2 * SPACING * np.array([(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1)], float))
        while len(planned := self._plan(s, tolerance_eV)):
            self._learn(planned)

    def _plan(self, s: Array, tolerance_eV: Array) -> Array:
        s = self._folded(s)
        planned = self.nodes
        hull, open_ = self._hull, np.ones(len(s), bool)
        while True:
            precision = self._precision(planned)
            excess = self._deviation(s / SCALE, precision) / tolerance_eV
            excess[~self._within(s, hull)] += 1e6
            excess[~open_] = 0.0
            if not len(s) or excess.max() <= 1.0:
                return planned[len(self.nodes) :]
            worst = int(np.argmax(np.round(excess, 6)))
            node = self._useful(s[worst], planned, outermost=excess[worst] > 1e6)
            if node is None:
                open_[worst] = False
                continue
            planned = np.vstack([planned, node])
            hull = self._span(planned)

    def _folded(self, s: Array) -> Array:
        """The image of each of ``s`` (n, 3) with the largest d, then the largest x: one for each orbit."""
        orbit = np.round(np.einsum("gij,nj->ngi", self._images, s), 12)
        first = np.lexsort((-orbit[..., 2], -orbit[..., 1]), axis=1)[:, 0]
        return orbit[np.arange(len(s)), first]

    def _useful(self, s: Array, planned: Array, outermost: bool) -> Array | None:
        corners = (np.floor(s / SPACING) + np.array(list(product((0.0, 1.0), repeat=3)))) * SPACING
        taken = {tuple(node) for node in np.rint(planned / SPACING).astype(int)}
        free = np.array([c for c in corners if tuple(np.rint(c / SPACING).astype(int)) not in taken and c.any()])
        if not len(free):
            return None
        if outermost:
            return free[int(np.argmax(np.round(np.abs(free).sum(axis=1) / SPACING)))]
        left = [self._deviation(s[None] / SCALE, self._precision(np.vstack([planned, c])))[0] for c in free]
        return free[int(np.argmin(np.round(left, 12)))]  # equal by symmetry: the first

    def _learn(self, nodes: Array) -> None:
        energies, gradients = self._calculate(np.linalg.solve(NATURAL, nodes.T).T)
        self.nodes = np.vstack([self.nodes, nodes])
        self._energies = np.concatenate([self._energies, energies])
        self._gradients = np.vstack([self._gradients, gradients @ np.linalg.inv(NATURAL)])
        self._hull = self._span(self.nodes)
        self._fit()

    # --------------------------------------------------------------------------------------------- regression

    def _rows(self, nodes: Array) -> tuple[Array, Array]:
        """Features (4 n, f) and noise (4 n,) of energies and gradients, in units of strain ``SCALE``."""
        u = nodes / SCALE
        rows = np.concatenate([self._features.derivative(u, (0, 0, 0))[:, None], self._features.jacobian(u)], axis=1)
        return rows.reshape(-1, len(self._features)), np.tile(self._noise * [1, SCALE, SCALE, SCALE], len(nodes))

    def _precision(self, nodes: Array) -> Array:
        rows, noise = self._rows(nodes)
        scaled = rows / noise[:, None]
        return scaled.T @ scaled + np.eye(len(self._features)) / self._amplitude**2

    def _deviation(self, u: Array, precision: Array) -> Array:
        values = self._features.derivative(u, (0, 0, 0))
        half = np.linalg.solve(np.linalg.cholesky(precision), values.T)
        return np.sqrt(np.sum(half**2, axis=0))

    def _targets(self) -> Array:
        return np.concatenate([self._energies[:, None], self._gradients * SCALE], axis=1).ravel()

    def _fit(self) -> None:
        """Weights at the amplitude ``A`` of the largest marginal likelihood (grid from 0.01 to 100 eV)."""
        rows, noise = self._rows(self.nodes)
        scaled, wanted = rows / noise[:, None], self._targets() / noise
        moment, cross = scaled.T @ scaled, scaled.T @ wanted
        best = -np.inf
        for amplitude in np.logspace(-2, 2, 41):
            root = np.linalg.cholesky(moment * amplitude**2 + np.eye(len(moment)))
            weights = amplitude**2 * np.linalg.solve(root.T, np.linalg.solve(root, cross))
            likelihood = -0.5 * float(wanted @ wanted - cross @ weights) - float(np.log(np.diag(root)).sum())
            if likelihood > best:
                best, self._amplitude, self._weights = likelihood, float(amplitude), weights

    def held_out(self) -> tuple[Array, Array]:
        """Leave-one-node-out: errors (k,) [eV] of the energy of each node from the others, and their deviations."""
        errors, deviations = np.empty(len(self.nodes)), np.empty(len(self.nodes))
        for i in range(len(self.nodes)):
            keep = np.arange(len(self.nodes)) != i
            rows, noise = self._rows(self.nodes[keep])
            precision = self._precision(self.nodes[keep])
            targets = self._targets().reshape(-1, 4)[keep].ravel()
            weights = np.linalg.solve(precision, (rows / noise[:, None]).T @ (targets / noise))
            u = self.nodes[i : i + 1] / SCALE
            errors[i] = (self._features.derivative(u, (0, 0, 0)) @ weights)[0] - self._energies[i]
            deviations[i] = self._deviation(u, precision)[0]
        return errors, deviations

    # --------------------------------------------------------------------------------------------------- hull

    def _span(self, nodes: Array) -> Array:
        orbit = np.einsum("gij,nj->gni", self._images, nodes).reshape(-1, 3)
        return ConvexHull(orbit).equations if len(nodes) > 3 else np.zeros((0, 4))

    @staticmethod
    def _within(s: Array, hull: Array) -> NDArray[np.bool_]:
        if not len(hull):
            return np.zeros(len(s), bool)
        return np.all(s @ hull[:, :3].T + hull[:, 3] <= 1e-9, axis=1)
