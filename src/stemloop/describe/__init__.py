"""Images, patterns and spectra to structure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stemloop.core.protocols import ColumnFinder

__all__ = ["find_columns", "finders"]


def finders() -> dict[str, ColumnFinder]:
    """What finds atom columns, by name: ``classical`` (significance against the noise) and ``network`` (learnt)."""
    from stemloop.describe import atoms, network

    return {"classical": atoms.find_columns, "network": network.find_columns}


def __getattr__(name: str) -> Any:
    """``stemloop.describe.find_columns``, loaded when it is asked for."""
    if name == "find_columns":
        from stemloop.describe.atoms import find_columns

        return find_columns
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
