"""Clipped gradients: the projection, its variance, and descent under heavy-tailed noise."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.theory import (
    best_learning_rate,
    clip,
    clipped_variance,
    descent_bound,
    simulate_descent,
    variance_bound,
)

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
A = jnp.asarray(RNG.normal(size=(40, 5)) * RNG.uniform(0.1, 3, size=(40, 1)), jnp.float32)
ALPHA = 2.0
seeded = functools.partial(simulate_descent, KEY, dimension=2, steps=300, seeds=300)


def length(a):
    return np.linalg.norm(np.asarray(a, np.float64), axis=-1)


class TestClip:
    def test_is_its_formula(self):
        expected = np.minimum(ALPHA / length(A), 1)[:, None] * A
        np.testing.assert_allclose(clip(A, ALPHA), expected, rtol=1e-6)
        assert 5 < np.sum(length(A) > ALPHA) < 35
        np.testing.assert_array_equal(clip(A, math.inf), A)
        np.testing.assert_array_equal(clip(A, 0.0), jnp.zeros_like(A))
        np.testing.assert_allclose(clip(A[0], ALPHA), expected[0], rtol=1e-6)

    def test_is_the_nearest_point_of_the_ball(self):
        inside = clip(jnp.asarray(RNG.normal(size=(100, 1, 5)), jnp.float32), ALPHA)
        assert np.all(length(A - clip(A, ALPHA)) <= length(A - inside) + 1e-6)
        assert np.all(length(clip(A, ALPHA)) <= ALPHA * (1 + 1e-6))

    def test_is_idempotent(self):
        once = clip(A, ALPHA)
        np.testing.assert_allclose(clip(once, ALPHA), once, rtol=1e-6)

    def test_is_one_lipschitz(self):
        image = clip(A, ALPHA)
        before, after = length(A[:, None] - A), length(image[:, None] - image)
        assert np.all(after <= before + 1e-6)
        assert np.any(after < 0.5 * before)

    def test_commutes_with_orthogonal_maps(self):
        q = jnp.asarray(np.linalg.qr(RNG.normal(size=(5, 5)))[0], jnp.float32)
        np.testing.assert_allclose(clip(A @ q, ALPHA), clip(A, ALPHA) @ q, atol=1e-5)

    def test_keeps_the_sign_of_a_symmetric_mean_and_may_turn_a_skewed_one(self):
        offsets = jnp.asarray(RNG.standard_t(1.5, size=200), jnp.float32)
        for mean in (0.1, -0.4, 2.0):
            symmetric = mean + jnp.concatenate([offsets, -offsets])[:, None]
            assert jnp.sign(clip(symmetric, 1.0).mean()) == np.sign(mean)
        skewed = jnp.array([[-1.0], [-1.0], [-1.0], [9.0]])
        assert skewed.mean() > 0 > clip(skewed, 1.0).mean()


class TestVariance:
    @pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0, math.inf])
    def test_is_the_variance_of_the_clipped_samples(self, alpha):
        expected = np.asarray(clip(A, alpha), np.float64).var(axis=0).sum()
        np.testing.assert_allclose(clipped_variance(A, alpha), expected, rtol=1e-5)

    @pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
    def test_stays_below_alpha_squared_and_the_variance_itself(self, alpha):
        for scale in (0.1, 1.0, 10.0):
            for shift in (0.0, 1.0):
                samples = scale * A + shift
                got = float(clipped_variance(samples, alpha))
                assert got <= alpha**2 * (1 + 1e-6)
                assert got <= float(clipped_variance(samples, math.inf)) * (1 + 1e-6)

    def test_the_bound_is_attained_by_two_opposite_vectors(self):
        u = A[0] / length(A[0])
        for size in (ALPHA, 7 * ALPHA):
            got = clipped_variance(jnp.stack([size * u, -size * u]), ALPHA)
            np.testing.assert_allclose(got, variance_bound(ALPHA, sharp=True), rtol=1e-5)
        assert variance_bound(ALPHA, sharp=True) == 4 and variance_bound(ALPHA) == 16

    def test_infinite_variance_becomes_less_than_alpha_squared(self):
        heavy = np.random.default_rng(1).standard_t(1.5, size=(20_000, 12))
        heavy = jnp.asarray(heavy, jnp.float32)
        assert float(clipped_variance(heavy, math.inf)) > 100 * 9
        assert 8.9 < float(clipped_variance(heavy, 3.0)) < 9


class TestDescentBound:
    def test_best_learning_rate(self):
        options = {"smoothness": 3.0, "alpha": 0.7, "steps": 50}
        best = best_learning_rate(2.0, **options)
        at_best = descent_bound(2.0, learning_rate=best, **options)
        assert at_best == pytest.approx(0.7 * math.sqrt(2 * 3.0 * 2.0 / 50))
        for factor in (0.5, 0.9, 1.1, 2.0):
            assert descent_bound(2.0, learning_rate=factor * best, **options) > at_best

    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("alpha, curvature", [(1.0, 1.0), (0.3, 4.0), (3.0, 0.5)])
    def test_holds_on_every_trajectory(self, alpha, curvature, normalize):
        trace = seeded(learning_rate=0.2, alpha=alpha, curvature=curvature, normalize=normalize)
        value = curvature * np.asarray(trace.distance, np.float64) ** 2 / 2
        left = np.asarray(trace.correlation, np.float64).mean(axis=1)
        bounds = [
            descent_bound(gap, smoothness=curvature, alpha=alpha, learning_rate=0.2, steps=300)
            for gap in value[:, 0] - value[:, -1]
        ]
        assert np.all(left <= np.array(bounds) * (1 + 1e-4) + 1e-6)
        if normalize:  # every step has the length that the bound allows for
            np.testing.assert_allclose(left, bounds, rtol=1e-3, atol=1e-4)

    def test_one_step_is_exact(self):
        # A(theta - eta g) = A(theta) - eta <grad A, g> + L eta^2 ||g||^2 / 2 on this quadratic
        trace = seeded(learning_rate=0.2, alpha=math.inf, degrees_of_freedom=5.0, curvature=2.0)
        value = np.asarray(trace.distance, np.float64) ** 2
        size = (np.diff(value, axis=1) + 0.2 * np.asarray(trace.correlation)) / 0.2**2
        assert np.all(size > -1e-3) and size.max() > 1


class TestSimulation:
    def test_far_away_it_is_gradient_descent(self):
        # Noise of order one drowns in gradients of a million.
        run = functools.partial(simulate_descent, KEY, dimension=3, steps=10, seeds=2)
        trace = run(learning_rate=0.5, alpha=math.inf, degrees_of_freedom=50.0, start=1e6)
        expected = 1e6 * 0.5 ** np.arange(11)
        np.testing.assert_allclose(trace.distance, np.stack([expected] * 2), rtol=0.01)
        np.testing.assert_allclose(trace.correlation, np.stack([expected[:-1] ** 2] * 2), rtol=0.02)
        clipped = run(learning_rate=0.5, alpha=100.0, start=1e6)
        np.testing.assert_allclose(clipped.distance[:, -1], 1e6 - 500, rtol=1e-6)

    def test_clipped_iterates_stay_near_the_minimum_and_the_others_do_not(self):
        late = {
            alpha: np.asarray(seeded(learning_rate=0.1, alpha=alpha).distance)[:, 150:]
            for alpha in (1.0, math.inf)
        }
        clipped, free = (np.quantile(late[alpha], 0.99) for alpha in (1.0, math.inf))
        assert clipped < 1 and free > 8 * clipped
        assert late[1.0].max() < 1.5 and late[math.inf].max() > 100

    def test_excursions_without_clipping_grow_with_the_time(self):
        def largest(alpha):
            trace = seeded(learning_rate=0.1, alpha=alpha)
            running = np.maximum.accumulate(np.asarray(trace.distance), axis=1)
            return np.median(running[:, [50, 300]], axis=0)

        early, late = largest(math.inf)
        assert late > 2 * early
        early, late = largest(1.0)
        assert late < 1.3 * early

    def test_the_neighbourhood_shrinks_with_the_learning_rate_and_alpha(self):
        def radius(learning_rate, alpha, normalize=False):
            trace = seeded(learning_rate=learning_rate, alpha=alpha, normalize=normalize)
            return math.sqrt(np.mean(np.asarray(trace.distance)[:, 150:] ** 2))

        base = radius(0.1, 1.0)
        assert 0.8 * 2 < radius(0.4, 1.0) / base < 1.2 * 2  # as the root of the learning rate
        assert 1 < radius(0.1, 2.0) / base < 2  # slower than alpha
        assert base < radius(0.1, 1.0, normalize=True)

    def test_seeds_do_not_depend_on_one_another(self):
        few = simulate_descent(
            KEY, dimension=2, steps=5, learning_rate=0.1, alpha=1.0, seeds=3, start=0
        )
        many = simulate_descent(
            KEY, dimension=2, steps=5, learning_rate=0.1, alpha=1.0, seeds=4, start=0
        )
        assert few.distance.shape == (3, 6) and few.correlation.shape == (3, 5)
        np.testing.assert_allclose(few.distance, many.distance[:3], rtol=1e-5)
        assert np.unique(many.distance[:, -1]).size == 4 and not many.distance[:, 0].any()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: clip(A, -1.0), "alpha must be >= 0, got -1"),
        (lambda: clipped_variance(A[0], 1.0), r"samples must be \(m, d\)"),
        (lambda: clipped_variance(A[:0], 1.0), "samples must be"),
        (lambda: variance_bound(-1.0), "alpha must be >= 0"),
        (lambda: seeded(learning_rate=0.0, alpha=1.0), "learning_rate must be > 0"),
        (lambda: seeded(learning_rate=0.1, alpha=0.0), "alpha must be > 0"),
        (lambda: seeded(learning_rate=0.1, alpha=math.inf, normalize=True), "alpha must be finite"),
        (lambda: seeded(learning_rate=0.1, alpha=1.0, seeds=0), "seeds must be >= 1"),
        (lambda: best_learning_rate(0.0, smoothness=1.0, alpha=1.0, steps=1), "gap must be > 0"),
        (
            lambda: descent_bound(1.0, smoothness=1.0, alpha=1.0, learning_rate=0.1, steps=0),
            "steps must be >= 1",
        ),
    ],
)
def test_bad_input(call, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        call()
