"""Places to a part of a pixel, and their deviations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stemloop.reduce.registration.canvas import RIM, Canvas, shifted, split
from stemloop.reduce.registration.content import Stack
from stemloop.reduce.registration.views import Floats, Thin
from stemloop.reduce.shifting import REACH


class Fit(NamedTuple):
    """A refined place with its deviation, the view's strength over the mean's, and the part of the view's blocks
    that show the specimen at all."""

    place: Floats
    sigma: Floats
    strength: float
    alike: float


def refined(stack: Stack, k: int, canvas: Canvas, place: Floats) -> Fit:
    """Least squares of the view against the mean of the others, by Gauss-Newton; deviations from the residuals, summed
    over groups of lines, so that lines that are displaced together count."""
    mean, there = canvas.mean(stack.noise)
    at = np.array(place, dtype=np.float64)
    covariance, strength, alike = np.full((2, 2), np.nan), 0.0, 0.0
    limit = np.array(stack.shape) // 2 - 1
    for _ in range(6):
        if (np.abs(at) > limit).any():
            break
        _, part = split(at)
        whole = at - part
        known = canvas.window(there, at, stack.shape) > 0.99
        known[:RIM], known[-RIM:], known[:, :RIM], known[:, -RIM:] = False, False, False, False
        seen = canvas.window(mean, at, stack.shape)
        slopes = np.stack([_slope(canvas, mean, whole, part, stack.shape, axis) for axis in (0, 1)])
        used = known.astype(np.float32)
        power = float((seen**2 * used).sum())
        strength = float((stack.flat[k] * seen * used).sum()) / max(power, 1e-30)
        residual = (stack.flat[k] - np.float32(strength) * seen) * used
        weight = _evened(residual, seen, used)
        slopes *= -np.float32(strength)
        normal = np.einsum("iyx,jyx->ij", slopes * weight, slopes).astype(np.float64)
        if not np.isfinite(normal).all() or np.linalg.cond(normal) > 1e12:
            break
        line = np.einsum("iyx,yx->yi", slopes, weight * residual).astype(np.float64)
        step = np.linalg.solve(normal, line.sum(axis=0))
        at = at + np.clip(step, -1, 1)
        group = np.add.reduceat(line, np.arange(0, len(line), 4), axis=0)
        inverse = np.linalg.inv(normal)
        covariance = inverse @ (group.T @ group) @ inverse
        alike = _blocks_alike(stack.flat[k], seen, used)
        if np.abs(step).max() < 2e-4:
            break
    return Fit(at, np.sqrt(np.diag(covariance)), strength, alike)


def _evened(residual: Thin, seen: Thin, used: Thin) -> Thin:
    """Weights (mean about 1) that even out noise which grows with brightness: its variance as a line in ``seen``."""
    count = max(float(used.sum()), 1.0)
    square = residual**2
    middle = max(float(square.sum()) / count, 1e-30)
    level = float((seen * used).sum()) / count
    away = (seen - level) * used
    slope = max(float((away * square).sum()) / max(float((away**2).sum()), 1e-30), 0.0)
    return np.asarray(used * middle / np.maximum(middle + slope * (seen - level), 0.25 * middle), dtype=np.float32)


def _slope(canvas: Canvas, mean: Thin, whole: Floats, part: Floats, shape: tuple[int, int], axis: int) -> Thin:
    """Derivative along ``axis`` of the canvas as a view of shift ``whole + part`` sees it."""
    top, left = (np.array(shape) // 2 - np.rint(whole).astype(int)).tolist()
    pad = REACH
    cut = np.pad(mean, pad)[top : top + shape[0] + 2 * pad, left : left + shape[1] + 2 * pad]
    return shifted(cut, part, slope=axis)[pad:-pad, pad:-pad]


def _blocks_alike(view: Thin, seen: Thin, used: Thin) -> float:
    """Part of an 8 x 8 grid of blocks in which the view has at least 0.3 of the strength of what is expected."""

    def blocks(field_: Thin) -> Floats:
        rows, columns = (np.linspace(0, size, 9).astype(int)[:-1] for size in field_.shape)
        return np.asarray(np.add.reduceat(np.add.reduceat(field_, rows, axis=0), columns, axis=1), dtype=np.float64)

    power = blocks(seen**2 * used)
    counted = power > 0.2 * np.median(power[power > 0]) if (power > 0).any() else power > 0
    if not counted.any():
        return 0.0
    return float((blocks(view * seen * used)[counted] > 0.3 * power[counted]).mean())
