"""How precisely columns are found, beside the Cramer-Rao bound; how completely, and how honest the deviations are."""

from functools import cache

import numpy as np
import pytest
from scipy.spatial import cKDTree

from stemloop.describe.atoms import find_columns
from stemloop.simulate import pictures


def bound(weight, width, dose, pixel_pm, background=0.1):
    """Deviation [px] of one coordinate of a lone column on Poisson counts: by symmetry the place is independent of
    amplitude, width and background, and for neighbours six widths away or more it is so to a few thousandths."""
    peak = dose * (pixel_pm / 100) ** 2 * pictures.PEAK_OF_DOSE
    reach = np.arange(-int(8 * width), int(8 * width) + 1)
    y, x = np.meshgrid(reach, reach, indexing="ij")
    g = weight * np.exp(-0.5 * (x**2 + y**2) / width**2)
    return 1 / np.sqrt((peak * (g * x / width**2) ** 2 / (g + background)).sum())


@cache
def judged(dose, pixel_pm, seeds, size=512):
    """Errors over the bound, and over the stated deviation, by site; recalls, precisions; vacancies found, true."""
    errors, pulls, recall, precision, vacancies = {0: [], 1: []}, [], [], [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        plane = pictures.layout("SrTiO3[001]", (size, size), pixel_pm, rotation_rad=0.1 + 0.2 * seed, margin=-10)
        truth = pictures.jittered(pictures.without(plane, 0.01, 1, rng), 3.0, rng)
        found = find_columns(pictures.counted(pictures.mean_image(truth, dose), rng))
        width = 45 / pixel_pm
        # columns cut by the border, which no fit knows, reach inwards
        margin, reach = 8 * width, 0.3 * 276 / pixel_pm

        def inner(place, margin=margin):
            return ((place > margin) & (place < size - 1 - margin)).all(axis=1)

        distance, which = cKDTree(found.position).query(truth.position)
        seen = inner(truth.position) & (distance < reach)
        recall.append(seen.sum() / inner(truth.position).sum())
        precision.append((cKDTree(truth.position).query(found.position)[0] < reach)[inner(found.position)].mean())
        error = found.position[which] - truth.position
        pulls.append((error / found.sigma[which])[seen])
        for site in (0, 1):
            mine = seen & (truth.site == site)
            one = bound(truth.weight[mine][0], truth.width[mine][0], dose, pixel_pm)
            errors[site].append(error[mine] / one)
        gone, empty = truth.vacant[inner(truth.vacant)], found.vacant[inner(found.vacant)]
        vacancies.append(
            (
                (cKDTree(found.vacant).query(gone)[0] < reach).sum() if len(found.vacant) else 0,
                len(gone),
                (cKDTree(truth.vacant).query(empty)[0] < reach).sum(),
                len(empty),
            )
        )
    rmse = [float(np.sqrt(np.mean(np.concatenate(errors[site]) ** 2))) for site in (0, 1)]
    return rmse, np.concatenate(pulls), recall, precision, np.sum(vacancies, axis=0)


@pytest.mark.parametrize("dose", [1e3, 1e4, 1e5])
def test_columns_are_as_precise_as_counts_allow_and_know_it(dose):
    rmse, pulls, _, _, _ = judged(dose, 15.0, 5)
    # five pictures hold 1500 columns of each kind: a statistical uncertainty of 0.013
    assert max(rmse) < (1.05 if dose >= 1e4 else 1.08)
    assert 0.65 < (np.abs(pulls) < 1).mean() < 0.71
    assert 0.95 < pulls.std() < 1.05


def test_every_column_is_found_at_low_dose_and_vacancies_are_vacancies():
    _, _, recall, precision, (found, gone, true, named) = judged(1e3, 15.0, 5)
    assert min(recall) > 0.98
    assert min(precision) > 0.99
    assert found == gone
    assert true >= 0.4 * named  # peaks of nine tenths of a count: one column in two hundred looks empty


@pytest.mark.parametrize("dose", [1e4, 1e5])
def test_vacancies_are_exact_where_counts_tell(dose):
    _, _, recall, precision, (found, gone, true, named) = judged(dose, 15.0, 5)
    assert min(recall) == 1 and min(precision) == 1
    assert found == gone and true == named


@pytest.mark.parametrize("pixel_pm", [8.0, 11.0, 20.0, 30.0])
def test_pixels_of_any_size(pixel_pm):
    rmse, pulls, recall, precision, _ = judged(1e4, pixel_pm, 3 if pixel_pm < 12 else 1)
    assert min(recall) == 1 and min(precision) == 1
    assert max(rmse) < 1.1  # 8 pm: 350 columns of a kind, which scatter by 0.03
    assert 0.63 < (np.abs(pulls) < 1).mean() < 0.73
