"""What an analysis found, as plain numbers (``summary.json``) and as sentences."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from stemloop import __version__
from stemloop.campaign.images.motion import told as motion_told
from stemloop.campaign.images.one_image import Understood
from stemloop.campaign.images.overlay import told as overlay_told
from stemloop.core.plain import jsonable
from stemloop.core.structure import Defect, Grain

if TYPE_CHECKING:
    from stemloop.campaign.images.analysis import Analysis

#: Trust in the size of a pixel, in words.
TRUST = {
    "stated": "not checked by the lattice",
    "doubtful": "doubtful",
    "checked": "the lattice agrees",
    "refuted": "the lattice disagrees",
    "none": "not known",
}
_MOST_DEFECTS = 2000
#: Significant digits of a number in the summary.
DIGITS = 7


def summarise(analysis: Analysis, sha256: str, parameters: dict[str, Any], files: list[str]) -> dict[str, Any]:
    """Everything of an analysis that is not an array. The same analysis gives the same words and numbers."""
    found, size = analysis.found, analysis.pixel_size
    pixel_m = size.value_m
    sigma = precision_px(found)
    told: dict[str, Any] = {
        "file": analysis.name,
        "sha256": sha256,
        "version": __version__,
        "parameters": parameters,
        "frames": analysis.shape[0],
        "shape_px": list(analysis.shape[1:]),
        "image_px": list(found.shape),
        "pixel_size": {
            "nm": None if pixel_m is None else _plain(1e9 * pixel_m),
            "source": size.source,
            "trust": size.trust,
        },
        "calibration": _calibration(found),
        "columns": len(found.columns),
        "vacant": 0 if found.assignment is None else len(found.assignment.vacant),
        "precision_px": sigma,
        "precision_pm": None if sigma is None or pixel_m is None else _plain(1e12 * pixel_m * sigma),
        "lattices": lattices(found, pixel_m),
        "phases": phases(found),
        "defects": [defect(d) for d in found.defects[:_MOST_DEFECTS]],
        "defects_of_kind": dict(sorted(Counter(d.kind for d in found.defects).items())),
        "polarisation": polarisation(found, pixel_m),
        "bad_frames": {str(k): why for k, why in sorted(analysis.bad.items())},
    }
    if analysis.registration is not None:
        told["drift"] = drift(analysis)
    if analysis.motion is not None:
        told["dynamics"] = motion_told(analysis.motion, pixel_m)
    if analysis.remembered is not None:
        told["library"] = {
            "elements_before": analysis.remembered.size,
            "looked_up": [
                {
                    "what": one.what,
                    "place_px": [_plain(v) for v in one.place],
                    "seen": [{k: v for k, v in other.items() if k != "patch"} for other in one.others],
                }
                for one in analysis.remembered.seen
            ],
        }
    if analysis.overlay is not None:
        told["map"] = overlay_told(analysis.overlay)
    told["notes"] = list(analysis.notes)
    told["left_out"] = [f"{part}: {why}" for part, why in analysis.left_out]
    told["files"] = files
    return told


def _plain(value: Any) -> float | None:
    """A number to as many digits as the summary says."""
    number: float | None = jsonable(float(value), DIGITS)
    return number


def precision_px(found: Understood) -> float | None:
    """Median deviation of a column's place along an axis [px]."""
    return _plain(np.median(found.columns.sigma)) if len(found.columns) else None


def lattices(found: Understood, pixel_m: float | None) -> list[dict[str, Any]]:
    """The lattices of an image, the largest first."""
    if found.assignment is None:
        return []
    return [_lattice(grain, k, found, pixel_m) for k, grain in enumerate(found.assignment.grains)]


def _lattice(grain: Grain, k: int, found: Understood, pixel_m: float | None) -> dict[str, Any]:
    assert found.assignment is not None
    member = found.assignment.grain == k
    lengths = np.linalg.norm(grain.vectors, axis=1)
    units = grain.vectors / lengths[:, None]
    sigma = np.sqrt(((units * grain.sigma) ** 2).sum(axis=1))
    cosine = float(np.clip(units[0] @ units[1], -1, 1))
    told: dict[str, Any] = {
        "columns": int(member.sum()),
        "a1_px": _plain(lengths[0]),
        "a2_px": _plain(lengths[1]),
        "sigma_px": [_plain(s) for s in sigma],
        "angle_deg": _plain(np.degrees(np.arccos(cosine))),
        "rotation_deg": _plain(np.degrees(grain.rotation_rad)),
        "sites": [
            {
                "place": [_plain(v) for v in place],
                "brightness": _plain(bright),
                "columns": int((member & (found.assignment.site == s)).sum()),
            }
            for s, (place, bright) in enumerate(zip(grain.basis, grain.amplitude, strict=True))
        ],
    }
    if pixel_m is not None:
        told["a1_nm"], told["a2_nm"] = (_plain(1e9 * pixel_m * length) for length in lengths)
    return told


def _calibration(found: Understood) -> dict[str, Any] | None:
    one = found.calibration
    if one is None:
        return None
    return {
        "verdict": one.verdict,
        "message": one.message,
        "pixel_size_nm": None if one.pixel_size_m is None else _plain(1e9 * one.pixel_size_m),
        "sigma_nm": None if one.sigma_m is None else _plain(1e9 * one.sigma_m),
        "material": one.material,
        "zone_axis": jsonable(one.zone_axis, DIGITS),
        "p": None if one.p is None else _plain(one.p),
        "ratio": None if one.ratio is None else _plain(one.ratio),
        "ratio_sigma": None if one.ratio_sigma is None else _plain(one.ratio_sigma),
    }


def phases(found: Understood) -> list[dict[str, Any]]:
    """Name and share of the columns of each phase."""
    if found.phases is None or not len(found.columns):
        return []
    label, names = found.phases.label, phase_names(found)
    return [
        {
            "name": name,
            "description": str(found.phases.description[k]),
            "columns": int((label == k).sum()),
            "share": _plain(np.mean(label == k)),
        }
        for k, name in enumerate(names)
    ]


def phase_names(found: Understood) -> list[str]:
    """What the phases are called."""
    if found.phases is None:
        return []
    names = [str(name) for name in found.phases.names]
    return names or [f"phase {k + 1}" for k in range(int(found.phases.label.max(initial=-1)) + 1)]


def polarisation(found: Understood, pixel_m: float | None) -> dict[str, Any] | None:
    """Middle length of the polar vectors and how many of them are significant."""
    if found.polar is None or not len(found.polar.vector):
        return None
    length, sigma = np.linalg.norm(found.polar.vector, axis=1), np.linalg.norm(found.polar.sigma, axis=1)
    known = np.isfinite(length) & np.isfinite(sigma)
    if not known.any():
        return None
    middle = float(np.median(length[known]))
    return {
        "cells": int(known.sum()),
        "median_px": _plain(middle),
        "median_pm": None if pixel_m is None else _plain(1e12 * pixel_m * middle),
        "significant_share": _plain(np.mean(length[known] > 3 * sigma[known] / np.sqrt(2))),
    }


def defect(one: Defect) -> dict[str, Any]:
    """A defect as plain numbers."""
    place = np.atleast_2d(one.place)
    return {
        "kind": one.kind,
        "place_px": [[_plain(v) for v in point] for point in place],
        "p": _plain(one.p),
        "detail": jsonable(one.detail, DIGITS),
    }


def drift(analysis: Analysis) -> dict[str, Any]:
    """How far the frames lie apart."""
    shift, good = analysis.registration.shift, np.isfinite(analysis.registration.shift).all(axis=1)
    steps = np.linalg.norm(np.diff(shift[good], axis=0), axis=1)
    span = np.ptp(shift[good], axis=0) if good.any() else np.zeros(2)
    return {
        "frames_used": int(good.sum()),
        "span_px": [_plain(v) for v in span],
        "largest_step_px": _plain(steps.max()) if len(steps) else None,
        "doubtful_frames": int((analysis.registration.p[good] < 0.9).sum()),
        "median_sigma_px": _plain(np.nanmedian(analysis.registration.sigma[good])) if good.any() else None,
    }


# --------------------------------------------------------------------------------------------------------- sentences


def length(px: float, pixel_m: float | None) -> str:
    """A length in words.

    >>> length(0.2, 15e-12), length(26.0, 15e-12), length(0.2, None)
    ('3.0 pm', '0.3900 nm', '0.20 px')
    """
    if pixel_m is None:
        return f"{px:.2f} px"
    metres = px * pixel_m
    return f"{metres * 1e12:.1f} pm" if metres < 1e-10 else f"{metres * 1e9:.4f} nm"


def kinds_of_defects(number: dict[str, int]) -> str:
    """How many there are of each kind, in words; empty if there are none.

    >>> kinds_of_defects({"grain-boundary": 2, "dislocation": 1, "vacancy": 3, "vortex": 2})
    '2 grain boundaries, 1 dislocation, 3 vacancies, 2 vortices'
    """
    return ", ".join(f"{n} {_several(kind, n)}" for kind, n in number.items())


def _several(kind: str, n: int) -> str:
    word = kind.replace("-", " ")
    if n == 1:
        return word
    if word.endswith("y"):
        return f"{word[:-1]}ies"
    return f"{word[:-2]}ices" if word.endswith("ex") else f"{word}s"


def within(value: float, sigma: float | None) -> str:
    """A number and its deviation, to two digits of that.

    >>> within(0.390414, 0.000032), within(37.62, 0.9), within(2.0, None)
    ('0.390414 ± 0.000032', '37.62 ± 0.90', '2')
    """
    if sigma is None or not np.isfinite(sigma) or sigma <= 0:
        return f"{value:.3g}"
    digits = max(0, 1 - int(np.floor(np.log10(sigma))))
    return f"{value:.{digits}f} ± {sigma:.{digits}f}"


def calibration_sentence(analysis: Analysis) -> str:
    """The verdict on the size of a pixel, for a reader who knows nothing of it."""
    one, size = analysis.found.calibration, analysis.pixel_size
    if one is not None and one.message:
        return str(one.message)
    if size.value_m is None:
        return "Nothing says how large a pixel is, and no lattice could tell: lengths are in pixels."
    return (
        f"A pixel is {1e12 * size.value_m:.4g} pm by the {'user' if size.source == 'user' else size.source}; "
        f"{TRUST[size.trust]}."
    )


def lattice_sentence(told: dict[str, Any]) -> str:
    """A lattice in words."""
    nm = "a1_nm" in told
    one, two = (
        f"{told[key]:.4f} nm" if nm else f"{told[key]:.2f} px"
        for key in (("a1_nm", "a2_nm") if nm else ("a1_px", "a2_px"))
    )
    return (
        f"{one} × {two}, {told['angle_deg']:.1f}°, turned by {told['rotation_deg']:.1f}°, "
        f"{len(told['sites'])} site{'s' * (len(told['sites']) > 1)} a cell, {told['columns']} columns"
    )


def sentences(analysis: Analysis) -> list[tuple[str, str]]:
    """(about what, sentence): the result in a few lines."""
    s, found = analysis.summary, analysis.found
    sigma = s["precision_px"]
    precision = "" if sigma is None else f", typically known to {length(sigma, analysis.pixel_size.value_m)}"
    told = [("columns", f"{s['columns']} atom columns{precision}")]
    told += [("lattice", lattice_sentence(one)) for one in s["lattices"][:4]]
    if not s["lattices"]:
        told.append(("lattice", "none"))
    told.append(("pixel", calibration_sentence(analysis)))
    if len(s["phases"]) > 1:
        told.append(("phases", ", ".join(f"{p['name']} ({100 * p['share']:.0f} %)" for p in s["phases"])))
    kinds = kinds_of_defects(s["defects_of_kind"])
    if found.assignment is not None and found.assignment.grains:
        told.append(("defects", kinds or "none"))
    if analysis.bad:
        listed = "; ".join(f"{k}: {why}" for k, why in list(sorted(analysis.bad.items()))[:5])
        more = "" if len(analysis.bad) <= 5 else f" (and {len(analysis.bad) - 5} more)"
        told.append(("bad", f"{len(analysis.bad)} of {analysis.shape[0]} frames: {listed}{more}"))
    told += [("note", note) for note in analysis.notes]
    told += [("left out", f"{part}: {why}") for part, why in analysis.left_out]
    return told
