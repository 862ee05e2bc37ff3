"""All columns of an image and its background, fitted together, and how well each is known."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from stemloop.describe.finding import gaussians, mesh
from stemloop.describe.finding.equations import Equations
from stemloop.describe.finding.gaussians import Floats, Image

#: Spread of a column's log-width around the median of all (a prior: it decides only where noise leaves width open).
LOG_WIDTH_SPREAD = 0.07
#: The fit is done when a step lowers the squared deviations by less than this for each column.
_DONE = 0.002
_STEPS = 12


class Prior(NamedTuple):
    """What is known of the parameters before the fit: Gaussians of ``middle`` (n, 4) and ``precision`` (n, 4); the
    middle of the widths is that of all if they are ``alike``."""

    middle: Floats
    precision: Floats
    alike: bool

    def about(self, columns: Floats) -> Prior:
        """The same with the median of the ``columns``' widths in the middle."""
        if self.alike:
            self.middle[:, 3] = np.median(columns[:, 3])
        return self

    def cost(self, columns: Floats) -> float:
        """Twice the negative logarithm of its density, but for a constant."""
        return float((self.precision * (columns - self.middle) ** 2).sum())


def prior(columns: Floats, guided: Floats | None = None, width: float | None = None) -> Prior:
    """Widths are alike, or near ``width`` [px]; the last columns are near where they start and about as bright, give or
    take ``guided`` (m, 2) [px, amplitude]."""
    middle, precision = columns.copy(), np.zeros_like(columns)
    precision[:, 3] = LOG_WIDTH_SPREAD**-2
    if guided is not None and len(guided):
        precision[-len(guided) :, :3] = guided[:, [0, 0, 1]] ** -2
    if width:
        middle[:, 3] = np.log(width)
    return Prior(middle, precision, width is None).about(columns)


class Model:
    """The image as a sum: a bilinear background on a coarse mesh and one Gaussian a column.

    columns : (n, 4) of row, col [px], amplitude, ln of the width [px]. background : the mesh's nodes.
    """

    def __init__(self, columns: Floats, background: Floats, shape: tuple[int, ...], width: float) -> None:
        self.columns, self.shape, self.width = columns, shape, width
        self.reach = reach_of(width)
        wanted = mesh.nodes(shape, max(8 * width, 2 * self.reach + 1))
        self.background = background if background.shape == wanted else _remeshed(background, wanted)
        self.image: Image = np.empty(shape, np.float32)
        mesh.paint(self.background, self.image)
        gaussians.paint(columns, self.reach, self.image)

    def under(self, place: Floats) -> Floats:
        """(n,) the background at ``place`` (n, 2) [px]."""
        return mesh.values(self.background, place, self.shape)

    def equations(self, weight: Image, precision: Floats) -> Equations:
        return Equations(self.columns, self.background.shape, weight, self.reach, self.width, precision)


def reach_of(width: float) -> int:
    """Half the side of the square [px] on which a column of ``width`` is painted."""
    return max(2, int(np.ceil(3.5 * width)))


def _remeshed(background: Floats, nodes: tuple[int, int]) -> Floats:
    """The mesh's interpolation at other nodes."""
    place = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float64) for n in nodes), indexing="ij"), -1)
    return mesh.values(background, place.reshape(-1, 2), nodes).reshape(nodes)


@njit(cache=True, nogil=True, fastmath=True)
def _mismatch(pixels: Image, model: Image, weight: Image, weighed: Image) -> float:
    """Fill ``weighed`` with the weighted difference of ``pixels`` and ``model``; the sum of its squares by weight."""
    total = 0.0
    for i in range(pixels.shape[0]):
        line: Any = np.float32(0)
        p, m, w, u = pixels[i], model[i], weight[i], weighed[i]
        for j in range(pixels.shape[1]):
            difference = p[j] - m[j]
            u[j] = w[j] * difference
            line += u[j] * difference
        total += line
    return total


def fit(pixels: Image, weight: Image, start: Floats, background: Floats, width: float, known: Prior) -> Model:
    """Fit all columns and the background together from ``start`` (n, 4) (Levenberg-Marquardt).

    The pixels' sums that make the matrix of a step change little from step to step, so it is summed anew only while
    steps are long; the gradient, which alone decides where the fit ends, always is.
    """
    model = Model(start, background, pixels.shape, width)
    weighed, other = np.empty(pixels.shape, np.float32), np.empty(pixels.shape, np.float32)
    squares = _mismatch(pixels, model.image, weight, weighed)
    damping, equations = 1e-3, None
    for _ in range(_STEPS):
        known = known.about(model.columns)
        price = squares + known.cost(model.columns)
        if equations is None:
            equations = model.equations(weight, known.precision)
        slope = gaussians.gather(model.columns, weighed, model.reach)
        slope -= known.precision * (model.columns - known.middle)
        lift = mesh.gather(weighed, *model.background.shape)
        step, rise = equations.solve(slope, lift, damping)
        room = 0.5 * np.exp(model.columns[:, 3:4])
        step[:, :2] = step[:, :2].clip(-room, room)
        step[:, 3] = step[:, 3].clip(-0.3, 0.3)
        columns = model.columns + step
        columns[:, 2] = np.maximum(columns[:, 2], 0.02 * model.columns[:, 2])
        trial = Model(columns, model.background + rise, pixels.shape, width)
        squares_then = _mismatch(pixels, trial.image, weight, other)
        gain = price - squares_then - known.cost(columns)
        if gain < 0:
            damping *= 20
            equations = None
            if -gain < _DONE * len(start):
                break
            continue
        model, squares, damping = trial, squares_then, damping / 5
        weighed, other = other, weighed
        if gain < _DONE * len(start):
            break
        if gain > len(start):
            equations = None
    return model


def deviations(model: Model, weight: Image, pixels: Image, known: Prior) -> Floats:
    """(n, 4) 1-sigma deviations of the columns' parameters, from the matrix of the last step.

    Where a column's surroundings hold more than noise, its reduced chi-square widens them. And a fit seeks each column
    where noise adds to it: for two coordinates sought, its squared amplitude comes out two variances too large (as a
    chi-square of two degrees of freedom), and its place looks better known than it is by that.
    """
    sigma = model.equations(weight, known.precision).deviations()
    measured = (weight > 0).astype(np.float32)
    radius = 2 * np.exp(model.columns[:, 3])
    local, count, _ = gaussians.core_means(model.columns, weight * (pixels - model.image) ** 2, measured, radius)
    few = np.sqrt(2 / np.maximum(count, 1))
    sigma *= np.sqrt(np.maximum(local / (1 + few), 1.0))[:, None]
    sigma[:, :2] /= np.sqrt(np.maximum(1 - 2 * (sigma[:, 2] / model.columns[:, 2]) ** 2, 0.25))[:, None]
    return np.asarray(sigma)
