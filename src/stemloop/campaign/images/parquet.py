"""Tables as Apache Parquet: one row group a call, columns of numbers, ZSTD pages; no other package is needed.

The format is that of https://parquet.apache.org/docs/file-format/ (version 1, PLAIN encoding, every value required);
its metadata are Thrift's compact protocol. Readers: pyarrow, pandas, polars, DuckDB ...
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
import zstandard
from numpy.typing import NDArray

from stemloop.core.errors import InputError

_MAGIC = b"PAR1"
_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12
_PLAIN, _RLE, _ZSTD, _REQUIRED, _DATA_PAGE = 0, 3, 6, 0, 0
#: Type of the format for a kind of numbers, and the numpy type that is its plain encoding.
_TYPES = {"i": (2, "<i8"), "u": (2, "<i8"), "f": (5, "<f8")}
_BOOLEAN = 0


class Table:
    """A table that is written row group by row group into a binary file.

    names : of the columns, in order, with their numpy types (boolean, whole or real numbers).
    """

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        if dtype.names is None or any(dtype[name].kind not in "biuf" for name in dtype.names):
            raise InputError(f"a parquet table has named columns of numbers; got {dtype}.")
        self._file, self._dtype, self._at = file, dtype, 0
        self._groups: list[tuple[list[tuple[int, int, int]], int]] = []
        self._put(_MAGIC)

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._at += len(data)

    def add(self, rows: NDArray[Any]) -> None:
        """Append rows (n,) of the table's type as one row group."""
        if not len(rows):
            return
        chunks = []
        for name in self._dtype.names or ():
            plain = _plain(rows[name])
            packed = zstandard.ZstdCompressor(level=3).compress(plain)
            page = _struct(
                (1, _I32, _DATA_PAGE),
                (2, _I32, len(plain)),
                (3, _I32, len(packed)),
                (5, _STRUCT, _struct((1, _I32, len(rows)), (2, _I32, _PLAIN), (3, _I32, _RLE), (4, _I32, _RLE))),
            )
            chunks.append((self._at, len(page) + len(plain), len(page) + len(packed)))
            self._put(page + packed)
        self._groups.append((chunks, len(rows)))

    def close(self) -> None:
        """Write the table's description; nothing can be added after it."""
        leaves = [
            _struct((1, _I32, _type(self._dtype[name])), (3, _I32, _REQUIRED), (4, _BINARY, name.encode()))
            for name in self._dtype.names or ()
        ]
        root = _struct((4, _BINARY, b"schema"), (5, _I32, len(leaves)))
        footer = _struct(
            (1, _I32, 1),
            (2, _LIST, _list(_STRUCT, [root, *leaves])),
            (3, _I64, sum(rows for _, rows in self._groups)),
            (4, _LIST, _list(_STRUCT, [self._group(chunks, rows) for chunks, rows in self._groups])),
            (6, _BINARY, b"stemloop"),
        )
        self._put(footer + struct.pack("<I", len(footer)) + _MAGIC)

    def _group(self, chunks: list[tuple[int, int, int]], rows: int) -> bytes:
        described = []
        for name, (at, plain, packed) in zip(self._dtype.names or (), chunks, strict=True):
            meta = _struct(
                (1, _I32, _type(self._dtype[name])),
                (2, _LIST, _list(_I32, [_zigzag(_PLAIN), _zigzag(_RLE)])),
                (3, _LIST, _list(_BINARY, [_varint(len(name.encode())) + name.encode()])),
                (4, _I32, _ZSTD),
                (5, _I64, rows),
                (6, _I64, plain),
                (7, _I64, packed),
                (9, _I64, at),
            )
            described.append(_struct((2, _I64, at), (3, _STRUCT, meta)))
        whole = sum(plain for _, plain, _ in chunks)
        return _struct((1, _LIST, _list(_STRUCT, described)), (2, _I64, whole), (3, _I64, rows))


def _type(dtype: np.dtype[Any]) -> int:
    return _BOOLEAN if dtype.kind == "b" else _TYPES[dtype.kind][0]


def _plain(values: NDArray[Any]) -> bytes:
    if values.dtype.kind == "b":
        return np.packbits(values, bitorder="little").tobytes()
    return values.astype(_TYPES[values.dtype.kind][1]).tobytes()


# ------------------------------------------------------------------------------------ Thrift's compact protocol


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _zigzag(value: int) -> bytes:
    return _varint(value << 1 if value >= 0 else (-value << 1) - 1)


def _struct(*fields: tuple[int, int, Any]) -> bytes:
    """Fields (number, type, value) in rising order; strings, lists and structures come encoded."""
    out, last = bytearray(), 0
    for number, kind, value in fields:
        out.append((number - last) << 4 | kind)
        last = number
        if kind in (_I32, _I64):
            out += _zigzag(value)
        elif kind == _BINARY:
            out += _varint(len(value)) + value
        else:
            out += value
    return bytes([*out, 0])


def _list(kind: int, items: Iterable[bytes]) -> bytes:
    encoded = list(items)
    head = bytes([len(encoded) << 4 | kind]) if len(encoded) < 15 else bytes([0xF0 | kind]) + _varint(len(encoded))
    return head + b"".join(encoded)
