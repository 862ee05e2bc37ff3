"""Whatever form frames are kept in, they answer as plain arrays do, to the last count."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemloop.core.errors import InputError
from stemloop.core.protocols import Block
from stemloop.stream import masks as m
from stemloop.stream.dense import DenseBlock
from stemloop.stream.events import EventBlock
from stemloop.stream.gaps import GapBlock

FORMS = {
    "dense": DenseBlock,
    "events": EventBlock.from_dense,
    "counted": lambda frames: EventBlock.from_dense(frames).counted(),
    "single": lambda frames: EventBlock.from_dense(frames).single(),
    "gaps": lambda frames: GapBlock.of(DenseBlock(frames)),
}


@st.composite
def counts(draw):
    """Frames from empty to several electrons a pixel, some with a very bright pixel, of any small shape."""
    shape = draw(st.integers(0, 6)), draw(st.integers(1, 23)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    frames = rng.poisson(draw(st.sampled_from([0.0, 0.003, 0.1, 2.0])), shape)
    if frames.size and draw(st.booleans()):
        frames.flat[rng.integers(frames.size)] = draw(st.sampled_from([255, 256, 65535, 70000]))
    return frames.astype(np.uint16 if frames.max(initial=0) < 2**16 else np.uint32)


def expected(frames, masks):
    return np.einsum("fyx,kyx->fk", frames.astype(np.int64), masks)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(frames=counts(), seed=st.integers(0, 2**32))
def test_every_form_answers_as_the_plain_frames(form, frames, seed):
    rng = np.random.default_rng(seed)
    shape = frames.shape[1:]
    block = FORMS[form](frames)
    assert isinstance(block, Block)
    assert (block.frames, block.shape) == (len(frames), shape)
    assert np.array_equal(block.dense(), frames)
    assert np.array_equal(block.total(), frames.sum(axis=0, dtype=np.uint64))
    assert np.array_equal(block.moments(), expected(frames, m.ramps(shape)))
    whole = np.concatenate([m.ramps(shape), rng.integers(0, 2, (2, *shape)), rng.integers(-40, 1000, (3, *shape))])
    assert np.array_equal(block.dot(whole), expected(frames, whole))
    assert np.array_equal(block.dot(whole.astype(np.float64)), expected(frames, whole))
    real = rng.normal(size=(2, *shape))
    # 70000 electrons of a pixel are added one after the other: 7e4 roundings of 1.1e-16 at most
    scale = expected(frames, np.abs(real)) + 1
    assert np.all(np.abs(block.dot(real) - expected(frames, real)) < 1e-11 * scale)
    labels = rng.integers(-1, 4, shape)
    rings = np.stack([np.where(labels == k, frames, 0).sum(axis=(1, 2)) for k in range(3)], axis=1)
    assert np.array_equal(block.azimuthal(labels, 3), rings)
    for index in range(len(frames)):
        assert np.array_equal(block.frame(index), frames[index])
    first, stop = sorted(rng.integers(0, len(frames) + 1, 2))
    assert np.array_equal(block[first:stop].dense(), frames[first:stop])
    assert np.array_equal(block[first:stop].moments(), expected(frames[first:stop], m.ramps(shape)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(frames=counts(), cut=st.integers(0, 6))
def test_what_was_cut_is_joined_again(frames, cut):
    block = EventBlock.from_dense(frames)
    for one, two in ((block[:cut], block[cut:]), (block[:cut].counted(), block[cut:].single())):
        assert EventBlock.concatenate([one, two]) == block
    again = EventBlock(block.indptr, block.index, block.shape, block.counts)  # passes its own checks
    assert again == block and block.counted() == block.single() == GapBlock.of(block).events()


@pytest.mark.parametrize("form", FORMS)
def test_frames_of_more_than_65536_pixels(form):
    frames = np.zeros((3, 300, 301), np.uint16)
    frames[0, 0, 0] = frames[1, -1, -1] = 3
    frames[2, 299, 0] = frames[2, 299, 2] = 1
    block = FORMS[form](frames)
    assert np.array_equal(block.dense(), frames)
    assert np.array_equal(block.moments(), expected(frames, m.ramps((300, 301))))


def test_a_sum_of_full_sixteen_bit_frames_does_not_run_over():
    frames = np.full((1, 500, 300), 65535, np.uint16)
    rows, columns = np.indices((500, 300))
    assert np.array_equal(DenseBlock(frames).moments()[0], 65535 * np.array([150000, rows.sum(), columns.sum()]))


def test_rings_hold_the_pixels_between_their_radii():
    rows, columns = np.indices((31, 40))
    radius = np.hypot(rows - 14.5, columns - 20)
    edges = np.array([0, 3, 7, 12.5])
    ring = m.rings((31, 40), (14.5, 20), edges)
    for k in range(3):
        assert np.array_equal(ring == k, (edges[k] <= radius) & (radius < edges[k + 1]))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (([0, 2], [3, 1], (2, 2)), "grow"),
        (([0, 1], [4], (2, 2)), "below 4"),
        (([0, 3], [1], (2, 2)), "grows from 0 to the 1"),
        (([1, 1], [1], (2, 2)), "grows from 0"),
        (([0, 2], [1, 1], (2, 2), [1, 1]), "grow"),
        (([0, 1], [1], (2, 2), [0]), "from 1"),
        (([0, 0], [], (0, 2)), "at least one row"),
    ],
)
def test_impossible_events_are_refused(arguments, says):
    indptr, index, shape, *rest = arguments
    rest = [np.array(r) for r in rest]
    with pytest.raises(InputError, match=says):
        EventBlock(np.array(indptr), np.array(index, np.int64), shape, *rest)


def test_impossible_frames_gaps_and_masks_are_refused():
    with pytest.raises(InputError, match="0 to 2\\^32 - 1; got -1"):
        EventBlock.from_dense(np.full((1, 2, 2), -1))
    with pytest.raises(InputError, match="whole numbers"):
        DenseBlock(np.zeros((1, 2, 2)))
    with pytest.raises(InputError, match="outside its frame"):
        GapBlock(np.array([0, 2]), np.array([3, 1], np.uint8), (2, 2))
    for form in FORMS.values():
        with pytest.raises(InputError, match="shape \\(k, 2, 2\\)"):
            form(np.ones((1, 2, 2), np.uint8)).dot(np.ones((2, 2)))
        with pytest.raises(InputError, match="labels are whole"):
            form(np.ones((1, 2, 2), np.uint8)).azimuthal(np.ones((2, 3), int), 2)
    with pytest.raises(InputError, match="too many to list"):
        EventBlock.from_dense(np.full((1, 2, 2), 2**32 - 1)).single()
