"""Sets of sequence numbers; they live in :mod:`stemloop.core.spans`."""

from stemloop.core.spans import Span, Spans

__all__ = ["Span", "Spans"]
