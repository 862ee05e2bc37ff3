"""The part of CBOR (RFC 8949) that detectors send: definite and indefinite items, tags by a function of the caller."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from stemloop.core.errors import InputError

_DEEPEST = 32
_END = object()


def loads(data: bytes, tag: Callable[[int, Any], Any]) -> Any:
    """The item in ``data``; ``tag(number, value)`` says what a tagged value is. Errors: InputError.

    >>> loads(bytes.fromhex("a26161016162820203"), lambda number, value: value)
    {'a': 1, 'b': [2, 3]}
    """
    try:
        item, at = _item(data, 0, tag, 0)
    except (IndexError, struct.error, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"a message is no CBOR: {error}.") from None
    if item is _END or at != len(data):
        raise InputError("a message is no CBOR: it ends too early or too late.")
    return item


def _item(data: bytes, at: int, tag: Callable[[int, Any], Any], depth: int) -> tuple[Any, int]:
    if depth > _DEEPEST:
        raise InputError("a message is nested too deeply.")
    kind, info = data[at] >> 5, data[at] & 31
    at += 1
    if kind == 7:
        return _simple(data, at, info)
    endless = info == 31
    number = 0
    if not endless:
        number, at = _number(data, at, info)
    if kind in {0, 1}:
        return (number if kind == 0 else -1 - number), at
    if kind in {2, 3}:
        piece, at = _string(data, at, tag, depth, None if endless else number)
        return (piece if kind == 2 else piece.decode()), at
    if kind in {4, 5}:
        flat, at = _items(data, at, tag, depth, None if endless else number * (kind - 3))
        return (flat if kind == 4 else dict(zip(flat[::2], flat[1::2], strict=True))), at
    value, at = _item(data, at, tag, depth + 1)
    return tag(number, value), at


def _string(data: bytes, at: int, tag: Callable[[int, Any], Any], depth: int, length: int | None) -> tuple[bytes, int]:
    if length is None:
        pieces, at = _items(data, at, tag, depth, None)
        return b"".join(one if isinstance(one, bytes) else one.encode() for one in pieces), at
    if at + length > len(data):
        raise InputError("a message is cut short.")
    return data[at : at + length], at + length


def _items(
    data: bytes, at: int, tag: Callable[[int, Any], Any], depth: int, count: int | None
) -> tuple[list[Any], int]:
    found: list[Any] = []
    while count is None or len(found) < count:
        item, at = _item(data, at, tag, depth + 1)
        if item is _END:
            if count is not None:
                raise InputError("a message ends too early.")
            break
        found.append(item)
    return found, at


def _number(data: bytes, at: int, info: int) -> tuple[int, int]:
    if info < 24:
        return info, at
    if info > 27:
        raise InputError("a message is no CBOR: a reserved length.")
    width = 1 << (info - 24)
    if at + width > len(data):
        raise InputError("a message is cut short.")
    return int.from_bytes(data[at : at + width], "big"), at + width


def _simple(data: bytes, at: int, info: int) -> tuple[Any, int]:
    if info == 31:
        return _END, at
    if info in (25, 26, 27):
        form = {25: ">e", 26: ">f", 27: ">d"}[info]
        return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    known = {20: False, 21: True, 22: None, 23: None}
    if info not in known:
        raise InputError("a message is no CBOR: an unknown simple value.")
    return known[info], at
