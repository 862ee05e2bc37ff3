"""Encoded blocks: what comes out is what went in, and a changed byte never passes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemloop.core.errors import InputError, IntegrityError, StemloopError
from stemloop.stream import codec, entropy
from stemloop.stream.codec import CODECS
from stemloop.stream.dense import DenseBlock
from stemloop.stream.events import EventBlock
from stemloop.stream.gaps import GapBlock

RNG = np.random.default_rng(1)
SPARSE = ("events", "gaps", "gaps-zstd", "intensity")
FRAMES = {
    "no frame": np.zeros((0, 7, 9), np.uint16),
    "empty frames": np.zeros((5, 7, 9), np.uint16),
    "one pixel": np.full((4, 1, 1), 3, np.uint8),
    "one frame": RNG.poisson(0.1, (1, 64, 64)).astype(np.uint8),
    "all pixels": np.ones((3, 16, 16), np.uint16),
    "one electron at each end": np.eye(2, 600, dtype=np.uint8)[::-1].reshape(2, 20, 30)[[0, 1, 0, 0]],
    "last pixel": (np.arange(400).reshape(1, 20, 20) == 399).astype(np.uint8).repeat(3, axis=0),
    "more than 65536 pixels": (RNG.random((3, 300, 300)) < 0.003).astype(np.uint16),
    "a long row": (RNG.random((2, 1, 70000)) < 0.001).astype(np.uint8),
    "a hot pixel": np.where(np.arange(400).reshape(1, 20, 20) == 7, 255, RNG.poisson(0.02, (50, 20, 20))).astype(
        np.uint8
    ),
    "sparse": RNG.poisson(0.02, (700, 32, 32)).astype(np.uint16),
    "half": RNG.poisson(0.5, (60, 32, 32)).astype(np.uint16),
    "a burst between empty frames": np.where(np.arange(90)[:, None, None] == 44, 2, 0)
    .repeat(40, 1)
    .repeat(5, 2)
    .astype(np.uint8),
}
BRIGHT = {
    "highest counts": np.full((2, 3, 3), 65535, np.uint16),
    "highest counts of 32 bits": np.where(np.eye(9).reshape(9, 3, 3) > 0, 2**32 - 1, 0).astype(np.uint32),
    "many electrons": RNG.poisson(40, (40, 32, 32)).astype(np.uint16),
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("case", [*FRAMES, *BRIGHT])
def test_what_comes_out_is_what_went_in(name, case):
    frames = (FRAMES | BRIGHT)[case]
    if case in BRIGHT and name in SPARSE[1:]:
        pytest.skip("this codec lists electrons one by one")
    for block in (DenseBlock(frames), EventBlock.from_dense(frames)):
        data = codec.encode(block, name)
        assert np.array_equal(codec.decode(data).dense(), frames)
        assert np.array_equal(CODECS[name].decode(data).total(), frames.sum(axis=0))
        for index in {0, len(frames) // 2, len(frames) - 1, -1} if len(frames) else ():
            assert np.array_equal(codec.frame(data, index), frames[index])
        assert CODECS[name].loss == ""


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(1, 30)),
    mean=st.sampled_from([0.0, 0.001, 0.03, 0.4]),
    seed=st.integers(0, 2**32),
)
def test_any_frames_come_back(name, shape, mean, seed):
    rng = np.random.default_rng(seed)
    frames = rng.poisson(mean * rng.gamma(0.3, 3.0, shape[1:]), shape).astype(np.uint16)
    assert np.array_equal(codec.decode(codec.encode(EventBlock.from_dense(frames), name)).dense(), frames)


@pytest.mark.parametrize("name", CODECS)
def test_every_changed_byte_is_found(name):
    data = codec.encode(DenseBlock(RNG.poisson(0.05, (6, 12, 12)).astype(np.uint8)), name)
    for place in range(len(data)):
        for change in (1, 0x80, 0xFF):
            broken = bytearray(data)
            broken[place] ^= change
            with pytest.raises(StemloopError):
                codec.decode(bytes(broken))
    for length in range(0, len(data), 7):
        with pytest.raises(StemloopError):
            codec.decode(data[:length])


@pytest.mark.parametrize("name", CODECS)
def test_made_up_sections_with_a_right_checksum_are_refused_or_read(name):
    # whoever writes blocks with right checksums and wrong contents gets an error or some frames, never a crash
    rng = np.random.default_rng(2)
    found = codec.parts(codec.encode(DenseBlock(rng.poisson(0.05, (40, 12, 12)).astype(np.uint8)), name))
    block = DenseBlock(np.zeros((40, 12, 12), np.uint8))
    for _ in range(150):
        sections = [bytearray(s) for s in found.sections]
        target = sections[rng.integers(len(sections))]
        for _ in range(rng.integers(1, 4)):
            target[rng.integers(len(target))] ^= int(rng.integers(1, 256))
        fields = {k: v for k, v in found.fields.items() if k not in ("codec", "frames", "shape", "sizes")}
        try:
            made_up = codec.decode(codec._join(name, block, [bytes(s) for s in sections], **fields))
        except StemloopError:
            continue
        assert made_up.dense().shape == (40, 12, 12)


def test_gap_coded_blocks_answer_without_decoding():
    frames = FRAMES["sparse"]
    for name in ("gaps", "gaps-zstd"):
        block = codec.decode(codec.encode(DenseBlock(frames), name))
        assert isinstance(block, GapBlock)
        assert np.array_equal(block.moments(), DenseBlock(frames).moments())


@pytest.mark.parametrize("mean", [0.0005, 0.02, 0.3, 1.0, 5.0, 300.0])
def test_the_smallest_codec_is_chosen(mean):
    # with as many electrons as here, the 256 frames in the middle tell which codec is smallest
    frames = np.random.default_rng(3).poisson(mean, (600, 24, 24)).astype(np.uint16)
    block = DenseBlock(frames)
    names = CODECS if mean < 0.5 else [name for name in CODECS if name.startswith("bit")]
    sizes = {name: len(codec.encode(block, name)) for name in names}
    assert len(codec.encode(block)) <= 1.05 * min(sizes.values())
    assert np.array_equal(codec.decode(codec.encode(block)).dense(), frames)


def test_as_occupancy_rises_other_codecs_take_over():
    rng = np.random.default_rng(4)
    disc = (np.hypot(*(np.indices((64, 64)) - 31.5)) < 16) + 0.01
    chosen = [
        codec.choose(DenseBlock(rng.poisson(rate * disc, (256, 64, 64)).astype(np.uint16))) for rate in (0.1, 3, 300)
    ]
    assert chosen[0] == "intensity" and all(name.startswith("bit") for name in chosen[1:])


def test_what_is_wrong_is_said():
    data = codec.encode(DenseBlock(FRAMES["sparse"]), "gaps")
    with pytest.raises(InputError, match="no codec is called 'zip'; there are events"):
        codec.encode(DenseBlock(FRAMES["sparse"]), "zip")
    with pytest.raises(InputError, match="written by 'gaps', not 'events'"):
        CODECS["events"].decode(data)
    with pytest.raises(InputError, match="frame 700 is not among the 700"):
        codec.frame(data, 700)
    with pytest.raises(IntegrityError, match="CRC32C"):
        codec.decode(data[:-1] + b"!")


def poisson_bits(rates, electrons):
    """Entropy of Poisson counts of ``rates`` [bits an electron], summed term by term."""
    k = np.arange(60)
    log = k * np.log(np.maximum(rates, 1e-300))[:, None] - rates[:, None] - np.cumsum(np.log(np.maximum(k, 1)))
    return -np.sum(np.exp(log) * log) / np.log(2) / electrons


@pytest.mark.parametrize("electrons", [20, 100, 400])
@pytest.mark.parametrize("pattern", ["disc", "flat", "spots"])
def test_the_entropy_coder_comes_close_to_the_poisson_entropy(electrons, pattern):
    rng = np.random.default_rng(5)
    rows, columns = np.indices((64, 64)) - 31.5
    radius = np.hypot(rows, columns)
    rates = {
        "disc": (radius < 14) + 0.01 * np.exp(-radius / 20),
        "flat": np.ones((64, 64)),
        "spots": np.exp(-((radius / 3) ** 2)) + 0.02,
    }[pattern].ravel()
    rates *= electrons / rates.sum()
    if rates.max() > 0.5:
        rates = np.minimum(rates, 0.5)
        electrons = rates.sum()
    frames = rng.poisson(rates, (round(4e5 / electrons), 4096)).astype(np.uint8).reshape(-1, 64, 64)
    events = EventBlock.from_dense(frames).single()
    model = entropy.fit(events.total(), events.frames)
    words, _ = entropy.encode(events, model, entropy.run_frames(events))
    measured = 32 * len(words) / len(events.index)
    # 3 %: second and third electrons of a pixel are coded to first order in its rate (2.7 % at a rate of 0.5, 0.5 %
    # below 0.1), the ticks are whole numbers (0.5 %), as is the table (0.1 %);
    # 4e5 electrons leave the measured entropy uncertain by 0.3 %. The model is not counted here, below it is.
    assert 0.99 < measured / poisson_bits(rates, electrons) < 1.03
    whole = 8 * len(codec.encode(events, "intensity")) / len(events.index)
    assert whole < 1.03 * poisson_bits(rates, electrons) + 8 * 4096 / len(events.index)


def test_the_static_table_is_a_unit_exponential():
    table = entropy.static_table()
    assert table.sum() == 2**entropy.TABLE_BITS and table.min() >= 1 and table.max() < 256
    share = np.exp(-np.arange(entropy.ESCAPE) / entropy.MEAN) * -np.expm1(-1 / entropy.MEAN)
    excess = np.sum(share * np.log2(share / (table[:-1] / 2**entropy.TABLE_BITS)))
    assert abs(excess) < 2e-3  # bits an electron, what rounding to whole slots costs


def test_ticks_divide_the_bound_of_the_state():
    assert np.all(entropy.BOUND % entropy.TICKS == 0)
    assert entropy.BOUND % (1 << (entropy.TABLE_BITS + entropy.MOST_LOW_BITS)) == 0
    assert entropy.BOUND << 32 < 2**64
