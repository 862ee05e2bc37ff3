"""Arrays that know their axes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError


@dataclass(frozen=True)
class Axis:
    """A uniform axis: value at index ``i`` is ``offset + i * scale`` in ``unit``."""

    name: str
    size: int
    scale: float = 1.0
    offset: float = 0.0
    unit: str = "px"

    @property
    def values(self) -> NDArray[np.float64]:
        """The ``size`` coordinates, in ``unit``."""
        return self.offset + self.scale * np.arange(self.size, dtype=np.float64)


@dataclass(frozen=True)
class Signal:
    """Data with one :class:`Axis` per dimension and free metadata.

    Images are ``(y, x)``, stacks ``(frame, y, x)``, 4D-STEM ``(scan_y, scan_x, det_y, det_x)``, spectrum images
    ``(y, x, energy_loss)``; row 0 is the top.
    """

    data: NDArray[Any]
    axes: tuple[Axis, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = tuple(axis.size for axis in self.axes)
        if sizes != self.data.shape:
            raise InputError(f"axes of sizes {sizes} do not describe data of shape {self.data.shape}.")

    def axis(self, name: str) -> Axis:
        """The axis called ``name``."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise InputError(f"no axis {name!r}; there are {', '.join(axis.name for axis in self.axes)}.")
