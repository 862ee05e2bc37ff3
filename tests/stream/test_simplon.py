"""Frames of a DECTRIS detector: from our own sender of both published versions, packed by HDF5's own filters, and from
somebody else's simulator."""

import json
import os
import struct
import subprocess
import threading

import h5py
import numpy as np
import pytest
import zmq

from stemloop.core.errors import InputError, InstrumentError
from stemloop.stream import LandingLog, Receiver, Sender, bslz4, cbor, cut, sources
from stemloop.stream.simplon import Simplon, unpack

hdf5plugin = pytest.importorskip("hdf5plugin")
LOOPBACK = "tcp://127.0.0.1:*"


def packed(frame, **options):
    """What HDF5's filter makes of one chunk."""
    with h5py.File("in memory", "w", driver="core", backing_store=False) as file:
        data = file.create_dataset("d", data=frame, chunks=frame.shape, **options)
        return data.id.read_direct_chunk((0,) * frame.ndim)[1]


def with_bslz4(frame):
    return packed(frame, **hdf5plugin.Bitshuffle(cname="lz4"))


def with_lz4(frame):
    """HDF5's LZ4 puts sizes before its one block."""
    data = packed(frame, **hdf5plugin.LZ4(nbytes=frame.nbytes))
    total, block, length = struct.unpack_from(">QII", data)
    assert (total, block) == (frame.nbytes, frame.nbytes)
    return data[16 : 16 + length]


def counts(n=20, shape=(60, 44), dtype=np.uint16, mean=0.5):
    return np.random.default_rng(3).poisson(mean, (n, *shape)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("shape", [(60, 44), (128, 128), (7, 3), (1, 5), (101, 83)])
def test_what_hdf5_packed_is_unpacked(dtype, shape):
    bits = 8 * np.dtype(dtype).itemsize
    for mean in (0.01, 3, 200):
        frame = counts(1, shape, dtype, mean)[0]
        np.testing.assert_array_equal(unpack(with_bslz4(frame), f"bs{bits}-lz4<", np.dtype(dtype).str, shape), frame)
        if frame.size > 500 and mean < 10:
            np.testing.assert_array_equal(unpack(with_lz4(frame), "lz4<", np.dtype(dtype).str, shape), frame)


def test_damaged_bytes_are_refused_or_give_as_many_numbers():
    frame = counts(1, (64, 64))[0]
    data = with_bslz4(frame)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        broken = bytearray(data)
        broken[rng.integers(len(data))] ^= 1 << rng.integers(8)
        cut_at = len(data) if rng.random() < 0.5 else rng.integers(len(data))
        try:
            assert bslz4.bslz4(bytes(broken[:cut_at]), 64 * 64, "<u2").shape == (64 * 64,)
        except InputError:
            refused += 1
    assert refused > 150


def head(word, number):
    if number < 24:
        return bytes([word << 5 | number])
    return bytes([word << 5 | 27]) + struct.pack(">Q", number)


def dumps(item):
    """CBOR, as RFC 8949 has it; a tuple is (tag, value)."""
    if item is None or isinstance(item, bool):
        return {None: b"\xf6", False: b"\xf4", True: b"\xf5"}[item]
    if isinstance(item, int):
        return head(0, item) if item >= 0 else head(1, -1 - item)
    if isinstance(item, float):
        return b"\xfb" + struct.pack(">d", item)
    if isinstance(item, bytes):
        return head(2, len(item)) + item
    if isinstance(item, str):
        return head(3, len(item.encode())) + item.encode()
    if isinstance(item, list):
        return head(4, len(item)) + b"".join(map(dumps, item))
    if isinstance(item, dict):
        return head(5, len(item)) + b"".join(dumps(k) + dumps(v) for k, v in item.items())
    return head(6, item[0]) + dumps(item[1])


def test_cbor_is_read_as_the_rfc_writes_it():
    # examples of RFC 8949, appendix A
    for text, item in {
        "00": 0, "1903e8": 1000, "1bffffffffffffffff": 2**64 - 1, "29": -10, "f93c00": 1.0, "fb3ff199999999999a": 1.1,
        "f4": False, "f6": None, "4401020304": b"\1\2\3\4", "62c3bc": "\xfc", "83010203": [1, 2, 3],
        "a201020304": {1: 2, 3: 4}, "5f42010243030405ff": b"\1\2\3\4\5", "9f0102ff": [1, 2],
        "bf6346756ef563416d7421ff": {"Fun": True, "Amt": -2},
    }.items():  # fmt: skip
        assert cbor.loads(bytes.fromhex(text), lambda n, v: (n, v)) == item
    assert cbor.loads(bytes.fromhex("c11a514b67b0"), lambda n, v: (n, v)) == (1, 1363896240)
    item = {"a": [1, -5, 2.5, None, {"b": b"x" * 300}], "c": (40, [[2, 3], (69, b"")])}
    assert cbor.loads(dumps(item), lambda n, v: (n, v)) == item
    rng = np.random.default_rng(0)
    for _ in range(2000):  # anything else is an InputError and nothing else
        try:
            cbor.loads(rng.bytes(int(rng.integers(0, 40))), lambda n, v: v)
        except InputError:
            pass
    with pytest.raises(InputError, match="deep"):
        cbor.loads(b"\x81" * 4000, lambda n, v: v)


def version_1(frames, encode, encoding, series=7):
    shape, kind = list(frames.shape[:0:-1]), str(frames.dtype)
    yield [json.dumps({"htype": "dheader-1.0", "series": series, "header_detail": "basic"}).encode(),
           json.dumps({"nimages": len(frames), "ntrigger": 1, "beam_center_x": 3.0}).encode()]  # fmt: skip
    for number, frame in enumerate(frames):
        data = encode(frame)
        yield [
            json.dumps({"htype": "dimage-1.0", "series": series, "frame": number, "hash": ""}).encode(),
            json.dumps(
                {"htype": "dimage_d-1.0", "shape": shape, "type": kind, "encoding": encoding, "size": len(data)}
            ).encode(),
            data,
            json.dumps({"htype": "dconfig-1.0", "start_time": 0, "stop_time": 1, "real_time": 1}).encode(),
        ]
    yield [json.dumps({"htype": "dseries_end-1.0", "series": series}).encode()]


def version_2(frames, compress, series=7):
    tag = {1: 64, 2: 69, 4: 70}[frames.dtype.itemsize]
    yield [dumps({"type": "start", "series_id": series, "number_of_images": len(frames), "channels": ["threshold_1"]})]
    for number, frame in enumerate(frames):
        array = (tag, compress(frame))
        data = {"threshold_1": (40, [list(frame.shape), array])}
        yield [dumps({"type": "image", "series_id": series, "image_id": number, "real_time": [1, 1000], "data": data})]
    yield [dumps({"type": "end", "series_id": series})]


VERSIONS = {
    "1 plain": lambda f: version_1(f, bytes, "<"),
    "1 lz4": lambda f: version_1(f, with_lz4, "lz4<"),
    "1 bslz4": lambda f: version_1(f, with_bslz4, "bs16-lz4<"),
    "2 plain": lambda f: version_2(f, bytes),
    "2 lz4": lambda f: version_2(f, lambda frame: (56500, ["lz4", 2, with_lz4(frame)])),
    "2 bslz4": lambda f: version_2(f, lambda frame: (56500, ["bslz4", 2, with_bslz4(frame)])),
}


@pytest.fixture
def detector():
    """Sends messages to whoever connects; gives the address."""
    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.bind(LOOPBACK)
    threads = []

    def start(messages):
        thread = threading.Thread(target=lambda: [push.send_multipart(m) for m in messages], daemon=True)
        thread.start()
        threads.append(thread)
        return push.getsockopt_string(zmq.LAST_ENDPOINT)

    yield start
    for thread in threads:
        thread.join(20)
    push.close(0)
    context.term()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_series_comes_as_it_was_sent(detector, version):
    frames = counts()
    with Simplon(detector(list(VERSIONS[version](frames))), per_block=8, timeout_s=20) as simplon:
        batches = list(simplon)
        assert simplon.skipped == 0
        assert simplon.header.get("nimages", simplon.header.get("number_of_images")) == len(frames)
    np.testing.assert_array_equal(np.concatenate([b.frames for b in batches]), frames)
    assert next(b.first for b in batches) == 0 and max(len(b.frames) for b in batches) <= 8


@pytest.mark.parametrize("version", ["1 bslz4", "2 bslz4"])
def test_frames_that_did_not_come_are_declared(detector, version, tmp_path):
    frames = counts()
    messages = list(VERSIONS[version](frames))
    del messages[5:8]  # frames 4, 5, 6
    old = list(version_1(frames, bytes, "<", series=6))[3:]  # the rest of a series before
    with LandingLog(tmp_path / "log", "run", decode=cut.frames_of) as log:
        with Receiver(LOOPBACK, log, "run") as receiver, Sender(receiver.address, "run") as sender:
            with Simplon(detector(old + messages), stream="4d", timeout_s=20) as simplon:
                sources.forward(simplon, sender, codec="events", stop=20)
                assert simplon.skipped == len(old)
            sender.flush(10)
        assert log.ledger()["4d"].lost == ((4, 7),) and log.ledger()["4d"].balanced
        np.testing.assert_array_equal(log.read("4d", 7, 13), frames[7:])


def test_what_cannot_be_read_is_said(detector):
    frames = counts(2)
    good = [next(iter(version_1(frames, bytes, "<"))), next(iter(version_2(frames, bytes)))]
    bad = [
        [good[0], [b'{"htype": "dimage-1.0", "series": 7}']],
        [good[0], [b"{"]],
        [good[1], [b"\xff"]],
        [good[1], [dumps({"type": "image", "series_id": 7, "image_id": 0, "data": {"a": 1, "b": 2}})]],
        [good[1], [dumps({"type": "image", "series_id": 7, "image_id": 0, "data": {"a": (40, [[2, 2], (99, b"")])}})]],
        list(version_1(frames, bytes, "bs16-lz4<")),
        list(version_1(frames, bytes, "zip<")),
    ]
    with Simplon(detector([]), timeout_s=0.2) as simplon:
        with pytest.raises(InstrumentError, match="triggered"):
            list(simplon)
        for messages in bad:
            with pytest.raises(InputError):
                for parts in messages:
                    simplon._read(parts)
    with pytest.raises(InputError, match="no address"):
        Simplon("nowhere")


SIMULATOR = """
import sys, libertem_dectris
simulator = libertem_dectris.DectrisSim.new_mocked(
    uri="tcp://127.0.0.1", num_frames=40, dwelltime=None, random_port=True
)
print(simulator.get_uri(), flush=True)
simulator.send_headers()
simulator.send_frames()
simulator.send_footer()
sys.stdin.read()
"""


@pytest.mark.skipif(
    "STEMLOOP_PEERS" not in os.environ,
    reason="STEMLOOP_PEERS names no Python with libertem-dectris, whose simulator it is",
)
def test_the_simulator_of_libertem_dectris():
    """Its frames are made up, and it leaves the sizes before the blocks at 0; h5py's filter packs ours with sizes."""
    process = subprocess.Popen(
        [os.environ["STEMLOOP_PEERS"], "-c", SIMULATOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        address = process.stdout.readline().strip()
        with Simplon(address, timeout_s=30) as simplon:
            batches = list(simplon)
            assert simplon.header["description"] == "Dectris QUADRO Si 250K" and simplon.skipped == 0
        frames = np.concatenate([b.frames for b in batches])
        assert frames.shape == (40, 512, 512) and frames.dtype == np.uint16
        for frame in frames[:4]:  # what we read, packed again by HDF5, reads the same
            np.testing.assert_array_equal(unpack(with_bslz4(frame), "bs16-lz4<", "<u2", (512, 512)), frame)
        for number, frame in enumerate(frames):  # each is full of its number
            assert np.all(frame == number)
    finally:
        process.communicate("", 20)
