"""From an image to its atom columns by a network: an ensemble sees them, Gaussians say where they are.

The other finder (:mod:`stemloop.describe.atoms`) asks the noise what is a column; this one has learnt it from simulated
images, which helps where the background is not smooth: single atoms on an amorphous support. The interface is the same.
docs/reference/model-card-atoms.md tells what the network was trained on and how far it can be trusted.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from stemloop.core.errors import UnreadableFile
from stemloop.core.structure import Columns
from stemloop.describe import atoms
from stemloop.describe.sites import expected
from stemloop.learn.atomnet import DIVISOR
from stemloop.learn.atomnet_calibrate import Joined, believed, join, novelty
from stemloop.learn.atomnet_image import CELL, WIDTH, from_network, normalised, resampled
from stemloop.learn.export import KEY

Floats = NDArray[np.float64]

#: Above this an image is unlike the training set.
UNUSUAL = 3.0
_COLUMN_SIGMA_NM = 0.045
#: Widths [px] that are tried where neither a period nor a pixel size tells the scale.
_LADDER = (1.3, 2.2, 3.8, 6.4)
#: A scale is right if the network finds columns there that are as wide as they should be, within this log ratio.
_CONSISTENT = 0.35
_TILE, _HALO = 512, 64


@dataclass(frozen=True)
class Found:
    """What the ensemble found in an image.

    columns : the columns, refined. chance : (n, k) what each of the k members gives each of them. novelty : how unlike
    the training set the image is; above :data:`UNUSUAL` nothing here should be believed unchecked.
    width_px : the scale that was taken, as the Gaussian width of a column.
    """

    columns: Columns
    chance: Floats
    novelty: float
    width_px: float


def find_columns(image: NDArray[Any], pixel_size_nm: float | None = None) -> Columns:
    """Find the atom columns of a HAADF image with the network that is shipped; see :meth:`AtomNetwork.find`.

    The arguments, the result and the errors are those of :func:`stemloop.describe.atoms.find_columns`. An image that is
    unlike all that the network was trained on is answered with a warning.
    """
    found = _shipped().find(image, pixel_size_nm)
    if found.novelty > UNUSUAL:
        warnings.warn(
            f"this image is unlike those that the network was trained on (novelty {found.novelty:.1f}, usual is below "
            f"{UNUSUAL:g}); compare with the classical finder.",
            stacklevel=2,
        )
    return found.columns


class AtomNetwork:
    """The ensemble of a file of ``./scripts/train atoms`` (default: the one in the package) on ONNX Runtime."""

    def __init__(self, weights: Path | None = None, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.path = weights or Path(str(resources.files("stemloop.describe") / "weights" / "atoms.onnx"))
        try:
            content = Path(self.path).read_bytes()
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            self.card: dict[str, Any] = json.loads(self._session.get_modelmeta().custom_metadata_map[KEY])
        except FileNotFoundError:
            raise UnreadableFile(f"no network at {self.path}; make one with ./scripts/train atoms.") from None
        except Exception as error:
            raise UnreadableFile(f"{self.path} is no network of ./scripts/train atoms ({error}).") from None

    def find(self, image: NDArray[Any], pixel_size_nm: float | None = None) -> Found:
        """Find and refine the columns of ``image`` (rows, columns).

        The image is brought to the network's scale: by the period of its spectrum, else by ``pixel_size_nm``, else by
        trying several. The network itself says how wide the columns are, which corrects the first guess. What the
        members see is matched; the calibrated mean of their chances decides what is a column. Every column is then
        fitted as the classical finder does. Its deviation joins the fit's with what changes in the fit when it is done
        with the columns of one member after the other: where members disagree on a neighbour, the place is doubtful.
        """
        pixels = atoms._checked(image)
        seen, exact, width, features = self._at_best_scale(pixels, pixel_size_nm)
        chance = believed(seen.chance, *self.card["line"])
        place = from_network(seen.position, exact)
        taken = (chance >= self.card["threshold"]) & ((place >= 0) & (place <= np.array(pixels.shape) - 1)).all(axis=1)
        start, members, chance = place[taken], seen.chance[taken], chance[taken]
        columns, good = atoms.refine(pixels, start, width)
        inside = (columns.position >= columns.width[:, None]) & (
            columns.position <= np.array(pixels.shape) - 1 - columns.width[:, None]
        )
        kept = good & inside.all(axis=1)
        spread = self._disagreement(pixels, columns, members, good, width)
        position = columns.position[kept]
        vacant = expected(columns.position[good], pixels.shape, width).position
        return Found(
            replace(
                columns,
                position=position,
                sigma=np.hypot(columns.sigma, spread)[kept],
                amplitude=columns.amplitude[kept],
                width=columns.width[kept],
                sublattice=atoms.sublattices(columns.amplitude[kept]),
                background=columns.background[kept],
                p_present=chance[kept],
                vacant=vacant,
            ),
            members[kept],
            novelty(features, self.card["usual"]),
            width,
        )

    # -------------------------------------------------------------------------------------------------- the scale

    def _at_best_scale(self, pixels: Floats, pixel_size_nm: float | None) -> tuple[Joined, Floats, float, Floats]:
        """What is seen at the scale at which the network agrees best with itself, the factors, the width, features."""
        piece = _busiest(pixels, 384)
        period = atoms._blob_width(pixels, atoms._noise(pixels), float("nan"))  # not a number where there is no period
        guesses = [] if np.isnan(period) else [period]
        guesses += [float(np.clip(_COLUMN_SIGMA_NM / pixel_size_nm, 0.95, 12))] if pixel_size_nm else []
        best = (0.0, guesses[-1] if guesses else 2.5)
        for guess in guesses:
            best = max(best, self._tried(piece, guess))
            if best[0] > 3:
                break
        else:
            if not pixel_size_nm:
                for guess in _LADDER:
                    best = max(best, self._tried(piece, guess))
        width = best[1]
        small, exact = resampled(pixels, WIDTH / width)
        seen, features = self._seen(normalised(small))
        return seen, exact, width, features

    def _tried(self, pixels: Floats, width: float) -> tuple[float, float]:
        """How much speaks for a ``width`` of the columns, and that width corrected by what the network sees."""
        score = 0.0
        for _ in range(2):
            seen, _ = self._seen(normalised(resampled(pixels, WIDTH / width)[0]))
            chance = believed(seen.chance, *self.card["line"])
            chance = np.where(chance >= self.card["threshold"], chance, 0.0)
            if not chance.any():
                return 0.0, width
            off = _weighted_median(seen.log_width, chance)
            score = float(chance.sum() * np.exp(-0.5 * (off / _CONSISTENT) ** 2))
            if abs(off) < 0.15:
                break
            width = float(np.clip(width * np.exp(off), 0.8, 16))
        return score, width

    # ------------------------------------------------------------------------------------------------ the network

    def _seen(self, image: NDArray[np.float32]) -> tuple[Joined, Floats]:
        """What the members see in an image at their scale, in tiles; and the mean features."""
        maps, features = self.maps(image)
        return join(maps), features

    def maps(self, image: NDArray[np.float32]) -> tuple[NDArray[np.float32], Floats]:
        """Maps (members, MAPS, rows / 2, columns / 2) of a normalised image at the network's scale, and features.

        A large image is done in tiles that overlap, so that memory is bounded.
        """
        rows, cols = (-(-n // DIVISOR) * DIVISOR for n in image.shape)
        edge = DIVISOR
        padded = np.pad(
            image, ((edge, rows - image.shape[0] + edge), (edge, cols - image.shape[1] + edge)), mode="symmetric"
        )
        whole: NDArray[np.float32] | None = None
        features, area = 0.0, 0
        for (top, bottom), (left, right) in _tiles(padded.shape):
            a, b = max(0, top - _HALO), min(padded.shape[0], bottom + _HALO)
            c, d = max(0, left - _HALO), min(padded.shape[1], right + _HALO)
            part, feature = self._session.run(None, {"images": padded[None, None, a:b, c:d]})
            if whole is None:
                whole = np.empty((*part.shape[1:3], padded.shape[0] // CELL, padded.shape[1] // CELL), np.float32)
            inner = part[0, :, :, (top - a) // CELL : (bottom - a) // CELL, (left - c) // CELL : (right - c) // CELL]
            whole[:, :, top // CELL : bottom // CELL, left // CELL : right // CELL] = inner
            features = features + feature[0].astype(np.float64) * (bottom - top) * (right - left)
            area += (bottom - top) * (right - left)
        assert whole is not None
        start = edge // CELL
        stop = (start - (-image.shape[0] // CELL), start - (-image.shape[1] // CELL))
        return whole[:, :, start : stop[0], start : stop[1]], np.asarray(features / area)

    def _disagreement(
        self, pixels: Floats, columns: Columns, members: Floats, good: NDArray[np.bool_], width: float
    ) -> Floats:
        """(n, 2) deviation [px] of the columns' places over fits, each of the columns that one member sees."""
        n, k = members.shape
        sees = members > 0.5 * members.max(axis=1, keepdims=True, initial=0)
        off, count = np.zeros((k, n, 2)), sees & good[:, None]
        for member in range(k):
            own = count[:, member]
            if own.sum() in (0, good.sum()):
                continue
            again, fitted = atoms.refine(pixels, columns.position[own], width)
            index = np.flatnonzero(own)
            off[member, index[fitted]] = (again.position - columns.position[own])[fitted]
            count[index[~fitted], member] = False
        number = np.maximum(count.sum(axis=1), 1)[:, None]
        weight = count.T[:, :, None]
        mean = (off * weight).sum(axis=0) / number
        return np.asarray(np.sqrt(((off - mean) ** 2 * weight).sum(axis=0) / number))


@functools.lru_cache(maxsize=1)
def _shipped() -> AtomNetwork:
    return AtomNetwork()


def _weighted_median(values: Floats, weight: Floats) -> float:
    order = np.argsort(values)
    total = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(total, 0.5 * total[-1])])


def _busiest(pixels: Floats, side: int) -> Floats:
    """The part of at most ``side`` x ``side`` pixels with the largest deviation of its grey levels."""
    starts = [sorted({0, (n - side) // 2, n - side}) if n > side else [0] for n in pixels.shape]
    parts = [pixels[top : top + side, left : left + side] for top in starts[0] for left in starts[1]]
    return max(parts, key=lambda part: float(part.std()))


def _tiles(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for top in range(0, shape[0], _TILE):
        for left in range(0, shape[1], _TILE):
            yield (top, min(shape[0], top + _TILE)), (left, min(shape[1], left + _TILE))
