"""From a recorded 4D-STEM file to maps: the readers of ``store``, the blocks of ``stream``, the folds of ``reduce``."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from stemloop import __version__
from stemloop.campaign import pages
from stemloop.core import units
from stemloop.core.durable import write_whole
from stemloop.core.errors import InputError, StorageError, UnknownName
from stemloop.core.plain import jsonable
from stemloop.core.protocols import Block, Camera, Fold
from stemloop.reduce import dpc
from stemloop.reduce.detectors import Patterns, Radial, Virtual, find_disk, ring, segments, standard
from stemloop.reduce.disks import Template
from stemloop.reduce.engine import Maps, reduce
from stemloop.reduce.ptychography import SingleSideband
from stemloop.reduce.strain import StrainMap, reference_lattice
from stemloop.store.lazy import Found, Opened
from stemloop.store.readers import read
from stemloop.stream.dense import DenseBlock
from stemloop.stream.events import EventBlock

#: What ``--fold`` may name.
FOLDS = ("patterns", "bf", "abf", "adf", "haadf", "segments", "com", "dpc", "idpc", "radial", "strain", "ssb")
#: Quadrants of the bright disk.
SEGMENTS = ("segment_right", "segment_down", "segment_left", "segment_up")
#: Maps that a detector of the user cannot be called.
RESERVED = {*FOLDS, *SEGMENTS, "counts"}
_NAME = re.compile(
    r"(?!.*_(sigma|pattern)$)(?!(com|dpc|idpc|ssb|e)_|radial|rotation|disks|misfit)[A-Za-z][\w-]{0,63}", re.A
)
#: What is made when nothing is named.
USUAL = ("patterns", "bf", "abf", "adf", "haadf", "com", "dpc")
#: Dense bytes of a block.
BLOCK_BYTES = 8 << 20
#: Blocks with a smaller share of hit pixels are folded as electron events.
SPARSE = 0.05
#: Values that are not whole counts are rounded to the largest of them over this.
LEVELS = 2**20


class Stored:
    """The frames of an open recorded file, of ``shape`` (scan_y, scan_x, det_y, det_x): never all in memory."""

    def __init__(self, opened: Opened, which: int) -> None:
        self._opened, self._which = opened, which
        found = opened.found[which]
        self.shape = found.shape if len(found.shape) == 4 else (1, *found.shape)
        self.dtype = found.dtype

    def frames(self, step: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """(first position, frames), about ``step`` frames at a time."""
        return self._opened.frames(self._which, step)

    def close(self) -> None:
        """End the reader."""
        self._opened.close()


@dataclass(frozen=True)
class Scan:
    """A recorded scan: ``data`` (scan_y, scan_x, det_y, det_x), an array or what an open file gives piece by piece.

    pixel_rad, step_m (y, x), energy_eV, semiangle_rad : what the file or the user tells, or None. quantum : what one
    count of the blocks stands for (1 for whole counts); 0 < quantum != 1 means that the values were rounded to it.
    """

    name: str
    data: NDArray[Any] | Stored
    pixel_rad: float | None = None
    step_m: tuple[float, float] | None = None
    energy_eV: float | None = None
    semiangle_rad: float | None = None
    quantum: float = 1.0
    notes: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the scan."""
        return self.data.shape[0], self.data.shape[1]

    @property
    def frame(self) -> tuple[int, int]:
        """(rows, columns) of a frame."""
        return self.data.shape[2], self.data.shape[3]

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """(first position, block) through the whole scan, a few megabytes at a time, dense or as events."""
        for first, found in self.frames():
            frames = self._counts(found)
            sparse = np.count_nonzero(frames) < SPARSE * frames.size
            yield first, EventBlock.from_dense(frames) if sparse else DenseBlock(frames)

    def frames(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """(first position, frames (n, det_y, det_x)) as the file has them, a few megabytes at a time."""
        step = max(1, BLOCK_BYTES // (self.frame[0] * self.frame[1] * self.data.dtype.itemsize))
        if isinstance(self.data, Stored):
            yield from self.data.frames(step)
            return
        flat = self.data.reshape(-1, *self.frame)
        for first in range(0, len(flat), step):
            yield first, np.asarray(flat[first : first + step])

    def close(self) -> None:
        """End the file's reader, if there is one. Closing twice is harmless."""
        if isinstance(self.data, Stored):
            self.data.close()

    def __enter__(self) -> Scan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _counts(self, frames: NDArray[Any]) -> NDArray[Any]:
        if frames.dtype.kind in "bu":
            return frames
        values = np.nan_to_num(frames.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        return np.rint(np.maximum(values, 0) / self.quantum).astype(np.uint32)


def open_scan(path: Path, memory_MB: float = 2048.0, **known: float | None) -> Scan:
    """The scan in a file that a reader of ``store`` takes: its 4D-STEM signal, or a stack of frames as one row.

    Vendor files stay open in a child process that reads only what is folded: use the scan as a context, or close it.

    ``known`` overrides what the file says: ``pixel_rad``, ``step_m``, ``energy_eV``, ``semiangle_rad``; each must be a
    finite number above zero.
    """
    for name, value in {**known, "memory_MB": memory_MB}.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"the {name.replace('_', ' [')}] must be a finite number above zero; got {value:g}.")
    if path.suffix.lower() == ".npy":
        signal = read(path, mapped=True)[0]
        found = [Found(signal.data.shape, signal.data.dtype, signal.axes, signal.metadata)]
        which = _scan_of(path.name, found)
        return _described(path.name, signal.data if signal.data.ndim == 4 else signal.data[None], found[which], known)
    opened = Opened(path, timeout_s=600.0, memory_MB=memory_MB)
    try:
        which = _scan_of(path.name, opened.found)
        return _described(path.name, Stored(opened, which), opened.found[which], known)
    except BaseException:
        opened.close()
        raise


def _scan_of(name: str, found: Sequence[Found]) -> int:
    """Which of a file's datasets is the scan."""
    frames = [
        k
        for k, one in enumerate(found)
        if len(one.shape) in (3, 4) and not any(axis.name.startswith("energy") for axis in one.axes)
    ]
    if not frames:
        raise InputError(f"{name} holds no 4D-STEM data: frames of a scan (4 dimensions) or a stack of them (3).")
    which = max(frames, key=lambda k: (len(found[k].shape), math.prod(found[k].shape)))
    if found[which].dtype.kind not in "buif" or min(found[which].shape) < 1:
        raise InputError(f"{name} holds {found[which].dtype} of {found[which].shape}; frames are real numbers.")
    return which


def _described(name: str, data: NDArray[Any] | Stored, found: Found, known: dict[str, float | None]) -> Scan:
    energy = known.get("energy_eV") or found.metadata.get("beam_energy_eV")
    scan = Scan(
        name,
        data,
        known.get("pixel_rad") or _pixel_rad(found, energy),
        _step(found, known.get("step_m")),
        energy,
        known.get("semiangle_rad") or found.metadata.get("semiangle_rad"),
    )
    return _whole(scan)


def _pixel_rad(signal: Found, energy_eV: float | None) -> float | None:
    axis = signal.axes[-1]
    scale = abs(axis.scale)
    if axis.unit == "rad":
        return scale
    if axis.unit == "1/m" and energy_eV:
        return scale * units.wavelength_m(energy_eV)
    if axis.unit == "m" and signal.metadata.get("camera_length_m"):
        return scale / float(signal.metadata["camera_length_m"])
    return None


def _step(signal: Found, known: float | None) -> tuple[float, float] | None:
    if known:
        return known, known
    if len(signal.shape) == 4 and all(axis.unit == "m" for axis in signal.axes[:2]):
        return abs(signal.axes[0].scale), abs(signal.axes[1].scale)
    return None


def _whole(scan: Scan) -> Scan:
    """The scan with its quantum: 1 where all values are whole and not negative."""
    if scan.data.dtype.kind in "bu":
        return scan
    top, bottom, whole, none = 0.0, 0.0, True, 0
    for _, frames in scan.frames():
        none += int(np.count_nonzero(~np.isfinite(frames)))
        part = np.nan_to_num(frames.astype(np.float64), posinf=0, neginf=0)
        top, bottom = max(top, float(part.max())), min(bottom, float(part.min()))
        whole = whole and bool(np.all(part == np.rint(part)))
    notes = []
    if none:
        notes.append(f"{none} values are not finite and were taken as zero")
    if bottom < 0:
        notes.append(f"values below zero (down to {bottom:g}) were taken as zero")
    if whole and top < 2**32:
        return replace(scan, notes=notes)
    notes.append(f"values were rounded to {top / LEVELS:.3g}; they are not counts, so no deviations are given")
    return replace(scan, quantum=top / LEVELS or 1.0, notes=notes)


# --------------------------------------------------------------------------------------------------- the folding


@dataclass(frozen=True)
class Reduced:
    """Maps by name, the unit of each, and what was found or chosen on the way."""

    maps: Maps
    unit: dict[str, str]
    summary: dict[str, Any]


def reduce_scan(
    scan: Scan,
    names: Sequence[str] = USUAL,
    *,
    threads: int = 1,
    client: Any = None,
    rotation_rad: float | None = None,
    C10_m: float = 0.0,
    rings: Mapping[str, tuple[float, float]] | None = None,
    masks: Mapping[str, NDArray[Any]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Reduced:
    """Reduce a scan in two passes: the patterns, in which the bright disk is found, then everything else.

    names : of :data:`FOLDS`; ``segments`` are the four quadrants of the bright disk (right, down, left, up), ``idpc``
    the phase from them. rotation_rad : of the camera against the scan; found from the field's curl if None (only used
    for ``dpc``, ``idpc`` and ``ssb``). C10_m : defocus that ``ssb`` undoes. rings, masks : further detectors by name,
    as (inner, outer) angles [rad] and as weights (rows, columns). progress : called with (pass, positions done, of how
    many).
    """
    if unknown := [name for name in names if name not in FOLDS]:
        raise UnknownName(f"unknown fold {unknown[0]!r}; known: {', '.join(FOLDS)}.")
    if threads < 1:
        raise InputError(f"{threads} threads fold nothing; give at least 1.")
    for name, value in (("rotation [rad]", rotation_rad), ("defocus [m]", C10_m)):
        if value is not None and not math.isfinite(value):
            raise InputError(f"the {name} must be a finite number; got {value:g}.")

    def go(title: str, folds: Fold | Sequence[Fold]) -> Maps:
        total = scan.shape[0] * scan.shape[1]
        tell = None if progress is None else (lambda done: progress(title, done, total))
        return reduce(folds, scan.blocks(), scan.shape, scan.frame, threads=threads, client=client, progress=tell)

    patterns = go("patterns", Patterns(extremes="patterns" in names))
    centre, radius = find_disk(patterns["mean_pattern"])
    pixel, angle_unit, guessed = _calibrated(scan, radius)
    camera = Camera(scan.frame, pixel, centre)
    semiangle = radius * pixel
    summary: dict[str, Any] = {
        "file": scan.name,
        "version": __version__,
        "scan": list(scan.shape),
        "frame": list(scan.frame),
        "dtype": str(scan.data.dtype),
        "disk_centre_px": [round(c, 3) for c in centre],
        "disk_radius_px": round(radius, 3),
        "pixel_rad": None if angle_unit == "px" else pixel,
        "semiangle_rad": None if angle_unit == "px" else scan.semiangle_rad or semiangle,
        "step_m": scan.step_m,
        "beam_energy_eV": scan.energy_eV,
        "notes": [*scan.notes, *([guessed] if guessed else [])],
    }
    own = _detectors(camera, angle_unit, rings or {}, masks or {})
    folds = _folds(names, camera, semiangle, own, patterns["mean_pattern"] * scan.shape[0] * scan.shape[1])
    maps = dict(patterns) if "patterns" in names else {}
    maps |= go("maps", folds) if folds else {}
    if {"dpc", "idpc", "ssb"} & set(names):
        found, more = _differential(scan, maps, rotation_rad, angle_unit)
        maps |= found if "dpc" in names else {}
        summary |= more
    if "idpc" in names:
        maps |= _from_segments(scan, maps, semiangle, summary["rotation_rad"], angle_unit)
    if "ssb" in names:
        if scan.step_m is None or scan.energy_eV is None or angle_unit == "px":
            raise InputError("ssb needs the scan's step, the energy and the angle of a pixel or the semiangle.")
        turn = summary["rotation_rad"]
        maps |= go("ssb", SingleSideband(camera, semiangle, scan.step_m, scan.energy_eV, C10_m, turn))
    if scan.quantum != 1.0:
        summed = {"bf", "abf", "adf", "haadf", "radial", "counts", *SEGMENTS, *own}
        maps = {n: _rescaled(n, found, scan.quantum, summed) for n, found in maps.items() if "_sigma" not in n}
    return Reduced(maps, {name: _unit(name, angle_unit, scan) for name in maps}, summary)


def _calibrated(scan: Scan, radius_px: float) -> tuple[float, str, str]:
    """Angle of a pixel, its unit (``px`` where it is not known), and how it was got if not from the file."""
    if scan.pixel_rad:
        return scan.pixel_rad, "rad", ""
    if scan.semiangle_rad:
        return scan.semiangle_rad / radius_px, "rad", "the angle of a pixel follows from the semiangle and the disk"
    return 1.0, "px", "the detector is not calibrated: angles are in pixels (give --pixel-mrad or --semiangle-mrad)"


def _folds(
    names: Sequence[str],
    camera: Camera,
    semiangle_rad: float,
    own: Maps,
    total: NDArray[np.float64],
) -> list[Fold]:
    folds: list[Fold] = []
    wanted = {name: mask for name, mask in standard(camera, semiangle_rad).items() if name in names} | own
    if {"segments", "idpc"} & set(names):
        wanted |= dict(zip(SEGMENTS, segments(camera, 0.0, 1.2 * semiangle_rad, 4, -np.pi / 4), strict=True))
    if wanted:
        folds.append(Virtual(wanted))
    if {"com", "dpc", "idpc", "ssb"} & set(names):
        folds.append(dpc.CentreOfMass(camera))
    if "radial" in names:
        edge = min(*camera.centre_px, *(n - 1 - c for n, c in zip(camera.shape, camera.centre_px, strict=True)))
        folds.append(Radial(camera, camera.pixel_rad, max(1, int(edge))))
    if "strain" in names:
        template = Template.disk(semiangle_rad / camera.pixel_rad)
        folds.append(StrainMap(template, reference_lattice(total, template)))
    return folds


def _detectors(
    camera: Camera, angle_unit: str, rings: Mapping[str, tuple[float, float]], masks: Mapping[str, NDArray[Any]]
) -> Maps:
    """The user's own detectors, which must not take a name that is given."""
    if rings and angle_unit == "px":
        raise InputError("rings in mrad need a calibrated detector: give --pixel-mrad or --semiangle-mrad.")
    names = [*rings, *masks]
    taken = [name for name in names if names.count(name) > 1 or not _NAME.fullmatch(name) or name in RESERVED]
    if taken:
        raise InputError(
            f"a detector cannot be called {taken[0]!r}: letters, digits, '_' and '-' that name no other map."
        )
    return {name: ring(camera, *angles) for name, angles in rings.items()} | dict(masks)


def _from_segments(
    scan: Scan, maps: Maps, semiangle_rad: float, rotation_rad: float, angle_unit: str
) -> dict[str, NDArray[Any]]:
    """The phase from the quadrants, turned like that from the centre of mass and without its descan plane."""
    quadrants = np.stack([maps[name] for name in SEGMENTS])
    y, x, sigma_y, sigma_x = dpc.quadrant_deflection(quadrants, semiangle_rad)
    y, x = (np.where(np.isfinite(v), v, np.nanmean(v)) for v in (y, x))
    y, x, _ = dpc.descan(y, x, 1 if min(scan.shape) >= 3 else 0)
    y, x = dpc.turn(y, x, rotation_rad)
    if scan.step_m and scan.energy_eV and angle_unit == "rad":
        sigma = [np.nan_to_num(v) for v in (sigma_y, sigma_x)]
        return {
            "idpc_phase": dpc.phase(y, x, scan.step_m, scan.energy_eV),
            "idpc_phase_sigma": dpc.phase_sigma(sigma[0], sigma[1], scan.step_m, scan.energy_eV),
        }
    return {"idpc_phase": dpc.integrate(y, x, 1.0)}


def _differential(scan: Scan, maps: Maps, rotation_rad: float | None, angle_unit: str) -> tuple[Maps, dict[str, Any]]:
    """Descan taken away, the camera turned back, and the phase; from the maps of the centre of mass."""
    mean_y, mean_x = (np.nanmean(maps[name]) for name in ("com_y", "com_x"))
    filled = [np.where(np.isfinite(maps[n]), maps[n], m) for n, m in (("com_y", mean_y), ("com_x", mean_x))]
    sigma = [np.nan_to_num(maps[f"com_{axis}_sigma"]) for axis in "yx"]
    order = 1 if min(scan.shape) >= 3 else 0
    y, x, surface = dpc.descan(filled[0], filled[1], order)
    if min(scan.shape) < 2:
        raise InputError("differential phase contrast needs a scan of at least 2 x 2 positions: leave out dpc and ssb.")
    turn, turn_sigma = (rotation_rad, 0.0)
    if turn is None:
        turn, turn_sigma = dpc.rotation(y, x, sigma[0], sigma[1]) if np.any(y) or np.any(x) else (0.0, float("nan"))
    y, x = dpc.turn(y, x, turn)
    summary = {"rotation_rad": turn, "rotation_sigma_rad": turn_sigma, "descan": surface.tolist()}
    found = {"dpc_y": y, "dpc_x": x}
    if scan.step_m and scan.energy_eV and angle_unit == "rad":
        found["dpc_phase"] = dpc.phase(y, x, scan.step_m, scan.energy_eV)
        found["dpc_phase_sigma"] = dpc.phase_sigma(sigma[0], sigma[1], scan.step_m, scan.energy_eV)
    else:
        found["dpc_phase"] = dpc.integrate(y, x, 1.0)
    return found, summary


def _rescaled(name: str, found: NDArray[Any], quantum: float, sums: set[str]) -> NDArray[Any]:
    """Sums of rounded values in the file's own unit."""
    power = 2 if name == "variance_pattern" else 1
    return found * quantum**power if name.endswith("_pattern") or name in sums else found


def _unit(name: str, angle: str, scan: Scan) -> str:
    counts = "counts" if scan.quantum == 1.0 else "the file's own"
    if name in ("dpc_phase", "dpc_phase_sigma", "idpc_phase", "idpc_phase_sigma"):
        return "rad" if scan.step_m and scan.energy_eV and angle == "rad" else f"{angle} x positions"
    if name.startswith(("com_", "dpc_", "radial_angle")):
        return angle
    if name.startswith(("ssb_phase", "rotation")):
        return "rad"
    if name.startswith(("e_", "ssb_transfer", "disks", "misfit")):
        return "1"
    return f"{counts}^2" if name == "variance_pattern" else counts


# ------------------------------------------------------------------------------------------------------ the result


def write(reduced: Reduced, folder: Path) -> Path:
    """Write ``maps.h5`` (a dataset a map, attribute ``unit``), ``summary.json``, ``maps.png`` and ``report.html`` into
    ``folder`` (made if it is not there), and return the report's path."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error.strerror}. Choose another with --out.") from None
    write_whole(folder / "maps.h5", _hdf5(reduced))
    picture = _picture(reduced)
    write_whole(folder / "maps.png", picture)
    write_whole(folder / "summary.json", json.dumps(jsonable(reduced.summary), indent=1) + "\n")
    report = folder / "report.html"
    write_whole(report, _page(reduced, picture))
    return report


def _hdf5(reduced: Reduced) -> bytes:
    """Made in memory: where a disk is full, HDF5 neither raises an ``OSError`` nor lets go of its file."""
    with h5py.File("maps.h5", "w", driver="core", backing_store=False) as file:
        for name, found in reduced.maps.items():
            file.create_dataset(name, data=found).attrs["unit"] = reduced.unit[name]
        file.attrs["summary"] = json.dumps(jsonable(reduced.summary))
        file.flush()
        return bytes(file.id.get_file_image())


def _picture(reduced: Reduced) -> bytes:
    shown = {n: m for n, m in reduced.maps.items() if m.ndim == 2 and "_sigma" not in n and n != "sum_pattern"}
    columns = min(4, max(1, len(shown)))
    rows = -(-max(1, len(shown)) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (name, found) in enumerate(shown.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        pattern = name.endswith("_pattern")
        known = found[np.isfinite(found)]
        low, high = np.percentile(known, (0.5, 99.5)) if known.size else (0.0, 1.0)
        image = np.log1p(np.maximum(found, 0)) if pattern else found
        limits: dict[str, Any] = {} if pattern else {"vmin": low, "vmax": max(high, low + 1e-300)}
        drawn = axes.imshow(image, cmap="magma" if pattern else "gray", interpolation="nearest", **limits)
        axes.set_title(f"{name} [{'log ' if pattern else ''}{reduced.unit[name]}]", fontsize=9)
        axes.set_axis_off()
        figure.colorbar(drawn, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    out = io.BytesIO()
    figure.savefig(out, dpi=110)
    return out.getvalue()


def _page(reduced: Reduced, picture: bytes) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in reduced.summary.items()
        if value not in (None, [])
    )
    title = f"{reduced.summary['file']} · stemloop reduce"
    scan, frame = ("x".join(map(str, reduced.summary[key])) for key in ("scan", "frame"))
    head = (
        f'<header><h1>{html.escape(title)}</h1><p class="lead">{scan} positions, frames of {frame} pixels. '
        "Numbers with units: <code>maps.h5</code>.</p></header>"
    )
    image = f'<img alt="maps" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    shown = f"<section><figure>{image}</figure></section>"
    return pages.whole(title, [head, shown, f"<section><table>{rows}</table></section>"])
