import numpy as np
import pytest
from plain_block import PlainBlock, pieces

from stemloop.core import units
from stemloop.core.errors import InputError
from stemloop.core.protocols import Camera
from stemloop.reduce import ptychography
from stemloop.reduce.engine import reduce
from stemloop.reduce.ptychography import SingleSideband

N, STEP, ENERGY, SEMIANGLE = 48, 2.5e-11, 80e3, 25e-3
WAVELENGTH = units.wavelength_m(ENERGY)
PIXEL = WAVELENGTH / (N * STEP)  # a box of N steps: detector frequencies are those of its discrete Fourier transform
CAMERA = Camera((N, N), PIXEL, (N // 2, N // 2))


def intensities(phase, C10=0.0, rotation=0.0):
    """(N, N, N, N): far-field patterns of exp(i phase) for every probe position on the box's own grid, by the full
    (not weak) multiplication. The probe's closed form is its aperture function."""
    k = np.fft.fftfreq(N, STEP)
    square = k[:, None] ** 2 + k[None, :] ** 2
    aperture = (np.sqrt(square) * WAVELENGTH <= SEMIANGLE) * np.exp(-1j * np.pi * WAVELENGTH * C10 * square)
    probe = np.fft.ifft2(aperture)
    probe /= np.sqrt(np.sum(np.abs(probe) ** 2))
    found = np.empty((N, N, N, N))
    for y in range(N):
        for x in range(N):
            wave = np.fft.fft2(np.roll(probe, (y, x), (0, 1)) * np.exp(1j * phase)) / N
            found[y, x] = np.fft.fftshift(np.abs(wave) ** 2)
    return found


def waves(*terms):
    """Sum of ``height cos(2 pi (a y + b x)/N + shift)`` for (height, a, b, shift)."""
    y, x = np.indices((N, N))
    return sum(h * np.cos(2 * np.pi * (a * y + b * x) / N + s) for h, a, b, s in terms)


def fold(**changes):
    return SingleSideband(
        **{"camera": CAMERA, "semiangle_rad": SEMIANGLE, "step_m": STEP, "energy_eV": ENERGY} | changes
    )


def run(data, **changes):
    return reduce(fold(**changes), pieces(data, [700]), (N, N), (N, N))


def scaled(patterns):
    """Whole numbers: the intensity of a pattern spread over 10^9 counts."""
    return np.rint(patterns * 1e9).astype(np.uint32)


# alpha/lambda is 7.2 waves a box: transfer up to 14.3
PHASE = waves((0.01, 3, 1, 0.4), (0.012, -2, 5, 1.0), (0.008, 0, 9, 2.0), (0.006, 8, -8, 0.1))


@pytest.mark.parametrize("C10", [0.0, 4e-9, -6e-9])
def test_a_known_weak_phase_is_given_back(C10):
    maps = run(scaled(intensities(PHASE, C10)), C10_m=C10)
    # second order in the phase is (0.036)^2/2 at most
    assert np.abs(maps["ssb_phase"] - PHASE).max() < 1e-3
    assert np.corrcoef(maps["ssb_phase"].ravel(), PHASE.ravel())[0, 1] > 0.9995
    # the wrong defocus does not give it back
    if C10:
        assert np.abs(run(scaled(intensities(PHASE, C10)))["ssb_phase"] - PHASE).max() > 3e-3


def test_what_the_aperture_cannot_pass_is_not_invented():
    fine = waves((0.02, 13, 13, 0.3))  # 18.4 waves a box, beyond twice the aperture
    maps = run(scaled(intensities(fine + waves((0.01, 4, 0, 0.0)))))
    assert np.abs(maps["ssb_phase"] - waves((0.01, 4, 0, 0.0))).max() < 1e-3
    k = np.hypot(*np.meshgrid(np.fft.fftfreq(N), np.fft.fftfreq(N))) / STEP
    assert np.all(maps["ssb_transfer"][k >= 2 * SEMIANGLE / WAVELENGTH] == 0)
    assert maps["ssb_transfer"][0, 0] == 0 and np.all(maps["ssb_transfer"][0, 2:13] > 0)


def test_the_share_in_double_overlap_is_that_of_three_circles():
    fine = Camera((160, 160), CAMERA.pixel_rad * N / 160 * 0.3, (80, 80))
    _, y, x = fold(camera=fine)._pixels
    _, _, transfer = ptychography.side_bands(np.ones((N, N, len(y))), y, x, SEMIANGLE, STEP, ENERGY)
    q = np.arange(1, 12) / (N * STEP) * WAVELENGTH / SEMIANGLE  # in units of the aperture's radius

    def lens(d):
        d = np.minimum(d, 2.0)
        return (2 * np.arccos(d / 2) - d / 2 * np.sqrt(4 - d**2)) / np.pi

    # K with one of K - Q and K + Q inside: the two lenses less twice the triple overlap, which is the lens of -Q and Q
    expected = 2 * lens(q) - 2 * lens(2 * q)
    assert np.abs(transfer[0, 1:12] - expected).max() < 0.06  # bright disk in 32 pixels across


def test_the_phase_knows_its_counting_noise():
    clean = intensities(PHASE)
    rng = np.random.default_rng(1)
    draws = [run(rng.poisson(clean * 300).astype(np.uint16)) for _ in range(4)]
    errors = np.stack([maps["ssb_phase"] - PHASE for maps in draws])
    # ~600 independent frequencies a draw
    assert abs(errors.std() / draws[0]["ssb_phase_sigma"] - 1) < 0.05


def test_a_turned_camera_is_turned_back():
    data = scaled(intensities(PHASE))
    # the camera turned by a quarter from +x towards +y: what was at +x is found at +y
    turned = np.rot90(data, -1, axes=(2, 3))
    maps = run(turned, rotation_rad=np.pi / 2, camera=Camera((N, N), PIXEL, (N // 2, N // 2 - 1)))
    assert np.abs(maps["ssb_phase"] - PHASE).max() < 1e-3
    assert np.abs(run(turned, camera=Camera((N, N), PIXEL, (N // 2, N // 2 - 1)))["ssb_phase"] - PHASE).max() > 5e-3


def test_binning_of_a_large_disk_changes_little(monkeypatch):
    monkeypatch.setattr(ptychography, "ACROSS", 8)  # two pixels by two
    maps = run(scaled(intensities(PHASE)))
    assert fold()._pixels[1].size < 50
    found, wanted = maps["ssb_phase"].ravel(), PHASE.ravel()
    assert np.corrcoef(found, wanted)[0, 1] > 0.98 and abs(found @ wanted / (wanted @ wanted) - 1) < 0.1


def test_a_scan_with_gaps_or_a_tiny_disk_is_not_reconstructed():
    data = np.ones((N * N, N, N), np.uint8)
    gaps = reduce(fold(), [(0, PlainBlock(data[:100]))], (N, N), (N, N))
    assert np.isnan(gaps["ssb_phase"]).all() and np.isnan(gaps["ssb_phase_sigma"])
    with pytest.raises(InputError, match="at least 2"):
        run(data.reshape(N, N, N, N), semiangle_rad=PIXEL)
