"""Columns of every crystal plane, at any scale and turn; weak sublattices and their vacancies at low dose."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from stemloop.describe.atoms import find_columns
from stemloop.simulate import pictures


def found(plane, dose, pixel_pm, turn, seed, vacancies=0.0, size=288):
    """Recall and precision away from the border; vacancies found, there, named and true; ``vacancies`` is the share of
    the weakest site that is empty."""
    rng = np.random.default_rng(seed)
    whole = pictures.layout(plane, (size, size), pixel_pm, turn, margin=-10)
    if vacancies:
        whole = pictures.without(whole, vacancies, int(np.argmin(pictures.PLANES[plane].weight)), rng)
    truth = pictures.jittered(whole, 3.0, rng)
    columns = find_columns(pictures.counted(pictures.mean_image(truth, dose), rng))
    margin, reach = 4 * 45 / pixel_pm, 45 / pixel_pm  # a third of a dumbbell's length

    def inner(place):
        return place[((place > margin) & (place < size - 1 - margin)).all(axis=1)]

    def near(some, others):
        return cKDTree(others).query(some)[0] < reach if len(others) else np.zeros(len(some), bool)

    gone, empty = inner(truth.vacant), inner(columns.vacant)
    right = near(inner(truth.position), columns.position), near(inner(columns.position), truth.position)
    return *right, near(gone, columns.vacant), near(empty, truth.vacant)


@pytest.mark.parametrize("plane", pictures.PLANES)
@pytest.mark.parametrize(("pixel_pm", "turn"), [(8.0, 0.1), (15.0, 0.5), (25.0, 1.2)])
def test_every_plane_is_found_whole(plane, pixel_pm, turn):
    recalled, true, _, named = found(plane, 1e4, pixel_pm, turn, seed=1)
    assert recalled.mean() >= 0.98
    assert true.mean() >= 0.99
    assert len(named) <= 0.005 * len(true) + 1  # nothing is vacant


# peaks of 1.8 counts for the brightest column of a plane: an eighth of it (titanium beside lead) is under two
# deviations, which nobody can tell from an empty place
LOW_DOSE = {
    "SrTiO3[001]": 0.98,
    "SrTiO3[110]": 0.98,
    "PbTiO3[100]": 0.49,
    "LaCoO3[001]": 0.98,
    "BaTiO3[100]": 0.92,
    "graphene": 0.9,
    "MoS2": 0.98,
    "WSe2": 0.98,
    "Si[110]": 0.98,
    "GaAs[110]": 0.98,
}


@pytest.mark.parametrize("plane", LOW_DOSE)
def test_weak_sublattices_are_found_by_what_all_their_places_show(plane):
    recalled, true, _, _ = found(plane, 1e3, 15.0, 0.1, seed=0, size=384)
    assert recalled.mean() >= LOW_DOSE[plane]
    assert true.mean() >= 0.99


@pytest.mark.parametrize("share", [0.01, 0.1])
@pytest.mark.parametrize("plane", ["SrTiO3[001]", "LaCoO3[001]", "MoS2", "BaTiO3[100]", "PbTiO3[100]"])
def test_vacancies_of_a_weak_sublattice_stay_vacancies(plane, share):
    parts = [found(plane, 1e3, 15.0, 0.1, seed, share, 384) for seed in range(2)]
    _, true, seen, named = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert true.mean() >= 0.99
    # half of what is named at the least; by Bayes' rule with a tenth of the places empty it is nine in ten
    assert named.sum() >= (0.85 if share == 0.1 else 0.5) * len(named) - 1
    if plane != "PbTiO3[100]":  # there places cannot be told apart, and none is named
        assert seen.sum() >= (0.8 if share == 0.1 else 0.5) * len(seen) - 1


@pytest.mark.parametrize("share", [0.01, 0.1])
@pytest.mark.parametrize("plane", ["PbTiO3[100]", "Si[110]"])
def test_vacancies_are_right_where_counts_tell(plane, share):
    recalled, true, seen, named = found(plane, 1e4, 15.0, 0.1, 3, share, 384)
    assert recalled.mean() >= 0.99
    assert true.mean() == 1
    # next to each other at the field's rim a few are left open
    assert seen.sum() >= 0.85 * len(seen) and named.all()
