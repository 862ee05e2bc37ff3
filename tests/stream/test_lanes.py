"""Sums of sixty-four electrons at a time equal the sums of the plain frames, to the last count."""

import numpy as np
import pytest

from stemloop.stream import lanes
from stemloop.stream import masks as m
from stemloop.stream.dense import DenseBlock
from stemloop.stream.events import EventBlock
from stemloop.stream.gaps import GapBlock

SHAPES = [(128, 128), (256, 256), (100, 64), (200, 32), (3, 4), (1, 256), (256, 1)]
ELECTRONS = [0, 1, 63, 64, 65, 128, 0, 700, 4097, 2]


def scan(shape: tuple[int, int], rng: np.random.Generator) -> EventBlock:
    """Frames of no, a few and many electrons, the first and the last pixel among them; sparse ones have escapes."""
    pixels = shape[0] * shape[1]
    frames = [np.sort(rng.integers(0, pixels, n)) for n in ELECTRONS]
    frames += [np.array([0]), np.array([pixels - 1]), np.sort(rng.integers(0, min(5, pixels), 200))]
    ends = np.concatenate([[0], np.cumsum([len(frame) for frame in frames])])
    return EventBlock(ends, np.concatenate(frames), shape)


def masks_of(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The ramps, a ring, all, nothing, two columns, half planes, noise (many runs), and weights."""
    centre = tuple((n - 1) / 2 for n in shape)
    rows, columns = np.indices(shape)
    ring = m.rings(shape, centre, np.array([min(shape) / 6, min(shape) / 2.2])) == 0
    two = (columns == 0) | (columns == shape[1] - 1)
    noise = rng.random(shape) < 0.5
    plain = [ring, rows >= 0, rows < 0, two, rows > columns, noise, rng.integers(-3, 9, shape)]
    return np.concatenate([m.ramps(shape)[[2, 0, 1]], np.stack(plain), m.ramps(shape)[[1]]])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wide", [True, False], ids=["lanes", "one by one"])
def test_sums_are_those_of_the_frames(shape, wide, monkeypatch):
    if wide and not lanes.READY:
        pytest.skip("this processor has no AVX-512 VBMI")
    monkeypatch.setattr(lanes, "READY", wide)
    rng = np.random.default_rng(sum(shape))
    block = scan(shape, rng)
    masks = masks_of(shape, rng)
    wanted = np.einsum("fyx,kyx->fk", block.dense().astype(np.int64), masks)
    for form in (block, GapBlock.of(block)):
        np.testing.assert_array_equal(form.dot(masks), wanted)
        np.testing.assert_array_equal(form.dot(masks[5:6]), wanted[:, 5:6])
        np.testing.assert_array_equal(form.dot(masks[8:9]), wanted[:, 8:9])
        np.testing.assert_array_equal(form.moments(), wanted[:, [1, 2, 0]])
        np.testing.assert_array_equal(form[3:9].dot(masks), wanted[3:9])
        np.testing.assert_array_equal(form[2:2].dot(masks), wanted[2:2])


@pytest.mark.parametrize("shape", [(128, 128), (256, 256), (5, 128), (9, 384)], ids=str)
def test_plain_frames_in_strips(shape, monkeypatch):
    """Full frames (65535 everywhere) are the largest sums; the lanes and the plain loops agree with whole numbers."""
    rng = np.random.default_rng(shape[0])
    frames = rng.integers(0, 65536, (3, *shape)).astype(np.uint16)
    frames[1] = 65535
    masks = masks_of(shape, rng)
    wanted = np.einsum("fyx,kyx->fk", frames.astype(np.int64), masks)
    for ready in {lanes.READY, False}:
        monkeypatch.setattr(lanes, "READY", ready)
        block = DenseBlock(frames)
        np.testing.assert_array_equal(block.dot(masks), wanted)
        np.testing.assert_array_equal(block.dot(masks[6:8]), wanted[:, 6:8])
        np.testing.assert_array_equal(block.moments(), wanted[:, [1, 2, 0]])


@pytest.mark.parametrize("dtype", [">u2", "<u2", np.int64])
def test_plain_frames_in_any_order_in_memory(dtype):
    """Columns first, or every second pixel, or swapped bytes: the same counts."""
    plain = np.random.default_rng(3).integers(0, 65536, (3, 5, 256))
    wide = np.zeros((3, 10, 512), dtype)
    wide[:, ::2, ::2] = plain
    masks = masks_of((5, 256), np.random.default_rng(4))
    for frames in (np.asfortranarray(plain.astype(dtype)), wide[:, ::2, ::2]):
        np.testing.assert_array_equal(DenseBlock(frames).dot(masks), np.einsum("fyx,kyx->fk", plain, masks))


def test_runs_say_where_a_mask_is_one():
    """Spreading the runs over the columns gives the mask back."""
    rng = np.random.default_rng(0)
    for columns in (1, 7, 255, 256):
        first, stop = np.sort(rng.integers(0, columns + 1, (4, 200, 1)), axis=0)[[0, 3]]
        middle = (first + stop) // 2
        place = np.arange(columns)
        mask = (place >= first) & (place < stop) & ((place != middle) | (stop - first > columns // 2))
        table = lanes.runs(mask).astype(np.int64)[:, :200, None]
        inside = [(place >= table[k]) & (place < table[k] + table[k + 1]) for k in (0, 2)]
        np.testing.assert_array_equal(inside[0] | inside[1], mask)


@pytest.mark.parametrize("gap", [1, 2, 40, 100, 127, 128, 129, 200, 253, 254])
def test_a_long_run_beside_a_short_one(gap):
    """Either of a row's two runs may be longer than half of 256 columns."""
    mask = np.ones((1, 256), np.uint8)
    mask[0, gap] = 0
    place, table = np.arange(256), lanes.runs(mask).astype(np.int64)[:, 0]
    inside = [(place >= table[k]) & (place < table[k] + table[k + 1]) for k in (0, 2)]
    np.testing.assert_array_equal(inside[0] | inside[1], mask[0])
    block = EventBlock(np.array([0, 256]), place, (1, 256))
    for form in (block, GapBlock.of(block)):
        np.testing.assert_array_equal(form.dot(mask[None]), [[255]])


@pytest.mark.parametrize("mask", [[[1, 0, 1, 0, 1]], [[0, 2]], [[0.5, 1.0]], [[np.nan, 1.0]]], ids=str)
def test_no_runs(mask):
    assert lanes.runs(np.array(mask)) is None
