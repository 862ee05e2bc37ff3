"""A library of structural elements: every one with its fingerprint, and "where else have I seen this?".

One SQLite file with every commit flushed (:mod:`stemloop.store.shelf`): what :meth:`Library.add` has returned for
survives the death of the process and a power cut; what it had not is there as a whole or not at all. Any number of
processes may read while one writes. The index of nearest neighbours (:mod:`stemloop.store.nearby`) lies beside it
(``NAME.index``), is checked, and is made from the entries whenever it is missing or damaged: it can be deleted at any
time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from stemloop.core.errors import InputError, IntegrityError, UnreadableFile
from stemloop.store.entries import Element, Entry, Row, flaw_of, row_of
from stemloop.store.nearby import Nearby
from stemloop.store.shelf import Shelf, sound

__all__ = ["Element", "Entry", "Library", "Match", "Sighting", "same", "sha256_of"]

_FIELDS = (
    "e.id, s.name, s.sha256, e.frame, e.y, e.x, e.kind, e.phase, e.p, e.scatter, e.pixel_size_m, e.detail, e.added"
)
#: Equal surroundings differ in about so many directions only (tr(C)^2 / tr(C^2) of their covariance C is 5 to 16).
_FREEDOM = 8


@dataclass(frozen=True)
class Match:
    """An entry near a query. distance : in the fingerprints' deviations. p_same : share of pairs of equal surroundings
    that noise puts at least so far apart (chi-square of the distance over both scatters); small: it is another one."""

    entry: Entry
    distance: float
    p_same: float


@dataclass(frozen=True)
class Sighting:
    """One image in which something like the query was seen: its ``matches``, the nearest first."""

    source: str
    source_sha256: str
    frame: int
    matches: tuple[Match, ...]

    @property
    def distance(self) -> float:
        """Of the nearest match."""
        return self.matches[0].distance

    @property
    def p_same(self) -> float:
        """Of the nearest match."""
        return self.matches[0].p_same


class Library:
    """The library in the file ``path``, made if it is not there.

    Parameters
    ----------
    path : the file. dimension : numbers of a fingerprint; only for a new library. scale : what lengths the fingerprints
        are measured in, ``spacing`` or ``metres`` (of a new library; others must be of the same to be merged).
        version : of the fingerprints (:data:`stemloop.describe.fingerprints.VERSION`).

    Raises
    ------
    UnreadableFile : the file is no library. StorageError : it cannot be made or written. InputError : it holds
    fingerprints of another version.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with Library(Path(folder.name) / "seen.library", dimension=2) as library:
    ...     new = library.add([Element(np.float32([3, 4]), "vacancy", (10.0, 12.5))], "a.tif", "00ff")
    ...     library.search(np.float32([3, 3]), 1)[0].distance
    1.0
    """

    def __init__(
        self, path: str | os.PathLike[str], *, dimension: int = 48, scale: str = "spacing", version: int = 1
    ) -> None:
        self.path = Path(path)
        self._shelf = Shelf(self.path, dimension, scale, version)
        self.name, self.dimension = self._shelf.name, self._shelf.dimension
        self.scale, self.version = self._shelf.scale, self._shelf.version
        self._nearby = Nearby(self._shelf, self.index_path)

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._shelf.close()

    def __len__(self) -> int:
        return int(self._shelf.ask("SELECT count(*) FROM entries")[0][0])

    # ------------------------------------------------------------------------------------------------ what is kept

    def add(self, elements: Iterable[Element], source: str, source_sha256: str) -> int:
        """Keep ``elements`` of one file; return how many were new. When it returns they are on the disk.

        The same element of the same file (by content) is kept once, however often it is added.

        Parameters
        ----------
        source, source_sha256 : name and SHA-256 (hexadecimal) of the file: :func:`sha256_of`.
        """
        rows = [row_of(element, source_sha256, self.dimension) for element in elements]
        with self._shelf.writing():
            return self._insert(rows, source, source_sha256)

    def _insert(self, rows: Iterable[Row], source: str, sha256: str) -> int:
        name = source.encode(errors="replace").decode()
        self._shelf.execute("INSERT OR IGNORE INTO sources (sha256, name) VALUES (?, ?)", (sha256, name))
        (number,) = self._shelf.execute("SELECT id FROM sources WHERE sha256 = ?", (sha256,)).fetchone()
        new = 0
        for (known, *facts), picture in rows:
            made = self._shelf.execute(
                "INSERT INTO entries (digest, source, frame, y, x, kind, phase, p, scatter, pixel_size_m, detail,"
                " added, vector) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO NOTHING",
                (known, number, *facts),
            )
            new += made.rowcount
            if made.rowcount and picture is not None:
                self._shelf.execute("INSERT INTO patches VALUES (?, ?, ?)", (made.lastrowid, *picture))
        return new

    def merge(self, other: Library | str | os.PathLike[str], batch: int = 10_000) -> int:
        """Keep all entries of ``other`` too; return how many were new. Interrupted, it may be done again.

        Entries that are not what their digests say, or no elements at all, are left out: IntegrityError tells so when
        all others are kept.
        """
        if not isinstance(other, Library):
            if not Path(other).exists():
                raise UnreadableFile(f"there is no library {other}.")
            with Library(other, version=self.version) as opened:
                return self.merge(opened, batch)
        if (other.dimension, other.scale, other.version) != (self.dimension, self.scale, self.version):
            raise InputError(
                f"{other.path} holds fingerprints of {other.dimension} numbers in {other.scale} (version "
                f"{other.version}), {self.path} of {self.dimension} in {self.scale} (version {self.version}): they "
                "cannot be compared. Make the one anew like the other."
            )
        new, flaws = 0, []
        for part in other._rows(batch):
            with self._shelf.writing():
                for (sha256, name), together in groupby(part, key=lambda row: row[:2]):
                    good = []
                    for _, _, row, picture in together:
                        flaw = flaw_of(row, picture, sha256, self.dimension)
                        if flaw:
                            flaws.append(f"that at {row[2:4]} of {name}: {flaw}")
                        else:
                            good.append((row, picture))
                    new += self._insert(good, name, sha256) if good else 0
        if flaws:
            raise IntegrityError(
                f"{len(flaws)} entries of {other.path} are damaged and were left out, first {flaws[0]}; the others "
                f"are kept ({new} new)."
            )
        return new

    def _rows(self, batch: int) -> Iterator[list[tuple[str, str, tuple[Any, ...], tuple[int, bytes] | None]]]:
        """(SHA-256 and name of the source, row, picture) of all entries in the order they came, ``batch`` at a time."""
        last = 0
        while found := self._shelf.ask(
            "SELECT e.id, s.sha256, s.name, p.rows, p.picture, e.digest, e.frame, e.y, e.x, e.kind, e.phase, e.p,"
            " e.scatter, e.pixel_size_m, e.detail, e.added, e.vector FROM entries e JOIN sources s ON s.id = e.source"
            " LEFT JOIN patches p ON p.id = e.id WHERE e.id > ? ORDER BY e.id LIMIT ?",
            (last, batch),
        ):
            last = found[-1][0]
            yield [(row[1], row[2], row[5:], None if row[3] is None else row[3:5]) for row in found]

    # ---------------------------------------------------------------------------------------------- what it answers

    @property
    def index_path(self) -> Path:
        """The file beside the library that makes searches fast; it may be deleted."""
        return self.path.with_name(self.path.name + ".index")

    def search(
        self,
        fingerprint: NDArray[Any],
        k: int = 10,
        *,
        scatter: float = 1.0,
        exact: bool = False,
        without_source: str | None = None,
    ) -> list[Match]:
        """The ``k`` entries nearest to ``fingerprint`` (d,), nearest first.

        Parameters
        ----------
        scatter : of the image that the fingerprint is from; it enters ``p_same``. exact : compare with every entry.
            Otherwise a neighbour is missed now and then (well under one query in a hundred).
        without_source : SHA-256 of a file whose entries are not wanted (the one that the query is from).
        """
        entry, distance = self.nearest(fingerprint, k, exact=exact, without_source=without_source)
        known = self._entries(entry)
        if len(known) != len(entry):
            raise IntegrityError(
                f"{self.index_path} names entries that {self.path} does not hold: delete the one, verify the other."
            )
        return [_match(known[int(i)], float(d), scatter, self.dimension) for i, d in zip(entry, distance, strict=True)]

    def nearest(
        self, fingerprint: NDArray[Any], k: int = 10, *, exact: bool = False, without_source: str | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Numbers and distances of the ``k`` nearest entries; as :meth:`search`, without looking the entries up."""
        query = np.ascontiguousarray(fingerprint, dtype=np.float32)
        if query.shape != (self.dimension,) or not np.isfinite(query).all() or k < 1 or k != int(k):
            raise InputError(
                f"a query is {self.dimension} finite numbers and k a whole number from 1; got {query.shape}, k = {k}."
            )
        without = -1
        if without_source is not None:
            found = self._shelf.ask("SELECT id FROM sources WHERE sha256 = ?", (without_source,))
            without = found[0][0] if found else -1
        return self._nearby.nearest(query, int(k), exact, without)

    def seen(
        self,
        fingerprint: NDArray[Any],
        *,
        scatter: float = 1.0,
        least_p: float = 1e-3,
        without_source: str | None = None,
        k: int = 200,
    ) -> list[Sighting]:
        """Where else this was seen: the images that hold something as like it as noise makes equal surroundings
        (``p_same`` at least ``least_p``), the most alike first; from the ``k`` nearest entries."""
        found: dict[tuple[str, int], list[Match]] = {}
        for match in self.search(fingerprint, k, scatter=scatter, without_source=without_source):
            if match.p_same >= least_p:
                found.setdefault((match.entry.source_sha256, match.entry.frame), []).append(match)
        return [Sighting(m[0].entry.source, sha256, frame, tuple(m)) for (sha256, frame), m in found.items()]

    def entry(self, number: int) -> Entry:
        """The entry of this number; InputError if there is none."""
        known = self._entries(np.array([number]))
        if number not in known:
            raise InputError(f"{self.path} has no entry {number}.")
        return known[number]

    def _entries(self, numbers: NDArray[np.int64]) -> dict[int, Entry]:
        known = {}
        for part in np.array_split(numbers, max(1, -(-len(numbers) // 500))):
            marks = ",".join("?" * len(part))
            words = f"SELECT {_FIELDS} FROM entries e JOIN sources s ON s.id = e.source WHERE e.id IN ({marks})"
            for i, name, sha256, frame, y, x, kind, phase, p, spread, size, detail, added in self._shelf.ask(
                words, [int(n) for n in part]
            ):
                with sound(self.path):
                    y, x, p, spread, added = map(float, (y, x, p, spread, added))  # noqa: PLW2901
                    known[i] = Entry(
                        i, name, sha256, frame, (y, x), kind, phase, p, spread, size, json.loads(detail), added
                    )
        return known

    def vector(self, number: int) -> NDArray[np.float32]:
        """The fingerprint of an entry."""
        found = self._shelf.ask("SELECT vector FROM entries WHERE id = ?", (int(number),))
        if not found:
            raise InputError(f"{self.path} has no entry {number}.")
        with sound(self.path):
            return np.frombuffer(found[0][0], "<f4").astype(np.float32)

    def patch(self, number: int) -> NDArray[np.uint8] | None:
        """The picture of an entry in 256 grey levels, or None if it was kept without one."""
        found = self._shelf.ask("SELECT rows, picture FROM patches WHERE id = ?", (int(number),))
        with sound(self.path):
            return np.frombuffer(found[0][1], np.uint8).reshape(found[0][0], -1) if found else None

    @property
    def _log(self) -> Path:
        """What was written last may still be there."""
        return self.path.with_name(self.path.name + "-wal")

    def about(self) -> dict[str, Any]:
        """What the library holds, in plain numbers: entries, by kind and phase, sources, dimension, scale, bytes."""
        return {
            "entries": len(self),
            "kinds": dict(self._shelf.ask("SELECT kind, count(*) FROM entries GROUP BY kind ORDER BY 2 DESC")),
            "phases": dict(self._shelf.ask("SELECT phase, count(*) FROM entries GROUP BY phase ORDER BY 2 DESC")),
            "sources": self._shelf.ask("SELECT count(*) FROM sources")[0][0],
            "dimension": self.dimension,
            "scale": self.scale,
            "bytes": sum(path.stat().st_size for path in (self.path, self._log) if path.exists()),
        }

    def verify(self) -> int:
        """Compare every entry with its digest and every page of the file with SQLite's rules; return how many entries
        there are. IntegrityError names the first that is not what was added."""
        (verdict,) = self._shelf.ask("PRAGMA quick_check(1)")[0]
        if verdict != "ok":
            raise IntegrityError(f"{self.path} is damaged: {verdict}. Merge what is left into a new library.")
        count = 0
        for part in self._rows(10_000):
            count += len(part)
            for sha256, name, row, picture in part:
                if flaw := flaw_of(row, picture, sha256, self.dimension):
                    raise IntegrityError(f"{self.path}: the entry at {row[2:4]} of {name} is damaged: {flaw}.")
        if count != len(self):
            raise IntegrityError(f"{self.path}: {len(self) - count} entries are of no source.")
        return count


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UnreadableFile(f"{os.fspath(path)} cannot be read: {error.strerror}.") from None


def same(distance: float, scatter: float, other_scatter: float, dimension: int) -> float:
    """Share of pairs of equal surroundings that lie at least ``distance`` apart, where both deviate by their image's
    scatter: the upper tail of chi-square, scaled to the scatter and with the few degrees of freedom that it has."""
    freedom, square = min(_FREEDOM, dimension), dimension * (scatter**2 + other_scatter**2)
    if square == 0:
        return float(distance == 0)
    ratio = distance**2 / square
    return float(special.gammaincc(freedom / 2, freedom / 2 * ratio))


def _match(entry: Entry, distance: float, scatter: float, dimension: int) -> Match:
    return Match(entry, distance, same(distance, scatter, entry.scatter, dimension))
