"""What the channel carries beside plain frames: encoded blocks, declared losses, shared memory, keys."""

import os
import subprocess
import sys
import textwrap
import threading

import msgpack
import numpy as np
import pytest
import zmq
from known_frames import batch, frames

from stemloop.core.errors import InputError, InstrumentError
from stemloop.stream import LandingLog, Receiver, Sender, codec, cut
from stemloop.stream.dense import DenseBlock
from stemloop.stream.events import EventBlock
from stemloop.stream.keys import Keys
from stemloop.stream.ring import Ring, Window

LOOPBACK = "tcp://127.0.0.1:*"
COUNTS = np.random.default_rng(5).poisson(0.05, (60, 16, 16)).astype(np.uint16)


def block(first, stop, name="events"):
    return cut.encoded(EventBlock.from_dense(COUNTS[first:stop]), "4d", first, name)


@pytest.fixture
def log(tmp_path):
    with LandingLog(tmp_path / "log", "run", decode=cut.frames_of) as log:
        yield log


@pytest.mark.parametrize("name", sorted(codec.CODECS))
def test_encoded_blocks_travel_and_rest_as_they_are(log, name):
    with Receiver(LOOPBACK, log, "run") as receiver, Sender(receiver.address, "run") as sender:
        sent = [block(a, a + 20, name) for a in (0, 20, 40)]
        for one in sent:
            sender.send(one)
        np.testing.assert_array_equal(receiver.wait("4d", 13, 30, 10), COUNTS[13:43])
        sender.flush(10)
        assert sender.ledger() == {"4d": {"sent": 60, "acknowledged": 60, "lost": 0, "waiting": 0}}
    assert [(b.codec, b.payload) for b in log.blocks()] == [(name, one.payload) for one in sent]


@pytest.mark.parametrize("name", ["events", "gaps", "bitshuffle-lz4"])
def test_blocks_that_overlap_are_kept_once(log, name):
    with Receiver(LOOPBACK, log, "run") as receiver:
        receiver.take([block(10, 20, name), block(0, 15, name)])
        receiver.take([block(5, 40, name)])
        np.testing.assert_array_equal(receiver.wait("4d", 0, 40, 1), COUNTS[:40])
        count = receiver.ledger()["4d"]
        assert (count["durable"], count["duplicates"]) == (40, 20)
    assert sum(b.n for b in log.blocks()) == 40


def test_frames_of_32_bits_and_blocks_that_lie():
    many = np.full((2, 4, 4), 70_000, np.uint32)
    packed = cut.encoded(DenseBlock(many), "s", 0, "bitshuffle-zstd", dtype="<u4")
    np.testing.assert_array_equal(cut.frames_of(packed), many)
    with pytest.raises(InputError, match="do not fit"):
        cut.frames_of(cut.encoded(DenseBlock(many), "s", 0, "bitshuffle-zstd"))
    with pytest.raises(InputError, match="other frames"):
        cut.block_of(type(packed)("s", 0, 3, (4, 4), "<u4", packed.codec, packed.payload))


def test_taps_see_each_frame_once_after_it_is_durable(log):
    seen = []

    def tap(one):
        assert any(first <= one.first and one.first + one.n <= stop for first, stop in log.index["4d"])
        seen.append((one.first, one.n))

    with Receiver(LOOPBACK, log, "run", taps=[tap]) as receiver:
        receiver.take([block(0, 10), block(0, 10)])
        receiver.take([block(5, 12)])
    assert seen == [(0, 10), (10, 2)]


def test_declared_losses_balance_on_both_ends_and_in_the_log(log):
    with Receiver(LOOPBACK, log, "run") as receiver, Sender(receiver.address, "run") as sender:
        sender.send(block(0, 10))
        sender.declare_lost("4d", 10, 14, "the detector skipped")
        sender.send(block(14, 20))
        sender.flush(10)
        assert sender.ledger()["4d"] == {"sent": 20, "acknowledged": 16, "lost": 4, "waiting": 0}
        count = receiver.ledger()["4d"]
        assert (count["durable"], count["lost"], count["missing"]) == (16, 4, [])
        with pytest.raises(InstrumentError, match=r"declared frames \[\(10, 14\)\]"):
            receiver.wait("4d", 0, 20, 10)
        with pytest.raises(InputError, match="declared lost"):
            sender.send(block(10, 12))
    account = log.ledger()["4d"]
    assert account.balanced and account.lost == ((10, 14),)
    with Receiver(LOOPBACK, log, "run") as again:  # a new receiver knows it from the log
        assert again.ledger()["4d"]["lost"] == 4 and again.ledger()["4d"]["missing"] == []


def test_a_source_that_cannot_wait_drops_and_says_which(log):
    """With nobody there the window fills; what was dropped is declared when the receiver comes."""
    first_one = Receiver(LOOPBACK, log, "run")
    address = first_one.address
    first_one.close()
    with Sender(address, "run", window_bytes=20_000, drop=True, resend_s=0.1) as sender:
        taken = [sender.send(batch(k, 10, "s")) for k in range(0, 500, 10)]
        assert taken[0] and not taken[-1]
        with Receiver(address, log, "run") as receiver:
            sender.flush(20)
            ledger, count = sender.ledger()["s"], receiver.ledger()["s"]
    assert ledger == {"sent": 500, "acknowledged": 10 * sum(taken), "lost": 500 - 10 * sum(taken), "waiting": 0}
    assert (count["durable"], count["lost"], count["missing"]) == (ledger["acknowledged"], ledger["lost"], [])


def test_the_receiver_bounds_what_is_on_its_way(tmp_path):
    """A receiver that answers nothing but grants: the sender never has more under way."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    router.bind(LOOPBACK)
    try:
        sender = Sender(router.getsockopt_string(zmq.LAST_ENDPOINT), "run", resend_s=60)
        for k in range(20):
            sender.send(batch(k, 1))
        assert router.poll(5000)
        peer, *parts = router.recv_multipart()
        assert not router.poll(200)  # one asks for credit
        size = len(parts[1]) + len(parts[2])
        router.send_multipart([peer, b"ack", msgpack.packb([3 * size + size // 2, [["cbed", 0, 1, False]]])])
        came = 0
        while router.poll(300):
            router.recv_multipart()
            came += 1
        assert came == 3
        with pytest.raises(InstrumentError):
            sender.close(0.1)
    finally:
        router.close(0)
        context.term()


def test_shared_memory_carries_the_payloads(log, monkeypatch):
    looked = []
    monkeypatch.setattr(Window, "get", lambda self, place, get=Window.get: looked.append(place) or get(self, place))
    with Receiver(LOOPBACK, log, "run") as receiver:
        with Sender(receiver.address, "run", shared_bytes=4000) as sender:  # goes round, and over into the socket
            for k in range(0, 400, 4):
                sender.send(batch(k, 4))
                if k % 40 == 0:
                    sender.flush(10)
            sender.flush(10)
            name = sender._ring._memory.name
        np.testing.assert_array_equal(receiver.wait("cbed", 0, 400, 1), frames(0, 400))
        assert 50 < len(looked) < 100 and receiver.malformed == 0
    assert not os.path.exists(f"/dev/shm/{name}")


def test_a_receiver_that_cannot_read_the_ring_gets_it_through_the_socket(log, monkeypatch):
    def elsewhere(self, name):
        raise InputError("the ring is not on this machine")

    monkeypatch.setattr(Window, "__init__", elsewhere)
    with Receiver(LOOPBACK, log, "run") as receiver:
        with Sender(receiver.address, "run", shared_bytes=1 << 20, resend_s=60) as sender:
            for k in range(0, 40, 4):
                sender.send(batch(k, 4))
            sender.flush(10)
        np.testing.assert_array_equal(receiver.wait("cbed", 0, 40, 1), frames(0, 40))


def test_two_processes_share_memory(log):
    """The sender is a process of its own, which leaves no memory behind."""
    with Receiver(LOOPBACK, log, "run") as receiver:
        code = f"""
            import numpy as np
            from known_frames import batch
            from stemloop.stream import Sender
            with Sender({receiver.address!r}, "run", shared_bytes=1 << 16) as sender:
                for k in range(0, 200, 4):
                    sender.send(batch(k, 4))
            print(sender.ledger())
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        np.testing.assert_array_equal(receiver.wait("cbed", 0, 200, 1), frames(0, 200))


def test_a_ring_never_gives_a_place_twice():
    rng = np.random.default_rng(0)
    ring, there = Ring(1000), []
    try:
        for _ in range(3000):
            payload = rng.bytes(int(rng.integers(1, 300)))
            place = ring.put(payload)
            if place is not None:
                there.append((place, payload))
            if there and (place is None or rng.random() < 0.4):
                ring.free(there.pop(int(rng.integers(len(there))))[0])
            assert all(ring.get(place) == payload for place, payload in there)
            assert sum(place.length for place, _ in there) <= 1000
    finally:
        ring.close()
    with pytest.raises(InputError, match="no ring"):
        Window("../../etc/passwd")
    with pytest.raises(InputError, match="not on this machine"):
        Window("stemloop-0123456789abcdef")


def test_other_machines_need_keys(log):
    for address in ("tcp://10.1.2.3:5555", "tcp://*:5555", "tcp://0.0.0.0:5555", "tcp://example.org:1"):
        with pytest.raises(InputError, match="no keys"):
            Sender(address, "run")
        with pytest.raises(InputError, match="no keys"):
            Receiver(address, log, "run")
    with pytest.raises(InputError, match="trust nobody"):
        Receiver(LOOPBACK, log, "run", keys=Keys.new())
    with pytest.raises(InputError, match="shared memory is for one"):
        Sender("tcp://10.1.2.3:5", "run", shared_bytes=10, keys=Keys.new().trusting(Keys.new().public))


def test_keys_let_in_whom_they_trust_and_nobody_else(log, tmp_path):
    ours, theirs, stranger = Keys.new(), Keys.new(), Keys.new()
    theirs.save(tmp_path / "key")
    theirs = Keys.load(tmp_path / "key")
    with Receiver("tcp://0.0.0.0:*", log, "run", keys=ours.trusting(theirs.public)) as receiver:
        address = receiver.address.replace("0.0.0.0", "127.0.0.1")
        with Sender(address, "run", keys=theirs.trusting(ours.public)) as sender:
            sender.send(batch(0, 4))
            sender.flush(20)
        for keys in (stranger.trusting(ours.public), theirs.trusting(stranger.public), None):
            other = Sender(address, "run", keys=keys)
            other.send(batch(4, 4))
            with pytest.raises(InstrumentError):
                other.close(0.4)
        assert receiver.ledger()["cbed"]["durable"] == 4
    assert "secret" not in repr(ours)
    with pytest.raises(InputError, match="cannot be written"):
        ours.save(tmp_path / "key")
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(InputError, match="read by others"):
        Keys.load(tmp_path / "key")
    (tmp_path / "none").write_text("a b")
    (tmp_path / "none").chmod(0o600)
    with pytest.raises(InputError, match="no pair"):
        Keys.load(tmp_path / "none")


def test_many_senders_share_the_credit(log):
    with Receiver(LOOPBACK, log, "run", credit_bytes=5000) as receiver:

        def work(name):
            with Sender(receiver.address, "run") as sender:
                for k in range(0, 100, 2):
                    sender.send(batch(k, 2, name))

        threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {name: count["durable"] for name, count in receiver.ledger().items()} == dict.fromkeys("abc", 100)


def test_a_declaration_that_is_none_is_counted_and_harmless(log):
    with Receiver(LOOPBACK, log, "run") as receiver:
        for body in (b"", b"x", msgpack.packb([1, 2, 3]), msgpack.packb(["run", ["s", -1, 2, True], "why"])):
            assert receiver._admit(b"peer", [b"lost", body]) is None
        for place in (b"x", msgpack.packb(["n", "o", 1]), msgpack.packb([1])):
            assert receiver._admit(b"peer", [b"shared", b"SLP1", place]) is None
        assert receiver.malformed == 7 and receiver.ledger() == {}
