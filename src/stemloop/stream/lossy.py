"""Smaller than without loss, at a stated price: what is added to centres of mass and virtual detectors, in units of
their shot noise.

* :class:`SquareRoot`: counts go to the nearer levels at random, so that the mean is kept whatever the pattern; the
  levels lie a given part of the shot noise apart. At level distance d, a count between two of them gains the variance
  (n - below)(above - n), about d^2 / 6 with d = step sqrt(n): the noise rises by the factor sqrt(1 + step^2 / 6).
* :class:`Binned`: pixels are added up b x b. Sums are exact; each electron's place becomes its bin's middle, which adds
  (b^2 - 1) / 12 px^2 an electron to each component of the centre of mass, if the pattern is smooth over a bin.
* :class:`AngularMoments`: per ring the sums of counts x cos(m phi) and x sin(m phi). Detectors that are constant on the
  rings are exact; in the centre of mass every radius becomes its ring's mean, which adds half of the ring's variance of
  the radius an electron.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.protocols import Block
from stemloop.stream import codec
from stemloop.stream import masks as m
from stemloop.stream.dense import DenseBlock, as_counts


class Loss(NamedTuple):
    """Bias and 1-sigma noise that a lossy form adds, in units of the shot noise of one frame: ``com`` (2,) for the
    centre of mass (row, column), ``detectors`` (k,) for each virtual detector; roots of means over the frames."""

    com_bias: NDArray[np.float64]
    com_noise: NDArray[np.float64]
    detectors_bias: NDArray[np.float64]
    detectors_noise: NDArray[np.float64]


class _Shot(NamedTuple):
    """Of each frame: electrons (n,), centre of mass (n, 2) [px] and its variance, sums under masks (n, k), variance."""

    electrons: NDArray[np.float64]
    com: NDArray[np.float64]
    com_variance: NDArray[np.float64]
    sums: NDArray[np.float64]
    sums_variance: NDArray[np.float64]


def _shot(block: Block, masks: NDArray[Any]) -> _Shot:
    """Poisson statistics of a block: var sum(w n) = sum(w^2 n)."""
    masks = m.checked(masks, block.shape).astype(np.float64)
    ramps = m.ramps(block.shape)
    stack = np.concatenate([ramps, ramps[1:] ** 2, masks, masks**2])
    sums = block.dot(stack)
    electrons = np.maximum(sums[:, 0], 1)
    com = sums[:, 1:3] / electrons[:, None]
    variance = np.maximum(sums[:, 3:5] / electrons[:, None] - com**2, 0) / electrons[:, None]
    k = len(masks)
    return _Shot(sums[:, 0], com, variance, sums[:, 5 : 5 + k], sums[:, 5 + k :])


def _ratio(added: NDArray[np.float64], shot: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root of the ratio of two mean variances (columns); 0 where there is no shot noise and nothing was added."""
    one, two = added.mean(axis=0), shot.mean(axis=0)
    return np.sqrt(np.divide(one, two, out=np.where(one > 0, np.inf, 0.0), where=two > 0))


def measured(block: Block, masks: NDArray[Any], moments: NDArray[Any], sums: NDArray[Any]) -> Loss:
    """The loss that was met: ``moments`` (frames, 3) and ``sums`` (frames, k) under ``masks`` of the lossy form, beside
    those of ``block`` itself. The bias is the mean difference, the noise its deviation, over the frames."""
    shot = _shot(block, masks)
    com = moments[:, 1:] / np.maximum(moments[:, :1], 1) - shot.com
    differences = sums - shot.sums
    com_sigma, sigma = np.sqrt(shot.com_variance.mean(axis=0)), np.sqrt(shot.sums_variance.mean(axis=0))
    safe = np.where(sigma > 0, sigma, 1)
    return Loss(
        com.mean(axis=0) / com_sigma,
        com.std(axis=0) / com_sigma,
        differences.mean(axis=0) / safe,
        differences.std(axis=0) / safe,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------- square root


class SquareRoot:
    """A :class:`~stemloop.core.protocols.Codec` that keeps counts to a part of their shot noise, without bias.

    Parameters
    ----------
    step : distance of neighbouring levels in units of the shot noise sqrt(n), 0 to 4.
    seed : of the random choice between two levels; the same block and seed give the same bytes.

    >>> SquareRoot(1.0).levels(20)
    array([ 0,  1,  2,  4,  6,  9, 12, 16, 20])
    """

    name = "sqrt"

    def __init__(self, step: float, seed: int = 0) -> None:
        if not 0 < step <= 4:
            raise InputError(f"the step is a part of the shot noise, above 0 and up to 4; got {step}.")
        self.step, self.seed = float(step), int(seed)

    @property
    def loss(self) -> str:
        rise = 100 * (np.sqrt(1 + self.step**2 / 6) - 1)
        return f"counts go at random to levels {self.step:g} sigma of shot noise apart: no bias, noise up {rise:.1f} %"

    def levels(self, highest: int) -> NDArray[np.int64]:
        """The counts that are kept, up to the first one that is not below ``highest``: whole numbers next to
        (k step / 2)^2, whose distance is step x sqrt(n)."""
        number = int(np.ceil(2 * np.sqrt(max(highest, 1)) / self.step)) + 1
        level = np.unique(np.rint((np.arange(number + 1) * self.step / 2) ** 2).astype(np.int64))
        return level[: int(np.searchsorted(level, max(highest, 1))) + 1]

    def encode(self, block: Block) -> bytes:
        frames = as_counts(block.dense())
        levels = self.levels(int(frames.max(initial=0)))
        below = np.searchsorted(levels, frames, side="right") - 1
        floor = levels[below]
        gap = np.append(np.diff(levels), 1)[below]
        draw = np.random.default_rng([self.seed, *frames.shape]).random(frames.shape, np.float32)
        codes = below + (draw * gap < frames - floor)
        inner = codec.encode(DenseBlock(codes.astype(np.uint8 if len(levels) <= 256 else np.uint16)))
        return codec._join(self.name, block, [inner], step=self.step, seed=self.seed, highest=int(levels[-1]))

    def decode(self, data: bytes) -> Block:
        return read(codec.parts(data))

    def stated(self, block: Block, masks: NDArray[Any]) -> Loss:
        """The loss that is expected for ``block``: exact variances of the random rounding, pixel by pixel."""
        frames = as_counts(block.dense())
        levels = self.levels(int(frames.max(initial=0)))
        below = np.searchsorted(levels, frames, side="right") - 1
        above = np.append(levels[1:], levels[-1])[below]
        added = DenseBlock(((frames - levels[below]) * np.maximum(above - frames, 0)).astype(np.uint32))
        shot, extra = _shot(block, masks), _shot(added, masks)
        # sum over pixels of (r - com)^2 x added variance / N^2, with the sums of added, added r and added r^2
        ramps = m.ramps(block.shape)
        second = added.dot(ramps[1:] ** 2)
        n, first = extra.electrons[:, None], extra.com * np.maximum(extra.electrons, 1)[:, None]
        com = (second - 2 * shot.com * first + shot.com**2 * n) / np.maximum(shot.electrons, 1)[:, None] ** 2
        zero = np.zeros(len(masks))
        return Loss(np.zeros(2), _ratio(com, shot.com_variance), zero, _ratio(extra.sums_variance, shot.sums_variance))


def _read_square_root(found: codec.Parts) -> Block:
    levels = SquareRoot(float(found.fields["step"])).levels(int(found.fields["highest"]))
    codes = codec.decode(found.sections[0]).dense()
    dtype = np.uint16 if levels[-1] < 2**16 else np.uint32
    return DenseBlock(levels.astype(dtype)[codes])


# ------------------------------------------------------------------------------------------------------ binning


class Binned:
    """A :class:`~stemloop.core.protocols.Codec` that adds up ``factor`` x ``factor`` pixels; the block that comes back
    has smaller frames, whose pixel (i, j) lies at row ``factor i + (factor - 1) / 2`` of the former ones. Rows and
    columns beyond the last whole bin are lost, and refused."""

    name = "binned"

    def __init__(self, factor: int) -> None:
        if factor < 2 or factor != int(factor):
            raise InputError(f"frames are binned by a whole number from 2 on; got {factor}.")
        self.factor = int(factor)

    @property
    def loss(self) -> str:
        variance = (self.factor**2 - 1) / 12
        return (
            f"pixels are added up {self.factor} x {self.factor}: sums exact, {variance:.3g} px^2 an electron on each "
            "component of the centre of mass"
        )

    def bin(self, block: Block) -> DenseBlock:
        """The block of binned frames."""
        rows, columns, b = *block.shape, self.factor
        if rows % b or columns % b:
            raise InputError(f"frames of ({rows}, {columns}) pixels cannot be binned by {b}; it does not divide both.")
        frames = block.dense().reshape(block.frames, rows // b, b, columns // b, b)
        return DenseBlock(as_counts(frames.sum(axis=(2, 4), dtype=np.uint64)))

    def encode(self, block: Block) -> bytes:
        binned = self.bin(block)
        return codec._join(self.name, binned, [codec.encode(binned)], factor=self.factor)

    def decode(self, data: bytes) -> Block:
        return read(codec.parts(data))

    def moments(self, binned: Block) -> NDArray[np.float64]:
        """(frames, 3): sum, and sums of row and column x counts in the pixels of the frames before binning."""
        sums = binned.moments()
        sums[:, 1:] = self.factor * sums[:, 1:] + (self.factor - 1) / 2 * sums[:, :1]
        return sums

    def stated(self, block: Block, masks: NDArray[Any]) -> Loss:
        """The loss that is expected for ``block`` where its pattern is smooth over a bin, whose electrons then are
        spread evenly over it: a mask becomes its mean over a bin, with the variance in the bin as noise."""
        shot, b = _shot(block, masks), self.factor
        com = np.full((block.frames, 2), (b * b - 1) / 12) / np.maximum(shot.electrons, 1)[:, None]
        within = masks.astype(np.float64) - self.smooth(masks)
        added = block.dot(self.smooth(within**2))
        return Loss(
            np.zeros(2), _ratio(com, shot.com_variance), np.zeros(len(masks)), _ratio(added, shot.sums_variance)
        )  # fmt: skip

    def smooth(self, masks: NDArray[Any]) -> NDArray[np.float64]:
        """(k, rows, columns): ``masks`` with each bin at its mean."""
        small = self.small(masks)
        return small.repeat(self.factor, axis=1).repeat(self.factor, axis=2)

    def small(self, masks: NDArray[Any]) -> NDArray[np.float64]:
        """(k, rows / factor, columns / factor): the means of ``masks`` over the bins, for the binned frames."""
        k, rows, columns = masks.shape
        b = self.factor
        return np.asarray(masks, np.float64).reshape(k, rows // b, b, columns // b, b).mean(axis=(2, 4))


def _read_binned(found: codec.Parts) -> Block:
    return codec.decode(found.sections[0])


# ---------------------------------------------------------------------------------------------- angular moments


class AngularMoments:
    """Frames as a few numbers a ring: ``values`` (frames, rings, 1 + 2 order) are the sums of counts, of counts x
    cos(m phi) and x sin(m phi), m from 1 to ``order``, with phi from +column towards +row about ``centre_px``."""

    def __init__(self, block: Block, centre_px: tuple[float, float], edges_px: NDArray[Any], order: int = 2) -> None:
        if order < 1:
            raise InputError(f"angular moments go up to an order of at least 1; got {order}.")
        self.ring = m.rings(block.shape, centre_px, edges_px)
        self.centre_px = centre_px
        count = len(np.asarray(edges_px)) - 1
        rows, columns = np.indices(block.shape)
        angle = np.arctan2(rows - centre_px[0], columns - centre_px[1])
        waves = [np.ones(block.shape)]
        for number in range(1, order + 1):
            waves += [np.cos(number * angle), np.sin(number * angle)]
        inside = self.ring[None] == np.arange(count)[:, None, None]
        self.values = np.stack([block.dot(inside * wave) for wave in waves], axis=2)
        radius = np.hypot(rows - centre_px[0], columns - centre_px[1])
        size = np.maximum(inside.sum(axis=(1, 2)), 1)
        self.radius_px = np.einsum("kyx,yx->k", inside, radius) / size
        self._variance = np.einsum("kyx,yx->k", inside, radius**2) / size - self.radius_px**2

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def loss(self) -> str:
        return f"frames are kept as angular moments in {self.values.shape[1]} rings: ring detectors exact"

    def detectors(self, weights: NDArray[Any]) -> NDArray[np.float64]:
        """(frames, k): virtual detectors with ``weights`` (k, rings)."""
        return np.asarray(self.values[:, :, 0] @ np.asarray(weights).T)

    def moments(self) -> NDArray[np.float64]:
        """(frames, 3): sum, sum of row x counts, sum of column x counts, of the electrons in the rings."""
        whole = self.values[:, :, 0].sum(axis=1)
        right, down = (self.values[:, :, k] @ self.radius_px for k in (1, 2))
        return np.stack([whole, down + self.centre_px[0] * whole, right + self.centre_px[1] * whole], axis=1)

    def stated(self, block: Block, weights: NDArray[Any]) -> Loss:
        """The loss that is expected for ``block``, which lies within the rings and is smooth over a ring's width."""
        weights = np.asarray(weights, np.float64)
        masks = np.append(weights, np.zeros((len(weights), 1)), axis=1)[:, self.ring]
        shot = _shot(block, masks)
        one = (self.values[:, :, 0] @ self._variance) / 2 / np.maximum(shot.electrons, 1) ** 2
        zero = np.zeros(len(weights))
        return Loss(np.zeros(2), _ratio(np.stack([one, one], axis=1), shot.com_variance), zero, zero)


_READERS = {"sqrt": _read_square_root, "binned": _read_binned}


def read(found: codec.Parts) -> Block:
    """The block of the checked parts of a lossy codec."""
    name = found.fields["codec"]
    if name not in _READERS:
        raise InputError(f"this block was written by {name!r}, which is no lossy codec; use codec.decode.")
    return codec._guarded(_READERS[name], found)  # type: ignore[no-any-return]
