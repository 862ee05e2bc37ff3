import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stemloop.core.errors import InputError
from stemloop.core.protocols import Batch
from stemloop.stream import packet

DTYPES = ["<u2", ">u2", "<f4", "<c8", "|b1", "|u1", "<i8"]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=hnp.array_shapes(min_dims=1, max_dims=4, max_side=5),
    first=st.integers(0, 2**60),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_batch_comes_back_as_it_went(dtype, shape, first, seed):
    raw = np.random.default_rng(seed).integers(0, 2, int(np.prod(shape)))
    batch = Batch("cbed", first, raw.astype(dtype).reshape(shape), {"dwell_s": 1e-3, "note": "é", "list": [1, [2.5]]})
    run, back = packet.decode(*packet.encode(batch, "run-1"))
    assert (run, back.stream, back.first, back.meta) == ("run-1", "cbed", first, batch.meta)
    assert back.frames.dtype == batch.frames.dtype
    np.testing.assert_array_equal(back.frames, batch.frames)


def test_every_changed_byte_and_every_cut_is_found():
    lead, payload = packet.encode(Batch("s", 3, np.arange(12, dtype=np.uint16).reshape(3, 4), {"a": 1}), "r")
    for part, other in ((lead, payload), (payload, lead)):
        for i in range(len(part)):
            changed = bytearray(part)
            changed[i] ^= 1 << (i % 8)
            both = (bytes(changed), other) if part is lead else (other, bytes(changed))
            with pytest.raises(InputError):
                packet.decode(*both)
            cut = (part[:i], other) if part is lead else (other, part[:i])
            with pytest.raises(InputError):
                packet.decode(*cut)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.binary(max_size=20))
def test_noise_is_an_input_error(lead, payload):
    with pytest.raises(InputError):
        packet.decode(lead, payload)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted(packet._FIELDS)),
        st.one_of(st.none(), st.integers(-5, 5), st.text(max_size=4), st.lists(st.integers(-2, 3), max_size=3)),
    )
)
def test_a_header_with_a_good_crc_and_odd_fields_is_an_input_error(change):
    import msgpack

    lead, payload = packet.encode(Batch("s", 0, np.zeros((2, 2), np.uint16)), "r")
    fields = msgpack.unpackb(lead[8:])
    wrong = {**fields, **change}
    body = msgpack.packb(wrong)
    lead = packet._LEAD.pack(packet.MAGIC, packet.crc32c(body)) + body
    try:
        _, batch = packet.decode(lead, payload)
    except InputError:
        return
    assert batch.frames.nbytes == len(payload)  # what is let through holds what came


@pytest.mark.parametrize("frames", [np.zeros((0, 4)), np.array(1.0), np.array(["a"]), np.array([{}], dtype=object)])
def test_what_is_no_batch_of_numbers_is_refused(frames):
    with pytest.raises(InputError, match="at least one frame"):
        packet.encode(Batch("s", 0, frames), "r")
