import pytest

from stemloop.core.errors import InputError
from stemloop.core.protocols import Progress
from stemloop.decide.stop import first_of, max_electrons, max_points, max_seconds, wanted_sigma

START = Progress(points=20, sigma=0.5, electrons=1e6, seconds=10.0)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (wanted_sigma(0.5), "uncertainty"),
        (max_points(20), "points"),
        (max_electrons(1e6), "dose"),
        (max_seconds(10.0), "time"),
    ],
)
def test_a_limit_that_is_reached_exactly_stops_and_gives_its_reason(rule, reason):
    assert rule(START) == reason


@pytest.mark.parametrize("rule", [wanted_sigma(0.49), max_points(21), max_electrons(1.1e6), max_seconds(10.1)])
def test_a_limit_that_is_not_reached_goes_on(rule):
    assert rule(START) is None


def test_a_small_deviation_is_not_believed_before_enough_points():
    assert wanted_sigma(1.0, at_least=21)(START) is None
    assert wanted_sigma(1.0, at_least=20)(START) == "uncertainty"


def test_a_deviation_that_is_not_a_number_never_stops():
    assert wanted_sigma(1.0)(Progress(100, float("nan"), 0.0, 0.0)) is None


def test_first_of_gives_the_reason_of_the_first_rule_in_the_list():
    assert first_of(max_points(30), max_seconds(5.0), wanted_sigma(1.0))(START) == "time"
    assert first_of(max_points(30), max_seconds(50.0))(START) is None


@pytest.mark.parametrize(
    "build",
    [
        first_of,
        lambda: wanted_sigma(0.0),
        lambda: max_points(0),
        lambda: max_seconds(-1.0),
        lambda: max_electrons(float("nan")),
    ],
)
def test_rules_that_cannot_stop_sensibly_are_refused(build):
    with pytest.raises(InputError):
        build()
