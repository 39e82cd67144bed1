"""How many windows a support can hold: brute force over all shapes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.theory import count_windows, max_windows, mean_response


def windows(cells, s):
    return sum(all((i + a, j + b) in cells for a in range(s) for b in range(s)) for i, j in cells)


def normal_form(cells):
    top, left = min(i for i, _ in cells), min(j for _, j in cells)
    return frozenset((i - top, j - left) for i, j in cells)


@functools.cache
def polyominoes(k):
    """All of k connected cells, up to translation."""
    if k == 1:
        return {frozenset({(0, 0)})}
    grown = set()
    for cells in polyominoes(k - 1):
        for i, j in cells:
            for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if cell not in cells:
                    grown.add(normal_form(cells | {cell}))
    return grown


def partitions(k, largest):
    if k == 0:
        yield ()
    for first in range(min(k, largest), 0, -1):
        for rest in partitions(k - first, first):
            yield (first, *rest)


@pytest.mark.parametrize("k", range(4, 9))
def test_max_windows_over_all_polyominoes(k):
    assert max(windows(cells, 2) for cells in polyominoes(k)) == max_windows(k, 2)


@pytest.mark.parametrize("s", [2, 3, 4])
def test_max_windows_over_all_staircases(s):
    for k in range(s * s, 23):
        # In a staircase with rows of falling lengths, the last row of a window decides.
        best = max(
            sum(max(length - s + 1, 0) for length in rows[s - 1 :]) for rows in partitions(k, k)
        )
        assert max_windows(k, s) == best


def test_max_windows_examples():
    found = {k: max_windows(k, 2) for k in (*range(4, 13), 15)}
    expected = dict(zip(range(4, 13), (1, 1, 2, 2, 3, 4, 4, 5, 6), strict=True)) | {15: 8}
    assert found == expected
    for side, s in itertools.product(range(2, 8), (2, 3)):
        if side >= s:
            assert max_windows(side**2, s) == (side - s + 1) ** 2


@pytest.mark.parametrize("s", [1, 2, 3])
def test_count_windows(s):
    rng = np.random.default_rng(0)
    count = jax.jit(lambda mask: count_windows(mask, s))
    for density in (0.5, 0.8, 1.0):
        mask = rng.random((7, 9)) < density
        cells = {tuple(cell) for cell in np.argwhere(mask)}
        assert count(mask) == windows(cells, s)


def support(height, width):
    mask = np.zeros((16, 16), bool)
    mask[:height, :width] = True
    return np.roll(mask, (4, 2), (0, 1)) if width < 13 else mask


def test_mean_response_by_hand():
    filters = np.random.default_rng(1).normal(size=(3, 3, 1, 5)).astype(np.float32)
    mask = support(4, 6)
    response = mean_response(jax.random.key(0), jnp.asarray(mask), jnp.asarray(filters), 0.5)
    padded = np.pad(mask.astype(float), 1)
    largest = np.zeros(5)
    for i, j in np.ndindex(16, 16):
        value = (padded[i : i + 3, j : j + 3, None] * filters[:, :, 0]).sum((0, 1))
        largest = np.maximum(largest, 0.5 * np.abs(value))
    assert np.isclose(response, largest.mean(), rtol=1e-5)


def test_squares_excite_most():
    rng = np.random.default_rng(2)
    filters = jnp.asarray(rng.normal(size=(3, 3, 3, 2000)), jnp.float32)
    scattered = np.zeros(256, bool)
    scattered[rng.permutation(256)[:16]] = True
    respond = jax.jit(lambda mask: mean_response(jax.random.key(0), mask, filters))
    square, bar, pixels = (
        float(respond(mask)) for mask in (support(4, 4), support(2, 8), scattered.reshape(16, 16))
    )
    assert square > bar > pixels


def test_bad_arguments(plain_calls):
    with pytest.raises(ValueError, match="k must be >= 9, got 8"):
        max_windows(8, 3)
    with pytest.raises(ValueError, match="s must be >= 2"):
        max_windows(8, 1)
