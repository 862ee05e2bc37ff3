import numpy as np
import pytest

from stemloop.simulate.elasticity import EdgeDislocation, Uniform, long_waves, relax, strain_and_rotation

BOX, N = 200.0, 200


def grid(box=BOX, n=N):
    axis = np.arange(n) * box / n
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return y, x, np.column_stack([y.ravel(), x.ravel()])


def test_gradient_is_that_of_the_displacement():
    field = relax(long_waves(np.random.default_rng(0), N, BOX, 30.0), BOX, 0.25)
    points = np.random.default_rng(1).uniform(0, BOX, (50, 2))
    h = 1e-3
    for j in range(2):
        step = h * np.eye(2)[j]
        slope = (field.displacement(points + step) - field.displacement(points - step)) / (2 * h)
        # central difference: error h^2/6 u''' is below 1e-8 of the gradient here
        np.testing.assert_allclose(field.gradient(points)[:, :, j], slope, atol=1e-6 * np.abs(slope).max())


@pytest.mark.parametrize("poisson", [-0.3, 0.0, 0.25, 0.45])
def test_stress_is_in_equilibrium(poisson):
    # all waves of the eigenstrain are kept (shortest 30 A > cut at 6 A), so that the divergence vanishes exactly
    eigenstrain = long_waves(np.random.default_rng(2), N, BOX, 30.0)
    _, _, points = grid()
    strain, _ = strain_and_rotation(relax(eigenstrain, BOX, poisson).gradient(points))
    e_xx, e_yy, e_xy = strain.T.reshape(3, N, N) - eigenstrain
    trace = 2 * poisson / (1 - poisson) * (e_xx + e_yy)
    s_xx, s_yy, s_xy = trace + 2 * e_xx, trace + 2 * e_yy, 2 * e_xy
    k = 2j * np.pi * np.fft.fftfreq(N, BOX / N)

    def d_x(s):
        return np.fft.ifft2(np.fft.fft2(s) * k[None, :]).real

    def d_y(s):
        return np.fft.ifft2(np.fft.fft2(s) * k[:, None]).real

    size = np.abs(d_x(s_xx)).max()
    assert np.abs(d_x(s_xx) + d_y(s_xy)).max() < 1e-9 * size
    assert np.abs(d_x(s_xy) + d_y(s_yy)).max() < 1e-9 * size


def test_gaussian_dilatation_has_its_closed_form():
    # u_r = (1 + nu) e0 s^2/r (1 - exp(-r^2/2s^2)) in an infinite sheet (from div grad phi = (1 + nu) e, u = grad phi)
    poisson, e0, s, box = 0.25, 0.02, 8.0, 600.0
    y, x, _ = grid(box, 300)
    bump = e0 * np.exp(-((y - box / 2) ** 2 + (x - box / 2) ** 2) / (2 * s**2))
    field = relax(np.stack([bump, bump, 0 * bump]), box, poisson)
    r = np.linspace(2.0, 40.0, 20)
    angle = 0.7
    points = box / 2 + r[:, None] * np.array([np.sin(angle), np.cos(angle)])
    u = field.displacement(points)
    radial = u @ np.array([np.sin(angle), np.cos(angle)])
    exact = (1 + poisson) * e0 * s**2 / r * (1 - np.exp(-(r**2) / (2 * s**2)))
    # the clamped box takes off the mean strain (1 + nu) e0 2 pi s^2 / box^2, half of it along each axis
    clamped = exact - (1 + poisson) * bump.mean() / 2 * r
    # neighbouring boxes (their quadrupole at r/box < 0.07) contribute below 1e-3
    np.testing.assert_allclose(radial, clamped, rtol=1e-3)
    assert np.abs(u @ np.array([np.cos(angle), -np.sin(angle)])).max() < 1e-3 * exact.max()


def test_uniform_strain_follows_the_convention_of_core():
    gradient = Uniform(e_xx=0.01, e_yy=-0.02, e_xy=0.003, rotation_rad=0.004).gradient(np.zeros((1, 2)))
    strain, rotation = strain_and_rotation(gradient)
    np.testing.assert_allclose(strain[0], [0.01, -0.02, 0.003])
    assert rotation[0] == pytest.approx(0.004)
    # positive rotation turns +x towards +y
    assert Uniform(rotation_rad=0.004).displacement(np.array([[0.0, 1.0]]))[0, 0] == pytest.approx(0.004)


def test_an_edge_dislocation_has_its_burgers_vector_and_its_gradient():
    core, burgers = (3.0, -2.0), (1.5, 2.5)
    field = EdgeDislocation(core, burgers, poisson=0.3)
    angle = np.linspace(-np.pi, np.pi, 4001)[1:-1] + np.arctan2(burgers[0], burgers[1])
    loop = np.array(core) + 7.0 * np.column_stack([np.sin(angle), np.cos(angle)])  # from +x towards +y
    np.testing.assert_allclose(field.displacement(loop)[-1] - field.displacement(loop)[0], burgers, atol=5e-3)
    points = np.random.default_rng(0).uniform(-9, 9, (20, 2))
    step = 1e-5 * np.eye(2)
    slope = [(field.displacement(points + s) - field.displacement(points - s)) / 2e-5 for s in step]
    np.testing.assert_allclose(field.gradient(points), np.stack(slope, axis=-1), atol=1e-6)
