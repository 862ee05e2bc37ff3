import errno
import os
import random
import threading
import time

import numpy as np
import pytest
import zmq
from known_frames import batch, frames
from test_landing import small_disk  # noqa: F401

from stemloop.core.errors import InputError, InstrumentError, StorageError
from stemloop.core.protocols import Batch
from stemloop.stream import LandingLog, Receiver, Sender, landing

LOOPBACK = "tcp://127.0.0.1:*"


def balanced(ledger):
    for count in ledger.values():
        missing = count["lost"] + sum(stop - first for first, stop in count["missing"])
        assert count["received"] + count["recovered"] == count["durable"] + count["duplicates"]
        top = count["durable"] + missing
        assert all(stop <= top for _, stop in count["missing"])
    return ledger


class Tampering:
    """A proxy between a sender and a receiver that drops, doubles, damages and reorders what goes to the receiver."""

    def __init__(self, target, seed, rate=0.1):
        self.context = zmq.Context()
        self.front = self.context.socket(zmq.ROUTER)
        self.back = self.context.socket(zmq.DEALER)
        for s in (self.front, self.back):
            s.setsockopt(zmq.LINGER, 0)
        self.front.bind(LOOPBACK)
        self.address = self.front.getsockopt_string(zmq.LAST_ENDPOINT)
        self.back.connect(target)
        self.rng, self.rate, self.held, self.peer, self.stop = random.Random(seed), rate, [], None, False
        self.done = {"drop": 0, "double": 0, "damage": 0, "hold": 0}
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def forward(self, parts):
        fate = self.rng.choices([None, *self.done], [1 - 4 * self.rate] + [self.rate] * 4)[0]
        if fate:
            self.done[fate] += 1
        if fate == "drop":
            return
        if fate == "hold":
            self.held.append(parts)
            return
        if fate == "damage":
            broken = bytearray(parts[2])
            broken[self.rng.randrange(len(broken))] ^= 4
            parts = [*parts[:2], bytes(broken)]
        for _ in range(2 if fate == "double" else 1):
            self.back.send_multipart(parts)
        if self.held and self.rng.random() < 0.5:
            self.back.send_multipart(self.held.pop())

    def run(self):
        poller = zmq.Poller()
        poller.register(self.front, zmq.POLLIN)
        poller.register(self.back, zmq.POLLIN)
        while not self.stop:
            for s, _ in poller.poll(20):
                if s is self.front:
                    self.peer, *parts = s.recv_multipart()
                    self.forward(parts)
                elif self.peer is not None:
                    self.front.send_multipart([self.peer, *s.recv_multipart()])

    def close(self):
        self.stop = True
        self.thread.join()
        self.context.destroy(linger=0)


def test_frames_arrive_durable_and_in_their_place(tmp_path):
    with LandingLog(tmp_path / "log", "run") as log, Receiver(LOOPBACK, log, "run") as receiver:
        with Sender(receiver.address, "run") as sender:
            for first in range(0, 40, 4):
                sender.send(batch(first, 4))
            np.testing.assert_array_equal(receiver.wait("cbed", 6, 13, 10), frames(6, 13))
            sender.flush(10)
            assert sender.unacknowledged == 0
            sender.send(batch(8, 4))  # again
            sender.flush(10)
        count = balanced(receiver.ledger())["cbed"]
        assert count == {"received": 44, "recovered": 0, "durable": 40, "duplicates": 4, "lost": 0, "missing": []}
        with LandingLog(tmp_path / "log", readonly=True) as copy:  # what was acknowledged is on the disk
            assert copy.index == {"cbed": [(0, 40)]}


@pytest.mark.parametrize("seed", range(4))
def test_dropped_doubled_damaged_and_reordered_packets_change_nothing(tmp_path, seed):
    n = 400
    with LandingLog(tmp_path / "log", "run") as log, Receiver(LOOPBACK, log, "run") as receiver:
        proxy = Tampering(receiver.address, seed)
        try:
            with Sender(proxy.address, "run", resend_s=0.1, window_bytes=20_000) as sender:
                for first in range(0, n, 2):
                    sender.send(batch(first, 2))
                sender.flush(30)
        finally:
            proxy.close()
        ledger = balanced(receiver.ledger())["cbed"]
        assert min(proxy.done.values()) > 0 and receiver.malformed > 0
        assert ledger["durable"] == n and ledger["missing"] == []
        np.testing.assert_array_equal(receiver.wait("cbed", 0, n, 1), frames(0, n))
        assert sum(len(b.frames) for b in log.batches()) == n  # kept exactly once


@pytest.mark.parametrize("seed", range(20))
def test_the_ledger_balances_whatever_comes(tmp_path, seed):
    """Straight to the receiver: random lost, repeated, overlapping and shuffled batches of two streams."""
    rng = random.Random(seed)
    with LandingLog(tmp_path / "log", "run") as log, Receiver(LOOPBACK, log, "run") as receiver:
        sent = []
        for stream in ("a", "b"):
            for _ in range(30):
                sent.append(batch(rng.randrange(100), rng.randint(1, 9), stream))
        rng.shuffle(sent)
        while sent:
            group = [sent.pop() for _ in range(min(len(sent), rng.randint(1, 8)))]
            before = balanced(receiver.ledger())
            receiver.take(group)
            for stream, count in balanced(receiver.ledger()).items():
                numbers = [k for b in group if b.stream == stream for k in range(b.first, b.first + len(b.frames))]
                came = before.get(stream, {"received": 0})["received"] + len(numbers)
                assert count["received"] == came
        for stream, spans in log.index.items():
            assert sum(b - a for a, b in spans) == receiver.ledger()[stream]["durable"]
            for a, b in spans:
                np.testing.assert_array_equal(log.read(stream, a, b - a), frames(a, b - a))


def test_a_gap_is_counted_and_closes_when_the_late_batch_comes(tmp_path):
    with LandingLog(tmp_path / "log", "run") as log, Receiver(LOOPBACK, log, "run") as receiver:
        receiver.take([batch(0, 2), batch(5, 2)])
        assert receiver.ledger()["cbed"]["missing"] == [(2, 5)]
        with pytest.raises(InstrumentError, match=r"did not arrive.*missing: \[\(2, 5\)\]"):
            receiver.wait("cbed", 0, 7, 0.05)
        receiver.take([batch(2, 3)])
        assert receiver.ledger()["cbed"]["missing"] == []
        np.testing.assert_array_equal(receiver.wait("cbed", 0, 7, 1), frames(0, 7))


def test_a_receiver_that_comes_back_goes_on_where_the_disk_stands(tmp_path):
    log = LandingLog(tmp_path / "log", "run")
    receiver = Receiver(LOOPBACK, log, "run")
    address = receiver.address
    with Sender(address, "run", resend_s=0.1) as sender:
        sender.send(batch(0, 5))
        receiver.wait("cbed", 0, 5, 10)
        sender.flush(10)
        receiver.close()
        log.close()
        sender.send(batch(5, 5))  # to nobody
        log = LandingLog(tmp_path / "log", "run")
        receiver = Receiver(address, log, "run")
        np.testing.assert_array_equal(receiver.wait("cbed", 0, 10, 10), frames(0, 10))
        assert balanced(receiver.ledger())["cbed"]["recovered"] == 5
    receiver.close()
    log.close()


def test_another_run_is_refused_and_counted(tmp_path):
    with LandingLog(tmp_path / "log", "run") as log, Receiver(LOOPBACK, log, "run") as receiver:
        sender = Sender(receiver.address, "other")
        sender.send(batch(0, 1))
        with pytest.raises(InputError, match="takes run 'run'"):
            sender.flush(10)
        with pytest.raises(InputError, match="refused"):
            sender.close()
        assert receiver.refused == 1 and receiver.ledger() == {}


def test_noise_on_the_port_is_counted_and_harmless(tmp_path):
    with LandingLog(tmp_path / "log", "run") as log, Receiver(LOOPBACK, log, "run") as receiver:
        context = zmq.Context()
        noise = context.socket(zmq.DEALER)
        noise.connect(receiver.address)
        for parts in ([b""], [b"frames"], [b"frames", b"x", b"y"], [b"frames", b"SLP1" + bytes(40), b""], [b"a"] * 9):
            noise.send_multipart(parts)
        with Sender(receiver.address, "run") as sender:
            sender.send(batch(0, 2))
            receiver.wait("cbed", 0, 2, 10)
        end = time.monotonic() + 10  # nothing says which of two connections is heard first
        while receiver.malformed < 5 and time.monotonic() < end:
            time.sleep(0.01)
        noise.close(0)
        context.term()
        assert receiver.malformed == 5


def test_a_full_window_waits_and_says_why(tmp_path):
    with Sender("tcp://127.0.0.1:1", "run", window_bytes=1000, timeout_s=0.2) as sender:
        sender.send(batch(0, 20))
        with pytest.raises(InstrumentError, match="is it running"):
            sender.send(batch(20, 20))
        with pytest.raises(InstrumentError, match="1 batches wait"):
            sender.close(0.1)


def test_a_disk_that_is_full_stops_the_acknowledgements_and_loses_nothing(tmp_path, monkeypatch):
    log = LandingLog(tmp_path / "log", "run")
    with Receiver(LOOPBACK, log, "run") as receiver, Sender(receiver.address, "run", resend_s=0.1) as sender:
        sender.send(batch(0, 3))
        sender.flush(10)

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(landing.os, "pwritev", full)
            sender.send(batch(3, 3))
            with pytest.raises(StorageError, match="No space left") as error:
                receiver.wait("cbed", 0, 6, 10)
            assert str(error.value).count("\n") == 0
            with pytest.raises(StorageError, match="No space left"):
                sender.flush(0.3)
            assert sender.unacknowledged == 1
            np.testing.assert_array_equal(receiver.wait("cbed", 0, 3, 1), frames(0, 3))
        sender.flush(10)  # goes on by itself
        np.testing.assert_array_equal(receiver.wait("cbed", 0, 6, 10), frames(0, 6))
        balanced(receiver.ledger())
    log.close()


def test_a_really_full_disk(small_disk):  # noqa: F811
    (small_disk / "ballast").write_bytes(bytes(600_000))
    log = LandingLog(small_disk / "log", "run")
    with Receiver(LOOPBACK, log, "run") as receiver:
        with Sender(receiver.address, "run", resend_s=0.1) as sender:
            for n in range(40):
                sender.send(Batch("s", n, np.full((1, 100, 100), n, np.uint16)))
            with pytest.raises(StorageError, match="No space left"):
                receiver.wait("s", 39, 1, 10)
            durable = receiver.ledger().get("s", {"durable": 0})["durable"]
            assert durable < 40
            (small_disk / "ballast").unlink()
            sender.flush(20)
        np.testing.assert_array_equal(receiver.wait("s", 0, 40, 10)[:, 3, 3], np.arange(40))
    log.close()


def test_any_frame_log_will_do():
    class InMemory:
        def __init__(self):
            self.kept = [batch(0, 2)]

        def append(self, b):
            self.kept.append(b)

        def batches(self, stream=None):
            return iter([b for b in self.kept if stream in (None, b.stream)])

        def close(self):
            pass

    with Receiver(LOOPBACK, InMemory(), "run") as receiver, Sender(receiver.address, "run") as sender:
        sender.send(batch(1, 4))
        np.testing.assert_array_equal(receiver.wait("cbed", 0, 5, 10), frames(0, 5))
        assert balanced(receiver.ledger())["cbed"]["duplicates"] == 1


def test_an_address_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="no address"):
        Sender("tcp://localhost:no", "run")
    with LandingLog(tmp_path / "log", "run") as log, pytest.raises(InputError, match="cannot listen"):
        Receiver("ipc:///no/such/folder/x", log, "run")
