"""Laws of the twin's controls: aberrations, field of view, turned scans, detectors, binning, ending early."""

import math

import abtem
import numpy as np
import pytest

from stemloop.core.errors import Aborted, LimitError
from stemloop.core.instruction import (
    DETECTORS,
    Blank,
    Detector,
    Diffraction,
    Field,
    Image,
    Optics,
    Raster,
    Stage,
)
from stemloop.core.protocols import Abortable, Reporting
from stemloop.core.units import ANGSTROM_M
from stemloop.simulate.haadf import Haadf, fine_sampling_A, ring_signal
from stemloop.simulate.imaging import Scattering, phase_error
from stemloop.simulate.specimens import build
from stemloop.simulate.twin import Twin

GRAPHENE = build("graphene", (20.0, 20.0), seed=1)
FIELD = Twin(GRAPHENE).info.field_m
MIDDLE = (FIELD[0] / 2, FIELD[1] / 2)


def twin(**options):
    made = Twin(GRAPHENE, drifts=False, **options)
    made.execute(Blank(False), "open")
    return made


@pytest.mark.parametrize(
    "name, angle, pair",
    [("C12", "phi12", 0), ("C21", "phi21", 2), ("C23", "phi23", 4), ("C30", None, 6)],
)
def test_the_phase_of_each_aberration_is_that_of_abtem(name, angle, pair):
    size, turn, energy = 3e-8, 0.4, 80e3
    order = {"C12": 2, "C21": 1, "C23": 3, "C30": 0}[name]
    ours = [0.0] * 7
    ours[pair] = size * (math.cos(order * turn) if angle else 1.0)
    if angle:
        ours[pair + 1] = size * math.sin(order * turn)
    coefficients = {name: size / ANGSTROM_M, **({angle: turn} if angle else {})}
    ctf = abtem.transfer.Aberrations(energy=energy, aberration_coefficients=coefficients)
    alpha = np.linspace(0.0, 0.03, 7)[:, None]
    phi = np.linspace(-math.pi, math.pi, 9)[None, :]
    theirs = ctf._evaluate_from_angular_grid(alpha, phi)
    path = phase_error(alpha * np.sin(phi), alpha * np.cos(phi), 0.0, tuple(ours))
    wavelength = abtem.core.energy.energy2wavelength(energy) * ANGSTROM_M
    # abTEM works in single precision: phases of up to 2 pi 3e-8 0.03^2 / 2 / 4.2e-12 = 20 rad, so 1e-5 is its rounding
    np.testing.assert_allclose(np.exp(-2j * np.pi / wavelength * path), theirs, atol=2e-5)


def test_aberrations_act_on_patterns_and_keep_all_electrons():
    scattering = Scattering(GRAPHENE, 60e3)
    plain = scattering.cbed(MIDDLE, 30e-3)
    for i, size in enumerate((3e-9, 3e-9, 1e-7, 1e-7, 1e-7, 1e-7, 5e-6)):
        bent = scattering.cbed(MIDDLE, 30e-3, aberrations=tuple(size * (j == i) for j in range(7)))
        # the same electrons in other pixels: what leaves the 64 x 64 pixels is a few parts in a thousand
        assert bent.sum() == pytest.approx(plain.sum(), rel=5e-3)
        assert np.abs(bent - plain).sum() > 1e-3


def test_an_aberrated_haadf_image_is_that_of_full_multislice():
    """The ratio of transfer functions against every pixel calculated with the aberrated probe itself."""
    energy, semiangle = 60e3, 30e-3
    aberrations = (3e-9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    steps = (np.arange(10) * 0.4 + 4.0) * ANGSTROM_M
    grid = np.meshgrid(steps, steps, indexing="ij")
    sharp = Haadf(GRAPHENE, energy, semiangle)(*grid)
    ours = Haadf(GRAPHENE, energy, semiangle, aberrations=aberrations)(*grid)
    window = 16.0
    sampling = fine_sampling_A(energy, window)
    atoms = GRAPHENE.atoms.copy()
    size = np.floor(atoms.cell.lengths()[:2] / sampling) * sampling
    atoms = atoms[np.all(atoms.positions[:, :2] < size, axis=1)]
    atoms.set_cell([*size, atoms.cell[2, 2]])
    scattering = Scattering(atoms, energy, sampling_A=sampling, window_A=window, slice_A=GRAPHENE.crystal.slice_A)
    margin = 26.0 * ANGSTROM_M
    real = np.array(
        [
            ring_signal(
                scattering.exit_spectrum((y + margin, x + margin), semiangle, aberrations=aberrations),
                sampling,
                energy,
            )
            for y, x in zip(*(g.ravel() for g in grid), strict=True)
        ]
    ).reshape(grid[0].shape)
    # the atoms of the scan are at rest, ours are blurred by their vibration: the pattern of brightness is compared;
    # 0.99 is what the focused probe reaches against the same scan
    assert np.corrcoef(ours.ravel(), real.ravel())[0, 1] > 0.98
    assert np.corrcoef(sharp.ravel(), real.ravel())[0, 1] < 0.95  # the astigmatism does act


def test_the_rings_share_the_beam_out():
    """BF, ABF, what lies between ABF and ADF, and ADF are disjoint and together what the grid holds."""
    scattering = Scattering(GRAPHENE, 60e3)
    edges = [0.0, 0.015, 0.03, 0.036, 0.06, 1.0]
    parts = [scattering.ring(MIDDLE, (a, b), 0.03) for a, b in zip(edges, edges[1:])]
    assert sum(parts) == pytest.approx(scattering.ring(MIDDLE, (0.0, 1.0), 0.03), rel=1e-6)
    assert sum(parts) == pytest.approx(1.0, abs=0.02)  # the band limit takes the rest


@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_sees_atoms_and_says_its_angles(detector):
    microscope = twin(current_A=1e-9)
    microscope.execute(Optics(C10_m=5e-9), "defocus")  # in focus a weak phase object has no contrast in BF and ABF
    asked = Image(MIDDLE, (0.5e-9, 0.5e-9), (8, 8), 1e-3, detector)
    image = microscope.execute(asked, "k")
    assert image.calibration["detector"] == detector
    low, high = image.calibration["ring_rad"]
    signal = microscope._signal(asked)[0](asked.positions(), np.zeros(asked.shape))
    assert low < high and np.all((signal > 0) & (signal < 1))
    assert signal.std() > 1e-3 * signal.mean()
    # counts are Poisson: five deviations
    np.testing.assert_array_less(
        np.abs(image.frames[0] - signal * image.electrons), 5 * np.sqrt(signal * image.electrons)
    )


@pytest.mark.parametrize("origin, extent", [((0.25, 0.25), (0.5, 0.5)), ((0.0, 0.25), (1.0, 0.5))])
def test_a_smaller_field_shows_the_same_place_at_its_own_coordinates(origin, extent):
    part = tuple(e * f for e, f in zip(extent, FIELD))
    corner = tuple(o * f for o, f in zip(origin, FIELD))
    whole, zoomed = twin(), twin()
    zoomed.execute(Field(part), "f")
    ours = zoomed.execute(Image((0.0, 0.0), part, (12, 12), 1e-3), "k")
    theirs = whole.execute(Image(corner, part, (12, 12), 1e-3), "k")
    np.testing.assert_array_equal(ours.frames, theirs.frames)  # same place, same key: the same electrons
    with pytest.raises(LimitError, match="outside the field"):
        zoomed.execute(Diffraction((FIELD,), 1e-3), "k")


def test_a_field_that_leaves_the_largest_is_refused():
    for asked in (Field((2 * FIELD[0], FIELD[1])), Field(None, 0.1)):
        with pytest.raises(LimitError, match="largest"):
            twin().execute(asked, "f")


def test_a_scan_turned_by_a_quarter_is_the_image_turned():
    side = 0.6e-9
    origin = (MIDDLE[0] - side / 2, MIDDLE[1] - side / 2)
    upright = Image(origin, (side, side), (9, 9), 1.0)
    turned = Image(origin, (side, side), (9, 9), 1.0, rotation_rad=math.pi / 2)
    microscope = twin(current_A=1e-6)
    signals = [microscope._signal(a)[0](a.positions(), np.zeros(a.shape)) for a in (upright, turned)]
    # pixel (i, j) of the turned scan is at the place of pixel (j, n - i) of the upright one: n - i is in it for i >= 1
    expected = np.array([[signals[0][j, 9 - i] for j in range(9)] for i in range(1, 9)])
    np.testing.assert_allclose(signals[1][1:], expected, rtol=1e-5)


def test_binning_adds_pixels_up():
    fine, coarse = twin(), twin()
    coarse.execute(Detector("camera", binning=(4, 4)), "d")
    asked = Diffraction(Raster((0.5e-9, 0.5e-9), (1e-9, 1e-9), (1, 2)), 1e-4)
    one, other = fine.execute(asked, "k"), coarse.execute(asked, "k")
    np.testing.assert_array_equal(other.frames, one.frames.reshape(2, 16, 4, 16, 4).sum(axis=(2, 4)))
    # the undiffracted beam stays where it is: (row + 1/2) of the fine pixels is 4 (row + 1/2) of the coarse
    centre, binned = one.calibration["centre_px"][0], other.calibration["centre_px"][0]
    assert (centre + 0.5) == pytest.approx(4 * (binned + 0.5))
    assert other.calibration["pixel_rad"] == pytest.approx(4 * one.calibration["pixel_rad"])


@pytest.mark.parametrize(
    "asked",
    [
        Optics(energy_eV=1e5),
        Optics(C30_m=1e-2),
        Detector("camera", gain=2.0),
        Detector("HAADF", binning=(2, 2)),
        Detector("camera", binning=(3, 3)),
        Image((0.0, 0.0), (1e-9, 1e-9), (1000, 1000), 1e-6, "BF"),
    ],
)
def test_what_the_twin_has_not_is_refused_and_changes_nothing(asked):
    microscope = twin()
    before = microscope.state()
    with pytest.raises(LimitError):
        microscope.execute(asked, "k")
    assert microscope.state() == before


@pytest.mark.parametrize(
    "asked, done",
    [
        (Diffraction(Raster((0.0, 0.0), FIELD, (3, 4)), 1e-3), 5),
        (Image((0.0, 0.0), (1e-9, 1e-9), (6, 4), 1e-3, "BF"), 8),
    ],
    ids=["diffraction", "image"],
)
def test_an_exposure_that_is_ended_counts_what_was_exposed(asked, done):
    microscope = twin(damage_barn=None)
    assert isinstance(microscope, Abortable) and isinstance(microscope, Reporting)
    told = []

    def progress(now, of):
        told.append((now, of))
        if now == done:
            microscope.abort()

    microscope.progress = progress
    before = microscope.state()
    with pytest.raises(Aborted, match=f"{done} of {asked.exposed_positions}") as ended:
        microscope.execute(asked, "k")
    after = microscope.state()
    assert ended.value.exposed == done == after["exposed_positions"] - before["exposed_positions"]
    assert after["electrons"] == pytest.approx(done * asked.dwell_s * after["current_A"] / 1.602176634e-19)
    assert after["blanked"] == 1
    microscope.progress = None
    microscope.execute(Blank(False), "open")
    microscope.execute(asked, "again")  # the request was taken back
    assert [now for now, _ in told] == sorted(now for now, _ in told) and {of for _, of in told} == {
        24 if done == 8 else 12
    }


def test_a_state_from_before_version_2_is_taken_back():
    microscope = twin()
    new = microscope.state()
    old = {
        name: value
        for name, value in new.items()
        if not name.startswith(("C12", "C21", "C23", "C30", "field_", "camera_"))
    }
    microscope.execute(Stage(alpha_rad=0.01), "s")
    microscope.restore(old)
    assert microscope.state() == new
