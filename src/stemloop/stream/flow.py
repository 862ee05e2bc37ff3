"""What was offered, sent, acknowledged and given up: both ends of a channel as state machines.

They know no sockets, no clocks and no disks; :mod:`stemloop.stream.channel` moves their parcels. Whatever the way
between them does (it may drop, double, reorder and delay), the books balance: of each stream,
``offered = acknowledged + declared lost + waiting`` at the sender and
``known = durable + declared lost + missing`` at the receiver, and when nothing waits nothing is missing.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stemloop.core.errors import InputError
from stemloop.core.spans import Span, Spans

#: What a declaration counts for in the window [bytes].
_DECLARATION = 64


class Key(NamedTuple):
    """``n`` frames of ``stream`` from number ``first``: the frames themselves, or the word that they are ``lost``."""

    stream: str
    first: int
    n: int
    lost: bool = False


@dataclass(slots=True)
class Parcel:
    """What waits for an acknowledgement; ``order`` counts sendings, 0 is not on its way."""

    key: Key
    size: int
    what: Any
    order: int = 0


@dataclass
class _Sent:
    """Numbers of one stream, and those of them that came to an end."""

    offered: Spans = field(default_factory=Spans)
    acknowledged: Spans = field(default_factory=Spans)
    declared: Spans = field(default_factory=Spans)
    lost: Spans = field(default_factory=Spans)


class Outbox:
    """The sender's side.

    Credit: :meth:`next` gives parcels while those on their way have at most the granted bytes. One parcel may always
    be on its way, so that an end that has granted nothing is asked again.
    """

    def __init__(self, window_bytes: int) -> None:
        self.window = window_bytes
        self.granted = 0
        self.bytes = 0
        self.flying = 0
        self._flying_parcels = 0
        self._parcels: dict[Key, Parcel] = {}
        self._unsent: deque[Key] = deque()
        self._orders = itertools.count(1)
        self._streams: dict[str, _Sent] = {}
        self._to_declare: dict[str, tuple[Spans, str]] = {}
        self._declaring: dict[str, int] = {}

    def __len__(self) -> int:
        """How many parcels have no acknowledgement, those of declarations included."""
        return len(self._parcels) + len(self._to_declare)

    def __contains__(self, key: Key) -> bool:
        return key in self._parcels

    def room(self, size: int) -> bool:
        """Whether a parcel of ``size`` bytes fits into the window (a first one always does)."""
        return not self._parcels or self.bytes + size <= self.window

    def offer(self, key: Key, size: int, what: Any) -> bool:
        """Take over a parcel; False if the same one waits already. Numbers that were declared lost are an InputError:
        a declaration is final."""
        if key in self._parcels:
            return False
        sent = self._streams.setdefault(key.stream, _Sent())
        stop = key.first + key.n
        if sent.declared and sum(b - a for a, b in sent.declared.absent(key.first, stop)) < key.n:
            raise InputError(
                f"frames {key.first} to {stop - 1} of stream {key.stream!r} were declared lost; use other numbers."
            )
        sent.offered.add(key.first, stop)
        self._put(Parcel(key, size, what))
        return True

    def declare(self, stream: str, first: int, stop: int, why: str) -> None:
        """Say that the frames ``first .. stop``, which were never offered, will not come."""
        sent = self._streams.setdefault(stream, _Sent())
        if not 0 <= first < stop or sent.offered.absent(first, stop) != [(first, stop)]:
            raise InputError(f"frames {first} to {stop - 1} of stream {stream!r} are no range that was never sent.")
        for part in sent.declared.add(first, stop):
            spans, _ = self._to_declare.setdefault(stream, (Spans(), why))
            spans.add(*part)

    def _put(self, parcel: Parcel) -> None:
        self._parcels[parcel.key] = parcel
        self._unsent.append(parcel.key)
        self.bytes += parcel.size

    def _word_of_losses(self) -> None:
        """Make one parcel of each range to declare, for streams that have no declaration on its way."""
        for stream in [s for s in self._to_declare if not self._declaring.get(s)]:
            spans, why = self._to_declare.pop(stream)
            for first, stop in spans:
                self._declaring[stream] = self._declaring.get(stream, 0) + 1
                self._put(Parcel(Key(stream, first, stop - first, True), _DECLARATION, why))

    def next(self) -> Parcel | None:
        """The parcel to send now, if there is one and the credit allows it; then call :meth:`sent`."""
        if self._to_declare:
            self._word_of_losses()
        while self._unsent:
            parcel = self._parcels.get(self._unsent[0])
            if parcel is None or parcel.order:
                self._unsent.popleft()
                continue
            if self._flying_parcels and self.flying + parcel.size > self.granted:
                return None
            return parcel
        return None

    def sent(self, parcel: Parcel) -> None:
        """``parcel``, which :meth:`next` gave, is on its way."""
        self._unsent.popleft()
        parcel.order = next(self._orders)
        self.flying += parcel.size
        self._flying_parcels += 1

    def _landed(self, parcel: Parcel) -> None:
        if parcel.order:
            parcel.order = 0
            self.flying -= parcel.size
            self._flying_parcels -= 1

    def heard(self, keys: Iterable[Key], granted: int) -> list[Parcel]:
        """Acknowledgements, and the bytes that may be on their way from now on; returns the parcels that are done.

        Acknowledgements come in the order of sending where the way keeps it: a parcel that was passed over was lost
        or damaged, and is sent again (needlessly where the way does not; the copy is counted and dropped).
        """
        self.granted = granted
        done, last = [], 0
        for key in keys:
            parcel = self._parcels.pop(key, None)
            if parcel is None:
                continue
            last = max(last, parcel.order)
            self._landed(parcel)
            self.bytes -= parcel.size
            sent = self._streams[key.stream]
            (sent.lost if key.lost else sent.acknowledged).add(key.first, key.first + key.n)
            if key.lost:
                self._declaring[key.stream] -= 1
            done.append(parcel)
        for parcel in self._parcels.values():
            if parcel.order >= last:
                break
            self.again(parcel.key)
        return done

    def again(self, key: Key) -> None:
        """Send the parcel of ``key`` once more."""
        parcel = self._parcels.get(key)
        if parcel is not None and parcel.order:
            self._landed(parcel)
            self._unsent.append(key)

    def doubt(self) -> None:
        """Send again all that is on its way; what it was granted is doubted too."""
        for parcel in self._parcels.values():
            self._landed(parcel)
        self._unsent = deque(self._parcels)

    def ledger(self) -> dict[str, dict[str, int]]:
        """Frames of each stream: ``sent = acknowledged + lost + waiting``, where ``sent`` are all numbers that were
        offered or declared, and ``lost`` are declared and the receiver has said that it knows."""
        found = {}
        for stream, sent in sorted(self._streams.items()):
            whole, ended = len(sent.offered) + len(sent.declared), len(sent.acknowledged) + len(sent.lost)
            found[stream] = {
                "sent": whole,
                "acknowledged": len(sent.acknowledged),
                "lost": len(sent.lost),
                "waiting": whole - ended,
            }
        return found

    def lost(self, stream: str) -> list[Span]:
        """The ranges of ``stream`` that were declared lost, known by the receiver or not yet."""
        return list(self._streams[stream].declared) if stream in self._streams else []


@dataclass
class _Taken:
    """Frames of one stream: ``recovered`` were there when the receiver began."""

    durable: Spans
    lost: Spans = field(default_factory=Spans)
    recovered: int = 0
    received: int = 0
    duplicates: int = 0


class Inbox:
    """The receiver's side: what is new in each parcel, and the books of what came."""

    def __init__(self, durable: dict[str, Spans] | None = None, lost: dict[str, Spans] | None = None) -> None:
        self._streams = {stream: _Taken(spans, recovered=len(spans)) for stream, spans in (durable or {}).items()}
        for stream, spans in (lost or {}).items():
            self._stream(stream).lost = spans

    def _stream(self, name: str) -> _Taken:
        if name not in self._streams:
            self._streams[name] = _Taken(Spans())
        return self._streams[name]

    def plan(self, keys: Sequence[Key]) -> list[list[Span]]:
        """For each of ``keys`` the ranges that are new, each number once."""
        planned: dict[str, Spans] = {}
        found = []
        for key in keys:
            known = self._streams[key.stream].durable if key.stream in self._streams else Spans()
            absent = known.absent(key.first, key.first + key.n)
            plan = planned.setdefault(key.stream, Spans())
            found.append([part for a, b in absent for part in plan.add(a, b)])
        return found

    def keep(self, keys: Sequence[Key], plan: Sequence[Sequence[Span]]) -> None:
        """The new parts of ``keys`` are durable."""
        for key, parts in zip(keys, plan, strict=True):
            taken = self._stream(key.stream)
            taken.received += key.n
            taken.duplicates += key.n
            for first, stop in parts:
                taken.durable.add(first, stop)
                taken.duplicates -= stop - first

    def declare(self, key: Key) -> None:
        """The sender says that it will never send the frames of ``key``; those that are there stay there."""
        self._stream(key.stream).lost.add(key.first, key.first + key.n)

    def covers(self, stream: str, first: int, stop: int) -> bool:
        """Whether all of ``first .. stop`` is durable."""
        return stream in self._streams and self._streams[stream].durable.covers(first, stop)

    def absent(self, stream: str, first: int, stop: int) -> list[Span]:
        """What of ``first .. stop`` is not durable."""
        return self._streams[stream].durable.absent(first, stop) if stream in self._streams else [(first, stop)]

    def lost(self, stream: str, first: int, stop: int) -> list[Span]:
        """What of ``first .. stop`` will never come."""
        if stream not in self._streams:
            return []
        taken = self._streams[stream]
        not_lost = Spans([*taken.lost.absent(first, stop), *taken.durable])
        return not_lost.absent(first, stop)

    def ledger(self) -> dict[str, dict[str, Any]]:
        """Frames of each stream: ``received + recovered = durable + duplicates``; ``durable + lost`` and the sizes of
        ``missing`` (ranges ``(first, stop)`` that nobody has accounted for) are all numbers up to the largest."""
        found = {}
        for stream, taken in sorted(self._streams.items()):
            lost = sum(b - a for first, stop in taken.lost for a, b in taken.durable.absent(first, stop))
            found[stream] = {
                "received": taken.received,
                "recovered": taken.recovered,
                "durable": len(taken.durable),
                "duplicates": taken.duplicates,
                "lost": lost,
                "missing": Spans([*taken.durable, *taken.lost]).gaps(),
            }
        return found
