"""The report on minimum-norm attacks, by hand-made distances."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.metrics.minimum_norm import (
    minimum_norm_report,
    relative_perturbation,
    robust_accuracy_curve,
)

# Two misclassified examples, three broken ones, one that withstands.
DISTANCE = jnp.array([0.0, 0.1, math.inf, 0.4, 0.0, 0.2])
SIZE = jnp.array([1.0, 2.0, 3.0, 4.0, 0.0, 0.5])


def test_curve_counts_the_distances_beyond_each_radius():
    curve = robust_accuracy_curve(DISTANCE, jnp.array([0.0, 0.1, 0.15, 0.2, 0.4, 100.0]))
    np.testing.assert_allclose(curve, np.array([4, 3, 3, 2, 1, 1]) / 6)


def test_curve_never_rises_and_starts_at_the_clean_accuracy():
    distance = jax.random.exponential(jax.random.key(0), (50,)) * (jnp.arange(50) % 5 > 0)
    curve = robust_accuracy_curve(distance, jnp.linspace(0, 5, 33))
    assert bool(jnp.all(jnp.diff(curve) <= 0))
    np.testing.assert_allclose(curve[0], 0.8)


def test_report_has_both_conventions_for_misclassified_examples():
    report = minimum_norm_report(DISTANCE, [0.0, 0.3], size=SIZE)
    np.testing.assert_allclose(report.robust_accuracy, [4 / 6, 2 / 6])
    np.testing.assert_allclose(report.accuracy, 4 / 6)
    np.testing.assert_allclose(report.found, 3 / 4)
    np.testing.assert_allclose(report.mean, 0.7 / 3, rtol=1e-6)
    np.testing.assert_allclose(report.mean_all, 0.7 / 5, rtol=1e-6)
    np.testing.assert_allclose(report.median, (0.2 + 0.4) / 2, rtol=1e-6)
    np.testing.assert_allclose(report.median_all, (0.1 + 0.2) / 2, rtol=1e-6)
    np.testing.assert_allclose(report.relative, (0.05 + 0.1 + 0.4) / 3, rtol=1e-6)
    np.testing.assert_allclose(report.relative_all, (0.05 + 0.1 + 0.4) / 5, rtol=1e-6)


@pytest.mark.parametrize("n", [3, 4])
def test_the_median_is_infinite_where_most_withstand(n):
    distance = jnp.full(n, math.inf).at[0].set(0.5)
    report = minimum_norm_report(distance, [1.0])
    assert math.isinf(report.median) and math.isinf(report.median_all)
    np.testing.assert_allclose(report.mean, 0.5)
    assert math.isnan(report.relative)


def test_nothing_to_average():
    report = minimum_norm_report(jnp.zeros(3), [0.1])
    assert report.accuracy == 0 and report.mean_all == 0 and report.median_all == 0
    assert math.isnan(report.mean) and math.isnan(report.median) and math.isnan(report.found)


def test_jit_and_numpy():
    eager = minimum_norm_report(np.asarray(DISTANCE), np.array([0.0, 0.3]), size=np.asarray(SIZE))
    jitted = jax.jit(lambda d, e, s: minimum_norm_report(d, e, size=s))(
        DISTANCE, jnp.array([0.0, 0.3]), SIZE
    )
    for a, b in zip(eager, jitted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_relative_perturbation():
    np.testing.assert_allclose(
        relative_perturbation(DISTANCE, SIZE), [0, 0.05, math.inf, 0.1, 0, 0.4], rtol=1e-6
    )


@pytest.mark.parametrize(
    "distance, eps, message",
    [
        (jnp.array([-1.0]), [0.1], "distance must be >= 0"),
        (jnp.array([math.nan]), [0.1], "distance must be a number"),
        (jnp.ones((2, 2)), [0.1], "distance must have one entry per example"),
        (jnp.ones(0), [0.1], "distance must have one entry per example"),
        (jnp.ones(2), 0.1, "eps must be a list of radii"),
        (jnp.ones(2), [-0.1], "eps must be >= 0"),
    ],
)
def test_bad_input(distance, eps, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        minimum_norm_report(distance, eps)


def test_sizes_fit_the_distances(plain_calls):
    with pytest.raises(ValueError, match="size must have the shape of distance"):
        minimum_norm_report(DISTANCE, [0.1], size=jnp.ones(3))
