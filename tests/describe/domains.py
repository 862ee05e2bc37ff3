"""Layouts of ferroelectrics and films whose domains, walls, vortices and phases are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stemloop.describe.atoms import find_columns
from stemloop.describe.lattices import assign
from stemloop.simulate.pictures import PLANES, Layout, counted, layout, mean_image

#: Displacement of the secondary columns [pm].
SHIFT_PM = 25.0


def displaced(field, shape=(400, 400), plane="BaTiO3[100]", size_pm=SHIFT_PM, rotation=0.0, margin=-30.0) -> Layout:
    """Secondary columns moved by ``size_pm`` times ``field`` of their place (row, col) [px] from the middle."""
    whole = layout(plane, shape, 15.0, rotation, margin=margin)
    second = whole.site == 1
    position = whole.position.copy()
    position[second] += size_pm / 15.0 * field(position[second] - (np.array(shape) - 1) / 2)
    return replace(whole, position=position)


def nothing(r):
    return np.zeros_like(r)


def uniform(r):
    return np.ones_like(r) * [0.6, -0.8]


def stripes(r, width=106.5):
    """Columns of domains along +y and -y with 180 degree walls at multiples of ``width`` from the middle."""
    return np.column_stack([np.where(np.floor(r[:, 1] / width) % 2 == 0, 1.0, -1.0), 0 * r[:, 0]])


def closure(r):
    """Four domains, clockwise on the screen, with 90 degree walls along the diagonals."""
    y, x = r.T
    aside = np.abs(x) > np.abs(y)
    return np.column_stack([np.where(aside, np.sign(x), 0.0), np.where(aside, 0.0, -np.sign(y))])


def array(r, period=420.0):
    """Vortices and antivortices by turns: a clockwise vortex in the middle, antivortices a quarter period off."""
    y, x = (2 * np.pi / period * r).T
    return np.column_stack([np.sin(x) * np.cos(y), -np.cos(x) * np.sin(y)])


def around(r, turn=1, phase=np.pi / 2, core=40.0):
    """One charge in the middle: the direction is ``turn`` times that of the place, plus ``phase``."""
    angle = turn * np.arctan2(r[:, 0], r[:, 1]) + phase
    size = np.tanh(np.hypot(*r.T) / core)
    return np.column_stack([size * np.sin(angle), size * np.cos(angle)])


def film(shape=(512, 512), interface=250.0, wedge=0.0, seed_grains=False) -> tuple[Layout, np.ndarray]:
    """LaCoO3, strained to the width of SrTiO3, above it: the layout and which columns are of the film.

    ``wedge`` is the share of brightness that is lost from left to right.
    """
    whole = layout("SrTiO3[001]", shape, 15.0, margin=-30.0)
    film = whole.position[:, 0] < interface
    position = whole.position.copy()
    position[film, 0] = interface + (position[film, 0] - interface) * 377.0 / 390.5
    weight = np.where(film, PLANES["LaCoO3[001]"].weight[whole.site], 486 / 937 * whole.weight)
    weight = weight * (1 - wedge * position[:, 1] / shape[1])
    grain = film.astype(np.int64) if seed_grains else whole.grain
    inside = ((position > -30) & (position < np.array(shape) + 30)).all(axis=1)
    return replace(whole, position=position, weight=weight, grain=grain).take(inside), film[inside]


def seen(whole: Layout, dose=1e4, seed=0):
    """The columns found in a counted image of ``whole``, and their assignment."""
    image = counted(mean_image(whole, dose), np.random.default_rng(seed))
    columns = find_columns(image)
    return columns, assign(columns, image.shape)


def inner(whole: Layout, margin=3.0) -> Layout:
    """The columns on the picture."""
    on = (whole.position > margin) & (whole.position < np.array(whole.shape) - 1 - margin)
    return whole.take(on.all(axis=1))
