"""Views made ready: without slow background, without what stands still, without the lattice."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from stemloop.reduce.registration.views import Floats, Reference, Thin

#: Waves that a lattice is made of.
_MOST_WAVES = 48


class Stack:
    """Views made ready: ``flat`` (n, rows, columns) without slow background and without what stands still; ``odd``
    the same, tapered, without the lattice's spots. Shifts are in pixels of views here."""

    def __init__(self, views: Thin, frame_shape: tuple[int, int], like: Reference | None = None) -> None:
        n, rows, columns = views.shape
        self.frame_shape, self.shape = frame_shape, (rows, columns)
        self.scale = np.array(frame_shape) / np.array(self.shape)
        self.flat = np.stack([_flattened(view) for view in views])
        self.taper = _taper(rows)[:, None] * _taper(columns)[None, :]
        self.still = like.still if like else _still(self.flat, self.taper)
        self.flat -= self.still
        power = np.zeros((rows, columns // 2 + 1))
        for view in self.flat:
            power += np.abs(fft.rfft2(view * self.taper)) ** 2
        power /= n * float((self.taper**2).sum())
        self.noise = _floor(power)
        rest = self.flat - _periodic(self.flat, power, self.noise)
        self.passed = like.passed if like else _between_spots(power, self.noise)
        spectrum = [fft.rfft2(view * self.taper) * self.passed for view in rest]
        self.odd = np.stack([fft.irfft2(wave, self.shape) for wave in spectrum])
        left = np.mean([np.abs(wave) ** 2 for wave in spectrum], axis=0) / float((self.taper**2).sum())
        self.odd_noise, self.rough = float(left.mean()), float((left**2).mean())

    def __len__(self) -> int:
        return len(self.flat)


def _periodic(flat: Thin, power: Floats, noise: float) -> Thin:
    """(n, rows, columns) the lattice of each view: waves at the strongest spots of the mean ``power``, their amplitudes
    linear in the place, fitted by least squares over the whole view.

    A window alone would leave what leaks from strong spots, which is the same in all frames and stays with the frame,
    not with the specimen.
    """
    rows, columns = flat.shape[1:]
    padded = np.pad(power, ((0, 0), (0, 1)), mode="edge")
    tops = spots_of(power) & (power > 8 * noise) & (power == ndimage.maximum_filter(power, 3, mode="wrap"))
    tops[:, [0, -1]] &= (np.arange(rows) < (rows + 1) // 2)[:, None]  # there waves come in pairs
    tops[0, 0] = False
    at = np.argwhere(tops)
    at = at[np.argsort(power[tops])[::-1][:_MOST_WAVES]]
    if not len(at):
        return np.zeros_like(flat)

    def vertex(before: Floats, middle: Floats, after: Floats) -> Floats:
        left, top, right = (np.log(np.maximum(v, 1e-30)) for v in (before, middle, after))
        return np.asarray(np.clip(0.5 * (left - right) / np.minimum(left - 2 * top + right, -1e-9), -0.5, 0.5))

    y, x = at.T
    middle = power[y, x]
    down = y + vertex(power[y - 1, x], middle, power[(y + 1) % rows, x])
    beside = np.where(x > 0, power[y, np.maximum(x - 1, 0)], padded[-y % rows, 1])
    across = x + vertex(beside, middle, padded[y, x + 1])
    v, u = ((np.arange(size) - (size - 1) / 2) / size for size in (rows, columns))
    tall, wide = (np.exp(2j * np.pi * np.outer(p, f)) for p, f in ((v, down), (u, across)))
    tall = np.concatenate([tall, v[:, None] * tall, tall], axis=1)
    wide = np.concatenate([wide, wide, u[:, None] * wide], axis=1)
    tall2, wide2 = (np.concatenate([m, m.conj()], axis=1) for m in (tall, wide))
    gram = (tall2.conj().T @ tall2) * (wide2.conj().T @ wide2)
    gram[np.diag_indices(len(gram))] *= 1 + 1e-6
    inverse = np.linalg.inv(gram)
    tall, wide = tall.astype(np.complex64), wide.astype(np.complex64)
    out = np.empty_like(flat)
    for k, view in enumerate(flat):
        seen = ((view @ wide.conj()) * tall.conj()).sum(axis=0)
        amplitude = (inverse @ np.concatenate([seen, seen.conj()]))[: len(seen)].astype(np.complex64)
        out[k] = 2 * ((tall * amplitude) @ wide.T).real
    return out


def _flattened(view: Thin) -> Thin:
    """Without the slow background: a Gaussian of a twelfth of the field."""
    pixels = view.astype(np.float32)
    return np.asarray(pixels - ndimage.gaussian_filter(pixels, np.array(pixels.shape) / 12.0, mode="reflect"))


def _taper(size: int) -> Thin:
    """One, falling to zero over a quarter of the length at either end as a raised cosine."""
    width = max(1, size // 4)
    rise = 0.5 - 0.5 * np.cos(np.pi * (np.arange(width) + 0.5) / width)
    line = np.ones(size, dtype=np.float32)
    line[:width], line[-width:] = rise, rise[::-1]
    return line


def _floor(power: Floats) -> float:
    """Power of the white noise: the median over the finest third of frequencies."""
    rows = np.abs(np.fft.fftfreq(power.shape[0]))[:, None]
    columns = np.fft.rfftfreq(2 * (power.shape[1] - 1) or 1)[None, : power.shape[1]]
    fine = np.hypot(rows, columns) > 0.42
    return float(max(np.median(power[fine]), 1e-12 * power.max(), 1e-30))


def spots_of(power: Floats) -> NDArray[np.bool_]:
    """Where the mean power stands out from its surroundings by eight times."""
    whole = ndimage.median_filter(power, size=(11, 11), mode="nearest")
    return np.asarray(power > 8 * np.maximum(whole, np.median(power)))


def _between_spots(power: Floats, noise: float) -> Thin:
    """What keeps the frequencies between a lattice's spots, as fine as the specimen's image is."""
    spots = spots_of(power)
    rows = np.fft.fftfreq(power.shape[0])[:, None]
    columns = np.fft.rfftfreq(2 * (power.shape[1] - 1))[None, :]
    radius = np.hypot(rows, columns)
    strong = spots & (power > 8 * noise)
    edge = float(radius[strong].max()) if strong.any() else 0.3
    soft = np.exp(-((radius / max(0.9 * edge, 0.06)) ** 2))
    return (soft * ~ndimage.binary_dilation(spots, np.ones((5, 5), bool))).astype(np.float32)


def _still(flat: Thin, taper: Thin) -> Thin:
    """What stands still in all views while something else moves: spots whose phase is the same in all of them.

    A lattice that drifts turns the phases of its spots, the finer the more. From those that turn follows how far it
    moves; what it would have turned and is not turned stands still.
    """
    n, rows, columns = flat.shape
    none = np.zeros((rows, columns), dtype=np.float32)
    if n < 4:
        return none
    total = np.zeros((rows, columns // 2 + 1), dtype=np.complex128)
    power = np.zeros(total.shape)
    for view in flat:
        spectrum = fft.rfft2(view * taper)
        total += spectrum
        power += np.abs(spectrum) ** 2
    power /= n
    spots = spots_of(power)
    around = np.maximum(ndimage.median_filter(power, size=(11, 11), mode="nearest"), 1e-30)
    alike = np.abs(total / n) ** 2 / np.maximum(power, 1e-30)
    fixed = spots & (alike > 0.97 - 2 * around / power)
    moving = spots & (alike < 0.6 * (1 - around / power))
    if not fixed.any() or moving.sum() < 3:
        return none
    # phases that Gaussian displacements of covariance C turn: alike = exp(-(2 pi)^2 g C g)
    down, across = np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None, :]
    terms = (2 * np.pi) ** 2 * np.stack(np.broadcast_arrays(down**2, across**2, 2 * down * across), axis=-1)
    turned = -np.log(np.clip(alike, 0.05, 1.0))
    found, _, rank, _ = np.linalg.lstsq(terms[moving], turned[moving], rcond=0.02)
    fixed &= terms @ found > 1.5  # had it moved with the others it would be turned, too
    if rank < 3 or not fixed.any():
        return none
    kept = ndimage.binary_dilation(fixed, np.ones((7, 7), bool)) & ~ndimage.binary_dilation(
        moving, np.ones((3, 3), bool)
    )
    return np.asarray(fft.irfft2(fft.rfft2(flat.mean(axis=0)) * kept, (rows, columns)), dtype=np.float32)
