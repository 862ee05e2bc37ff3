"""A property that follows from several believed fields.

Some properties are poor fields for a Gaussian process and follow from good ones: a strain energy is flat with a sharp
hill, never negative, and its measured values are skewed and noisiest where they are largest; the three strain
components behind it are signed, smooth, and measured with nearly the same noise everywhere. Then the components are
believed, each by its own exact Gaussian process, and the property is what a function makes of their mean and variance
at a place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from stemloop.core.errors import InputError
from stemloop.decide.acquire import Fantasies
from stemloop.decide.gp import Array, GaussianProcess, Hyperparameters, LogNormal, Prior, fit

#: What is expected of a component: deviations from a network are alike but may be too large or too small together.
DEFAULT_PRIOR = Prior(noise=LogNormal(0.01, 0.7), trust=LogNormal(1.0, 0.5))

#: From the means (k, m) of independent fields at m places to a function that takes their variances (k, m) and gives the
#: property's value (m,) and deviation (m,): what depends on the means alone is worked out once.
Explain = Callable[[Array], Callable[[Array], tuple[Array, Array]]]


@dataclass(frozen=True)
class Derived:
    """A belief in a property of ``fields`` (k Gaussian processes with the same positions) through ``explain``."""

    fields: tuple[GaussianProcess, ...]
    explain: Explain

    @property
    def positions(self) -> Array:
        """Where was measured, (n, 2) [m]."""
        return self.fields[0].positions

    @property
    def hyperparameters(self) -> tuple[Hyperparameters, ...]:
        """Those of each field."""
        return tuple(field.hyperparameters for field in self.fields)

    def predict(self, positions: ArrayLike) -> tuple[Array, Array]:
        """The property's mean (m,) and 1-sigma deviation (m,) at ``positions`` (m, 2) [m]."""
        known = [field.predict(positions) for field in self.fields]
        return self.explain(np.array([mean for mean, _ in known]))(np.array([sigma**2 for _, sigma in known]))

    def imagine(self, points: Array) -> DerivedFantasies:
        """The property's variance at ``points`` as it will be after measurements that are imagined."""
        return DerivedFantasies(self, points)


class DerivedFantasies:
    """What :class:`~stemloop.decide.acquire.Fantasies` is for one field, for a derived property: the means stay as they
    are, the variances of all fields fall with each imagined measurement."""

    def __init__(self, belief: Derived, points: Array) -> None:
        self._explain = belief.explain(np.array([field.predict(points)[0] for field in belief.fields]))
        self._fields = [Fantasies(field, points) for field in belief.fields]

    @property
    def variance(self) -> Array:
        """(m,) variance of the property."""
        _, sigma = self._explain(np.array([field.variance for field in self._fields]))
        return sigma**2

    def measure(self, index: int) -> None:
        """Imagine a measurement of all fields at point ``index``."""
        for field in self._fields:
            field.measure(index)


def fit_derived(
    positions: ArrayLike,
    values: ArrayLike,
    sigmas: ArrayLike,
    explain: Explain,
    *,
    field_m: tuple[float, float],
    start: Sequence[Hyperparameters] | None = None,
    caution: float = 0.8,
    prior: Prior = DEFAULT_PRIOR,
) -> Derived:
    """Fit one Gaussian process to each column of ``values`` (n, k) with deviations ``sigmas`` (n, k).

    The other arguments are those of :func:`stemloop.decide.gp.fit`; ``start`` has one entry a column.
    """
    columns, deviations = np.asarray(values, float).T, np.asarray(sigmas, float).T
    if columns.ndim != 2 or columns.shape != deviations.shape:
        raise InputError(f"values and sigmas must both be (n, k); got {columns.T.shape} and {deviations.T.shape}.")
    fields = tuple(
        fit(positions, y, s, field_m=field_m, start=None if start is None else start[k], caution=caution, prior=prior)
        for k, (y, s) in enumerate(zip(columns, deviations, strict=True))
    )
    return Derived(fields, explain)
