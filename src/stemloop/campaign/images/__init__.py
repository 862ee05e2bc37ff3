"""From recorded images to atoms, lattices, phases, defects and a page to look at: ``stemloop analyze``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stemloop.campaign.images.analysis import Analysis, analyze

__all__ = ["Analysis", "analyze"]


def __getattr__(name: str) -> Any:
    """``analyze`` and ``Analysis`` are fetched when first used: a worker process that does frames needs neither."""
    if name in __all__:
        from stemloop.campaign.images import analysis

        return getattr(analysis, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
