"""The law of the socket ``Instrument``, to be inherited.

A subclass gives the fixture ``instrument``; it may live as long as its module. What a class sets aside says why:

    class TestMine(InstrumentConformance):
        @pytest.fixture(scope="module")
        def instrument(self):
            ...

:class:`ServedConformance` asks the same through a server: its fixture ``address`` is a folder or a URL, ``token`` a
secret of the role operator (or None for a folder).
"""

import pytest

from stemloop.core.protocols import Abortable, Instrument
from stemloop.instrument import conformance, examination, freshness
from stemloop.instrument.client import connect
from stemloop.instrument.subject import Bare, Subject


class InstrumentConformance:
    #: Moves between distinguishable places.
    moves = 60
    #: Most electrons in one frame of these.
    electrons_max = 2e6
    #: Whether the same key gives the same frames: what is simulated or recorded.
    repeatable = True

    @pytest.fixture
    def subject(self, instrument):
        subject = Subject(Bare(instrument), "conformance", 0, self.electrons_max)
        yield subject
        with conformance.opened(subject):  # leaves the beam blanked
            pass

    def test_it_has_the_socket(self, instrument):
        assert isinstance(instrument, Instrument)

    def test_what_it_says_of_itself_can_be(self, subject):
        conformance.info_is_truthful(subject)

    def test_every_declared_instruction_brings_what_was_asked(self, subject):
        tried = conformance.declared_instructions_work(subject)["tried"]
        assert {"image", "diffraction", "spectrum", "blank", "report"} & set(tried)

    def test_what_is_not_declared_is_refused_and_changes_nothing(self, subject):
        conformance.undeclared_is_refused(subject)

    def test_what_can_be_set_can_be_read(self, subject):
        conformance.state_is_complete(subject)

    def test_what_was_set_is_what_is_reported(self, subject):
        assert not conformance.state_round_trips(subject)["different"]

    def test_restore_brings_everything_back(self, subject):
        conformance.state_is_restored(subject)

    def test_a_blanked_beam_exposes_nothing(self, subject):
        conformance.blank_blanks(subject)

    def test_the_same_key_gives_the_same_frames(self, subject):
        if not self.repeatable:
            pytest.skip("this instrument's noise does not come from the key")
        conformance.noise_follows_the_key(subject)

    def test_positions_outside_the_field_are_refused(self, subject):
        conformance.limits_hold(subject)

    def test_each_frame_belongs_to_the_position_that_was_asked_for(self, subject):
        with conformance.opened(subject):
            found = freshness.check_freshness(subject, self.moves)
        assert found.stale == [] and found.clock == []
        assert found.carried_over < freshness.CARRIED
        assert found.moves == self.moves and found.places >= 3

    def test_a_long_exposure_can_be_ended(self, subject, instrument):
        if not isinstance(instrument, Abortable):
            pytest.skip("this instrument cannot be aborted")
        conformance.abort_ends(subject)


class ServedConformance:
    moves = 30
    token = None

    @pytest.fixture
    def scope(self, address):
        with connect(address, self.token, "operator", patience_s=60.0) as scope:
            yield scope

    def test_the_whole_examination(self, scope):
        report = examination.examine(scope, moves=self.moves)
        assert report["ok"], {name: check for name, check in report["checks"].items() if not check["ok"]}
        assert report["stale_frames"] == 0 and report["breaches"] == []
        assert report["moves"] == self.moves
        assert report["round_trips"]["different"] == []
        assert report["beam"] == "blanked"
