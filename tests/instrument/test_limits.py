"""Laws of declared limits: nothing passes that is over one, whatever way it is asked."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemloop.core.errors import InputError, LimitError
from stemloop.core.field import absolute
from stemloop.core.instruction import (
    KINDS,
    Blank,
    Detector,
    Diffraction,
    Field,
    Image,
    Line,
    Optics,
    Probe,
    Raster,
    Spectrum,
    Stage,
)
from stemloop.core.protocols import InstrumentInfo
from stemloop.instrument.limits import CONTROLS, Limits, LimitsWatch, moved

FIELD_M = (1e-8, 2e-8)
INFO = InstrumentInfo("all", tuple(KINDS), FIELD_M, 80e3, detectors=("HAADF", "BF"))
FULL = """
format: 2
version: 12
field_m: [1e-8, 2e-8]
dwell_max_s: 0.5
beam_time_max_s: 60
current_max_A: 2e-10
electrons_per_point: 1e9
electrons_per_image: 1e12
electrons_max: 1e13
frame_bytes_max: 1e8
unblank: true
parked_max_s: 0.2
forbidden: [detector, energy_eV]
controls:
  semiangle_rad: [2e-3, 35e-3]
  current_A: [1e-12, 2e-10]
  C10_m: {range: [-1e-6, 1e-6], step: 2e-7, rate_per_s: 1e-7}
  C12_m: {range: [-1e-8, 1e-8], step: 5e-9}
  stage_x_m: {range: [-1e-3, 1e-3], rate_per_s: 1e-4}
  stage_y_m: [-1e-3, 1e-3]
  stage_z_m: [-2e-4, 2e-4]
  stage_alpha_rad: [-0.5, 0.5]
  stage_beta_rad: [-0.3, 0.3]
  field_rotation_rad: [-1, 1]
stage_envelope:
  alpha_rad: {tilt_rad: [0, 0.2, 0.4], x_m: [1e-3, 5e-4, 0], z_m: [2e-4, 1e-4, 1e-5]}
  beta_rad: {tilt_rad: [0, 0.25], y_m: [1e-3, 1e-4]}
region: {cell_m: 1e-9, e_per_A2_max: 1e5, probe_area_m2: 1e-20}
"""
LIMITS = Limits.from_yaml(FULL)
REST = {f"stage_{axis}": 0.0 for axis in ("x_m", "y_m", "z_m", "alpha_rad", "beta_rad")} | {
    "C10_m": 0.0, "C12_m": [0.0, 0.0], "current_A": 1e-10, "blanked": True, "probe_y_m": 0.0, "probe_x_m": 0.0
}  # fmt: skip


def refused(asked, state=REST, limits=LIMITS, electrons=1.0):
    with pytest.raises(LimitError) as error:
        limits.check(asked, electrons, INFO, state)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------- declaring


def test_yaml_json_and_the_dictionary_are_the_same_limits(tmp_path):
    import json

    assert Limits.from_dict(LIMITS.to_dict()) == LIMITS
    assert Limits.from_json(json.dumps(LIMITS.to_dict())).content_hash == LIMITS.content_hash
    (tmp_path / "limits.yaml").write_text(FULL)
    assert Limits.load(tmp_path / "limits.yaml") == LIMITS
    assert LIMITS.version == 12 and LIMITS.controls["C10_m"].step == 2e-7


def test_every_part_is_in_the_hash():
    changes = {
        "version: 12": "version: 13",
        "step: 2e-7": "step: 3e-7",
        "rate_per_s: 1e-4": "rate_per_s: 2e-4",
        "0.4], x_m": "0.41], x_m",
        "cell_m: 1e-9": "cell_m: 2e-9",
        "[detector, energy_eV]": "[detector]",
        "parked_max_s: 0.2": "parked_max_s: 0.3",
    }
    hashes = {Limits.from_yaml(FULL.replace(old, new)).content_hash for old, new in changes.items()}
    assert len(hashes | {LIMITS.content_hash}) == len(changes) + 1


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "- 1",
        "field_m: [1e-8, 2e-8]\nfield_m: [1, 1]",
        "field_m: [1e-8, .nan]",
        "field_m: [1e-8, -1]",
        "field_m: [1, 1]\ncontrols: {warp_m: [0, 1]}",
        "field_m: [1, 1]\ncontrols: {C10_m: [1, 0]}",
        "field_m: [1, 1]\ncontrols: {C10_m: {range: [0, 1], step: 0}}",
        "field_m: [1, 1]\ncontrols: {C10_m: {range: [0, 1], steps: 1}}",
        "field_m: [1, 1]\ncontrols: {}\nC10_m: [0, 1]",
        "field_m: [1, 1]\nstage_envelope: {alpha_rad: {tilt_rad: [0, 1], x_m: [1, 2]}}",
        "field_m: [1, 1]\nstage_envelope: {alpha_rad: {tilt_rad: [0.1, 1], x_m: [2, 1]}}",
        "field_m: [1, 1]\nstage_envelope: {alpha_rad: {tilt_rad: [0, 1], x_m: [1]}}",
        "field_m: [1, 1]\nregion: {cell_m: 1}",
        "field_m: [1, 1]\nforbidden: [everything]",
        "field_m: [1, 1]\nunblank: 1",
        "field_m: [1, 1]\nformat: 3",
        "field_m: &a [1, 1]\nC10_m: *a",
        "field_m: !!python/object/apply:os.getcwd []",
        "? [1]\n: 2",
        "field_m: [1, 1",
    ],
)
def test_a_declaration_that_means_nothing_is_refused(wrong):
    with pytest.raises(InputError):
        Limits.from_yaml(wrong)


def test_the_first_form_of_the_file_is_still_read():
    old = Limits.from_dict({"field_m": [1, 1], "C10_m": [-1, 1], "stage": {"x_m": [0, 1]}})
    assert old.controls["C10_m"].high == 1 and "stage_y_m" not in old.controls
    assert "field_rotation_rad" in old.controls


def test_a_number_may_be_written_as_people_write_it():
    for text in ("1e-8", "1.0e-8", "1E-8", "10.e-9", ".1e-7"):
        assert Limits.from_yaml(f"field_m: [{text}, 1]").field_m[0] == pytest.approx(1e-8)


# ---------------------------------------------------------------------------------------------------- checking


@pytest.mark.parametrize(
    "asked, why",
    [
        (Optics(C10_m=3e-7), "a step of 3e-07 m, over the limit of 2e-07 m"),
        (Optics(C12_m=(4e-9, 4e-9)), "a step of"),
        (Optics(C12_m=(0.0, 2e-8)), "outside the limit"),
        (Optics(C30_m=0.0), "no range for C30"),
        (Optics(energy_eV=8e4), "forbid to change energy"),
        (Detector("camera"), "forbid 'detector'"),
        (Optics(current_A=3e-10), "over the limit of 2e-10 A"),
        (Image((0.0, 0.0), (1e-9, 1e-9), (2, 2), 1e-3, "ADF"), "no detector 'ADF'"),
        (Image((0.0, 0.0), FIELD_M, (2, 2), 1e-3, rotation_rad=0.1), "outside the field"),
        (Spectrum(Raster((0.0, 0.0), FIELD_M, (4, 4), 0.5), 1e-3), "outside the field"),
        (Spectrum(Line((0.0, 0.0), (0.0, 3e-8), 4), 1e-3), "position x"),
        (Diffraction(((0.0, 0.0),), 0.3), "rest on one spot"),
        (Diffraction(((0.0, 0.0),) * 700, 0.1), "60 s"),
        (Field(None, 0.5), "corner of the field of view"),
        (Stage(alpha_rad=0.45), "envelope, which ends at 0.4 rad"),
        (Stage(alpha_rad=0.2, x_m=6e-4), "allows 0.0005 m"),
    ],
)
def test_a_refusal_says_what_the_limit_is(asked, why):
    assert why in refused(asked)


def test_a_detector_setting_that_is_named_is_limited_and_others_are_not():
    limits = Limits.from_yaml(
        "field_m: [1, 1]\nforbidden: [BF_inserted]\n"
        "controls: {camera_binning: [1, 4], HAADF_gain: {range: [1, 10], step: 2}, ADF_inserted: [0, 0]}"
    )
    assert Limits.from_dict(limits.to_dict()) == limits
    limits.check(Detector("camera", binning=(4, 4), exposure_s=1.0), 0.0, INFO, {})
    limits.check(Detector("HAADF", gain=3.0), 0.0, INFO, {"HAADF_gain": 2.0})
    for asked, why in (
        (Detector("camera", binning=(8, 8)), "camera binning 8"),
        (Detector("HAADF", gain=5.0), "step of 3"),
        (Detector("ADF", inserted=True), "ADF inserted 1"),
        (Detector("BF", inserted=False), "forbid to change BF inserted"),
    ):
        assert why in refused(asked, {"HAADF_gain": 2.0}, limits)


def test_a_path_of_very_many_positions_is_refused_without_counting_them():
    assert "bytes" in refused(Spectrum(Raster((0.0, 0.0), FIELD_M, (2**15, 2**15)), 1e-9))


def test_what_the_instrument_does_not_tell_is_refused_where_it_is_needed():
    assert "does not tell its C10_m" in refused(Optics(C10_m=0.0), {})
    assert "does not tell where the stage's" in refused(Stage(x_m=0.0), {})
    LIMITS.check(Optics(semiangle_rad=0.01), 1.0, INFO, {})


controls = st.sampled_from([name for name in CONTROLS if name not in ("energy_eV", "field_rotation_rad")])


@st.composite
def asks(draw):
    """A change of any one control, from anywhere to anywhere."""
    name = draw(controls)
    limit = LIMITS.controls.get(name)
    reach = 2 * max(abs(limit.low), abs(limit.high)) if limit else 1.0
    value = draw(st.floats(-reach, reach).filter(lambda v: v > 0 or name not in ("semiangle_rad", "current_A")))
    here = draw(st.floats(-reach, reach))
    if name in ("C12_m", "C21_m", "C23_m"):
        return name, Optics(**{name: (value, 0.0)}), value, {**REST, name: [here, 0.0]}
    if name.startswith("stage_"):
        return name, Stage(**{name.removeprefix("stage_"): value}), value, {**REST, name: here}
    return name, Optics(**{name: value}), value, {**REST, name: here}


@given(asks())
@settings(max_examples=300)
def test_nothing_passes_that_is_over_a_range_or_a_step(case):
    name, asked, value, state = case
    try:
        LIMITS.check(asked, 1.0, INFO, state)
    except LimitError:
        return
    limit = LIMITS.controls[name]
    here = state[name][0] if isinstance(state.get(name), list) else state.get(name)
    assert limit.low <= value <= limit.high
    assert limit.step is None or abs(value - here) <= limit.step * (1 + 1e-6)


axes = st.fixed_dictionaries(
    {
        "x_m": st.floats(-1e-3, 1e-3),
        "y_m": st.floats(-1e-3, 1e-3),
        "z_m": st.floats(-2e-4, 2e-4),
        "alpha_rad": st.floats(-0.5, 0.5),
        "beta_rad": st.floats(-0.3, 0.3),
    }
)
ENVELOPE = dataclasses.replace(LIMITS, controls=Limits(FIELD_M).controls)


def allowed(place):
    """Whether the envelope holds a place of the stage: written out again, by hand."""
    alpha, beta = abs(place["alpha_rad"]), abs(place["beta_rad"])
    if alpha > 0.4 or beta > 0.25:
        return False
    x = 1e-3 - alpha * (5e-4 / 0.2)
    z = 2e-4 - alpha * 5e-4 if alpha <= 0.2 else 1e-4 - (alpha - 0.2) * 4.5e-4
    y = 1e-3 - beta * (9e-4 / 0.25)
    slack = 1 + 1e-9
    return abs(place["x_m"]) <= x * slack + 1e-15 and abs(place["z_m"]) <= z * slack and abs(place["y_m"]) <= y * slack


@given(axes.filter(allowed), axes, st.sets(st.sampled_from(["x_m", "y_m", "z_m", "alpha_rad", "beta_rad"])), st.data())
@settings(max_examples=300)
def test_a_move_that_passes_stays_in_the_envelope_in_whatever_order_the_axes_go(start, goal, named, data):
    asked = Stage(**{axis: goal[axis] for axis in named})
    state = {f"stage_{axis}": value for axis, value in start.items()}
    try:
        ENVELOPE._check_envelope(asked, state)
    except LimitError:
        return
    place = dict(start)
    for axis in data.draw(st.permutations(sorted(named))):
        place[axis] = goal[axis]
        assert allowed(place)


@given(axes)
def test_the_way_back_to_zero_is_always_open(start):
    state = {f"stage_{axis}": value for axis, value in start.items()}
    ENVELOPE._check_envelope(Stage(0.0, 0.0, 0.0, 0.0, 0.0), state)
    for axis in start:
        ENVELOPE._check_envelope(Stage(**{axis: 0.0}), state)


@given(st.floats(1e-9, 1e-8), st.floats(1e-9, 2e-8), st.floats(-1, 1), st.floats(-0.2, 1.2), st.floats(-0.2, 1.2))
def test_a_position_passes_only_if_it_is_in_both_fields(height, width, turn, v, u):
    state = {**REST, "field_height_m": height, "field_width_m": width, "field_rotation_rad": turn}
    position = (v * height, u * width)
    place = absolute([position], state, FIELD_M)[0]
    try:
        LIMITS.check(Probe(position), 0.0, INFO, state)
    except LimitError:
        return
    slack = 1e-8
    assert -slack <= v <= 1 + slack and -slack <= u <= 1 + slack
    assert np.all(place >= -slack * np.array(FIELD_M)) and np.all(place <= (1 + slack) * np.array(FIELD_M))


# ------------------------------------------------------------------------------------------------------ memory


@given(st.lists(st.tuples(st.floats(-2e-4, 2e-4), st.floats(0.0, 3.0)), min_size=1, max_size=30))
def test_in_any_time_no_control_goes_further_than_its_step_and_rate(moves):
    """All windows of all sequences: the way is at most a step (here: a second's worth) and the rate times the time."""
    watch, state, now, way = LimitsWatch(LIMITS), dict(REST), 0.0, []
    for value, wait in moves:
        now += wait
        asked = Stage(x_m=value)
        try:
            watch.admit(asked, state, now)
        except LimitError:
            continue
        way.append((now, abs(value - state["stage_x_m"])))
        state["stage_x_m"] = value
    for i in range(len(way)):
        for j in range(i, len(way)):
            gone = sum(step for _, step in way[i : j + 1])
            assert gone <= 1e-4 * (1 + way[j][0] - way[i][0]) * (1 + 1e-6)


def test_a_refusal_by_the_rate_says_how_long_to_wait_and_then_it_passes():
    watch, state = LimitsWatch(LIMITS), dict(REST)
    watch.admit(Stage(x_m=8e-5), state, 10.0)
    state["stage_x_m"] = 8e-5
    with pytest.raises(LimitError, match=r"wait 0\.6 s"):
        watch.admit(Stage(x_m=0.0), state, 10.0)
    watch.admit(Stage(x_m=0.0), state, 10.61)
    with pytest.raises(LimitError, match="go in steps"):
        watch.admit(Stage(x_m=9e-4), {**REST}, 1000.0)


def test_a_beam_that_rests_is_found_and_one_that_moves_or_is_blanked_is_not():
    watch = LimitsWatch(LIMITS)
    here, there = ({**REST, "blanked": False, "probe_y_m": y} for y in (1e-9, 2e-9))
    assert watch.parked(here, 0.0) is None and watch.parked(here, 0.19) is None
    assert watch.parked(there, 0.21) is None
    assert "0.2" in watch.parked(there, 0.42)
    assert watch.parked({**there, "blanked": True}, 9.0) is None
    assert watch.parked(there, 9.1) is None
    assert LimitsWatch(Limits(FIELD_M)).parked(here, 1e9) is None


def test_an_open_beam_is_charged_where_it_will_rest():
    assert LIMITS.opened(Blank(False), {**REST, "probe_y_m": 3e-9}) == Probe((3e-9, 0.0))
    assert LIMITS.opened(Probe((1e-9, 1e-9)), {**REST, "blanked": False}) == Probe((1e-9, 1e-9))
    assert LIMITS.opened(Probe((1e-9, 1e-9)), REST) is None
    assert LIMITS.opened(Blank(True), REST) is None
    with pytest.raises(LimitError, match="where its probe is"):
        LIMITS.opened(Blank(False), {})


@given(
    st.sampled_from(
        [Optics(C10_m=1.0), Stage(x_m=1.0, beta_rad=2.0), Field(rotation_rad=1.0), Field((1.0, 1.0)), Blank()]
    )
)
def test_moved_names_controls_as_the_state_does(asked):
    assert {name for name, _ in moved(asked)} <= set(CONTROLS)
    assert all(math.isfinite(value) for _, value in moved(asked))
