"""The ledger of a stream: what was acknowledged is stored, or declared lost, to the last frame."""

from __future__ import annotations

from dataclasses import dataclass

from stemloop.core.spans import Span, Spans


@dataclass(frozen=True)
class Account:
    """What became of the numbers of one stream, as ranges ``(first, stop)``.

    acknowledged : what somebody was told is safe or given up: all that was ever stored, and all that is declared lost.
    stored : what is there and fits its checksum.
    lost : what is declared lost and is not stored.
    missing : numbers below the largest known one that never came and were not declared lost.
    """

    acknowledged: tuple[Span, ...]
    stored: tuple[Span, ...]
    lost: tuple[Span, ...]
    missing: tuple[Span, ...]

    @classmethod
    def of(cls, acked: Spans, stored: Spans, declared: Spans) -> Account:
        """The account of a stream of which ``acked`` was acknowledged as stored.

        >>> account = Account.of(Spans([(0, 8)]), Spans([(0, 8)]), Spans([(6, 10)]))
        >>> account.lost, account.balanced
        (((8, 10),), True)
        """
        lost = Spans(part for first, stop in declared for part in stored.absent(first, stop))
        told = Spans([*acked, *lost])
        return cls(tuple(told), tuple(stored), tuple(lost), tuple(told.gaps()))

    @property
    def counts(self) -> dict[str, int]:
        """How many frames: ``acknowledged``, ``stored``, ``lost``, ``missing``."""
        return {
            "acknowledged": _count(self.acknowledged),
            "stored": _count(self.stored),
            "lost": _count(self.lost),
            "missing": _count(self.missing),
        }

    @property
    def unaccounted(self) -> tuple[Span, ...]:
        """Acknowledged numbers that are neither stored nor declared lost: damage that nobody has declared yet."""
        known = Spans([*self.stored, *self.lost])
        return tuple(part for first, stop in self.acknowledged for part in known.absent(first, stop))

    @property
    def balanced(self) -> bool:
        """Whether acknowledged = stored + declared lost, and nothing is missing without a word."""
        counts = self.counts
        return counts["acknowledged"] == counts["stored"] + counts["lost"] and not self.missing


def _count(spans: tuple[Span, ...]) -> int:
    return sum(stop - first for first, stop in spans)
