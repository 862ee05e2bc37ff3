import os
from pathlib import Path

import numpy as np
import pytest
from plain_block import PlainBlock, pieces

from stemloop.core.errors import InputError
from stemloop.core.protocols import Camera
from stemloop.reduce.detectors import Patterns, Radial, Virtual, disk_area, find_disk, ring, segments, standard
from stemloop.reduce.engine import reduce
from stemloop.stream.dense import DenseBlock
from stemloop.stream.events import EventBlock

DATA = Path(os.environ.get("STEMLOOP_DATA") or Path(__file__).parents[2] / "../shared/data")
CAMERA = Camera((40, 48), 0.8e-3, (18.7, 24.2))


@pytest.mark.parametrize("radius", [0.3, 1.0, 5.5, 17.25])
@pytest.mark.parametrize("centre", [(18.7, 24.2), (20.0, 20.5)])
def test_the_area_of_a_disk_is_exact(radius, centre):
    area = disk_area((40, 48), centre, radius)
    assert abs(area.sum() - np.pi * radius**2) < 1e-10 * max(1, radius**2)
    # the middle of mass of the area is the centre up to what a pixel's own width hides; check against fine sampling
    fine = (np.arange(64) + 0.5) / 64 - 0.5
    y = (np.arange(40)[:, None] + fine)[:, None, :, None] - centre[0]
    x = (np.arange(48)[:, None] + fine)[None, :, None, :] - centre[1]
    sampled = (y**2 + x**2 <= radius**2).mean(axis=(2, 3))
    assert np.abs(area - sampled).max() < 0.02  # 64 x 64 points a pixel know an edge to about 1/64


def test_a_disk_may_reach_over_the_edge_of_the_frame():
    whole = disk_area((40, 40), (20.0, 20.0), 9.5)
    part = disk_area((40, 24), (20.0, 20.0), 9.5)
    assert np.abs(part - whole[:, :24]).max() < 1e-12
    assert disk_area((8, 8), (100.0, 100.0), 3.0).sum() == 0.0
    assert np.allclose(disk_area((8, 8), (3.0, 3.0), 100.0), 1.0)


def test_rings_that_meet_share_their_pixels():
    edges = [0.0, 2.3e-3, 4.1e-3, 9.9e-3, 60e-3]
    rings = np.stack([ring(CAMERA, a, b) for a, b in zip(edges[:-1], edges[1:])])
    assert np.abs(rings.sum(0) - 1).max() <= 4 / 2**16  # each is rounded to 2^-16


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_segments_make_up_their_ring_exactly(n):
    parts = segments(CAMERA, 1.5e-3, 9.1e-3, n, start_rad=0.3)
    assert np.array_equal(parts.sum(0), ring(CAMERA, 1.5e-3, 9.1e-3)) and parts.min() >= 0
    area = np.pi * (9.1**2 - 1.5**2) / 0.8**2 / n
    assert np.allclose(parts.sum((1, 2)), area, rtol=0.01)  # 16 x 16 points on the border pixels
    # the first segment lies where it is said to lie
    y, x = np.indices(CAMERA.shape)
    middle = np.angle(np.sum(parts[0] * ((x - 24.2) + 1j * (y - 18.7)))) if n > 1 else 0.3 + np.pi
    assert abs(np.angle(np.exp(1j * (middle - 0.3 - np.pi / n)))) < 0.01


def test_a_virtual_detector_counts_and_knows_its_deviation():
    rng = np.random.default_rng(1)
    mean = 3 * ring(CAMERA, 0, 8e-3) + 0.2
    data = rng.poisson(mean, (40, 25, *CAMERA.shape)).astype(np.uint16)
    masks = standard(CAMERA, 8e-3)
    assert set(masks) == {"bf", "abf", "adf", "haadf"}
    maps = reduce(Virtual(masks), pieces(data, range(90, 1000, 90)), (40, 25), CAMERA.shape)
    for name, mask in masks.items():
        expected = np.sum(mask * mean)
        # a deviation taken from few counts goes with them, so the mean one is compared
        z = (maps[name] - expected) / np.sqrt(np.mean(maps[f"{name}_sigma"] ** 2))
        assert abs(z.mean()) < 4 / np.sqrt(z.size)
        assert abs(z.std() - 1) < 4 / np.sqrt(2 * z.size) + 0.02  # 1000 draws
        assert np.allclose(maps[name], np.einsum("ijyx,yx->ij", data, mask), rtol=1e-13)


@pytest.mark.parametrize("form", [DenseBlock, EventBlock.from_dense, PlainBlock])
def test_every_form_of_block_gives_the_same_bits(form):
    data = np.random.default_rng(2).poisson(0.4, (30, *CAMERA.shape)).astype(np.uint16)
    folds = [Virtual(standard(CAMERA, 8e-3)), Patterns(), Radial(CAMERA, 1e-3, 12)]
    maps = reduce(folds, [(0, form(data[:11])), (11, form(data[11:]))], (5, 6), CAMERA.shape)
    plain = reduce(folds, [(0, PlainBlock(data))], (5, 6), CAMERA.shape)
    assert all(maps[name].tobytes() == plain[name].tobytes() for name in plain)


def test_patterns_are_those_of_numpy():
    rng = np.random.default_rng(3)
    # large counts with little spread: the textbook sum of squares in float64 would lose the variance
    data = (3_000_000_000 + rng.integers(0, 9, (6, 5, 8, 9))).astype(np.uint32)
    maps = reduce(Patterns(), pieces(data, [4, 17]), (6, 5), (8, 9))
    flat = data.reshape(30, 8, 9).astype(np.float64)
    assert np.array_equal(maps["sum_pattern"], data.sum((0, 1), dtype=np.int64))
    assert np.array_equal(maps["maximum_pattern"], flat.max(0))
    assert np.allclose(maps["mean_pattern"], flat.mean(0), rtol=1e-15)
    assert np.allclose(maps["variance_pattern"], flat.var(0, ddof=1), rtol=1e-9)


def test_radial_profiles_conserve_counts_and_flatten_a_flat_pattern():
    rng = np.random.default_rng(4)
    data = rng.poisson(2.0, (3, 4, *CAMERA.shape)).astype(np.uint16)
    fold = Radial(CAMERA, 1.1e-3, 11)
    maps = reduce(fold, pieces(data, [5]), (3, 4), CAMERA.shape)
    inside = ring(CAMERA, 0, 11 * 1.1e-3)
    assert np.allclose(
        maps["radial"] @ fold.rings.sum((1, 2)), np.einsum("ijyx,yx->ij", data, inside), rtol=1e-4
    )  # the one disk is rounded to 2^-16 a pixel, as are the rings
    z = (maps["radial"] - 2.0) / maps["radial_sigma"]
    assert abs(z.std() - 1) < 0.25  # 132 values
    flat = reduce(fold, [(0, PlainBlock(np.full((12, *CAMERA.shape), 7, np.uint8)))], (3, 4), CAMERA.shape)
    assert np.allclose(flat["radial"], 7.0, rtol=1e-12)


def test_the_bright_disk_is_found():
    rng = np.random.default_rng(5)
    pattern = rng.poisson(200 * disk_area((64, 60), (30.3, 27.8), 11.4) + 5)
    pattern[50:53, 50:53] = 60  # a weak diffracted spot
    centre, radius = find_disk(pattern)
    assert np.hypot(centre[0] - 30.3, centre[1] - 27.8) < 0.15 and abs(radius - 11.4) < 0.15
    with pytest.raises(InputError, match="no bright disk"):
        find_disk(np.zeros((8, 8)))


def test_wrong_masks_are_refused():
    with pytest.raises(InputError, match="inner < outer"):
        ring(CAMERA, 2e-3, 1e-3)
    with pytest.raises(InputError, match="the mask bf"):
        reduce(Virtual({"bf": np.ones((3, 3))}), [], (2, 2), CAMERA.shape)
