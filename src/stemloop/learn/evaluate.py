"""What a trained network is worth, measured on patterns that it never saw."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.structure import PHASES, SITES
from stemloop.learn.calibrate import looked, scaled
from stemloop.learn.examples import Examples
from stemloop.learn.network import CRYSTALS

NAMES = ("v_mean", "v_diff", "v_xy", "phi_rad", "thickness_m", "tilt_y_rad", "tilt_x_rad")
#: Edges of the bins of electrons a pattern that coverage is told for.
DOSES = (1e4, 1e5, 5e5, 3e6)


def measured(
    network: Any,
    examples: Examples,
    factors: NDArray[np.float64],
    seed: int,
    dose: float | None = None,
    blur_px: float | None = None,
) -> dict[str, NDArray[Any]]:
    """Errors (n, 7), calibrated sigma (n, 7), true and named phase and site, dose and novelty of ``examples``.

    ``dose`` and ``blur_px`` are those of every pattern; None draws them as the training does.
    """
    parts: list[tuple[NDArray[Any], ...]] = []
    for batch, mean, sigma, phase, site, features in looked(network, examples, seed, dose, blur_px):
        named = phase.argmax(1)
        novelty = network.distance(features, named).numpy()
        spread = scaled(sigma, named, batch["dose"], factors)
        error = mean - batch["labels"]
        parts.append((error, spread, batch["phase"], named, batch["site"], site.argmax(1), batch["dose"], novelty))
    keys = ("error", "sigma", "phase", "named", "site", "named_site", "dose", "novelty")
    return dict(zip(keys, (np.concatenate(p) for p in zip(*parts, strict=True)), strict=True))


def _quantities(error: NDArray[np.float64], sigma: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    within = np.abs(error) <= 2 * sigma
    return {
        name: {
            "rms error": float(np.sqrt(np.mean(error[:, i] ** 2))),
            "median sigma": float(np.median(sigma[:, i])),
            "within 2 sigma": float(within[:, i].mean()),
        }
        for i, name in enumerate(NAMES)
    }


def table(found: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """The numbers of a model card: for each crystal errors, deviations and coverage, over all and by dose."""
    out: dict[str, Any] = {}
    for p, name in enumerate(PHASES):
        mine = found["phase"] == p
        if not mine.any():
            continue
        right = mine & (found["named"] == p)
        out[name] = {
            "patterns": int(mine.sum()),
            "phase right": float(right.sum() / mine.sum()),
            "novelty above 3": float(np.mean(found["novelty"][mine] > 3)),
            "novelty median": float(np.median(found["novelty"][mine])),
        }
        if p >= len(CRYSTALS) or not right.any():
            continue
        out[name]["all doses"] = _quantities(found["error"][right], found["sigma"][right])
        for low, high in itertools.pairwise(DOSES):
            here = right & (found["dose"] >= low) & (found["dose"] < high)
            if here.sum() >= 50:
                out[name][f"{low:g} to {high:g} electrons"] = _quantities(found["error"][here], found["sigma"][here])
        for s, site in enumerate(SITES):
            there = right & (found["site"] == s)
            if there.sum() >= 20:
                out[name][f"{site} found"] = float(np.mean(found["named_site"][there] == s))
    return out
