"""Nion's own simulated microscope, driven through Nion's own stack."""

import math
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("nion.usim_device", reason="the extra nion is not installed")

from instrument.conformance import InstrumentConformance
from stemloop.core.errors import InstrumentError, LimitError
from stemloop.core.instruction import Blank, Detector, Diffraction, Field, Image, Line, Optics, Raster, Spectrum, Stage
from stemloop.instrument.nion.adapter import NionInstrument
from stemloop.instrument.nion.host import USIM, find
from stemloop.instrument.nion.kinds import USIM_SETUP, usim
from stemloop.reduce.spectra import RelativeThickness

#: What the simulator makes one flake thick: 30 nm of 100 nm mean free path.
FLAKE = 0.3
DWELL_S = 1e-3


@pytest.fixture(scope="module")
def microscope():
    instrument = usim()
    yield instrument
    instrument.close()


@pytest.fixture
def scope(microscope):
    """The microscope in its first state."""
    first = microscope.state()
    yield microscope
    microscope.restore(first)


def flakes(positions_m):
    """How many flakes lie at (n, 2) positions [m] of the largest field: the simulator's truth."""
    y, x = (np.asarray(positions_m, float) - 100e-9).T
    count = np.zeros(len(y))
    for feature in find(USIM).stem.scan_data_generator.sample.features:
        flake = feature.get_feature_rect_m()
        count += (flake.top <= y) & (y < flake.bottom) & (flake.left <= x) & (x < flake.right)
    return count


def agreement(image, positions):
    """Correlation with the truth as a part of what the simulator's noise of 0.3 of a flake leaves."""
    truth = flakes(positions.reshape(-1, 2))
    best = np.sqrt(truth.var() / (truth.var() + 0.3**2))
    return np.corrcoef(image.ravel(), truth)[0, 1] / best


def thickness(scope, positions):
    exposure = scope.execute(Spectrum(positions, DWELL_S), "thickness")
    return RelativeThickness()(exposure.frames, exposure.calibration)[0]


def test_a_spectrum_tells_the_flakes_under_its_position(scope):
    positions = [tuple(p) for p in np.random.default_rng(0).random((40, 2)) * 200e-9]
    # the simulator adds noise of less than a thousandth, and 0.01 of the loss lies beyond the end of the spectrum
    np.testing.assert_allclose(thickness(scope, tuple(positions)), FLAKE * flakes(positions), atol=0.02)


def test_lines_and_rasters_are_measured_where_they_say(scope):
    for path in (Line((10e-9, 20e-9), (190e-9, 150e-9), 12), Raster((20e-9, 30e-9), (120e-9, 90e-9), (3, 4), 0.3)):
        np.testing.assert_allclose(thickness(scope, path), FLAKE * flakes(path.array()), atol=0.02)


def test_in_a_smaller_turned_field_positions_count_from_its_corner(scope):
    scope.execute(Field((80e-9, 60e-9), 0.5), "field")
    rng = np.random.default_rng(1)
    inside = [tuple(p) for p in rng.random((15, 2)) * (80e-9, 60e-9)]
    sine, cosine = math.sin(0.5), math.cos(0.5)
    away = np.array(inside) - (40e-9, 30e-9)
    largest = 100e-9 + np.stack([cosine * away[:, 0] + sine * away[:, 1], cosine * away[:, 1] - sine * away[:, 0]], 1)
    np.testing.assert_allclose(thickness(scope, tuple(inside)), FLAKE * flakes(largest), atol=0.02)


@pytest.mark.parametrize(
    "asked",
    [
        Image((0.0, 0.0), (200e-9, 200e-9), (400, 400), 0.2e-6),
        Image((60e-9, 80e-9), (50e-9, 100e-9), (180, 360), 0.2e-6),
        Image((60e-9, 80e-9), (100e-9, 50e-9), (360, 180), 0.2e-6),
        Image((60e-9, 60e-9), (80e-9, 80e-9), (300, 300), 0.2e-6, rotation_rad=0.3),
    ],
)
def test_an_image_shows_the_flakes_where_they_are(scope, asked):
    frame = scope.execute(asked, "image").frames[0]
    assert agreement(frame, asked.positions()) > 0.93  # the simulator places edges within about 1.5 pixels
    if asked.rotation_rad:
        other = Image(asked.origin_m, asked.extent_m, asked.shape, asked.dwell_s, rotation_rad=-asked.rotation_rad)
        assert agreement(frame, other.positions()) < 0.8


def test_a_stage_shift_moves_the_picture_along_its_axis(scope):
    asked = Image((40e-9, 40e-9), (120e-9, 120e-9), (360, 360), 0.2e-6)
    scope.execute(Stage(x_m=10e-9, y_m=-20e-9), "shift")
    frame = scope.execute(asked, "image").frames[0]
    assert agreement(frame, asked.positions() - (-20e-9, 10e-9)) > 0.93


def test_values_reach_nion_in_its_units_and_come_back_in_ours(scope):
    stem = find(USIM).stem
    scope.execute(Optics(C10_m=2e-7, C12_m=(3e-9, -4e-9), semiangle_rad=0.025, current_A=1e-10), "optics")
    assert stem.GetVal("C10") == 2e-7 and stem.GetVal("ConvergenceAngle") == 0.025
    assert stem.GetVal2D("C12", axis=("a", "b")).as_tuple() == (-4e-9, 3e-9)  # Nion's points are (y, x)
    assert stem.GetVal("BeamCurrent") == 1e-10
    state = scope.state()
    assert state["C10_m"] == 2e-7 and state["C12_m"] == [3e-9, -4e-9] and state["energy_eV"] == 100e3
    assert find(USIM).scan.scan_context.fov_nm == pytest.approx(200.0)


def test_binning_halves_the_ronchigram_and_keeps_its_angles(scope):
    fine = NionInstrument(find(USIM), replace(USIM_SETUP, binning=2))
    asked = Diffraction(((100e-9, 100e-9),), DWELL_S)
    whole = fine.execute(asked, "ronchigram")
    assert whole.frames.shape == (1, 1024, 1024) == (1, *fine.info.camera.shape)
    fine.execute(Detector("camera", binning=(4, 4)), "binning")
    coarse = fine.execute(asked, "ronchigram")
    assert coarse.frames.shape == (1, 256, 256) and fine.info.camera.shape == (1024, 1024)
    assert coarse.calibration["pixel_rad"] == pytest.approx(4 * whole.calibration["pixel_rad"])
    assert coarse.calibration["pixel_rad"] == pytest.approx(scope.info.camera.pixel_rad)
    with pytest.raises(LimitError, match="bins 1, 2, 4 pixels"):
        fine.execute(Detector("camera", binning=(8, 8)), "too coarse")


def test_defocus_changes_the_ronchigram(scope):
    asked = Diffraction(((100e-9, 100e-9),), DWELL_S)
    near, again = (scope.execute(asked, key).frames[0] for key in "ab")
    scope.execute(Optics(C10_m=5e-8), "defocus")
    far = scope.execute(asked, "c").frames[0]
    assert np.corrcoef(near.ravel(), again.ravel())[0, 1] > 2 * np.corrcoef(near.ravel(), far.ravel())[0, 1]


def test_the_spectrometer_starts_where_it_is_told(scope):
    scope.execute(Detector("eels", energy_offset_eV=-40.0), "offset")
    exposure = scope.execute(Spectrum(((100e-9, 100e-9),), DWELL_S), "spectrum")
    offset, scale, size = exposure.calibration["energy_loss"]
    assert offset == -40.0 and exposure.frames.shape == (1, size)
    peak = offset + scale * int(np.argmax(exposure.frames[0]))
    assert abs(peak) <= scale  # no loss is where no loss is


def test_with_a_live_view_running_no_spectrum_is_stale(scope):
    eels = find(USIM).eels
    positions = [tuple(p) for p in np.random.default_rng(2).random((15, 2)) * 200e-9]
    for position in positions:
        eels.start_playing()
        eels.get_next_xdatas_to_finish(10)
        assert thickness(scope, (position,)) == pytest.approx(FLAKE * flakes([position]), abs=0.02)


def test_what_nion_cannot_do_is_said(scope):
    with pytest.raises(InstrumentError, match="no control for stage_z_m"):
        scope.execute(Stage(z_m=1e-9), "height")
    with pytest.raises(LimitError, match="square pixels"):
        scope.execute(Image((0.0, 0.0), (100e-9, 50e-9), (50, 50), 1e-6), "flat pixels")
    with pytest.raises(LimitError, match="no detector 'BF'"):
        scope.execute(Image((0.0, 0.0), (50e-9, 50e-9), (50, 50), 1e-6, "BF"), "bright field")
    scope.execute(Blank(True), "off")
    with pytest.raises(InstrumentError, match="blanked"):
        scope.execute(Spectrum(((1e-7, 1e-7),), DWELL_S), "dark")


class TestConformance(InstrumentConformance):
    repeatable = False  # the simulator draws its noise as it likes
    electrons_max = 2e7

    @pytest.fixture
    def instrument(self, scope):
        return scope
