"""Columns whose lattice is known, and the columns and lattices of real images (found once for all tests)."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from stemloop.core.structure import Columns
from stemloop.describe import find_columns
from stemloop.describe.lattices import assign
from stemloop.simulate import pictures

DATA = Path(os.environ.get("STEMLOOP_DATA", Path(__file__).parents[3] / "shared" / "data"))


def seen(layout, dose, seed=0):
    """Columns that the finder sees in a counted image of a layout."""
    image = pictures.counted(pictures.mean_image(layout, dose), np.random.default_rng(seed))
    return find_columns(image)


def ideal_columns(layout, sigma=0.15, seed=0):
    """Columns as a finder at the Cramer-Rao bound would give them, without its cost."""
    rng = np.random.default_rng(seed)
    n = len(layout.site)
    return Columns(
        layout.position + rng.normal(0, sigma, (n, 2)),
        np.full((n, 2), sigma),
        18.0 * layout.weight * (1 + rng.normal(0, 0.05, n)),
        layout.width,
        layout.site,
    )


def real(name):
    path = DATA / "haadf" / name
    if not path.exists():
        pytest.skip(f"{path} is not there; set STEMLOOP_DATA")
    return path


def picture(path, key):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path) as file:
        images = []
        file.visititems(
            lambda _, item: images.append(item[()]) if isinstance(item, h5py.Dataset) and item.ndim >= 2 else None
        )
    return np.squeeze(images[key]).astype(np.float64)


@cache
def answered(name, key=None):
    path = real(name)
    if name.endswith(".npy"):
        image = np.load(path).astype(np.float64)
    elif name.endswith(".mat"):
        image = pytest.importorskip("scipy.io").loadmat(path)["input"]["obs"][0, 0].astype(np.float64)
    else:
        image = picture(path, key or 0)[:512]
    columns = find_columns(image)
    return image, columns, assign(columns, image.shape)
