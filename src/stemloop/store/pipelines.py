"""How a chunk of an HDF5 dataset is packed: a codec's name stands for a row of HDF5 filters.

``portable`` codecs need only what every HDF5 library has; the others need the plugins of ``hdf5plugin``. A chunk of
any of them can be copied between a landing log and a file without being unpacked.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from stemloop.core.chunk import SHUFFLE_DEFLATE, deflate, inflate
from stemloop.core.errors import IntegrityError, MissingExtra

RAW = "raw"
PORTABLE = frozenset({RAW, SHUFFLE_DEFLATE})
#: Filters of hdf5plugin, by the name of the codec: class and arguments.
PLUGINS: dict[str, tuple[str, dict[str, Any]]] = {
    "hdf5-bitshuffle-lz4": ("Bitshuffle", {"cname": "lz4"}),
    "hdf5-bitshuffle-zstd": ("Bitshuffle", {"cname": "zstd"}),
}
KNOWN = PORTABLE | frozenset(PLUGINS)


def options(codec: str) -> dict[str, Any]:
    """What ``h5py.Group.create_dataset`` needs for ``codec``."""
    if codec == RAW:
        return {}
    if codec == SHUFFLE_DEFLATE:
        return {"shuffle": True, "compression": "gzip", "compression_opts": 1}
    try:
        import hdf5plugin
    except ImportError:
        raise MissingExtra(
            f"chunks of the codec {codec!r} need hdf5plugin; install it with: pip install hdf5plugin."
        ) from None
    name, arguments = PLUGINS[codec]
    return dict(getattr(hdf5plugin, name)(**arguments))


def pack(frames: NDArray[Any], rows: int, codec: str) -> bytes:
    """A chunk of ``rows`` frames that begins with ``frames`` (n, ...) and ends with zeros."""
    if codec == SHUFFLE_DEFLATE:
        return deflate(frames, rows)
    whole = np.zeros((rows, *frames.shape[1:]), frames.dtype)
    whole[: len(frames)] = frames
    if codec == RAW:
        return whole.tobytes()
    with _in_memory(whole.shape, whole.dtype, codec) as data:
        data[...] = whole
        data.file.flush()
        return bytes(data.id.read_direct_chunk((0,) * whole.ndim)[1])


def unpack(chunk: bytes, shape: tuple[int, ...], dtype: np.dtype[Any], codec: str) -> NDArray[Any]:
    """The frames of ``shape`` (n, ...) in ``chunk``; an IntegrityError if it holds anything else."""
    try:
        if codec == SHUFFLE_DEFLATE:
            return inflate(chunk, dtype, shape)
        if codec == RAW:
            if len(chunk) != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{len(chunk)} bytes are not {shape} of {dtype}")
            return np.frombuffer(chunk, dtype).reshape(shape)
        with _in_memory(shape, dtype, codec) as data:
            data.id.write_direct_chunk((0,) * len(shape), chunk)
            return np.asarray(data[...])
    except (ValueError, OSError) as error:
        raise IntegrityError(f"a chunk cannot be unpacked: {error}.") from None


class _in_memory:
    """A dataset of one chunk in an HDF5 file that exists in memory alone: HDF5 as a packer."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], codec: str) -> None:
        self._file = h5py.File(f"chunk-{threading.get_ident()}", "w", driver="core", backing_store=False)
        self._data = self._file.create_dataset("c", shape, dtype, chunks=shape, **options(codec))

    def __enter__(self) -> Any:
        return self._data

    def __exit__(self, *_: object) -> None:
        self._file.close()
