"""Elements of a library: what is kept of them, and whether what is found is what was kept."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError

#: Digest, frame, y, x, kind, phase, p, scatter, pixel size, detail, time, vector; and the picture's rows and bytes.
Row = tuple[tuple[Any, ...], tuple[int, bytes] | None]


@dataclass(frozen=True)
class Element:
    """A structural element to be kept: what is at ``place`` (row, col) [px] of a frame of a source.

    vector : (d,) its fingerprint. kind : what it is (``column``, ``vacancy``, ``dislocation`` ...). phase : of which
    material or cluster. p : probability of that. scatter : how far equal surroundings of its image lie apart, in units
    of the fingerprints' deviation. patch : (m, m) picture, kept in 256 grey levels. detail : plain numbers and strings.
    """

    vector: NDArray[np.float32]
    kind: str
    place: tuple[float, float]
    phase: str = ""
    p: float = 1.0
    frame: int = 0
    scatter: float = 1.0
    pixel_size_m: float | None = None
    patch: NDArray[Any] | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """An element of the library, without its fingerprint and picture (:meth:`Library.vector`, :meth:`Library.patch`).

    source, source_sha256 : name and SHA-256 of the file it is from; added : seconds since 1970. The rest as in
    :class:`Element`.
    """

    id: int
    source: str
    source_sha256: str
    frame: int
    place: tuple[float, float]
    kind: str
    phase: str
    p: float
    scatter: float
    pixel_size_m: float | None
    detail: dict[str, Any]
    added: float


def row_of(element: Element, source_sha256: str, dimension: int) -> Row:
    """What is kept of ``element``. InputError where it is no element of a library of this ``dimension``."""
    vector = np.ascontiguousarray(element.vector, dtype="<f4")
    if vector.shape != (dimension,) or not np.isfinite(vector).all():
        raise InputError(
            f"a fingerprint of this library is {dimension} finite numbers; got the shape {vector.shape}"
            f"{' with NaN: its surroundings leave the image' if vector.shape == (dimension,) else ''}."
        )
    try:
        detail = json.dumps(dict(element.detail), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InputError(f"an element's detail is plain numbers and strings: {error}.") from None
    size = None if element.pixel_size_m is None else _plain(element.pixel_size_m)
    y, x = map(_plain, element.place)
    what = (str(element.kind), str(element.phase), _plain(element.p), _plain(element.scatter))
    facts = (int(element.frame), y, x, *what, size, detail)
    picture = None if element.patch is None else _grey(element.patch)
    row = (digest(source_sha256, facts, vector.tobytes(), picture), *facts, time.time(), vector.tobytes())
    if flaw := flaw_of(row, picture, source_sha256, dimension):
        raise InputError(f"an element cannot be kept: {flaw}.")
    return row, picture


def flaw_of(row: tuple[Any, ...], picture: Any, source_sha256: str, dimension: int) -> str:
    """What is wrong with a row, whoever wrote it; nothing: it is an element, and the one that was kept."""
    known, frame, y, x, kind, phase, p, scatter, size, detail, added, vector = row
    numbers = [y, x, p, scatter, added] + ([] if size is None else [size])
    if type(frame) is not int or not -(2**63) <= frame < 2**63:
        flaw = "its frame is no number"
    elif not all(type(number) is float and math.isfinite(number) for number in numbers) or scatter < 0:
        flaw = "its place, probability, scatter or pixel size is no finite number, or the scatter below zero"
    elif not all(type(word) is str and _is_unicode(word) for word in (kind, phase, detail)):
        flaw = "its kind or phase is no text"
    elif not _is_table(detail):
        flaw = "its detail is no table in JSON"
    elif type(vector) is not bytes or len(vector) != 4 * dimension or not _is_finite(vector):
        flaw = f"its fingerprint is not {dimension} finite numbers"
    elif picture is not None and not _is_picture(*picture):
        flaw = "its picture has no rows"
    else:
        flaw = "" if known == digest(source_sha256, row[1:10], vector, picture) else "it was changed"
    return flaw


def digest(sha256: str, facts: tuple[Any, ...], vector: bytes, picture: tuple[int, bytes] | None) -> bytes:
    """What an entry is known by: the SHA-256 of all that it says, but for the file's name and the time."""
    words = repr((sha256, *facts, picture[0] if picture else 0)).encode(errors="replace")
    return hashlib.sha256(words + b"\0" + vector + (picture[1] if picture else b"")).digest()


def _plain(number: Any) -> float:
    """A float; -0.0 is 0.0, as SQLite keeps it."""
    return float(number) + 0.0


def _is_unicode(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_finite(vector: bytes) -> bool:
    return bool(np.isfinite(np.frombuffer(vector, "<f4")).all())


def _is_table(words: str) -> bool:
    try:
        return isinstance(json.loads(words), dict)
    except (ValueError, RecursionError):
        return False


def _is_picture(rows: Any, pixels: Any) -> bool:
    return type(rows) is int and type(pixels) is bytes and rows > 0 and len(pixels) > 0 and len(pixels) % rows == 0


def _grey(patch: NDArray[Any]) -> tuple[int, bytes]:
    """Rows and 256 grey levels from the patch's least to its greatest."""
    picture = np.asarray(patch, dtype=np.float64)
    if picture.ndim != 2 or picture.size == 0 or not np.isfinite(picture).all():
        raise InputError(f"a patch is a picture (rows, cols) of finite numbers; got the shape {picture.shape}.")
    if np.asarray(patch).dtype == np.uint8:
        return len(picture), np.asarray(patch).tobytes()
    low, span = picture.min(), np.ptp(picture)
    return len(picture), np.round(255 * (picture - low) / (span if span > 0 else 1.0)).astype(np.uint8).tobytes()
