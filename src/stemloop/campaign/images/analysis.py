"""``analyze``: a recorded image or stack of any vendor to atoms, lattices, phases, defects and a page to look at.

Everything that was computed lies in a folder, a file for each frame and each step, each written whole: an analysis that
was killed goes on where it stopped, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from stemloop import __version__
from stemloop.campaign.images import frames as frames_
from stemloop.campaign.images import motion, packed, remembering, tables
from stemloop.campaign.images.motion import Motion
from stemloop.campaign.images.one_image import FINDERS, Understood, Wanted, understand
from stemloop.campaign.images.overlay import Overlay, overlay
from stemloop.campaign.images.remembering import Remembered
from stemloop.campaign.images.showing import Fringes, fringes, without_noise
from stemloop.core.durable import write_whole, writing
from stemloop.core.errors import InputError, IntegrityError, StemloopError, StorageError, from_code
from stemloop.core.protocols import PixelSize
from stemloop.reduce.denoise import METHODS
from stemloop.store.stack import Stack, open_stack

if TYPE_CHECKING:
    from stemloop.reduce.register import Averaged, Registration

T = TypeVar("T")
#: Called with (step, done, of how many).
Progress = Callable[[str, int, int], None]


@dataclass
class Analysis:
    """What an analysis found. All of it also lies in ``folder``.

    name : of the file. shape : (frames, rows, columns). pixel_size : after the lattice was asked. image : the image
    that was read (a single one), or the average of the registered frames. found : what is known of that image.
    bad : frame to reason, of the frames that could not be used. registration, motion : of a stack, else None.
    remembered : what the library knows that looks alike, if one was given. corner : (row, column) at which ``image``
    begins on the common frame of the registration. fringes : strain by geometric phase analysis. denoised : the image
    without noise, to be looked at, if it was asked for. overlay : where a map lies on the image, if one was given.
    notes, left_out : sentences; what there is not, and why.
    """

    folder: Path
    name: str
    shape: tuple[int, int, int]
    pixel_size: PixelSize
    image: NDArray[np.float64]
    found: Understood
    bad: dict[int, str] = field(default_factory=dict)
    registration: Any = None
    motion: Motion | None = None
    remembered: Remembered | None = None
    corner: tuple[int, int] = (0, 0)
    fringes: Fringes | None = None
    denoised: NDArray[np.float32] | None = None
    overlay: Overlay | None = None
    notes: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    _kept: Any = field(default=None, repr=False)

    @property
    def columns(self) -> NDArray[Any]:
        """The columns of ``image`` as a structured array (see :data:`stemloop.campaign.images.tables.ROW`);
        ``pandas.DataFrame(analysis.columns)`` takes it as it is."""
        return tables.table(self.found, self.pixel_size.value_m)

    def frame(self, k: int) -> Understood:
        """What is known of frame ``k``; the error that it ended with is raised."""
        return frames_.load(self.folder, k)

    def frames(self) -> Iterator[tuple[int, Understood]]:
        """(number, what is known) of every frame that could be used."""
        for k in range(self.shape[0]):
            if k not in self.bad and frames_.result_of(self.folder, k).exists():
                yield k, self.frame(k)

    def to_atomai(self) -> dict[int, NDArray[np.float64]]:
        """AtomAI's coordinates: frame to (n, 3) of row, column [px] and sublattice."""
        return tables.to_atomai({k: found.columns for k, found in self.frames()})

    def to_atomap(self) -> list[NDArray[np.float64]]:
        """atomap's positions of ``image``: for each sublattice (n, 2) of (x, y) [px]."""
        return tables.to_atomap(self.found.columns)

    def to_ase(self) -> Any:
        """The columns of ``image`` as flat ``ase.Atoms`` [angstrom]."""
        return tables.to_ase(self.found, self.pixel_size.value_m)

    def sentences(self) -> list[tuple[str, str]]:
        """(about what, sentence): the result in a few lines."""
        from stemloop.campaign.images.summary import sentences

        return [*sentences(self), ("report", str((self.folder / "report.html").resolve()))]

    def report(self) -> Any:
        """The page ``report.html``; a notebook shows it."""
        from stemloop.campaign.images.report import Page

        return Page(self.folder / "report.html")

    def _repr_html_(self) -> str:
        from stemloop.campaign.images.report import card

        return card(self)

    def __repr__(self) -> str:
        n, lattices = len(self.found.columns), len(self.summary.get("lattices", ()))
        return f"<Analysis of {self.name}: {n} columns, {lattices} lattices, {len(self.found.defects)} defects>"


def analyze(
    source: str | os.PathLike[str] | NDArray[Any],
    out: str | os.PathLike[str] | None = None,
    *,
    pixel_size_nm: float | None = None,
    finder: str = "classical",
    material: str | None = None,
    which: int | str | None = None,
    frame_time_s: float | None = None,
    library: str | os.PathLike[str] | None = None,
    denoise: str | None = None,
    map_file: str | os.PathLike[str] | None = None,
    executor: str = "local",
    workers: int | None = None,
    scheduler: str | None = None,
    slurm_options: tuple[str, ...] = (),
    overwrite: bool = False,
    memory_MB: float = 2048.0,
    progress: Progress | None = None,
) -> Analysis:
    """Everything that an image or a stack of images tells of the specimen's atoms.

    Parameters
    ----------
    source : a file of any vendor, or an array (rows, columns) or (frame, rows, columns).
    out : folder for the results; one that is gone with the analysis if None. If it holds a part of the same analysis,
        that is not done again.
    pixel_size_nm : size of a pixel [nm], if the file does not tell it or tells it wrongly.
    finder : ``classical`` (statistics alone) or ``network``. material : compare with this material only, such as
        ``SrTiO3``; with all that are known if None.
    which : number or title of the dataset, where a file holds several.
    frame_time_s : time from frame to frame [s], for rates; the file's own if None.
    library : file of a library of structural elements, to be searched and added to.
    denoise : ``nlm`` or ``lattice``: the report also shows the image without noise. What is measured comes from the
        image as it was recorded.
    map_file : a map or spectrum image of the same area; the report shows where it lies on the image.
    executor : where frames are analysed: ``local`` (processes here), ``dask`` or ``slurm``. workers : how many at once;
        as many as there are cores if None. scheduler : address of a running Dask cluster. slurm_options : more words
        for ``sbatch``.
    overwrite : begin again, whatever ``out`` holds of this or another analysis.
    memory_MB : most memory of the process that reads the file.
    progress : called with (step, done, of how many).

    Returns
    -------
    Analysis : it shows itself in a notebook. ``out`` holds ``report.html``, ``columns.csv``, ``columns.parquet``,
        ``summary.json``, and the atoms for other programs.

    Raises
    ------
    InputError : the source cannot be used (the message says how to mend it), or no frame of it.
    """
    if finder not in FINDERS:
        raise InputError(f"no column finder is called {finder!r}; known: {', '.join(FINDERS)}.")
    if executor not in frames_.EXECUTORS:
        raise InputError(f"no executor is called {executor!r}; known: {', '.join(frames_.EXECUTORS)}.")
    if denoise is not None and denoise not in METHODS:
        raise InputError(f"no way to denoise is called {denoise!r}; known: {', '.join(METHODS)}.")
    if pixel_size_nm is not None and not 0 < pixel_size_nm < 1e3:
        raise InputError(f"a pixel of {pixel_size_nm} nm is none; give its size in nanometres, such as 0.015.")
    if workers is not None and workers < 1:
        raise InputError(f"{workers} workers do nothing; give at least 1.")
    _look_at_options(material, map_file, library, frame_time_s, memory_MB)
    kept = tempfile.TemporaryDirectory(prefix="stemloop-") if out is None else None
    folder = Path(kept.name if kept is not None else out)  # type: ignore[arg-type]
    path, name, sha256 = _source(source, folder)
    with open_stack(path, which, memory_MB=memory_MB) as stack:
        size = stack.pixel_size
        if pixel_size_nm is not None:
            size = PixelSize(pixel_size_nm * 1e-9, "user", "stated")
        wanted = Wanted(finder, material)
        job = frames_.Job(str(path.absolute()), which, size, wanted, memory_MB)
        parameters = {
            "finder": finder,
            "material": material,
            "which": which,
            "pixel_size_nm": pixel_size_nm,
            "frame_time_s": frame_time_s,
        }
        _begin(folder, {"version": __version__, "sha256": sha256, "parameters": parameters}, overwrite)
        job.write(folder)
        run = _Run(folder, name, stack, size, wanted, progress or (lambda *_: None))
        run.frames(executor, workers, scheduler, slurm_options)
        analysis = run.together(frame_time_s or stack.frame_time_s)
        run.for_the_eye(analysis, denoise)
    analysis._kept = kept
    if map_file is not None:
        run.tell("map", 0, 1)
        try:
            analysis.overlay = overlay(analysis.image, analysis.pixel_size.value_m, map_file)
        except StemloopError as error:
            analysis.left_out.append(("map", str(error)))
        run.tell("map", 1, 1)
    if library is not None:
        run.tell("library", 0, 1)
        try:
            analysis.remembered = remembering.remember(
                analysis.image, analysis.found, analysis.pixel_size.value_m, Path(library), name, sha256
            )
        except InputError as error:
            analysis.left_out.append(("library", str(error)))
        run.tell("library", 1, 1)
    _finish(analysis, sha256, parameters, run.tell)
    return analysis


# ----------------------------------------------------------------------------------------------------- the beginning


def _look_at_options(
    material: str | None, map_file: Any, library: Any, frame_time_s: float | None, memory_MB: float
) -> None:
    """Say what is wrong with the words before hours are spent."""
    from stemloop.describe import materials
    from stemloop.store import readers, shelf

    for what, value in (("the time from frame to frame [s]", frame_time_s), ("the memory [MB]", memory_MB)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{what} must be a finite number above zero; got {value:g}.")
    if material is not None:
        materials.named([material])
    if map_file is not None:
        readers.look(Path(map_file))
    if library is not None:
        shelf.look(Path(library))


def _source(source: Any, folder: Path) -> tuple[Path, str, str]:
    """(file, its name, its SHA-256); an array becomes a file in ``folder``."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        from stemloop.store.library import sha256_of
        from stemloop.store.readers import look

        look(path)
        sha256 = sha256_of(path)
        _make(folder)
        return path, path.name, sha256
    data = np.ascontiguousarray(source)
    if data.ndim not in (2, 3) or data.dtype.kind not in "buif":
        raise InputError(
            f"an array of shape {data.shape} and type {data.dtype} is no image (rows, columns) and no stack of them "
            "(frame, rows, columns) of real numbers."
        )
    _make(folder)
    path = folder / "source.npy"
    digest = hashlib.sha256(f"{data.shape} {data.dtype.str}".encode())
    digest.update(data.data)
    with writing(path) as out:
        np.save(out, data, allow_pickle=False)
    return path, "array", digest.hexdigest()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error.strerror}. Choose another with --out.") from None


def _begin(folder: Path, key: dict[str, Any], overwrite: bool) -> None:
    """Note what is analysed in ``folder``, or see that it is the same as before."""
    path = folder / "analysis.json"
    text = (json.dumps(key, indent=1, sort_keys=True) + "\n").encode()
    if path.exists() and (overwrite or path.read_bytes() != text):
        if not overwrite:
            raise InputError(
                f"{folder} holds the analysis of another file, or one with other options or by another version; "
                "choose another folder with --out, or give --overwrite to begin again."
            )
        _clear(folder)
    write_whole(path, text)


def _clear(folder: Path) -> None:
    """Remove the results of an analysis."""
    for old in (
        *folder.glob("frames/*.npz"),
        *folder.glob("frames/*.bad"),
        *folder.glob("*.npz"),
        *folder.glob("*.bad"),
    ):
        old.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- the way


class _Run:
    """One analysis on its way: its frames, then what they say together."""

    def __init__(self, folder: Path, name: str, stack: Stack, size: PixelSize, wanted: Wanted, tell: Progress) -> None:
        self.folder, self.name, self.stack, self.size, self.wanted, self.tell = folder, name, stack, size, wanted, tell
        self.notes: list[str] = list(stack.notes)
        self.left_out: list[tuple[str, str]] = []
        self.corner = (0, 0)

    def frames(self, executor: str, workers: int | None, scheduler: str | None, slurm_options: tuple[str, ...]) -> None:
        """Analyse every frame that is not yet."""
        count = len(self.stack)
        missing = [k for k in range(count) if not frames_.done(self.folder, k)]
        done = count - len(missing)
        self.tell("frames", done, count)

        def told(_: int) -> None:
            nonlocal done
            done += 1
            self.tell("frames", done, count)

        at_once = min(workers or _cores(), max(1, len(missing)))
        if not missing:
            return
        if executor == "dask":
            frames_.on_dask(self.folder, missing, told, at_once, scheduler)
        elif executor == "slurm":
            frames_.on_slurm(self.folder, missing, told, workers or 16, count, slurm_options)
        elif at_once == 1:
            frames_.here(self.folder, missing, told)
        else:
            frames_.local(self.folder, missing, told, at_once)

    def once(self, name: str, step: Callable[[], T]) -> T | None:
        """What ``step`` gives, kept in ``name.npz``; None where it fails, with its reason in ``name.bad``."""
        path, reason = self.folder / f"{name}.npz", self.folder / f"{name}.bad"
        if path.exists():
            kept: T = packed.read(path)
            return kept
        if not reason.exists():
            try:
                made = step()
                packed.write(path, made)
                return made
            except StorageError:
                raise
            except StemloopError as error:
                said = str(error)
            except (ArithmeticError, LookupError, ValueError, TypeError) as error:
                said = f"this step failed ({type(error).__name__}: {' '.join(str(error).split())[:160]})."
            write_whole(reason, said)
        self.left_out.append((name.replace("_", " "), reason.read_text(encoding="utf-8")))
        return None

    def together(self, frame_time_s: float | None) -> Analysis:
        """What the frames say together."""
        bad = {k: told for k in range(len(self.stack)) if (told := frames_.bad(self.folder, k)) is not None}
        if len(bad) == len(self.stack):
            first = bad[min(bad)]
            if len(self.stack) == 1:
                raise from_code(first["code"], f"{self.name}: {first['message']}")
            raise InputError(f"none of the {len(bad)} frames of {self.name} can be used; the first: {first['message']}")
        reasons = {k: told["message"] for k, told in bad.items()}
        if len(self.stack) == 1:
            image = np.asarray(self.stack[0], dtype=np.float64)
            return self._analysis(image, frames_.load(self.folder, 0), reasons)
        return self._stack(reasons, frame_time_s)

    def _stack(self, bad: dict[int, str], frame_time_s: float | None) -> Analysis:
        from stemloop.reduce.register import average, register

        count = len(self.stack)
        usable = _Usable(self.stack, set(bad))
        registration = self.once(
            "registration",
            lambda: register(
                usable, progress=lambda k, of: self.tell("registering", k, of), keep=self._part_of_registration
            ),
        )
        for part in self.folder.glob("registration_*.npz"):
            part.unlink()
        averaged = None
        if registration is not None:
            for k in np.flatnonzero(registration.outlier):
                bad.setdefault(int(k), str(registration.reason[int(k)]) or "it does not fit the others")
            self.tell("averaging", 0, 1)
            averaged = self.once("average", lambda: average(usable, registration))
            self.tell("averaging", 1, 1)
        if registration is not None and averaged is not None:
            averaged = self._straight(usable, registration, averaged)
        if averaged is None:
            first = next(k for k in range(count) if k not in bad)
            self.notes.append(f"the frames were not averaged; frame {first} is shown.")
            image, found = np.asarray(self.stack[first], dtype=np.float64), frames_.load(self.folder, first)
        else:
            image, corner = covered(averaged.image, averaged.weight)
            self.corner = corner
            (top, left), (rows, columns) = corner, image.shape
            variance = averaged.variance[top : top + rows, left : left + columns]
            self.notes.append(
                f"the average of {count - len(bad)} frames is shown, where at least half of them overlap: "
                f"{image.shape[0]} x {image.shape[1]} px from ({corner[0]}, {corner[1]}) on."
            )
            self.tell("average", 0, 1)
            looked = self.once("average_result", lambda: understand(image, self.size, self.wanted, variance))
            self.tell("average", 1, 1)
            if looked is None:
                raise InputError(f"{self.name}: the average of its frames cannot be used: {self.left_out[-1][1]}")
            found = looked
        analysis = self._analysis(image, found, bad)
        analysis.registration = registration
        self._moved(analysis, frame_time_s)
        analysis.left_out = [*self.left_out, *found.left_out]
        return analysis

    def _part_of_registration(self, name: str, step: Callable[[], T]) -> T:
        """What ``step`` gives, kept until the whole registration is; done again where what was kept is damaged."""
        path = self.folder / f"registration_{name}.npz"
        if path.exists():
            with suppress(IntegrityError):
                kept: T = packed.read(path)
                return kept
        made = step()
        packed.write(path, made)
        return made

    def _straight(self, usable: _Usable, registration: Registration, averaged: Averaged) -> Averaged:
        """The average with its scan lines set straight, where they wander."""
        from stemloop.reduce.register import average
        from stemloop.reduce.scanlines import line_shifts

        self.tell("scan lines", 0, 1)
        lines = self.once("scan_lines", lambda: line_shifts(usable, registration, mean=averaged.image))
        self.tell("scan lines", 1, 1)
        if lines is None or not lines.wander > 0:
            return averaged
        straight = self.once("straight_average", lambda: average(usable, registration, line_shift=lines.shift))
        if straight is None:
            return averaged
        self.notes.append(
            f"scan lines wander by {lines.wander:.2g} px along x; the average was made of straightened lines (the "
            "columns of single frames were not)."
        )
        return straight

    def _moved(self, analysis: Analysis, frame_time_s: float | None) -> None:
        """Columns linked over the frames."""
        shift = None if analysis.registration is None else analysis.registration.shift
        count = len(self.stack)
        self.tell("linking", 0, 1)
        analysis.motion = self.once(
            "motion",
            lambda: motion.motion(
                [None if k in analysis.bad else frames_.load(self.folder, k) for k in range(count)], shift, frame_time_s
            ),
        )
        self.tell("linking", 1, 1)

    def for_the_eye(self, analysis: Analysis, denoise: str | None) -> None:
        """What only the report shows."""
        image, assigned, before = analysis.image, analysis.found.assignment, len(self.left_out)
        self.tell("pictures", 0, 1)
        if assigned is not None and assigned.grains:
            analysis.fringes = self.once("strain_from_fringes", lambda: fringes(image, assigned))
        if denoise is not None:
            analysis.denoised = self.once(f"denoised_by_{denoise}", lambda: without_noise(image, denoise))
        self.tell("pictures", 1, 1)
        analysis.left_out += self.left_out[before:]

    def _analysis(self, image: NDArray[np.float64], found: Understood, bad: dict[int, str]) -> Analysis:
        size = self.size
        if found.calibration is not None and size.value_m is not None:
            trust = {"agrees": "checked", "disagrees": "refuted"}.get(found.calibration.verdict, size.trust)
            size = replace(size, trust=trust)
        shape = self.stack.shape
        return Analysis(
            self.folder,
            self.name,
            shape,
            size,
            image,
            found,
            bad,
            corner=self.corner,
            notes=[*self.notes, *found.notes],
            left_out=[*self.left_out, *found.left_out],
        )


class _Usable:
    """The frames of a stack; those that cannot be used are not read but blank."""

    def __init__(self, stack: Stack, bad: set[int]) -> None:
        self._stack, self._bad = stack, bad

    @property
    def shape(self) -> tuple[int, ...]:
        return self._stack.shape

    def __len__(self) -> int:
        return len(self._stack)

    def __getitem__(self, k: int) -> NDArray[Any]:
        if k in self._bad:
            return np.full(self._stack.shape[1:], np.nan)
        return self._stack[k]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def covered(image: NDArray[Any], weight: NDArray[Any]) -> tuple[NDArray[np.float64], tuple[int, int]]:
    """(part, (row, column)): the rectangle of ``image`` in which ``weight`` is at least half of its largest, found by
    taking away the worst side again and again, and where it begins. Single pixels in it without a value get the mean
    of the part."""
    poor = ~(np.isfinite(image) & (weight >= 0.5 * weight.max()))
    top, bottom, left, right = 0, image.shape[0], 0, image.shape[1]
    while bottom - top > 16 and right - left > 16:
        inner = poor[top:bottom, left:right]
        shares = {
            "top": inner[0].mean(), "bottom": inner[-1].mean(), "left": inner[:, 0].mean(), "right": inner[:, -1].mean()
        }  # fmt: skip
        worst = max(shares, key=lambda side: shares[side])
        if shares[worst] == 0:
            break
        top, bottom = top + (worst == "top"), bottom - (worst == "bottom")
        left, right = left + (worst == "left"), right - (worst == "right")
    part = np.array(image[top:bottom, left:right], dtype=np.float64)
    return np.where(np.isfinite(part), part, np.nanmean(part)), (top, left)


# -------------------------------------------------------------------------------------------------------- the end


def _finish(analysis: Analysis, sha256: str, parameters: dict[str, Any], tell: Progress) -> None:
    """Write the tables, the summary and the page."""
    from stemloop.campaign.images.report import write_report
    from stemloop.campaign.images.summary import summarise

    folder, pixel_m = analysis.folder, analysis.pixel_size.value_m
    tell("writing", 0, 3)
    if analysis.shape[0] == 1:
        written = tables.write(folder, "columns", [analysis.columns], len(analysis.found.columns))
    else:
        numbers = [k for k in range(analysis.shape[0]) if k not in analysis.bad]
        total = sum(len(analysis.frame(k).columns) for k in numbers)
        parts = (_of_frame(analysis, k, pixel_m) for k in numbers)
        written = tables.write(folder, "columns", parts, total)
        written += tables.write(folder, "average", [analysis.columns], len(analysis.found.columns))
    written += tables.export(folder, analysis.found, pixel_m)
    written += tables.export_atomai(folder, ((k, found.columns) for k, found in analysis.frames()))
    tell("writing", 1, 3)
    analysis.summary = summarise(analysis, sha256, parameters, sorted([*written, "report.html", "summary.json"]))
    write_whole(folder / "summary.json", json.dumps(analysis.summary, indent=1) + "\n")
    tell("writing", 2, 3)
    write_report(analysis)
    tell("writing", 3, 3)


def _of_frame(analysis: Analysis, k: int, pixel_m: float | None) -> NDArray[Any]:
    found = analysis.frame(k)
    track = None if analysis.motion is None else motion.track_of(analysis.motion, k, len(found.columns))
    return tables.table(found, pixel_m, k, track)
