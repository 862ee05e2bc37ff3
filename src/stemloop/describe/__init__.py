"""Images, patterns and spectra to structure."""

from __future__ import annotations

from typing import Any

__all__ = ["find_columns"]


def __getattr__(name: str) -> Any:
    """``stemloop.describe.find_columns``, loaded when it is asked for."""
    if name == "find_columns":
        from stemloop.describe.atoms import find_columns

        return find_columns
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
