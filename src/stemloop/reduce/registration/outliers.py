"""Frames that are not of the stack."""

from __future__ import annotations

import numpy as np

from stemloop.reduce.registration.content import Stack
from stemloop.reduce.registration.refinement import Fit
from stemloop.reduce.registration.views import Thin


def unlike(reasons: list[str], views: Thin) -> list[str]:
    """Names the frames whose mean level is not of this stack: blank ones and floods."""
    good = np.array([not reason for reason in reasons])
    if good.sum() < 3:
        return reasons
    level = views.mean(axis=(1, 2))
    least = float(views[good].min())
    middle = float(np.median(level[good]))
    spread = float(np.median(np.abs(level[good] - middle))) / 0.6745
    out = list(reasons)
    for k in np.flatnonzero(good):
        away = abs(level[k] - middle) > 8 * spread
        if away and level[k] - min(least, 0.0) < 0.2 * (middle - min(least, 0.0)):
            out[k] = f"blank: its mean is {level[k]:.3g} where the others have {middle:.3g}"
        elif away and level[k] > 5 * abs(middle):
            out[k] = f"flooded: its mean is {level[k]:.3g} where the others have {middle:.3g}"
    return out


def mismatch(fit: Fit, stack: Stack) -> str:
    """Why a refined view is an outlier, or nothing."""
    if fit.strength < 0.3:
        return "matches no other frame"
    if (np.abs(fit.place) > np.array(stack.shape) // 2 - 1).any():
        return "beyond reach: more than half a field away"
    if fit.alike < 0.7:
        return f"corrupt: {100 * (1 - fit.alike):.0f} % of its area does not match the other frames"
    return ""
