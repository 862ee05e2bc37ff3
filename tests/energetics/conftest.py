import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import numpy as np
import pytest

from stemloop.core.structure import Descriptors
from stemloop.energetics import energy_model


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """One cache for the whole session, so that tests share their calculations."""
    return tmp_path_factory.mktemp("energies")


@pytest.fixture(scope="session")
def graphene(place):
    """Graphene 4 x 4 with its surface known within 2 %."""
    model = energy_model("graphene", supercell=4, cache=place, workers=1)
    ring = [(0.02 * np.cos(a), -0.02 * np.cos(a), 0.02 * np.sin(a)) for a in np.linspace(0, np.pi, 7)]
    model.surface.energies(np.array(ring))
    yield model
    model.calculations.close()


@pytest.fixture
def descriptors():
    """Makes descriptors of one material at strains (n, 3) with deviations of e_mean, e_diff, e_xy."""

    def make(strain, sigma=(1e-3, 1e-3, 1e-3), phase="graphene", vacuum=0.0, site=(1.0, 0.0, 0.0)):
        strain = np.atleast_2d(strain)
        n = len(strain)
        mean, deviation, phases = np.zeros((n, 7)), np.zeros((n, 7)), np.zeros((n, 4))
        mean[:, 0], mean[:, 1], mean[:, 2] = strain[:, :2].mean(axis=1), (strain[:, 0] - strain[:, 1]) / 2, strain[:, 2]
        deviation[:, :3] = sigma
        phases[:, ["MoS2", "graphene", "SrTiO3"].index(phase)] = 1.0 - vacuum
        phases[:, 3] = vacuum
        return Descriptors(mean, deviation, phases, np.tile(site, (n, 1)).astype(float), np.zeros(n))

    return make
