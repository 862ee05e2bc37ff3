"""When an experiment has learned enough, or has spent enough.

A stop rule takes a :class:`~stemloop.core.protocols.Progress` and answers one word, the reason, or None to go on.
"""

from __future__ import annotations

import math

from stemloop.core.errors import InputError
from stemloop.core.protocols import Progress, StopRule


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} must be a finite number above zero; got {value!r}.")
    return value


def wanted_sigma(target: float, *, at_least: int = 10) -> StopRule:
    """Stop ("uncertainty") when the largest deviation over the field is at most ``target`` [the property's unit].

    Before ``at_least`` points the hyperparameters are hardly known and no deviation is believed.
    """
    _positive("target", target)
    _positive("at_least", at_least)

    def rule(progress: Progress) -> str | None:
        return "uncertainty" if progress.points >= at_least and progress.sigma <= target else None

    return rule


def max_points(points: int) -> StopRule:
    """Stop ("points") when ``points`` positions have been measured."""
    _positive("points", points)
    return lambda progress: "points" if progress.points >= points else None


def max_electrons(electrons: float) -> StopRule:
    """Stop ("dose") when the specimen has been given ``electrons``."""
    _positive("electrons", electrons)
    return lambda progress: "dose" if progress.electrons >= electrons else None


def max_seconds(seconds: float) -> StopRule:
    """Stop ("time") when ``seconds`` have passed."""
    _positive("seconds", seconds)
    return lambda progress: "time" if progress.seconds >= seconds else None


def first_of(*rules: StopRule) -> StopRule:
    """Stop as soon as one of ``rules`` says so; where several do, the first in the list gives the reason."""
    if not rules:
        raise InputError("an experiment without a stop rule never ends: give at least one.")

    def rule(progress: Progress) -> str | None:
        return next((reason for each in rules if (reason := each(progress)) is not None), None)

    return rule
