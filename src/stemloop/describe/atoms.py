"""From an image to its atom columns: found by significance, refined by Gaussians, told apart by brightness.

The image says everything that is needed. Its power spectrum gives the scale, its finest differences (where a probe of
any real microscope transfers nothing) give the noise, and the noise decides what is a column.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy.spatial import cKDTree

from stemloop.core.errors import InputError
from stemloop.core.structure import Columns
from stemloop.describe.finding import filters, fitting, gaussians
from stemloop.describe.finding.brightness import sublattices
from stemloop.describe.finding.classes import crystals, places
from stemloop.describe.finding.gaussians import Floats, Image
from stemloop.describe.finding.noise import Given, Noise, noise_of
from stemloop.describe.finding.raster import Raster, Region, raster_of
from stemloop.describe.finding.scale import Scale, scale_of, scale_of_spots
from stemloop.describe.finding.sites import classes, expected, occupancy, presence, settled

__all__ = ["find_columns", "sublattices"]

#: A peak under this part of the bright columns' amplitude is a tail of the probe or a wave of the background.
_LEAST_AMPLITUDE = 0.1
#: A column that stands out has an amplitude of so many deviations; one that did so in a fit may have a few less in the
#: next.
_SIGNIFICANT, _STILL_SIGNIFICANT = 4.0, 3.0
#: A class of columns none of which stands out has at least this part of the bright ones' amplitude, and is known to be
#: there by so many deviations.
_FAINTEST, _CERTAIN = 0.1, 6.0
#: Places with a chance above this are fitted before they are judged again; those on the rim have an amplitude known to
#: this part.
_TRIED_CHANCE, _RIM = 0.001, 0.5
#: So many widths from the border what is cut by it can hide a column.
_CUT = 8.0
#: Of all columns so few at most are none, as far as their chances tell.
_WRONG = 0.003
#: So many columns without order are no crystal; there is order where this share of them has a lattice.
_MANY, _ORDERED = 15, 0.15
#: Of the spots on a support that are taken for atoms this share may be waves of it.
_WAVES = 0.3
#: Of a column's core at least this share must have been measured.
_LEAST_MEASURED = 0.35
#: A place of the crystal holds a column in more than this share of cells; where fewer do, the others lack nothing.
_MOSTLY = 0.5
#: A vacant place is further from all columns than this part of the distance of nearest neighbours.
_ROOM = 0.7
#: A region is searched with so many widths of the image around it, for its columns' neighbours.
_AROUND = 20.0


class _Found(NamedTuple):
    """Columns: ``value`` and ``sigma`` (n, 4) of row, col, amplitude, ln of the width; the ``background`` under each,
    the ``chance`` that it is there, the ``measured`` share of its core, whether it has a ``placed`` class; ``vacant``
    places (m, 2); and whether they have a lattice (``ordered``)."""

    value: Floats
    sigma: Floats
    background: Floats
    chance: Floats
    measured: Floats
    placed: NDArray[np.bool_]
    vacant: Floats
    ordered: bool

    def take(self, kept: NDArray[np.bool_]) -> _Found:
        parts: list[Any] = [of[kept] for of in self[:6]]
        return _Found._make([*parts, self.vacant, self.ordered])


def find_columns(
    image: NDArray[np.generic], pixel_size_nm: float | None = None, *, variance: NDArray[np.generic] | None = None
) -> Columns:
    """Find the atom columns of a HAADF image and measure where they are.

    A column is a local maximum of the matched-filtered image (blind to constants and slopes) that noise alone would
    make about once in an image, and whose fitted amplitude is more than four of its deviations. All columns are then
    fitted together, each a Gaussian, on a smooth background, weighted by the noise (Levenberg-Marquardt, the steps by
    conjugate gradients), so that overlapping neighbours do not pull at each other.

    Parameters
    ----------
    image : (rows, columns) array of real numbers, at least 16 x 16, bright columns on dark. Meant for 8 to 40 pm a
        pixel; a column's Gaussian should be at least 0.9 px wide (1 sigma). Pixels that are not finite, and those of a
        saturated detector, count for nothing. Large images are searched in regions of about 1024 px; a memory map
        is read as it goes.
    pixel_size_nm : size of a pixel [nm]; only needed where the columns have no period (single atoms on a support).
    variance : (rows, columns) variance of the noise of each pixel [grey levels squared], if it is known, as of an
        average (:attr:`stemloop.reduce.register.Averaged.variance`), where it depends on how often a pixel was seen and
        the finest differences tell it wrongly. It must not follow the noise itself. Pixels for which it is not finite
        or not positive count for nothing. Read from the image if None.

    Returns
    -------
    Columns : positions (row, col) [px] with 1-sigma deviations from the fit's covariance (neighbours and background
        unknown too; times the root of the reduced chi-square where that is above one), amplitude and background [grey
        levels], Gaussian width [px], the probability that the column is there, and the sublattice by a mixture of
        Gaussians of the amplitudes (0 is the brightest; one sublattice where the data say so). ``table()`` gives all of
        it by name. Where the columns around expect one that is not significant by itself, the image is asked there: it
        is a column or a vacant place, by Bayes' rule from its amplitude. ``measured`` tells which columns are partly
        missing or saturated. No column at all is a valid answer. Columns cut by the border (nearer than one width) are
        left out.

    Raises
    ------
    InputError : not two-dimensional, too small, mostly not finite, or constant.

    Notes
    -----
    Precision: the deviation of a Gaussian's centre by counting noise is w / sqrt(N) for N counts in the column on no
    background (the Cramer-Rao bound; A. J. den Dekker et al., Ultramicroscopy 104 (2005) 83,
    doi:10.1016/j.ultramic.2005.03.001).
    """
    if variance is not None:
        image, variance = _known(image, variance)
    raster = raster_of(image)
    noise = noise_of(raster.sample(512, 4))
    scale = scale_of((levels for levels, _ in raster.sample(256, 16)), noise, pixel_size_nm)
    found = []
    for region in raster.regions(_AROUND * scale.width):
        here = noise if variance is None else _given(variance, region, raster)
        part = _searched(region, raster, here, scale)
        if (
            scale.periodic and not part.ordered and len(part.value) >= _MANY
        ):  # edges and stripes are sharp in a spectrum too
            part = _searched(region, raster, here, scale_of_spots([region.pixels], noise, pixel_size_nm))
        found.append(_own(part, region))
    return _columns(_joined(found), raster)


def _known(image: Any, variance: Any) -> tuple[NDArray[Any], Floats]:
    """The image without the pixels whose ``variance`` is unknown, and the variance, with its median there."""
    pixels, of = np.asarray(image), np.asarray(variance, dtype=np.float64)
    if of.shape != pixels.shape:
        raise InputError(f"an image of {pixels.shape} px needs a variance for each pixel; got the shape {of.shape}.")
    known = np.isfinite(of) & (of > 0)
    if known.all():
        return pixels, of
    if not known.any():
        raise InputError("no pixel has a finite positive variance; leave the variance out if it is not known.")
    return np.where(known, pixels, np.nan), np.where(known, of, np.median(of[known]))


def _given(variance: NDArray[Any], region: Region, raster: Raster) -> Given:
    """The part of ``variance`` that is a region's, in its levels."""
    (top, left), (rows, columns) = region.offset.astype(int), region.pixels.shape
    return Given((variance[top : top + rows, left : left + columns] * raster.per**2).astype(np.float32))


def _searched(region: Region, raster: Raster, noise: Noise | Given, scale: Scale) -> _Found:
    """The columns of a region, by two fits: of what stands out, and of that with what the first fit uncovered."""
    pixels, width, excess = region.pixels, scale.width, 1.0
    value: Floats = np.zeros((0, 4))
    background: Floats = np.full((2, 2), float(np.percentile(pixels[::4, ::4], 10)))
    soft = mean = filters.smooth(pixels, 0.5 * width)
    spots: tuple[NDArray[np.int64], Floats] | None = None
    for _ in range(2):
        variance = noise.variance(mean)
        if scale.periodic:
            places, z = _peaks(pixels, soft, noise, width)
            places = places[z > excess * _threshold(raster.shape, width)]
        else:
            spots = _spots(pixels, variance, width)
            places = spots[0]
        start = _start(soft, places[_present(region, places, width)], width, value)
        if len(start) == 0:
            return _nothing()
        known = fitting.prior(start, width=scale.width_of_all)
        data, weight = _data(region, mean, raster, noise)
        model = fitting.fit(data, weight, start, background, width, known)
        sigma = fitting.deviations(model, weight, data, known)
        good = _believable(model.columns, sigma, width, pixels.shape)
        value, background = model.columns[good], model.background
        if len(value) == 0:
            return _nothing()
        width = scale.width_of_all or float(np.exp(np.median(value[:, 3])))
        mean = model.image
        pixels, _ = _data(region, mean, raster, noise)
        residual = filters.negative_laplacian(pixels - mean, width)
        excess = _spread(residual, variance, width)
    found = _finished(region, raster, noise, scale, value, background, width)
    if spots is None or len(found.value) == 0:
        return found
    _, nearest = cKDTree(spots[0]).query(found.value[:, :2])
    return found._replace(chance=spots[1][nearest])


def _finished(
    region: Region, raster: Raster, noise: Noise | Given, scale: Scale, value: Floats, background: Floats, width: float
) -> _Found:
    """The last fit: with the columns that the lattice expects and that may be there, weighted by the model's noise.
    Which of these are there is judged before it, and again after it."""
    model = fitting.Model(value, background, region.pixels.shape, width)
    pixels, weight = _data(region, model.image, raster, noise)
    weight = _doubted(pixels - model.image, weight, width)
    precision = fitting.prior(value).precision
    sigma = model.equations(weight, precision).deviations()[:, 2]
    sites = _sites(region, model, weight, pixels, sigma)
    place = sites.position
    amplitude, deviation = _amplitudes(pixels - model.image, weight, place, width)
    beyond = _spread(
        filters.negative_laplacian(pixels - model.image, width),
        (1 / np.maximum(weight, 1e-30)).astype(np.float32),
        width,
    )
    deviation, sigma = beyond * deviation, beyond * sigma
    chance, most, usual = _chances(sites, amplitude, deviation, value[:, 2], sigma)
    # what is beyond the border is in the background so far, and hides what is before it
    cut = ((place < _CUT * width) | (place > np.array(pixels.shape) - 1 - _CUT * width)).any(axis=1)
    tried = (chance > _TRIED_CHANCE) | sites.rim | (cut & (sites.kind >= 0) & (most > 0))
    height = np.where(sites.rim, usual, np.maximum(amplitude, 0.02 * value[:, 2].min()))
    more = np.column_stack([place, height, np.full(len(place), np.log(width))])[tried]
    free = np.where(sites.rim, _RIM * height, np.inf)[tried]
    start = np.concatenate([value, more])
    known = fitting.prior(start, np.column_stack([sites.spread[tried], free]), scale.width_of_all)
    model = fitting.fit(pixels, weight, start, model.background, width, known)
    n = len(value)
    fitted, sigma = model.columns, fitting.deviations(model, weight, pixels, known)
    amplitude, deviation = _amplitudes(pixels - model.image, weight, place, width)
    amplitude[tried], deviation[tried] = fitted[n:, 2], sigma[n:, 2]
    chance, most, _ = _chances(sites, amplitude, beyond * deviation, fitted[:n, 2], beyond * sigma[:n, 2])
    chance[sites.rim] = 0.0
    alone = presence(fitted[:n, 2], sigma[:n, 2], fitted[:n, 2], np.full(n, 0.95))
    taken = chance > _believed(chance, n)
    chances = np.concatenate([alone, np.where(taken, chance, 0)[tried]])
    placed = np.concatenate([sites.member >= 0, sites.kind[tried] >= 0])
    _, count, whole = gaussians.core_means(
        fitted, model.image, region.measured.astype(np.float32), 2 * np.exp(fitted[:, 3])
    )
    least = np.where(np.arange(len(start)) >= n, 0.0, _STILL_SIGNIFICANT)
    sound = np.concatenate([np.ones(n, bool), taken[tried]])
    good = _believable(fitted, sigma, width, pixels.shape, least, placed, sound) & (chances > 0.5)
    hidden = np.append(sites.hidden, False)[sites.kind][tried]  # a place of no class is of the last, -1
    if (hidden & good[n:]).any():
        guided = np.column_stack([np.where(hidden, width, sites.spread[tried]), free])
        off, error = _released(pixels, weight, model, start, guided, scale)
        for kind in np.unique(sites.kind[tried][hidden & good[n:]]):
            mine = np.flatnonzero((sites.kind[tried] == kind) & good[n:])
            moved, sigma[n + mine, :2] = settled(off[mine], error[mine], beyond, 0.1 * width)
            fitted[n + mine, :2] = place[tried][mine] + moved
    vacant = _roomy(place[(most < 0.5) & sites.within], fitted[good, :2])
    part, under = count / np.maximum(whole, 1), model.under(fitted[:, :2])
    return _Found(fitted, sigma, under, chances, part, placed, vacant, sites.ordered).take(good)


def _released(
    pixels: Image, weight: Image, model: fitting.Model, start: Floats, guided: Floats, scale: Scale
) -> tuple[Floats, Floats]:
    """How far the last columns of ``model`` are from where they were expected, and the deviation (m, 2) each [px], if
    they are freed from there.

    To be found at all, columns of a class that noise hides are held near their places, more firmly than anybody knows
    that they keep them; where they are must not depend on that, or displacements came out too small. They are fitted
    again give or take ``guided`` (m, 2) [px, amplitude] about ``start``. What that still holds them back is taken off:
    of a Gaussian likelihood and a Gaussian guide with the deviation s, whose product has the mean m and the deviation
    p, the former's are m s^2 / (s^2 - p^2) and p s / sqrt(s^2 - p^2).
    """
    known = fitting.prior(start, guided, scale.width_of_all)
    free = fitting.fit(pixels, weight, model.columns, model.background, model.width, known)
    n = len(start) - len(guided)
    error = fitting.deviations(free, weight, pixels, known)[n:, :2]
    gain = 1 / (1 - (error / guided[:, :1]) ** 2).clip(0.5, 1)
    return gain * (free.columns[n:, :2] - start[n:, :2]), error * np.sqrt(gain)


def _roomy(vacant: Floats, position: Floats) -> Floats:
    """Those of the ``vacant`` places that have the room of a column: nearer to one of ``position`` than columns are to
    each other, a place belongs to a cell that is not there, as beside the cut of a dislocation."""
    if len(vacant) == 0 or len(position) < 2:
        return vacant
    tree = cKDTree(position)
    apart = float(np.median(np.asarray(tree.query(position, 2)[0])[:, 1]))
    return vacant[np.asarray(tree.query(vacant)[0]) > _ROOM * apart]


class _Sites(NamedTuple):
    """Places (n,) where columns should be: ``position`` (n, 2) [px], the class or ``kind`` (-1: none), whether
    ``within`` the crystal or on the ``rim`` of the image, the ``spread`` [px] of the place. ``member`` is the class of
    each column that stood out (-1: none), ``hidden`` tells which classes have none of these, ``ordered`` whether there
    is a lattice."""

    position: Floats
    kind: NDArray[np.int64]
    within: NDArray[np.bool_]
    rim: NDArray[np.bool_]
    spread: Floats
    member: NDArray[np.int64]
    hidden: NDArray[np.bool_]
    ordered: bool


def _sites(region: Region, model: fitting.Model, weight: Image, pixels: Image, sigma: Floats) -> _Sites:
    """Where the columns of ``model``, whose amplitudes have the deviations ``sigma`` (n,), expect more."""
    value, width, shape = model.columns, model.width, pixels.shape
    groups, known = crystals(value[:, :2], value[:, 2], sigma, shape)
    response = filters.negative_laplacian(pixels - model.image, width)
    response *= np.sqrt(weight / np.float32(filters.laplacian_gain(width)))
    cells = places(value[:, :2], known, response, width)
    crystal = {id(each.group) for each in known}
    voted = expected(value[:, :2], [group for group in groups if id(group) not in crystal], shape, width)
    if len(cells.position) and len(voted.position):
        voted = voted.take(np.asarray(cKDTree(cells.position).query(voted.position)[0]) > 1.2 * width)
    number = len(voted.position)
    position = np.concatenate([cells.position, voted.position])
    seen = _present(region, position.astype(np.int64).clip(0, np.array(shape) - 1), width)
    return _Sites(
        position[seen],
        np.concatenate([cells.kind, np.full(number, -1)])[seen],
        np.concatenate([cells.within, voted.within])[seen],
        np.concatenate([cells.rim, np.zeros(number, bool)])[seen],
        np.concatenate([cells.spread, np.full(number, voted.spread)])[seen],
        cells.member,
        cells.hidden,
        sum(len(group.members) for group in groups) > _ORDERED * len(value),
    )


def _chances(
    sites: _Sites, amplitude: Floats, deviation: Floats, known: Floats, sigma: Floats
) -> tuple[Floats, Floats, Floats]:
    """(n,) the chance that a column is at each of ``sites``, where ``amplitude`` (n,) give or take ``deviation`` was
    measured, at least and (n,) at most, and (n,) what amplitude it would have.

    By the columns that stood out, whose amplitudes are ``known`` (m,) give or take ``sigma``.
    """
    tiny = 1e-9 * float(known.max())
    deviation, sigma = np.maximum(deviation, tiny), np.maximum(sigma, tiny)
    most, bright = np.ones(len(amplitude)), np.full(len(amplitude), float(np.median(known)))
    lone, classed, within = sites.kind < 0, sites.kind >= 0, sites.within
    if lone.any():
        share = np.where(within[lone], occupancy(amplitude[lone & within], deviation[lone & within], known), 0.5)
        most[lone] = presence(amplitude[lone], deviation[lone], known, share)
    chance = np.where(lone, most, 0.0)
    if classed.any():
        learned, member, number = within & classed, sites.member >= 0, len(sites.hidden)
        errors = np.concatenate([deviation[learned], sigma[member]])
        kinds = np.concatenate([sites.kind[learned], sites.member[member]])
        like = classes(np.concatenate([amplitude[learned], known[member]]), errors, kinds, number)
        kind = sites.kind[classed]
        certain = like.mean * np.sqrt(np.bincount(kinds, errors**-2, number))
        faint = _FAINTEST * float(np.percentile(known, 75))
        real = ~sites.hidden | ((like.mean > faint) & (like.share > 0.5) & (certain > _CERTAIN))
        typical = np.bincount(kinds, errors, number) / np.maximum(np.bincount(kinds, minlength=number), 1)
        for of, share in zip((chance, most), like.bounds(typical), strict=True):
            bounded = like._replace(share=share)
            of[classed] = np.where(real[kind], bounded.presence(amplitude[classed], deviation[classed], kind), 0.0)
        bright[classed] = np.where(real[kind], like.mean[kind], tiny)
        within[classed] &= (real & (like.share > _MOSTLY))[kind]
    return chance, most, bright


def _believed(chance: Floats, certain: int) -> float:
    """The least chance of a column that is believed, so that of all columns, ``certain`` ones with them, only few are
    none."""
    order = np.sort(chance)[::-1]
    wrong = np.cumsum(1 - order) / (certain + np.arange(1, len(order) + 1))
    taken = (order > 0.5) & (wrong < _WRONG)
    return float(order[taken].min()) - 1e-12 if taken.any() else 1.0


def _nothing() -> _Found:
    none = np.zeros(0)
    return _Found(np.zeros((0, 4)), np.zeros((0, 4)), none, none, none, none.astype(bool), np.zeros((0, 2)), False)


def _own(found: _Found, region: Region) -> _Found:
    """What was found in the region's own part, or within a pixel of it, in pixels of the whole image."""
    value, vacant = found.value.copy(), found.vacant + region.offset
    value[:, :2] += region.offset

    def inside(place: Floats) -> NDArray[np.bool_]:
        return np.asarray(((place >= region.begin - 1) & (place < region.end + 1)).all(axis=1))

    return found._replace(value=value, vacant=vacant[inside(vacant)]).take(inside(value[:, :2]))


def _joined(parts: list[_Found]) -> _Found:
    """The columns of all regions, those at a seam once, and none that is far too weak among all."""
    if len(parts) == 1:
        return parts[0]
    fields: list[Any] = list(zip(*parts, strict=True))
    whole = _Found._make([*map(np.concatenate, fields[:7]), any(fields[7])])
    if len(whole.value) == 0:
        return whole
    width = float(np.exp(np.median(whole.value[:, 3])))
    good = whole.placed | (whole.value[:, 2] > _LEAST_AMPLITUDE * float(np.percentile(whole.value[:, 2], 75)))
    pairs = cKDTree(whole.value[:, :2]).query_pairs(width, output_type="ndarray")
    good[pairs[:, 1]] = False
    empty = whole.vacant
    twice = cKDTree(empty).query_pairs(width, output_type="ndarray")[:, 1] if len(empty) else np.zeros(0, int)
    return whole.take(good)._replace(vacant=np.delete(empty, twice, axis=0))


def _columns(found: _Found, raster: Raster) -> Columns:
    """In grey levels of the image, without what its border cuts."""
    width = np.exp(found.value[:, 3])
    last = np.array(raster.shape) - 1
    if len(width):
        margin = float(np.median(width))
        place = found.value[:, :2]
        found = found.take(np.asarray(((place >= margin) & (place <= last - margin)).all(axis=1)))
    value, sigma, background, chance, measured, _, vacant, _ = found
    return Columns(
        value[:, :2],
        sigma[:, :2],
        value[:, 2] / raster.per,
        np.exp(value[:, 3]),
        sublattices(value[:, 2]),
        raster.low + background / raster.per,
        chance,
        vacant,
        measured,
    )


def _data(region: Region, mean: Image, raster: Raster, noise: Noise | Given) -> tuple[Image, Image]:
    """The region's levels and their weights, one over the variance at ``mean``.

    What was not measured has the level ``mean`` and no weight. A detector that saturates at c shows, of a pixel that
    would scatter by s around m, min(x, c): its mean f and variance v are known (the censored normal distribution), and
    a step of m moves f by P = f'(m), the chance not to saturate. So the pixel counts as m + (x - f) / P, with the
    weight P^2 / v, which fades out as m passes c; to leave out the saturated ones would choose the dark ones.
    """
    if raster.complete:
        return region.pixels, np.float32(1) / noise.variance(mean)
    variance = noise.variance(mean)
    pixels, weight = np.where(region.measured, region.pixels, mean), region.measured / variance
    bright = np.flatnonzero((mean > raster.ceiling - 4 * np.sqrt(variance)) & (region.measured | region.saturated))
    m, s = mean.flat[bright].astype(np.float64), np.sqrt(variance.flat[bright].astype(np.float64))
    t = (raster.ceiling - m) / s
    chance, density = special.ndtr(t), np.exp(-0.5 * t**2) / np.sqrt(2 * np.pi)
    shown = m * chance + raster.ceiling * (1 - chance) - s * density
    spread = (m**2 + s**2) * chance - s * (m + raster.ceiling) * density + raster.ceiling**2 * (1 - chance) - shown**2
    clear = chance > 0.02
    slope = np.where(clear, chance, 1.0)
    pixels.flat[bright] = np.where(clear, m + (region.pixels.flat[bright] - shown) / slope, m)
    weight.flat[bright] = np.where(clear, slope**2 / np.maximum(spread, 1e-3 * s**2), 0.0)
    return pixels.astype(np.float32), weight.astype(np.float32)


def _present(region: Region, places: NDArray[np.int64], width: float) -> NDArray[np.bool_]:
    """(n,) whether enough of a column at each of ``places`` is on pixels that are not missing."""
    if region.measured.all():
        return np.ones(len(places), bool)
    there = (region.measured | region.saturated).astype(np.float32)
    return filters.around(there, places, round(1.5 * width))[0] > _LEAST_MEASURED


def _peaks(pixels: Image, soft: Image, noise: Noise | Given, width: float) -> tuple[NDArray[np.int64], Floats]:
    """(n, 2) maxima of the negative Laplacian of a Gaussian of ``width`` and how many deviations of the noise around
    (without the peak's own) each is."""
    response = filters.negative_laplacian(pixels, width)
    places = filters.maxima(response, max(1, round(width)), 0.0)
    mean, _ = filters.around(soft, places, max(2, round(3.9 * width)))
    variance = noise.at(places, mean.astype(np.float32)) * filters.laplacian_gain(width)
    return places, response[tuple(places.T)] / np.sqrt(variance)


def _threshold(shape: tuple[int, ...], width: float) -> float:
    """Deviations that one in as many points of noise passes as an image has independent ones."""
    return float(-special.ndtri(min(0.5, 4 * np.pi * width**2 / (shape[0] * shape[1]))))


def _spots(pixels: Image, variance: Image, width: float) -> tuple[NDArray[np.int64], Floats]:
    """(n, 2) maxima that stand out from noise and from a support's waves, where there is no lattice, and the chance of
    each to be more than a wave.

    A random field has 0.095 u exp(-u^2 / 2) maxima above u deviations for each square of ``width`` (for this filter;
    R. J. Adler, The Geometry of Random Fields, 1981, doi:10.1137/1.9780898718980). Of the maxima above the lowest u
    that is taken, waves are three in ten at most (Y. Benjamini, Y. Hochberg, J. R. Stat. Soc. B 57 (1995) 289,
    doi:10.1111/j.2517-6161.1995.tb02031.x); so of images of nothing but waves three in ten show a
    spot.
    """
    z = filters.outstanding(pixels, variance, width)
    places = filters.maxima(z, max(1, round(width)), 2.5)
    height = z[tuple(places.T)].astype(np.float64)
    order = np.argsort(-height)
    waves = 0.095 * pixels.size / width**2 * height[order] * np.exp(-0.5 * height[order] ** 2)
    share = np.minimum.accumulate((waves / np.arange(1, len(order) + 1))[::-1])[::-1]
    taken = share < _WAVES
    return places[order[taken]], 1 - share[taken]


def _spread(response: Image, variance: Image, width: float) -> float:
    """Robust ratio of the spread of a filtered image to what white noise of ``variance`` would give, at least 1."""
    step = max(1, int(width))
    z = (response[::step, ::step] / np.sqrt(variance[::step, ::step] * filters.laplacian_gain(width))).ravel()
    return max(1.0, 1.4826 * float(np.median(np.abs(z - np.median(z)))))


def _doubted(residual: Image, weight: Image, width: float) -> Image:
    """The weight, lowered to the residual's own where a first fit left more than noise (cut columns, odd shapes)."""
    ratio = filters.smooth(weight * residual**2, width)
    chance = np.sqrt(2 / (4 * np.pi * width**2))
    return (weight / np.where(ratio > 1 + 3 * chance, ratio, 1)).astype(np.float32)


def _start(soft: Image, peaks: NDArray[np.int64], width: float, known: Floats) -> Floats:
    """First parameters (n, 4) of the columns at ``peaks``; those that were fitted before go on from there."""
    _, low = filters.around(soft, peaks, int(np.ceil(2 * width)))
    height = np.maximum(soft[tuple(peaks.T)] - low, 1e-6)
    start = np.column_stack([peaks, height, np.full(len(peaks), np.log(width))])
    if len(known) and len(peaks):
        far, which = (np.asarray(v) for v in cKDTree(known[:, :2]).query(peaks))
        again = far < width
        start[again] = known[which[again]]
        name = np.where(again, which, len(known) + np.arange(len(peaks)))
        start = start[np.sort(np.unique(name, return_index=True)[1])]
    return start


def _amplitudes(residual: Image, weight: Image, position: Floats, width: float) -> tuple[Floats, Floats]:
    """What a column of ``width`` at each of ``position`` (n, 2) would explain of the residual, and its deviation."""
    if len(position) == 0:
        return np.zeros(0), np.zeros(0)
    columns = np.column_stack([position, np.ones(len(position)), np.full(len(position), np.log(width))])
    reach, alone = int(np.ceil(3 * width)), np.arange(len(position))
    information = gaussians.overlaps(columns, alone, alone, weight, reach)[:, 2, 2] + 1e-12
    return gaussians.gather(columns, weight * residual, reach)[:, 2] / information, information**-0.5


def _believable(
    value: Floats,
    sigma: Floats,
    width: float,
    shape: tuple[int, ...],
    least: Floats | float = _SIGNIFICANT,
    placed: NDArray[np.bool_] | bool = False,
    sound: NDArray[np.bool_] | bool = True,
) -> NDArray[np.bool_]:
    """Which fits are columns: their amplitude ``least`` deviations or more, not far too weak (but for those ``placed``
    by their class), wide or narrow, on the image, not doubled; and ``sound``."""
    good = np.isfinite(value).all(axis=1) & np.isfinite(sigma).all(axis=1) & sound
    good &= value[:, 2] > least * sigma[:, 2]
    good &= (sigma[:, :2] < 0.5 * width).all(axis=1)
    good &= np.abs(value[:, 3] - np.log(width)) < np.log(2.2)
    good &= ((value[:, :2] >= -1) & (value[:, :2] <= shape)).all(axis=1)
    if good.any():
        good &= placed | (value[:, 2] > _LEAST_AMPLITUDE * float(np.percentile(value[good, 2], 75)))
    index = np.flatnonzero(good)
    doubled = index[cKDTree(value[index, :2]).query_pairs(1.2 * width, output_type="ndarray")]
    weaker = np.where(value[doubled[:, 0], 2] < value[doubled[:, 1], 2], doubled[:, 0], doubled[:, 1])
    good[weaker] = False
    return good
