"""Diffraction patterns to structure descriptors, by the network that is shipped with the package.

A pattern of any camera is brought to the grid that the network knows: 64 x 64 pixels of exactly 1/32 A^-1 with the
undiffracted beam at index (32, 32). A camera that already has this grid is taken as it is. The network gives stretch
and whole rotation of the lattice; what is strain and what is local rotation follows exactly from the known rotation of
the reference lattice. docs/reference/model-card-cbed.md tells what it was trained on and how far it can be trusted.
"""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from scipy import sparse

from stemloop.core.errors import InputError, UnreadableFile
from stemloop.core.protocols import Camera
from stemloop.core.structure import PHASES, QUANTITIES, SITES, Descriptors
from stemloop.core.units import ANGSTROM_M, wavelength_m
from stemloop.learn.calibrate import scaled
from stemloop.learn.export import KEY
from stemloop.learn.features import condition, disc_maps, radius_px
from stemloop.learn.geometry import CENTRE, PIXEL_PER_A, SIZE, rotation, strain_of, turned
from stemloop.learn.network import UNITS

Array = NDArray[np.float64]

#: Reference rotations up to this [rad] are left in the pattern, larger ones are turned back before the network looks.
TURN_RAD = np.deg2rad(4.0)
#: What vacuum is given as deviations: what was known before the beam looked.
PRIOR_SIGMA = np.array([0.02, 0.02, 0.02, 0.05, 2e-9, 0.02, 0.02])
_SIGMA_FLOOR = np.array([1e-5, 1e-5, 1e-5, 1e-5, 1e-11, 1e-5, 1e-5])
_SPLIT = 5


@functools.lru_cache(maxsize=16)
def _onto_grid(camera: Camera, scale: float, turn_rad: float) -> sparse.csr_array:
    """(64 * 64, rows * columns) shares of each camera pixel that fall into each canonical pixel; columns sum to one
    for pixels that lie inside. Pixels are split in 5 x 5 parts that go to the nearest canonical pixel."""
    part = (np.arange(_SPLIT) + 0.5) / _SPLIT - 0.5
    rows, columns = camera.shape
    y = (np.arange(rows)[:, None] + part - camera.centre_px[0]).ravel() * scale
    x = (np.arange(columns)[:, None] + part - camera.centre_px[1]).ravel() * scale
    c, s = np.cos(turn_rad), np.sin(turn_rad)
    to_x = np.rint(c * x[None, :] - s * y[:, None] + CENTRE).astype(int)
    to_y = np.rint(s * x[None, :] + c * y[:, None] + CENTRE).astype(int)
    inside = (to_x >= 0) & (to_x < SIZE) & (to_y >= 0) & (to_y < SIZE)
    source = np.broadcast_to(
        (np.arange(len(y)) // _SPLIT)[:, None] * columns + (np.arange(len(x)) // _SPLIT)[None, :], inside.shape
    )
    share = np.full(int(inside.sum()), 1 / _SPLIT**2, dtype=np.float32)
    where = (to_y[inside] * SIZE + to_x[inside], source[inside])
    return sparse.csr_array((share, where), shape=(SIZE * SIZE, rows * columns))


def canonical(
    patterns: NDArray[Any], camera: Camera, energy_eV: float, rotation_rad: float = 0.0
) -> tuple[NDArray[np.float32], float]:
    """Patterns (n, 64, 64) on the canonical grid, and by which angle [rad] they were turned back.

    Counts are kept: what a camera pixel holds is shared among the pixels that it covers, and what lies beyond
    1 A^-1 is left out. Nothing is resampled when the camera has the canonical grid and ``rotation_rad`` is within
    :data:`TURN_RAD`, in which case the second value is 0.

    Raises :class:`~stemloop.core.errors.InputError` for patterns of another shape than the camera's, or with values
    that are no counts.
    """
    patterns = np.asarray(patterns)
    if patterns.ndim != 3 or patterns.shape[1:] != tuple(camera.shape):
        raise InputError(f"patterns of shape {patterns.shape} are not (n, {camera.shape[0]}, {camera.shape[1]}).")
    if not np.issubdtype(patterns.dtype, np.number) or np.issubdtype(patterns.dtype, np.complexfloating):
        raise InputError(f"patterns of type {patterns.dtype} are no counts; give real numbers.")
    counts = patterns.astype(np.float32)
    if not np.isfinite(counts).all():
        raise InputError("patterns hold NaN or infinity; mask dead pixels to 0 or leave the pattern out.")
    if counts.size and counts.min() < 0:
        raise InputError("patterns hold negative values; subtract no dark level below 0 (clip at 0) and give counts.")
    scale = camera.pixel_rad / (wavelength_m(energy_eV) / ANGSTROM_M) / PIXEL_PER_A
    turn = rotation_rad if abs(rotation_rad) > TURN_RAD else 0.0
    same_grid = abs(scale - 1) < 1e-4 and tuple(camera.centre_px) == (CENTRE, CENTRE)
    if same_grid and turn == 0.0 and tuple(camera.shape) == (SIZE, SIZE):
        return counts, 0.0
    share = _onto_grid(camera, float(scale), -float(turn))
    moved = (share @ counts.reshape(len(counts), -1).T).T
    return np.ascontiguousarray(moved.reshape(-1, SIZE, SIZE), dtype=np.float32), turn


class PatternDescriber:
    """The shipped network behind :class:`stemloop.core.protocols.Describer`.

    Parameters
    ----------
    weights : an ONNX file of ``./scripts/train cbed``; default the one in the package.
    threads : patterns are described in batches on this many threads.
    batch : patterns in a batch.
    """

    def __init__(self, weights: Path | None = None, threads: int = 1, batch: int = 64) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.path = weights or Path(str(resources.files("stemloop.describe") / "weights" / "cbed.onnx"))
        self.threads, self.batch = threads, batch
        try:
            content = Path(self.path).read_bytes()
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            self.card: dict[str, Any] = json.loads(self._session.get_modelmeta().custom_metadata_map[KEY])
        except FileNotFoundError:
            raise UnreadableFile(f"no network at {self.path}; make one with ./scripts/train cbed.") from None
        except Exception as error:
            raise UnreadableFile(f"{self.path} is no network of ./scripts/train cbed ({error}).") from None
        self._factors = np.array(self.card["factors"])

    @property
    def shared_path(self) -> Path:
        """The file beside the weights that holds what :meth:`shared` tells."""
        return Path(self.path).with_name("shared_error.json")

    def shared(self, phase: str) -> Array:
        """(7,) deviation of the part of each quantity's error that all patterns of one sample share, for a crystal.

        It is not in ``sigma`` and does not average out over patterns; zero where it was not measured.
        """
        if not self.shared_path.exists():
            return np.zeros(len(QUANTITIES))
        known = json.loads(self.shared_path.read_text())["deviation"]
        return np.array(known.get(phase, np.zeros(len(QUANTITIES))), float)

    def __call__(
        self,
        patterns: NDArray[Any],
        camera: Camera,
        energy_eV: float,
        semiangle_rad: float,
        electrons: float,
        rotation_rad: float = 0.0,
    ) -> Descriptors:
        """Describe patterns (n, rows, columns) [counts]; see the protocol for the arguments."""
        for name, value in (("energy_eV", energy_eV), ("semiangle_rad", semiangle_rad), ("electrons", electrons)):
            if not (np.isfinite(value) and value > 0):
                raise InputError(f"{name} must be a finite number above zero; got {value!r}.")
        counts, turn = canonical(patterns, camera, energy_eV, rotation_rad)
        wavelength_A = wavelength_m(energy_eV) / ANGSTROM_M
        known = np.array([semiangle_rad, wavelength_A, electrons])
        parts = [counts[i : i + self.batch] for i in range(0, len(counts), self.batch)]
        if self.threads > 1 and len(parts) > 1:
            with ThreadPoolExecutor(self.threads) as pool:
                read = list(pool.map(lambda part: self._read(part, known), parts))
        else:
            read = [self._read(part, known) for part in parts]
        if not read:
            seven = np.empty((0, len(UNITS)))
            return Descriptors(seven, seven, np.empty((0, len(PHASES))), np.empty((0, len(SITES))), np.empty(0))
        stretch, sigma, phase, site, novelty = (np.concatenate(p).astype(np.float64) for p in zip(*read, strict=True))
        return self._described(stretch * UNITS, sigma * UNITS, phase, site, novelty, known, turn, rotation_rad)

    def _read(self, counts: NDArray[np.float32], known: Array) -> list[NDArray[np.float32]]:
        semiangle, wavelength_A, electrons = (np.full(len(counts), value) for value in known)
        radius = radius_px(semiangle, wavelength_A)
        maps = disc_maps(counts, radius, electrons)
        return list(self._session.run(None, {"maps": maps, "condition": condition(radius, electrons, wavelength_A)}))

    def _described(
        self,
        mean: Array,
        sigma: Array,
        phase: Array,
        site: Array,
        novelty: Array,
        known: Array,
        turn: float,
        rotation_rad: float,
    ) -> Descriptors:
        named = phase.argmax(axis=1)
        sigma = np.maximum(scaled(sigma, named, np.full(len(named), known[2]), self._factors), _SIGMA_FLOOR)
        if turn:
            mean, sigma = _turned_back(mean, sigma, turn)
        mean[:, :4] = strain_of(mean[:, :4], rotation_rad)
        nothing = named == PHASES.index("vacuum")
        mean[nothing], sigma[nothing] = 0.0, PRIOR_SIGMA
        return Descriptors(mean, sigma, phase, site, np.maximum(novelty, self._out_of_range(known)))

    def _out_of_range(self, known: Array) -> float:
        """Novelty of the beam itself: 0 within the trained ranges, above 3 outside, 1 more for each 5 % beyond."""
        semiangle, wavelength_A, electrons = known
        values = {"radius_per_A": semiangle / wavelength_A, "wavelength_A": wavelength_A, "electrons": electrons}
        beyond = 0.0
        for name, (low, high) in self.card["ranges"].items():
            beyond = max(beyond, float(np.log(low / values[name])), float(np.log(values[name] / high)))
        return 3 + beyond / 0.05 if beyond > 0.01 else 0.0


def _turned_back(mean: Array, sigma: Array, angle_rad: float) -> tuple[Array, Array]:
    """Means and deviations in the axes of the camera, of patterns that were looked at turned by ``-angle_rad``."""
    mean, variance = mean.copy(), sigma**2
    mean[:, :4] = turned(mean[:, :4], angle_rad)
    turn = rotation(np.array(angle_rad))
    mean[:, [6, 5]] = mean[:, [6, 5]] @ turn.T
    variance[:, [6, 5]] = variance[:, [6, 5]] @ (turn**2).T
    twice = rotation(np.array(2 * angle_rad)) ** 2
    variance[:, [1, 2]] = variance[:, [1, 2]] @ twice.T
    return mean, np.sqrt(variance)
