"""From an image to its atom columns by a network: an ensemble sees them, Gaussians say where they are.

The other finder (:mod:`stemloop.describe.atoms`) asks the noise what is a column; this one has learnt it from simulated
images, so that the two are opinions of different kinds. The interface is the same.
docs/reference/model-card-atoms.md tells what the network was trained on and how far it can be trusted.
"""

from __future__ import annotations

import functools
import itertools
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from stemloop.core.errors import UnreadableFile
from stemloop.core.structure import Columns
from stemloop.describe.finding import gaussians
from stemloop.describe.finding.fitting import reach_of
from stemloop.describe.finding.noise import noise_of
from stemloop.describe.finding.raster import Raster, raster_of
from stemloop.describe.finding.refining import refine, sites_of
from stemloop.describe.finding.scale import scale_of
from stemloop.learn.atomnet import DIVISOR
from stemloop.learn.atomnet_calibrate import Joined, believed, join, novelty
from stemloop.learn.atomnet_image import CELL, WIDTH, from_network, normalised, resampled
from stemloop.learn.export import KEY

Floats = NDArray[np.float64]
Image = NDArray[np.float32]

#: What a network's card must tell for its columns to be found and judged.
_ON_CARD = {"line", "threshold", "usual", "present", "stretch"}
#: Above this an image is unlike the training set.
UNUSUAL = 3.0
#: Above this the columns of an image are dark.
DARK = 1.0
_COLUMN_SIGMA_NM = 0.045
#: Widths [px] that are tried where neither a period nor a pixel size tells the scale.
_LADDER = (2.2, 3.8, 6.4)
_WIDTHS = (0.9, 16.0)
_WIDER = (1.6, 2.5)
#: A period finer than this [px] is noise of the scan lines.
_FINEST = 1.0
#: So many consistent columns in a part of the image settle the scale.
_ENOUGH = 30.0
#: So many widths a side of the image are looked at to judge a scale.
_TRIED = 110
#: So many widths a side of it are compared with their negative.
_COMPARED = 80
#: Narrowest columns [px] that the network is shown; it has seen columns down to WIDTH / 1.6.
_NARROWEST = 1.8
#: A scale is right if the network finds columns there that are as wide as they should be, within this log ratio.
_CONSISTENT = 0.35
_TILE, _HALO = 512, 64


@dataclass(frozen=True)
class Found:
    """What the ensemble found in an image.

    columns : the columns, refined. chance : (n, k) what each of the k members gives each of them. novelty : how unlike
    the training set the image is; above :data:`UNUSUAL` nothing here should be believed unchecked.
    width_px : the scale that was taken, as the Gaussian width of a column. darker : deviations by which the network
    sees more columns in the image's negative than in the image; above :data:`DARK` the columns are dark on bright, and
    the image is novel. lattice : whether the columns have one.
    """

    columns: Columns
    chance: Floats
    novelty: float
    width_px: float
    darker: float
    lattice: bool


def find_columns(image: NDArray[Any], pixel_size_nm: float | None = None) -> Columns:
    """Find the atom columns of a HAADF image with the network that is shipped; see :meth:`AtomNetwork.find`.

    The arguments, the result and the errors are those of :func:`stemloop.describe.atoms.find_columns`. An image that is
    unlike all that the network was trained on is answered with a warning.
    """
    found = _shipped().find(image, pixel_size_nm)
    if found.darker > DARK:
        warnings.warn(
            f"the columns look dark on bright ({found.darker:.1f} deviations), as in annular bright field: "
            "invert the contrast first (image.max() - image).",
            stacklevel=2,
        )
    elif found.novelty > UNUSUAL:
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
        if missing := _ON_CARD - self.card.keys():
            raise UnreadableFile(
                f"{self.path} is a network of another version: its card lacks {', '.join(sorted(missing))}; make it "
                "anew with ./scripts/train atoms."
            )

    def find(self, image: NDArray[Any], pixel_size_nm: float | None = None) -> Found:
        """Find and refine the columns of ``image`` (rows, columns).

        The image is brought to the network's scale: by ``pixel_size_nm``, else by the period of its spectrum, else by
        trying several. The network itself says how wide the columns are, which corrects the first guess. What the
        members see is matched; the calibrated mean of their chances decides what is a column. Every column is then
        fitted as the classical finder does. Its deviation joins the fit's with the ensemble's: where members disagree
        on a neighbour, the place is doubtful. What simulated images taught of both is applied: by how much deviations
        are stretched where there is no lattice, and how often what is fitted is there.
        """
        raster = raster_of(image)
        pixels = raster.levels((slice(None), slice(None)))[0]
        guesses = _guesses(raster, pixel_size_nm)
        first = next(guesses)
        seen, exact, width, features = self._at_best_scale(pixels, itertools.chain([first], guesses), pixel_size_nm)
        chance = believed(seen.chance, *self.card["line"])
        place = from_network(seen.position, exact)
        taken = (chance >= self.card["threshold"]) & ((place >= 0) & (place <= np.array(pixels.shape) - 1)).all(axis=1)
        start, members, chance = place[taken], seen.chance[taken], chance[taken]
        columns, which = refine(image, start, width)
        members, chance = members[which], believed(chance[which, None], *self.card["present"])
        sees = members > 0.5 * members.max(axis=1, keepdims=True, initial=0)
        spread = _disagreement(columns, sees, pixels.shape)
        wide = columns.width[:, None]
        far = (columns.position >= wide) & (columns.position <= np.array(pixels.shape) - 1 - wide)
        inside = np.asarray(far.all(axis=1))
        sites = sites_of(columns.position, pixels.shape, width)
        vacant = sites.position[sites.within]
        stretch = 1.0 if sites.spread else self.card["stretch"]
        columns = replace(columns, sigma=stretch * np.hypot(columns.sigma, spread), p_present=chance, vacant=vacant)
        darker = self._darker(pixels, {width, *first})
        unlike = max(novelty(features, self.card["usual"]), UNUSUAL * darker / DARK)
        return Found(_take(columns, inside), members[inside], unlike, width, darker, bool(sites.spread))

    def _darker(self, pixels: Image, widths: Iterable[float]) -> float:
        """Deviations of their difference (those of counts) by which more columns are seen in the negative of a part of
        the image than in that part, each at the best of the ``widths`` [px]."""
        best = np.zeros(2)
        for width in widths:
            piece = _busiest(pixels, int(_COMPARED * width))
            small = normalised(resampled(piece, _factor(width))[0])
            chances = [believed(self._seen(part)[0].chance, *self.card["line"]) for part in (small, -small)]
            best = np.maximum(best, [chance[chance > 0.5].sum() for chance in chances])
        return float((best[1] - best[0]) / np.sqrt(best.sum() + 1))

    # -------------------------------------------------------------------------------------------------- the scale

    def _at_best_scale(
        self, pixels: Image, guessed: Iterator[tuple[float, ...]], pixel_size_nm: float | None
    ) -> tuple[Joined, Floats, float, Floats]:
        """What is seen at the scale at which the network agrees best with itself, the factors, the width, features."""
        piece = _busiest(pixels, 384)
        best = (0.0, _COLUMN_SIGMA_NM / pixel_size_nm if pixel_size_nm else 2.5)
        for guesses in guessed:
            for guess in guesses:
                best = max(best, self._tried(piece, guess))
            if best[0] > _ENOUGH:
                break
        width = float(np.clip(best[1], *_WIDTHS))
        small, exact = resampled(pixels, _factor(width))
        seen, features = self._seen(normalised(small))
        return seen, exact, width, features

    def _tried(self, pixels: Image, width: float) -> tuple[float, float]:
        """How much speaks for a ``width`` of the columns, and that width corrected by what the network sees."""
        score = 0.0
        for _ in range(2):
            side = int(_TRIED * width)
            seen, _ = self._seen(normalised(resampled(pixels[:side, :side], _factor(width))[0]))
            chance = believed(seen.chance, *self.card["line"])
            chance = np.where(chance >= max(0.5, self.card["threshold"]), chance, 0.0)
            if not chance.any():
                return 0.0, width
            off = _weighted_median(seen.log_width, chance) - float(np.log(width * _factor(width) / WIDTH))
            score = float(chance.sum() * np.exp(-0.5 * (off / _CONSISTENT) ** 2))
            if abs(off) < 0.15:
                break
            width = float(np.clip(width * np.exp(off), *_WIDTHS))
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


def _take(columns: Columns, kept: NDArray[np.bool_]) -> Columns:
    """The columns at ``kept``."""
    return replace(
        columns,
        position=columns.position[kept],
        sigma=columns.sigma[kept],
        amplitude=columns.amplitude[kept],
        width=columns.width[kept],
        sublattice=columns.sublattice[kept],
        background=columns.background[kept],
        p_present=columns.p_present[kept] if len(columns.p_present) else columns.p_present,
        measured=columns.measured[kept],
    )


@functools.lru_cache(maxsize=1)
def _shipped() -> AtomNetwork:
    return AtomNetwork()


def _disagreement(columns: Columns, sees: NDArray[np.bool_], shape: tuple[int, ...]) -> Floats:
    """(n, 2) deviation [px] of the columns' places over the members, which see (n, k) not all the same columns.

    A member that does not see a neighbour would leave its Gaussian to the columns around it. How far that pulls a
    column is the first step of its own fit towards that Gaussian.
    """
    value = np.column_stack([columns.position, columns.amplitude, np.log(columns.width)])
    off = np.zeros((sees.shape[1], len(value), 2))
    if sees.all():
        return off.sum(axis=0)
    reach = reach_of(float(np.median(columns.width)))
    alone = np.arange(len(value))
    blocks = gaussians.overlaps(value, alone, alone, np.ones(shape, np.float32), reach)
    scale = np.sqrt(np.diagonal(blocks, axis1=1, axis2=2)) + 1e-150
    blocks = blocks / (scale[:, :, None] * scale[:, None, :]) + 1e-6 * np.eye(4)
    for member, own in enumerate(sees.T):
        if own.all():
            continue
        left = np.zeros(shape, np.float32)
        gaussians.paint(value[~own], reach, left)
        pull = gaussians.gather(value, left, reach) / scale
        off[member] = (np.linalg.solve(blocks, pull[:, :, None])[:, :, 0] / scale)[:, :2]
    off = np.clip(off, -columns.width[:, None], columns.width[:, None])
    weight = sees.T[:, :, None] / np.maximum(sees.sum(axis=1), 1)[None, :, None]
    mean = (off * weight).sum(axis=0)
    return np.asarray(np.sqrt(((off - mean) ** 2 * weight).sum(axis=0)))


def _factor(width: float) -> float:
    """By how much an image whose columns have a ``width`` [px] is magnified; never more than the network needs, for
    that costs time and shows nothing new."""
    return WIDTH / width if width > WIDTH else max(1.0, _NARROWEST / width)


def _weighted_median(values: Floats, weight: Floats) -> float:
    order = np.argsort(values)
    total = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(total, 0.5 * total[-1])])


def _guesses(raster: Raster, pixel_size_nm: float | None) -> Iterator[tuple[float, ...]]:
    """Widths [px] to try, a few at a time: the pixel size tells one, the period another; where neither settles it, a
    probe that is wider than usual, or all."""
    usual = _COLUMN_SIGMA_NM / pixel_size_nm if pixel_size_nm else 0.0
    if usual:
        yield (float(np.clip(usual, *_WIDTHS)),)
    scale = scale_of((levels for levels, _ in raster.sample(256, 16)), noise_of(raster.sample(512, 4)))
    if scale.periodic and scale.width > _FINEST:
        yield (scale.width,)
    yield tuple(float(np.clip(usual * part, *_WIDTHS)) for part in _WIDER) if usual else _LADDER


def _busiest(pixels: Image, side: int) -> Image:
    """The part of at most ``side`` x ``side`` pixels with the largest deviation of its grey levels."""
    starts = [sorted({0, (n - side) // 2, n - side}) if n > side else [0] for n in pixels.shape]
    parts = [pixels[top : top + side, left : left + side] for top in starts[0] for left in starts[1]]
    return max(parts, key=lambda part: float(part.std()))


def _tiles(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for top in range(0, shape[0], _TILE):
        for left in range(0, shape[1], _TILE):
            yield (top, min(shape[0], top + _TILE)), (left, min(shape[1], left + _TILE))
