"""Deviations that mean what they say, and a scale for what was never seen: both from held-out examples.

A network's own 1-sigma deviations are too small or too large by a factor that depends on the quantity, the material
and the dose. The factor is measured where the network has not been trained: in each bin of log dose it is half the
0.9545 quantile of |error| / sigma, so that 2 sigma cover what 2 sigma of a normal distribution cover.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.learn.examples import DOSE_RANGE, Examples, exposed
from stemloop.learn.network import BEAM, CRYSTALS, NOVELTY_DIMENSIONS, UNITS, torch_module

#: Edges of the bins of log10 electrons a pattern.
DOSE_EDGES = np.linspace(np.log10(DOSE_RANGE[0]), np.log10(DOSE_RANGE[1]), 6)
COVERAGE = 0.9545
#: In-range patterns have a novelty of at most 3 as often as a normal deviation is within 3 sigma.
_WITHIN = 0.9973


def looked(
    network: Any, examples: Examples, seed: int, dose: float | None = None, blur_px: float | None = None
) -> Iterator[tuple[Any, ...]]:
    """(exposure, mean, sigma, phase logits, site logits, features) of ``examples`` in batches, in SI units.

    ``dose`` [electrons] and ``blur_px`` hold for every pattern; None draws them as the training does.
    """
    torch = torch_module()
    for start in range(0, len(examples), 512):
        chosen = examples.take(slice(start, start + 512))
        rng = np.random.default_rng([seed, start])
        each = None if dose is None else np.full(len(chosen), dose)
        batch = exposed(chosen, rng, each, blur_px)
        with torch.no_grad():
            mean, log_sigma, phase, site, features = network.features(
                torch.from_numpy(batch["maps"]), torch.from_numpy(batch["condition"])
            )
        yield batch, mean.numpy() * UNITS, np.exp(log_sigma.numpy()) * UNITS, phase.numpy(), site.numpy(), features


def factors(
    error: NDArray[np.float64], sigma: NDArray[np.float64], phase: NDArray[np.int64], dose: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(crystals, quantities, dose bins) factors by which each deviation must be multiplied.

    ``error`` and ``sigma`` (n, 7), ``phase`` (n,) and ``dose`` (n,) electrons of held-out examples. A bin of fewer than
    50 examples takes the factor of the whole range.
    """
    bins = np.clip(np.digitize(np.log10(dose), DOSE_EDGES) - 1, 0, len(DOSE_EDGES) - 2)
    out = np.ones((len(CRYSTALS), error.shape[1], len(DOSE_EDGES) - 1))
    for c in range(len(CRYSTALS)):
        ratio = np.abs(error[phase == c]) / sigma[phase == c]
        if len(ratio) == 0:
            continue
        for b in range(out.shape[2]):
            here = bins[phase == c] == b
            chosen = ratio[here] if here.sum() >= 50 else ratio
            out[c, :, b] = np.quantile(chosen, COVERAGE, axis=0) / 2
    return out


def scaled(
    sigma: NDArray[np.float64], phase: NDArray[np.int64], dose: NDArray[np.float64], factor: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``sigma`` (n, 7) times the factor of each phase and dose, linear in log dose between the bins' centres."""
    centres = (DOSE_EDGES[1:] + DOSE_EDGES[:-1]) / 2
    at = np.interp(np.log10(dose), centres, np.arange(len(centres)))
    low = np.minimum(at.astype(int), len(centres) - 2)
    part = (at - low)[:, None]
    crystal = np.minimum(phase, len(CRYSTALS) - 1)
    return np.asarray(sigma * ((1 - part) * factor[crystal, :, low] + part * factor[crystal, :, low + 1]))


def calibrate(network: Any, held_out: Examples, seed: int) -> NDArray[np.float64]:
    """Fit the network's novelty on ``held_out`` and return the factors of its deviations."""
    torch = torch_module()
    parts: list[tuple[Any, ...]] = []
    for batch, mean, sigma, phase, _, features in looked(network, held_out, seed):
        parts.append((mean - batch["labels"], sigma, batch["phase"], batch["dose"], phase.argmax(1), features.numpy()))
    error, sigma, phase, dose, named, features = (np.concatenate(p) for p in zip(*parts, strict=True))
    right = named == phase
    for name, value in zip(("centre", "whiten", "reach"), _familiar(features[right], phase[right]), strict=True):
        getattr(network, name).copy_(torch.from_numpy(value))
    return factors(error[right], sigma[right], phase[right], dose[right])


def _familiar(
    features: NDArray[np.float32], phase: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Centre, whitened principal directions and usual reach of the features of each phase (P. C. Mahalanobis, 1936),
    for the hidden layers and for the undiffracted beam apart."""
    kinds, hidden = len(CRYSTALS) + 1, features.shape[1] - BEAM
    centre = np.zeros((kinds, features.shape[1]), dtype=np.float32)
    whiten = np.zeros((kinds, features.shape[1], NOVELTY_DIMENSIONS + BEAM), dtype=np.float32)
    reach = np.ones((kinds, 2), dtype=np.float32)
    blocks = ((slice(0, hidden), slice(0, NOVELTY_DIMENSIONS)), (slice(hidden, None), slice(NOVELTY_DIMENSIONS, None)))
    for k in np.unique(phase):
        mine = features[phase == k].astype(np.float64)
        centre[k] = mine.mean(0)
        for part, (inputs, outputs) in enumerate(blocks):
            block = mine[:, inputs] - centre[k, inputs]
            spread = block.std(0) + 1e-6
            values, vectors = np.linalg.eigh(np.cov(block / spread, rowvar=False))
            kept = slice(None, -(outputs.stop or BEAM) - 1, -1)
            values, vectors = values[kept], vectors[:, kept]
            whiten[k, inputs, outputs] = vectors / np.sqrt(values + 1e-3 * values[0]) / spread[:, None]
            distance = np.sqrt(np.mean((block @ whiten[k, inputs, outputs]) ** 2, axis=1))
            reach[k, part] = np.quantile(distance, _WITHIN)
    return centre, whiten, reach
