"""From our coordinates to Nion's and back.

Ours: (y, x) [m] from the top-left corner of the field, which may be turned about its centre. Nion's: fractions (y, x)
of a square that shares its centre with the field (the scan context), and nanometres about that centre; a sub-scan has
a middle and a size in these fractions, and a rotation that counts the other way round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stemloop.core.errors import LimitError
from stemloop.core.instruction import Image, Position

M_TO_NM = 1e9
S_TO_MS = 1e3
S_TO_US = 1e6
_SLACK = 1e-9


def turned(point: Position, angle_rad: float) -> Position:
    """(y, x) turned about the origin from +x towards +y.

    >>> y, x = turned((0.0, 1.0), math.pi / 2)
    >>> round(y, 12), round(x, 12)
    (1.0, 0.0)
    """
    sine, cosine = math.sin(angle_rad), math.cos(angle_rad)
    return cosine * point[0] + sine * point[1], cosine * point[1] - sine * point[0]


@dataclass(frozen=True)
class Subscan:
    """A scanned rectangle as Nion says it: ``middle`` and ``size`` (y, x) as fractions of the context."""

    middle: Position
    size: Position
    rotation_rad: float


@dataclass(frozen=True)
class View:
    """The field of view: ``extent_m`` (height, width) [m], turned by ``rotation_rad`` about its centre."""

    extent_m: tuple[float, float]
    rotation_rad: float = 0.0

    @property
    def side_m(self) -> float:
        """Side [m] of the upright square that holds the turned field: Nion's scan context.

        >>> View((10e-9, 20e-9)).side_m
        2e-08
        """
        sine, cosine = abs(math.sin(self.rotation_rad)), abs(math.cos(self.rotation_rad))
        height, width = self.extent_m
        return max(height * cosine + width * sine, width * cosine + height * sine)

    def fraction(self, position_m: Position) -> Position:
        """(y, x) of the context, 0 to 1, where ``position_m`` is; outside the context it is a LimitError.

        >>> View((10e-9, 20e-9)).fraction((0.0, 0.0))
        (0.25, 0.0)
        """
        height, width = self.extent_m
        away = turned((position_m[0] - height / 2, position_m[1] - width / 2), self.rotation_rad)
        fraction = away[0] / self.side_m + 0.5, away[1] / self.side_m + 0.5
        if not all(-_SLACK <= value <= 1 + _SLACK for value in fraction):
            raise LimitError(
                f"the position {position_m} m lies outside the field of {height * M_TO_NM:g} x "
                f"{width * M_TO_NM:g} nm; stay inside it."
            )
        return min(max(fraction[0], 0.0), 1.0), min(max(fraction[1], 0.0), 1.0)

    def position_m(self, fraction: Position) -> Position:
        """The inverse of :meth:`fraction`.

        >>> View((10e-9, 20e-9)).position_m((0.5, 0.5))
        (5e-09, 1e-08)
        """
        away = (fraction[0] - 0.5) * self.side_m, (fraction[1] - 0.5) * self.side_m
        y, x = turned(away, -self.rotation_rad)
        return y + self.extent_m[0] / 2, x + self.extent_m[1] / 2

    def subscan(self, asked: Image) -> Subscan:
        """The sub-scan of an image; corners outside the field are a LimitError."""
        height, width = self.extent_m
        for y, x in asked.corners_m().tolist():
            if not (-_SLACK <= y / height <= 1 + _SLACK and -_SLACK <= x / width <= 1 + _SLACK):
                raise LimitError(
                    f"a corner of the image at ({y:g}, {x:g}) m lies outside the field of {height * M_TO_NM:g} x "
                    f"{width * M_TO_NM:g} nm; stay inside it."
                )
        centre = asked.origin_m[0] + asked.extent_m[0] / 2, asked.origin_m[1] + asked.extent_m[1] / 2
        size = asked.extent_m[0] / self.side_m, asked.extent_m[1] / self.side_m
        return Subscan(self.fraction(centre), size, -(self.rotation_rad + asked.rotation_rad))
