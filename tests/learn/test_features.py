import numpy as np
from kinematic import discs

from stemloop.learn.features import condition, disc_maps
from stemloop.learn.geometry import CENTRE, PIXEL_PER_A, deformation, reflections

STRETCH = np.array([0.01, 0.01, 0.0, 0.03])


def maps_of(pattern, radius, electrons):
    return disc_maps((pattern * electrons)[None].astype(np.float32), np.array([radius]), np.array([electrons]))[0]


def test_the_intensity_map_holds_the_root_of_a_discs_fraction():
    electrons, radius = 1e6, 4.0
    maps = maps_of(discs("graphene", np.zeros(4), radius), radius, electrons)
    # a soft edge (1 px) and the softening (0.6 px) blur the rim of 4 px: about 15 % of the electrons lie there and
    # half of what is blurred is lost, which is less than 8 % of the root
    np.testing.assert_allclose(maps[0, CENTRE, CENTRE], np.sqrt(0.8), rtol=0.08)


def test_edge_maps_peak_where_the_strained_lattice_puts_its_discs():
    radius = 3.0
    maps = maps_of(discs("graphene", STRETCH, radius), radius, 1e7)
    g = np.linalg.solve(deformation(STRETCH[None])[0].T, reflections("graphene")[1:7].T).T / PIXEL_PER_A + CENTRE
    for x, y in g:
        row, column = np.rint([y, x]).astype(int)
        for edge in maps[1:]:
            around = edge[row - 3 : row + 4, column - 3 : column + 4]
            peak = np.unravel_index(around.argmax(), around.shape)
            # the peak of a map on whole pixels is at most one pixel from the disc's centre
            assert np.hypot(peak[0] - 3 + row - y, peak[1] - 3 + column - x) < 1.0


def test_maps_do_not_depend_on_dose_but_for_noise():
    pattern = discs("SrTiO3", STRETCH, 3.5)
    dim, bright = maps_of(pattern, 3.5, 1e6), maps_of(pattern, 3.5, 1e8)
    np.testing.assert_allclose(dim[0], bright[0], atol=1e-5)
    np.testing.assert_allclose(dim[2], bright[2], atol=1e-4)


def test_the_unpaired_row_and_column_are_not_looked_at():
    pattern = np.full((64, 64), 1e-4)
    other = pattern.copy()
    other[0] = other[:, 0] = 0.5
    np.testing.assert_array_equal(maps_of(pattern, 4.0, 1e5), maps_of(other, 4.0, 1e5))


def test_conditions_stay_within_about_one():
    known = condition(np.array([2.56, 8.96]), np.array([1e4, 3e6]), np.array([0.0197, 0.0487]))
    assert np.abs(known).max() < 1.2
