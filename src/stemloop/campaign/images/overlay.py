"""Where a map of spectra of the same area lies on the image."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.signal import Signal
from stemloop.reduce.maps import MapRegistration, register_to_map
from stemloop.store.readers import read


@dataclass(frozen=True)
class Overlay:
    """A map and where it lies. name : of its file. chart : (rows, columns), the sum of each spectrum.
    registration : places of the map on the image."""

    name: str
    chart: NDArray[np.float64]
    registration: MapRegistration

    @property
    def outline(self) -> NDArray[np.float64]:
        """(5, 2) the map's corners on the image (row, col) [px], the first again at the end."""
        rows, columns = np.array(self.chart.shape) - 0.5
        corners = [[-0.5, -0.5], [-0.5, columns], [rows, columns], [rows, -0.5], [-0.5, -0.5]]
        return self.registration.on_image(np.array(corners))


def overlay(image: NDArray[np.float64], pixel_m: float | None, path: str | os.PathLike[str]) -> Overlay:
    """Find where the map in the file ``path`` lies on ``image``.

    The file's largest spectrum image (rows, columns, energy) is summed over the energies; an image is taken as it is.
    Where both pixel sizes are known their ratio is where the search begins, else the map covers the whole image.
    """
    signals = [s for s in read(path) if s.data.ndim in (2, 3) and s.data.dtype.kind in "buif"]
    if not signals:
        raise InputError(
            f"{os.fspath(path)} holds no map (rows, columns) and no spectrum image (rows, columns, energy)."
        )
    signal = max(signals, key=lambda s: (s.data.ndim, s.data.size))
    chart = np.asarray(signal.data, dtype=np.float64)
    chart = chart.sum(axis=2) if chart.ndim == 3 else chart
    return Overlay(Path(path).name, chart, register_to_map(image, chart, _ratio(signal, pixel_m)))


def _ratio(signal: Signal, pixel_m: float | None) -> tuple[float, float] | None:
    """Pixels of the image a pixel of the map, (rows, columns)."""
    down, across = signal.axes[0], signal.axes[1]
    if pixel_m is None or down.unit != "m" or across.unit != "m" or 0 in (down.scale, across.scale):
        return None
    return abs(down.scale) / pixel_m, abs(across.scale) / pixel_m


def told(found: Overlay) -> dict[str, Any]:
    """The numbers of an overlay, for the summary."""
    one = found.registration
    return {
        "file": found.name,
        "shape_px": list(found.chart.shape),
        "matrix": one.matrix.round(6).tolist(),
        "offset_px": one.offset.round(4).tolist(),
        "sigma": one.sigma.round(6).tolist(),
        "correlation": round(float(one.correlation), 4),
        "z_score": round(float(one.z_score), 2),
        "trusted": one.trusted,
    }
