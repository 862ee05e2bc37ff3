"""Nearest neighbours among a million vectors in a few milliseconds, on one core.

The vectors lie on the disk in cells, each the neighbourhood of one of about root-n centres (k-means). A query is
compared exactly with all vectors of the cells whose centres are nearest to it, and with no others (the inverted file
of J. Sivic, A. Zisserman, ICCV (2003) 1470, doi:10.1109/ICCV.2003.1238663). So distances are exact, and what can be
missed is a neighbour in a cell that was not looked at; with all cells looked at, nothing is.

The file is only a copy, in another order, of what the library holds. It carries the library's name and a checksum, and
is made anew when either does not fit.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numba import njit
from numpy.typing import NDArray

from stemloop.core.durable import writing

_MAGIC = b"SLNEAR01"
_HEAD = struct.Struct("<8sII")
_LONGEST_HEAD = 1 << 16
#: A vector is compared with this many centres' cells, if not told otherwise.
PROBES = 96
#: k-means sees at most so many vectors a cell, and goes on for so many steps.
_SEEN, _STEPS = 40, 8
#: So few vectors are all looked at.
_FEW = 4000


@dataclass(frozen=True)
class Index:
    """``vectors`` (n, d) float32 in the order of their cells: cell c is rows ``start[c]`` to ``start[c + 1]``.

    entry : (n,) int64 numbers of the vectors' entries; source : (n,) int32 of the images they come from; centre :
    (c, d). trained : how many vectors the centres were chosen among.
    """

    entry: NDArray[np.int64]
    source: NDArray[np.int32]
    vectors: NDArray[np.float32]
    centre: NDArray[np.float32]
    start: NDArray[np.int64]
    trained: int

    def __len__(self) -> int:
        return len(self.entry)

    def search(
        self, query: NDArray[np.float32], k: int, probes: int | None = PROBES, without: int = -1
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Entries and squared distances of the ``k`` nearest to ``query`` (d,), nearest first, in the ``probes``
        nearest cells (None: in all), none of them of the source ``without``. Where that fills the cells, more are
        looked at, until as many others were."""
        if len(self) == 0:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        if probes is None or probes >= len(self.centre):
            cells = np.arange(len(self.centre))
        else:
            far = ((self.centre - query) ** 2).sum(axis=1)
            if without >= 0:
                probes = self._reached(np.argsort(far), probes, without)
            cells = np.argpartition(far, probes - 1)[:probes]
            cells = cells[np.argsort(far[cells])]
        square, row = nearest(query, self.vectors, self.source, self.start[cells], self.start[cells + 1], k, without)
        return self.entry[row], square

    def _reached(self, order: NDArray[np.int64], probes: int, without: int) -> int:
        """How many cells of ``order`` hold as many vectors of other sources as ``probes`` cells usually hold."""
        own = np.concatenate([[0], np.cumsum(self.source == without)])[self.start]
        others = np.cumsum((np.diff(self.start) - np.diff(own))[order])
        wanted = min(probes * len(self) / len(self.centre), others[-1])
        return min(max(probes, int(np.searchsorted(others, wanted)) + 1), len(order))


def build(entry: NDArray[np.int64], source: NDArray[np.int32], vectors: NDArray[np.float32], seed: int = 0) -> Index:
    """An index of ``vectors`` (n, d)."""
    n = len(vectors)
    count = min(2048, round(2 * np.sqrt(n))) if n >= _FEW else 1
    centre = _centres(vectors, count, np.random.default_rng(seed)) if n else np.zeros((1, vectors.shape[1]), np.float32)
    return _ordered(entry, source, vectors, _cells(vectors, centre), centre, n)


def extended(index: Index, entry: NDArray[np.int64], source: NDArray[np.int32], vectors: NDArray[np.float32]) -> Index:
    """``index`` with more vectors; the centres are chosen anew when there are four times as many as they were for."""
    old = np.repeat(np.arange(len(index.centre)), np.diff(index.start))
    everything = np.concatenate([index.vectors, vectors])
    names, images = np.concatenate([index.entry, entry]), np.concatenate([index.source, source])
    if len(everything) > 4 * index.trained:
        return build(names, images, everything)
    cells = np.concatenate([old, _cells(vectors, index.centre)])
    return _ordered(names, images, everything, cells, index.centre, index.trained)


def _ordered(
    entry: NDArray[np.int64],
    source: NDArray[np.int32],
    vectors: NDArray[np.float32],
    cells: NDArray[np.int64],
    centre: NDArray[np.float32],
    trained: int,
) -> Index:
    order = np.argsort(cells, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=len(centre)))]).astype(np.int64)
    return Index(entry[order], source[order], np.ascontiguousarray(vectors[order]), centre, start, trained)


def _centres(vectors: NDArray[np.float32], count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """k-means (S. Lloyd, IEEE Trans. Inf. Theory 28 (1982) 129, doi:10.1109/TIT.1982.1056489) on a sample."""
    chosen = rng.choice(len(vectors), min(len(vectors), _SEEN * count), replace=False)
    sample = vectors[np.sort(chosen)]
    centre = sample[rng.choice(len(sample), count, replace=False)].copy()
    for _ in range(_STEPS):
        cells = _cells(sample, centre)
        size = np.bincount(cells, minlength=count)
        order = np.argsort(cells, kind="stable")
        filled = np.flatnonzero(size)
        first = np.concatenate([[0], np.cumsum(size)])[filled]
        centre[filled] = np.add.reduceat(sample[order], first, axis=0) / size[filled, None]
        empty = np.flatnonzero(size == 0)
        centre[empty] = sample[rng.choice(len(sample), len(empty), replace=False)]
    return centre


def _cells(vectors: NDArray[np.float32], centre: NDArray[np.float32]) -> NDArray[np.int64]:
    """(n,) number of the nearest centre."""
    half = 0.5 * (centre**2).sum(axis=1)
    step = max(1, (1 << 22) // len(centre))
    parts = [(vectors[i : i + step] @ centre.T - half).argmax(axis=1) for i in range(0, len(vectors), step)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


@njit(cache=True, nogil=True, fastmath=True)
def nearest(
    query: NDArray[np.float32],
    vectors: NDArray[np.float32],
    source: NDArray[np.int32],
    first: NDArray[np.int64],
    stop: NDArray[np.int64],
    k: int,
    without: int,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The ``k`` nearest rows to ``query`` within the ranges ``first`` to ``stop``, by exact squared distance."""
    square, row = np.full(k, np.inf, np.float32), np.full(k, -1, np.int64)
    found = 0
    for c in range(len(first)):
        for i in range(first[c], stop[c]):
            if source[i] == without:
                continue
            total = np.float32(0)
            for j in range(len(query)):
                off = vectors[i, j] - query[j]
                total += off * off
            if total >= square[k - 1]:
                continue
            at = min(found, k - 1)
            while at > 0 and square[at - 1] > total:
                square[at], row[at] = square[at - 1], row[at - 1]
                at -= 1
            square[at], row[at] = total, i
            found = min(found + 1, k)
    return square[:found], row[:found]


_KINDS = {"vectors": "<f4", "entry": "<i8", "source": "<i4", "centre": "<f4", "start": "<i8"}
_PARTS = tuple(_KINDS)


def save(index: Index, path: Path, library: str) -> None:
    """Write ``index`` for the library of this name: whole under its name, or not at all."""
    parts = {name: np.ascontiguousarray(getattr(index, name)) for name in _PARTS}
    crc, place, table = 0, 0, {}
    for name, part in parts.items():
        crc = google_crc32c.extend(crc, part.tobytes())
        table[name] = (part.dtype.str, part.shape, place)
        place += part.nbytes
    head = json.dumps({"library": library, "trained": index.trained, "bytes": place, "crc": crc, "parts": table})
    words = head.encode()
    words += b" " * (-(len(words) + _HEAD.size) % 64)  # so that the numbers lie even
    with writing(path) as file:
        file.write(_HEAD.pack(_MAGIC, len(words), google_crc32c.value(words)) + words)
        for part in parts.values():
            file.write(part.data)


def load(path: Path, library: str) -> Index | None:
    """The index in ``path``, mapped; None if there is none, or it is another library's, or its checksum fails, or it
    was made up: a search looks nowhere but into it, whoever wrote it."""
    try:
        with open(path, "rb") as file:
            magic, length, crc = _HEAD.unpack(file.read(_HEAD.size))
            if magic != _MAGIC or length > _LONGEST_HEAD:
                return None
            words = file.read(length)
        if google_crc32c.value(words) != crc:
            return None
        head = json.loads(words)
        payload = np.memmap(path, np.uint8, "r", offset=_HEAD.size + length)
        if head["library"] != library or len(payload) != head["bytes"] or _crc(payload) != head["crc"]:
            return None
        parts = {name: _part(payload, np.dtype(_KINDS[name]), *head["parts"][name]) for name in _PARTS}
        index = Index(trained=int(head["trained"]), **parts)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError, struct.error):
        return None
    return index if _is_whole(index) else None


def _is_whole(index: Index) -> bool:
    """Whether the cells are rows of the vectors, and all of them."""
    n, cells = len(index), len(index.centre)
    return bool(
        index.vectors.ndim == index.centre.ndim == 2
        and index.vectors.shape == (n, index.centre.shape[1])
        and index.entry.shape == index.source.shape == (n,)
        and index.start.shape == (cells + 1,)
        and cells > 0
        and index.trained >= 0
        and index.start[0] == 0
        and index.start[-1] == n
        and (np.diff(index.start) >= 0).all()
    )


def _crc(payload: NDArray[np.uint8]) -> int:
    crc, step = 0, 1 << 24
    for i in range(0, len(payload), step):
        crc = google_crc32c.extend(crc, payload[i : i + step].tobytes())
    return int(crc)


def _part(payload: NDArray[np.uint8], dtype: np.dtype[Any], kind: str, shape: list[int], place: int) -> NDArray[Any]:
    if np.dtype(kind) != dtype or min(place, *shape) < 0:
        raise ValueError(f"{kind} of {shape} at {place}")
    size = math.prod(shape) * dtype.itemsize
    return payload[place : place + size].view(dtype).reshape(shape)
