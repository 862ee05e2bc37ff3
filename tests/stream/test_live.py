"""Folds on a running stream: exact whatever the order, bounded in memory, and honest about what they cannot fold."""

import random
import threading

import numpy as np
import pytest

from stemloop.core.errors import InputError, InstrumentError
from stemloop.core.protocols import Batch
from stemloop.stream import Live, Receiver, Sender, Unkept, cut, packet
from stemloop.stream.events import EventBlock

SCAN, SHAPE = (20, 30), (12, 10)
COUNTS = np.random.default_rng(2).poisson(0.1, (600, *SHAPE)).astype(np.uint16)


class Moments:
    """A fold of maps: sum and both first moments of each frame."""

    def init(self, scan, shape):
        return np.zeros((scan[0] * scan[1], 3))

    def step(self, part, block, first):
        part[first : first + block.frames] += block.moments()
        return part

    def merge(self, one, other):
        return one + other

    def finish(self, part):
        return {"moments": part.reshape(*SCAN, 3).copy()}


class Total:
    def init(self, scan, shape):
        return np.zeros(shape, np.uint64)

    def step(self, part, block, first):
        return part + block.total()

    def merge(self, one, other):
        return one + other

    def finish(self, part):
        return {"total": part}


def block(first, stop, codec="events"):
    return cut.encoded(EventBlock.from_dense(COUNTS[first:stop]), "4d", first, codec)


def expected():
    rows, columns = np.indices(SHAPE)
    sums = [COUNTS.sum((1, 2)), (COUNTS * rows).sum((1, 2)), (COUNTS * columns).sum((1, 2))]
    return np.stack(sums, axis=-1).reshape(*SCAN, 3)


@pytest.mark.parametrize("seed", range(3))
def test_the_maps_of_a_stream_are_exact_whatever_the_order_and_the_repeats(seed):
    rng = random.Random(seed)
    edges = sorted({0, 600, *(rng.randrange(600) for _ in range(20))})
    blocks = [block(a, b, rng.choice(["events", "gaps", "bitshuffle-lz4"])) for a, b in zip(edges, edges[1:])]
    blocks += [*rng.sample(blocks, 5), block(100, 200)]
    rng.shuffle(blocks)
    with Live({"moments": Moments(), "total": Total()}, SCAN, SHAPE, stream="4d") as live:
        receiver = Receiver("tcp://127.0.0.1:*", Unkept(), "run", taps=[live.take])
        with receiver, Sender(receiver.address, "run") as sender:
            for one in blocks:
                sender.send(one)
            sender.send(Batch("else", 0, COUNTS[:3]))
            sender.flush(20)
        live.wait(0, 600, 20)
        assert live.folded == [(0, 600)]
        found = live.results()
    np.testing.assert_array_equal(found["moments"]["moments"], expected())
    np.testing.assert_array_equal(found["total"]["total"], COUNTS.sum(0))


def test_folds_that_fall_behind_hold_the_sender_back():
    """The row, the credit and the window are all that can be under way."""
    gate = threading.Event()
    size = len(packet.encode(block(0, 10), "run")[1])

    class Slow(Moments):
        def step(self, part, block, first):
            assert gate.wait(30)
            return super().step(part, block, first)

    with Live({"moments": Slow()}, SCAN, SHAPE, stream="4d", waiting_bytes=2 * size) as live:
        with Receiver("tcp://127.0.0.1:*", Unkept(), "run", taps=[live.take], credit_bytes=3 * size) as receiver:
            sender = Sender(receiver.address, "run", window_bytes=5 * size, timeout_s=0.5)
            sent = 0
            with pytest.raises(InstrumentError):
                for first in range(0, 600, 10):
                    sender.send(block(first, first + 10))
                    sent += 1
            assert sent < 25
            gate.set()
            for first in range(sent * 10, 600, 10):
                sender.send(block(first, first + 10))
            sender.close(20)
        live.wait(0, 600, 20)
        np.testing.assert_array_equal(live.results()["moments"]["moments"], expected())


def test_what_cannot_be_folded_is_said_and_stops_nobody_else():
    seen = []
    with Live({"total": Total()}, SCAN, SHAPE, stream="4d", watch=seen.append) as live:
        live.take(block(0, 5))
        live.wait(0, 5, 10)
        with pytest.raises(InstrumentError, match=r"\(5, 6\)"):
            live.wait(0, 6, 0.05)
        live.take(packet.raw(Batch("4d", 598, COUNTS[:5])))
        with pytest.raises(InputError, match="do not fit"):
            live.wait(598, 5, 10)
        with pytest.raises(InputError, match="do not fit"):
            live.results()
        live.take(block(5, 10))  # does not wait for ever
    assert [one.first for one in seen] == [0]
