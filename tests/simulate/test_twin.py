import json

import numpy as np
import pytest

from stemloop.core.errors import InputError, InstrumentError, LimitError
from stemloop.core.instruction import Blank, Diffraction, Image, Optics, Probe, Report, Spectrum, Stage
from stemloop.core.protocols import Instrument, Specimen
from stemloop.core.units import electrons
from stemloop.simulate.specimens import SPECIMENS, build
from stemloop.simulate.twin import SETTINGS, Twin

LOOK = Image((0.0, 0.0), (2e-9, 2e-9), (40, 40), 1e-5)
SHOOT = Diffraction(((1e-9, 1e-9), (0.5e-9, 1.5e-9)), 1e-3)
SAMPLES = {
    name: build(name, (20.0, 20.0), seed=1, layers=2 if name == "SrTiO3" else None) for name in sorted(SPECIMENS)
}


@pytest.fixture(params=sorted(SPECIMENS))
def twin(request):
    return Twin(SAMPLES[request.param], seed=3)


def test_is_an_instrument_and_its_sample_a_specimen(twin):
    assert isinstance(twin, Instrument)
    specimen: Specimen = twin.sample
    assert specimen.truth(np.array([[1e-9, 1e-9]])).phase.shape == (1, 4)
    assert set(twin.info.sample) == {"name", "material", "nominal_thickness_m"}


@pytest.mark.parametrize("asked", [LOOK, SHOOT], ids=lambda i: i.kind)
def test_same_key_and_state_give_the_same_frames(twin, asked):
    before = twin.state()
    first = twin.execute(asked, "a")
    after = twin.state()
    twin.restore(before)
    again = twin.execute(asked, "a")
    np.testing.assert_array_equal(first.frames, again.frames)
    assert twin.state() == after == first.state
    twin.restore(before)
    assert np.any(twin.execute(asked, "b").frames != first.frames)


def test_a_restored_twin_goes_on_identically(twin):
    twin.execute(Optics(semiangle_rad=8e-3, current_A=50e-12), "o")
    twin.execute(SHOOT, "1")
    twin.execute(Stage(alpha_rad=5e-3, y_m=1e-10), "s")
    kept = json.loads(json.dumps(twin.state()))
    other = Twin(SAMPLES[twin.info.sample["name"]], seed=3)
    other.restore(kept)
    for key, asked in (("2", SHOOT), ("3", LOOK), ("4", SHOOT)):
        np.testing.assert_array_equal(twin.execute(asked, key).frames, other.execute(asked, key).frames)
    assert twin.state() == other.state()


def test_frames_positions_time_and_dose_are_accounted(twin):
    image, patterns = twin.execute(LOOK, "a"), twin.execute(SHOOT, "b")
    assert image.frames.shape == (1, 40, 40) and patterns.frames.shape == (2, *twin.info.camera.shape)
    assert image.frames.dtype.kind == patterns.frames.dtype.kind == "u"
    assert image.electrons == pytest.approx(electrons(100e-12, 1e-5))
    state = patterns.state
    assert state["exposed_positions"] == 1602
    assert state["electrons"] == pytest.approx(electrons(100e-12, 1602 * 1e-5 + 2 * (1e-3 - 1e-5)), rel=1e-6)
    assert state["clock_s"] > LOOK.beam_time_s + SHOOT.beam_time_s
    assert (state["probe_y_m"], state["probe_x_m"]) == (0.5e-9, 1.5e-9)
    # a pattern holds nearly all of its electrons: 5 deviations and the scattering beyond 1 / A
    assert 0.9 * patterns.electrons < patterns.frames[0].sum() < patterns.electrons + 5 * patterns.electrons**0.5


def test_a_blanked_beam_exposes_nothing(twin):
    twin.execute(Blank(True), "a")
    before = twin.state()
    for asked in (LOOK, SHOOT):
        with pytest.raises(InstrumentError, match="blanked"):
            twin.execute(asked, "b")
    assert twin.state() == before
    twin.execute(Blank(False), "c")
    assert twin.execute(SHOOT, "d").frames is not None


def test_out_of_range_is_refused_and_changes_nothing():
    twin = Twin(SAMPLES["graphene"])
    before = twin.state()
    refused = [
        Optics(semiangle_rad=0.2, current_A=1e-12),
        Optics(current_A=1.0),
        Stage(alpha_rad=0.0, x_m=1e-6),
        Probe((1e-6, 0.0)),
        Diffraction(((3e-9, 0.0),), 1e-3),
        Image((1e-9, 0.0), (2e-9, 1e-9), (10, 10), 1e-6),
    ]
    for asked in refused:
        with pytest.raises(LimitError):
            twin.execute(asked, "k")
    with pytest.raises(InstrumentError, match="spectrum"):
        twin.execute(Spectrum(((0.0, 0.0),), 1.0), "k")
    with pytest.raises(LimitError, match="HAADF"):
        twin.execute(Image((0.0, 0.0), (1e-9, 1e-9), (400, 400), 1e-6, detector="BF"), "k")
    with pytest.raises(InputError, match="state"):
        twin.restore({"clock_s": 1.0})
    assert twin.state() == before == twin.execute(Report(), "k").state


def test_drift_is_smooth_bounded_and_can_be_switched_off():
    minutes = np.linspace(0, 3600, 61)
    drift = Twin(SAMPLES["graphene"], seed=2).drift_m(minutes)
    speed = np.linalg.norm(np.diff(drift, axis=0), axis=1)
    assert 0.02e-9 < speed[0] < 0.05e-9 and np.all(np.diff(speed) < 0) and np.linalg.norm(drift[-1]) < 0.6e-9
    still = Twin(SAMPLES["graphene"], drifts=False)
    assert np.all(still.drift_m(minutes) == 0)


def test_moving_the_stage_moves_the_image():
    twin = Twin(SAMPLES["MoS2"], current_A=5e-9, drifts=False)
    first = twin.execute(LOOK, "a").frames[0].astype(float)
    twin.execute(Stage(y_m=1e-10, x_m=2e-10), "s")
    moved = twin.execute(LOOK, "b").frames[0].astype(float)
    # pixels of 0.5 A: down by 2, right by 4
    same = np.corrcoef(first[:-2, :-4].ravel(), moved[2:, 4:].ravel())[0, 1]
    assert same > 0.99 > np.corrcoef(first.ravel(), moved.ravel())[0, 1]


def test_damage_follows_the_dose():
    harmless = Twin(SAMPLES["graphene"], seed=3)
    harmless.execute(SHOOT, "a")
    assert harmless.state()["lost_atoms"] == []
    # 1e4 barn = 1e-4 A^2 against about 1e5 electrons / A^2 in the middle of the probe: atoms under it leave
    twin = Twin(SAMPLES["graphene"], seed=3, damage_barn=1e4)
    twin.execute(SHOOT, "a")
    lost = twin.state()["lost_atoms"]
    places = SAMPLES["graphene"].position_m(np.array(lost))
    near = np.linalg.norm(places[:, None] - np.array(SHOOT.positions_m), axis=2).min(axis=1)
    assert len(lost) > 2 and near.max() < 4e-10
    assert len(twin.sample.defects) == len(lost)
    other = Twin(SAMPLES["graphene"], seed=3, damage_barn=1e4)
    other.restore(twin.state())
    np.testing.assert_array_equal(twin.execute(SHOOT, "b").frames, other.execute(SHOOT, "b").frames)
    assert np.any(other.execute(LOOK, "c").frames != harmless.execute(LOOK, "c").frames)


def test_every_specimen_has_its_setting_and_truth_is_written(tmp_path):
    assert set(SETTINGS) == set(SPECIMENS)
    twin = Twin("graphene", seed=1)
    twin.write_truth(str(tmp_path / "truth.npz"))
    with np.load(tmp_path / "truth.npz") as truth:
        assert truth["name"] == "graphene" and truth["mean"].shape == (128, 128, 7)
