"""The part of the network's error that all patterns of a run share.

A Gaussian process averages over neighbours, so it believes in what it is told to be independent. Errors of a network
are not: part of each is the same for all patterns of one specimen under one beam (a drifted focus, a detail that no
training pattern had), and no number of points removes it. It is measured like any systematic error, on reference
samples that play no part in a result: ``python -m stemloop.campaign.shared_error`` images seeds of the twin's
specimens that are set aside, and writes the deviation of the shared part beside the weights.

With ``e_fi`` the error of pattern i of sample f, ``n`` patterns a sample, the variance of the shared part is that of
``mean_i e_fi`` over samples about zero, less what independent errors leave in it: ``mean_f (mean_i e_fi)^2 -
mean_f var_i(e_fi) / n``, at least 0 (one-way random effects; H. Scheffe, *The Analysis of Variance* (1959), ch. 7).
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.campaign.recipes import BEAMS
from stemloop.core.instruction import Diffraction, Optics
from stemloop.core.units import electrons
from stemloop.describe.patterns import PatternDescriber
from stemloop.simulate.specimens import SPECIMENS
from stemloop.simulate.twin import Twin

#: Seeds of specimens that are kept for this and for nothing else, and how many patterns of each.
RESERVED_SEEDS = range(1000, 1010)
PATTERNS = 64


def shared_deviation(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Deviation (q,) of the shared part of ``errors`` (samples, patterns, q).

    >>> rng = np.random.default_rng(0)
    >>> errors = rng.normal(size=(2000, 1, 1)) + 3 * rng.normal(size=(2000, 50, 1))
    >>> round(float(shared_deviation(errors)[0]), 1)
    1.0
    """
    means = errors.mean(axis=1)
    left = errors.var(axis=1, ddof=1).mean(axis=0) / errors.shape[1]
    return np.sqrt(np.maximum((means**2).mean(axis=0) - left, 0.0))


def sample_errors(specimen: str, seed: int, describer: PatternDescriber, patterns: int) -> NDArray[np.float64]:
    """Errors (patterns, 7) of the describer at random places of one specimen, under its own beam."""
    beam, twin = BEAMS[specimen], Twin(specimen, seed)
    rng = np.random.default_rng([seed, 7])
    positions = rng.uniform(0.02, 0.98, (patterns, 2)) * twin.info.field_m
    twin.execute(Optics(semiangle_rad=beam.semiangle_rad, current_A=beam.current_A), f"optics-{seed}")
    asked = Diffraction(tuple((float(y), float(x)) for y, x in positions), beam.dwell_s)
    frames = twin.execute(asked, f"reference-{seed}").frames
    info = twin.info
    assert frames is not None and info.camera is not None
    found = describer(
        np.asarray(frames, np.float32),
        info.camera,
        info.energy_eV,
        beam.semiangle_rad,
        electrons(beam.current_A, beam.dwell_s),
        twin.sample.rotation_rad,
    )
    return found.mean - twin.sample.truth(positions).mean


def main() -> int:
    """Measure the shared part for every specimen and write it beside the weights."""
    describer = PatternDescriber()
    measured: dict[str, Any] = {
        "seeds": [RESERVED_SEEDS.start, RESERVED_SEEDS.stop - 1],
        "patterns": PATTERNS,
        "deviation": {},
    }
    for specimen in SPECIMENS:
        errors = np.stack([sample_errors(specimen, seed, describer, PATTERNS) for seed in RESERVED_SEEDS])
        measured["deviation"][specimen] = [float(f"{v:.3g}") for v in shared_deviation(errors)]
        print(specimen, np.array2string(shared_deviation(errors)[:4] * 100, precision=3), "% (e_mean e_diff e_xy w)")
    describer.shared_path.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
