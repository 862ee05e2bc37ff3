"""Images and stacks of images of any vendor, one frame at a time, with what is known of the size of a pixel.

Foreign files are parsed in a child process that can be killed (:class:`stemloop.store.lazy.Opened`); a ``.npy`` file
is mapped. Only the frame that is asked for is ever in memory.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.protocols import PixelSize
from stemloop.store import lazy, readers

#: Frames with fewer pixels than this along a side hold no lattice.
SMALLEST_PX = 16
#: A step of an image whose unit is missing is taken as nanometres in this range [nm], and doubted.
_LIKELY_NM = (0.002, 0.03)
_LENGTHS_M = {"m": 1.0, "um": 1e-6, "µm": 1e-6, "nm": 1e-9, "å": 1e-10, "a": 1e-10, "angstrom": 1e-10, "pm": 1e-12}
_SIDECAR_BYTES = 1 << 20


@dataclass
class Stack:
    """Images of equal shape in a recorded file (:class:`~stemloop.core.protocols.Frames`): ``stack[k]`` reads frame
    ``k``, (rows, columns) in the file's own dtype.

    shape : (frames, rows, columns); a single image is one frame. name : of the file. title : of the dataset.
    pixel_size : what the file or its sidecar says. frame_time_s : from one frame to the next, if the file tells.
    notes : sentences on what was chosen or guessed.
    """

    name: str
    title: str
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    pixel_size: PixelSize
    frame_time_s: float | None = None
    notes: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    _mapped: NDArray[Any] | None = field(default=None, repr=False)
    _opened: lazy.Opened | None = field(default=None, repr=False)
    _which: int = 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> NDArray[Any]:
        k = index + len(self) if index < 0 else index
        if not 0 <= k < len(self):
            raise IndexError(f"{self.name} has {len(self)} frames; there is no frame {index}.")
        if self._mapped is not None:
            return np.array(self._mapped[k])
        if self._opened is None:
            raise InputError(f"{self.name} was closed; open it again.")
        rows, columns = self.shape[1:]
        if len(self._opened.found[self._which].shape) == 2:
            return np.concatenate([part for _, part in self._opened.blocks(self._which)]).reshape(rows, columns)
        return self._opened.rows(self._which, k, k + 1).reshape(rows, columns)

    def close(self) -> None:
        """End the reader. Closing twice is harmless."""
        if self._opened is not None:
            self._opened.close()
        self._opened, self._mapped = None, None

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_stack(
    path: str | os.PathLike[str],
    which: int | str | None = None,
    *,
    timeout_s: float = 120.0,
    memory_MB: float = 2048.0,
) -> Stack:
    """The image or stack of images in ``path``, of any format that :func:`~stemloop.store.readers.read` takes.

    Parameters
    ----------
    path : the file. A ``.json`` file of the same name beside it may tell the size of a pixel: ``pixel_size_nm`` (or
        ``_pm``, ``_m``), or ``field_of_view_x`` with ``field_of_view_units``.
    which : number or title of the dataset where a file holds several; the one called HAADF or else the largest if None.
    timeout_s, memory_MB : limits of the child that reads, for one frame.

    Raises
    ------
    UnreadableFile : the file cannot be read. InputError : it holds no image (spectra, colours, patterns, complex or
        tiny ones); the message says what it holds and how to mend it.
    """
    file = Path(path)
    readers.look(file)
    if file.suffix.lower() == ".npy":
        (signal,) = readers.map_array(file)
        found = [lazy.Found(signal.data.shape, signal.data.dtype, signal.axes, signal.metadata)]
        chosen = _choose(found, which, file.name)
        return _stack(file, found[chosen], len(found), mapped=signal.data)
    opened = lazy.Opened(file, timeout_s, memory_MB)
    try:
        chosen = _choose(opened.found, which, file.name)
        stack = _stack(file, opened.found[chosen], len(opened.found))
    except BaseException:
        opened.close()
        raise
    stack._opened, stack._which = opened, chosen
    return stack


# ------------------------------------------------------------------------------------------- which of the datasets


def _choose(found: list[lazy.Found], which: int | str | None, name: str) -> int:
    """The number of the dataset to take."""
    titles = [str(entry.metadata.get("title", "")) for entry in found]
    if isinstance(which, str) and not which.lstrip("-").isdigit():
        if which not in titles:
            raise InputError(f"{name} holds no dataset {which!r}; there are: {', '.join(map(repr, titles))}.")
        which = titles.index(which)
    if which is not None:
        number = int(which)
        if not 0 <= number < len(found):
            raise InputError(f"{name} holds {len(found)} datasets, 0 to {len(found) - 1}; there is no {which}.")
        if reason := _refused(found[number]):
            raise InputError(f"dataset {number} of {name} {reason}")
        return number
    images = [k for k, entry in enumerate(found) if not _refused(entry)]
    if not images:
        largest = max(found, key=lambda entry: math.prod(entry.shape))
        raise InputError(f"{name} {_refused(largest)}")
    return max(images, key=lambda k: ("haadf" in titles[k].lower(), math.prod(found[k].shape), -k))


def _refused(entry: lazy.Found) -> str:  # noqa: PLR0911 (a table of reasons)
    """Why a dataset is no image or stack of images, as the end of a sentence; empty if it is one."""
    shape, axes = entry.shape, entry.axes
    said = " x ".join(map(str, shape))
    if any(axis.name in ("energy", "energy_loss") for axis in axes) or len(shape) < 2:
        return f"holds spectra ({said}), not an image; give the file of the image that was taken with them."
    if entry.metadata.get("colours") or (len(shape) == 3 and shape[-1] in (3, 4) and min(shape[:2]) >= SMALLEST_PX):
        return (
            f"is a colour picture ({said}), and its values are no intensities; give the microscope's own file, "
            "or save one channel alone: numpy.save('grey.npy', picture[..., 0])."
        )
    if len(shape) > 3:
        return f"holds frames of a scan ({said}); make an image of them first: stemloop reduce FILE --out DIR."
    if entry.dtype.kind not in "buif":
        return f"holds {entry.dtype} numbers; give an image of real ones, such as the modulus."
    if axes[-1].unit == "1/m" and axes[-2].unit == "1/m":
        return f"is a diffraction pattern ({said}, steps in 1/m), not an image of the specimen."
    if min(shape[-2:]) < SMALLEST_PX:
        return (
            f"holds images of {shape[-2]} x {shape[-1]} px; atom columns need at least {SMALLEST_PX} x {SMALLEST_PX}."
        )
    return "" if math.prod(shape) else f"is empty ({said})."


def _stack(file: Path, entry: lazy.Found, datasets: int, mapped: NDArray[Any] | None = None) -> Stack:
    frames, rows, columns = entry.shape if len(entry.shape) == 3 else (1, *entry.shape)
    size, notes = _pixel_size(file, entry)
    title = str(entry.metadata.get("title") or file.stem)
    if datasets > 1:
        notes.insert(0, f"the file holds {datasets} datasets; {title!r} was taken.")
    first = entry.axes[0]
    timed = len(entry.shape) == 3 and first.unit == "s" and first.scale > 0
    data = None if mapped is None else mapped.reshape(frames, rows, columns)
    return Stack(
        file.name,
        title,
        (frames, rows, columns),
        entry.dtype,
        size,
        first.scale if timed else None,
        tuple(notes),
        entry.metadata,
        _mapped=data,
    )


# ------------------------------------------------------------------------------------------------ size of a pixel


def _pixel_size(file: Path, entry: lazy.Found) -> tuple[PixelSize, list[str]]:
    """What the file says, else its sidecar, else nothing; and sentences on what is doubtful."""
    down, across = (abs(axis.scale) if axis.unit == "m" else None for axis in entry.axes[-2:])
    if down and across:
        return _of_two(down, across, entry)
    side, note = _sidecar(file, entry.shape)
    if side is not None:
        return PixelSize(side, "sidecar", "stated"), []
    notes = [note] if note else []
    bare = entry.metadata.get("unitless_scale") or {}
    steps = [abs(float(bare[axis.name])) for axis in entry.axes[-2:] if bare.get(axis.name)]
    if len(steps) == 2 and all(_LIKELY_NM[0] <= step <= _LIKELY_NM[1] for step in steps):
        notes.append(f"the file gives a step of {steps[1]:g} without a unit; it was taken as nm.")
        return PixelSize(1e-9 * sum(steps) / 2, "file", "doubtful"), notes
    return PixelSize(), notes


def _of_two(down: float, across: float, entry: lazy.Found) -> tuple[PixelSize, list[str]]:
    notes, trust = [], "stated"
    if abs(down / across - 1) > 0.01:
        trust = "doubtful"
        notes.append(f"pixels are {across * 1e12:.4g} pm wide and {down * 1e12:.4g} pm high; the mean was taken.")
    if odd := entry.metadata.get("odd_units"):
        trust = "doubtful"
        notes.append(f"the file writes the unit as {odd[0]!r}; it was taken as nm.")
    return PixelSize((down + across) / 2, "file", trust), notes


def _sidecar(file: Path, shape: tuple[int, ...]) -> tuple[float | None, str]:
    """Size of a pixel [m] by the JSON file beside the image; a sentence if that cannot be used."""
    beside = file.with_suffix(".json")
    try:
        if beside == file or not beside.is_file() or beside.stat().st_size > _SIDECAR_BYTES:
            return None, ""
        known = _flat(json.loads(beside.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None, f"{beside.name} beside the image is no JSON and was not used."
    for key, factor in (("pixel_size_m", 1.0), ("pixel_size_nm", 1e-9), ("pixel_size_pm", 1e-12)):
        if (value := _positive(known.get(key))) is not None:
            return value * factor, ""
    field_of_view = _positive(known.get("field_of_view_x"))
    unit = _LENGTHS_M.get(str(known.get("field_of_view_units", "nm")).strip().lower())
    if field_of_view is not None and unit is not None:
        return field_of_view * unit / shape[-1], ""
    return None, ""


def _flat(tree: Any) -> dict[str, Any]:
    """The leaves of nested dictionaries by their last key."""
    if not isinstance(tree, dict):
        return {}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found.update(_flat(value) if isinstance(value, dict) else {str(key): value})
    return found


def _positive(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return float(value) if good else None
