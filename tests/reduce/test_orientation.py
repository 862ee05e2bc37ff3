import numpy as np
import pytest
from plain_block import pieces
from scipy.spatial.transform import Rotation

from stemloop.core import units
from stemloop.core.errors import InputError
from stemloop.core.protocols import Camera
from stemloop.reduce.disks import Template
from stemloop.reduce.engine import reduce
from stemloop.reduce.orientation import Matcher, OrientationMap, _stamp, reflections

CAMERA = Camera((96, 96), 0.9e-3, (47.6, 48.2))
FCC = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
DIAMOND = FCC + [[x + 0.25 for x in place] for place in FCC]


def atom(symbol, g):
    """A plain form factor, so that the tests of geometry do not wait for tables."""
    return {"Au": 79.0, "C": 6.0}[symbol] / (1 + (g * 0.6e-10) ** 2)


GOLD = reflections(np.eye(3) * 4.08e-10, ["Au"] * 4, FCC, 1.6e10, atom)
MATCHER = Matcher(GOLD, CAMERA, 200e3, Template.disk(2.5), thickness_m=3e-9)


def counted(rotation, height, rng):
    y, x = np.indices(CAMERA.shape)
    direct = 200 * MATCHER.template.at(y - CAMERA.centre_px[0], x - CAMERA.centre_px[1])
    return rng.poisson(height * MATCHER.image(rotation) + direct + 0.2).astype(np.uint16)


def difference(one, other):
    """Small turn (3,) about the laboratory's axes that leads from ``other`` to ``one``, over the symmetry."""
    best = max(GOLD.symmetry, key=lambda turn: np.trace(one @ turn @ other.T))
    return Rotation.from_matrix(one @ best @ other.T).as_rotvec()


def test_extinct_reflections_are_not_there():
    assert all(len({n % 2 for n in hkl}) == 1 for hkl in GOLD.index.tolist())  # fcc: all even or all odd
    diamond = reflections(np.eye(3) * 3.57e-10, ["C"] * 8, DIAMOND, 2e10, atom)
    assert [2, 0, 0] not in diamond.index.tolist() and [4, 0, 0] in diamond.index.tolist()
    strength = dict(zip(map(tuple, diamond.index.tolist()), diamond.strength))
    # |F|^2 of 111 is 32 f^2, of 220 it is 64 f^2
    g = [np.sqrt(n) / 3.57e-10 for n in (3, 8)]
    expected = 32 * atom("C", g[0]) ** 2 / (64 * atom("C", g[1]) ** 2)
    assert abs(strength[1, 1, 1] / strength[2, 2, 0] / expected - 1) < 1e-12


def test_symmetry_is_that_of_the_laue_class():
    hexagonal = np.array([[1, 0, 0], [-0.5, np.sqrt(3) / 2, 0], [0, 0, 1.6]]) * 3e-10
    hcp = reflections(hexagonal, ["Au"] * 2, [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]], 8e9, atom)
    low = np.array([[1, 0, 0], [0.1, 1.3, 0], [0.2, 0.3, 1.7]]) * 3e-10
    triclinic = reflections(low, ["Au"], [[0, 0, 0]], 8e9, atom)
    tetragonal = reflections(np.diag([1, 1, 1.2]) * 3e-10, ["Au"], [[0, 0, 0]], 8e9, atom)
    assert [len(c.symmetry) for c in (GOLD, hcp, tetragonal, triclinic)] == [24, 12, 8, 1]
    for turn in hcp.symmetry:
        assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-9) and np.linalg.det(turn) > 0


def test_tabulated_factors_are_in_the_right_unit():
    gold = reflections(np.eye(3) * 4.08e-10, ["Au"] * 4, FCC, 9e9)
    strength = dict(zip(map(tuple, gold.index.tolist()), gold.strength))
    # P. A. Doyle and P. S. Turner (1968): f(Au) at s = 0.2124 and 0.2452 1/A is 6.30 and 5.69 A (4 % between tables)
    assert abs(strength[2, 0, 0] / strength[1, 1, 1] - 0.84) < 0.05


def test_spots_lie_where_bragg_puts_them():
    places, strength = MATCHER.spots(np.eye(3))
    brightest = places[np.argsort(-strength)][:4] - np.array(CAMERA.centre_px)
    d = 4.08e-10 / 2  # 200
    assert np.allclose(np.hypot(*brightest.T), units.wavelength_m(200e3) / d / CAMERA.pixel_rad, rtol=1e-9)
    # a crystal turned from +x towards +y turns its pattern that way
    turned, _ = MATCHER.spots(Rotation.from_rotvec([0, 0, 0.2]).as_matrix())
    c, s = np.cos(0.2), np.sin(0.2)
    y, x = (places - np.array(CAMERA.centre_px)).T
    assert np.allclose(np.sort(turned[:, 0] - CAMERA.centre_px[0]), np.sort(s * x + c * y))


def test_known_orientations_are_recovered_under_noise_with_calibrated_deviations():
    rng = np.random.default_rng(2)
    z, wrong, unsure = [], 0, 0
    for rotation in Rotation.random(14, random_state=1).as_matrix():
        found = MATCHER.match(counted(rotation, 40, rng))
        turn = difference(found.rotation, rotation)
        if found.ambiguity > 0.05:
            unsure += 1
        elif np.linalg.norm(turn) > np.deg2rad(1):
            wrong += 1
        else:
            z.append(turn / found.sigma_rad)
            assert found.sigma_rad.max() < np.deg2rad(0.5) and 0.9 < found.misfit < 1.12
    z = np.array(z)
    # a pattern can have two explanations, and then it is said; otherwise at most one in ten goes astray
    assert wrong <= 1 and unsure <= 3 and len(z) >= 11
    assert np.all(np.abs(z) < 5) and 0.65 < z.std() < 1.35  # about 35 numbers


def test_strengths_that_the_model_does_not_know_cost_certainty():
    # as in a thick crystal: every spot is wrong by a factor of its own; noise is then the lesser evil
    rng = np.random.default_rng(4)
    astray, sure = 0, 0
    for rotation in Rotation.random(10, random_state=2).as_matrix():
        places, strength = MATCHER.spots(rotation)
        image = np.zeros(CAMERA.shape)
        template = MATCHER.template
        _stamp(places, strength * rng.lognormal(0, 0.8, len(strength)), template.fine, template.half, image)
        found = MATCHER.match(rng.poisson(400 * image + 0.5))
        wrong = MATCHER.misorientation(found.rotation, rotation) > np.deg2rad(2)
        if found.ambiguity < 0.1:
            sure += 1
            astray += wrong
            angles = np.abs(difference(found.rotation, rotation)) if not wrong else np.zeros(3)
            assert (angles < 5 * found.sigma_rad).all()
    assert astray == 0 and sure >= 3


def test_a_zone_axis_pattern_has_a_twin():
    # three beams and no more: turned half a turn about the beam it looks the same unless that is a symmetry
    rotation = Rotation.from_rotvec(np.arccos(1 / np.sqrt(3)) * np.array([1, -1, 0]) / np.sqrt(2)).as_matrix()  # [111]
    first, second = MATCHER.candidates(MATCHER.image(rotation) * 50, 2)
    assert second[0] > 0.97 * first[0]
    assert MATCHER.misorientation(first[1], second[1]) > 0.9  # 60 degrees


def test_a_map_of_two_grains():
    rng = np.random.default_rng(3)
    grains = Rotation.random(9, random_state=1).as_matrix()[[0, 8]]
    data = np.stack([counted(grains[i], 60, rng) for i in (0, 1, 1)]).reshape(1, 3, *CAMERA.shape)
    maps = reduce(OrientationMap(MATCHER), pieces(data, [1]), (1, 3), CAMERA.shape)
    for i, grain in enumerate((0, 1, 1)):
        assert MATCHER.misorientation(maps["orientation"][0, i], grains[grain]) < np.deg2rad(0.4)
    assert maps["orientation_sigma"].shape == (1, 3, 3) and np.all(maps["orientation_score"] > 0.4)
    nothing = MATCHER.match(np.zeros(CAMERA.shape))
    assert np.isnan(nothing.rotation).all() and nothing.score == 0


def test_what_cannot_be_matched_is_said():
    with pytest.raises(InputError, match="patterns are counts"):
        MATCHER.match(np.zeros((3, 3)))
    with pytest.raises(InputError, match="reach further"):
        reflections(np.eye(3) * 4e-10, ["Au"], [[0, 0, 0]], 1e8, atom)
    with pytest.raises(InputError, match="direct beam"):
        Matcher(GOLD, Camera((20, 20), 1e-3, (10, 10)), 200e3, Template.disk(5), 3e-9).match(np.zeros((20, 20)))
