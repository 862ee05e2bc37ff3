"""Payloads in shared memory, for two processes of one machine: only the place of a payload crosses the socket.

The sender owns the ring and frees a place when its parcel is acknowledged. The receiver maps it for reading alone and
copies a payload out before it checks its CRC32C, so that a place that was freed and used anew is found like damage.
"""

from __future__ import annotations

import mmap
import re
import secrets
from collections import deque
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import NamedTuple

from stemloop.core.errors import InputError

_NAME = re.compile(r"stemloop-[0-9a-f]{16}")
_FOLDER = Path("/dev/shm")


class Place(NamedTuple):
    """``length`` bytes at ``offset`` of the ring ``name``."""

    name: str
    offset: int
    length: int


class Ring:
    """A ring of ``size`` bytes."""

    def __init__(self, size: int) -> None:
        try:
            self._memory = SharedMemory(f"stemloop-{secrets.token_hex(8)}", create=True, size=size)
        except (OSError, ValueError) as error:
            raise InputError(f"there are no {size} bytes of shared memory: {error}; give less.") from None
        assert self._memory.buf is not None
        self._view = self._memory.buf
        self.size = size
        self._used: deque[Place] = deque()
        self._freed: set[Place] = set()

    def put(self, payload: bytes) -> Place | None:
        """Copy ``payload`` in; None if there is no room for it now."""
        offset = self._room(len(payload))
        if offset is None:
            return None
        place = Place(self._memory.name, offset, len(payload))
        self._view[offset : offset + len(payload)] = payload
        self._used.append(place)
        return place

    def _room(self, length: int) -> int | None:
        if not self._used:
            return 0 if length <= self.size else None
        head, tail = self._used[-1].offset + self._used[-1].length, self._used[0].offset
        if head > tail:  # used in one piece: after it, or before it
            return head if head + length <= self.size else 0 if length <= tail else None
        return head if head + length <= tail else None

    def get(self, place: Place) -> bytes:
        """The payload at ``place``."""
        return bytes(self._view[place.offset : place.offset + place.length])

    def free(self, place: Place) -> None:
        """The payload at ``place`` is not needed any more."""
        self._freed.add(place)
        while self._used and self._used[0] in self._freed:
            self._freed.remove(self._used.popleft())

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        self._memory.unlink()


class Window:
    """A look into another process's :class:`Ring`, for reading alone."""

    def __init__(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise InputError(f"{name!r} is no ring of this program.")
        try:
            with open(_FOLDER / name, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise InputError(f"the ring {name!r} is not on this machine: {error}.") from None

    def get(self, place: Place) -> bytes:
        """A copy of the payload at ``place``."""
        if not 0 <= place.offset <= place.offset + place.length <= len(self._map):
            raise InputError(f"{place} is outside the ring.")
        return self._map[place.offset : place.offset + place.length]

    def close(self) -> None:
        """Let go of the memory."""
        self._map.close()
