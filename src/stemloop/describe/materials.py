"""Materials that an image may show, and what their lattice says about the size of its pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import UnknownName
from stemloop.core.protocols import PixelSize
from stemloop.core.structure import Assignment, Grain
from stemloop.describe.crystals import structures
from stemloop.describe.zoneaxes import Candidate, projected

Floats = NDArray[np.float64]

#: Pixel sizes that files state scatter about the truth with about this part, sometimes far more (Student's t with two
#: degrees of freedom); beyond _FARTHEST nothing is searched.
_STATED, _FARTHEST = 0.04, 0.4
#: Scan distortion: usual ones are of the first size, hardly any much larger than the second, and no scale is better
#: than the third.
_DISTORTION, _WORST, _LEAST = 0.02, 0.05, 0.01
#: Deviations from which on a size disagrees; a deviation above _BLUNT tells nothing; candidates with this part of the
#: probability must give one verdict.
_SIGNIFICANT, _BLUNT, _SURE = 3.0, 0.03, 0.9
#: A message names candidates from this probability, and so many for each verdict.
_LIKELY, _TOLD = 0.01, 4


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

    pixel_size_m, sigma_m : the size [m] that the best of the named candidates asks for and its 1-sigma deviation (of
        the lattice and of the scan, as its anisotropy shows it). Of a search, the mean over all candidates by their
        probability, with how they differ in its deviation; None where they differ by more than 3 %.
    material, zone_axis, p : the best candidate and its probability among those compared.
    ratio, ratio_sigma : that size over the stated one; None where nothing is stated or no size is given.
    verdict : ``agrees`` (within three deviations, and these small) or ``disagrees`` (beyond three), if candidates that
        together are at least 90 % likely say so; else ``unknown``.
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
    assignment : of one image. pixel_size : what was stated about it.
    candidates : what the specimen may be, as materials (``"MoS2"``: any zone axis), with zone axis (``"SrTiO3[110]"``)
        or as :class:`~stemloop.describe.zoneaxes.Candidate`; None: all known materials, and only those that the stated
        size allows within 40 %. Lattices of one shape are told apart by the stated size and the brightness of their
        sites alone, so a search is a weak check (some known material fits most sizes): the message says for which
        materials the size would be right and for which it would be wrong, and by how much. Without a stated size
        nothing is chosen.

    Raises
    ------
    UnknownName : no such material.
    """
    searched = candidates is None
    chosen = list(_all().values()) if candidates is None else named(candidates)
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


def named(wanted: Sequence[str | Candidate]) -> list[Candidate]:
    """The lattices of these materials (or of one zone axis); :class:`UnknownName` for a material that is not known."""
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


class _Reading(NamedTuple):
    """What one candidate says of the stated size: ``sigma`` is the relative deviation of its own size."""

    match: Match
    sigma: float
    verdict: str

    @property
    def off(self) -> float:
        """By how much of itself [%] the stated size is too large."""
        return 100 * (1 / self.match.ratio - 1) if self.match.ratio else 0.0

    @property
    def wrong(self) -> str:
        """Such as ``5.0 % too large``."""
        return f"{abs(self.off):.1f} % too {'large' if self.off > 0 else 'small'}"


def _reading(match: Match, lattice: float) -> _Reading:
    """``lattice`` is the relative deviation of the lattice's own size."""
    sigma = float(np.sqrt(lattice**2 + match.distortion**2 / 2 + _LEAST**2))
    if match.ratio is None:
        return _Reading(match, sigma, "unknown")
    if abs(np.log(match.ratio)) >= _SIGNIFICANT * sigma:
        return _Reading(match, sigma, "disagrees")
    return _Reading(match, sigma, "agrees" if sigma <= _BLUNT else "unknown")


def _judged(
    assignment: Assignment, chosen: list[Candidate], table: tuple[Match, ...], pixel_size: PixelSize, searched: bool
) -> Calibration:
    """The verdict on which candidates with at least 90 % of the probability agree.

    The size is that of the best of the named materials; of a search, the mean of all with a deviation that holds how
    they differ, and none where that is large.
    """
    grain = assignment.grains[0]
    relative = grain.sigma / np.hypot(*grain.vectors.T)[:, None]
    lattice = float(np.sqrt((relative**2).sum()) / 2)
    readings = [_reading(match, lattice) for match in table]
    verdict = next((v for v in ("agrees", "disagrees") if _share(readings, v) >= _SURE), "unknown")
    best = table[0]
    size, sigma = (best.pixel_size_m, readings[0].sigma) if not searched else _mean_size(readings)
    split = verdict == "unknown" and readings[0].verdict != "unknown" and pixel_size.value_m is not None
    if searched or split:
        kinds, named = len(grain.basis), "No material was named" if searched else "Several lattices were named"
        message = _several(readings, verdict, f"{_stated(pixel_size)}. {named}", kinds)
    else:
        message = _one(readings[0], verdict, pixel_size)
    zones = _zones(assignment, chosen, best)
    ratio = size / pixel_size.value_m if pixel_size.value_m else None
    wide = None if ratio is None else ratio * sigma
    vague = searched and sigma > _BLUNT
    return Calibration(
        None if vague else size,
        None if vague else size * sigma,
        best.material,
        best.zone_axis,
        best.p,
        None if vague else ratio,
        None if vague else wide,
        verdict,
        table,
        zones,
        message,
    )


def _share(readings: list[_Reading], verdict: str) -> float:
    """Part of the candidates' probability that gives this verdict."""
    whole = sum(r.match.p for r in readings)
    return sum(r.match.p for r in readings if r.verdict == verdict) / whole


def _mean_size(readings: list[_Reading]) -> tuple[float, float]:
    """Mean pixel size [m] by probability, and its relative deviation, which holds how the candidates differ."""
    p = np.array([r.match.p for r in readings])
    size = np.log([r.match.pixel_size_m for r in readings])
    mean = float(np.average(size, weights=p))
    variance = np.average((size - mean) ** 2 + np.array([r.sigma for r in readings]) ** 2, weights=p)
    return float(np.exp(mean)), float(np.sqrt(variance))


def _stated(pixel_size: PixelSize) -> str:
    return f"{1e12 * (pixel_size.value_m or 0):.2f} pm a pixel were stated ({pixel_size.source})"


def _one(reading: _Reading, verdict: str, pixel_size: PixelSize) -> str:
    """The verdict of a named material in a sentence."""
    match, sigma = reading.match, reading.sigma
    says = (
        f"The lattice of {match.material}{match.zone_axis} asks for {match.pixel_size_m * 1e12:.2f} pm a pixel "
        f"(+- {100 * sigma:.1f} %)"
    )
    if match.ratio is None:
        return f"{says}; nothing was stated."
    times = abs(np.log(match.ratio)) / sigma
    same = round(abs(reading.off), 1) == 0
    beside = "which is the same" if same else f"{reading.wrong}, which is {times:.1f} deviations"
    message = f"{says}; {_stated(pixel_size)}, {beside}."
    if verdict == "unknown":
        message += (
            f" This neither confirms nor refutes it: the scan is distorted by {100 * match.distortion:.1f} %, and its "
            "mean scale may be off by as much."
        )
    return message


def _several(readings: list[_Reading], verdict: str, head: str, kinds: int) -> str:
    """The verdict where several lattices are possible: for which the stated size is right, and for which how wrong."""
    likely = [r for r in readings if r.match.p >= _LIKELY]
    right, open_, wrong = ([r for r in likely if r.verdict == v] for v in ("agrees", "unknown", "disagrees"))
    parts = []
    if right:
        parts.append("is right for " + ", ".join(_called(r) for r in right[:_TOLD]))
    if open_:
        parts.append("may be right for " + ", ".join(_called(r) for r in open_[:_TOLD]))
    if wrong:
        parts.append("is " + ", ".join(f"{r.wrong} for {_called(r)}" for r in wrong[:_TOLD]))
    message = (
        f"{head}; among the lattices with {kinds} kind{'s' * (kinds > 1)} of columns like these, the size "
        f"{', '.join(parts)}."
    )
    if verdict == "agrees":
        return message + " So it fits what is known; only the material's name can make it sure to 1 %."
    if verdict == "disagrees":
        off = sorted((r.off for r in wrong), key=abs)
        one_way = "large" if off[0] > 0 else "small"
        both = any(o * off[0] < 0 for o in off)
        span = f"{abs(off[0]):.0f} to {abs(off[-1]):.0f} %"
        amount = f"wrong by {span}" if both else f"{span} too {one_way}"
        return f"{message} So it is {amount}, whichever it is; name the material to know by how much."
    return message + " So nothing is settled: name the material."


def _called(reading: _Reading) -> str:
    match = reading.match
    bent = f", if the scan is distorted by {100 * match.distortion:.0f} %" if match.distortion > _BLUNT else ""
    return f"{match.material}{match.zone_axis} ({100 * match.p:.0f} % likely{bent})"


def _unknown(message: str, table: tuple[Match, ...], zones: tuple[tuple[str, str, float], ...]) -> Calibration:
    best = table[0] if table else Match("", "", 0.0, None, 0.0, 0.0)
    return Calibration(None, None, best.material, best.zone_axis, best.p, None, None, "unknown", table, zones, message)
