"""A small recorded spectrum image for tests: a titanium edge whose strength varies smoothly over the field."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def titanium_map(shape=(12, 10)):
    """Areal density of titanium (ny, nx): a smooth hill."""
    y, x = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    return 1.0 + 2.0 * np.exp(-2 * ((y - 0.2) ** 2 + (x + 0.3) ** 2))


def write_recording(path: Path, shape=(12, 10), seed=0, spoil=None) -> Path:
    """Write a spectrum image (ny, nx, 512) from 380 eV in 0.5 eV steps as ``path`` (.hspy), and return the path."""
    from rsciio.hspy import file_writer

    energy = 380 + 0.5 * np.arange(512)
    background = 2e3 * (energy / 380) ** -3.0
    edge = np.where(energy > 456, 150.0 * np.exp(-(energy - 456) / 40), 0.0)
    mean = background + titanium_map(shape)[..., None] * edge
    data = np.random.default_rng(seed).poisson(mean).astype(np.float32)
    if spoil is not None:
        data[spoil] = np.nan
    axes = [
        {
            "name": name,
            "size": size,
            "offset": offset,
            "scale": scale,
            "units": units,
            "navigate": navigate,
            "index_in_array": i,
        }
        for i, (name, size, offset, scale, units, navigate) in enumerate(
            [
                ("y", shape[0], 0.0, 0.5, "nm", True),
                ("x", shape[1], 0.0, 0.5, "nm", True),
                ("Energy loss", 512, 380.0, 0.5, "eV", False),
            ]
        )
    ]
    for axis in axes:
        axis["_type"] = "UniformDataAxis"
        axis["is_binned"] = False
    signal = {
        "data": data,
        "axes": axes,
        "metadata": {"General": {"title": "test"}, "Signal": {"signal_type": "EELS"}},
        "original_metadata": {},
        "attributes": {"_lazy": False, "ragged": False},
        "package": "",
        "package_version": "",
        "models": {},
        "learning_results": {},
        "tmp_parameters": {},
        "package_info": {},
    }
    file_writer(str(path), signal)
    return path
