"""Random search against its rate, and the moments of square updates by enumeration."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.theory import (
    correlation_bounds,
    gradient_norm_bound,
    multiple_constants,
    random_search,
    sample_multiple,
    sample_single,
    sample_sphere,
    sphere_constants,
)

EPS = 0.1


@functools.cache
def draws(sample, count=400, **options):
    sampler = jax.jit(jax.vmap(lambda key: sample(key, (6, 6, 2), 2, EPS, **options)))
    return np.asarray(sampler(jax.random.split(jax.random.key(0), count)))


def sign_sums(a):
    """``E |sum_i s_i a_i|`` over all independent signs."""
    signs = np.array(list(itertools.product((-1, 1), repeat=len(a))))
    return np.abs(signs @ a).mean()


def wrapped_windows(v, side):
    """The entries of ``v (h, w)`` under every wrapped window."""
    h, w = v.shape
    rows, columns = np.arange(side)[:, None], np.arange(side)
    return [v[(r + rows) % h, (c + columns) % w] for r in range(h) for c in range(w)]


def test_second_moment_of_multiple_is_exact():
    delta = draws(sample_multiple)
    assert np.allclose((delta**2).sum((1, 2, 3)), 4 * 2 * EPS**2 * 4, rtol=1e-5)
    assert np.allclose(np.abs(delta[delta != 0]), 2 * EPS)
    constants = multiple_constants((6, 6, 2), 2)
    assert np.isclose(constants.moment * EPS**2, 4 * 2 * EPS**2 * 4)
    assert len({tuple(d.any(-1).ravel()) for d in delta}) == 36  # every wrapped window
    assert abs(delta.mean()) < 5 * delta.std() / math.sqrt(delta.size)


@pytest.mark.parametrize(("windows", "count"), [("inside", 25), ("wrapped", 36), ("tiles", 9)])
def test_single_has_one_sign_per_channel(windows, count):
    delta = draws(sample_single, windows=windows)
    masks = {tuple((d != 0).any(-1).ravel()) for d in delta}
    assert len(masks) == count
    for channel in (0, 1):
        sums = np.abs(delta[..., channel].sum((1, 2)))
        assert np.allclose(sums, 4 * 2 * EPS, rtol=1e-5)
    assert len({tuple(np.sign(d.sum((0, 1)))) for d in delta}) == 4


@pytest.mark.parametrize("side", [2, 3])
def test_khintchine_bounds_by_enumeration(side):
    rng = np.random.default_rng(0)
    for v in (rng.normal(size=(6, 6)), np.eye(6), np.ones((6, 6)), np.outer(np.arange(6), [1] * 6)):
        mean = np.mean([2 * EPS * sign_sums(a.ravel()) for a in wrapped_windows(v, side)])
        low, high = correlation_bounds(jnp.asarray(v, jnp.float32)[..., None], side, EPS)
        assert low <= mean * (1 + 1e-6)
        assert mean <= high * (1 + 1e-6)
        constants = multiple_constants((6, 6, 1), side)
        assert np.isclose(low, constants.correlation * EPS * np.linalg.norm(v))


def test_monte_carlo_agrees_with_the_bounds_for_two_channels():
    v = np.random.default_rng(1).normal(size=(6, 6, 2)).astype(np.float32)
    correlation = np.abs((draws(sample_multiple, 4000) * v).sum((1, 2, 3)))
    low, high = correlation_bounds(jnp.asarray(v), 2, EPS)
    error = 4 * correlation.std() / math.sqrt(4000)
    assert low < correlation.mean() - error
    assert correlation.mean() + error < high


def test_single_misses_a_direction():
    """Alternating signs cancel in every 2 x 2 window; those of the printed ``(-1)^(kl)`` do not."""
    k, m = np.ogrid[:6, :6]
    delta = draws(sample_single)
    for v, sums in (((-1.0) ** (k + m), {0.0}), ((-1.0) ** (m + 0 * k), {0.0})):
        assert {float(np.sum(a)) for a in wrapped_windows(v, 2)} == sums
        assert np.allclose((delta * v[..., None]).sum((1, 2)), 0, atol=1e-6)
        multiple = (draws(sample_multiple) * v[..., None]).sum((1, 2, 3))
        assert np.abs(multiple).mean() > 0.1
    printed = (-1.0) ** (k * m)
    assert {abs(float(np.sum(a))) for a in wrapped_windows(printed, 2)} == {2.0}


def test_block_constant_directions():
    rng = np.random.default_rng(3)
    blocks = rng.choice([-1.0, 1.0], size=(3, 3))
    v = np.kron(blocks, np.ones((2, 2))) * rng.uniform(0.1, 1, size=(6, 6))
    tiles = [v[i : i + 2, j : j + 2] for i in (0, 2, 4) for j in (0, 2, 4)]
    single = np.mean([abs(2 * EPS * a.sum()) for a in tiles])
    assert np.isclose(single, 2 * EPS * 4 / 36 * np.abs(v).sum())  # exact
    delta = draws(sample_single, 3000, windows="tiles")[..., 0]
    drawn = np.abs((delta * v).sum((1, 2)))
    assert abs(drawn.mean() - single) < 4 * drawn.std() / math.sqrt(3000)
    # One block of ones: a single sign correlates more, by a factor of order side.
    one = np.zeros((6, 6))
    one[:2, :2] = 1
    in_tiles = [one[i : i + 2, j : j + 2] for i in (0, 2, 4) for j in (0, 2, 4)]
    multiple = 9 * np.mean([2 * EPS * sign_sums(a.ravel()) for a in in_tiles])
    assert np.isclose(9 * np.mean([abs(2 * EPS * a.sum()) for a in in_tiles]), 2 * EPS * 4)
    assert math.sqrt(2) * EPS * 2 <= multiple <= 2 * EPS * 2


def test_constants_of_the_sphere():
    assert np.isclose(sphere_constants(1).correlation, 1)
    assert np.isclose(sphere_constants(2).correlation, 2 / math.pi)
    assert np.isclose(sphere_constants(3).correlation, 1 / 2)
    keys = jax.random.split(jax.random.key(1), 20_000)
    u = np.asarray(jax.jit(jax.vmap(lambda k: sample_sphere(k, (5,), 2.0)))(keys))
    assert np.allclose(np.linalg.norm(u, axis=1), 2, rtol=1e-5)
    error = 4 * np.abs(u[:, 0]).std() / math.sqrt(20_000)
    assert abs(np.abs(u[:, 0]).mean() - 2 * sphere_constants(5).correlation) < error


@pytest.mark.parametrize("gamma", [1.0, 4.0])
@pytest.mark.parametrize("steps", [30, 300])
def test_rate_on_quadratics(gamma, steps):
    """Proposition 3.5.1, with expectations over 200 runs."""
    d = 6
    a = np.diag(np.linspace(0.2, 2.0, d)).astype(np.float32)
    x = np.linspace(-1, 1, d).astype(np.float32)

    def g(x):
        return 0.5 * x @ a @ x

    def run(key):
        def sample(key, t):
            return sample_sphere(key, (d,), gamma / math.sqrt(steps))

        return random_search(g, sample, key, jnp.asarray(x), steps=steps + 1)

    runs = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 200))
    values, points = np.asarray(runs.value), np.asarray(runs.x)
    assert points.shape == (200, steps + 2, d)
    assert (np.diff(values, axis=1) <= 0).all()
    assert np.allclose(values, 0.5 * np.einsum("...i,ij,...j", points, a, points), atol=1e-5)
    gradient = np.linalg.norm(points @ a, axis=-1).mean(0)[:-1]
    gap = values[:, 0].mean() - values[:, -1].mean()
    bound = gradient_norm_bound(
        sphere_constants(d), gamma=gamma, steps=steps, gap=float(gap), smoothness=2.0
    )
    assert gap > 0
    assert gradient.min() <= bound


def test_bad_arguments(plain_calls):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="side must be <= 6, got 7"):
        sample_single(key, (6, 6, 1), 7, EPS)
    with pytest.raises(ValueError, match="windows must be one of"):
        sample_multiple(key, (6, 6, 1), 2, EPS, windows="anywhere")
    with pytest.raises(ValueError, match="must be divisible by side"):
        sample_single(key, (6, 6, 1), 4, EPS, windows="tiles")
    with pytest.raises(ValueError, match=r"shape must be that of an image \(h, w, c\)"):
        sample_single(key, (6, 6), 4, EPS)
    with pytest.raises(ValueError, match="steps must be >= 1"):
        random_search(jnp.sum, lambda key, t: 0, key, jnp.zeros(2), steps=0)
    with pytest.raises(ValueError, match="gamma must be > 0"):
        gradient_norm_bound(sphere_constants(2), gamma=0, steps=3, gap=1.0, smoothness=1.0)
    with pytest.raises(ValueError, match="dimension must be >= 1"):
        sphere_constants(0)
