import numpy as np
import pytest
from plain_block import PlainBlock, pieces

from stemloop.core import units
from stemloop.core.errors import InputError
from stemloop.core.protocols import Camera
from stemloop.reduce import dpc
from stemloop.reduce.detectors import disk_area, ring, segments
from stemloop.reduce.engine import reduce
from stemloop.stream.dense import DenseBlock
from stemloop.stream.events import EventBlock

CAMERA = Camera((32, 36), 0.5e-3, (15.2, 17.9))
STEP = 2e-11


def shifted_disks(shifts_px, radius=8.0, counts=4.0, seed=0):
    """Counted patterns of a disk displaced by ``shifts_px`` (n, 2)."""
    rng = np.random.default_rng(seed)
    centre = np.array(CAMERA.centre_px)
    return np.stack([rng.poisson(counts * disk_area(CAMERA.shape, centre + s, radius)) for s in shifts_px]).astype("u2")


def test_centre_of_mass_follows_a_disk_within_its_deviation():
    shifts = np.random.default_rng(1).uniform(-3, 3, (600, 2))
    data = shifted_disks(shifts).reshape(20, 30, *CAMERA.shape)
    for mask in (None, ring(CAMERA, 0, 7.3e-3)):
        maps = reduce(dpc.CentreOfMass(CAMERA, mask), pieces(data, [100, 333]), (20, 30), CAMERA.shape)
        for k, name in enumerate(("com_y", "com_x")):
            z = (maps[name].ravel() - shifts[:, k] * CAMERA.pixel_rad) / maps[f"{name}_sigma"].ravel()
            assert abs(z.mean()) < 4 / np.sqrt(600) and abs(z.std() - 1) < 4 / np.sqrt(1200)
    fast = reduce(dpc.CentreOfMass(CAMERA, sigma=False), pieces(data, [50]), (20, 30), CAMERA.shape)
    slow = reduce(dpc.CentreOfMass(CAMERA), pieces(data, [50]), (20, 30), CAMERA.shape)
    assert fast["com_y"].tobytes() == slow["com_y"].tobytes()


@pytest.mark.parametrize("form", [DenseBlock, EventBlock.from_dense])
def test_every_form_of_block_gives_the_same_bits(form):
    data = shifted_disks(np.zeros((12, 2)))
    data[3] = 0
    for fold in (dpc.CentreOfMass(CAMERA), dpc.CentreOfMass(CAMERA, ring(CAMERA, 1e-3, 7.3e-3))):
        maps = reduce(fold, [(0, form(data))], (3, 4), CAMERA.shape)
        plain = reduce(fold, [(0, PlainBlock(data))], (3, 4), CAMERA.shape)
        assert all(maps[name].tobytes() == plain[name].tobytes() for name in plain)
        assert np.isnan(maps["com_y"].ravel()[3]) and maps["counts"].ravel()[3] == 0  # nothing was counted there


def test_quadrants_measure_a_small_shift_of_a_disk():
    radius_rad = 8.0 * CAMERA.pixel_rad
    quadrants = segments(CAMERA, 0, 14 * CAMERA.pixel_rad, 4, -np.pi / 4)
    centre = np.array(CAMERA.centre_px)
    for shift in ([0.2, 0.0], [0.0, -0.3], [0.15, 0.25]):
        counts = np.einsum("kyx,yx->k", quadrants, disk_area(CAMERA.shape, centre + shift, 8.0))
        y, x, _, _ = dpc.quadrant_deflection(counts, radius_rad)
        # where a border between quadrants meets the disk's edge inside a pixel, the pixel cannot be shared rightly
        assert np.allclose([y, x], np.array(shift) * CAMERA.pixel_rad, atol=0.03 * CAMERA.pixel_rad)
    shifts = np.tile([[0.1, -0.2]], (500, 1))
    counts = np.einsum("kyx,nyx->kn", quadrants, shifted_disks(shifts))
    y, x, sy, sx = dpc.quadrant_deflection(counts, radius_rad)
    assert abs(((x - x.mean()) / sx).std() - 1) < 4 / np.sqrt(1000)
    assert abs(((y - y.mean()) / sy).std() - 1) < 4 / np.sqrt(1000)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_descan_takes_its_own_surface_away_and_nothing_else(order):
    v, u = np.meshgrid(np.linspace(-1, 1, 24), np.linspace(-1, 1, 30), indexing="ij")
    terms = [np.ones_like(v), v, u, v**2, v * u, u**2][: (order + 1) * (order + 2) // 2]
    wanted = np.random.default_rng(order).normal(size=(2, len(terms))) * 1e-3
    field = np.cos(12 * v) * np.cos(9 * u)
    y, x, found = dpc.descan(*(np.tensordot(c, terms, 1) for c in wanted), order)
    assert np.abs(y).max() < 1e-15 and np.abs(x).max() < 1e-15 and np.allclose(found, wanted, atol=1e-15)
    vacuum = v < -0.5  # fitted in vacuum, a field elsewhere is left alone
    inside = np.where(vacuum, 0.0, field) * 1e-4
    y, x, _ = dpc.descan(np.tensordot(wanted[0], terms, 1) + inside, np.tensordot(wanted[1], terms, 1), order, vacuum)
    assert np.abs(y - inside).max() < 1e-15 and np.abs(x).max() < 1e-15


@pytest.mark.parametrize("shape", [(48, 64), (45, 63)])
def test_integration_is_exact_for_a_periodic_phase(shape):
    rows, columns = np.indices(shape)
    a, b = 2 * np.pi * 3 / shape[0], 2 * np.pi * 5 / shape[1]
    phase = np.cos(a * rows + 0.3) * np.sin(b * columns - 0.2)
    y = -a * np.sin(a * rows + 0.3) * np.sin(b * columns - 0.2) / STEP
    x = b * np.cos(a * rows + 0.3) * np.cos(b * columns - 0.2) / (2 * STEP)
    found = dpc.integrate(y, x, (STEP, 2 * STEP), periodic=True)
    assert np.abs(found - (phase - phase.mean())).max() < 1e-12


def test_integration_of_a_field_that_ends_at_the_edges():
    # a parabola is as far from periodic as can be; mirrored, it has a kink there, seen only next to the edge
    v, u = np.meshgrid(np.linspace(-1, 1, 80), np.linspace(-1, 1, 80), indexing="ij")
    step = 2 / 79
    found = dpc.integrate(2 * v, u, step)
    expected = v**2 + u**2 / 2
    assert np.abs(found - expected + expected.mean())[4:-4, 4:-4].max() < 0.03 * np.ptp(expected)
    blob = np.exp(-(v**2 + (u - 0.1) ** 2) / 0.05)
    found = dpc.integrate(-2 * v / 0.05 * blob, -2 * (u - 0.1) / 0.05 * blob, step)
    assert np.abs(found - blob + blob.mean()).max() < 1e-6  # it is nothing at the edges


def test_phase_of_a_known_field():
    wavelength = units.wavelength_m(200e3)
    rows, _ = np.indices((64, 64))
    k = 2 * np.pi * 4 / (64 * STEP)
    deflection = wavelength / (2 * np.pi) * 0.1 * k * np.cos(k * rows * STEP)  # of the phase 0.1 sin(k y)
    found = dpc.phase(deflection, np.zeros((64, 64)), STEP, 200e3, periodic=True)
    assert np.abs(found - 0.1 * np.sin(k * rows * STEP)).max() < 1e-12


def test_the_integral_knows_its_deviation():
    rng = np.random.default_rng(7)
    sigma = 0.5 + np.indices((32, 40))[1] / 40
    for periodic, inner in ((True, slice(None)), (False, slice(8, -8))):
        stated = dpc.integrated_sigma(sigma, 2 * sigma, 1.0, periodic=periodic)
        draws = np.stack(
            [dpc.integrate(rng.normal(0, sigma), rng.normal(0, 2 * sigma), 1.0, periodic=periodic) for _ in range(300)]
        )
        ratio = (draws.std(0) / stated)[inner, inner]
        # of 300 draws a deviation is known to 4 %; the mirrored field is stated without its edges' own echo
        assert abs(ratio.mean() - 1) < (0.03 if periodic else 0.15)


@pytest.mark.parametrize("angle", [-2.9, -0.7, 0.0, 0.3, 1.5, 2.2])
def test_the_rotation_of_the_camera_is_found(angle):
    rng = np.random.default_rng(8)
    rows, columns = np.indices((48, 60))
    phase = np.zeros((48, 60))
    for y, x in rng.uniform(0, 1, (25, 2)) * [48, 60]:
        phase += np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * 2.5**2))  # atoms: sharp and bright
    y, x = dpc._slope(phase, 0), dpc._slope(phase, 1)
    seen = dpc.turn(y, x, -angle)
    found, _ = dpc.rotation(*seen)
    assert abs(np.angle(np.exp(1j * (found - angle)))) < 1e-3
    assert np.allclose(dpc.turn(*seen, angle), (y, x), atol=1e-14)
    z = []
    sigma = np.full(y.shape, 0.03)
    for _ in range(60):
        noisy = [part + rng.normal(0, 0.03, y.shape) for part in seen]
        found, deviation = dpc.rotation(*noisy, sigma, sigma)
        z.append(np.angle(np.exp(1j * (found - angle))) / deviation)
    assert 0.7 < np.std(z) < 1.3 and abs(np.mean(z)) < 0.6  # 60 draws: 9 %; to first order in the noise


def test_gaps_and_flat_fields_are_refused():
    with pytest.raises(InputError, match="without gaps"):
        dpc.integrate(np.full((4, 4), np.nan), np.zeros((4, 4)), 1.0)
    with pytest.raises(InputError, match="the same everywhere"):
        dpc.rotation(np.ones((9, 9)), np.ones((9, 9)))
    with pytest.raises(InputError, match="order"):
        dpc.descan(np.ones((3, 3)), np.ones((3, 3)), 3)
    with pytest.raises(InputError, match="too few"):
        dpc.descan(np.ones((3, 3)), np.ones((3, 3)), 1, np.zeros((3, 3), bool))
