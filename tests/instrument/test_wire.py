from contextlib import suppress

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stemloop.core.errors import InputError
from stemloop.core.instruction import Diffraction, Image, Report
from stemloop.core.protocols import Camera, Exposure, InstrumentInfo
from stemloop.instrument import wire

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
numbers = hnp.integer_dtypes() | hnp.unsigned_integer_dtypes() | hnp.floating_dtypes(sizes=(16, 32, 64)) | st.just(bool)
arrays = hnp.arrays(numbers, hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))


@given(st.dictionaries(st.text(max_size=5), plain, max_size=4))
def test_plain_messages_come_back_equal(message):
    assert wire.decode(wire.encode(message)) == message


@given(arrays)
def test_arrays_come_back_with_type_shape_and_every_bit(array):
    back = wire.decode(wire.encode({"frames": array}))["frames"]
    assert back.dtype == array.dtype and back.shape == array.shape
    assert back.tobytes() == np.ascontiguousarray(array).tobytes()


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_an_input_error(data):
    with suppress(InputError):
        assert isinstance(wire.decode(data), dict)


@settings(max_examples=300)
@given(st.data())
def test_a_broken_message_is_a_message_or_an_input_error(data):
    good = bytearray(wire.encode({"n": 1, "frames": np.arange(12, dtype="<u2").reshape(3, 4), "op": "execute"}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(good)))
    with suppress(InputError):
        assert isinstance(wire.decode(bytes(good[:end])), dict)


@pytest.mark.parametrize(
    "header, body",
    [
        (["O", [1]], b"12345678"),
        (["<u2", [2**40, 2**40]], b"12"),
        (["<u2", [-1]], b""),
        (["<u2,<u2", [1]], b"1234"),
        (["<f3", [1]], b"123"),
        ([["<u2"], [1]], b"12"),
        (["<u2", [1] * 40], b"12"),
        ("x", b""),
    ],
)
def test_an_array_that_lies_about_itself_is_refused(header, body):
    data = msgpack.packb({"frames": msgpack.ExtType(1, msgpack.packb(header) + body)})
    with pytest.raises(InputError):
        wire.decode(data)


@pytest.mark.parametrize("value", [object(), np.array([object()]), np.array(["text"]), 2**70, {1, 2}])
def test_what_cannot_be_sent_says_so(value):
    with pytest.raises(InputError, match="cannot be sent"):
        wire.encode({"value": value})


def test_deep_nesting_is_refused():
    with pytest.raises(InputError):
        wire.decode(b"\x81\xa1a" + b"\x91" * 100_000 + b"\xc0")


def test_instructions_exposures_and_info_come_back_equal():
    for asked in (Diffraction(((1e-9, 2e-9),), 1e-3), Image((0.0, 0.0), (1e-9, 1e-9), (4, 4), 1e-6), Report()):
        sent = wire.decode(wire.encode(wire.instruction_to_message(asked)))
        assert wire.instruction_from_message(sent) == asked
    info = InstrumentInfo(
        "i", ("image",), (1e-8, 2e-8), 8e4, 1e-11, Camera((4, 4), 1e-3, (1.5, 1.5)), (-5.0, 0.1, 64), None, {"a": 1}
    )
    assert wire.info_from_message(wire.decode(wire.encode(wire.info_to_message(info)))) == info
    exposure = Exposure(np.ones((1, 2, 2), np.float32), 12.5, {"current_A": 1e-10}, {"pixel_m": [1.0, 2.0]})
    back = wire.exposure_from_message(wire.decode(wire.encode(wire.exposure_to_message(exposure))))
    assert np.array_equal(back.frames, exposure.frames)
    assert (back.electrons, back.state, back.calibration) == (12.5, exposure.state, exposure.calibration)


@pytest.mark.parametrize(
    "value", [{"kind": "diffraction", "version": 1, "positions_m": 3, "dwell_s": "x"}, {}, {"kind": []}]
)
def test_a_nonsense_instruction_is_an_input_error(value):
    with pytest.raises(InputError):
        wire.instruction_from_message(value)
