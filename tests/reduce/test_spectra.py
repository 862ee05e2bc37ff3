import os
from pathlib import Path

import numpy as np
import pytest

from stemloop.core.errors import InputError
from stemloop.reduce.spectra import SCALARIZERS, EdgeIntegral, PowerLaw, RelativeThickness, dispersion, energy_axis

AXIS = (350.0, 0.5, 1024)
COUNTED = {"energy_loss": AXIS, "counting": True}
RECORDED = {"energy_loss": AXIS}
ENERGY = energy_axis(RECORDED, 1024)
EDGE = EdgeIntegral(edge_eV=454.0, width_eV=16.0, background_eV=(405.0, 450.0))


def background(height, exponent):
    """Counts a channel of a power law with ``height`` counts at 400 eV."""
    return height * (ENERGY / 400.0) ** -exponent


def edge_shape(counts):
    """``counts`` spread over the Ti window and nothing elsewhere."""
    inside = (ENERGY >= 456.0) & (ENERGY < 466.0)
    return counts * inside / inside.sum()


@pytest.mark.parametrize("exponent", [2.0, 3.3, 5.0])
def test_a_clean_power_law_and_edge_give_the_edge_back(exponent):
    spectrum = background(1e6, exponent) + edge_shape(2.5e5)
    value, sigma = EDGE(spectrum[None], COUNTED)
    # the weak prior pulls the exponent by less than 1e-2 of its own deviation at 1e6 counts a channel
    assert abs(value[0] - 2.5e5) < 0.02 * sigma[0]


@pytest.mark.parametrize(
    ("height", "counts"), [(2000.0, 0.0), (2000.0, 3000.0), (400.0, 300.0), (20.0, 100.0), (3.0, 40.0)]
)
def test_deviation_covers_poisson_noise(height, counts):
    rng = np.random.default_rng(3)
    spectra = rng.poisson(background(height, 3.0) + edge_shape(counts), size=(4000, 1024))
    value, sigma = EDGE(spectra, COUNTED)
    z = (value - counts) / sigma
    # 4000 draws: the standard error of std(z) is 0.011 and of mean(z) 0.016; at 20 counts a channel
    # and fewer the prior of the exponent, 1 away from the truth, pulls the mean and narrows the spread a little
    few = height < 100
    assert abs(z.mean()) < (0.35 if few else 0.06)
    assert (0.88 if few else 0.96) < z.std() < 1.04
    assert 0.94 < (np.abs(z) < 2).mean() < (0.99 if few else 0.97)


def test_the_fit_is_the_maximum_of_the_poisson_likelihood():
    from scipy.optimize import minimize

    rng = np.random.default_rng(5)
    energy = ENERGY[110:200]
    counts = rng.poisson(1e5 * (energy / 400.0) ** -3.0).astype(float)

    def minus_log_likelihood(u):
        model = np.exp(u[0]) * (energy / 400.0) ** -u[1]
        return (model - counts * np.log(model)).sum() / counts.sum()

    best = minimize(minus_log_likelihood, [np.log(9e4), 2.5], method="Nelder-Mead",
                    options={"xatol": 1e-9, "fatol": 1e-16, "maxiter": 4000}).x  # fmt: skip
    law = PowerLaw.fit(counts[None], energy)
    # 9e6 counts over this window: the prior moves the exponent by sigma_r^2 (4-3)/4 = 1e-5
    assert law.exponent[0] == pytest.approx(best[1], abs=1e-4)
    np.testing.assert_allclose(law.at(energy)[0], np.exp(best[0]) * (energy / 400) ** -best[1], rtol=1e-4)


def test_background_integral_is_linear_in_the_counts_and_its_variance_grows_with_the_distance():
    law = PowerLaw.fit(background(1000.0, 3.0)[None, 110:200], ENERGY[110:200])
    near, near_variance = law.integral(ENERGY[208:240])
    far, far_variance = law.integral(ENERGY[408:440])
    assert near[0] == pytest.approx(background(1000.0, 3.0)[208:240].sum(), rel=1e-3)
    assert far_variance[0] / far[0] ** 2 > 4 * near_variance[0] / near[0] ** 2


def test_zero_and_negative_counts_do_no_harm():
    rng = np.random.default_rng(7)
    dark = np.zeros((3, 1024))
    dark[1] -= 5.0
    dark[2] += rng.normal(0, 3, 1024)
    value, sigma = EDGE(dark, COUNTED)
    assert np.isfinite(value).all() and (sigma >= 1.0).all()


@pytest.mark.parametrize("gain", [1.0, 4.0, 25.0])
def test_dispersion_of_a_recorded_detector_is_found_with_its_spread(gain):
    rng = np.random.default_rng(11)
    clean = background(2000.0, 3.0)
    electrons = rng.poisson(clean / gain, size=(300, 1024)).astype(float)
    spread = np.apply_along_axis(np.convolve, 1, electrons, [0.2, 0.6, 0.2], "same")
    before = slice(110, 200)
    law = PowerLaw.fit(gain * spread[:, before], ENERGY[before])
    found = dispersion(gain * spread[:, before], law.at(ENERGY[before]))
    # the sum over a window keeps the variance of unspread electrons, gain * counts; Newey-West weights take off
    # 2 (0.24 * 1/5 + 0.04 * 2/5) = 13 % of it, and the fit of 2 parameters of 90 some per cent more
    assert 0.75 < found / gain < 1.05


def test_deviation_of_a_recorded_detector_agrees_with_the_scatter_of_repeats():
    rng = np.random.default_rng(13)
    spectra = 12.0 * rng.poisson((background(2000.0, 3.0) + edge_shape(2e4)) / 12.0, size=(500, 1024))
    value, sigma = EDGE(spectra, RECORDED)
    assert value.std() == pytest.approx(np.median(sigma), rel=0.12)  # 500 repeats: 3 %, dispersion's bias 5 %


def test_one_spectrum_is_the_same_alone_and_among_others_when_electrons_are_counted():
    rng = np.random.default_rng(17)
    spectra = rng.poisson(background(500.0, 3.0), size=(5, 1024))
    together, alone = EDGE(spectra, COUNTED), EDGE(spectra[2:3], COUNTED)
    # Newton stops for all together, once the slowest has converged
    np.testing.assert_allclose([together[0][2], together[1][2]], [alone[0][0], alone[1][0]], rtol=1e-9, atol=1e-6)


def test_spectra_that_are_not_finite_are_named():
    spectra = np.ones((4, 1024))
    spectra[[1, 3], 5] = np.nan
    with pytest.raises(InputError, match=r"\[1, 3\]"):
        EDGE(spectra, RECORDED)


@pytest.mark.parametrize(
    ("frames", "calibration"),
    [
        (np.ones(1024), RECORDED),
        (np.ones((2, 1024)), {}),
        (np.ones((2, 1000)), RECORDED),
        (np.ones((2, 1024)), {"energy_loss": (700.0, 0.5, 1024)}),
        (np.ones((2, 1024)), {"energy_loss": (350.0, 0.1, 1024)}),
        (np.ones((2, 1024)), {"energy_loss": (350.0, 0.0, 1024)}),
    ],
)
def test_what_cannot_be_integrated_is_refused(frames, calibration):
    with pytest.raises(InputError):
        EDGE(frames, calibration)


@pytest.mark.parametrize(
    "window", [(454.0, 16.0, (450.0, 405.0)), (454.0, -1.0, (405.0, 450.0)), (454.0, 1.0, (405.0, 460.0))]
)
def test_windows_out_of_order_are_refused(window):
    with pytest.raises(InputError):
        EdgeIntegral(*window)


def test_no_spectra_give_no_numbers():
    value, sigma = EDGE(np.empty((0, 1024)), RECORDED)
    assert value.shape == sigma.shape == (0,)


# ------------------------------------------------------------------------------------------------------- thickness


def test_thickness_and_its_deviation_are_those_of_many_counted_spectra():
    energy = -20 + 0.5 * np.arange(400)
    unscattered, thickness = 2e4, 0.6
    scattered = unscattered * np.expm1(thickness)
    peak = np.exp(-(energy**2) / 2)
    plasmon = np.where(energy > 6, np.exp(-((energy - 20) ** 2) / 50), 0.0)
    mean = unscattered * peak / peak.sum() + scattered * plasmon / plasmon.sum()
    spectra = np.random.default_rng(0).poisson(mean, (4000, 400))
    value, sigma = RelativeThickness(floor=0.0)(spectra, {"energy_loss": (-20.0, 0.5, 400)})
    assert value.mean() == pytest.approx(thickness, abs=5 * sigma.mean() / np.sqrt(4000))
    assert value.std() == pytest.approx(sigma.mean(), rel=0.05)  # 4000 draws tell a deviation to 1.1 %


def test_thickness_needs_the_zero_loss():
    with pytest.raises(InputError, match="needs the loss"):
        RelativeThickness()(np.ones((1, 100)), {"energy_loss": (100.0, 1.0, 100)})


# ------------------------------------------------------------------------------------------------ a real recording

DATA = Path(os.environ.get("STEMLOOP_DATA", Path(__file__).parents[3] / "shared" / "data"))
RECORDING = DATA / "eels" / "SciFiReaders" / "DMReader_SpectrumImage_SI-EELS.dm3"


@pytest.fixture(scope="module")
def recording():
    """(49, 6, 1024) counts across a titanate multilayer, and its calibration."""
    if not RECORDING.exists():
        pytest.skip(f"real data not found: {RECORDING}; set STEMLOOP_DATA to the folder that holds 'eels'")
    from rsciio.digitalmicrograph import file_reader

    signal = file_reader(str(RECORDING))[-1]
    loss = next(axis for axis in signal["axes"] if axis["size"] == 1024)
    spectra = np.moveaxis(np.asarray(signal["data"], dtype=float), loss["index_in_array"], -1)
    return spectra, {"energy_loss": (float(loss["offset"]), float(loss["scale"]), 1024)}


@pytest.mark.parametrize("name", ["Ti-L23", "O-K"])
def test_real_edges_stand_out_and_their_deviation_agrees_with_the_scatter(recording, name):
    spectra, calibration = recording
    value, sigma = SCALARIZERS[name](spectra.reshape(-1, 1024), calibration)
    image = value.reshape(spectra.shape[:2])
    # the layers run along the short side: neighbours along it differ by noise, mostly
    scatter = np.sqrt(np.mean(np.diff(image, axis=1) ** 2) / 2)
    assert 0.5 < scatter / np.median(sigma) < 2.0
    assert np.median(value / sigma) > 3.0


def test_the_real_titanium_map_shows_its_layers(recording):
    spectra, calibration = recording
    value, sigma = SCALARIZERS["Ti-L23"](spectra.reshape(-1, 1024), calibration)
    profile = value.reshape(spectra.shape[:2]).mean(axis=1)
    doubt = np.sqrt((sigma.reshape(spectra.shape[:2]) ** 2).mean(axis=1) / 6)
    assert profile[:15].mean() - profile[22:26].mean() > 10 * doubt.mean()
