"""Accuracy among the largest logits, and what noise takes of it: exact cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import dct, metrics


def test_correct_among_the_largest_is_a_rank():
    logits = jax.random.normal(jax.random.key(0), (40, 7))
    y = jax.random.randint(jax.random.key(1), (40,), 0, 7)
    rank = np.sum(np.asarray(logits) > np.asarray(logits)[np.arange(40), y][:, None], axis=1)
    for top in (1, 2, 5, 7):
        np.testing.assert_array_equal(metrics.correct(logits, y, top=top), rank < top)


def test_equal_logits_and_nan():
    logits = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [jnp.nan, 2.0, 1.0]])
    y = jnp.array([1, 2, 1])
    assert metrics.correct(logits, y).tolist() == [False, False, False]
    assert metrics.correct(logits, y, top=2).tolist() == [True, False, False]
    assert metrics.correct(logits, y, top=3).tolist() == [True, True, False]


def of_the_mean(x):
    mean = x.mean(axis=(1, 2, 3))
    return jnp.stack([0.5 - mean, mean - 0.5], axis=1)


def test_noise_in_other_bands_takes_nothing_from_a_model_of_the_mean():
    x = jax.random.uniform(jax.random.key(0), (32, 8, 8, 1))
    y = (x.mean(axis=(1, 2, 3)) > 0.5).astype(jnp.int32)
    masks = dct.dct_bands(8, 8, 4)
    keys = jax.random.split(jax.random.key(1), 3)
    noise = jnp.stack([
        jnp.stack([dct.band_noise(key, mask, 1, std=1.0) for key in keys]) for mask in masks
    ])  # fmt: skip
    drop = np.asarray(metrics.accuracy_drop(of_the_mean, x, y, noise))
    assert drop.shape == (32, 4)
    assert drop[:, 0].mean() > 0
    np.testing.assert_allclose(drop[:, 1:], 0, atol=1e-6)
    nothing = metrics.accuracy_drop(of_the_mean, x, y, 0 * noise)
    np.testing.assert_allclose(nothing, 0, atol=1e-6)


def test_drop_counts_flips_both_ways():
    """Constant shifts of +-1 of the mean: every example is right after one of the two."""
    x = jnp.array([0.1, 0.9, 0.4]).reshape(3, 1, 1, 1)
    y = jnp.array([0, 1, 1])  # the last is wrong as it is
    shifts = jnp.array([[1.0, 1.0], [-1.0, 0.0]]).reshape(2, 2, 1, 1, 1)
    drop = metrics.accuracy_drop(of_the_mean, x, y, shifts)
    np.testing.assert_allclose(drop, [[1, 0], [0, 0.5], [-1, 0]])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, y: metrics.correct(jnp.zeros((2, 3)), y, top=4), "top must be <= 3"),
        (lambda x, y: metrics.accuracy_drop(of_the_mean, x, y, x), "noise must have shape"),
        (lambda x, y: metrics.accuracy_drop(None, x, y, x[None]), "logits_fn"),
    ],
)
def test_bad_input(call, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 3, 3, 1)), jnp.zeros(2, jnp.int32))
