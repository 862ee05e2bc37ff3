"""Stacks of a moving crystal whose truth is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stemloop.simulate import pictures


@dataclass(frozen=True)
class Stack:
    """``frames`` (n, rows, columns), the true ``shift`` (n, 2), the lines' ``jitter`` (n, rows), the ``layout``."""

    frames: np.ndarray
    shift: np.ndarray
    jitter: np.ndarray
    layout: pictures.Layout
    dose: float


def stack(
    n=24, size=192, dose=1e3, seed=0, jitter=0.2, jumps=2, speed=0.3, plane="SrTiO3[001]", vacancies=0.02, stripes=0.0
):
    """Counted frames of a perovskite with 3 pm of disorder and some vacancies, drifting and jumping; ``stripes`` is the
    amplitude, over the brightest column's, of lines that stand still in the scan."""
    rng = np.random.default_rng(seed)
    layout = pictures.layout(plane, (size, size), 15.0, 0.04, margin=-90.0)
    layout = pictures.jittered(pictures.without(layout, vacancies, 1, rng), 3.0, rng)
    shift = pictures.drift(n, rng, speed, jumps, 28.0)
    lines = rng.normal(0, jitter, (n, size)) if jitter else np.zeros((n, size))
    peak = dose * 0.15**2 * pictures.PEAK_OF_DOSE
    still = stripes * peak * (1 + np.cos(2 * np.pi * np.arange(size) / 7.3))[None, :]
    frames = np.empty((n, size, size), dtype=np.float32)
    for k in range(n):
        mean = pictures.mean_image(layout, dose, shift=tuple(shift[k]), row_jitter=lines[k])
        frames[k] = pictures.counted(mean + still, rng)
    return Stack(frames, shift, lines, layout, dose)


def bound(plane, site, dose, pixel_pm=15.0, background=0.1):
    """Cramer-Rao bound [px] of a lone column's coordinate; amplitude, width and background unknown."""
    plane = pictures.PLANES[plane]
    width = plane.width_pm[site] / pixel_pm
    peak = dose * (pixel_pm / 100) ** 2 * pictures.PEAK_OF_DOSE
    y, x = np.mgrid[-14:15, -14:15]
    g = np.exp(-(y**2 + x**2) / (2 * width**2))
    bright = plane.weight[site] * peak
    slopes = np.stack(
        [bright * g * y / width**2, bright * g * x / width**2, g, bright * g * (x**2 + y**2) / width**3, 0 * g + 1]
    ).reshape(5, -1)
    information = (slopes / (bright * g + background * peak).ravel()) @ slopes.T
    return float(np.sqrt(np.linalg.inv(information)[0, 0]))
