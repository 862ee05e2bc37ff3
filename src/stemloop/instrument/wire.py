"""Messages of the control channel: msgpack with numpy arrays, bounded and never trusting.

A message is a dictionary of plain values and arrays. An array travels as msgpack extension 1: a small msgpack header
``[dtype, shape]`` followed by the raw bytes in C order. :func:`decode` is the exact inverse of :func:`encode` up to
tuples, which come back as lists; bytes that are no such message raise an :class:`~stemloop.core.errors.InputError`.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

from stemloop.core import instruction as instructions
from stemloop.core.errors import InputError, StemloopError
from stemloop.core.instruction import Instruction
from stemloop.core.protocols import Camera, Exposure, InstrumentInfo

#: The largest message that is written or read [bytes].
MAX_BYTES = 640 * 2**20
#: The largest message that a client may send to a server [bytes]: a command is small.
MAX_COMMAND_BYTES = 2**20
#: The deepest nesting of a message that is read.
MAX_DEPTH = 16

_ARRAY = 1
_DTYPE = re.compile(r"[<>|][biufc](1|2|4|8|16)")
_MAX_DIMENSIONS = 8


def _pack_array(array: np.ndarray) -> msgpack.ExtType:
    if not _DTYPE.fullmatch(array.dtype.str):
        raise InputError(f"an array of type {array.dtype} cannot be sent; send numbers or booleans.")
    header = msgpack.packb([array.dtype.str, list(array.shape)])
    return msgpack.ExtType(_ARRAY, header + np.ascontiguousarray(array).tobytes())


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _pack_array(value)
    if isinstance(value, np.generic):
        return value.item()
    raise InputError(f"a {type(value).__name__} cannot be sent: {value!r:.80}.")


def _unpack_array(code: int, data: bytes) -> np.ndarray:
    if code != _ARRAY:
        raise InputError(f"the message has an extension of kind {code}; only arrays (kind {_ARRAY}) are known.")
    unpacker = msgpack.Unpacker(max_buffer_size=len(data), max_array_len=_MAX_DIMENSIONS, max_str_len=8)
    unpacker.feed(data[:128])
    header = unpacker.unpack()
    if not (isinstance(header, list) and len(header) == 2):
        raise InputError(f"the header of an array must be [dtype, shape]; got {header!r:.80}.")
    dtype, shape = header
    if not (isinstance(dtype, str) and _DTYPE.fullmatch(dtype)):
        raise InputError(f"an array's type must be a plain number such as '<u2'; got {dtype!r:.20}.")
    if not (isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)):
        raise InputError(f"an array's shape must be a list of whole numbers; got {shape!r:.80}.")
    offset = unpacker.tell()
    wanted = math.prod(shape) * np.dtype(dtype).itemsize
    if len(data) - offset != wanted:
        raise InputError(f"an array {dtype} {shape} needs {wanted} bytes; {len(data) - offset} came.")
    return np.frombuffer(data, dtype, offset=offset).reshape(shape)


def encode(message: dict[str, Any]) -> bytes:
    """The bytes of ``message``. What cannot be sent (objects, too many bytes) is an ``InputError``."""
    try:
        data: bytes = msgpack.packb(message, default=_pack)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"the message cannot be sent: {error}.") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"the message has {len(data)} bytes; at most {MAX_BYTES} can be sent. Ask for fewer frames.")
    return data


def decode(data: bytes) -> dict[str, Any]:
    """The message in ``data``; its arrays are read-only. Malformed bytes are an ``InputError``.

    >>> import numpy as np
    >>> decode(encode({"frames": np.arange(3, dtype="u2")}))["frames"].tolist()
    [0, 1, 2]
    """
    if len(data) > MAX_BYTES:
        raise InputError(f"the message has {len(data)} bytes; at most {MAX_BYTES} are read.")
    try:
        message = msgpack.unpackb(data, ext_hook=_unpack_array, strict_map_key=True)
    except InputError:
        raise
    except Exception as error:  # msgpack's errors share no root
        raise InputError(f"the message is not msgpack: {type(error).__name__} {error!s:.200}.") from None
    if not isinstance(message, dict):
        raise InputError(f"a message is a dictionary; got a {type(message).__name__}.")
    _check_depth(message)
    return message


def _check_depth(message: Any) -> None:
    level = [message]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise InputError(f"the message is nested more than {MAX_DEPTH} deep.")


def plain(value: Any) -> Any:
    """``value`` with arrays, tuples and numpy numbers turned into lists and Python numbers, as it is after JSON."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def take(message: dict[str, Any], name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
    """The field ``name`` of ``message``, which must be a ``kind``; without a ``default`` it must be there."""
    value = message.get(name, default)
    if value is ...:
        raise InputError(f"the message lacks {name!r}.")
    if value is default or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        return value
    names = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
    raise InputError(f"{name!r} must be a {names}; got {value!r:.80}.")


def instruction_to_message(instruction: Instruction) -> dict[str, Any]:
    """The wire form of an instruction."""
    return plain(instructions.to_dict(instruction))


def instruction_from_message(message: dict[str, Any]) -> Instruction:
    """Rebuild an instruction; anything wrong with it is an ``InputError``."""
    try:
        return instructions.from_dict(message)
    except StemloopError:
        raise
    except Exception as error:  # a value of a wrong type met a comparison or an iteration
        raise InputError(f"the instruction cannot be read: {type(error).__name__} {error}.") from None


def exposure_to_message(exposure: Exposure) -> dict[str, Any]:
    """The wire form of an exposure."""
    return {
        "frames": None if exposure.frames is None else np.asarray(exposure.frames),
        "electrons": float(exposure.electrons),
        "state": exposure.state,
        "calibration": exposure.calibration,
        "epoch": exposure.epoch,
        "began_s": exposure.began_s,
        "ended_s": exposure.ended_s,
    }


def exposure_from_message(message: dict[str, Any]) -> Exposure:
    """Rebuild an exposure; its frames are read-only."""
    return Exposure(
        take(message, "frames", np.ndarray, None),
        float(take(message, "electrons", (int, float))),
        take(message, "state", dict),
        take(message, "calibration", dict),
        take(message, "epoch", int, 0),
        float(take(message, "began_s", (int, float), 0.0)),
        float(take(message, "ended_s", (int, float), 0.0)),
    )


def info_to_message(info: InstrumentInfo) -> dict[str, Any]:
    """The wire form of what an instrument is."""
    camera = info.camera
    return {
        "name": info.name,
        "instructions": list(info.instructions),
        "field_m": list(info.field_m),
        "energy_eV": info.energy_eV,
        "source_fwhm_m": info.source_fwhm_m,
        "camera": camera and [list(camera.shape), camera.pixel_rad, list(camera.centre_px)],
        "energy_loss": info.energy_loss and list(info.energy_loss),
        "positions_m": None if info.positions_m is None else np.asarray(info.positions_m, dtype=np.float64),
        "sample": info.sample,
        "detectors": list(info.detectors),
    }


def info_from_message(message: dict[str, Any]) -> InstrumentInfo:
    """Rebuild what an instrument is."""
    try:
        camera = message["camera"]
        loss = message["energy_loss"]
        return InstrumentInfo(
            name=message["name"],
            instructions=tuple(message["instructions"]),
            field_m=tuple(message["field_m"]),
            energy_eV=message["energy_eV"],
            source_fwhm_m=message["source_fwhm_m"],
            camera=camera and Camera(tuple(camera[0]), camera[1], tuple(camera[2])),
            energy_loss=loss and tuple(loss),
            positions_m=message["positions_m"],
            sample=message["sample"],
            detectors=tuple(message.get("detectors", ("HAADF",))),
        )
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"what the instrument says of itself cannot be read: {error!r}.") from None
