"""Frames of a Merlin: over TCP from our own sender of the published layout, and from somebody else's simulator."""

import os
import socket
import subprocess
import threading
import time

import numpy as np
import pytest

from stemloop.core.errors import InputError, InstrumentError, UnreadableFile
from stemloop.stream import LandingLog, Receiver, Sender, cut, sources
from stemloop.stream.merlin import Merlin, mib_frames

LOOPBACK = "127.0.0.1"


def mib(frames, first=1):
    """The messages of ``frames`` (n, rows, columns) without prefix, with the fields that the detector writes."""
    kind = {1: "U08", 2: "U16", 4: "U32"}[frames.dtype.itemsize]
    out = []
    for number, frame in enumerate(frames, first):
        rows, columns = frame.shape
        head = (
            f"MQ1,{number:06d},00384,01,{columns:04d},{rows:04d},{kind},   1x1,01,2026-01-01 00:00:00.000000,"
            "0.001000,0,0,0,1.200000E+2,5.110000E+2,0,0,0,0,0,0,3RX,175,511,000,000,000,000,000,000,125,255,125,"
            "125,100,100,082,100,087,030,128,004,255,129,128,176,168,511,511,MQ1A,2026-01-01T00:00:00.000000000Z,"
            f"1000000ns,{8 * frames.dtype.itemsize},"
        )
        out.append(head.encode().ljust(384, b"\0") + frame.astype(frame.dtype.newbyteorder(">")).tobytes())
    return out


def hdr(count):
    return (
        f"HDR,\nFrames in Acquisition (Number):\t{count}\nFrames per Trigger (Number):\t{count}\n"
        "Counter Depth (number):\t12\nEnd\t"
    ).encode()


def message(body):
    return b"MPX,%010d," % (len(body) + 1) + body


class Detector(threading.Thread):
    """Serves bytes to one connection, in pieces of odd sizes."""

    def __init__(self, data, stay=False):
        super().__init__(daemon=True)
        self.listening = socket.create_server((LOOPBACK, 0))
        self.port = self.listening.getsockname()[1]
        self.data, self.over = data, threading.Event()
        if not stay:
            self.over.set()
        self.start()

    def run(self):
        connection, _ = self.listening.accept()
        with connection, self.listening:
            for at in range(0, len(self.data), 9973):
                connection.sendall(self.data[at : at + 9973])
            self.over.wait(30)


def counts(n, shape=(16, 24), dtype=np.uint16):
    return np.random.default_rng(1).poisson(3.0, (n, *shape)).astype(dtype)


def joined(batches):
    return np.concatenate([b.frames for b in batches])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_frames_come_as_they_were_sent(dtype):
    frames = counts(300, dtype=dtype)
    detector = Detector(b"".join(map(message, [hdr(300), *mib(frames)])), stay=True)
    with Merlin(LOOPBACK, detector.port, per_block=64) as merlin:
        batches = list(merlin)  # ends by the header's number, though the connection stays
        assert merlin.header["Counter Depth (number)"] == "12" and merlin.skipped == 0
    detector.over.set()
    assert max(len(b.frames) for b in batches) <= 64
    assert next(b.first for b in batches) == 0 and batches[0].frames.dtype == dtype
    np.testing.assert_array_equal(joined(batches), frames)


def test_what_the_detector_skipped_is_declared(tmp_path):
    frames = counts(100)
    kept = [*range(0, 30), *range(33, 70), *range(71, 98)]
    bodies = mib(frames)
    detector = Detector(b"".join(map(message, [hdr(0), *(bodies[k] for k in kept)])))
    with LandingLog(tmp_path / "log", "run", decode=cut.frames_of) as log:
        with Receiver("tcp://127.0.0.1:*", log, "run") as receiver, Sender(receiver.address, "run") as sender:
            with Merlin(LOOPBACK, detector.port, stream="4d") as merlin:
                assert sources.forward(merlin, sender, codec="gaps", stop=100) == len(kept)
            sender.flush(10)
            assert sender.ledger()["4d"] == {"sent": 100, "acknowledged": 94, "lost": 6, "waiting": 0}
        assert log.ledger()["4d"].lost == ((30, 33), (70, 71), (98, 100)) and log.ledger()["4d"].balanced
        np.testing.assert_array_equal(log.read("4d", 33, 37), frames[33:70])


def test_noise_between_messages_is_skipped_and_counted():
    frames = counts(9)
    bodies = [message(body) for body in mib(frames)]
    noise = b"MPX,xx" + bytes(50) + b"MP"
    detector = Detector(noise + message(hdr(9)) + b"".join(bodies[:4]) + noise + b"".join(bodies[4:]))
    with Merlin(LOOPBACK, detector.port) as merlin:
        np.testing.assert_array_equal(joined(list(merlin)), frames)
        assert merlin.skipped == 2 * len(noise)


def test_a_cut_connection_gives_the_whole_frames():
    frames = counts(9)
    data = message(hdr(9)) + b"".join(map(message, mib(frames)))
    with Merlin(LOOPBACK, Detector(data[:-100]).port) as merlin:
        np.testing.assert_array_equal(joined(list(merlin)), frames[:8])


def test_what_is_no_merlin_is_said():
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(InstrumentError, match="no Merlin answers"):
        Merlin(LOOPBACK, port, timeout_s=1)
    detector = Detector(message(hdr(3)), stay=True)
    with Merlin(LOOPBACK, detector.port, timeout_s=0.2) as merlin, pytest.raises(InstrumentError, match="triggered"):
        list(merlin)
    detector.over.set()
    raw = mib(counts(1))[0].replace(b",U16,", b",R64,")
    with Merlin(LOOPBACK, Detector(message(raw)).port) as merlin, pytest.raises(InputError, match="R64"):
        list(merlin)
    short = Detector(message(raw[:-2]).replace(b"R64", b"U16"))
    with Merlin(LOOPBACK, short.port) as merlin, pytest.raises(InputError, match="its header says"):
        list(merlin)


def write(folder, frames):
    (folder / "a.mib").write_bytes(b"".join(mib(frames)))
    (folder / "a.hdr").write_bytes(hdr(len(frames)))
    return folder / "a.mib"


def test_a_mib_file_reads_as_in_rosettasciio(tmp_path):
    from rsciio.quantumdetector import file_reader

    frames = counts(12, shape=(256, 256))
    path = write(tmp_path, frames)
    np.testing.assert_array_equal(joined(mib_frames(path, per_block=5)), frames)
    read = np.asarray(file_reader(str(path), navigation_shape=(12,))[0]["data"]).reshape(12, 256, 256)
    np.testing.assert_array_equal(read[:, ::-1], frames)  # RosettaSciIO turns the frames upside down
    (tmp_path / "b.mib").write_bytes(path.read_bytes()[:-1])
    assert sum(len(b.frames) for b in mib_frames(tmp_path / "b.mib")) == 11
    (tmp_path / "c.mib").write_bytes(b"something else")
    for name in ("c.mib", "none.mib"):
        with pytest.raises(UnreadableFile, match="no MIB file"):
            list(mib_frames(tmp_path / name))


@pytest.mark.slow
@pytest.mark.skipif(
    "STEMLOOP_PEERS" not in os.environ,
    reason="STEMLOOP_PEERS names no Python with libertem-live, whose simulator this is",
)
def test_the_simulator_of_libertem_live(tmp_path):
    frames = counts(400, shape=(256, 256))
    write(tmp_path, frames)
    ports = []
    for _ in range(3):
        with socket.create_server((LOOPBACK, 0)) as free:
            ports.append(str(free.getsockname()[1]))
    tool = os.path.join(os.path.dirname(os.environ["STEMLOOP_PEERS"]), "libertem-live-mib-sim")
    options = ["--host", LOOPBACK, "--data-port", ports[0], "--control-port", ports[1], "--trigger-port", ports[2]]
    simulator = subprocess.Popen(
        [tool, str(tmp_path / "a.hdr"), "--nav-shape", "20", "20", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(240):
            try:
                merlin = Merlin(LOOPBACK, int(ports[0]))
                break
            except InstrumentError:
                time.sleep(0.5)
        with merlin:
            batches = list(merlin)
        assert merlin.skipped == 0 and batches[0].first == 0
        np.testing.assert_array_equal(joined(batches), frames)
    finally:
        simulator.terminate()
        simulator.wait(20)
