"""Our coordinates and Nion's say the same places."""

import math

import numpy as np
import pytest

pytest.importorskip("nion.usim_device", reason="the extra nion is not installed")

from nion.device_kit.ScanDevice import ScanFrameParameters
from nion.utils import Geometry

from stemloop.core.errors import LimitError
from stemloop.core.instruction import Image
from stemloop.instrument.nion.device import image_of
from stemloop.instrument.nion.geometry import View, turned

FIELD_M = (12e-9, 20e-9)


def some_views(n=20):
    rng = np.random.default_rng(0)
    for _ in range(n):
        yield View(tuple(rng.uniform(0.2, 1.0, 2) * FIELD_M), rng.uniform(-math.pi, math.pi))


def absolute(view, position_m):
    """Where a position of the view is in the largest field, with which it shares the centre."""
    away = turned((position_m[0] - view.extent_m[0] / 2, position_m[1] - view.extent_m[1] / 2), view.rotation_rad)
    return away[0] + FIELD_M[0] / 2, away[1] + FIELD_M[1] / 2


def test_the_turn_is_the_instructions_own():
    image = Image((-1e-9, -1e-9), (2e-9, 2e-9), (2, 2), 1e-6, rotation_rad=0.3)
    upright = Image((-1e-9, -1e-9), (2e-9, 2e-9), (2, 2), 1e-6)
    for a, b in zip(image.positions().reshape(-1, 2), upright.positions().reshape(-1, 2), strict=True):
        assert turned(tuple(b), 0.3) == pytest.approx(tuple(a), abs=1e-21)


def test_nions_own_turn_counts_the_same_way():
    point = Geometry.FloatPoint(y=0.2, x=-0.7)
    assert turned((0.2, -0.7), 0.4) == pytest.approx(point.rotate(0.4).as_tuple())


@pytest.mark.parametrize("view", some_views())
def test_a_fraction_of_the_context_is_the_place_and_back(view):
    rng = np.random.default_rng(1)
    for position in rng.random((10, 2)) * view.extent_m:
        fraction = view.fraction(tuple(position))
        assert all(0 <= f <= 1 for f in fraction)
        assert view.position_m(fraction) == pytest.approx(tuple(position), abs=1e-20)
        # the context is upright about the common centre, whatever the view's turn
        middle = [(f - 0.5) * view.side_m + size / 2 for f, size in zip(fraction, FIELD_M, strict=True)]
        assert tuple(middle) == pytest.approx(absolute(view, position), abs=1e-20)


def test_outside_the_context_is_refused():
    with pytest.raises(LimitError, match="lies outside the field"):
        View(FIELD_M).fraction((0.0, 21e-9))
    with pytest.raises(LimitError, match="corner of the image"):
        View(FIELD_M).subscan(Image((0.0, 0.0), (12e-9, 21e-9), (12, 21), 1e-6))


@pytest.mark.parametrize("view", some_views())
def test_an_image_asked_through_nions_words_is_the_image_that_was_meant(view):
    rng = np.random.default_rng(2)
    extent = rng.uniform(0.1, 0.4, 2) * min(view.extent_m)
    origin = rng.uniform(0.3, 0.5, 2) * (np.array(view.extent_m) - extent)
    asked = Image(tuple(origin), tuple(extent), (4, 7), 3e-6, rotation_rad=0.2)
    part = view.subscan(asked)
    words = ScanFrameParameters(
        pixel_size=(256, 256),
        fov_nm=view.side_m * 1e9,
        pixel_time_us=3.0,
        subscan_pixel_size=(4, 7),
        subscan_fractional_center=part.middle,
        subscan_fractional_size=part.size,
        subscan_rotation=part.rotation_rad,
    )
    heard = image_of(words, "HAADF", FIELD_M)
    assert heard.shape == asked.shape and heard.dwell_s == pytest.approx(3e-6)
    wanted = [absolute(view, position) for position in asked.positions().reshape(-1, 2)]
    np.testing.assert_allclose(heard.positions().reshape(-1, 2), wanted, rtol=0, atol=1e-20)
