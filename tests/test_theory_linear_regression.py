import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.norms import L2, LInf
from robustjax.theory import linear_regression as lr

# A distribution of x_1 on three points, so that expectations are sums.
POINTS, CHANCES = np.array([-0.5, 1.0, 2.0]), np.array([0.2, 0.5, 0.3])
POPULATION = lr.Population(POINTS @ CHANCES, POINTS**2 @ CHANCES, target=1.3)
D, EPS = 6, 0.17
TARGET = np.eye(D)[0] * 1.3
W = np.random.default_rng(0).normal(size=D)


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def expectation(loss):
    inputs = jnp.asarray(POINTS[:, None] * np.eye(D)[0])
    return sum(p * loss(x) for x, p in zip(inputs, CHANCES, strict=True))


def assert_close(got, expected, rtol=1e-12):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-15)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_gradient_descent_is_its_closed_form(ridge):
    def objective(w):
        return expectation(lambda x: (x @ (w - TARGET)) ** 2 / 2) + ridge * w @ w / 2

    gradient = jax.jit(jax.grad(objective))
    w = jnp.asarray(W)
    assert_close(objective(w) - ridge * w @ w / 2, lr.risk(POPULATION, w))
    for t in range(6):
        closed = lr.gradient_descent(
            POPULATION, jnp.asarray(W), steps=t, learning_rate=0.4, ridge=ridge
        )
        assert_close(closed, w)
        w = w - 0.4 * gradient(w)
    limit = lr.gradient_descent(
        POPULATION, jnp.asarray(W), steps=math.inf, learning_rate=0.4, ridge=ridge
    )
    if ridge:
        assert_close(limit, lr.ridge_minimizer(POPULATION, ridge, D))
        assert np.abs(gradient(limit)).max() < 1e-15
    else:  # unused weights are those of the initialisation, bit by bit
        np.testing.assert_array_equal(w[1:], W[1:])
        np.testing.assert_array_equal(closed[1:], W[1:])
        np.testing.assert_array_equal(limit, [1.3, *W[1:]])
        assert lr.risk(POPULATION, limit) == 0


def test_the_trained_model_is_attacked_through_unused_weights():
    limit = lr.gradient_descent(POPULATION, jnp.asarray(W), steps=math.inf, learning_rate=0.4)
    damage = EPS**2 * np.abs(W[1:]).sum() ** 2 / 2
    assert_close(lr.robust_risk(POPULATION, limit, EPS), damage)
    for cure in (
        lr.ridge_minimizer(POPULATION, 0.1, D),
        lr.lasso_minimizer(POPULATION, 0.1, D),
        lr.ridge_minimizer(POPULATION, 0.0, D),
    ):
        assert not np.any(lr.irrelevant_attack(cure, EPS))
        assert lr.robust_risk(POPULATION, cure, EPS) == lr.risk(POPULATION, cure)


@pytest.mark.parametrize("d, scale", [(10, 0.1), (10, 10**-0.5), (100, 0.1), (300, 0.1)])
def test_expected_damage_is_that_of_random_weights(d, scale):
    w = scale * np.random.default_rng(d).normal(size=(4000, d))
    for all_dimensions in (False, True):
        used = w if all_dimensions else w[:, 1:]
        losses = 0.1**2 * np.abs(used).sum(axis=1) ** 2 / 2
        expected = lr.expected_attacked_loss(d, scale, 0.1, all_dimensions=all_dimensions)
        assert abs(losses.mean() - expected) < 4 * losses.std() / math.sqrt(len(losses))
    assert lr.expected_attacked_loss(1, scale, 0.1) == 0


def test_expected_damage_grows_with_the_square_of_the_dimension():
    small, large = (lr.expected_attacked_loss(d, 0.1, 0.1) for d in (10**3, 10**5))
    assert math.log10(large / small) / 2 == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("target", [1.3, -1.3])
@pytest.mark.parametrize("lasso", [0.2, 5.0])
def test_lasso_minimises(target, lasso):
    population = lr.Population(0.0, 0.8, target)
    grid = np.linspace(-2, 2, 400_001)
    best = grid[np.argmin(0.4 * (grid - target) ** 2 + lasso * np.abs(grid))]
    found = lr.lasso_minimizer(population, lasso, 3)
    np.testing.assert_allclose(found, [best, 0, 0], atol=1e-5)


def test_the_exact_penalty_is_the_loss_at_the_attacked_inputs():
    w = jnp.asarray(W)
    frozen = jnp.asarray(np.where(np.arange(D) % 2, W, -W))
    for seen in (None, frozen):
        delta = lr.irrelevant_attack(w if seen is None else seen, EPS)
        attacked = expectation(lambda x: ((x + delta) @ (w - TARGET)) ** 2 / 2)  # noqa: B023
        assert_close(lr.robust_risk(POPULATION, w, EPS, seen=seen), attacked)
    unused = np.abs(W[1:]).sum()
    residual = (W[0] - 1.3) * POPULATION.mean
    printed = lr.risk(POPULATION, w) + EPS * residual * unused + EPS**2 * unused**2 / 2
    assert_close(lr.robust_risk(POPULATION, w, EPS), printed)
    assert abs(lr.robust_risk(POPULATION, w, EPS, seen=frozen) - printed) > 0.01


def test_the_slope_of_the_exact_penalty_is_zero_at_zero_weights():
    w = jnp.asarray(np.where(np.arange(D) == 2, 0, W))
    slope = jax.jit(jax.grad(lambda w: lr.robust_risk(POPULATION, w, EPS)))(w)
    pull = EPS * (W[0] - 1.3) * POPULATION.mean + EPS**2 * np.abs(w[1:]).sum()
    assert_close(slope[1:], pull * np.sign(w[1:]))


@pytest.mark.parametrize("target_moves", [True, False])
def test_taylor_terms_are_the_derivatives_and_their_sum_is_exact(target_moves):
    w, x, delta = jnp.asarray(np.random.default_rng(1).normal(size=(3, D)))
    target = jnp.asarray(TARGET)

    def loss(z):
        return (z @ w - (z if target_moves else x) @ target) ** 2 / 2

    terms = lr.taylor_terms(w, target, x, delta, target_moves=target_moves)
    assert_close(terms.value, loss(x))
    gradient, hessian = jax.jit(lambda x: (jax.grad(loss)(x), jax.hessian(loss)(x)))(x)
    assert_close(terms.first, gradient @ delta)
    assert_close(terms.second, delta @ hessian @ delta / 2)
    assert_close(sum(terms), loss(x + delta))


def test_the_second_order_recovers_the_penalty_and_the_first_misses_its_square():
    w, target = jnp.asarray(W), jnp.asarray(TARGET)
    delta = lr.irrelevant_attack(w, EPS)
    for moves in (True, False):
        terms = functools.partial(lr.taylor_terms, w, target, delta=delta, target_moves=moves)
        value, first, second = expectation(lambda x: np.array(terms(x)))  # noqa: B023
        robust = lr.robust_risk(POPULATION, w, EPS)
        assert_close(value + first + second, robust)
        assert_close(robust - value - first, EPS**2 * np.abs(W[1:]).sum() ** 2 / 2)


@pytest.mark.parametrize("norm", [LInf(), L2()], ids=lambda norm: norm.name)
def test_worst_case_of_a_held_target(norm):
    w, x = jnp.asarray(W), jnp.asarray(np.random.default_rng(2).normal(size=D))
    y, residual = 0.4, W @ np.asarray(x) - 0.4
    delta = EPS * norm.steepest(residual * w)
    worst = lr.worst_case_loss(w, x, y, EPS, norm)
    assert_close(worst, ((x + delta) @ w - y) ** 2 / 2)
    others = np.random.default_rng(3).normal(size=(500, D))
    others *= EPS / np.asarray(norm.value(jnp.asarray(others), batch_ndim=1))[:, None]
    assert np.all((residual + others @ W) ** 2 / 2 <= worst + 1e-12)
    length = np.linalg.norm(W, 1 if norm.name == "linf" else 2)
    first_order = residual**2 / 2 + EPS * abs(residual) * length
    assert_close(worst - first_order, EPS**2 * length**2 / 2)


def test_noise_on_the_input_is_a_penalty_on_the_weights():
    x, y, scale = np.random.default_rng(4).normal(size=D), 0.7, 0.3
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)  # exact for cubic polynomials
    shifts = scale * np.linalg.norm(W) * nodes  # <w, xi> is N(0, scale^2 ||w||^2)
    expected = weights @ (W @ x + shifts - y) ** 2 / 2 / weights.sum()
    assert_close(lr.noisy_loss(jnp.asarray(W), jnp.asarray(x), y, scale), expected)
    noise = scale * np.random.default_rng(5).normal(size=(200_000, D))
    losses = (W @ x - y + noise @ W) ** 2 / 2
    assert abs(losses.mean() - expected) < 4 * losses.std() / math.sqrt(len(losses))


def random_problem(seed, d=6):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(d, d)) * np.geomspace(0.1, 3, d)
    arrays = rng.normal(size=(2, d)), rng.normal(size=(2, d)), rng.normal(size=d)
    return tuple(map(jnp.asarray, (*arrays, factor.T @ factor)))


def test_minimum_norm_interpolates_and_is_shortest():
    x, _, target, _ = random_problem(0)
    w = lr.minimum_norm(x, x @ target)
    assert_close(x @ w, x @ target)
    orthogonal = np.linalg.svd(x)[2][2:]
    np.testing.assert_allclose(orthogonal @ w, 0, atol=1e-14)
    assert_close(w, np.linalg.lstsq(x, x @ target)[0], rtol=1e-10)


def test_augmentation_may_hurt_and_self_training_may_not():
    gain = jax.jit(lr.augmentation_gain)
    signs = set()
    for seed in range(20):
        x, added, target, covariance = random_problem(seed)
        both = jnp.concatenate([x, added])
        standard = lr.minimum_norm(x, x @ target)
        augmented = lr.minimum_norm(both, both @ target)
        error, error_augmented = (
            lr.standard_error(w, target, covariance) for w in (standard, augmented)
        )
        change = gain(x, added, target, covariance)
        assert_close(change, error - error_augmented, rtol=1e-9)
        signs.add(np.sign(change).item())
        assert gain(x, added, target, jnp.eye(6)) >= 0

        trained = lr.robust_self_training(x, x @ target, added, added @ target, covariance)
        assert_close(both @ trained, both @ target, rtol=1e-9)
        moved = (trained - standard) @ covariance @ (trained - standard)
        assert_close(lr.standard_error(trained, target, covariance), error - moved, rtol=1e-8)
    assert signs == {-1, 1}


def test_augmentation_hurts_in_three_dimensions():
    x, added = jnp.array([[0.0, 0, 1]]), jnp.array([[1.0, 1, 0]])
    target, covariance = jnp.array([2.0, 0, 0]), jnp.diag(jnp.array([1.0, 4, 1]))
    # Errors: of (0, 0, 0) it is 4, of (1, 1, 0) it is 1 + 4.
    assert_close(lr.augmentation_gain(x, added, target, covariance), -1)
    trained = lr.robust_self_training(x, x @ target, added, added @ target, covariance)
    # On the line (a, 2 - a, 0) the nearest to 0 in Sigma minimises a^2 + 4 (2 - a)^2.
    assert_close(trained, [1.6, 0.4, 0], rtol=1e-10)
    # A covariance that does not see the third coordinate leaves it at the augmented estimate.
    flat = lr.robust_self_training(
        x, x @ target, added, added @ target, covariance.at[2, 2].set(0.0)
    )
    assert_close(flat, [1.6, 0.4, 0], rtol=1e-10)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lr.Population(2.0, 1.0), "second_moment must be >= mean"),
        (lambda: lr.Population(0.0, 0.0), "second_moment must be > 0"),
        (
            lambda: lr.gradient_descent(POPULATION, W, steps=math.inf, learning_rate=3.0),
            "must be < 2 for a limit",
        ),
        (lambda: lr.ridge_minimizer(POPULATION, -1.0, 3), "ridge must be >= 0"),
        (lambda: lr.lasso_minimizer(POPULATION, 1.0, 0), "dimension must be >= 1"),
        (lambda: lr.risk(POPULATION, W[None]), "w must be weights of shape"),
        (lambda: lr.robust_risk(POPULATION, W, 0.1, seen=W[:2]), "seen must have the shape of w"),
        (lambda: lr.irrelevant_attack(W, -0.1), "eps must be >= 0"),
    ],
)
def test_refusals(call, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        call()
