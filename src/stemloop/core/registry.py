"""Names for plugs: one small table per socket."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from stemloop.core.errors import UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from name to plug for one socket, such as ``Registry("specimen")``.

    >>> calculators = Registry("calculator")
    >>> calculators.register("EMT")(dict)
    <class 'dict'>
    >>> calculators["EMT"]
    <class 'dict'>
    """

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self._plugs: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters a plug under ``name``."""

        def enter(plug: T) -> T:
            self._plugs[name] = plug
            return plug

        return enter

    def __getitem__(self, name: str) -> T:
        if name in self._plugs:
            return self._plugs[name]
        close = difflib.get_close_matches(name, self._plugs, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnknownName(f"unknown {self.socket} {name!r}; known: {', '.join(sorted(self._plugs))}.{hint}")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._plugs))

    def __contains__(self, name: object) -> bool:
        return name in self._plugs
