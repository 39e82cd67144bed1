"""The bootstrap against its exact distribution for few values."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.metrics import bootstrap_mean

VALUES = np.array([3.0, 1.0, 4.5, 2.0])


def test_mean_and_spread():
    got = bootstrap_mean(VALUES)
    assert got.mean == pytest.approx(VALUES.mean())
    assert got.std == pytest.approx(VALUES.std(ddof=1))
    assert VALUES.min() <= got.low <= got.mean <= got.high <= VALUES.max()


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_ends_are_quantiles_of_the_means_of_all_samples(confidence):
    means = np.array([np.mean(draw) for draw in itertools.product(VALUES, repeat=4)])
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    got = bootstrap_mean(VALUES, confidence=confidence, resamples=20000)
    for end, tail in zip((got.low, got.high), tails, strict=True):
        # The tail lies between the exact shares below and up to the end, but for sampling error.
        assert np.mean(means < end - 1e-9) - 0.01 <= tail <= np.mean(means <= end + 1e-9) + 0.01


def test_shifts_and_scales_with_the_values():
    one, other = bootstrap_mean(VALUES), bootstrap_mean(10 - 2 * VALUES)
    assert other.std == pytest.approx(2 * one.std)
    assert other.mean == pytest.approx(10 - 2 * one.mean)
    assert bootstrap_mean(2 * VALUES + 1).low == pytest.approx(2 * one.low + 1)


def test_same_seed_same_interval():
    many = np.random.default_rng(0).normal(size=30)
    assert bootstrap_mean(many, seed=3) == bootstrap_mean(many, seed=3)
    assert bootstrap_mean(many, seed=3) != bootstrap_mean(many, seed=4)


def test_more_confidence_is_wider_and_more_values_narrower():
    many = np.random.default_rng(0).normal(size=400)
    width = lambda got: got.high - got.low  # noqa: E731
    assert width(bootstrap_mean(many, confidence=0.5)) < width(bootstrap_mean(many))
    ratio = width(bootstrap_mean(many)) / (2 * 1.96 * many.std() / math.sqrt(400))
    assert 0.85 < ratio < 1.15  # the normal approximation


def test_one_value_and_equal_values():
    assert bootstrap_mean([0.7]) == (0.7, 0.0, 0.7, 0.7)
    np.testing.assert_allclose(bootstrap_mean([0.5, 0.5, 0.5]), (0.5, 0.0, 0.5, 0.5))


def test_curves_have_an_interval_at_each_point():
    curves = jnp.stack([VALUES, 2 * VALUES, jnp.full(4, 3.0)], axis=1)
    got = bootstrap_mean(curves)
    for i in range(3):
        expected = bootstrap_mean(curves[:, i])
        np.testing.assert_allclose([field[i] for field in got], expected)
    alone = bootstrap_mean(curves[:1])
    np.testing.assert_array_equal(alone.low, curves[0])
    np.testing.assert_array_equal(alone.std, np.zeros(3))


@pytest.mark.parametrize(
    "values, options, message",
    [
        ([], {}, r"values must hold at least one run, \(s, ...\), got shape \(0,\)"),
        (0.5, {}, r"values must hold at least one run"),
        ([1.0, math.nan], {}, "values must be a number"),
        ([1.0, math.inf], {}, "values must be finite"),
        ([1.0], {"confidence": 1.0}, "confidence must be < 1, got 1"),
        ([1.0], {"resamples": 0}, "resamples must be >= 1, got 0"),
        ([1.0], {"seed": -1}, "seed must be >= 0, got -1"),
    ],
)
def test_bad_input(values, options, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values, **options)
