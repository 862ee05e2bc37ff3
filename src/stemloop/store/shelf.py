"""The SQLite file of a library of structural elements: opened with care, written all or nothing, asked.

Write-ahead mode with every commit flushed (https://www.sqlite.org/wal.html). A stranger's file is looked at before it
is believed, and SQLite's errors become words that say what to do.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stemloop.core.durable import sync_folder
from stemloop.core.errors import InputError, IntegrityError, StemloopError, StorageError, UnreadableFile

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
#: Numbers that a fingerprint may have.
_LARGEST = 4096


class Shelf:
    """The open file ``path`` and what it says of itself: ``name``, ``dimension``, ``scale``, ``version``; made if it is
    not there. The arguments and errors are those of :class:`stemloop.store.library.Library`."""

    def __init__(self, path: Path, dimension: int, scale: str, version: int) -> None:
        self.path = path
        look(self.path)
        self.alone = threading.RLock()  # threads share the connection, and must not see each other's half of a writing
        with translated(self.path):
            self._base = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
        try:
            with translated(self.path):
                self._base.execute("PRAGMA journal_mode=WAL")
                self._base.execute("PRAGMA synchronous=FULL")
                self._open(dimension, scale, version)
        except BaseException:
            self._base.close()
            raise

    def _open(self, dimension: int, scale: str, version: int) -> None:
        if self._is_empty():  # only then a lock is taken: readers of a known library wait for nobody
            with self.writing():
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

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """All or nothing, and on the disk when it ends."""
        with translated(self.path), self.alone:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._base.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._base.execute("ROLLBACK")
                raise

    def ask(self, words: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of the answer."""
        with translated(self.path), self.alone:
            return self._base.execute(words, values).fetchall()

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()

    @contextlib.contextmanager
    def rows(self, words: str, values: Sequence[Any] = ()) -> Iterator[sqlite3.Cursor]:
        """A question whose answer is fetched in parts, with nobody else on the line."""
        with translated(self.path), self.alone:
            yield self._base.execute(words, values)

    def execute(self, words: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """A statement within :meth:`writing`."""
        return self._base.execute(words, values)


def look(path: Path) -> None:
    """What can be said of a library, or of the name of one to be, without opening it; as :class:`Library` raises."""
    if not path.parent.is_dir():
        raise StorageError(f"there is no folder {path.parent} for the library {path.name}.")
    if path.is_dir():
        raise UnreadableFile(f"{path} is a folder; a library is a file.")
    if _is_foreign(path):
        raise UnreadableFile(f"{path} is there already and is not a library; choose another name.")


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
def translated(path: Path) -> Iterator[None]:
    """SQLite's errors in words that say what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise _storage(path, str(error)) from None
    except sqlite3.DatabaseError as error:
        raise UnreadableFile(f"{path} is not a library, or is damaged ({error}).") from None


@contextlib.contextmanager
def sound(path: Path) -> Iterator[None]:
    """Entries that no library wrote, in words that say what to do."""
    try:
        yield
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise damaged(path) from None


def damaged(path: Path) -> IntegrityError:
    """What is raised for entries that no library wrote."""
    return IntegrityError(f"{path} holds damaged entries: verify it, or merge what is whole into a new library.")


def _storage(path: Path, words: str) -> StemloopError:
    if "decode" in words:
        return damaged(path)
    if "locked" in words:
        return StorageError(f"{path} is being written by another process for {_WAIT_S:g} s; try again.")
    return StorageError(f"{path}: {words}; is the disk full, or the folder not writable?")
