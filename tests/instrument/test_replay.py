import numpy as np
import pytest

from stemloop.core import units
from stemloop.core.errors import InputError, LimitError
from stemloop.core.instruction import Blank, Diffraction, Field, Image, Line, Optics, Probe, Raster, Report, Spectrum
from stemloop.core.protocols import Camera, Instrument
from stemloop.core.signal import Axis, Signal
from stemloop.instrument.client import connect
from stemloop.instrument.replay import Replay

RNG = np.random.default_rng(0)


def spectra(unit="nm", scale=0.5, **metadata):
    axes = (Axis("y", 4, scale, 0.0, unit), Axis("x", 6, scale, 0.0, unit), Axis("energy_loss", 16, 0.1, -0.5, "eV"))
    return Signal(RNG.random((4, 6, 16)), axes, metadata)


def patterns(unit="mrad"):
    axes = (Axis("scan_y", 3, 1.0, 0.0, "A"), Axis("scan_x", 3, 1.0, 0.0, "A"))
    return Signal(
        RNG.integers(0, 9, (3, 3, 8, 8)), (*axes, Axis("det_y", 8, 2.0, -7.0, unit), Axis("det_x", 8, 2.0, -7.0, unit))
    )


def image(shape=(8, 12), unit="nm"):
    return Signal(RNG.random(shape), (Axis("y", shape[0], 0.25, 0.0, unit), Axis("x", shape[1], 0.25, 0.0, unit)))


def test_each_recorded_position_answers_its_own_spectrum():
    signal = spectra(beam_energy_eV=60e3)
    replay = Replay(signal, current_A=1e-11)
    assert isinstance(replay, Instrument)
    assert replay.info.field_m == pytest.approx((2e-9, 3e-9)) and replay.info.energy_eV == 60e3
    assert replay.info.energy_loss == (-0.5, 0.1, 16)
    positions = tuple(map(tuple, replay.info.positions_m))
    exposure = replay.execute(Spectrum(positions, 0.01), "a")
    assert np.array_equal(exposure.frames.reshape(4, 6, 16), signal.data)
    assert exposure.electrons == units.electrons(1e-11, 0.01)
    assert replay.state()["exposures"] == 1
    assert positions[0] == pytest.approx((0.25e-9, 0.25e-9))  # the centre of the first pixel


def test_a_raster_and_a_line_that_hit_the_recorded_positions_are_answered():
    signal = spectra()
    replay = Replay(signal)
    whole = replay.execute(Spectrum(Raster((0.0, 0.0), replay.info.field_m, (4, 6)), 0.01), "a")
    assert np.array_equal(whole.frames.reshape(4, 6, 16), signal.data)
    row = replay.execute(Spectrum(Line((0.75e-9, 0.25e-9), (0.75e-9, 2.75e-9), 6), 0.01), "b")
    assert np.array_equal(row.frames, signal.data[1])
    with pytest.raises(LimitError, match="nothing was recorded"):
        replay.execute(Spectrum(Raster((0.0, 0.0), replay.info.field_m, (4, 5)), 0.01), "c")


def test_a_smaller_field_shows_the_middle_of_the_recording_and_is_not_turned():
    signal, shown = spectra(), image()
    replay = Replay(signal, image=shown)
    replay.execute(Field((1e-9, 2e-9)), "f")
    inner = replay.execute(Spectrum(Raster((0.0, 0.0), (1e-9, 2e-9), (2, 4)), 0.01), "a")
    assert np.array_equal(inner.frames.reshape(2, 4, 16), signal.data[1:3, 1:5])
    crop = replay.execute(Image((0.0, 0.0), (1e-9, 2e-9), (4, 8), 1e-6), "b")
    assert np.array_equal(crop.frames[0], shown.data[2:6, 2:10])
    for asked in (Field(rotation_rad=0.1), Field((9e-9, 1e-9))):
        with pytest.raises(LimitError):
            replay.execute(asked, "g")
    with pytest.raises(LimitError, match="without a turn"):
        replay.execute(Image((0.0, 0.0), (1e-9, 2e-9), (4, 8), 1e-6, rotation_rad=0.1), "h")


def test_patterns_answer_with_their_camera():
    signal = patterns()
    replay = Replay(signal, energy_eV=80e3)
    assert replay.info.camera == Camera((8, 8), 2e-3, (3.5, 3.5))
    exposure = replay.execute(Diffraction(tuple(map(tuple, replay.info.positions_m[[4, 0]])), 1e-3), "a")
    assert np.array_equal(exposure.frames, signal.data.reshape(9, 8, 8)[[4, 0]])
    assert Replay(patterns("1/nm"), energy_eV=80e3).info.camera.pixel_rad == pytest.approx(
        2e9 * units.wavelength_m(80e3)
    )
    with pytest.raises(InputError, match="no angle a pixel"):
        Replay(patterns("px"))


def test_an_image_answers_by_its_own_pixels():
    signal = image()
    replay = Replay(signal)
    crop = replay.execute(Image((0.5e-9, 0.25e-9), (1e-9, 1.25e-9), (4, 5), 1e-6), "a")
    assert np.array_equal(crop.frames[0], signal.data[2:6, 1:6])
    for asked in (
        Image((0.5e-9, 0.25e-9), (1e-9, 1.25e-9), (8, 10), 1e-6),  # finer than recorded
        Image((0.1e-9, 0.0), (1e-9, 1e-9), (4, 4), 1e-6),  # between pixels
        Image((1.5e-9, 0.0), (1e-9, 1e-9), (4, 4), 1e-6),  # beyond the end
    ):
        with pytest.raises(LimitError, match="whole recorded pixels"):
            replay.execute(asked, "b")


def test_an_image_may_stand_beside_spectra_of_the_same_field():
    replay = Replay(spectra(), image=image())
    assert replay.execute(Image((0.0, 0.0), (2e-9, 3e-9), (8, 12), 1e-6), "a").frames.shape == (1, 8, 12)
    with pytest.raises(InputError, match="same field"):
        Replay(spectra(), image=image((8, 8)))


@pytest.mark.parametrize(
    "asked", [Optics(C10_m=1e-8), Image((0.0, 0.0), (1e-9, 1e-9), (4, 4), 1e-6), Diffraction(((0.0, 0.0),), 1.0)]
)
def test_what_was_not_recorded_is_refused(asked):
    with pytest.raises(LimitError, match="cannot answer"):
        Replay(spectra()).execute(asked, "a")


def test_a_position_that_was_not_recorded_names_the_nearest():
    with pytest.raises(LimitError, match=r"the nearest recorded position is \(2.5e-10, 7.5e-10\) m"):
        Replay(spectra()).execute(Spectrum(((2e-10, 7.4e-10),), 0.1), "a")


def test_without_calibration_a_pixel_is_a_nanometre_and_it_says_so():
    replay = Replay(spectra("px", 1.0))
    assert replay.info.field_m == pytest.approx((4e-9, 6e-9))
    assert "1 px counts as 1 nm" in replay.info.sample["positions"]
    assert "positions" not in Replay(spectra()).info.sample


def test_no_number_in_the_recording_is_named():
    signal = spectra()
    signal.data[2, 3, 5] = np.nan
    replay = Replay(signal)
    replay.execute(Spectrum((tuple(replay.info.positions_m[0]),), 0.1), "a")
    with pytest.raises(InputError, match="row 2, column 3 and at 1 of the 24"):
        replay.execute(Spectrum(tuple(map(tuple, replay.info.positions_m)), 0.1), "b")
    broken = image()
    broken.data[3, 4] = np.inf
    with pytest.raises(InputError, match="row 3, column 4"):
        Replay(broken).execute(Image((0.0, 0.0), (2e-9, 3e-9), (8, 12), 1e-6), "c")


def test_its_state_can_be_restored():
    replay = Replay(spectra())
    replay.execute(Probe((1e-9, 2e-9)), "a")
    replay.execute(Blank(False), "b")
    other = Replay(spectra())
    other.restore(replay.state())
    assert other.state() == replay.state() == other.execute(Report(), "c").state
    assert (other.state()["probe_y_m"], other.state()["blanked"]) == (1e-9, False)


def test_a_recording_behind_the_guard_is_charged_for_answers_only(served):
    signal = spectra()
    signal.data[0, 1] = np.nan
    one = served(instrument=Replay(signal))
    with connect(one.directory, "agent-secret-0123456789", patience_s=10, lease=True) as client:
        assert np.array_equal(client.info.positions_m, Replay(signal).info.positions_m)
        good, bad = (tuple(client.info.positions_m[i]) for i in (0, 1))
        exposure = client.execute(Spectrum((good,), 0.01), "a")
        assert np.array_equal(exposure.frames[0], signal.data[0, 0])
        spent = client.dose()["spent"]
        for asked in (bad, (good[0] + 1e-10, good[1])):
            with pytest.raises((InputError, LimitError)):
                client.execute(Spectrum((asked,), 0.01), f"b{asked}")
        assert client.dose()["spent"] == spent == np.ceil(exposure.electrons)
