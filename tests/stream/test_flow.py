"""The books of both ends balance exactly, whatever the way between them does."""

import random
from collections import deque

import pytest

from stemloop.core.errors import InputError
from stemloop.stream.flow import Inbox, Key, Outbox


class BadWay:
    """Delivers packets of both directions; of each hundred it drops, doubles, swaps or delays ``rate``."""

    def __init__(self, rng, rate):
        self.rng, self.rate, self.there, self.late = rng, rate, deque(), []
        self.done = {"dropped": 0, "doubled": 0, "swapped": 0, "late": 0}

    def put(self, packet):
        chance = self.rng.random() / self.rate
        if chance >= 4:
            self.there.append(packet)
            return
        fate = ("dropped", "doubled", "swapped", "late")[int(chance)]
        self.done[fate] += 1
        if fate == "doubled":
            self.there += (packet, packet)
        elif fate == "swapped":
            self.there.append(packet)
            if len(self.there) > 1:
                self.there[-1], self.there[-2] = self.there[-2], self.there[-1]
        elif fate == "late":
            self.late.append(packet)

    def take(self):
        if self.late and self.rng.random() < 0.002:
            return self.late.pop(self.rng.randrange(len(self.late)))
        return self.there.popleft() if self.there else None


def exchange(packets, seed, rate=0.01, drop=0.001):
    """Send ``packets`` packets of 1 frame through bad ways; some are dropped at the source and declared."""
    rng = random.Random(seed)
    outbox, inbox = Outbox(64_000), Inbox()
    there, back = BadWay(rng, rate), BadWay(rng, rate)
    received = number = peak = 0
    while number < packets or len(outbox):
        for _ in range(8):
            if number < packets and outbox.room(100):
                if rng.random() < drop:
                    outbox.declare("s", number, number + 1, "the source was full")
                else:
                    outbox.offer(Key("s", number, 1), 100, None)
                number += 1
        while (parcel := outbox.next()) is not None:
            there.put(parcel.key)
            outbox.sent(parcel)
            peak = max(peak, outbox.flying)
        group = [key for key in (there.take() for _ in range(16)) if key is not None]
        frames = [key for key in group if not key.lost]
        received += len(frames)
        inbox.keep(frames, inbox.plan(frames))
        for key in group:
            if key.lost:
                inbox.declare(key)
        if group:
            back.put((group, 8_000))
        answer = back.take()
        if answer is not None:
            outbox.heard(*answer)
        elif not there.there:
            outbox.doubt()
    return outbox, inbox, there, received, peak


def check(packets, outbox, inbox, there, received, peak):
    sent, taken = outbox.ledger()["s"], inbox.ledger()["s"]
    assert min(there.done.values()) > packets / 200  # the way was as bad as it was meant to be
    assert sent["sent"] == packets == sent["acknowledged"] + sent["lost"] and sent["waiting"] == 0
    assert taken["durable"] == sent["acknowledged"] and taken["lost"] == sent["lost"] > 0
    assert taken["missing"] == []
    assert taken["received"] == received == taken["durable"] + taken["duplicates"]
    assert peak <= 8_000
    assert (outbox.bytes, outbox.flying, len(outbox)) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_the_ledger_balances_exactly_through_a_bad_way(seed):
    check(20_000, *exchange(20_000, seed))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_ledger_balances_exactly_over_ten_million_packets():
    check(10_000_000, *exchange(10_000_000, 0))


def test_the_credit_bounds_what_is_on_its_way():
    outbox = Outbox(1000)
    for number in range(10):
        assert outbox.room(100)
        outbox.offer(Key("s", number, 1), 100, None)
    assert not outbox.room(1)
    outbox.sent(outbox.next())
    assert outbox.next() is None  # nothing granted yet: one parcel asks
    outbox.heard([Key("s", 0, 1)], 350)
    flying = []
    while (parcel := outbox.next()) is not None:
        outbox.sent(parcel)
        flying.append(parcel.key.first)
    assert flying == [1, 2, 3] and outbox.flying == 300
    outbox.heard([Key("s", n, 1) for n in (1, 2, 3)], 0)
    outbox.sent(outbox.next())
    assert outbox.next() is None


def test_a_parcel_that_was_passed_over_is_sent_again():
    outbox = Outbox(1000)
    for number in range(3):
        outbox.offer(Key("s", number, 1), 10, None)
    outbox.granted = 100
    for _ in range(3):
        outbox.sent(outbox.next())
    outbox.heard([Key("s", 2, 1)], 100)
    assert [outbox.next().key.first, len(outbox)] == [0, 2]


def test_a_declaration_is_final_and_only_of_what_was_never_sent():
    outbox = Outbox(1000)
    outbox.offer(Key("s", 0, 4), 10, None)
    with pytest.raises(InputError, match="never sent"):
        outbox.declare("s", 3, 5, "full")
    outbox.declare("s", 4, 6, "full")
    with pytest.raises(InputError, match="declared lost"):
        outbox.offer(Key("s", 5, 2), 10, None)
    assert outbox.ledger()["s"] == {"sent": 6, "acknowledged": 0, "lost": 0, "waiting": 6}
    assert outbox.lost("s") == [(4, 6)]


def test_ranges_to_declare_are_joined_while_one_is_on_its_way():
    outbox = Outbox(1000)
    outbox.declare("s", 0, 1, "full")
    outbox.sent(outbox.next())
    for number in range(1, 100):
        outbox.declare("s", number, number + 1, "full")
    assert outbox.next() is None
    outbox.heard([Key("s", 0, 1, True)], 0)
    assert outbox.next().key == Key("s", 1, 99, True)


def test_frames_that_are_there_are_not_lost_whatever_was_declared():
    inbox = Inbox()
    inbox.declare(Key("s", 0, 10, True))
    inbox.keep([Key("s", 2, 3)], inbox.plan([Key("s", 2, 3)]))
    assert inbox.lost("s", 0, 12) == [(0, 2), (5, 10)]
    ledger = inbox.ledger()["s"]
    assert (ledger["durable"], ledger["lost"], ledger["missing"]) == (3, 7, [])
