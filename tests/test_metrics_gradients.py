"""Statistics of gradients against closed forms of softmax-linear models and enumerations."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.metrics import (
    correlation,
    gradient_moments,
    regressed_weight_error,
    robust_overfitting,
    weight_error,
)

RNG = np.random.default_rng(0)
M, D, K = 12, 6, 4
Y = jnp.asarray(RNG.integers(K, size=M), jnp.int32)


def orthogonal_rows(rows, columns, scale):
    """``W`` with ``W W^T = scale^2 I``."""
    return jnp.asarray(scale * np.linalg.qr(RNG.normal(size=(columns, rows)))[0].T, jnp.float32)


def on_sphere(radius):
    x = RNG.normal(size=(M, D))
    return jnp.asarray(radius * x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)


def cross_entropy(logits, y):
    return -jax.nn.log_softmax(logits)[y]


def per_example(loss, params, x):
    """Gradients of ``loss(params, x_i, y_i)`` for parameters and input, of each example."""
    return jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (None, 0, 0)))(params, x, Y)


def flat(grads):
    return np.concatenate([np.reshape(g, (M, -1)) for g in jax.tree.leaves(grads)], axis=1)


def norms(grads):
    return np.linalg.norm(flat(grads), axis=1)


def linear_loss(params, x, y):
    return cross_entropy(params["w"] @ x + params["b"], y)


class TestMoments:
    def test_closed_form_of_a_softmax_linear_model(self):
        w = RNG.normal(size=(K, D)).astype(np.float32)
        b, x = RNG.normal(size=K).astype(np.float32), RNG.normal(size=(M, D)).astype(np.float32)
        grads, _ = per_example(linear_loss, {"w": w, "b": b}, x)
        mean = jax.tree.map(lambda g: g.mean(axis=0), grads)
        got = jax.jit(gradient_moments)(jnp.asarray(norms(grads)), mean)

        # g_i = (p_i - e_y) [x_i; 1]^T
        error = np.asarray(jax.nn.softmax(x @ w.T + b)) - np.eye(K)[Y]
        with_one = np.c_[x, np.ones(M)]
        size = np.linalg.norm(error, axis=1) * np.linalg.norm(with_one, axis=1)
        of_mean = np.linalg.norm(error.T @ with_one / M)
        np.testing.assert_allclose(norms(grads), size, rtol=1e-5)
        np.testing.assert_allclose(got.mean_norm, size.mean(), rtol=1e-5)
        np.testing.assert_allclose(got.second_moment, (size**2).mean(), rtol=1e-5)
        np.testing.assert_allclose(got.mean_gradient_norm, of_mean, rtol=1e-5)
        np.testing.assert_allclose(got.variance, (size**2).mean() - of_mean**2, rtol=1e-5)

    @pytest.mark.parametrize("unbiased", [False, True])
    def test_variance_is_the_mean_squared_deviation(self, unbiased):
        g = RNG.normal(loc=0.5, size=(M, D))
        got = gradient_moments(np.linalg.norm(g, axis=1), g.mean(axis=0), unbiased=unbiased)
        expected = g.var(axis=0, ddof=int(unbiased)).sum()
        np.testing.assert_allclose(got.variance, expected, rtol=1e-5)
        assert got.mean_norm**2 <= got.second_moment
        assert got.mean_gradient_norm <= got.mean_norm

    def test_the_mean_of_n_independent_draws_has_one_nth_of_the_variance(self):
        g = RNG.normal(size=(5, 3))

        def variance(n):
            means = np.array(
                [g[list(draw)].mean(0) for draw in itertools.product(range(5), repeat=n)]
            )
            return gradient_moments(np.linalg.norm(means, axis=1), means.mean(axis=0)).variance

        expected = variance(1) / np.array([2, 3])
        np.testing.assert_allclose([variance(2), variance(3)], expected, rtol=1e-5)

    def test_the_mean_is_any_tree(self):
        tree = {"a": jnp.array([[3.0]]), "b": (jnp.array([0.0, 4.0]), jnp.zeros(()))}
        got = gradient_moments(jnp.array([5.0, 7.0]), tree)
        assert got.mean_gradient_norm == 5 and got.variance == (25 + 49) / 2 - 25

    def test_equal_gradients_have_no_variance(self):
        g = RNG.normal(size=D).astype(np.float32)
        got = gradient_moments(np.full(M, np.linalg.norm(g)), g, unbiased=True)
        assert 0 <= got.variance < 1e-5
        zero = gradient_moments(jnp.zeros(1), jnp.zeros(3))
        assert zero == (0, 0, 0, 0)

    def test_half_precision_is_summed_in_float32(self):
        got = gradient_moments(jnp.full(3000, 300, jnp.bfloat16), jnp.zeros(2, jnp.bfloat16))
        assert got.second_moment.dtype == jnp.float32
        np.testing.assert_allclose(got.second_moment, 9e4, rtol=1e-5)

    @pytest.mark.parametrize(
        "values, unbiased, message",
        [
            (jnp.ones((2, 2)), False, r"norms must be \(m,\) with m >= 1, got shape \(2, 2\)"),
            (jnp.ones(0), False, r"got shape \(0,\)"),
            (jnp.ones(1), True, r"m >= 2, got shape \(1,\)"),
            (jnp.array([1.0, -1.0]), False, "norms must be >= 0, got -1"),
            (jnp.array([1.0, jnp.inf]), False, "norms must be finite, got inf"),
        ],
    )
    def test_bad_input(self, values, unbiased, message, plain_calls):
        with pytest.raises(ValueError, match=message):
            gradient_moments(values, jnp.ones(3), unbiased=unbiased)


class TestCorrelation:
    def test_is_one_where_the_norms_are_proportional(self):
        # ||h_i|| = s ||p - e_y||, ||g_i|| = sqrt(r^2 + 1) ||p - e_y||
        radius, scale = 2.0, 0.7
        params = {"w": orthogonal_rows(K, D, scale), "b": jnp.arange(K) / K}
        g, h = per_example(linear_loss, params, on_sphere(radius))
        np.testing.assert_allclose(norms(g) / norms(h), math.sqrt(radius**2 + 1) / scale, rtol=1e-4)
        assert correlation(norms(g), norms(h)) == pytest.approx(1, abs=1e-6)

    def test_is_one_for_the_first_layer_of_any_network_with_orthogonal_rows(self):
        rest = jnp.asarray(RNG.normal(size=(2, 5, 5)), jnp.float32)

        def loss(params, x, y):
            z = jnp.sin(rest[0] @ jnp.tanh(params["w"] @ x + params["b"]))
            return cross_entropy(rest[1] @ z, y)

        params = {"w": orthogonal_rows(5, D, 1.5), "b": jnp.ones(5)}
        g, h = per_example(loss, params, on_sphere(1.0))
        assert np.std(norms(h)) > 0.1
        assert correlation(norms(g), norms(h)) == pytest.approx(1, abs=1e-6)

    def test_is_that_of_numpy_and_does_not_see_positive_affine_maps(self):
        a, b = RNG.normal(size=(2, 50))
        expected = np.corrcoef(a, b)[0, 1]
        assert correlation(a, b) == pytest.approx(expected, rel=1e-12)
        assert correlation(3 * a + 2, 0.5 * b - 7) == pytest.approx(expected, rel=1e-10)
        assert correlation(-a, b) == pytest.approx(-expected, rel=1e-10)
        assert correlation(jnp.asarray(a), list(b)) == pytest.approx(expected, rel=1e-5)

    def test_is_not_a_number_where_nothing_varies(self):
        assert math.isnan(correlation([0.1, 0.1, 0.1], [1.0, 2.0, 3.0]))
        assert math.isnan(correlation([1.0, 2.0, 3.0], jnp.zeros(3)))


class TestWeightError:
    def test_by_hand(self):
        assert weight_error([0.5, 1.0, 0.3], [0.4, 1.0, 0.6]) == pytest.approx(25.0)

    def test_is_zero_where_nothing_is_clipped_or_the_relation_is_exact(self):
        h = RNG.uniform(1, 3, size=M)
        g = 4 * h + 1
        slope, intercept = np.polyfit(h, g, 1)
        for alpha in (100.0, 3.0, 8.0):
            estimated = np.minimum(alpha / (slope * h + intercept), 1)
            exact = np.minimum(alpha / g, 1)
            assert weight_error(estimated, exact) == pytest.approx(0, abs=1e-10)


class TestOverfitting:
    @pytest.mark.parametrize(
        "best, last, expected",
        [
            (50.87, 44.15, 13.2),
            (51.88, 46.62, 10.1),
            (51.95, 46.80, 9.9),
            (50.05, 44.04, 12.0),
            (52.19, 48.79, 6.5),
            (52.46, 49.75, 5.2),
        ],
    )
    def test_published_values(self, best, last, expected):
        assert robust_overfitting([10.0, best, last]) == pytest.approx(expected, abs=0.05)

    def test_range(self):
        assert robust_overfitting([0.1, 0.2, 0.3]) == 0
        assert robust_overfitting([0.3]) == 0 and robust_overfitting([0.0, 0.0]) == 0
        assert robust_overfitting([0.3, 0.0]) == 100
        for curve in RNG.uniform(size=(20, 6)):
            assert 0 <= robust_overfitting(curve) <= 100
            assert robust_overfitting(curve) == pytest.approx(robust_overfitting(100 * curve))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: correlation([1.0, 2.0], [1.0]), "b must have the shape of a"),
        (lambda: correlation([1.0], [1.0]), "a must hold at least two numbers, got 1"),
        (lambda: correlation([[1.0, 2.0]], [[1.0, 2.0]]), r"a must be \(n,\) with n >= 1"),
        (lambda: correlation([1.0, math.nan], [1.0, 2.0]), "a must be a number"),
        (lambda: weight_error([0.5], [0.0]), "exact must be > 0, got 0"),
        (lambda: weight_error([], []), r"estimated must be \(n,\) with n >= 1, got shape \(0,\)"),
        (lambda: robust_overfitting([]), "accuracy must be"),
        (lambda: robust_overfitting([0.5, -0.1]), "accuracy must be >= 0, got -0.1"),
        (lambda: robust_overfitting([0.5, math.inf]), "accuracy must be finite"),
    ],
)
def test_bad_input(call, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        call()


def test_regressed_weights_err_as_little_as_a_line_can():
    inputs = np.array([0.5, 1.0, 2.0, 4.0])
    line = 3 * inputs + 0.5
    assert regressed_weight_error(line, inputs, 2.0) == pytest.approx(0, abs=1e-9)
    norms = line + np.array([0.1, -0.2, 0.3, -0.1])
    slope, intercept = np.polyfit(inputs, norms, 1)
    weights = np.minimum(2 / (slope * inputs + intercept), 1), np.minimum(2 / norms, 1)
    assert regressed_weight_error(norms, inputs, 2.0) == pytest.approx(weight_error(*weights))
    assert regressed_weight_error(norms, inputs, 100.0) == 0  # all weights are 1
    constant = np.ones(4)
    expected = weight_error(np.minimum(2 / norms.mean() * constant, 1), weights[1])
    assert regressed_weight_error(norms, constant, 2.0) == pytest.approx(expected)
    with pytest.raises(ValueError, match="alpha must be > 0, got 0"):
        regressed_weight_error(norms, inputs, 0)
