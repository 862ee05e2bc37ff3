import json
import math
from fractions import Fraction

import pytest
from counting_instrument import FIELD_M, TOKENS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stemloop.core.errors import DoseError, InputError, LeaseError, LimitError, NotAuthorised
from stemloop.core.instruction import Blank, Diffraction, Image, Optics, Probe, Report, Spectrum, Stage
from stemloop.core.protocols import Camera, InstrumentInfo
from stemloop.instrument.dose import DoseLedger
from stemloop.instrument.lease import LeaseDesk
from stemloop.instrument.limits import Limits
from stemloop.instrument.tokens import Identity, Tokens

INFO = InstrumentInfo(
    "all", ("image", "diffraction", "probe", "blank", "optics", "stage", "report"), FIELD_M, 80e3,
    camera=Camera((128, 128), 1e-3, (63.5, 63.5)),
)  # fmt: skip
LIMITS = Limits.from_info(INFO)


# ------------------------------------------------------------------------------------------------------- dose


class LedgerMachine(RuleBasedStateMachine):
    """Any order of reservations and settlements: the ledger is the exact sum of what was exposed."""

    budget = 10_000

    def __init__(self):
        super().__init__()
        self.ledger = DoseLedger(self.budget)
        self.reserved = {}
        self.exposed = 0
        self.overdrawn = 0
        self.count = 0

    @rule(electrons=st.floats(0, 6000))
    def reserve(self, electrons):
        self.count += 1
        whole = math.ceil(Fraction(electrons))
        fits = self.exposed + sum(self.reserved.values()) + whole <= self.budget
        try:
            self.ledger.reserve(str(self.count), electrons)
            assert fits
            self.reserved[str(self.count)] = whole
        except DoseError as error:
            assert not fits and "budget" in str(error)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), share=st.none() | st.floats(0, 1))
    def settle(self, data, share):
        name = data.draw(st.sampled_from(sorted(self.reserved)))
        reserved = self.reserved.pop(name)
        given = None if share is None else reserved * share
        self.exposed += reserved if given is None else math.ceil(Fraction(given))
        self.ledger.settle(name, given)

    @invariant()
    def the_ledger_is_the_sum_of_exposures(self):
        dose = self.ledger.dose()
        assert self.ledger.spent == self.exposed
        assert dose["reserved"] == sum(self.reserved.values())
        assert dose["spent"] + dose["reserved"] <= self.budget
        assert dose["left"] == self.budget - dose["spent"] - dose["reserved"]


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_an_instrument_that_gives_more_than_was_reserved_is_charged_for_it():
    ledger = DoseLedger(100)
    ledger.reserve("a", 60)
    ledger.settle("a", 130)
    assert ledger.dose() == {"budget": 100.0, "spent": 130.0, "reserved": 0.0, "left": 0.0}
    with pytest.raises(DoseError):
        ledger.reserve("b", 1)


@pytest.mark.parametrize("electrons", [math.nan, math.inf, -1.0])
def test_a_dose_that_is_no_number_of_electrons_is_refused(electrons):
    with pytest.raises(InputError):
        DoseLedger(100).reserve("a", electrons)


# ------------------------------------------------------------------------------------------------------ leases

AGENT, OTHER = Identity("agent:a", "agent"), Identity("agent:b", "agent")
OPERATOR, VIEWER = Identity("operator", "operator"), Identity("viewer", "viewer")


class DeskMachine(RuleBasedStateMachine):
    """Clients that fight, clocks that run: one driver at a time, numbers that only grow, no act with an old number."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.durable = 0
        self.desk = LeaseDesk(remember=self.remember, clock=lambda: self.now)
        self.given = []

    def remember(self, number):
        assert number > self.durable
        self.durable = number

    @rule(who=st.sampled_from([AGENT, OTHER, OPERATOR]), ttl=st.floats(0.1, 10), takeover=st.booleans())
    def acquire(self, who, ttl, takeover):
        before = self.desk.lease
        try:
            lease = self.desk.acquire(who, ttl, takeover)
        except LeaseError:
            assert before is not None and not (takeover and who.rank > before.holder.rank)
        else:
            assert before is None or (takeover and who.rank > before.holder.rank)
            assert lease.fencing == self.durable
            self.given.append(lease)

    @rule(seconds=st.floats(0, 6))
    def time_passes(self, seconds):
        self.now += seconds

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def release(self, data):
        lease = data.draw(st.sampled_from(self.given))
        try:
            self.desk.release(lease.holder, lease.lease_id)
        except LeaseError:
            assert self.desk.lease is not lease
        self.check_unattended()

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def command(self, data):
        lease = data.draw(st.sampled_from(self.given))
        valid = self.desk.lease is lease
        try:
            self.desk.check(lease.lease_id, lease.fencing)
            assert valid and lease is self.given[-1] and self.now < lease.deadline
        except LeaseError:
            assert not valid

    @invariant()
    def numbers_only_grow(self):
        numbers = [lease.fencing for lease in self.given]
        assert numbers == sorted(set(numbers))

    @invariant()
    def check_unattended(self):
        if self.given and self.desk.lease is None:
            assert self.desk.unattended


TestDesk = DeskMachine.TestCase
TestDesk.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_lease_does_not_expire_under_a_running_command():
    now = [0.0]
    desk = LeaseDesk(clock=lambda: now[0])
    lease = desk.acquire(AGENT, 1.0)
    begun = desk.begin(lease.lease_id)
    now[0] = 100.0
    assert desk.lease is lease
    desk.finish(begun)
    now[0] = 100.9
    assert desk.lease is lease
    now[0] = 101.1
    assert desk.lease is None and desk.unattended


def test_who_comes_back_learns_that_somebody_else_drove():
    desk = LeaseDesk()
    first = desk.acquire(AGENT)
    desk.release(AGENT, first.lease_id)
    other = desk.acquire(OTHER)
    desk.release(OTHER, other.lease_id)
    with pytest.raises(LeaseError, match="given to others"):
        desk.acquire(AGENT, expected=first.fencing)
    assert desk.acquire(OTHER, expected=other.fencing).fencing == other.fencing + 1


def test_a_viewer_gets_no_lease_and_an_equal_takes_none_over():
    desk = LeaseDesk()
    with pytest.raises(NotAuthorised, match="viewer may not take the lease"):
        desk.acquire(VIEWER)
    desk.acquire(AGENT)
    with pytest.raises(LeaseError, match=r"agent:a holds the lease \(number 1\)"):
        desk.acquire(OTHER, takeover=True)
    with pytest.raises(LeaseError, match="takeover=True"):
        desk.acquire(OPERATOR)
    assert desk.acquire(OPERATOR, takeover=True).fencing == 2
    assert desk.unattended


# ------------------------------------------------------------------------------------------------------ tokens


def test_tokens_tell_who_speaks_and_are_not_kept():
    tokens = Tokens({**TOKENS, "operator:maria": "marias-long-secret-word"})
    assert tokens.identify("marias-long-secret-word") == Identity("operator:maria", "operator")
    assert tokens.identify(TOKENS["viewer"]).role == "viewer"
    with pytest.raises(NotAuthorised, match="not known"):
        tokens.identify("agent-secret-0123456788")
    assert "secret" not in repr(vars(tokens))


@pytest.mark.parametrize("given", [{"king": "x" * 20}, {"agent": "short"}, {"agent": "y" * 20, "viewer": "y" * 20}])
def test_tokens_that_protect_nothing_are_refused(given):
    with pytest.raises(InputError):
        Tokens(given)


# ------------------------------------------------------------------------------------------------------ limits

INSIDE = [
    Image((0.0, 0.0), FIELD_M, (64, 128), 1e-6),
    Diffraction(((0.0, 0.0), FIELD_M), 1e-3),
    Probe((5e-9, 5e-9)),
    Blank(),
    Optics(semiangle_rad=0.03, C10_m=-1e-8, current_A=1e-10),
    Stage(x_m=1e-6, alpha_rad=0.1),
    Report(),
]
OUTSIDE = [
    (Image((1e-9, 0.0), FIELD_M, (64, 64), 1e-6), "position y"),
    (Diffraction(((0.0, 0.0), (0.0, 2.1e-8)), 1e-3), "position x = 2.1e-08 m is outside the field 0 to 2e-08 m"),
    (Probe((-1e-12, 0.0)), "outside the field"),
    (Diffraction(((0.0, 0.0),), 2.0), "dwell 2 s is over the limit of 1 s"),
    (Image((0.0, 0.0), FIELD_M, (8, 8), 2.0), "dwell"),
    (Diffraction(((0.0, 0.0),) * 5000, 1e-3), "ask for fewer positions"),
    (Optics(current_A=1e-6), "current 1e-06 A is over"),
    (Optics(semiangle_rad=0.2), "semiangle 0.2 rad is outside the limit 0.001 to 0.06"),
    (Optics(C10_m=-1e-3), "C10"),
    (Stage(alpha_rad=1.0), "stage alpha_rad 1 rad"),
    (Spectrum(((0.0, 0.0),), 0.1), "all cannot do 'spectrum'; it can do image"),
    (Blank(False), "unblank is false"),
]


@pytest.mark.parametrize("asked", INSIDE, ids=lambda asked: asked.kind)
def test_what_is_inside_the_limits_passes(asked):
    LIMITS.check(asked, 1e5, INFO)


@pytest.mark.parametrize("asked, why", OUTSIDE)
def test_what_is_outside_says_what_and_where_the_limit_is(asked, why):
    with pytest.raises(LimitError) as refusal:
        LIMITS.check(asked, 1e5, INFO)
    assert why in str(refusal.value)


def test_too_many_electrons_at_a_point_or_in_an_image_are_refused():
    with pytest.raises(LimitError, match="at one position"):
        LIMITS.check(INSIDE[1], 2e9, INFO)
    with pytest.raises(LimitError, match="the image would take"):
        LIMITS.check(INSIDE[0], 5e8, INFO)


def test_limits_survive_json_and_their_hash_tells_them_apart():
    changed = Limits.from_dict(
        {"field_m": [1e-8, 1e-8], "dwell_max_s": 0.1, "stage": {"x_m": [-1e-6, 1e-6]}, "version": 7}
    )
    assert Limits.from_json(json.dumps(changed.to_dict())) == changed
    assert Limits.from_json(json.dumps(changed.to_dict())).content_hash == changed.content_hash
    assert changed.content_hash != LIMITS.content_hash
    with pytest.raises(LimitError, match="no range for the stage axis y_m"):
        changed.check(Stage(y_m=0.0), 0.0, INFO)


@pytest.mark.parametrize(
    "declared",
    [{}, {"field_m": 1}, {"field_m": [1, 1], "dwell": 1}, {"field_m": [1, 1], "C10_m": [1, -1]},
     {"field_m": [1, 1], "stage": {"q": [0, 1]}}, {"field_m": [1, math.nan]}, {"field_m": [1, 1], "dwell_max_s": "1"}],
)  # fmt: skip
def test_limits_that_mean_nothing_are_refused(declared):
    with pytest.raises(InputError):
        Limits.from_dict(declared)


@given(st.floats(-1e-7, 1e-7), st.floats(-1e-7, 1e-7))
def test_a_position_passes_exactly_if_it_is_in_the_field(y, x):
    inside = 0 <= y <= FIELD_M[0] and 0 <= x <= FIELD_M[1]
    near = min(abs(y), abs(y - FIELD_M[0]), abs(x), abs(x - FIELD_M[1])) < 1e-16  # the slack for rounding
    try:
        LIMITS.check(Probe((y, x)), 0.0, INFO)
        assert inside or near
    except LimitError:
        assert not inside
