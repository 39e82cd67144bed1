"""Loss planes against losses with known values on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.metrics import LossPlane, curvature, loss_plane
from robustjax.norms import L2

KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), (4, 4, 2))
FIRST = 0.03 * jnp.sign(jax.random.normal(jax.random.key(2), X.shape))
W = jax.random.normal(jax.random.key(3), X.shape)


def smooth(x):
    return jnp.sin(jnp.sum(W * x, axis=(1, 2, 3))) + jnp.sum(x**3, axis=(1, 2, 3))


@pytest.fixture(scope="module")
def plane():
    return jax.jit(lambda x, first: loss_plane(smooth, x, first, KEY))(X, FIRST)


def test_axes_are_orthogonal_and_equally_long(plane):
    first, second = np.asarray(plane.axes, np.float64).reshape(2, -1)
    np.testing.assert_array_equal(plane.axes[0], FIRST)
    length = np.linalg.norm(first)
    assert np.linalg.norm(second) == pytest.approx(length, rel=1e-6)
    assert abs(first @ second) / length**2 < 1e-6


def test_grid(plane):
    np.testing.assert_allclose(plane.coordinates, np.linspace(-1.5, 1.5, 31), atol=1e-6)
    assert plane.coordinates[15] == 0 and plane.coordinates[25] == 1
    assert plane.loss.shape == (31, 31)


def test_values_are_those_of_the_loss(plane):
    clean, attacked = smooth(X[None])[0], smooth((X + FIRST)[None])[0]
    np.testing.assert_allclose(plane.loss[15, 15], clean, rtol=1e-6)
    np.testing.assert_allclose(plane.loss[25, 15], attacked, rtol=1e-6)
    a, b = plane.coordinates[3], plane.coordinates[20]
    there = X + a * plane.axes[0] + b * plane.axes[1]
    np.testing.assert_allclose(plane.loss[3, 20], smooth(there[None])[0], rtol=1e-5)


def test_other_grids_and_keys():
    plane = loss_plane(smooth, X, FIRST, jax.random.key(9), extent=2, points=9)
    np.testing.assert_array_equal(plane.coordinates, np.arange(-4, 5) / 2)
    np.testing.assert_allclose(plane.loss[6, 4], smooth((X + FIRST)[None])[0], rtol=1e-6)
    other = loss_plane(smooth, X, FIRST, KEY, extent=2, points=9)
    assert np.abs(plane.axes[1] - other.axes[1]).max() > 1e-3


def test_several_examples_by_vmap():
    def one(x, first, y, key):
        return loss_plane(lambda x: smooth(x) * (1 + y), x, first, key, points=7)

    keys = jax.random.split(KEY)
    several = (jnp.stack([X, X[::-1]]), jnp.stack([FIRST, -FIRST]), jnp.arange(2.0), keys)
    planes = jax.jit(jax.vmap(one))(*several)
    alone = one(*[argument[1] for argument in several])
    np.testing.assert_allclose(planes.loss[1], alone.loss, rtol=1e-4)
    np.testing.assert_allclose(planes.loss[:, 3, 3], smooth(several[0]) * jnp.array([1, 2]), 1e-5)


@pytest.mark.parametrize("scale", [1e-18, 1e-3, 1e3])
def test_orthogonal_at_any_scale(scale):
    first = scale * jnp.array([1.0, 2.0])
    axes = loss_plane(lambda x: x[:, 0], jnp.zeros(2), first, KEY, extent=1, points=3).axes
    expected = scale * np.array([2.0, -1.0])
    np.testing.assert_allclose(axes[1] * np.sign(axes[1, 0]), expected, rtol=1e-5)


def test_half_precision_stays():
    x, first = X.astype(jnp.bfloat16), FIRST.astype(jnp.bfloat16)
    plane = loss_plane(lambda x: x.sum((1, 2, 3)), x, first, KEY, points=7)
    assert plane.axes.dtype == plane.loss.dtype == jnp.bfloat16


def test_curvature_of_quadratics_is_their_second_derivative():
    t = jnp.linspace(-1, 1, 11)
    a, b = t[:, None], t[None]
    expected = {0: 3 * a - 2 * b + a * b + 1, 3: (4 * a**2 + 2 * b**2) / 2 + a * b - a}
    expected[5.0] = -3 * a**2 + 2 * b**2  # magnitudes: concave counts as convex
    for value, loss in expected.items():
        got = curvature(LossPlane(loss, t, jnp.zeros((2, 1))))
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-4)


def test_curvature_does_not_depend_on_the_grid_and_sees_roughness():
    def rough(frequency, points):
        first, x = jnp.array([1.0, 0.0]), jnp.zeros(2)
        loss = lambda x: jnp.cos(frequency * x[:, 0])  # noqa: E731
        return float(curvature(loss_plane(loss, x, first, KEY, points=points)))

    assert rough(1.0, 31) == pytest.approx(rough(1.0, 61), rel=0.03)
    assert rough(4.0, 61) > 10 * rough(1.0, 61)


def test_curvature_of_a_parabola_along_the_perturbation():
    # The loss c <u, x>^2 / 2 with a unit vector u along first: c ||first||^2 along it, 0 across.
    u = L2().steepest(FIRST)
    loss = lambda x: 5 * jnp.sum(u * x, axis=(1, 2, 3)) ** 2 / 2  # noqa: E731
    got = curvature(loss_plane(loss, jnp.zeros_like(X), FIRST, KEY, points=7))
    np.testing.assert_allclose(got, 5 * L2().value(FIRST) ** 2 / 2, rtol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"first": jnp.zeros_like(X)}, "first must not be zero"),
        ({"first": FIRST[0]}, "first must have the shape of x"),
        ({"points": 41}, "points must be odd and .* got 41 for extent 1.5"),
        ({"points": 30}, "points must be odd"),
        ({"extent": 0.5}, "extent must be >= 1, got 0.5"),
        ({"loss_fn": lambda x: jnp.sum(x)}, r"loss_fn\(x\) must have one entry per example"),
        ({"loss_fn": 1.0}, "loss_fn must be a function"),
        ({"key": jnp.zeros(2)}, "key must be a typed key"),
        ({"x": jnp.zeros(1), "first": jnp.ones(1)}, "x must hold at least two numbers"),
    ],
)
def test_bad_input(changes, message, plain_calls):
    arguments = {"loss_fn": smooth, "x": X, "first": FIRST, "key": KEY} | changes
    with pytest.raises(ValueError, match=message):
        loss_plane(**arguments)
