"""Recorded files of any vendor as signals, or one clear error.

RosettaSciIO does the reading, in a child process with limits (:mod:`stemloop.store.sandbox`); HDF5 files pass
:mod:`stemloop.store.guard` first. What comes back is brought to one convention: metres, electron-volts, radians,
seconds and 1/m; ``(y, x)`` for images, ``(frame, y, x)`` for stacks, ``(scan_y, scan_x, det_y, det_x)`` for 4D-STEM,
and the energy axis last.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import StemloopError, UnreadableFile
from stemloop.core.plain import jsonable
from stemloop.core.signal import Axis, Signal
from stemloop.store import blockfile, guard, sandbox

_UNITS: dict[str, tuple[str, float]] = {
    "m": ("m", 1.0),
    "mm": ("m", 1e-3),
    "µm": ("m", 1e-6),
    "um": ("m", 1e-6),
    "micron": ("m", 1e-6),
    "microns": ("m", 1e-6),
    "nm": ("m", 1e-9),
    "å": ("m", 1e-10),
    "a": ("m", 1e-10),
    "angstrom": ("m", 1e-10),
    "pm": ("m", 1e-12),
    "ev": ("eV", 1.0),
    "kev": ("eV", 1e3),
    "rad": ("rad", 1.0),
    "mrad": ("rad", 1e-3),
    "µrad": ("rad", 1e-6),
    "deg": ("rad", math.pi / 180),
    "°": ("rad", math.pi / 180),
    "s": ("s", 1.0),
    "ms": ("s", 1e-3),
    "µs": ("s", 1e-6),
    "ns": ("s", 1e-9),
    "1/m": ("1/m", 1.0),
    "1/µm": ("1/m", 1e6),
    "1/nm": ("1/m", 1e9),
    "1/å": ("1/m", 1e10),
    "1/a": ("1/m", 1e10),
    "1/pm": ("1/m", 1e12),
}
_NO_UNIT = {"", "px", "pixel", "pixels", "none", "<undefined>", "undefined", "dimensionless"}
_NAMES = {1: ("x",), 2: ("y", "x"), 3: ("frame", "y", "x"), 4: ("scan_y", "scan_x", "det_y", "det_x")}
_NOT_LOSS = ("EDS", "CL", "Luminescence")
_ARRAYS = (".npy", ".npz")


def read(
    path: str | os.PathLike[str], timeout_s: float = 60.0, memory_MB: float = 2048.0, mapped: bool = False
) -> list[Signal]:
    """The signals in the file ``path``, of any format that RosettaSciIO reads, ``.npy``, ``.npz`` or a sealed file.

    Parameters
    ----------
    path : the file.
    timeout_s : the reader is killed after this many seconds.
    memory_MB : most memory [MB] that the reader may take.
    mapped : leave the arrays on the disk, in a file without a name that is gone when they are; they are read only
        where they are touched. A ``.npy`` file is mapped itself, and no limit is then put on it.

    Returns
    -------
    One :class:`~stemloop.core.signal.Signal` a dataset. ``metadata`` has ``title``, ``reader``, ``file``, and where
    the file tells them ``signal_type``, ``beam_energy_eV``, ``magnification``, ``camera_length_m``, ``dwell_s``,
    ``date``, ``time`` and ``uncalibrated`` (names of axes that are only counted).

    Errors: :class:`UnreadableFile` for every way in which this can fail.
    """
    name = Path(path).name
    look(Path(path))
    if mapped and Path(path).suffix.lower() == ".npy":
        return map_array(Path(path))
    with sandbox.scratch() as folder:
        arguments = {"path": str(Path(path).absolute())}
        try:
            found = sandbox.call(
                "stemloop.store.readers:load", arguments, folder, timeout_s=timeout_s, memory_MB=memory_MB
            )
        except sandbox.ChildDied as death:
            raise UnreadableFile(obituary(name, death.why, timeout_s, memory_MB)) from None
        except UnreadableFile:
            raise
        except StemloopError as error:
            raise UnreadableFile(f"{name} could not be read: {error}") from None
        made = []
        for i, entry in enumerate(found):
            data = np.load(folder / f"{i}.npy", mmap_mode="r" if mapped else None, allow_pickle=False)
            made.append(Signal(data, tuple(Axis(**axis) for axis in entry["axes"]), entry["metadata"]))
        return made


def obituary(name: str, why: str, timeout_s: float, memory_MB: float) -> str:
    """Why a reading child died, for the user."""
    if why == "time":
        return (
            f"{name} was not read in {timeout_s:g} s and the reader was stopped; the file is broken, or give more time."
        )
    if why == "memory":
        return f"{name} needs more than {memory_MB:g} MB of memory; it is broken, or give memory_MB more."
    return f"{name} broke its reader ({why}); the file is damaged or of another kind than its name says."


def look(path: Path) -> None:
    """What can be said of a file without opening it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UnreadableFile(f"there is no file {path}.") from None
    except OSError as error:
        raise UnreadableFile(f"{path} cannot be read: {error.strerror}.") from None
    if stat.S_ISDIR(status.st_mode):
        raise UnreadableFile(f"{path} is a folder; name a file in it.")
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableFile(f"{path} is no regular file.")
    if status.st_size == 0:
        raise UnreadableFile(f"{path.name} is empty (0 bytes).")
    if not os.access(path, os.R_OK):
        raise UnreadableFile(f"{path} cannot be read: you have no permission to.")


# ------------------------------------------------------------------------------------------------- in the child


def load(path: str, folder: Path) -> list[dict[str, Any]]:
    """Read ``path``; arrays go to ``folder/0.npy`` ..., what describes them is returned. Runs in the child."""
    found = signals(path)
    if not found:
        raise UnreadableFile(f"{os.path.basename(path)} holds no data.")
    described = []
    for i, signal in enumerate(found):
        np.save(folder / f"{i}.npy", signal.data, allow_pickle=False)
        axes = [{**vars(axis)} for axis in signal.axes]
        described.append({"axes": axes, "metadata": {**jsonable(signal.metadata), "file": os.path.basename(path)}})
    return described


def signals(path: str, lazy: bool = False) -> list[Signal]:
    """What is in ``path``; with ``lazy`` arrays are read where they are touched, if their format allows it."""
    suffix = Path(path).suffix.lower()
    if suffix in _ARRAYS:
        return _arrays(path)
    if suffix == ".blo":
        return [blockfile.read(path)]
    if suffix == ".mat" and not h5py.is_hdf5(path):
        from stemloop.store import matlab

        return matlab.read(path)
    hdf5 = h5py.is_hdf5(path)
    if hdf5:
        guard.check(path)
        from stemloop.store import files

        if files.is_sealed(path):
            return files.read_sealed(path)
    if suffix == ".xml":
        _stay_home(path)
    return _rosetta(path, suffix.lstrip("."), hdf5, lazy)


def _arrays(path: str) -> list[Signal]:
    """Bare numpy arrays: no calibration, no pickles."""
    loaded = np.load(path, allow_pickle=False)
    arrays = {Path(path).stem: loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded}
    return [
        _signal({"data": data, "axes": [], "metadata": {"General": {"title": title}}}, "numpy", path)
        for title, data in arrays.items()
    ]


def map_array(path: Path) -> list[Signal]:
    """A ``.npy`` file as it lies on the disk."""
    try:
        data = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UnreadableFile(f"{path.name} could not be read: {' '.join(str(error).split())[:160]}") from None
    if data.dtype.kind not in "biufc":
        raise UnreadableFile(f"{path.name} holds {data.dtype}; only numbers are read.")
    names = _NAMES.get(data.ndim, tuple(f"axis_{k}" for k in range(data.ndim)))
    axes = tuple(Axis(name, size) for name, size in zip(names, data.shape, strict=True))
    metadata = {"title": path.stem, "reader": "numpy", "file": path.name, "uncalibrated": list(names)}
    return [Signal(data, axes, metadata)]


def _stay_home(path: str) -> None:
    """A header that names a raw file may only name one in its own folder."""
    text = Path(path).read_bytes()[: 1 << 20].decode("utf-8", "replace")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UnreadableFile(f"{os.path.basename(path)} was not read, to be safe: it defines XML entities.")
    for raw in re.findall(r"""<raw_file[^>]*filename\s*=\s*["']([^"']*)["']""", text):
        if re.search(r"[/\\&]", raw) or raw.startswith(".") or (Path(path).parent / raw).is_symlink():
            raise UnreadableFile(f"{os.path.basename(path)} was not read, to be safe: it names the file {raw!r}.")


def _candidates(suffix: str, hdf5: bool) -> list[tuple[str, str]]:
    """(name, module) of the readers for a file name's ending; for HDF5 those of its common dialects too."""
    from rsciio import IO_PLUGINS

    found = {p["name"]: p["api"] for p in IO_PLUGINS if suffix in {e.lower() for e in p["file_extensions"]}}
    if hdf5:
        for plugin in IO_PLUGINS:
            if plugin["name"] in ("HSPY", "EMD", "NeXus"):
                found.setdefault(plugin["name"], plugin["api"])
        found = dict(sorted(found.items(), key=lambda item: item[0] == "NeXus"))  # it takes anything: ask it last
    return list(found.items())


def _rosetta(path: str, suffix: str, hdf5: bool, lazy: bool = False) -> list[Signal]:
    name = os.path.basename(path)
    candidates = _candidates(suffix, hdf5)
    if not candidates:
        raise UnreadableFile(f"{name}: no reader for files ending in {'.' + suffix if suffix else 'nothing'}.")
    reasons: list[str] = []
    for reader, module in candidates:
        try:
            options: dict[str, Any] = {"nxdata_only": True} if reader == "NeXus" else {}
            entries = _entries(importlib.import_module(module).file_reader, path, options, lazy)
            found = [_signal(entry, reader, path, lazy) for entry in entries if np.prod(np.shape(entry["data"]))]
        except MemoryError:
            raise
        except ImportError as error:
            lacking = f"the package {error.name}" if error.name else " ".join(str(error).split())[:120]
            reasons.insert(0, f"{reader} needs what is not installed: {lacking}")
        except Exception as error:
            reasons.append(f"{reader}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
        else:
            if found:
                return found
            reasons.append(f"{reader} found no data")
    raise UnreadableFile(f"{name} could not be read ({'; '.join(reasons[:3])}).")


def _entries(reader: Any, path: str, options: dict[str, Any], lazy: bool) -> list[dict[str, Any]]:
    """What a plugin of RosettaSciIO finds, with arrays that are read where they are touched if it can do that."""
    if lazy:
        known = inspect.signature(reader).parameters
        waiting = {**options, "lazy": True, **({"optimize": False} if "optimize" in known else {})}
        with contextlib.suppress(NotImplementedError, TypeError, ValueError):
            entries: list[dict[str, Any]] = reader(path, **waiting)
            return entries
    return list(reader(path, **options))


def _signal(entry: dict[str, Any], reader: str, path: str, lazy: bool = False) -> Signal:
    """One dictionary of RosettaSciIO as a signal in the house's convention; ``lazy``: its data are not touched."""
    data = entry["data"] if lazy else numbers(np.asarray(entry["data"]))
    if reader == "QuantumDetector" and data.ndim >= 2:
        data = data[..., ::-1, :]  # the plugin turns Merlin's frames upside down; row 0 is the detector's first
    axes = sorted(entry["axes"], key=lambda axis: axis.get("index_in_array") or 0)
    if all(axis.get("index_in_array") is not None for axis in axes) is False or len(axes) != data.ndim:
        axes = list(entry["axes"])
    if len(axes) != data.ndim:
        axes = [{"size": size} for size in data.shape]
    tree = entry.get("metadata") or {}
    kind = str(_dig(tree, "Signal", "signal_type") or "")
    order = _order(axes)
    data = data.transpose(order) if lazy else np.ascontiguousarray(np.transpose(data, order))
    axes = [axes[i] for i in order]
    made, uncalibrated = _axes(axes, data.shape, kind)
    metadata: dict[str, Any] = {"title": str(_dig(tree, "General", "title") or Path(path).stem), "reader": reader}
    metadata.update(_metadata(tree, kind))
    metadata.update(_oddities(axes, made, uncalibrated))
    if entry["data"].dtype.names:
        metadata["colours"] = True
    if uncalibrated:
        metadata["uncalibrated"] = uncalibrated
    return Signal(data, made, metadata)


def numbers(data: NDArray[Any]) -> NDArray[Any]:
    """Plain numbers in the machine's byte order; of colours the mean."""
    if data.dtype.names and set("RGB") <= set(data.dtype.names):
        data = np.asarray(np.mean([data[channel] for channel in "RGB"], axis=0, dtype=np.float32))
    if data.dtype.kind not in "biufc":
        raise UnreadableFile(f"the data are of type {data.dtype}; only numbers are read.")
    return np.atleast_1d(data).astype(data.dtype.newbyteorder("="), copy=False)


def _unit(axis: dict[str, Any]) -> str:
    word = str(axis.get("units") or "").strip()
    word = word.replace(" ", "").replace("\u03bc", "µ").replace("\u212b", "Å").lower()
    word = word.strip("[]").replace("_", "")  # NCEM writes [n_m]
    return re.sub(r"^([a-zµå]+)(\^-1|\*\*-1|⁻¹)$", r"1/\1", word)


def _is_energy(axis: dict[str, Any]) -> bool:
    return _UNITS.get(_unit(axis), ("", 0))[0] == "eV"


def _order(axes: list[dict[str, Any]]) -> list[int]:
    """The energy axis last, and y before x."""
    order = sorted(range(len(axes)), key=lambda i: _is_energy(axes[i]))
    names = [str(axes[i].get("name") or "").lower() for i in order]
    for k in range(len(order) - 1):
        if names[k].endswith("x") and names[k + 1] == names[k][:-1] + "y":
            order[k], order[k + 1] = order[k + 1], order[k]
    return order


def _axes(axes: list[dict[str, Any]], shape: tuple[int, ...], kind: str) -> tuple[tuple[Axis, ...], list[str]]:
    energies = [k for k, axis in enumerate(axes) if _is_energy(axis)]
    others = len(axes) - len(energies)
    names = list(_NAMES.get(others, [f"axis_{k}" for k in range(others)]))
    names += ["energy" if kind.startswith(_NOT_LOSS) else "energy_loss"] * len(energies)
    made, uncalibrated = [], []
    for name, axis, size in zip(names, axes, shape, strict=True):
        scale, offset = _uniform(axis, size)
        unit = _unit(axis)
        word = name
        if unit in _UNITS and scale is not None and scale != 0:
            si, factor = _UNITS[unit]
            if si == "s" and word in ("x", "frame"):
                word = "time"
            made.append(Axis(word, size, scale * factor, offset * factor, si))
        elif unit in _NO_UNIT or scale is None or scale == 0:
            uncalibrated.append(word)
            made.append(Axis(word, size))
        else:
            made.append(Axis(word, size, scale, offset, str(axis["units"])))
    return tuple(made), uncalibrated


def _oddities(axes: list[dict[str, Any]], made: tuple[Axis, ...], uncalibrated: list[str]) -> dict[str, Any]:
    """What is strange about the axes' units: words that had to be guessed, and steps without any."""
    found: dict[str, Any] = {}
    if odd := [str(axis["units"]) for axis in axes if "_" in str(axis.get("units") or "")]:
        found["odd_units"] = odd
    bare = {
        axis.name: scale
        for axis, told in zip(made, axes, strict=True)
        if axis.name in uncalibrated and (scale := _uniform(told, axis.size)[0]) and scale != 1
    }
    if bare:
        found["unitless_scale"] = bare
    return found


def _uniform(axis: dict[str, Any], size: int) -> tuple[float | None, float]:
    """(scale, offset) of an axis, or (None, 0) where it has none or is not uniform."""
    if "axis" in axis:
        values = np.asarray(axis["axis"], float)
        if values.shape != (size,) or size < 2:
            return None, 0.0
        steps = np.diff(values)
        uniform = np.allclose(steps, steps[0], rtol=1e-4, atol=0)
        return (float(steps[0]), float(values[0])) if uniform else (None, 0.0)
    scale, offset = float(axis.get("scale") or 0.0), float(axis.get("offset") or 0.0)
    return (scale, offset) if math.isfinite(scale) and math.isfinite(offset) else (None, 0.0)


def _dig(tree: Any, *path: str) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _metadata(tree: dict[str, Any], kind: str) -> dict[str, Any]:
    """The few things that matter, in SI."""
    found: dict[str, Any] = {"signal_type": kind} if kind else {}
    for microscope in ("TEM", "SEM"):
        part = _dig(tree, "Acquisition_instrument", microscope)
        for key, name, factor in (
            ("beam_energy", "beam_energy_eV", 1e3),
            ("beam_current", "beam_current_A", 1e-9),
            ("convergence_angle", "semiangle_rad", 1e-3),
            ("camera_length", "camera_length_m", 1e-3),
            ("magnification", "magnification", 1.0),
        ):
            value = _dig(part, key)
            if isinstance(value, (int, float)) and math.isfinite(value) and value > 0:
                found[name] = float(value) * factor
        eels = _dig(part, "Detector", "EELS")
        for key, name in (("dwell_time", "dwell_s"), ("exposure", "exposure_s")):
            if isinstance(_dig(eels, key), (int, float)):
                found[name] = float(_dig(eels, key))
        if isinstance(_dig(eels, "collection_angle"), (int, float)):
            found["collection_rad"] = float(_dig(eels, "collection_angle")) * 1e-3
    for key in ("date", "time", "original_filename", "authors"):
        if _dig(tree, "General", key):
            found[key] = str(_dig(tree, "General", key))
    return found
