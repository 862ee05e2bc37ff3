"""Materials that an image may show, and what their lattice says about the size of its pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import UnknownName
from stemloop.core.protocols import PixelSize
from stemloop.core.structure import Assignment, Columns, Grain
from stemloop.describe.crystals import structures
from stemloop.describe.zoneaxes import Candidate, projected

Floats = NDArray[np.float64]

#: Pixel sizes that files state scatter about the truth with about this part, sometimes far more (Student's t with two
#: degrees of freedom); beyond _FARTHEST nothing is searched.
_STATED, _FARTHEST = 0.04, 0.4
#: Scan distortion: usual ones are of the first size, hardly any much larger than the second, and no scale is better
#: than the third.
_DISTORTION, _WORST, _LEAST = 0.02, 0.05, 0.01
#: Deviations from which on a size disagrees; a deviation above _BLUNT tells nothing; _AGREEING is the least probability
#: of those that agree.
_SIGNIFICANT, _BLUNT, _AGREEING = 3.0, 0.03, 0.1


@dataclass(frozen=True)
class Match:
    """One candidate beside a lattice: pixel size [m] that it asks for and its ratio to the stated one (None if nothing
    is stated), ``distortion``, half the logarithm of the ratio of the principal stretches, and its probability ``p``
    among those that were compared."""

    material: str
    zone_axis: str
    pixel_size_m: float
    ratio: float | None
    distortion: float
    p: float


@dataclass(frozen=True)
class Calibration:
    """What the lattice says of the size of a pixel.

    pixel_size_m, sigma_m : the size [m] that the best candidate asks for and its 1-sigma deviation (of the lattice and
        of the scan, as its anisotropy shows it); None where no candidate can be chosen.
    material, zone_axis, p : the best candidate and its probability among those compared.
    ratio, ratio_sigma : that size over the stated one; None where nothing is stated.
    verdict : ``agrees`` (within three deviations, and these small), ``disagrees`` (beyond three), ``unknown``.
    candidates : those compared, the most probable first. zone_axes : (material, zone axis, p) of each grain; empty
        strings where none fits. message : the verdict in a sentence.
    """

    pixel_size_m: float | None
    sigma_m: float | None
    material: str
    zone_axis: str
    p: float
    ratio: float | None
    ratio_sigma: float | None
    verdict: str
    candidates: tuple[Match, ...]
    zone_axes: tuple[tuple[str, str, float], ...]
    message: str


@cache
def candidates() -> dict[str, Candidate]:
    """All materials along their zone axes, by name, such as ``SrTiO3[110]``."""
    found = [
        projected(material, cell, atoms, zone, name)
        for material, cell, atoms, zones in structures()
        for name, zone in zones.items()
    ]
    return {c.name: c for c in found}


def __getattr__(name: str) -> Any:
    """``CANDIDATES``, made when it is asked for."""
    if name == "CANDIDATES":
        return candidates()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ----------------------------------------------------------------------------------------------------- the check


def check_pixel_size(
    assignment: Assignment,
    columns: Columns,
    pixel_size: PixelSize,
    candidates: Sequence[str | Candidate] | None = None,
) -> Calibration:
    """Compare the size of a pixel that was stated with the one that the lattice of a known material asks for.

    A candidate's lattice, turned and scaled, is laid on that of the largest grain. The isotropic part of the
    deformation between them is the pixel size; the rest (a stretch and a shear) is scan distortion. It is
    evidence against the candidate, and part of the deviation, because a scan that is distorted is as much off in its
    mean scale: of the four independent errors of a linear scan two are seen as the distortion e, one is a turn, and the
    mean scale has the deviation e / sqrt(2). Number, places and brightness of the sites are further evidence.

    Parameters
    ----------
    assignment, columns : of one image. pixel_size : what was stated about it.
    candidates : what the specimen may be, as materials (``"MoS2"``: any zone axis), with zone axis (``"SrTiO3[110]"``)
        or as :class:`~stemloop.describe.zoneaxes.Candidate`; None: all known materials, and only those that the stated
        size allows within 40 %. Lattices of one shape cannot be told apart without a stated size (all square ones are
        alike): then nothing is chosen and the table says what each would mean.

    Raises
    ------
    UnknownName : no such material.
    """
    searched = candidates is None
    chosen = list(_all().values()) if candidates is None else _named(candidates)
    stated = pixel_size.value_m
    if not assignment.grains:
        return _unknown("The image shows no lattice; the size of its pixels cannot be checked.", (), ())
    grain = assignment.grains[0]
    filled = _filled(assignment, 0)
    score, size, odd = (np.array(v) for v in zip(*(_beside(grain, filled, c) for c in chosen), strict=True))
    ratio = size / stated if stated else np.full(len(size), np.nan)
    if stated and searched:
        score = score - 1.5 * np.log1p((np.log(ratio) / _STATED) ** 2 / 2)
        score[np.abs(ratio - 1) > _FARTHEST] = -np.inf
    if not np.isfinite(score).any():
        return _unknown("No known material has a lattice near this one at the stated size of a pixel.", (), ())
    p = np.exp(score - score.max())
    p /= p.sum()
    table = tuple(
        Match(c.material, c.zone_axis, float(s), float(r) if stated else None, float(d), float(q))
        for _, c, s, r, d, q in sorted(
            zip(range(len(chosen)), chosen, size, ratio, odd, p, strict=True), key=lambda row: (-row[5], row[0])
        )
        if q > 1e-4
    )
    if stated is None and searched:
        return _unknown(
            f"Nothing says how large a pixel is, and {len(table)} known lattices have this shape; name the material.",
            table,
            _zones(assignment, chosen, table[0]),
        )
    return _judged(assignment, chosen, table, pixel_size, searched)


def _all() -> dict[str, Candidate]:
    return candidates()


def _named(wanted: Sequence[str | Candidate]) -> list[Candidate]:
    found: list[Candidate] = []
    for one in wanted:
        if isinstance(one, Candidate):
            found.append(one)
            continue
        fitting = [c for c in _all().values() if one in (c.name, c.material)]
        if not fitting:
            materials = ", ".join(dict.fromkeys(c.material for c in _all().values()))
            raise UnknownName(f"no lattice is known for {one!r}; known: {materials} (each also with a zone axis).")
        found += fitting
    if not found:
        raise UnknownName("the list of candidates is empty; name a material, or give None to search all.")
    return found


def _filled(assignment: Assignment, grain: int) -> Floats:
    """(k,) columns of each site of a grain, in units of the most."""
    count = np.bincount(assignment.site[assignment.grain == grain], minlength=len(assignment.grains[grain].basis))
    return np.asarray(count / max(count.max(), 1))


@cache
def _unimodular() -> Floats:
    """(m, 2, 2) whole-number matrices with entries -1, 0, 1 of determinant 1 or -1."""
    every = np.array(list(itertools.product((-1, 0, 1), repeat=4)), dtype=np.float64).reshape(-1, 2, 2)
    return np.asarray(every[np.abs(np.abs(np.linalg.det(every)) - 1) < 1e-9])


def _deformed(grain: Grain, candidate: Candidate) -> tuple[float, float]:
    """Pixels per metre of the candidate's lattice on the image, and its distortion."""
    known = np.linalg.inv(_unimodular() @ (candidate.vectors_A * 1e-10))
    large, small = np.moveaxis(np.linalg.svd(known @ grain.vectors, compute_uv=False), -1, 0)
    distortion = 0.5 * np.log(large / small)
    best = int(distortion.argmin())
    return float(np.sqrt(large[best] * small[best])), float(distortion[best])


def _beside(grain: Grain, filled: Floats, candidate: Candidate) -> tuple[float, float, float]:
    """Logarithm of the evidence for a candidate, its pixel size [m], its distortion."""
    scale, distortion = _deformed(grain, candidate)
    score = -1.5 * np.log1p((distortion / _DISTORTION) ** 2) - 0.5 * (distortion / _WORST) ** 2
    seen, known = _distances(grain.basis, grain.vectors), _distances(candidate.basis, candidate.vectors_A)
    used = min(len(seen), len(known))
    if used:
        score -= float(np.sum(np.minimum(0.5 * ((seen[:used] - known[:used]) / 0.06) ** 2, 8.0)))
        bright = np.log(np.maximum(grain.amplitude[1 : used + 1], 1e-12) / grain.amplitude[0])
        score -= float(np.sum(np.minimum(0.5 * ((bright - np.log(candidate.weight[1 : used + 1])) / 0.5) ** 2, 4.0)))
    there = np.zeros(len(candidate.weight))
    there[: used + 1] = np.minimum(filled[: used + 1], 1.0)
    score -= 6.0 * float((candidate.weight * (1 - there)).sum())  # what is bright would have been seen
    score -= 4.0 * float(filled[used + 1 :].sum())  # what is seen would have to be there
    return float(score), 1 / scale, distortion


def _distances(basis: Floats, vectors: Floats) -> Floats:
    """(k - 1,) distance of each further site from the nearest first one, in units of the root of the cell's area."""
    root = np.sqrt(abs(np.linalg.det(vectors)))
    shifts = np.array(list(itertools.product((-1, 0, 1), repeat=2)))
    every = (basis[1:, None] - np.rint(basis[1:, None]) + shifts) @ vectors
    return np.asarray(np.hypot(every[..., 0], every[..., 1]).min(axis=1) / root)


def _zones(assignment: Assignment, chosen: list[Candidate], best: Match) -> tuple[tuple[str, str, float], ...]:
    """The zone axis of the best material in each grain, the pixel size being that of the first grain."""
    out = [(best.material, best.zone_axis, best.p)]
    mine = [c for c in chosen if c.material == best.material]
    for number, grain in enumerate(assignment.grains[1:], start=1):
        scores = []
        for c in mine:
            value, size, _ = _beside(grain, _filled(assignment, number), c)
            scores.append(value - 0.5 * (np.log(size / best.pixel_size_m) / 0.03) ** 2)
        p = np.exp(np.array(scores) - max(scores))
        k = int(p.argmax())
        fits = scores[k] > -12
        out.append((best.material, mine[k].zone_axis, float(p[k] / p.sum())) if fits else ("", "", 0.0))
    return tuple(out)


def _judged(
    assignment: Assignment, chosen: list[Candidate], table: tuple[Match, ...], pixel_size: PixelSize, searched: bool
) -> Calibration:
    """The verdict on the best candidate; of a search, the best that agrees if those that do are not improbable."""
    grain = assignment.grains[0]
    relative = grain.sigma / np.hypot(*grain.vectors.T)[:, None]
    lattice = float(np.sqrt((relative**2).sum()) / 2)

    def deviation(match: Match) -> float:
        return float(np.sqrt(lattice**2 + match.distortion**2 / 2 + _LEAST**2))

    agreeing = [m for m in table if m.ratio and abs(np.log(m.ratio)) < _SIGNIFICANT * deviation(m)]
    some = searched and sum(m.p for m in agreeing) >= _AGREEING
    best = agreeing[0] if some else table[0]
    sigma, size = deviation(best), best.pixel_size_m
    says = (
        f"The lattice of {best.material}{best.zone_axis} asks for {size * 1e12:.2f} pm a pixel (+- {100 * sigma:.1f} %)"
    )
    ratio, wide, verdict = best.ratio, None, "unknown"
    if pixel_size.value_m is None or ratio is None:
        message = f"{says}; nothing was stated."
    else:
        wide, times = ratio * sigma, abs(np.log(ratio)) / sigma
        off = 100 * (1 / ratio - 1)
        message = f"{says}; {pixel_size.value_m * 1e12:.2f} pm were stated ({pixel_size.source}), "
        if abs(off) < 0.05:
            message += "which is the same."
        else:
            message += f"{abs(off):.1f} % too {'large' if off > 0 else 'small'}, which is {times:.1f} deviations."
        if times >= _SIGNIFICANT:
            verdict = "disagrees"
        elif sigma <= _BLUNT:
            verdict = "agrees"
        else:
            message += f" A scan distorted by {100 * best.distortion:.1f} % can explain that much."
    if searched and len(table) > 1:
        others = ", ".join(f"{m.material}{m.zone_axis} {100 * m.p:.0f} %" for m in table[:4])
        message += f" By its shape and size the lattice may be {others}."
    zones = _zones(assignment, chosen, best)
    return Calibration(
        size, size * sigma, best.material, best.zone_axis, best.p, ratio, wide, verdict, table, zones, message
    )


def _unknown(message: str, table: tuple[Match, ...], zones: tuple[tuple[str, str, float], ...]) -> Calibration:
    best = table[0] if table else Match("", "", 0.0, None, 0.0, 0.0)
    return Calibration(None, None, best.material, best.zone_axis, best.p, None, None, "unknown", table, zones, message)
