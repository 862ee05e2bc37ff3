"""Random scenes: reproducible, of the kind asked for, and with the truth that they state."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from stemloop.core.errors import UnknownName
from stemloop.simulate.scenes import KINDS, PIXEL_PM, _bumps, scene


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_makes_the_same_scene(kind):
    one, other = (scene(np.random.default_rng(3), 40.0, kind) for _ in range(2))
    assert np.array_equal(one.image, other.image) and np.array_equal(one.position, other.position)
    assert one.kind == kind and np.isfinite(one.image).all()
    assert PIXEL_PM[0] <= one.pixel_pm <= PIXEL_PM[1]


def test_a_scene_is_as_large_as_asked_in_widths_of_its_probe():
    for seed in range(8):
        made = scene(np.random.default_rng(seed), 50.0)
        assert made.image.shape[0] == pytest.approx(max(24, 50 * made.probe), abs=1)


def test_columns_are_apart_and_where_the_image_is_bright():
    """The mean over many scenes of the matched filter at the true places, in deviations of the image, is well above
    that at random places."""
    at, elsewhere = [], []
    for seed in range(24):
        rng = np.random.default_rng([9, seed])
        made = scene(rng, 50.0, ["lattice", "particle", "single atoms"][seed % 3])
        if len(made.position) > 1:
            near = cKDTree(made.position).query(made.position, 2)[0][:, 1]
            assert near.min() > 1.2 * made.probe
        from scipy import ndimage

        seen = -ndimage.gaussian_laplace(made.image, made.probe)
        seen = (seen - seen.mean()) / seen.std()
        index = made.position.round().astype(int)
        index = index[((index > 3) & (index < made.image.shape[0] - 4)).all(axis=1)]
        at += list(seen[tuple(index.T)])
        elsewhere += list(seen[tuple(rng.integers(4, made.image.shape[0] - 4, (2, len(index))))])
    assert np.mean(at) > np.mean(elsewhere) + 0.5


def test_nothing_is_nothing():
    for seed in range(5):
        made = scene(np.random.default_rng(seed), 40.0, "nothing")
        assert len(made.position) == 0 and made.image.std() > 0


def test_unknown_kinds_are_refused():
    with pytest.raises(UnknownName, match="lattice"):
        scene(np.random.default_rng(0), 40.0, "quasicrystal")


def test_columns_are_shown_where_the_scan_and_the_detector_put_them():
    """Bright columns in scenes with displaced lines or afterglow: their centroids are nearer to ``shown``."""
    nominal, shown = [], []
    for seed in range(60):
        made = scene(np.random.default_rng([12, seed]), 40.0, "single atoms")
        assert np.array_equal(made.shown[:, 0], made.position[:, 0])
        if not {"scan", "afterglow"} & set(made.flaws):
            assert np.array_equal(made.shown, made.position)
            continue
        reach = int(np.ceil(2.5 * made.probe))
        for place, there in zip(made.position, made.shown, strict=True):
            y, x = place.round().astype(int)
            if not (reach < y < made.image.shape[0] - reach and reach < x < made.image.shape[1] - reach):
                continue
            part = made.image[y - reach : y + reach + 1, x - reach : x + reach + 1]
            light = np.maximum(part - np.median(part), 0)
            middle = x + (light.sum(axis=0) * np.arange(-reach, reach + 1)).sum() / max(light.sum(), 1e-9)
            nominal.append(middle - place[1])
            shown.append(middle - there[1])
    assert np.median(np.abs(shown)) < np.median(np.abs(nominal))


def test_atoms_that_cannot_be_told_apart_are_one_bump_of_their_light():
    rng = np.random.default_rng(4)
    place, weight = rng.uniform(0, 40, (60, 2)), rng.uniform(0.5, 1.5, 60)
    middle, total, spread = _bumps(place, weight, 2.0)
    assert total.sum() == pytest.approx(weight.sum())
    assert np.allclose(total @ middle, weight @ place)
    moment = (total * ((middle - 20) ** 2).sum(axis=1) + 2 * total * spread**2).sum()  # Huygens and Steiner
    assert moment == pytest.approx((weight * ((place - 20) ** 2).sum(axis=1)).sum())
    assert len(_bumps(place[:1], weight[:1], 2.0)[0]) == 1 and len(_bumps(place[:0], weight[:0], 2.0)[0]) == 0
