"""Laws of the dose by place: nothing is lost, no cell passes its limit, the order does not matter."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemloop.core.errors import DoseError, LimitError
from stemloop.core.instruction import KINDS, Diffraction, Image, Line, Probe, Raster, Spectrum
from stemloop.core.protocols import InstrumentInfo
from stemloop.instrument.declaration import Region
from stemloop.instrument.dose import DoseLedger, DoseMap, footprint

FIELD_M = (1e-8, 2e-8)
INFO = InstrumentInfo("all", tuple(KINDS), FIELD_M, 80e3)
REGION = Region(cell_m=1e-9, e_per_A2_max=100.0, probe_area_m2=1e-20)
CELL_A2 = 100.0

inside = st.tuples(st.floats(0.0, FIELD_M[0]), st.floats(0.0, FIELD_M[1]))
images = st.builds(
    Image,
    inside,
    st.tuples(st.floats(1e-10, 5e-9), st.floats(1e-10, 5e-9)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.just(1e-6),
    rotation_rad=st.sampled_from([0.0, 0.3, math.pi / 2]),
)
points = st.builds(
    Diffraction,
    st.lists(inside, min_size=1, max_size=6).map(tuple)
    | st.builds(Line, inside, inside, st.integers(1, 20))
    | st.builds(Raster, inside, st.tuples(st.floats(1e-10, 5e-9), st.floats(1e-10, 5e-9)), st.just((3, 4))),
    st.just(1e-6),
)
states = st.fixed_dictionaries(
    {"stage_y_m": st.floats(-1e-7, 1e-7), "stage_x_m": st.floats(-1e-7, 1e-7)},
    optional={"field_height_m": st.just(8e-9), "field_width_m": st.just(8e-9), "field_rotation_rad": st.floats(-1, 1)},
)
exposures = st.tuples(images | points, states, st.floats(0.0, 3e4))


@given(images | points, states)
def test_the_shares_of_a_footprint_add_up_to_one_and_each_cell_comes_once(asked, state):
    where = footprint(asked, REGION, INFO, state)
    assert where.share.sum() == pytest.approx(1.0) and np.all(where.share > 0)
    assert len(np.unique(where.cells, axis=0)) == len(where.cells)


@given(images | points, states, st.integers(0, 10**7))
def test_whole_electrons_of_the_cells_add_up_and_are_within_one_of_their_share(asked, state, electrons):
    where = footprint(asked, REGION, INFO, state)
    amounts = where.amounts(electrons)
    assert amounts.sum() == electrons and np.all(amounts >= 0)
    assert np.all(np.abs(amounts - where.share * electrons) <= 1.0 + 1e-6)


@given(st.lists(exposures, max_size=8), st.floats(0, 1e5))
@settings(max_examples=60, deadline=None)
def test_never_over_a_limit_and_the_map_holds_what_was_spent_and_reserved(asked, budget):
    ledger = DoseLedger(budget, region=REGION)
    promised = 0
    for i, (one, state, electrons) in enumerate(asked):
        before = ledger.committed.total
        try:
            promised += ledger.reserve(str(i), electrons, ledger.footprint(one, INFO, state))
        except DoseError:
            assert ledger.committed.total == before  # a refusal leaves nothing behind
            continue
        if i % 2:
            given_ = ledger.settle(str(i), electrons / 2)
            promised += given_ - math.ceil(electrons)
        assert ledger.worst_e_per_A2 <= REGION.e_per_A2_max
        assert ledger.spent + ledger.reserved <= budget
        assert ledger.committed.total == ledger.spent + ledger.reserved == promised


@given(st.lists(exposures, min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_the_map_does_not_depend_on_the_order(asked):
    loose = Region(REGION.cell_m, 1e12, REGION.probe_area_m2)
    found = []
    for order in itertools.islice(itertools.permutations(range(len(asked))), 6):
        ledger = DoseLedger(region=loose)
        for i in order:
            one, state, electrons = asked[i]
            ledger.reserve(str(i), electrons, ledger.footprint(one, INFO, state))
        for i in reversed(order):
            ledger.settle(str(i), asked[i][2] / 3)
        tiles = {k: v.tolist() for k, v in ledger.committed._tiles.items() if v.any()}
        found.append((ledger.spent, ledger.reserved, tiles))
    assert all(one == found[0] for one in found)


def test_an_image_gives_each_place_its_electrons_per_area():
    image = Image((1e-9, 2e-9), (4e-9, 4e-9), (8, 8), 1e-6)
    ledger = DoseLedger(region=Region(1e-9, 1e9, 1e-20))
    ledger.reserve("a", 64_000.0, ledger.footprint(image, INFO, {}))
    cells = np.array([[1, 2], [4, 5], [0, 2], [5, 5]])
    assert ledger.committed.at(cells).tolist() == [4000, 4000, 0, 0]  # 64,000 electrons over 16 cells
    assert ledger.worst_e_per_A2 == pytest.approx(64_000 / (40 * 40))


def test_a_turned_image_covers_the_same_area():
    """By sampling: 4 samples a cell and direction; the inner cells come out within 10 %."""
    upright = Image((2e-9, 7e-9), (6e-9, 6e-9), (8, 8), 1e-6)
    turned = Image((2e-9, 7e-9), (6e-9, 6e-9), (8, 8), 1e-6, rotation_rad=0.5)
    one, other = (footprint(a, REGION, INFO, {}) for a in (upright, turned))
    assert one.share.max() == pytest.approx(1 / 36)
    assert other.share.max() == pytest.approx(1 / 36, rel=0.25)
    inner = np.all(np.abs(other.cells - [4.5, 9.5]) < 1.6, axis=1)
    np.testing.assert_allclose(other.share[inner].mean(), 1 / 36, rtol=0.1)


def test_a_point_spreads_over_its_declared_area():
    # a square of 2 nm x 2 nm around a corner of four cells of 1 nm: a quarter each
    region = Region(1e-9, 1e9, 4e-18)
    where = footprint(Probe((5e-9, 5e-9)), region, INFO, {})
    assert sorted(map(tuple, where.cells.tolist())) == [(4, 4), (4, 5), (5, 4), (5, 5)]
    np.testing.assert_allclose(where.share, 0.25)


@given(inside, st.floats(-1e-6, 1e-6), st.floats(-1e-6, 1e-6))
def test_the_grid_lies_on_the_specimen(position, y, x):
    """A stage that moves by s takes the place p of the field to p - s of the specimen, unless the grid stays behind."""

    def middle(at, region, state):
        where = footprint(Probe(at), region, INFO, state)
        return where.share @ where.cells

    moved = {"stage_y_m": y, "stage_x_m": x}
    # the middle of the cells follows the place continuously; 1e-6 m in cells of 1e-9 m is rounded to 1e-12
    np.testing.assert_allclose(
        middle(position, REGION, moved), middle((position[0] - y, position[1] - x), REGION, {}), atol=1e-8
    )
    fixed = Region(REGION.cell_m, 1.0, REGION.probe_area_m2, follows_stage=False)
    np.testing.assert_array_equal(middle(position, fixed, moved), middle(position, fixed, {}))


@given(st.integers(0, 12))
def test_the_part_of_an_exposure_that_was_made_is_its_first_positions(done):
    asked = Spectrum(Line((1e-9, 1e-9), (1e-9, 12e-9), 12), 1e-3)
    if done == 0:
        return
    part = footprint(asked, REGION, INFO, {}, done)
    first = footprint(Spectrum(asked.positions_m[:done], 1e-3), REGION, INFO, {})
    np.testing.assert_array_equal(part.cells, first.cells)
    image = Image((0.0, 0.0), (6e-9, 6e-9), (6, 6), 1e-3)
    rows = footprint(image, REGION, INFO, {}, 13)  # two rows and a pixel: three rows
    assert rows.cells[:, 0].max() == 2


def test_a_refusal_names_the_place_the_dose_and_the_limit():
    ledger = DoseLedger(region=REGION)
    shot = Probe((5.5e-9, 2.5e-9))
    ledger.reserve("a", 6000.0, ledger.footprint(shot, INFO, {}))
    with pytest.raises(DoseError, match=r"60 e/A\^2 at \(y, x\) = \(5.5e-09, 2.5e-09\).*60 already.*100 e/A"):
        ledger.reserve("b", 6000.0, ledger.footprint(shot, INFO, {}))
    ledger.reserve("c", 6000.0, ledger.footprint(Probe((5.5e-9, 4.5e-9)), INFO, {}))


def test_an_exposure_over_too_many_cells_is_refused_and_says_what_to_do():
    fine = Region(1e-12, 1e9, 1e-20)
    for asked in (Image((0.0, 0.0), FIELD_M, (2, 2), 1e-6), Image((0.0, 0.0), FIELD_M, (2, 2), 1e-6, rotation_rad=0.1)):
        with pytest.raises(LimitError, match="larger cell_m"):
            footprint(asked, fine, INFO, {})


@given(st.lists(st.tuples(st.integers(-300, 300), st.integers(-300, 300)), unique=True, min_size=1, max_size=50))
def test_a_map_is_a_dictionary_of_sums(cells):
    places = np.array(cells)
    amounts = np.arange(1, len(cells) + 1)
    doses, kept = DoseMap(), {}
    for _ in range(2):
        doses.add(places, amounts)
        for cell, amount in zip(cells, amounts, strict=True):
            kept[cell] = kept.get(cell, 0) + int(amount)
    assert doses.at(places).tolist() == [kept[cell] for cell in cells]
    assert doses.worst == max(kept.values()) and doses.total == sum(kept.values())
    other = doses.copy()
    other.add(places, amounts)
    assert doses.total == sum(kept.values())
