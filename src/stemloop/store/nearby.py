"""The index beside a library: kept up with its entries, checked when it is read, made again when it is not theirs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import StorageError
from stemloop.store import neighbours
from stemloop.store.shelf import Shelf, damaged, sound

#: New vectors are compared one by one until there are more than this, and a tenth of the indexed ones.
_LOOSE = 20_000
#: So many entries of an index are compared with the library when it is read.
_COMPARED = 64


@dataclass(frozen=True)
class Loose:
    """Entries that are not in the index yet."""

    entry: NDArray[np.int64]
    source: NDArray[np.int32]
    vectors: NDArray[np.float32]

    @classmethod
    def empty(cls, dimension: int) -> Loose:
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros((0, dimension), np.float32))

    def with_more(self, entry: NDArray[np.int64], source: NDArray[np.int32], vectors: NDArray[np.float32]) -> Loose:
        return Loose(
            np.concatenate([self.entry, entry]),
            np.concatenate([self.source, source]),
            np.concatenate([self.vectors, vectors]),
        )


class Nearby:
    """The nearest entries of an open library, by the index in ``path`` and the entries that are newer than it."""

    def __init__(self, shelf: Shelf, path: Path) -> None:
        self._shelf, self.path = shelf, path
        self._index: neighbours.Index | None = None
        self._loose = Loose.empty(shelf.dimension)

    def nearest(
        self, query: NDArray[np.float32], k: int, exact: bool, without: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Numbers and distances of the ``k`` entries nearest to ``query`` (d,), but for those of the source
        ``without``; ``exact``: compare with every entry."""
        index, loose = self.fresh()
        k = max(1, min(k, len(index) + len(loose.entry)))
        entry, square = index.search(query, k, None if exact else neighbours.PROBES, without)
        if len(loose.entry):
            first, stop = np.zeros(1, np.int64), np.array([len(loose.entry)])
            more, row = neighbours.nearest(query, loose.vectors, loose.source, first, stop, k, without)
            entry, square = np.concatenate([entry, loose.entry[row]]), np.concatenate([square, more])
            order = np.argsort(square, kind="stable")[:k]
            entry, square = entry[order], square[order]
        return entry, np.sqrt(square.astype(np.float64))

    def fresh(self) -> tuple[neighbours.Index, Loose]:
        """The index, and the entries that are newer than it."""
        with self._shelf.alone:
            return self._renewed()

    def _renewed(self) -> tuple[neighbours.Index, Loose]:
        if self._index is None:
            self._index = neighbours.load(self.path, self._shelf.name)
            if self._index is None or not self._is_of(self._index):
                self._index = neighbours.build(*self._vectors(0))
                self._keep()
            self._loose = Loose.empty(self._shelf.dimension)
        last = max((int(a.max()) for a in (self._index.entry, self._loose.entry) if len(a)), default=0)
        if (self._shelf.ask("SELECT max(id) FROM entries")[0][0] or 0) > last:
            self._loose = self._loose.with_more(*self._vectors(last))
        if len(self._loose.entry) > _LOOSE + len(self._index) // 10:
            self._index = neighbours.extended(self._index, self._loose.entry, self._loose.source, self._loose.vectors)
            self._loose = Loose.empty(self._shelf.dimension)
            self._keep()
        return self._index, self._loose

    def _is_of(self, index: neighbours.Index) -> bool:
        """Whether the index is of the entries that are here, and not of those before an older file was put back."""
        count = self._shelf.ask("SELECT count(*) FROM entries WHERE id <= ?", (int(index.entry.max(initial=0)),))[0][0]
        if index.vectors.shape != (count, self._shelf.dimension):
            return False
        for i in np.unique(np.linspace(0, count - 1, min(count, _COMPARED)).astype(int)):
            found = self._shelf.ask("SELECT source, vector FROM entries WHERE id = ?", (int(index.entry[i]),))
            if found != [(int(index.source[i]), index.vectors[i].astype("<f4").tobytes())]:
                return False
        return True

    def _keep(self) -> None:
        """Small ones are made again faster than they are read; where nothing may be written, it stays in memory."""
        if self._index is not None and len(self._index) > _LOOSE:
            with contextlib.suppress(StorageError):
                neighbours.save(self._index, self.path, self._shelf.name)

    def _vectors(self, after: int) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
        """Numbers, sources and fingerprints of the entries after number ``after``."""
        names, sources, vectors = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, "<f4")]
        words = "SELECT id, source, vector FROM entries WHERE id > ? ORDER BY id"
        with sound(self._shelf.path), self._shelf.rows(words, (after,)) as found:
            while rows := found.fetchmany(50_000):
                if {len(row[2]) for row in rows} != {4 * self._shelf.dimension}:
                    raise ValueError("a fingerprint of another length")
                names.append(np.array([row[0] for row in rows], np.int64))
                sources.append(np.array([row[1] for row in rows], np.int32))
                vectors.append(np.frombuffer(b"".join(row[2] for row in rows), "<f4"))
        together = np.concatenate(vectors).astype(np.float32, copy=False)
        if not np.isfinite(together).all():
            raise damaged(self._shelf.path)
        return np.concatenate(names), np.concatenate(sources), together.reshape(-1, self._shelf.dimension)
