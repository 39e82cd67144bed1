"""Crops and flips against slicing in NumPy; independence of the batch split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import data, keys

X = jax.random.uniform(jax.random.key(0), (6, 5, 7, 2), minval=0.1)
KEYS = keys.per_example(jax.random.key(1), jnp.arange(6))


def windows(x, padding):
    """All crops of a zero-padded image, by slicing."""
    h, w, _ = x.shape
    padded = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    places = range(2 * padding + 1)
    return {(r, c): padded[r : r + h, c : c + w] for r in places for c in places}


def test_crop_without_padding_is_the_identity():
    np.testing.assert_array_equal(data.random_crop(KEYS[0], X[0], 0), X[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_crop_is_the_slice_at_the_drawn_offset(dtype):
    x = X[0].astype(dtype)
    crop = jax.jit(data.random_crop, static_argnums=2)
    for key in KEYS:
        row, column = jax.random.randint(key, (2,), 0, 5)
        got = crop(key, x, 2)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, windows(np.asarray(x), 2)[int(row), int(column)])


def test_every_offset_is_drawn_equally_often():
    padding, draws = 1, 9000
    x = X[0, :, :, :1]
    crops = jax.jit(jax.vmap(lambda key: data.random_crop(key, x, padding)))(
        jax.random.split(jax.random.key(2), draws)
    )
    counts = [
        int((np.asarray(crops) == window).all(axis=(1, 2, 3)).sum())
        for window in windows(np.asarray(x), padding).values()
    ]
    assert sum(counts) == draws
    # each count is binomial(9000, 1/9): five standard deviations are 149
    assert np.abs(np.array(counts) - draws / 9).max() < 149


def test_flip_twice_with_the_same_key_is_the_identity_and_half_of_the_keys_flip():
    many = jax.random.split(jax.random.key(3), 1000)
    flip = jax.jit(jax.vmap(data.random_flip, in_axes=(0, None)))
    once = np.asarray(flip(many, X[0]))
    flipped = (once == np.asarray(X[0, :, ::-1])).all(axis=(1, 2, 3))
    kept = (once == np.asarray(X[0])).all(axis=(1, 2, 3))
    assert (flipped ^ kept).all()
    assert 420 < flipped.sum() < 580  # five standard deviations of binomial(1000, 1/2)
    np.testing.assert_array_equal(data.random_flip(KEYS[0], data.random_flip(KEYS[0], X[0])), X[0])


def test_crop_and_flip_is_a_crop_then_perhaps_a_flip():
    got = np.asarray(jax.jit(data.crop_and_flip(padding=1))(KEYS, X))
    for image, x in zip(got, np.asarray(X), strict=True):
        outcomes = [v for w in windows(x, 1).values() for v in (w, w[:, ::-1])]
        assert any(np.array_equal(image, outcome) for outcome in outcomes)


@pytest.mark.parametrize("augment", [data.crop_and_flip(), data.identity])
def test_an_example_does_not_depend_on_its_batch(augment):
    whole = jax.jit(augment)(KEYS, X)
    order = jnp.array([4, 0, 5, 2, 3, 1])
    np.testing.assert_array_equal(jax.jit(augment)(KEYS[order], X[order]), whole[order])
    parts = [jax.jit(augment)(KEYS[i : i + 2], X[i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_array_equal(jnp.concatenate(parts), whole)


def test_identity_is_the_identity():
    assert data.identity(KEYS, X) is X


def test_padding_must_be_a_non_negative_integer(plain_calls):
    with pytest.raises(ValueError, match="padding must be >= 0, got -1"):
        data.crop_and_flip(-1)
    with pytest.raises(ValueError, match=r"padding must be an integer, got 1.5"):
        data.random_crop(KEYS[0], X[0], 1.5)
