"""Masks over a frame, prepared once for every way in which frames are kept.

Masks of whole numbers are packed side by side into the fields of 64-bit words, wide enough that no frame can carry
from one field into the next; then one addition an electron serves several masks at once, and the sums are exact.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError


def checked(masks: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """``masks`` as (k, rows, columns) of real numbers that fit frames of ``shape``."""
    masks = np.asarray(masks)
    if masks.dtype == np.bool_:
        masks = masks.astype(np.uint8)
    if masks.ndim != 3 or masks.shape[1:] != tuple(shape) or masks.dtype.kind not in "uif":
        raise InputError(
            f"masks are real numbers of shape (k, {shape[0]}, {shape[1]}); got {masks.dtype} {masks.shape}."
        )
    return masks


def ramps(shape: tuple[int, int]) -> NDArray[np.int64]:
    """(3, rows, columns): ones, the row number, the column number; their sums are a frame's moments."""
    rows, columns = np.indices(shape)
    return np.stack([np.ones(shape, np.int64), rows, columns])


def ramp_numbers(masks: NDArray[Any]) -> list[int]:
    """For each of ``masks`` (k, rows, columns) which of :func:`ramps` it is: 0, 1, 2, or -1 for none of them."""
    found = _ramps((masks.shape[1], masks.shape[2]))
    corner = found[:, -1, -1].tolist()  # most masks differ there already
    return [
        next((i for i in range(3) if mask[-1, -1] == corner[i] and np.array_equal(mask, found[i])), -1)
        for mask in masks
    ]


@functools.lru_cache(maxsize=8)
def _ramps(shape: tuple[int, int]) -> NDArray[np.int64]:
    found = ramps(shape)
    found.flags.writeable = False
    return found


def rings(shape: tuple[int, int], centre_px: tuple[float, float], edges_px: NDArray[Any]) -> NDArray[np.int32]:
    """(rows, columns): the number i of the ring ``edges_px[i] <= r < edges_px[i + 1]`` that each pixel's middle is in,
    -1 outside, with r the distance [px] from ``centre_px`` (row, column).

    >>> rings((1, 4), (0.0, 0.0), np.array([0, 1, 3]))
    array([[ 0,  1,  1, -1]], dtype=int32)
    """
    edges = np.asarray(edges_px, np.float64)
    if edges.ndim != 1 or len(edges) < 2 or not np.all(np.diff(edges) > 0):
        raise InputError("the edges of rings are at least two growing radii [px].")
    rows, columns = np.indices(shape)
    ring = np.searchsorted(edges, np.hypot(rows - centre_px[0], columns - centre_px[1]), side="right") - 1
    ring[ring == len(edges) - 1] = -1
    return ring.astype(np.int32)


def labelled(labels: NDArray[Any], count: int, shape: tuple[int, int]) -> NDArray[np.int32]:
    """Flat ``labels`` (rows, columns) of 0 .. ``count`` - 1, where everything else became ``count``."""
    labels = np.asarray(labels)
    if labels.shape != tuple(shape) or labels.dtype.kind not in "iu" or count < 1:
        raise InputError(f"labels are whole numbers of shape {tuple(shape)}; got {labels.dtype} {labels.shape}.")
    outside = (labels < 0) | (labels >= count)
    return np.where(outside, count, labels).astype(np.int32).ravel()


@dataclass(frozen=True)
class Packed:
    """Masks in words: ``table`` (pixels,) of uint64, or of uint8 where that holds it, and,
    for each mask in it, (number, shift, bits, lowest)."""

    table: NDArray[np.uint64] | NDArray[np.uint8]
    fields: tuple[tuple[int, int, int, int], ...]

    def unpack(self, sums: NDArray[np.uint64], electrons: NDArray[np.int64], out: NDArray[np.float64]) -> None:
        """Write the sums of this word's masks (frames,) into their rows of ``out`` (k, frames)."""
        for number, shift, bits, lowest in self.fields:
            part = sums if len(self.fields) == 1 else (sums >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
            out[number] = part if lowest == 0 else part.astype(np.int64) + lowest * electrons


def pack(masks: NDArray[Any], most: int) -> list[Packed] | None:
    """``masks`` (k, rows, columns) as words for frames of at most ``most`` electrons; None where a mask is not of
    whole numbers or one of them needs more than 63 bits."""
    flat = masks.reshape(len(masks), masks.shape[1] * masks.shape[2])
    if flat.dtype.kind == "f":
        if not (np.all(np.isfinite(flat)) and np.all(flat == np.rint(flat)) and np.all(np.abs(flat) < 2.0**53)):
            return None
    elif flat.dtype == np.uint64 and flat.size and flat.max() >= 2**63:
        return None
    whole = flat.astype(np.int64)
    packs: list[Packed] = []
    fields: list[tuple[int, int, int, int]] = []
    table, shift = np.zeros(whole.shape[1], np.uint64), 0
    for number, mask in enumerate(whole):
        lowest = min(int(mask.min()), 0)
        bits = max(1, ((int(mask.max()) - lowest) * max(most, 1)).bit_length())
        if bits > 52:
            return None
        if shift + bits > 64:
            packs.append(_packed(table, fields))
            table, fields, shift = np.zeros(whole.shape[1], np.uint64), [], 0
        table |= (mask - lowest).astype(np.uint64) << np.uint64(shift)
        fields.append((number, shift, bits, lowest))
        shift += bits
    packs.append(_packed(table, fields))
    return packs


def _packed(table: NDArray[np.uint64], fields: list[tuple[int, int, int, int]]) -> Packed:
    small = bool(table.max() < 256)  # eight times as much of it stays in the fastest cache
    return Packed(table.astype(np.uint8) if small else table, tuple(fields))
