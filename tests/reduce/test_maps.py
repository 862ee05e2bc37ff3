"""An image over a map: known places come back with honest deviations, and chance is not taken for a place."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from stemloop.core.errors import InputError
from stemloop.reduce.register import register_to_map

DATA = Path(os.environ.get("STEMLOOP_DATA") or Path(__file__).parents[2] / "../shared/data")


def seen(image, matrix, offset, shape, ratio):
    """A map of ``shape``: means of the image over squares of ``ratio`` px at ``matrix @ place + offset``."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1).reshape(-1, 2)
    part = (np.arange(ratio) - (ratio - 1) / 2)[:, None]
    total = np.zeros(len(grid))
    for dy in part[:, 0]:
        for dx in part[:, 0]:
            total += ndimage.map_coordinates(image, (grid @ matrix.T + offset + [dy, dx]).T, order=3)
    return total.reshape(shape) / ratio**2


def test_place_scale_and_turn_come_back():
    z = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        image = ndimage.gaussian_filter(rng.normal(size=(260, 240)), 4.0)
        angle, scale = rng.uniform(-0.06, 0.06), rng.uniform(0.97, 1.03)
        c, s = np.cos(angle), np.sin(angle)
        matrix = 5 * scale * np.array([[c, s], [-s, c]])
        offset = rng.uniform(30, 50, 2)
        chart = 3.0 - 40 * seen(image, matrix, offset, (30, 26), 5)  # dark where the image is bright
        chart += rng.normal(0, 0.3 * chart.std(), chart.shape)
        found = register_to_map(image, chart, 5.0)
        assert found.trusted and found.correlation < -0.9
        z += [*((found.matrix - matrix) / found.matrix_sigma).ravel(), *((found.offset - offset) / found.offset_sigma)]
        place = np.array([[3.0, 4.0]])
        assert np.allclose(found.on_map(found.on_image(place)), place)
    assert 0.5 < np.std(z) < 1.6  # 24 numbers that are not independent


def test_chance_is_not_trusted():
    rng = np.random.default_rng(1)
    image = ndimage.gaussian_filter(rng.normal(size=(200, 200)), 4.0)
    assert not register_to_map(image, rng.normal(size=(20, 20)), 5.0).trusted


@pytest.mark.parametrize("bad", [np.ones((20, 20)), np.ones((2, 2)), np.full((20, 20), np.nan), np.ones((9, 9, 3))])
def test_what_is_no_map_is_refused(bad):
    with pytest.raises(InputError):
        register_to_map(np.random.default_rng(0).random((100, 100)), bad, 5.0)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real files: {DATA} is not there (set STEMLOOP_DATA)")
def test_a_real_scan_over_its_own_map():
    from rsciio.digitalmicrograph import file_reader

    folder = DATA / "haadf/SciFiReaders"
    scan = np.asarray(file_reader(str(folder / "SI-HAADF.dm3"))[0]["data"], dtype=np.float64)
    chart = scan.reshape(49, 32, 6, 32).mean(axis=(1, 3))
    chart += np.random.default_rng(0).normal(0, 0.3 * chart.std(), chart.shape)
    found = register_to_map(scan, chart, 32.0)
    # the middle of the map's pixel (0, 0) is 15.5 px from the image's corner; 32 px a pixel
    assert np.abs((found.offset - 15.5) / found.offset_sigma).max() < 3
    assert np.abs(np.diag(found.matrix) - 32).max() < 1
    spectra = np.asarray(
        file_reader(str(DATA / "eels/SciFiReaders/DMReader_SpectrumImage_SI-EELS.dm3"))[0]["data"], dtype=np.float64
    )
    spectra = np.moveaxis(spectra, int(np.argmax(spectra.shape)), -1)
    # the noisy sum of the core-loss spectra does not follow the image: said so, no place is invented
    assert not register_to_map(scan, spectra.sum(axis=-1), 32.0).trusted
