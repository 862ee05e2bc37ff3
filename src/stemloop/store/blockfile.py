"""NanoMEGAS block files (``.blo``): scanned spot patterns of one byte a pixel.

A header, then one record a place of the scan: a word 0x55AA, the number of the frame, and its pixels. Read as it lies
on the disk, without a copy.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

from stemloop.core.errors import UnreadableFile
from stemloop.core.signal import Axis, Signal

_HEADER = struct.Struct("<6sHIIIHHHHHddIHI")
_MARK = 0x55AA


def read(path: str | os.PathLike[str]) -> Signal:
    """The scan in a block file: (scan_y, scan_x, det_y, det_x) of ``uint8``, mapped.

    The step of the scan is in m (stored as nm), the detector's pixel in m (stored as 100 pixels a cm); with
    ``camera_length_m`` and ``beam_energy_eV`` in the metadata an angle follows. Row 0 is the first that is stored.

    Errors: :class:`UnreadableFile` if it is no block file, or was cut short.
    """
    name = Path(path).name
    with open(path, "rb") as file:
        raw = file.read(_HEADER.size)
    if len(raw) < _HEADER.size or not raw.startswith(b"IMGBLO"):
        raise UnreadableFile(f"{name} is no block file: it does not begin with IMGBLO.")
    _, _, _, start, _, side, _, columns, rows, _, step_x, step_y, volts, pixels, length = _HEADER.unpack(raw)
    record = np.dtype([("mark", "<u2"), ("number", "<u4"), ("frame", "u1", (side, side))])
    need = start + record.itemsize * rows * columns
    if not (side and rows and columns) or os.path.getsize(path) < need:
        raise UnreadableFile(f"{name} was cut short: {rows} x {columns} frames of {side} x {side} need {need} bytes.")
    records = np.memmap(path, record, "r", offset=start, shape=(rows, columns))
    if records["mark"][0, 0] != _MARK or records["mark"][-1, -1] != _MARK:
        raise UnreadableFile(f"{name} is damaged: a frame does not begin where its header says.")
    pixel, unit = (1.0 / pixels, "m") if pixels else (1.0, "px")  # 100 px/cm = 1e4 px/m, stored times 1 / 1e4
    axes = (
        Axis("scan_y", rows, step_y * 1e-9 or 1.0, 0.0, "m" if step_y else "px"),
        Axis("scan_x", columns, step_x * 1e-9 or 1.0, 0.0, "m" if step_x else "px"),
        Axis("det_y", side, pixel, 0.0, unit),
        Axis("det_x", side, pixel, 0.0, unit),
    )
    metadata = {"title": Path(path).stem, "reader": "Blockfile", "file": name}
    known = {"beam_energy_eV": float(volts), "camera_length_m": length * 1e-4}
    return Signal(records["frame"], axes, {**metadata, **{key: value for key, value in known.items() if value > 0}})
