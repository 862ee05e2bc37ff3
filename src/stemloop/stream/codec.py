"""Blocks of frames as bytes: one header, one checksum, several codecs, chosen by measured size.

An encoded block is ``SLB1``, the CRC32C of everything that follows, the length of a msgpack header, the header and
the codec's sections. Every changed byte is found. Each codec of :data:`CODECS` is without loss; a single frame is read
without decoding the others (``intensity``: the others of its run; ``bitplanes``, ``bitshuffle``: of its chunk).

=============== ================================================= ================================
name            kept as                                           good for
=============== ================================================= ================================
events          raw pixel numbers                                 sparse frames; nothing to decode
gaps            one byte an electron (:mod:`.gaps`)               sparse; computed on as it is
gaps-zstd       the same, through Zstandard                       sparse, at rest
intensity       rescaled time (:mod:`.entropy`), near the entropy sparse, at rest, on the wire
bitplanes       the bits of the counts apart, through Zstandard   some electrons a pixel
bitshuffle-lz4  blosc2's bit shuffle and LZ4                      many electrons, fast
bitshuffle-zstd blosc2's bit shuffle and Zstandard                many electrons, small
=============== ================================================= ================================
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import google_crc32c
import msgpack
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError, IntegrityError
from stemloop.core.protocols import Block
from stemloop.stream import entropy, intensity
from stemloop.stream.dense import DenseBlock, as_counts
from stemloop.stream.events import EventBlock, index_dtype
from stemloop.stream.gaps import GapBlock

MAGIC = b"SLB1"
_LEAD = struct.Struct("<4sII")
#: Frames of a block, and pixels of a frame, at most: what a made-up header may ask memory for.
MOST_FRAMES = MOST_PIXELS = 1 << 26
#: Bytes of plain frames that the dense codecs compress at a time.
CHUNK_BYTES = 1 << 20
#: Of how the codec ``intensity`` writes.
_INTENSITY_VERSION = 2
#: Frames whose size is measured to choose a codec.
SAMPLE_FRAMES = 256


class Parts(NamedTuple):
    """An encoded block, checked: its header's fields and its sections."""

    fields: dict[str, Any]
    sections: list[memoryview]

    def array(self, number: int, dtype: Any) -> NDArray[Any]:
        try:
            return np.frombuffer(self.sections[number], np.dtype(dtype).newbyteorder("<"))
        except (ValueError, IndexError, TypeError):
            raise _damaged("a section of it has a wrong length") from None

    @property
    def frames(self) -> int:
        return int(self.fields["frames"])

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.fields["shape"][0]), int(self.fields["shape"][1])

    @property
    def pixels(self) -> int:
        return self.shape[0] * self.shape[1]


def _damaged(what: str) -> IntegrityError:
    return IntegrityError(f"an encoded block is damaged: {what}; read it again from where it came from.")


def _join(codec: str, block: Block, sections: list[Any], **fields: Any) -> bytes:
    if block.frames > MOST_FRAMES or math.prod(block.shape) > MOST_PIXELS:
        raise InputError(f"a block has at most {MOST_FRAMES} frames of {MOST_PIXELS} pixels; encode it in parts.")
    pieces = [
        np.ascontiguousarray(s).data.cast("B") if isinstance(s, np.ndarray) and s.size else bytes(s) for s in sections
    ]
    fields |= {"codec": codec, "frames": block.frames, "shape": list(block.shape), "sizes": [len(p) for p in pieces]}
    header = msgpack.packb(fields)
    body = b"".join([header, *pieces])
    size = struct.pack("<I", len(header))
    return MAGIC + struct.pack("<I", google_crc32c.extend(google_crc32c.value(size), body)) + size + body


def parts(data: bytes | memoryview) -> Parts:
    """Check an encoded block and take it apart; damage is an :class:`~stemloop.core.errors.IntegrityError`."""
    view = memoryview(data).cast("B")
    if len(view) < _LEAD.size:
        raise _damaged("it is cut short")
    magic, checksum, length = _LEAD.unpack_from(view)
    if magic != MAGIC:
        raise InputError(f"an encoded block begins with {MAGIC!r}; got {magic!r}.")
    if google_crc32c.value(bytes(view[8:])) != checksum:
        raise _damaged("its CRC32C differs")
    start = _LEAD.size + length
    try:
        fields = msgpack.unpackb(view[_LEAD.size : start])
        sizes, shape = [int(n) for n in fields["sizes"]], [int(n) for n in fields["shape"]]
        frames, codec = int(fields["frames"]), str(fields["codec"])
    except Exception as error:
        raise _damaged(f"its header cannot be read ({error})") from None
    if start + sum(sizes) != len(view) or min([*sizes, frames]) < 0 or len(shape) != 2 or min(shape) < 1 or not codec:
        raise _damaged("its header does not fit its length")
    if frames > MOST_FRAMES or math.prod(shape) > MOST_PIXELS:
        raise _damaged(f"it tells of {frames} frames of {shape[0]} x {shape[1]} pixels")
    sections = []
    for size in sizes:
        sections.append(view[start : start + size])
        start += size
    return Parts(fields, sections)


class BlockCodec:
    """A :class:`~stemloop.core.protocols.Codec` made of two functions, and one that reads a single frame."""

    loss = ""

    def __init__(
        self,
        name: str,
        write: Callable[[Block], tuple[list[Any], dict[str, Any]]],
        read: Callable[[Parts], Block],
        read_part: Callable[[Parts, int], tuple[Block, int]],
    ) -> None:
        self.name = name
        self._write, self._read, self._read_part = write, read, read_part

    def encode(self, block: Block) -> bytes:
        sections, fields = self._write(block)
        return _join(self.name, block, sections, **fields)

    def decode(self, data: bytes) -> Block:
        found = parts(data)
        if found.fields["codec"] != self.name:
            raise InputError(
                f"this block was written by {found.fields['codec']!r}, not {self.name!r}; use codec.decode."
            )
        return self.read(found)

    def read(self, found: Parts) -> Block:
        """The block of checked parts."""
        return _guarded(self._read, found)

    def frame(self, found: Parts, index: int) -> NDArray[Any]:
        """One frame (rows, columns) of checked parts, without decoding more than its neighbours."""
        if not -found.frames <= index < found.frames:
            raise InputError(f"frame {index} is not among the {found.frames} of this block.")
        part, at = _guarded(self._read_part, found, index % found.frames)
        return part.frame(at)


def _guarded(read: Callable[..., Any], found: Parts, *words: Any) -> Any:
    try:
        return read(found, *words)
    except (IntegrityError, InputError):
        raise
    except Exception as error:  # a header that was made up, with a right checksum
        raise _damaged(f"{type(error).__name__}: {error}") from None


# ---------------------------------------------------------------------------------------- small lists of numbers


def _small(numbers: NDArray[Any]) -> tuple[NDArray[Any], str]:
    """``numbers`` (>= 0) in the smallest unsigned type, and its name."""
    dtype = np.min_scalar_type(int(numbers.max(initial=0)))
    return numbers.astype(dtype.newbyteorder("<")), dtype.str


def _ends(found: Parts, number: int, dtype: str, count: int) -> NDArray[np.int64]:
    sizes = found.array(number, dtype)
    if len(sizes) != count:
        raise _damaged("its list of lengths is wrong")
    return _summed(sizes)


def _summed(sizes: NDArray[Any]) -> NDArray[np.int64]:
    """Where each of ``sizes`` begins, and the end; a made-up list whose sums wrap around is damage."""
    whole = sizes.astype(np.int64)
    if np.any(whole < 0) or np.any(whole > 2**62 // max(len(whole), 1)):
        raise _damaged("its list of lengths is wrong")
    return np.concatenate([[0], np.cumsum(whole)])


# --------------------------------------------------------------------------------------------------- raw events


def _write_events(block: Block) -> tuple[list[Any], dict[str, Any]]:
    events = EventBlock.of(block)
    sizes, kind = _small(np.diff(events.indptr))
    if events.counts is None:
        return [sizes, events.index], {"sizes_type": kind}
    counts, count_kind = _small(events.counts)
    return [sizes, events.index, counts], {"sizes_type": kind, "counts_type": count_kind}


def _read_events(found: Parts) -> EventBlock:
    indptr = _ends(found, 0, found.fields["sizes_type"], found.frames)
    counts = found.array(2, found.fields["counts_type"]) if "counts_type" in found.fields else None
    return EventBlock(indptr, found.array(1, index_dtype(found.pixels)), found.shape, counts)


def _read_event_frame(found: Parts, index: int) -> tuple[Block, int]:
    ends = _ends(found, 0, found.fields["sizes_type"], found.frames)
    part = slice(int(ends[index]), int(ends[index + 1]))
    counts = found.array(2, found.fields["counts_type"])[part] if "counts_type" in found.fields else None
    one = np.array([0, part.stop - part.start])
    return EventBlock(one, found.array(1, index_dtype(found.pixels))[part], found.shape, counts), 0


# --------------------------------------------------------------------------------------------------------- gaps


def _write_gaps(block: Block) -> tuple[list[Any], dict[str, Any]]:
    gaps = GapBlock.of(block)
    sizes, kind = _small(np.diff(gaps.ends))
    return [sizes, gaps.gaps], {"sizes_type": kind}


def _read_gaps(found: Parts) -> GapBlock:
    return GapBlock(_ends(found, 0, found.fields["sizes_type"], found.frames), found.array(1, "u1"), found.shape)


def _read_gap_frame(found: Parts, index: int) -> tuple[Block, int]:
    ends = _ends(found, 0, found.fields["sizes_type"], found.frames)
    gaps = found.array(1, "u1")[int(ends[index]) : int(ends[index + 1])]
    return GapBlock(np.array([0, len(gaps)]), gaps, found.shape), 0


def _write_gaps_zstd(block: Block) -> tuple[list[Any], dict[str, Any]]:
    gaps = GapBlock.of(block)
    sizes, kind = _small(np.diff(gaps.ends))
    per_chunk = max(1, min(gaps.frames, round((1 << 17) * gaps.frames / max(len(gaps.gaps), 1))))
    edges = entropy.run_edges(gaps.frames, per_chunk)
    cut = gaps.ends[edges]
    chunks = [_zstd().compress(gaps.gaps[a:b].data) for a, b in pairwise(cut)]
    lengths, length_kind = _small(np.array([len(c) for c in chunks], np.int64))
    fields = {"sizes_type": kind, "lengths_type": length_kind, "per_chunk": per_chunk}
    return [_zstd().compress(sizes.tobytes()), lengths, b"".join(chunks)], fields


def _gaps_zstd_chunks(found: Parts, first: int, stop: int) -> GapBlock:
    """The frames of chunks ``first`` .. ``stop``."""
    edges = entropy.run_edges(found.frames, int(found.fields["per_chunk"]))
    kind = np.dtype(found.fields["sizes_type"])
    ends = _summed(np.frombuffer(_unzstd(found.sections[0], found.frames * kind.itemsize), kind))
    places = _ends(found, 1, found.fields["lengths_type"], len(edges) - 1)
    pieces = [
        _unzstd(found.sections[2][places[n] : places[n + 1]], int(ends[edges[n + 1]] - ends[edges[n]]))
        for n in range(first, stop)
    ]
    own = ends[edges[first] : edges[stop] + 1]
    return GapBlock(own - own[0], np.frombuffer(b"".join(pieces), np.uint8), found.shape)


def _read_gaps_zstd(found: Parts) -> GapBlock:
    return _gaps_zstd_chunks(found, 0, len(entropy.run_edges(found.frames, int(found.fields["per_chunk"]))) - 1)


def _read_gaps_zstd_frame(found: Parts, index: int) -> tuple[Block, int]:
    chunk, at = divmod(index, int(found.fields["per_chunk"]))
    return _gaps_zstd_chunks(found, chunk, chunk + 1), at


# ---------------------------------------------------------------------------------------------------- intensity


def _write_intensity(block: Block) -> tuple[list[Any], dict[str, Any]]:
    events = EventBlock.of(block)
    if int(events.electrons().sum()) > 4 * events.frames * events.shape[0] * events.shape[1]:
        raise InputError(
            "the intensity codec is for sparse frames, of less than 4 electrons a pixel; choose another one."
        )
    events = events.single()
    models = intensity.fit(events)
    per_run = entropy.run_frames(events)
    data, ends = entropy.encode(events, models, per_run)
    lengths, length_kind = _small(np.diff(ends))
    sizes, kind = _small(np.diff(events.indptr[entropy.run_edges(events.frames, per_run)]))
    fields = {
        "sizes_type": kind, "lengths_type": length_kind, "per_run": per_run, "version": _INTENSITY_VERSION,
        "groups": len(models.groups), "models": models.number, "gap": models.gap,
    }  # fmt: skip
    labels = _zstd().compress(models.labels.data) if models.number > 1 else b""
    return [_zstd().compress(models.groups.data), labels, lengths, sizes, data], fields


def _intensity_runs(found: Parts, first: int, stop: int) -> EventBlock:
    """The frames of runs ``first`` .. ``stop``."""
    if found.fields.get("version") != _INTENSITY_VERSION:
        raise InputError(
            f"this block was written by another version of the codec 'intensity' than {_INTENSITY_VERSION}; "
            "read it with the stemloop that wrote it."
        )
    per_run, count, gap = (int(found.fields[name]) for name in ("per_run", "models", "gap"))
    edges = entropy.run_edges(found.frames, per_run)
    groups = np.frombuffer(_unzstd(found.sections[0], int(found.fields["groups"])), np.uint8)
    labels = np.zeros(found.frames, np.uint8)
    if count > 1:
        labels = np.frombuffer(_unzstd(found.sections[1], found.frames), np.uint8)
    ends = _ends(found, 2, found.fields["lengths_type"], len(edges) - 1)
    place = _ends(found, 3, found.fields["sizes_type"], len(edges) - 1)
    data = found.array(4, "u1")
    if (
        ends[-1] + entropy.PADDING != len(data)
        or place[-1] > 4 * found.frames * found.pixels
        or not 1 <= count <= intensity.MOST_MODELS
        or not 0 <= gap <= entropy.MOST_GAP
        or len(groups) > count * found.pixels
    ):
        raise _damaged("its runs do not fit its bytes")
    own = ends[first : stop + 1]
    indptr, index = entropy.decode(
        data[own[0] : own[-1] + entropy.PADDING],
        own - own[0],
        np.diff(place[first : stop + 1]),
        intensity.Models(groups, labels[edges[first] : edges[stop]], count, gap),
        found.pixels,
        per_run,
    )
    return EventBlock(indptr, index, found.shape, trusted=True)


def _read_intensity(found: Parts) -> EventBlock:
    return _intensity_runs(found, 0, len(entropy.run_edges(found.frames, int(found.fields["per_run"]))) - 1)


def _read_intensity_frame(found: Parts, index: int) -> tuple[Block, int]:
    run, at = divmod(index, int(found.fields["per_run"]))
    return _intensity_runs(found, run, run + 1), at


# ------------------------------------------------------------------------------------------------- dense frames


def _write_chunks(frames: NDArray[Any], compress: Callable[[NDArray[Any]], bytes]) -> tuple[list[Any], dict[str, Any]]:
    per_chunk = max(1, min(len(frames), CHUNK_BYTES // max(frames[:1].nbytes, 1)))
    edges = entropy.run_edges(len(frames), per_chunk)
    chunks = [compress(frames[a:b]) for a, b in pairwise(edges)]
    lengths, kind = _small(np.array([len(c) for c in chunks], np.int64))
    return [lengths, b"".join(chunks)], {"lengths_type": kind, "per_chunk": per_chunk, "frames_type": frames.dtype.str}


def _read_chunks(
    found: Parts, expand: Callable[[memoryview, tuple[int, int, int], Any], NDArray[Any]], chunks: range | None = None
) -> DenseBlock:
    dtype = np.dtype(found.fields["frames_type"])
    if dtype not in (np.uint8, np.uint16, np.uint32):
        raise _damaged(f"frames are not kept as {dtype}")
    edges = entropy.run_edges(found.frames, int(found.fields["per_chunk"]))
    places = _ends(found, 0, found.fields["lengths_type"], len(edges) - 1)
    pieces = [
        expand(found.sections[1][places[n] : places[n + 1]], (int(edges[n + 1] - edges[n]), *found.shape), dtype)
        for n in (range(len(edges) - 1) if chunks is None else chunks)
    ]
    return DenseBlock(np.concatenate(pieces) if pieces else np.empty((0, *found.shape), dtype))


def _bitplanes(frames: NDArray[Any]) -> bytes:
    flat = frames.reshape(-1)
    planes = int(flat.max(initial=0)).bit_length()
    one = flat.dtype.type(1)
    packed = [np.packbits(((flat >> flat.dtype.type(bit)) & one).astype(np.uint8)) for bit in range(planes)]
    compressed: bytes = _zstd().compress(b"".join(p.tobytes() for p in packed))
    return bytes([planes]) + compressed


def _unbitplanes(data: memoryview, shape: tuple[int, int, int], dtype: Any) -> NDArray[Any]:
    pixels = shape[0] * shape[1] * shape[2]
    width = -(-pixels // 8)
    packed = np.frombuffer(_unzstd(data[1:], data[0] * width), np.uint8).reshape(data[0], width)
    out = np.zeros(pixels, dtype)
    for bit, plane in enumerate(packed):
        out |= np.unpackbits(plane, count=pixels).astype(dtype) << dtype.type(bit)
    return out.reshape(shape)


def _bitshuffle(kind: str, level: int, frames: NDArray[Any]) -> bytes:
    import blosc2

    codec = {"lz4": blosc2.Codec.LZ4, "zstd": blosc2.Codec.ZSTD}[kind]
    filters = [blosc2.Filter.BITSHUFFLE]
    data: bytes = blosc2.compress2(
        frames.reshape(-1), codec=codec, clevel=level, filters=filters, filters_meta=[0], nthreads=1,
        typesize=frames.dtype.itemsize,
    )  # fmt: skip
    return data


def _unbitshuffle(data: memoryview, shape: tuple[int, int, int], dtype: Any) -> NDArray[Any]:
    import blosc2

    plain = blosc2.decompress2(bytes(data), nthreads=1)
    if len(plain) != shape[0] * shape[1] * shape[2] * dtype.itemsize:
        raise _damaged("a chunk of it has a wrong length")
    return np.frombuffer(plain, dtype).reshape(shape)


def _dense_codec(
    name: str, compress: Callable[[NDArray[Any]], bytes], expand: Callable[..., NDArray[Any]]
) -> BlockCodec:
    def write(block: Block) -> tuple[list[Any], dict[str, Any]]:
        return _write_chunks(as_counts(block.dense()), compress)

    def read(found: Parts) -> Block:
        return _read_chunks(found, expand)

    def read_part(found: Parts, index: int) -> tuple[Block, int]:
        chunk, at = divmod(index, int(found.fields["per_chunk"]))
        return _read_chunks(found, expand, range(chunk, chunk + 1)), at

    return BlockCodec(name, write, read, read_part)


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdCompressor(level=3)


def _unzstd(data: Any, size: int) -> bytes:
    import zstandard

    plain: bytes = zstandard.ZstdDecompressor().decompress(data, max_output_size=max(size, 1))
    if len(plain) != size:
        raise _damaged("a section of it has a wrong length")
    return plain


#: All codecs by name.
CODECS: dict[str, BlockCodec] = {
    codec.name: codec
    for codec in (
        BlockCodec("events", _write_events, _read_events, _read_event_frame),
        BlockCodec("gaps", _write_gaps, _read_gaps, _read_gap_frame),
        BlockCodec("gaps-zstd", _write_gaps_zstd, _read_gaps_zstd, _read_gaps_zstd_frame),
        BlockCodec("intensity", _write_intensity, _read_intensity, _read_intensity_frame),
        _dense_codec("bitplanes", _bitplanes, _unbitplanes),
        _dense_codec("bitshuffle-lz4", functools.partial(_bitshuffle, "lz4", 5), _unbitshuffle),
        _dense_codec("bitshuffle-zstd", functools.partial(_bitshuffle, "zstd", 5), _unbitshuffle),
    )
}
#: Above this many electrons a pixel no list of electrons is tried.
_MOST_ELECTRONS_A_PIXEL = 0.5


def choose(block: Block, names: tuple[str, ...] = tuple(CODECS)) -> str:
    """The codec among ``names`` that writes ``block`` in the fewest bytes, measured on frames from its middle."""
    middle = max(0, (block.frames - SAMPLE_FRAMES) // 2)
    sample = _cut(block, middle, min(block.frames, middle + SAMPLE_FRAMES))
    pixels = sample.shape[0] * sample.shape[1]
    if float(sample.moments()[:, 0].sum()) > _MOST_ELECTRONS_A_PIXEL * pixels * max(sample.frames, 1):
        names = tuple(name for name in names if name.startswith("bit")) or names
    return min(names, key=lambda name: _size(name, sample, block.frames))


def _cut(block: Block, first: int, stop: int) -> Block:
    if isinstance(block, (DenseBlock, EventBlock, GapBlock)):
        return block[first:stop]
    return DenseBlock(np.stack([block.frame(i) for i in range(first, stop)])) if stop > first else block


def _size(name: str, sample: Block, frames: int) -> float:
    """Bytes of the sample in its share of a block of ``frames`` frames, which has one model for all of them."""
    try:
        data = CODECS[name].encode(sample)
    except InputError:
        return float("inf")
    model = len(parts(data).sections[0]) if name == "intensity" else 0
    return len(data) - model * (1 - sample.frames / max(frames, 1))


def encode(block: Block, name: str | None = None) -> bytes:
    """``block`` as bytes by the codec ``name``, or by the one that :func:`choose` finds smallest.

    >>> decode(encode(DenseBlock(np.array([[[0, 1], [2, 0]]], np.uint8)))).frame(0)
    array([[0, 1],
           [2, 0]], dtype=uint8)
    """
    if name is not None and name not in CODECS:
        raise InputError(f"no codec is called {name!r}; there are {', '.join(CODECS)}.")
    try:
        return CODECS[name or choose(block)].encode(block)
    except InputError:
        if name is not None:
            raise
        return CODECS["bitshuffle-zstd"].encode(block)  # the sample was sparser than the rest


def decode(data: bytes | memoryview) -> Block:
    """The block that any codec wrote; gap-coded blocks stay gap-coded, and answer so."""
    found = parts(data)
    if found.fields["codec"] in ("sqrt", "binned"):
        from stemloop.stream import lossy

        return lossy.read(found)
    return _of(found).read(found)


def frame(data: bytes | memoryview, index: int) -> NDArray[Any]:
    """One frame (rows, columns) of an encoded block; to read many, keep :func:`parts` and use :func:`frame_of`."""
    return frame_of(parts(data), index)


def frame_of(found: Parts, index: int) -> NDArray[Any]:
    """One frame of the :func:`parts` of an encoded block."""
    return _of(found).frame(found, index)


def _of(found: Parts) -> BlockCodec:
    name = found.fields["codec"]
    if name not in CODECS:
        raise InputError(
            f"this block was written by the codec {name!r}, which is not known here; install a newer stemloop."
        )
    return CODECS[name]
