"""Every socket of the house on one page.

The rooms meet here and nowhere else: a room implements some of these protocols, ``campaign`` joins them. Each socket
has a conformance suite under ``tests/`` that its implementations inherit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from stemloop.core.instruction import Instruction, Position
from stemloop.core.structure import Columns, Descriptors, Energies

# ----------------------------------------------------------------------------------------------- the microscope


@dataclass(frozen=True)
class Camera:
    """A pixelated detector: ``shape`` (rows, columns), ``pixel_rad`` [rad] a pixel, the undiffracted beam at
    ``centre_px`` (row, col). Row 0 is the top; a beam tilted towards +y lands at larger rows, towards +x at larger
    columns (no flip, no rotation against the scan)."""

    shape: tuple[int, int]
    pixel_rad: float
    centre_px: tuple[float, float]


@dataclass(frozen=True)
class InstrumentInfo:
    """What an instrument is: ``field_m`` (height, width) [m] of its largest field of view, what it can do
    (``instructions``: names of instruction kinds), its beam ``energy_eV``, its ``camera`` if it has one, the
    ``energy_loss`` axis as (offset, scale, size) [eV] if it records spectra, and, for a recording, the only positions
    that it can answer (``positions_m``, (n, 2) (y, x) [m]). ``detectors`` are those that an image may name."""

    name: str
    instructions: tuple[str, ...]
    field_m: tuple[float, float]
    energy_eV: float
    source_fwhm_m: float = 0.0
    camera: Camera | None = None
    energy_loss: tuple[float, float, int] | None = None
    positions_m: NDArray[np.float64] | None = None
    sample: dict[str, Any] = field(default_factory=dict)
    detectors: tuple[str, ...] = ("HAADF",)


@dataclass(frozen=True)
class Exposure:
    """What came back from one instruction.

    frames : (n, ...) one entry an exposed position ((1, rows, columns) for an image), or None.
    electrons : mean number of electrons that each frame was given (for an image: each pixel).
    state : the state vector when the instruction had been carried out.
    calibration : what a reader needs to put units on the frames.
    epoch : number of commands that the instrument had been given when this acquisition began, this one included; it
        grows with each command and never repeats. An instrument leaves 0 here and the server's guard stamps it.
    began_s, ended_s : when the acquisition began and ended [s since 1970], by the clock on the instrument's side; an
        instrument that knows better than its guard fills them in.
    """

    frames: NDArray[Any] | None
    electrons: float
    state: dict[str, Any]
    calibration: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    began_s: float = 0.0
    ended_s: float = 0.0


@runtime_checkable
class Instrument(Protocol):
    """A microscope, real, simulated or recorded. One process owns it and calls it from one thread.

    ``execute`` carries out one instruction and returns when it is done. ``key`` is the same for the same command
    wherever it is repeated: a simulated instrument derives its random numbers from it. ``state`` is a dictionary of
    plain numbers that ``restore`` takes back, so that a server that starts again goes on where it stopped.
    """

    @property
    def info(self) -> InstrumentInfo: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def execute(self, instruction: Instruction, key: str) -> Exposure: ...

    def close(self) -> None: ...


@runtime_checkable
class Abortable(Protocol):
    """An instrument whose running command can be ended early.

    ``abort`` is called from another thread than ``execute`` and returns at once. The ``execute`` that runs, or that is
    about to begin, then blanks the beam and raises :class:`~stemloop.core.errors.Aborted` as soon as it can; it takes
    the request back when it ends. It may be called again while the command still runs.
    """

    def abort(self) -> None: ...


@runtime_checkable
class Reporting(Protocol):
    """An instrument that tells how far it is: ``execute`` calls ``progress(done, of)`` (positions) if it is not None.
    The server's guard sets it."""

    progress: Callable[[int, int], None] | None


@runtime_checkable
class Prompt(Protocol):
    """An instrument that carries out some commands in microseconds, without waiting for anything outside its process.

    ``prompt`` names their kinds; none of them exposes. For these alone ``execute`` and ``state`` may be called from
    another thread than the instrument's own, never two calls at a time. The server then answers them where they came
    in, which saves the way to the instrument's thread and back. Without it everything is done in the one thread.
    """

    @property
    def prompt(self) -> frozenset[str]: ...


class Scope(Protocol):
    """What the loop holds of a microscope: a guarded connection with a lease. ``command_id`` makes a repeat harmless:
    an id that was executed before answers the first result and exposes nothing."""

    @property
    def info(self) -> InstrumentInfo: ...

    def execute(self, instruction: Instruction, command_id: str) -> Exposure: ...

    def state(self) -> dict[str, Any]: ...

    def dose(self) -> dict[str, float]: ...

    def close(self) -> None: ...


# ------------------------------------------------------------------------------------------------------- frames


@dataclass(frozen=True)
class Batch:
    """Consecutive frames of one stream: ``first`` is the sequence number of ``frames[0]``; ``meta`` travels along."""

    stream: str
    first: int
    frames: NDArray[Any]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """Consecutive frames of one stream as a codec wrote them: what travels and rests without being unpacked.

    ``first`` is the sequence number of the first of ``n`` frames of ``shape`` and ``dtype`` (such as ``<u2``);
    ``codec`` names what ``payload`` was written with (``raw``: the frames' own bytes, C order)."""

    stream: str
    first: int
    n: int
    shape: tuple[int, ...]
    dtype: str
    codec: str
    payload: bytes
    meta: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Block(Protocol):
    """Consecutive frames of one scan in whatever form they have (dense, events, gap-coded): it answers in that form.

    A frame is (rows, columns) of counts. Every implementation gives the same numbers to the last count: ``total``,
    ``frame`` and ``dense`` are whole numbers, and ``dot`` is exact where the masks are whole numbers.
    """

    @property
    def frames(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of a frame."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the block takes in its own form."""
        ...

    def dot(self, masks: NDArray[Any]) -> NDArray[np.float64]:
        """(frames, k): the sum of each frame under each of ``masks`` (k, rows, columns)."""
        ...

    def moments(self) -> NDArray[np.float64]:
        """(frames, 3): sum of counts, sum of row x counts, sum of column x counts."""
        ...

    def total(self) -> NDArray[np.uint64]:
        """(rows, columns): the sum over the frames."""
        ...

    def frame(self, index: int) -> NDArray[Any]:
        """One frame (rows, columns)."""
        ...

    def dense(self) -> NDArray[Any]:
        """(frames, rows, columns): all frames."""
        ...


class Codec(Protocol):
    """A way to write blocks as bytes. ``decode(encode(block))`` has the same frames for a codec without loss; a lossy
    one states its error in ``loss`` (a sentence with numbers), which is empty otherwise."""

    name: str
    loss: str

    def encode(self, block: Block) -> bytes: ...

    def decode(self, data: bytes) -> Block: ...


class Fold(Protocol):
    """A reduction in parts: the same answer for any split of the scan into blocks, in any order and on any executor.

    ``init`` makes an empty part of a scan of ``scan`` (rows, columns) positions and frames of ``shape``; ``step`` takes
    in a block whose first frame is position number ``first`` (row-major) and returns the part; ``merge`` joins two
    parts that saw different positions; ``finish`` turns the whole into named arrays.
    """

    def init(self, scan: tuple[int, int], shape: tuple[int, int]) -> Any: ...

    def step(self, part: Any, block: Block, first: int) -> Any: ...

    def merge(self, one: Any, other: Any) -> Any: ...

    def finish(self, part: Any) -> dict[str, NDArray[Any]]: ...


class FrameSink(Protocol):
    """Where an instrument's side puts frames. The sequence numbers are given by the sender, who keeps them durably:
    a batch that is sent again carries its old numbers, and the receiver keeps the first copy."""

    def send(self, batch: Batch) -> object: ...

    def close(self) -> None: ...


class FrameLog(Protocol):
    """A durable log of batches: what ``append`` has returned from is on the disk (after fdatasync)."""

    def append(self, batch: Batch) -> None: ...

    def batches(self, stream: str | None = None) -> Iterator[Batch]: ...

    def close(self) -> None: ...


# -------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class PixelSize:
    """How large a pixel of an image is: ``value_m`` [m] (None: nobody knows), ``source`` (``user``, ``file``,
    ``sidecar``, ``none``) and ``trust``: ``stated`` (somebody wrote it), ``doubtful`` (its unit was odd or missing),
    ``checked`` (the lattice agrees with it), ``refuted`` (the lattice disagrees), ``none``."""

    value_m: float | None = None
    source: str = "none"
    trust: str = "none"


class Frames(Protocol):
    """A stack of images of equal shape, read when they are wanted: ``len(frames)``, ``frames[k]`` is (rows, columns),
    float64 or the file's own dtype. A NumPy array (frame, y, x) is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(frames, rows, columns)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> NDArray[Any]: ...


# ---------------------------------------------------------------------------------------- from frames to meaning


class ColumnFinder(Protocol):
    """Finds atom columns in an image (y, x)."""

    def __call__(self, image: NDArray[Any], pixel_size_nm: float | None = None) -> Columns: ...


class Describer(Protocol):
    """Turns CBED patterns (n, det_y, det_x) [counts] into structure descriptors.

    ``camera`` calibrates the detector; ``energy_eV`` and ``semiangle_rad`` are the beam's; ``electrons`` the mean
    number of electrons a pattern; ``rotation_rad`` turns the reference lattice against +x of the scan.
    """

    def __call__(
        self,
        patterns: NDArray[Any],
        camera: Camera,
        energy_eV: float,
        semiangle_rad: float,
        electrons: float,
        rotation_rad: float = 0.0,
    ) -> Descriptors: ...


class Scalarizer(Protocol):
    """Turns frames into one number each with its 1-sigma deviation: ``(value (n,), sigma (n,))``."""

    @property
    def unit(self) -> str: ...

    def __call__(
        self, frames: NDArray[Any], calibration: dict[str, Any]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...


class EnergyModel(Protocol):
    """Turns descriptors into energies, with a real calculator behind it."""

    unit: str

    def __call__(self, descriptors: Descriptors) -> Energies: ...


# ------------------------------------------------------------------------------------------------------ decision


class Belief(Protocol):
    """What is believed of a scalar field after some measurements. ``predict`` takes positions (m, 2) [m] and returns
    the mean (m,) and the 1-sigma deviation (m,) of the field itself (without measurement noise)."""

    def predict(self, positions: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...


class Acquisition(Protocol):
    """Chooses the next positions: indices (n,) into ``candidates`` (m, 2) [m], in the order to visit them."""

    def __call__(
        self,
        belief: Any,
        candidates: NDArray[np.float64],
        n: int,
        start: Position,
        rng: np.random.Generator,
    ) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class Progress:
    """Where an experiment stands, as stop rules and the display see it. ``sigma``, the largest deviation, is in the
    unit of the property; ``electrons`` is the dose that was spent."""

    points: int
    sigma: float
    electrons: float
    seconds: float


class StopRule(Protocol):
    """Returns the reason to stop (one word, such as ``uncertainty``) or None to go on."""

    def __call__(self, progress: Progress) -> str | None: ...


# ------------------------------------------------------------------------------------------------------- samples


class Specimen(Protocol):
    """A simulated sample and its truth. The twin images it and never tells the loop; ``truth`` is for scoring."""

    name: str
    material: str
    field_m: tuple[float, float]
    rotation_rad: float

    def truth(self, positions: NDArray[np.float64]) -> Descriptors: ...
