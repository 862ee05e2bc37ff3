"""Patterns a second of the twin beside plain abTEM multislice, in CPU seconds of one core, in one process.

Both simulate coherent CBED patterns of the same specimen on the same 128 x 128 grid with the potential built
beforehand: for abTEM those of 32 A windows, for the twin that of the whole field. abTEM is asked for one position, as
an adaptive scan asks, and for sixteen positions of one window at once, as suits it best. A finite source with frozen
phonons, and counting, are timed for the twin alone. ``difference_R1`` has the windows' edges in it, which are cut in
abTEM's potentials and whole in the twin's.

    OMP_NUM_THREADS=1 python benchmarks/twin.py
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import abtem
import numpy as np
import pyfftw

from stemloop.core.instruction import Diffraction, Optics
from stemloop.simulate.imaging import WINDOW_A, Scattering
from stemloop.simulate.specimens import MARGIN_A, SPECIMENS
from stemloop.simulate.twin import SETTINGS, Twin

PATTERNS, WINDOWS = 60, 4


def median_cpu_s(work: Callable[[int], Any], repeats: int) -> float:
    work(0)  # plans, probes and propagators are made at the first call by both
    seconds = []
    for i in range(repeats):
        start = time.process_time()
        work(i)
        seconds.append(time.process_time() - start)
    return float(np.median(seconds))


def transform_cpu_s(repeats: int = 2000) -> float:
    wave = pyfftw.zeros_aligned((128, 128), "complex64")
    plan = pyfftw.FFTW(wave, wave, axes=(0, 1), flags=("FFTW_ESTIMATE",))
    start = time.process_time()
    for _ in range(repeats):
        plan.execute()
    return (time.process_time() - start) / repeats


def abtem_windows(sample: Any, energy_eV: float, places: np.ndarray) -> list[tuple[Any, np.ndarray]]:
    """Built potentials of the windows around ``places`` and the probe's position (y, x) [A] inside each."""
    windows = []
    for place in places:
        corner = np.round((place * 1e10 + MARGIN_A) / 0.25) * 0.25 - WINDOW_A / 2
        atoms = sample.atoms.copy()
        atoms.positions[:, 1::-1] -= corner
        atoms = atoms[np.all((atoms.positions[:, :2] >= 0) & (atoms.positions[:, :2] < WINDOW_A), axis=1)]
        atoms.set_cell([WINDOW_A, WINDOW_A, sample.atoms.cell[2, 2]])
        atoms.pbc = True
        potential = abtem.Potential(
            atoms, gpts=128, slice_thickness=sample.crystal.slice_A, projection="infinite", parametrization="lobato"
        ).build(lazy=False)
        windows.append((potential, place * 1e10 + MARGIN_A - corner))
    return windows


def one(name: str) -> dict[str, float]:
    sample, setting = SPECIMENS[name](0), SETTINGS[name]
    places = np.random.default_rng(0).uniform(0.1, 0.9, (PATTERNS, 2)) * sample.field_m
    start = time.process_time()
    scattering = Scattering(sample, setting.energy_eV)
    potentials_s = time.process_time() - start
    windows = abtem_windows(sample, setting.energy_eV, places[:WINDOWS])
    probe = abtem.Probe(
        energy=setting.energy_eV, semiangle_cutoff=setting.diffraction_rad * 1e3, gpts=128, extent=WINDOW_A
    )

    def with_abtem(i: int) -> np.ndarray:
        potential, (y, x) = windows[i % WINDOWS]
        wave = probe.multislice(potential, scan=abtem.CustomScan([[x, y]]), lazy=False)
        return np.asarray(np.squeeze(wave.diffraction_patterns(max_angle=None).array))[32:96, 32:96].T

    ours_s = median_cpu_s(lambda i: scattering.cbed(tuple(places[i]), setting.diffraction_rad), PATTERNS)
    abtem_s = median_cpu_s(with_abtem, PATTERNS)

    def sixteen(i: int) -> None:
        potential, (y, x) = windows[i % WINDOWS]
        around = [[x + dx, y + dy] for dx in range(4) for dy in range(4)]
        wave = probe.multislice(potential, scan=abtem.CustomScan(around), lazy=False)
        wave.diffraction_patterns(max_angle=None)

    batched_s = median_cpu_s(sixteen, PATTERNS // 6) / 16

    theirs = with_abtem(1)
    ours = scattering.cbed(tuple(places[1]), setting.diffraction_rad)
    difference = float(np.abs(ours / ours.sum() - theirs / theirs.sum()).sum())

    twin = Twin(sample, seed=0)
    twin.execute(Optics(semiangle_rad=setting.diffraction_rad), "optics")
    twin_s = median_cpu_s(lambda i: twin.execute(Diffraction((tuple(places[i]),), 1e-3), str(i)), PATTERNS)
    # the physical limit of multislice on this grid: its Fourier transforms and nothing else
    transforms = 2 * round(sample.atoms.cell[2, 2] / scattering.slice_A)
    limit_s = transforms * transform_cpu_s()
    return {
        "abtem_cbed_ms": abtem_s * 1e3,
        "twin_cbed_ms": ours_s * 1e3,
        "abtem_batched_cbed_ms": batched_s * 1e3,
        "ratio": abtem_s / ours_s,
        "ratio_to_batched": batched_s / ours_s,
        "twin_cbed_per_cpu_s": 1 / ours_s,
        "twin_counted_source_phonons_ms": twin_s * 1e3,
        "source_points": setting.source_points,
        "transforms_per_coherent_cbed": transforms,
        "share_of_the_limit": limit_s / ours_s,
        "difference_R1": difference,
        "potentials_of_the_field_s": potentials_s,
    }


def main() -> None:
    result = {
        "what": "CBED 128x128 grid, 64x64 kept; CPU time of one core, medians",
        "python": platform.python_version(),
        "abtem": abtem.__version__,
        "specimens": {name: one(name) for name in SPECIMENS},
    }
    text = json.dumps(result, indent=2)
    print(text)
    out = Path(__file__).parent / "results"
    out.mkdir(exist_ok=True)
    (out / "twin.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
