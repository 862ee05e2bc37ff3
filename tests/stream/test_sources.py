"""Files as sources, and what goes from a source into the channel."""

import time

import numpy as np
import pytest
from known_frames import batch

from stemloop.core.errors import InputError, UnreadableFile
from stemloop.core.protocols import Batch
from stemloop.stream import LandingLog, Receiver, Sender, cut
from stemloop.stream.sources import encode, forward, playback

COUNTS = np.random.default_rng(4).poisson(0.2, (70, 9, 8)).astype(np.uint16)


@pytest.fixture
def ends(tmp_path):
    with (
        LandingLog(tmp_path / "out.flog", "run", decode=cut.frames_of) as log,
        Receiver("tcp://127.0.0.1:*", log, "run") as receiver,
        Sender(receiver.address, "run") as sender,
    ):
        yield log, sender


def test_a_file_of_numpy_is_played_back(ends, tmp_path):
    log, sender = ends
    np.save(tmp_path / "a.npy", COUNTS)
    assert forward(playback(tmp_path / "a.npy", stream="4d", per_block=16), sender, codec="events") == 70
    sender.flush(10)
    np.testing.assert_array_equal(log.read("4d", 0, 70), COUNTS)
    assert {b.codec for b in log.blocks()} == {"events"}


def test_a_landing_log_is_played_back_block_by_block(ends, tmp_path):
    log, sender = ends
    with LandingLog(tmp_path / "in.flog", "earlier") as earlier:
        blocks = [encode(Batch("a", first, COUNTS[first : first + 10]), "gaps") for first in (0, 10, 30)]
        earlier.append_many([*blocks, batch(5, 3, "b")])
    assert forward(playback(tmp_path / "in.flog"), sender, stop=45) == 33
    sender.flush(10)
    assert [b.payload for b in log.blocks("a")] == [b.payload for b in blocks]
    ledger = log.ledger()
    assert ledger["a"].lost == ((20, 30), (40, 45)) and ledger["b"].lost == ((0, 5), (8, 45))
    assert all(account.balanced for account in ledger.values())


def test_playback_keeps_a_rate(tmp_path):
    np.save(tmp_path / "a.npy", COUNTS)
    begin = time.monotonic()
    assert sum(len(b.frames) for b in playback(tmp_path / "a.npy", per_block=7, rate=500)) == 70
    assert time.monotonic() - begin >= 0.14


@pytest.mark.parametrize("codec", ["raw", "gaps", "bitshuffle-zstd"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_frames_come_back_in_their_type(codec, dtype):
    one = encode(Batch("s", 3, COUNTS.astype(dtype)), codec)
    assert cut.frames_of(one).dtype == dtype
    np.testing.assert_array_equal(cut.frames_of(one), COUNTS)


def test_what_is_no_source_is_said(ends, tmp_path):
    _, sender = ends
    with pytest.raises(InputError, match="goes back"):
        forward([Batch("s", 0, COUNTS[:5]), Batch("s", 4, COUNTS[:5])], sender)
    (tmp_path / "a.npy").write_bytes(b"no")
    np.save(tmp_path / "b.npy", np.array(["word"]))
    (tmp_path / "a.txt").touch()
    for name in ("a.npy", "b.npy", "a.txt", "none.npy"):
        with pytest.raises(UnreadableFile):
            list(playback(tmp_path / name))
