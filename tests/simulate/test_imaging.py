import abtem
import numpy as np
import pytest
from ase import Atoms

from stemloop.core.errors import InputError
from stemloop.simulate.crystals import crystal
from stemloop.simulate.elasticity import Uniform
from stemloop.simulate.imaging import WINDOW_A, Scattering, camera
from stemloop.simulate.specimens import MARGIN_A, build

A = 1e-10
MIDDLE = (10.0 * A, 10.0 * A)


def film(material, layers=None, turn=0.05):
    """A piece of crystal in a periodic cell of one window, with whatever disorder wrapping puts at its edges."""
    kind = crystal(material)
    atoms = kind.lattice((WINDOW_A, WINDOW_A), turn, (0.3, 0.2), layers)
    atoms.positions[:, :2] %= WINDOW_A
    return atoms, kind.slice_A


def discs(pattern, g_px, radius=4.0):
    """Centre (row, col) and content of the disc near ``g_px`` from the middle."""
    rows, columns = np.indices(pattern.shape) - 32.0
    inside = np.hypot(rows - g_px[0], columns - g_px[1]) < radius
    weight = pattern * inside
    return np.array([(weight * rows).sum(), (weight * columns).sum()]) / weight.sum(), weight.sum()


@pytest.mark.parametrize(
    "material, energy, semiangle, C10, tilt",
    [
        ("MoS2", 80e3, 7e-3, 0.0, (0.0, 0.0)),
        ("graphene", 60e3, 9e-3, -20e-9, (0.0, 0.0)),
        ("SrTiO3", 200e3, 3e-3, 10e-9, (4e-3, -2e-3)),
    ],
)
def test_pattern_is_that_of_abtem(material, energy, semiangle, C10, tilt):
    atoms, slice_A = film(material)
    y, x = 15.13, 17.31
    ours = Scattering(atoms, energy, slice_A=slice_A).cbed((y * A, x * A), semiangle, C10, tilt)
    atoms.pbc = True
    potential = abtem.Potential(
        atoms, gpts=128, slice_thickness=slice_A, projection="infinite", parametrization="lobato"
    ).build(lazy=False)
    probe = abtem.Probe(
        energy=energy,
        semiangle_cutoff=semiangle * 1e3,
        C10=C10 / A,
        gpts=128,
        extent=WINDOW_A,
        tilt=(-tilt[1] * 1e3, -tilt[0] * 1e3),  # abTEM tilts the beam, we tilt the specimen
    )
    wave = np.squeeze(probe.multislice(potential, scan=abtem.CustomScan([[x, y]]), lazy=False).array)
    beam = np.sum(np.abs(np.fft.fft2(probe.build(lazy=False).array)) ** 2)
    theirs = np.abs(np.fft.fftshift(np.fft.fft2(wave)))[32:96, 32:96].T ** 2 / beam
    assert np.abs(ours - theirs).sum() / theirs.sum() < 1e-5  # both are complex64 arithmetic


def test_a_vacuum_keeps_every_electron_in_the_disc():
    empty = Atoms("H", positions=[[0, 0, 1]], cell=[96.0, 96.0, 2.0])  # the window does not see the atom
    pattern = Scattering(empty, 80e3).cbed((48 * A, 48 * A), 7e-3)
    theta = camera(80e3).pixel_rad * np.hypot(*(np.indices((64, 64)) - 32.0))
    assert pattern.sum() == pytest.approx(1.0, abs=2e-3)
    assert pattern[theta > 7e-3 + camera(80e3).pixel_rad].sum() < 2e-3


@pytest.mark.parametrize("material", ["MoS2", "SrTiO3"])
def test_electrons_are_conserved_without_the_band_limit(material):
    atoms, slice_A = film(material)
    wave = Scattering(atoms, 200e3, slice_A=slice_A, band_limit=False).exit_spectrum((1e-9, 1e-9), 5e-3)
    # float32 transforms: about 1e-7 relative each, 20 slices
    assert np.sum(np.abs(wave) ** 2, dtype=float) == pytest.approx(1.0, abs=2e-5)


@pytest.mark.parametrize("away", [(-0.7, 0.0), (0.0, -0.7)])
def test_an_atom_pulls_the_beam_towards_it(away):
    # electrons are attracted: with the probe above (left of) the atom the pattern moves to larger rows (columns)
    atom = Atoms("Au", positions=[[16.0, 16.0, 1.0]], cell=[WINDOW_A, WINDOW_A, 2.0])
    pattern = Scattering(atom, 80e3).cbed(((16 + away[0]) * A, (16 + away[1]) * A), 20e-3)
    rows, columns = np.indices((64, 64)) - 32.0
    moved = np.array([(pattern * rows).sum(), (pattern * columns).sum()])
    expected = -np.sign(away)
    # rows run from -32 to 31: the one without a partner unbalances the other axis a little
    assert np.dot(moved, expected) > 0.5 and abs(np.dot(moved, expected[::-1])) < 0.01


def test_tilting_the_specimen_is_shearing_it():
    atoms, slice_A = film("SrTiO3")
    tilt = (6e-3, -4e-3)
    sheared = atoms.copy()
    step = np.floor(atoms.positions[:, 2] / slice_A) * slice_A
    sheared.positions[:, 1] += step * np.tan(tilt[0])
    sheared.positions[:, 0] += step * np.tan(tilt[1])
    tilted = Scattering(atoms, 200e3, slice_A=slice_A).cbed(MIDDLE, 3e-3, tilt_rad=tilt)
    moved = Scattering(sheared, 200e3, slice_A=slice_A).cbed(MIDDLE, 3e-3)
    straight = Scattering(atoms, 200e3, slice_A=slice_A).cbed(MIDDLE, 3e-3)
    # shifting atoms by bilinear weights on 0.25 A against an exact Fourier shift: 1 %; the tilt itself changes 8 %
    assert np.abs(tilted - moved).sum() < 0.02 * moved.sum()
    assert np.abs(straight - moved).sum() > 0.05 * moved.sum()


def test_strain_moves_the_discs_by_its_inverse():
    # graphene's first order along y is at 2 / (sqrt(3) a) = 0.469 / A = 15 px
    strain, g = 0.03, 2 / (3**0.5 * 2.46) * WINDOW_A
    seen = []
    for e in (0.0, strain):
        sample = build("graphene", (20.0, 20.0), Uniform(e_yy=e))
        pattern = Scattering(sample, 60e3).cbed(MIDDLE, 5e-3)
        up, _ = discs(pattern, (-g / (1 + e), 0), 5.5)
        down, _ = discs(pattern, (g / (1 + e), 0), 5.5)
        seen.append((down - up)[0] / 2)
    assert seen[0] == pytest.approx(g, abs=0.05)
    # the probe's tails leave the 32 A window, which costs some hundredths of a pixel; the shift itself is 0.44 px
    assert seen[1] / seen[0] == pytest.approx(1 / (1 + strain), abs=0.004)


def test_a_hexagon_has_six_equal_discs_above_its_middle():
    sample = build("graphene", (20.0, 20.0))
    carbon = sample.atoms.positions[:, 1::-1] - MARGIN_A
    hollow = carbon[np.linalg.norm(carbon - 10.0, axis=1).argmin()]
    # the hexagon's middle lies one bond from a carbon along y, on the side without a neighbour
    bond = 2.46 / 3**0.5
    side = 1 if np.linalg.norm(carbon - hollow - [bond, 0], axis=1).min() > 0.1 else -1
    hollow += np.array([side * bond, 0])
    pattern = Scattering(sample, 60e3).cbed(tuple(hollow * A), 9e-3)
    g = 2 / (3**0.5 * 2.46) * WINDOW_A
    angles = np.pi / 2 + np.pi / 3 * np.arange(6)
    content = np.array([discs(pattern, (g * np.sin(a), g * np.cos(a)), 7.4)[1] for a in angles])
    # square pixels and a square window under a hexagon: 3.5 %
    assert np.ptp(content) < 0.05 * content.mean()


@pytest.mark.parametrize(
    "material, layers, energy, semiangle, error",
    [("MoS2", None, 80e3, 7e-3, 0.01), ("graphene", None, 60e3, 9e-3, 0.01), ("SrTiO3", 1, 200e3, 3e-3, 0.005)],
)
def test_the_grid_is_fine_enough_for_thin_specimens(material, layers, energy, semiangle, error):
    sample = build(material, (10.0, 10.0), layers=layers)
    coarse, fine = (grid_pattern(sample, energy, semiangle, sampling) for sampling in (0.25, 0.125))
    assert np.abs(coarse - fine).sum() < error * fine.sum()


def test_a_finer_grid_converges_for_the_film():
    # cells channel along heavy columns: scattering beyond the grid's 1.3 / A is felt, at 0.25 A by 5 % in five
    # cells (13 % in ten)
    sample = build("SrTiO3", (10.0, 10.0), layers=5)
    coarse, fine, finest = (grid_pattern(sample, 200e3, 3e-3, sampling) for sampling in (0.25, 0.125, 0.0625))
    errors = [np.abs(p - finest).sum() / finest.sum() for p in (coarse, fine)]
    assert errors[0] < 0.07 and errors[1] < 0.4 * errors[0]


def grid_pattern(sample, energy, semiangle, sampling_A):
    """A pattern where all grids hold the scattering (below 0.9 / A)."""
    pattern = Scattering(sample, energy, sampling_A=sampling_A).cbed((5.1 * A, 4.7 * A), semiangle)
    return pattern[np.hypot(*(np.indices((64, 64)) - 32.0)) < 29]


def test_source_points_have_the_covariance_of_the_source():
    # to second order in its width, a source changes a pattern by sigma^2/2 times the Laplacian over the position
    sample = build("MoS2", (20.0, 20.0))
    fwhm, sigma = 0.3 * A, 0.3 * A / 2.3548
    blurred = Scattering(sample, 80e3, source_points=6).cbed(MIDDLE, 15e-3, source_fwhm_m=fwhm)
    sharp = Scattering(sample, 80e3)

    def at(dy, dx):
        return sharp.cbed((MIDDLE[0] + dy, MIDDLE[1] + dx), 15e-3).astype(float)

    h = 0.1 * A
    laplacian = (at(h, 0) + at(-h, 0) + at(0, h) + at(0, -h) - 4 * at(0, 0)) / h**2
    change = blurred - at(0, 0)
    expected = sigma**2 / 2 * laplacian
    assert np.linalg.norm(change - expected) < 0.1 * np.linalg.norm(expected)


def test_phonons_are_repeatable_and_differ_between_configurations():
    sample = build("MoS2", (10.0, 10.0))
    first, second = (Scattering(sample, 80e3, phonons=(2, 4)) for _ in range(2))
    wave = first.exit_spectrum((5e-10, 5e-10), 7e-3, configuration=1).copy()
    np.testing.assert_array_equal(wave, second.exit_spectrum((5e-10, 5e-10), 7e-3, configuration=1))
    assert np.abs(wave - first.exit_spectrum((5e-10, 5e-10), 7e-3, configuration=0)).max() > 1e-4


def test_places_and_cells_that_cannot_be_simulated_are_refused():
    sample = build("graphene", (10.0, 10.0))
    scattering = Scattering(sample, 60e3)
    with pytest.raises(InputError, match="leaves"):
        scattering.cbed((-2e-9, 0.0), 9e-3)
    with pytest.raises(InputError, match="semiangle"):
        scattering.cbed(MIDDLE, 1e-4)
    with pytest.raises(InputError, match="whole number"):
        Scattering(Atoms("C", positions=[[1, 1, 1]], cell=[10.1, 10.0, 2.0]), 60e3)
