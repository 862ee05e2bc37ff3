"""A library of structural elements: every one with its fingerprint, and "where else have I seen this?".

One SQLite file [1]_ in write-ahead mode with every commit flushed: what :meth:`Library.add` has returned for survives
the death of the process and a power cut; what it had not is there as a whole or not at all. Any number of processes
may read while one writes. The index of nearest neighbours lies beside it (``NAME.index``), is checked, and is made
from the entries whenever it is missing or damaged: it can be deleted at any time.

.. [1] https://www.sqlite.org/wal.html
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from stemloop.core.durable import sync_folder
from stemloop.core.errors import InputError, IntegrityError, StemloopError, StorageError, UnreadableFile
from stemloop.store import neighbours
from stemloop.store.entries import Element, Entry, Row, flaw_of, row_of

__all__ = ["Element", "Entry", "Library", "Match", "Sighting", "same", "sha256_of"]

_FORMAT = "stemloop library 1"
_WAIT_S = 60.0
#: The first bytes of every SQLite file that is not empty.
_BEGINS = b"SQLite format 3\0"
_SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE sources (id INTEGER PRIMARY KEY, sha256 TEXT UNIQUE NOT NULL, name TEXT NOT NULL);
CREATE TABLE entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB UNIQUE NOT NULL, source INTEGER NOT NULL REFERENCES sources,
    frame INTEGER NOT NULL, y REAL NOT NULL, x REAL NOT NULL, kind TEXT NOT NULL, phase TEXT NOT NULL, p REAL NOT NULL,
    scatter REAL NOT NULL, pixel_size_m REAL, detail TEXT NOT NULL, added REAL NOT NULL, vector BLOB NOT NULL);
CREATE TABLE patches (id INTEGER PRIMARY KEY REFERENCES entries, rows INTEGER NOT NULL, picture BLOB NOT NULL);
CREATE INDEX entries_kind ON entries (kind);
"""
_FIELDS = (
    "e.id, s.name, s.sha256, e.frame, e.y, e.x, e.kind, e.phase, e.p, e.scatter, e.pixel_size_m, e.detail, e.added"
)
#: New vectors are compared one by one until there are more than this, and a tenth of the indexed ones.
_LOOSE = 20_000
#: Equal surroundings differ in about so many directions only (tr(C)^2 / tr(C^2) of their covariance C is 5 to 16).
_FREEDOM = 8
#: Numbers that a fingerprint may have.
_LARGEST = 4096
#: So many entries of an index are compared with the library when it is read.
_COMPARED = 64


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
        look(self.path)
        self._alone = threading.RLock()  # threads share the connection, and must not see each other's half of a writing
        with _translated(self.path):
            self._base = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
        try:
            with _translated(self.path):
                self._base.execute("PRAGMA journal_mode=WAL")
                self._base.execute("PRAGMA synchronous=FULL")
                self._open(dimension, scale, version)
        except BaseException:
            self._base.close()
            raise
        self._index: neighbours.Index | None = None
        self._loose = _Loose.empty(self.dimension)

    def _open(self, dimension: int, scale: str, version: int) -> None:
        if self._is_empty():  # only then a lock is taken: readers of a known library wait for nobody
            with self._writing():
                if self._is_empty():
                    for statement in _SCHEMA.split(";"):
                        self._base.execute(statement)
                    about = {"format": _FORMAT, "name": uuid.uuid4().hex, "dimension": str(dimension), "scale": scale}
                    about["version"] = str(version)
                    self._base.executemany("INSERT INTO about VALUES (?, ?)", about.items())
            sync_folder(self.path.parent)
        about = dict(self._base.execute("SELECT name, value FROM about")) if self._is_known() else {}
        if about.get("format") != _FORMAT or not {"name", "dimension", "scale", "version"} <= set(about):
            raise UnreadableFile(f"{self.path} is an SQLite file, but not a library of structural elements.")
        if about["version"] != str(version):
            raise InputError(
                f"{self.path} holds fingerprints of version {about['version']}, which cannot be compared with those of "
                f"version {version}. Make it anew from the images."
            )
        if not about["dimension"].isdecimal() or not 1 <= int(about["dimension"][:9]) <= _LARGEST:
            raise UnreadableFile(
                f"{self.path} is of {about['dimension'][:40]} dimensions; a library has 1 to {_LARGEST}."
            )
        self.name, self.dimension, self.scale = about["name"], int(about["dimension"]), about["scale"]
        self.version = version

    def _is_empty(self) -> bool:
        return not self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]

    def _is_known(self) -> bool:
        """Whether the tables are ours: a stranger's file may hold views that never end, and triggers."""
        found = self._base.execute(
            "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND (type != 'table' OR name NOT LIKE 'sqlite%')"
        )
        return {sql for (sql,) in found} == {words.strip() for words in _SCHEMA.split(";") if words.strip()}

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()

    def __len__(self) -> int:
        return int(self._ask("SELECT count(*) FROM entries")[0][0])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """All or nothing, and on the disk when it ends."""
        with self._alone:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._base.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._base.execute("ROLLBACK")
                raise

    def _ask(self, words: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with _translated(self.path), self._alone:
            return self._base.execute(words, values).fetchall()

    # ------------------------------------------------------------------------------------------------ what is kept

    def add(self, elements: Iterable[Element], source: str, source_sha256: str) -> int:
        """Keep ``elements`` of one file; return how many were new. When it returns they are on the disk.

        The same element of the same file (by content) is kept once, however often it is added.

        Parameters
        ----------
        source, source_sha256 : name and SHA-256 (hexadecimal) of the file: :func:`sha256_of`.
        """
        rows = [row_of(element, source_sha256, self.dimension) for element in elements]
        with _translated(self.path), self._writing():
            return self._insert(rows, source, source_sha256)

    def _insert(self, rows: Iterable[Row], source: str, sha256: str) -> int:
        name = source.encode(errors="replace").decode()
        self._base.execute("INSERT OR IGNORE INTO sources (sha256, name) VALUES (?, ?)", (sha256, name))
        (number,) = self._base.execute("SELECT id FROM sources WHERE sha256 = ?", (sha256,)).fetchone()
        new = 0
        for (known, *facts), picture in rows:
            made = self._base.execute(
                "INSERT INTO entries (digest, source, frame, y, x, kind, phase, p, scatter, pixel_size_m, detail,"
                " added, vector) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO NOTHING",
                (known, number, *facts),
            )
            new += made.rowcount
            if made.rowcount and picture is not None:
                self._base.execute("INSERT INTO patches VALUES (?, ?, ?)", (made.lastrowid, *picture))
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
            with _translated(self.path), self._writing():
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
        while found := self._ask(
            "SELECT e.id, s.sha256, s.name, p.rows, p.picture, e.digest, e.frame, e.y, e.x, e.kind, e.phase, e.p,"
            " e.scatter, e.pixel_size_m, e.detail, e.added, e.vector FROM entries e JOIN sources s ON s.id = e.source"
            " LEFT JOIN patches p ON p.id = e.id WHERE e.id > ? ORDER BY e.id LIMIT ?",
            (last, batch),
        ):
            last = found[-1][0]
            yield [(row[1], row[2], row[5:], None if row[3] is None else row[3:5]) for row in found]

    # ---------------------------------------------------------------------------------------------- what it answers

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
            found = self._ask("SELECT id FROM sources WHERE sha256 = ?", (without_source,))
            without = found[0][0] if found else -1
        index, loose = self._fresh()
        k = max(1, min(int(k), len(index) + len(loose.entry)))
        entry, square = index.search(query, k, None if exact else neighbours.PROBES, without)
        if len(loose.entry):
            first, stop = np.zeros(1, np.int64), np.array([len(loose.entry)])
            more, row = neighbours.nearest(query, loose.vectors, loose.source, first, stop, k, without)
            entry, square = np.concatenate([entry, loose.entry[row]]), np.concatenate([square, more])
            order = np.argsort(square, kind="stable")[:k]
            entry, square = entry[order], square[order]
        return entry, np.sqrt(square.astype(np.float64))

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
            for i, name, sha256, frame, y, x, kind, phase, p, spread, size, detail, added in self._ask(
                words, [int(n) for n in part]
            ):
                with _sound(self.path):
                    y, x, p, spread, added = map(float, (y, x, p, spread, added))  # noqa: PLW2901
                    known[i] = Entry(
                        i, name, sha256, frame, (y, x), kind, phase, p, spread, size, json.loads(detail), added
                    )
        return known

    def vector(self, number: int) -> NDArray[np.float32]:
        """The fingerprint of an entry."""
        found = self._ask("SELECT vector FROM entries WHERE id = ?", (int(number),))
        if not found:
            raise InputError(f"{self.path} has no entry {number}.")
        with _sound(self.path):
            return np.frombuffer(found[0][0], "<f4").astype(np.float32)

    def patch(self, number: int) -> NDArray[np.uint8] | None:
        """The picture of an entry in 256 grey levels, or None if it was kept without one."""
        found = self._ask("SELECT rows, picture FROM patches WHERE id = ?", (int(number),))
        with _sound(self.path):
            return np.frombuffer(found[0][1], np.uint8).reshape(found[0][0], -1) if found else None

    @property
    def _log(self) -> Path:
        """What was written last may still be there."""
        return self.path.with_name(self.path.name + "-wal")

    def about(self) -> dict[str, Any]:
        """What the library holds, in plain numbers: entries, by kind and phase, sources, dimension, scale, bytes."""
        return {
            "entries": len(self),
            "kinds": dict(self._ask("SELECT kind, count(*) FROM entries GROUP BY kind ORDER BY 2 DESC")),
            "phases": dict(self._ask("SELECT phase, count(*) FROM entries GROUP BY phase ORDER BY 2 DESC")),
            "sources": self._ask("SELECT count(*) FROM sources")[0][0],
            "dimension": self.dimension,
            "scale": self.scale,
            "bytes": sum(path.stat().st_size for path in (self.path, self._log) if path.exists()),
        }

    def verify(self) -> int:
        """Compare every entry with its digest and every page of the file with SQLite's rules; return how many entries
        there are. IntegrityError names the first that is not what was added."""
        (verdict,) = self._ask("PRAGMA quick_check(1)")[0]
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

    # ------------------------------------------------------------------------------------------------------ index

    @property
    def index_path(self) -> Path:
        """The file beside the library that makes searches fast; it may be deleted."""
        return self.path.with_name(self.path.name + ".index")

    def _fresh(self) -> tuple[neighbours.Index, _Loose]:
        """The index, and the entries that are newer than it."""
        with self._alone:
            return self._renewed()

    def _renewed(self) -> tuple[neighbours.Index, _Loose]:
        if self._index is None:
            self._index = neighbours.load(self.index_path, self.name)
            if self._index is None or not self._is_of(self._index):
                self._index = neighbours.build(*self._vectors(0))
                self._keep()
            self._loose = _Loose.empty(self.dimension)
        last = max((int(a.max()) for a in (self._index.entry, self._loose.entry) if len(a)), default=0)
        if (self._ask("SELECT max(id) FROM entries")[0][0] or 0) > last:
            self._loose = self._loose.with_more(*self._vectors(last))
        if len(self._loose.entry) > _LOOSE + len(self._index) // 10:
            self._index = neighbours.extended(self._index, self._loose.entry, self._loose.source, self._loose.vectors)
            self._loose = _Loose.empty(self.dimension)
            self._keep()
        return self._index, self._loose

    def _is_of(self, index: neighbours.Index) -> bool:
        """Whether the index is of the entries that are here, and not of those before an older file was put back."""
        count = self._ask("SELECT count(*) FROM entries WHERE id <= ?", (int(index.entry.max(initial=0)),))[0][0]
        if index.vectors.shape != (count, self.dimension):
            return False
        for i in np.unique(np.linspace(0, count - 1, min(count, _COMPARED)).astype(int)):
            found = self._ask("SELECT source, vector FROM entries WHERE id = ?", (int(index.entry[i]),))
            if found != [(int(index.source[i]), index.vectors[i].astype("<f4").tobytes())]:
                return False
        return True

    def _keep(self) -> None:
        """Small ones are made again faster than they are read; where nothing may be written, it stays in memory."""
        if self._index is not None and len(self._index) > _LOOSE:
            with contextlib.suppress(StorageError):
                neighbours.save(self._index, self.index_path, self.name)

    def _vectors(self, after: int) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
        """Numbers, sources and fingerprints of the entries after number ``after``."""
        names, sources, vectors = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, "<f4")]
        with _translated(self.path), self._alone, _sound(self.path):
            found = self._base.execute("SELECT id, source, vector FROM entries WHERE id > ? ORDER BY id", (after,))
            while rows := found.fetchmany(50_000):
                if {len(row[2]) for row in rows} != {4 * self.dimension}:
                    raise ValueError("a fingerprint of another length")
                names.append(np.array([row[0] for row in rows], np.int64))
                sources.append(np.array([row[1] for row in rows], np.int32))
                vectors.append(np.frombuffer(b"".join(row[2] for row in rows), "<f4"))
        together = np.concatenate(vectors).astype(np.float32, copy=False)
        if not np.isfinite(together).all():
            raise _damaged(self.path)
        return np.concatenate(names), np.concatenate(sources), together.reshape(-1, self.dimension)


@dataclass(frozen=True)
class _Loose:
    """Entries that are not in the index yet."""

    entry: NDArray[np.int64]
    source: NDArray[np.int32]
    vectors: NDArray[np.float32]

    @classmethod
    def empty(cls, dimension: int) -> _Loose:
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros((0, dimension), np.float32))

    def with_more(self, entry: NDArray[np.int64], source: NDArray[np.int32], vectors: NDArray[np.float32]) -> _Loose:
        return _Loose(
            np.concatenate([self.entry, entry]),
            np.concatenate([self.source, source]),
            np.concatenate([self.vectors, vectors]),
        )


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


def look(path: Path) -> None:
    """What can be said of a library, or of the name of one to be, without opening it; as :class:`Library` raises."""
    if not path.parent.is_dir():
        raise StorageError(f"there is no folder {path.parent} for the library {path.name}.")
    if path.is_dir():
        raise UnreadableFile(f"{path} is a folder; a library is a file.")
    if _is_foreign(path):
        raise UnreadableFile(f"{path} is there already and is no library; choose another name.")


def _is_foreign(path: Path) -> bool:
    """Whether there is a file that SQLite did not begin; it takes any of less than a header for an empty one."""
    try:
        with open(path, "rb") as file:
            begins = file.read(len(_BEGINS))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}.") from None
    return begins not in (b"", _BEGINS)


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's errors in words that say what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise _storage(path, str(error)) from None
    except sqlite3.DatabaseError as error:
        raise UnreadableFile(f"{path} is not a library, or is damaged ({error}).") from None


@contextlib.contextmanager
def _sound(path: Path) -> Iterator[None]:
    """Entries that no library wrote, in words that say what to do."""
    try:
        yield
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise _damaged(path) from None


def _damaged(path: Path) -> IntegrityError:
    return IntegrityError(f"{path} holds damaged entries: verify it, or merge what is whole into a new library.")


def _storage(path: Path, words: str) -> StemloopError:
    if "decode" in words:
        return _damaged(path)
    if "locked" in words:
        return StorageError(f"{path} is being written by another process for {_WAIT_S:g} s; try again.")
    return StorageError(f"{path}: {words}; is the disk full, or the folder not writable?")
