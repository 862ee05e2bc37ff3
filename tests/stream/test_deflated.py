"""Chunks made from events are what zlib, isal and HDF5 unpack to the frames."""

from __future__ import annotations

import zlib

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stemloop.core.chunk import deflate, inflate
from stemloop.core.errors import InputError
from stemloop.stream.deflated import _code, deflated
from stemloop.stream.events import EventBlock


def unpacked(frames, rows=None, dtype="<u2"):
    raw = deflated(EventBlock.from_dense(frames), dtype, rows)
    assert raw is not None
    shape = (len(frames) if rows is None else rows, *frames.shape[1:])
    found = inflate(raw, np.dtype(dtype), shape)
    assert len(zlib.decompress(raw)) == found.nbytes  # checksum and end, by zlib itself
    return found


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.uint32, st.tuples(st.integers(1, 4), st.just(1), st.integers(400, 900)), elements=st.just(0)),
    st.lists(st.tuples(st.integers(0, 399), st.sampled_from([1, 1, 2, 3, 255, 256, 257, 65535, 70000])), max_size=40),
    st.integers(0, 3),
)
def test_every_sparse_block_comes_back(frames, hits, more):
    for place, count in hits:
        frames[place % len(frames), 0, place] = count
    assert np.array_equal(unpacked(frames, len(frames) + more, "<u4")[: len(frames)], frames)


@pytest.mark.parametrize("electrons", [0, 1, 5, 200, 700])
def test_counted_frames(electrons):
    rng = np.random.default_rng(electrons)
    rate = np.exp(-np.hypot(*(np.indices((96, 80)) - 44.0)) / 9)
    frames = rng.poisson(electrons * rate / rate.sum(), (40, 96, 80)).astype(np.uint16)
    assert np.array_equal(unpacked(frames), frames)
    if electrons >= 5:
        assert len(deflated(EventBlock.from_dense(frames), "<u2")) < len(deflate(frames))
    skewed = np.zeros((2, 64, 64), np.uint16)  # weights like Fibonacci's numbers make Huffman's code deep
    skewed.reshape(-1)[rng.choice(skewed.size, 200, replace=False)] = 1 + np.minimum(rng.geometric(0.35, 200), 40)
    assert np.array_equal(unpacked(skewed), skewed)


def test_hdf5_unpacks_it(tmp_path):
    frames = np.random.default_rng(1).poisson(0.01, (16, 64, 64)).astype("<u2")
    with h5py.File(tmp_path / "f.h5", "w") as file:
        data = file.create_dataset("d", frames.shape, "<u2", chunks=frames.shape, shuffle=True, compression="gzip")
        data.id.write_direct_chunk((0, 0, 0), deflated(EventBlock.from_dense(frames), "<u2"))
    with h5py.File(tmp_path / "f.h5") as file:
        assert np.array_equal(file["d"][()], frames)


def test_dense_frames_and_too_large_counts_are_left_to_others():
    assert deflated(EventBlock.from_dense(np.ones((2, 8, 8), np.uint16)), "<u2") is None
    large = np.zeros((1, 64, 64), np.uint32)
    large[0, 3, 4] = 70000
    assert deflated(EventBlock.from_dense(large), "<u2") is None


def test_runs_of_two_zeros_among_many_counts_come_back():
    # where zeros are the rarest of all bytes, three of their codes must still be written at once (32 bits)
    weight = np.zeros(286, np.int64)
    weight[1:256], weight[0], weight[256], weight[285] = 3000, 1, 1, 900
    assert 3 * _code(weight)[0] <= 32
    rng = np.random.default_rng(0)
    frames = np.zeros((1, 1000, 1000), np.uint16)
    for first in range(1000, 1024):
        frames.reshape(-1)[:99_000] = rng.integers(1, 256, 99_000)
        frames.reshape(-1)[first : first + 3] = 0
        assert np.array_equal(unpacked(frames), frames)


def test_frames_whose_bytes_are_turned_round_are_left_to_others():
    frames = np.random.default_rng(2).poisson(0.01, (4, 64, 64)).astype(np.uint16)
    assert deflated(EventBlock.from_dense(frames), ">u2") is None
    assert deflated(EventBlock.from_dense(frames), "u1") is not None


def test_more_frames_than_rows_are_refused():
    with pytest.raises(InputError, match="do not fit"):
        deflated(EventBlock.from_dense(np.zeros((3, 8, 8), np.uint16)), "<u2", 2)
