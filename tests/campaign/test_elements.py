"""The chance of being the same is calibrated on images, and borders are no structure."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from stemloop.campaign.images.elements import elements_of
from stemloop.simulate.pictures import counted, mean_image
from stemloop.simulate.planted import planted
from stemloop.store.library import same


@pytest.fixture(scope="module", params=["SrTiO3[001]", "MoS2"])
def pair(request):
    """(elements, true site of each) of two images of a perfect crystal at 1e4 e/A^2, of other pixels and turn."""
    rng = np.random.default_rng(3)
    found = []
    for pixel_pm, turn in ((15.0, 0.2), (19.0, 1.1)):
        layout = planted(request.param, (420, 420), pixel_pm, turn, (), rng).layout
        elements = elements_of(counted(mean_image(layout, 1e4), rng))
        near = cKDTree(layout.position).query([e.place for e in elements])[1]
        found.append((elements, layout.site[near]))
    return found


@pytest.mark.parametrize("site", [0, 1])
def test_equal_surroundings_of_two_images_are_seldom_called_others(pair, site):
    one, other = ([e for e, s in zip(*half, strict=True) if s == site] for half in pair)
    chance = [
        same(float(np.linalg.norm(a.vector - b.vector)), a.scatter, b.scatter, len(a.vector))
        for a in one
        for b in other
    ]
    # uniform would be 0.02, 0.1 and 0.5; the tail is not quite chi-square's and the pairs share their columns
    low, tenth, half = np.quantile(chance, (0.02, 0.1, 0.5))
    assert 0.01 < low < 0.1 and 0.07 < tenth < 0.25 and 0.3 < half < 0.7
    assert np.mean(np.array(chance) < 1e-3) < 0.003


def test_surroundings_at_the_border_are_as_good_as_any(pair):
    for elements, site in pair:
        vectors, places = np.array([e.vector for e in elements]), np.array([e.place for e in elements])
        rim = np.minimum(places, 419 - places).min(axis=1) < 70
        for value in (0, 1):
            own = vectors[site == value]
            off = np.linalg.norm(own - np.median(own, axis=0), axis=1)
            outer, inner = off[rim[site == value]], off[~rim[site == value]]
            assert len(outer) > 10
            assert np.median(outer) < 1.25 * np.median(inner) and outer.max() < 1.5 * inner.max()
