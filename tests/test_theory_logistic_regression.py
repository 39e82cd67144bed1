import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.norms import L2, LInf
from robustjax.theory import logistic_regression as logistic
from robustjax.theory.trust_region import (
    augmented_bound,
    augmented_hessian,
    expected_product_norm,
    quadratic_maximum,
)

GOLDEN_W, GOLDEN_X = np.array([1.0, -2.0]), np.array([0.5, 0.25])
NORMS = [LInf(), L2()]
RNG = np.random.default_rng(0)
# The predictions of the three are right, wrong, and confident.
EXAMPLES = [(*RNG.normal(size=(2, 3)), 1), (*RNG.normal(size=(2, 3)), 0), (*np.full((2, 3), 2), 1)]


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def assert_close(got, expected, rtol=1e-12, atol=1e-15):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def test_golden_numbers():
    w, x = jnp.asarray(GOLDEN_W), jnp.asarray(GOLDEN_X)
    at = logistic.expansion(w, x, 1)
    assert_close((at.residual, at.curvature), (-0.5, 0.25))
    assert_close(at.loss, math.log(2))
    assert_close(logistic.first_order_maximum(w, x, 1, 0.1), 0.843147, rtol=1e-6)
    assert_close(logistic.second_order_maximum(w, x, 1, 0.1), 0.854397, rtol=1e-6)
    assert_close(logistic.worst_case(w, x, 1, 0.1), math.log1p(math.exp(0.3)))
    assert_close(logistic.worst_case(w, x, 1, 0.1), 0.854355, rtol=1e-6)
    assert_close(logistic.frobenius_bound(w, x, 1, 0.1), 1.340647, rtol=1e-6)
    assert_close(logistic.augmented_frobenius(w, x, 1), 2.25)
    assert_close(logistic.reduced_determinant(w, x, 1), 0)
    h = augmented_hessian(at.gradient, at.hessian)
    assert_close(h @ [0.3, -0.7, 0.2], [0.325, -0.65, -0.65])
    assert_close(np.linalg.norm(h, 2), 2.25)  # rank one
    assert_close(expected_product_norm(h), 2.25 * math.sqrt(2 / math.pi), rtol=1e-8)
    assert_close(expected_product_norm(h), 1.79524, rtol=1e-5)


@jax.jit
def derivatives(w, x, y):
    def loss(x):
        return logistic.expansion(w, x, y).loss

    return jax.grad(loss)(x), jax.hessian(loss)(x)


@pytest.mark.parametrize("w, x, y", EXAMPLES)
def test_expansion_holds_the_derivatives(w, x, y):
    w, x = jnp.asarray(w, jnp.float64), jnp.asarray(x, jnp.float64)
    at = logistic.expansion(w, x, y)
    f = 1 / (1 + np.exp(-(w @ x)))
    assert_close(at.loss, -math.log(f if y else 1 - f), rtol=1e-9)
    assert_close(at.residual, f - y, rtol=1e-9)
    assert_close(at.curvature, abs(at.residual) * (1 - abs(at.residual)), rtol=1e-9)
    gradient, hessian = derivatives(w, x, y)
    assert_close(at.gradient, gradient, rtol=1e-9)
    assert_close(at.hessian, hessian, rtol=1e-9)


@pytest.mark.parametrize("w, x, y", EXAMPLES)
def test_the_augmented_hessian_in_closed_form(w, x, y):
    w, x = jnp.asarray(w, jnp.float64), jnp.asarray(x, jnp.float64)
    at = logistic.expansion(w, x, y)
    h = augmented_hessian(at.gradient, at.hessian)
    assert_close(logistic.augmented_frobenius(w, x, y), np.linalg.norm(h))
    plane = np.zeros((4, 2))
    plane[:3, 0], plane[3, 1] = w / np.linalg.norm(w), 1
    assert_close(plane @ plane.T @ h, h)
    determinant = logistic.reduced_determinant(w, x, y)
    assert_close(determinant, np.linalg.det(plane.T @ h @ plane), rtol=1e-9)
    f = 1 / (1 + math.exp(-(w @ x)))
    if y == 1:
        assert_close(determinant, w @ w * (1 - f) * (2 * f - 1), rtol=1e-9)
    assert np.sign(determinant) == np.sign((2 * y - 1) * (w @ x))
    gap = logistic.frobenius_bound(w, x, y, 0.1) - at.loss
    assert_close(gap, augmented_bound(at.gradient, at.hessian, math.sqrt(3) * 0.1))


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
@pytest.mark.parametrize("w, x, y", EXAMPLES)
def test_maxima_are_those_of_brute_force(w, x, y, norm):
    w, x = jnp.asarray(w, jnp.float64), jnp.asarray(x, jnp.float64)
    eps, at = 0.3, logistic.expansion(w, x, y)
    if norm == LInf():  # both maxima are at corners: the functions are convex
        deltas = eps * np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    else:
        deltas = np.random.default_rng(1).normal(size=(20_000, 3))
        deltas *= eps / np.linalg.norm(deltas, axis=1, keepdims=True)
        best = eps * np.sign(at.residual) * w / np.linalg.norm(w)
        deltas = np.concatenate([deltas, best[None]])
    along = deltas @ np.asarray(w)
    first = at.loss + at.residual * along
    second = first + at.curvature * along**2 / 2
    true = np.logaddexp(0, -(2 * y - 1) * (w @ x + along))
    assert_close(logistic.first_order_maximum(w, x, y, eps, norm), first.max())
    assert_close(logistic.second_order_maximum(w, x, y, eps, norm), second.max())
    assert_close(logistic.worst_case(w, x, y, eps, norm), true.max())
    assert first.max() <= true.max()  # the loss is convex
    assert second.max() <= logistic.frobenius_bound(w, x, y, eps)
    if norm == L2():
        found = quadratic_maximum(at.gradient, at.hessian, eps)
        assert_close(at.loss + found.value, second.max())


def test_the_regulariser_vanishes_with_confidence_but_the_attack_does_not():
    w, x, eps = jnp.array([30.0, 10.0]), jnp.array([10.0, 10.0]), 0.1
    at = logistic.expansion(w, x, 1)
    assert 0 < -at.residual < 1e-170 and 0 < at.curvature < 1e-170
    assert abs(logistic.second_order_maximum(w, x, 1, eps)) < 1e-160
    assert_close(logistic.frobenius_bound(w, x, 1, eps), 2 * eps**2 / 2)
    h = augmented_hessian(at.gradient, at.hessian)
    # The floor of the estimate.
    assert_close(expected_product_norm(h), math.sqrt(2 / math.pi), rtol=1e-8)
    for scale in (1, 2):  # the closest wrong point is at 10
        assert_close(logistic.second_order_maximum(scale * w, x, 1, 10.5), 0)
        assert_close(logistic.worst_case(scale * w, x, 1, 10.5), scale * 20, rtol=1e-9)


def test_single_precision_stays_and_nothing_is_nan():
    w, x = jnp.asarray(GOLDEN_W, jnp.float32), jnp.asarray(GOLDEN_X, jnp.float32)
    value_and_slope = jax.jit(
        jax.value_and_grad(lambda w: logistic.second_order_maximum(w, x, 1, 0.1, L2()))
    )
    value, slope = value_and_slope(0 * w)
    assert value.dtype == slope.dtype == jnp.float32
    assert_close(value, math.log(2), rtol=1e-6)
    assert_close(slope, -x / 2, rtol=1e-6)  # that of the loss: the norm has slope 0 at 0


# The exact maximum of a quadratic in a ball


def random_quadratic(seed, d=4):
    rng = np.random.default_rng(seed)
    k = rng.normal(size=(d, d)) * rng.choice([0.01, 1, 100])
    return rng.normal(size=d) * rng.choice([0, 1e-12, 0.1, 1, 10]), k + k.T


def certified(g, k, radius):
    """The maximum; asserts the conditions that are necessary and sufficient for it."""
    found = quadratic_maximum(g, k, radius)
    scale = np.abs(k).max() + np.abs(g).max() / radius
    assert np.linalg.norm(found.point) <= radius * (1 + 1e-12)
    assert found.multiplier >= max(0, np.linalg.eigvalsh(k)[-1]) - 1e-12 * scale
    residual = found.multiplier * found.point - k @ found.point - g
    assert_close(residual, 0, atol=1e-11 * scale * radius)
    slack = radius - np.linalg.norm(found.point)
    assert abs(found.multiplier * slack) <= 1e-11 * scale * radius
    assert_close(found.value, g @ found.point + found.point @ k @ found.point / 2, rtol=1e-10)
    return found


def test_trust_region_maximum_is_certified_and_bounded():
    violations = 0
    for seed in range(200):
        g, k = random_quadratic(seed)
        radius = [0.05, 0.3, 2.0][seed % 3]
        if seed % 5 == 0:  # every kind of curvature
            k = -k @ k / 10
        value = certified(g, k, radius).value
        h = augmented_hessian(g, k)
        size, expected = np.linalg.norm(h), expected_product_norm(h)
        assert math.sqrt(2 / math.pi) * size <= expected * (1 + 1e-8) <= size * (1 + 2e-8)
        spectral, frobenius = (
            augmented_bound(g, k, radius, size=s) for s in ("spectral", "frobenius")
        )
        tolerance = 1e-10 * (1 + abs(value))
        assert -tolerance <= value <= spectral + tolerance
        assert spectral <= frobenius + tolerance
        violations += value > augmented_bound(g, k, radius, size="expected") + tolerance
    assert violations > 0  # the published form is not a bound


@pytest.mark.parametrize(
    "g, k, value",
    [
        ([0.0, 0.0], np.diag([2.0, -1.0]), 0.25),  # hard case, g = 0
        ([0.0, 1.0], np.diag([2.0, -2.0]), 0.25 * 1 - 0.0625 + 0.25 - 0.0625),  # hard, g not 0
        ([0.0, 0.1], np.diag([0.0, -1.0]), 0.005),  # flat along the first
        ([0.2, 0.1], -np.eye(2), 0.025),  # inside
        ([3.0, 4.0], np.zeros((2, 2)), 2.5),  # linear
        ([0.0, 0.0], np.zeros((2, 2)), 0.0),
        ([1e-9, 0.1], np.diag([2.0, 1.0]), None),  # almost hard
        ([1.0, 0.0], np.diag([1.0, 1.0]), 0.625),  # a double eigenvalue
    ],
)
def test_trust_region_corner_cases(g, k, value):
    found = certified(np.array(g), np.array(k), 0.5)
    angles = np.linspace(0, 2 * np.pi, 100_001)
    circle = 0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    on_circle = circle @ g + np.einsum("ni,ij,nj->n", circle, k, circle) / 2
    assert found.value >= on_circle.max() - 1e-12
    if value is None:
        assert found.value <= on_circle.max() + 1e-8
    else:
        assert_close(found.value, value, rtol=1e-10)


def test_the_ball_around_the_cube_and_the_corners():
    eps, d = 0.2, 6
    corners = eps * np.array(list(itertools.product([-1.0, 1.0], repeat=d)))
    for seed in range(5):
        g, k = random_quadratic(seed, d)
        k = k @ k / 100  # convex: the largest value on the cube is at a corner
        in_cube = (corners @ g + np.einsum("ni,ij,nj->n", corners, k, corners) / 2).max()
        in_ball = certified(g, k, math.sqrt(d) * eps).value
        assert in_cube <= in_ball * (1 + 1e-12) <= augmented_bound(g, k, math.sqrt(d) * eps)
        delta = corners[seed]
        lifted = np.append(delta, 1)
        surrogate = lifted @ augmented_hessian(g, k) @ lifted / 2 - 1 / 2
        assert_close(surrogate, g @ delta + delta @ k @ delta / 2, atol=1e-12)


def test_the_published_bound_fails_for_a_flat_loss():
    g, k = np.zeros(3), np.zeros((3, 3))
    for square, fails in ((0.25, True), (0.2534, False)):
        assert (augmented_bound(g, k, math.sqrt(square), size="expected") < 0) == fails
        assert augmented_bound(g, k, math.sqrt(square)) == pytest.approx(square / 2)
    assert quadratic_maximum(g, k, 0.5).value == 0


def test_expected_product_norm_is_that_of_random_vectors():
    h = augmented_hessian(*random_quadratic(3))
    z = np.random.default_rng(0).normal(size=(100_000, 5))
    lengths = np.linalg.norm(z @ h, axis=1)
    exact = expected_product_norm(h)
    assert abs(lengths.mean() - exact) < 4 * lengths.std() / math.sqrt(len(lengths))
    # The mean length of a normal vector in closed form.
    chi = math.sqrt(2) * math.exp(math.lgamma(3) - math.lgamma(2.5))
    assert_close(expected_product_norm(2 * np.eye(5)), 2 * chi, rtol=1e-8)
    assert expected_product_norm(np.zeros((2, 2))) == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: logistic.expansion(GOLDEN_W, GOLDEN_X, 2), "y must be one of 0, 1"),
        (lambda: logistic.expansion(GOLDEN_W, GOLDEN_X, np.ones(2)), "y must be one label"),
        (lambda: logistic.expansion(GOLDEN_W, GOLDEN_X[:1], 1), "x must have the shape of w"),
        (lambda: logistic.worst_case(GOLDEN_W, GOLDEN_X, 1, -0.1), "eps must be >= 0"),
        (lambda: logistic.worst_case(GOLDEN_W, GOLDEN_X, 1, 0.1, "linf"), "norm must be"),
        (lambda: quadratic_maximum(GOLDEN_W, np.eye(2), 0.0), "radius must be > 0"),
        (lambda: quadratic_maximum(GOLDEN_W, np.eye(3), 1.0), "gradient must have one entry"),
        (lambda: quadratic_maximum(GOLDEN_W, np.eye(2, k=1), 1.0), "hessian must be symmetric"),
        (lambda: augmented_bound(GOLDEN_W, np.eye(2), 1.0, size="l2"), "size must be one of"),
    ],
)
def test_refusals(call, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        call()
