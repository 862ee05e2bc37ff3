"""Which sequence numbers are there: sets of whole numbers kept as sorted, disjoint, half-open ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Span = tuple[int, int]


class Spans:
    """A set of whole numbers >= 0 as ranges ``(first, stop)``.

    >>> numbers = Spans([(0, 4)])
    >>> numbers.add(2, 8)
    [(4, 8)]
    >>> numbers.add(10, 12)
    [(10, 12)]
    >>> numbers.gaps()
    [(8, 10)]
    """

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._firsts: list[int] = []
        self._stops: list[int] = []
        for first, stop in spans:
            self.add(first, stop)

    def absent(self, first: int, stop: int) -> list[Span]:
        """The parts of ``first .. stop`` that are not in the set."""
        parts = []
        i = bisect_right(self._stops, first)
        while first < stop:
            if i == len(self._firsts) or self._firsts[i] >= stop:
                parts.append((first, stop))
                break
            if self._firsts[i] > first:
                parts.append((first, self._firsts[i]))
            first = self._stops[i]
            i += 1
        return parts

    def add(self, first: int, stop: int) -> list[Span]:
        """Put ``first .. stop`` into the set; returns the parts that were new."""
        if first >= stop:
            return []
        new = self.absent(first, stop)
        lo = bisect_left(self._stops, first)
        hi = bisect_right(self._firsts, stop)
        if lo < hi:
            first = min(first, self._firsts[lo])
            stop = max(stop, self._stops[hi - 1])
        self._firsts[lo:hi] = [first]
        self._stops[lo:hi] = [stop]
        return new

    def covers(self, first: int, stop: int) -> bool:
        """Whether all of ``first .. stop`` is in the set."""
        return not self.absent(first, stop)

    def gaps(self) -> list[Span]:
        """What is missing between 0 and the largest number in the set."""
        return self.absent(0, self.stop)

    @property
    def stop(self) -> int:
        """One more than the largest number in the set; 0 when it is empty."""
        return self._stops[-1] if self._stops else 0

    def __len__(self) -> int:
        return sum(self._stops) - sum(self._firsts)

    def __iter__(self) -> Iterator[Span]:
        return iter(zip(self._firsts, self._stops, strict=True))
