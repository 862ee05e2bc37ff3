"""Lawful instruments pass the suite, and each that breaks a law is caught by the check of that law."""

import numpy as np
import pytest
from conformance import InstrumentConformance, ServedConformance
from counting_instrument import TOKENS
from model_instrument import (
    Boasts,
    Clips,
    DeafControl,
    DoesMore,
    ForgetsOnRestore,
    HalfMoved,
    LeakyBlanker,
    LiveView,
    LosesTheLast,
    Model,
    Nanometres,
    OldTimes,
    OwnDice,
    SecretControl,
    SortedFrames,
    TwoLate,
    Unstoppable,
)

from stemloop.core.errors import InstrumentError
from stemloop.core.signal import Axis, Signal
from stemloop.instrument import conformance, examination, freshness
from stemloop.instrument.replay import Replay
from stemloop.instrument.subject import Bare, Moment, Nonconforming, Subject
from stemloop.simulate.twin import Twin


def recording(dimensions=4):
    rng = np.random.default_rng(0)
    scan = tuple(Axis(name, 8 if dimensions > 2 else 64, 0.5, 0.0, "nm") for name in "yx")
    rest = {2: (), 3: (Axis("energy_loss", 32, 1.0, 0.0, "eV"),)}.get(
        dimensions, (Axis("det_y", 8, 1.0, -3.5, "mrad"), Axis("det_x", 8, 1.0, -3.5, "mrad"))
    )
    axes = (*scan, *rest)
    return Signal(rng.poisson(30.0, [a.size for a in axes]).astype(np.uint16), axes)


class TestModel(InstrumentConformance):
    @pytest.fixture
    def instrument(self):
        return Model()


class TestTwin(InstrumentConformance):
    @pytest.fixture(scope="module")
    def instrument(self):
        return Twin("MoS2", 0)


class TestReplayOfPatterns(InstrumentConformance):
    @pytest.fixture
    def instrument(self):
        return Replay(recording(4), energy_eV=80e3)


class TestReplayOfSpectra(InstrumentConformance):
    @pytest.fixture
    def instrument(self):
        return Replay(recording(3))


class TestReplayOfImages(InstrumentConformance):
    @pytest.fixture
    def instrument(self):
        return Replay(recording(2))


class TestServedModel(ServedConformance):
    token = TOKENS["operator"]

    @pytest.fixture
    def address(self, served):
        return served(instrument=Model(), idle_exit_s=0.6).directory


class TestServedTwin(ServedConformance):
    token = TOKENS["operator"]

    @pytest.fixture
    def address(self, served):
        return served(instrument=Twin("MoS2", 0), idle_exit_s=2.0, heartbeat_s=20.0).directory


class TestServedReplay(ServedConformance):
    token = TOKENS["operator"]

    @pytest.fixture
    def address(self, served):
        return served(instrument=Replay(recording(4), energy_eV=80e3), idle_exit_s=0.6).directory


# -------------------------------------------------------------------------------------------- the suite is tested


def look(subject, moves=100):
    with conformance.opened(subject):
        return freshness.check_freshness(subject, moves, "diffraction")


def test_the_naive_way_to_grab_a_frame_is_caught():
    """ "The next frame" of a live view is that of the position before, nearly always."""
    found = look(Subject(Bare(LiveView())))
    assert found.stale_frames >= 100
    assert all(one["looks_like"] == one["place_before"] for one in found.stale)


def test_light_of_the_position_before_is_caught():
    found = look(Subject(Bare(HalfMoved())))
    assert 0.3 < found.carried_over < 0.8
    lawful = look(Subject(Bare(Model())))
    assert abs(lawful.carried_over) < 0.02


@pytest.mark.parametrize("broken", [TwoLate, SortedFrames, OldTimes])
def test_frames_of_other_positions_and_times_are_caught(broken):
    found = look(Subject(Bare(broken())))
    assert found.stale_frames > 0
    assert bool(found.clock) == (broken is OldTimes)


LAWS = [
    (Boasts, conformance.info_is_truthful, "no energy-loss axis"),
    (LosesTheLast, conformance.declared_instructions_work, "shape"),
    (DoesMore, conformance.undeclared_is_refused, "optics was carried out although 'optics' is not declared"),
    (SecretControl, conformance.state_is_complete, "stage_x_m"),
    (Nanometres, conformance.state_round_trips, "C10_m"),
    (DeafControl, conformance.state_round_trips, "stage_x_m, stage_y_m"),
    (ForgetsOnRestore, conformance.state_is_restored, "C12_m"),
    (LeakyBlanker, conformance.blank_blanks, "with a blanked beam"),
    (OwnDice, conformance.noise_follows_the_key, "other frames"),
    (Clips, conformance.limits_hold, "not refused"),
    (Unstoppable, conformance.abort_ends, "went on to its end"),
]


@pytest.mark.parametrize("broken, check, words", LAWS, ids=lambda value: getattr(value, "__name__", ""))
def test_who_breaks_a_law_is_caught_by_its_check(broken, check, words):
    with pytest.raises(Nonconforming, match=words):
        check(Subject(Bare(broken())))


@pytest.mark.parametrize("broken, check, words", LAWS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_checks_tell_the_laws_apart(broken, check, words):
    """A lawful instrument passes the check that catches the other."""
    check(Subject(Bare(Model())))


def test_places_that_look_alike_are_no_proof():
    class Uniform(Model):
        def pattern(self, place):
            return np.ones((12, 12))

    with pytest.raises(InstrumentError, match="no two places of the field look different"):
        look(Subject(Bare(Uniform())))


def test_the_discriminant_never_accuses_and_never_misses():
    """Over many seeds: no lawful frame is called stale, and every late one is."""
    for seed in range(5):
        assert look(Subject(Bare(Model()), f"s{seed}", seed), 200).stale_frames == 0
        assert look(Subject(Bare(LiveView()), f"s{seed}", seed), 200).stale_frames >= 200


def test_clocks_that_differ_by_a_constant_are_no_contradiction():
    offset, slow = 3600.0, 0.5
    lawful = [Moment(t, t + offset + 0.01, t + offset + 0.02, t + 0.03 + slow * (t % 2), int(t)) for t in range(1, 20)]
    assert freshness.clock_contradictions(lawful) == []
    early = [*lawful[:9], Moment(10, 10 + offset - 0.4, 10 + offset - 0.3, 10.03, 10), *lawful[10:]]
    assert freshness.clock_contradictions(early)
    again = [*lawful, Moment(20, 20 + offset, 20 + offset, 20.1, 19)]
    assert any("epoch 19 came after epoch 19" in line for line in freshness.clock_contradictions(again))


def test_an_examination_names_what_is_wrong_and_leaves_the_beam_blanked(served):
    one = served(instrument=LiveView(), idle_exit_s=0.6)
    with one.connect("operator") as scope:
        report = examination.examine(scope, moves=30)
    assert not report["ok"] and report["stale_frames"] >= 30 and report["beam"] == "blanked"
    assert not report["checks"]["stale frames"]["ok"] and report["checks"]["limits"]["ok"]


def test_breaches_are_counted():
    class Careless(Model):
        def inside(self, positions):
            pass

    subject = Subject(Bare(Careless()))
    with pytest.raises(Nonconforming) as caught:
        conformance.limits_hold(subject)
    figures = caught.value.figures
    assert "image over the field" in figures["breaches"] and len(figures["breaches"]) <= figures["tried"]
