"""Denoising: less noise, the same atoms in the same places."""

from __future__ import annotations

import numpy as np
import pytest

from reduce.moving import bound
from stemloop.core.errors import InputError, UnknownName
from stemloop.reduce.denoise import METHODS, column_width, denoise, translations
from stemloop.simulate import pictures

PLANE = "SrTiO3[001]"


def crystal(size, seed=5, disorder_pm=6.0, vacancies=0.02):
    rng = np.random.default_rng(seed)
    layout = pictures.layout(PLANE, (size, size), 15.0, 0.1, margin=-20.0)
    return pictures.jittered(pictures.without(layout, vacancies, 1, rng), disorder_pm, rng), rng


def fitted(image, place, width):
    """(n, 2) Gaussians with a background fitted to windows around ``place``, unweighted (Gauss-Newton)."""
    reach = round(2.3 * width)
    corner = np.rint(place).astype(int)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    pixels = image[corner[:, 0, None, None] + y, corner[:, 1, None, None] + x].reshape(len(place), -1)
    y, x = y.ravel()[None], x.ravel()[None]
    low, high = pixels.min(axis=1), pixels.max(axis=1)
    value = np.column_stack([place - corner, high - low, np.full(len(place), np.log(width)), low])
    for _ in range(14):
        w = np.exp(value[:, 3:4])
        dy, dx = y - value[:, 0:1], x - value[:, 1:2]
        g = np.exp(-(dy**2 + dx**2) / (2 * w**2))
        a = value[:, 2:3]
        slopes = np.stack(
            [a * g * dy / w**2, a * g * dx / w**2, g, a * g * (dy**2 + dx**2) / w**2, np.ones_like(g)], -1
        )
        rest = pixels - a * g - value[:, 4:5]
        normal = np.einsum("npi,npj->nij", slopes, slopes)
        normal += 1e-3 * np.einsum("nij,ij->nij", normal, np.eye(5))
        step = np.linalg.solve(normal, np.einsum("npi,np->ni", slopes, rest)[..., None])[..., 0]
        step[:, :2], step[:, 3] = np.clip(step[:, :2], -0.5, 0.5), np.clip(step[:, 3], -0.1, 0.1)
        value = value + step
    return value[:, :2]


def linear(image, mean, layout, chosen, dose):
    """(n, 2) the best linear estimate of each column's displacement from its truth: its mean is zero by construction,
    and it follows the noise as the fits do."""
    peak = dose * 0.15**2 * pictures.PEAK_OF_DOSE
    y, x = np.mgrid[-8:9, -8:9]
    out = np.zeros((len(chosen), 2))
    for n, k in enumerate(chosen):
        corner = np.rint(layout.position[k]).astype(int)
        window = (slice(corner[0] - 8, corner[0] + 9), slice(corner[1] - 8, corner[1] + 9))
        dy, dx = y - (layout.position[k] - corner)[0], x - (layout.position[k] - corner)[1]
        w = layout.width[k]
        g = np.exp(-(dy**2 + dx**2) / (2 * w**2))
        a = peak * layout.weight[k]
        slopes = np.stack([a * g * dy / w**2, a * g * dx / w**2, g, np.ones_like(g)]).reshape(4, -1)
        weighted = slopes / mean[window].ravel()
        out[n] = np.linalg.solve(weighted @ slopes.T, weighted @ (image - mean)[window].ravel())[:2]
    return out


def bias(method, dose, draws, size=128):
    """{site: (mean square bias over the square of the shot-noise deviation, its uncertainty)}."""
    layout, rng = crystal(size)
    inner = ((layout.position > 14) & (layout.position < size - 15)).all(axis=1)
    chosen = np.flatnonzero(inner)
    mean = pictures.mean_image(layout, dose)
    width = float(layout.width[chosen].mean())
    truth = fitted(mean, layout.position[chosen], width)
    away = []
    for _ in range(draws):
        image = pictures.counted(mean, rng)
        found = fitted(denoise(image, method=method), layout.position[chosen], width) - truth
        away.append(np.clip(found, -4, 4) - linear(image, mean, layout, chosen, dose))
    away = np.array(away)
    out = {}
    for site in (0, 1):
        part = away[:, layout.site[chosen] == site]
        centre, spread = part.mean(axis=0), part.var(axis=0, ddof=1) / draws
        unit = bound(PLANE, site, dose) ** 2
        out[site] = (float((centre**2 - spread).mean() / unit), float(np.sqrt(2 / centre.size) * spread.mean() / unit))
    return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dose", "gain_dB"), [(1e3, 11.0), (1e4, 11.0), (1e5, 8.0)])
def test_noise_goes_down(method, dose, gain_dB):
    layout, rng = crystal(128)
    mean = pictures.mean_image(layout, dose)
    image = pictures.counted(mean, rng)
    quiet = denoise(image, method=method)
    inner = (slice(12, -12), slice(12, -12))
    gain = 10 * np.log10(((image - mean)[inner] ** 2).mean() / ((quiet - mean)[inner] ** 2).mean())
    assert gain > gain_dB
    assert quiet.sum() == pytest.approx(image.sum(), rel=0.05 if dose == 1e3 else 0.02)


@pytest.mark.parametrize("method", METHODS)
def test_atoms_stay_where_they_are(method):
    """Columns with 6 pm of disorder of their own: none is pulled to its site. Mean over 8 images at 1e4 e/A^2."""
    for square, uncertainty in bias(method, 1e4, 8).values():
        assert square < 0.05**2 + 2 * uncertainty
        assert uncertainty < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dose", [1e3, 1e4, 1e5])
def test_bias_is_below_a_twentieth_of_the_shot_noise(method, dose):
    for square, uncertainty in bias(method, dose, 80, size=160).values():
        assert square < 0.05**2 + 2 * uncertainty


@pytest.mark.parametrize("method", METHODS)
def test_a_vacancy_stays_a_vacancy(method):
    layout = pictures.layout(PLANE, (128, 128), 15.0, margin=-20.0)
    target = int(np.argmin(np.abs(layout.position - 64).sum(axis=1) + 1e3 * (layout.site != 1)))
    kept = np.arange(len(layout.site)) != target
    rng = np.random.default_rng(3)
    quiet = denoise(pictures.counted(pictures.mean_image(layout.take(kept), 1e4), rng), method=method)
    peak = 1e4 * 0.15**2 * pictures.PEAK_OF_DOSE * layout.weight[target]
    others = layout.position[kept & (layout.site == 1)]
    others = others[((others > 12) & (others < 115)).all(axis=1)]
    y, x = np.rint(layout.position[target]).astype(int)
    level = quiet[np.rint(others[:, 0]).astype(int), np.rint(others[:, 1]).astype(int)]
    assert level.mean() - quiet[y, x] > 0.75 * peak


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_invented(method):
    rng = np.random.default_rng(0)
    flat = denoise(rng.poisson(5.0, (96, 96)), method=method)
    assert flat.mean() == pytest.approx(5, rel=0.02)
    assert flat[8:-8, 8:-8].std() < 0.25 * np.sqrt(5)
    assert np.array_equal(denoise(np.full((32, 32), 7), method=method), np.full((32, 32), 7.0))
    assert np.isfinite(denoise(rng.poisson(0.01, (64, 64)), method=method)).all()
    assert len(translations(rng.poisson(5.0, (96, 96)))) == 0


def test_what_is_no_image_is_refused():
    for image in (np.ones((4, 4)), np.ones((32, 32, 3)), np.full((32, 32), np.nan), np.ones((32, 32), dtype=complex)):
        with pytest.raises(InputError):
            denoise(image)
    with pytest.raises(UnknownName, match="known: nlm, lattice"):
        denoise(np.ones((32, 32)), method="wavelets")


def test_width_and_translations_are_those_of_the_crystal():
    layout = pictures.layout(PLANE, (192, 192), 15.0, margin=-20.0)
    image = pictures.counted(pictures.mean_image(layout, 1e4), np.random.default_rng(0))
    assert column_width(image) == pytest.approx(3.0, rel=0.2)
    moves = translations(image)
    cells = moves / (390.5 / 15)
    assert len(moves) > 8
    assert np.abs(cells - np.rint(cells)).max() < 0.03
