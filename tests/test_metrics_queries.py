"""Query statistics against numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.metrics.queries import common_query_statistics, query_statistics, success_curve

QUERIES = jnp.array([1, 7, 100, 0, 3, 100])
SUCCESS = jnp.array([True, True, False, True, True, False])
CORRECT = jnp.array([True, True, True, False, True, True])


def test_statistics_by_hand():
    stats = jax.jit(query_statistics)(QUERIES, SUCCESS, CORRECT)
    assert stats.points == 5
    assert stats.successes == 3
    assert np.isclose(stats.success_rate, 3 / 5)
    assert np.isclose(stats.failure_rate, 2 / 5)
    assert np.isclose(stats.mean, 11 / 3)
    assert stats.median == 3
    everything = query_statistics(QUERIES, SUCCESS)
    assert everything.points == 6
    assert np.isclose(everything.mean, 11 / 4)
    assert everything.median == 2  # of 0, 1, 3, 7


def test_no_success_has_no_average():
    stats = query_statistics(QUERIES, jnp.zeros(6, bool), CORRECT)
    assert stats.failure_rate == 1
    assert np.isnan(stats.mean)
    assert np.isnan(stats.median)


def test_several_attacks_and_their_common_successes():
    queries = jnp.stack([QUERIES, jnp.array([5, 1, 9, 0, 50, 100])])
    success = jnp.stack([SUCCESS, jnp.array([True, False, True, True, True, False])])
    stats = query_statistics(queries, success, CORRECT)
    for i in range(2):
        alone = query_statistics(queries[i], success[i], CORRECT)
        assert all(a[i] == b for a, b in zip(stats, alone, strict=True))
    common = common_query_statistics(queries, success, CORRECT)
    assert list(common.successes) == [2, 2]  # the first and the fifth point
    assert np.allclose(common.success_rate, 2 / 5)
    assert list(common.mean) == [2, 27.5]
    assert list(common.median) == [2, 27.5]


def test_success_curve():
    budgets = jnp.array([0, 1, 2, 3, 6, 7, 1000])
    curve = success_curve(QUERIES, SUCCESS, budgets, CORRECT)
    assert np.allclose(curve, np.array([0, 1, 1, 2, 2, 3, 3]) / 5)
    two = success_curve(jnp.stack([QUERIES] * 2), jnp.stack([SUCCESS, ~SUCCESS]), budgets, CORRECT)
    assert np.allclose(two[0], curve)
    assert np.allclose(two[1], np.array([0, 0, 0, 0, 0, 0, 2]) / 5)
    assert curve[-1] == query_statistics(QUERIES, SUCCESS, CORRECT).success_rate


def test_bad_inputs(plain_calls):
    with pytest.raises(ValueError, match="success must have the shape of queries"):
        query_statistics(QUERIES, SUCCESS[:3])
    with pytest.raises(ValueError, match="correct must have one entry per example"):
        query_statistics(QUERIES, SUCCESS, CORRECT[:3])
    with pytest.raises(ValueError, match=r"queries must have shape \(n,\)"):
        query_statistics(jnp.zeros((0,), int), jnp.zeros((0,), bool))
    with pytest.raises(ValueError, match="attacks must be stacked"):
        common_query_statistics(QUERIES, SUCCESS)
    with pytest.raises(ValueError, match="budgets must be integers"):
        success_curve(QUERIES, SUCCESS, jnp.array([0.5]))
