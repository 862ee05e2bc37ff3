import numpy as np
import pytest

from stemloop.simulate.crystals import crystal
from stemloop.simulate.haadf import Haadf, fine_sampling_A, ring_signal
from stemloop.simulate.imaging import WINDOW_A, Scattering
from stemloop.simulate.specimens import build

A = 1e-10
PROBES = {"MoS2": (80e3, 28e-3), "graphene": (60e3, 30e-3), "SrTiO3": (200e3, 22e-3)}


def scan(material, points, layers=None):
    """Our image and a full multislice scan, both of the same atoms over one repeat along x and y."""
    energy, semiangle = PROBES[material]
    sample = build(material, (12.0, 12.0), layers=layers)
    kind = crystal(material)
    steps = np.linspace(0.3, 0.3 + max(kind.cell_A[0]), points, endpoint=False) + 4.0
    grid = np.meshgrid(steps * A, steps * A, indexing="ij")
    ours = Haadf(sample, energy, semiangle)(*grid)
    window = 12.0
    phonons = (3, 1)
    sampling = fine_sampling_A(energy, window)
    # the sample's box is a whole number of 0.25 A, not of the fine grid: cut a crystal of the right size around it
    atoms = sample.atoms.copy()
    size = np.floor(atoms.cell.lengths()[:2] / sampling) * sampling
    atoms = atoms[np.all(atoms.positions[:, :2] < size, axis=1)]
    atoms.set_cell([*size, atoms.cell[2, 2]])
    scattering = Scattering(atoms, energy, phonons, sampling_A=sampling, window_A=window, slice_A=kind.slice_A)
    margin = 26.0
    real = np.array(
        [
            np.mean(
                [
                    ring_signal(
                        scattering.exit_spectrum((y + margin * A, x + margin * A), semiangle, configuration=c),
                        sampling,
                        energy,
                    )
                    for c in range(phonons[0])
                ]
            )
            for y, x in zip(grid[0].ravel(), grid[1].ravel(), strict=True)
        ]
    ).reshape(ours.shape)
    return ours, real


# Measured with 12 phonon configurations: correlation 0.999 (MoS2) and 0.998 (graphene), rms error 6 and 10 % of the
# brightest pixel, nearly all of it a common factor: the sum is 11 and 17 % brighter than multislice, which lets the
# coherent discs of a lattice miss the ring. Three configurations, as here, are noisy by 2 % in the correlation.
@pytest.mark.parametrize("material, points", [("MoS2", 6), ("graphene", 6)])
def test_summed_responses_are_the_multislice_image(material, points):
    ours, real = scan(material, points)
    assert np.corrcoef(ours.ravel(), real.ravel())[0, 1] > 0.97
    assert np.sqrt(np.mean((ours - real) ** 2)) < 0.12 * real.max()
    assert ours.mean() == pytest.approx(real.mean(), rel=0.2)


@pytest.mark.slow
def test_summed_responses_are_the_multislice_image_of_a_film():
    # measured: correlation 0.996, rms error 2.5 % of the brightest pixel, means within 1 %
    ours, real = scan("SrTiO3", 6)
    assert np.corrcoef(ours.ravel(), real.ravel())[0, 1] > 0.99
    assert np.sqrt(np.mean((ours - real) ** 2)) < 0.04 * real.max()


def test_brightness_grows_with_the_atomic_number():
    # high-angle scattering grows as Z^1.6 to Z^2: a silicon atom among carbon is (14/6)^1.6..2 = 3.9 to 5.4 as bright
    sample = build("graphene", (20.0, 20.0), dopants=np.array([[36.0, 36.0]]))
    image = Haadf(sample, *PROBES["graphene"])
    silicon = sample.atoms.positions[sample.atoms.symbols == "Si"][0, 1::-1]
    carbons = sample.atoms.positions[sample.atoms.symbols == "C"][:, 1::-1]
    far = carbons[np.argsort(np.abs(np.linalg.norm(carbons - silicon, axis=1) - 6.0))[0]]
    bright, dim = (float(image(*((p - 26.0)[:, None] * A))[0]) for p in (silicon, far))
    assert 2.8 < bright / dim < 5.4  # the neighbours' tails add to the carbon


def test_image_moves_with_the_atoms_and_source_conserves_the_mean():
    sample = build("MoS2", (20.0, 20.0))
    y, x = np.meshgrid(*2 * [np.linspace(0, 20, 160) * A], indexing="ij")
    sharp, blurred = (Haadf(sample, *PROBES["MoS2"], source_fwhm_m=s)(y, x) for s in (0.0, 0.8 * A))
    assert blurred.mean() == pytest.approx(sharp.mean(), rel=0.02)  # the frame's edge cuts some columns
    assert blurred.std() < 0.9 * sharp.std()
    atom = sample.atoms.positions[sample.atoms.symbols == "Mo"][:, 1::-1] - 26.0
    atom = atom[np.linalg.norm(atom - 10.0, axis=1).argmin()]
    row, column = np.unravel_index(
        np.where(np.hypot(y / A - atom[0], x / A - atom[1]) < 1.2, sharp, 0).argmax(), sharp.shape
    )
    # the frame's pixels are 0.126 A
    assert np.hypot(y[row, column] / A - atom[0], x[row, column] / A - atom[1]) < 0.13


def test_window_of_patterns_and_ring_do_not_overlap():
    # the ring needs angles that the camera's grid cannot hold: it has its own
    assert fine_sampling_A(80e3, 12.0) < 0.15 and WINDOW_A == 32.0
