"""What can be named on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from stemloop.core.errors import UnknownName


def _recipes() -> Iterable[str]:
    from stemloop.campaign.recipes import RECIPES

    return RECIPES


def _specimens() -> Iterable[str]:
    from stemloop.simulate.specimens import SPECIMENS

    return SPECIMENS


def _calculators() -> Iterable[str]:
    from stemloop.energetics.calculators import CALCULATORS

    return CALCULATORS


def _acquisitions() -> Iterable[str]:
    from stemloop.decide.acquire import ACQUISITIONS

    return ACQUISITIONS


def _scalarizers() -> Iterable[str]:
    from stemloop.reduce.spectra import SCALARIZERS

    return SCALARIZERS


KINDS: dict[str, Callable[[], Iterable[str]]] = {
    "recipes": _recipes,
    "specimens": _specimens,
    "calculators": _calculators,
    "acquisitions": _acquisitions,
    "scalarizers": _scalarizers,
}


def names(kind: str | None = None) -> dict[str, list[str]]:
    """The names of one kind, or of all."""
    if kind is not None and kind not in KINDS:
        raise UnknownName(f"unknown kind {kind!r}; known: {', '.join(KINDS)}.")
    return {k: list(KINDS[k]()) for k in ([kind] if kind else KINDS)}
