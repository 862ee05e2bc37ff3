"""stemloop: electron microscopes that run their own experiments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stemloop.campaign.images import analyze
    from stemloop.instrument.aclient import aconnect
    from stemloop.instrument.client import connect

__version__ = "0.1.0"
__all__ = ["aconnect", "analyze", "connect"]


def __getattr__(name: str) -> Any:
    """``analyze``, ``connect`` and ``aconnect`` are fetched when first used: ``import stemloop`` costs nothing."""
    if name == "analyze":
        from stemloop.campaign.images import analyze

        return analyze
    if name == "connect":
        from stemloop.instrument.client import connect

        return connect
    if name == "aconnect":
        from stemloop.instrument.aclient import aconnect

        return aconnect
    raise AttributeError(f"module 'stemloop' has no attribute {name!r}")
