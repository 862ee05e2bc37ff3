"""Arrays that know their axes."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError, MissingExtra
from stemloop.core.picture import picture


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

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.data, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        axes = ", ".join(_words(axis) for axis in self.axes)
        return f"<Signal of {self.data.dtype} ({axes}){_range(self.data)}>"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{html.escape(_words(axis))}</td></tr>" for axis in self.axes)
        known = ((name, value) for name, value in self.metadata.items() if isinstance(value, (str, int, float)))
        notes = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(_value(v))}</td></tr>" for name, v in known)
        head = html.escape(f"{self.data.dtype}{_range(self.data)}")
        return f"{picture(self.data)}<table><tr><td>{head}</td></tr>{rows}</table><table>{notes}</table>"

    def to_xarray(self) -> Any:
        """As an ``xarray.DataArray`` with the axes as coordinates; a ``MissingExtra`` if xarray is not installed."""
        try:
            import xarray
        except ImportError:
            raise MissingExtra("xarray is not installed: pip install xarray.") from None
        coordinates = {a.name: (a.name, a.values, {"units": a.unit}) for a in self.axes}
        return xarray.DataArray(self.data, coordinates, [a.name for a in self.axes], attrs=dict(self.metadata))

    def to_hyperspy(self) -> Any:
        """As a HyperSpy signal: spectra along ``energy_loss``, else images of the last two axes; a ``MissingExtra`` if
        HyperSpy is not installed."""
        try:
            import hyperspy.api as hyperspy
        except ImportError:
            raise MissingExtra("HyperSpy is not installed: pip install hyperspy.") from None
        spectra = len(self.axes) == 1 or self.axes[-1].name == "energy_loss"
        kind = hyperspy.signals.Signal1D if spectra else hyperspy.signals.Signal2D
        axes = [
            {"name": a.name, "size": a.size, "scale": a.scale, "offset": a.offset, "units": a.unit} for a in self.axes
        ]
        return kind(np.array(self.data), axes=axes, original_metadata={"stemloop": dict(self.metadata)})

    def axis(self, name: str) -> Axis:
        """The axis called ``name``."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise InputError(f"no axis {name!r}; there are {', '.join(axis.name for axis in self.axes)}.")


def _words(axis: Axis) -> str:
    """Such as ``x 512 from 0 to 20 nm``."""
    last = axis.offset + axis.scale * (axis.size - 1)
    return f"{axis.name} {axis.size} from {axis.offset:.4g} to {last:.4g} {axis.unit}"


def _value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _range(data: NDArray[Any]) -> str:
    if not data.size or not np.issubdtype(data.dtype, np.number) or np.iscomplexobj(data):
        return ""
    return f", {data.min():.6g} to {data.max():.6g}"
