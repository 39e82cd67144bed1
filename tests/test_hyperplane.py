"""Projections on a hyperplane within a box, against solvers and exact enumeration."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from robustjax import hyperplane
from robustjax.norms import L1, L2, LInf, Lp

NORMS = (LInf(), L2(), L1())
ROWS, D = 24, 5
displacement = jax.jit(hyperplane.displacement, static_argnums=0)
project = jax.jit(hyperplane.project, static_argnums=0)


def solve_linf(w, gap, lower, upper):
    """min t, -t <= d_i <= t, by linear programming."""
    d = len(w)
    ones = np.ones((d, 1))
    result = linprog(
        np.r_[np.zeros(d), 1],
        A_ub=np.block([[np.eye(d), -ones], [-np.eye(d), -ones]]),
        b_ub=np.zeros(2 * d),
        A_eq=[np.r_[w, 0]],
        b_eq=[gap],
        bounds=[*zip(lower, upper, strict=True), (0, None)],
    )
    return result.fun if result.status == 0 else None


def solve_l1(w, gap, lower, upper):
    """min sum p_i + q_i with d = p - q, by linear programming."""
    result = linprog(
        np.ones(2 * len(w)),
        A_eq=[np.r_[w, -w]],
        b_eq=[gap],
        bounds=[(0, u) for u in upper] + [(0, -v) for v in lower],
    )
    return result.fun if result.status == 0 else None


def solve_l2(w, gap, lower, upper):
    """Every active set of the box in turn; the best feasible stationary point."""
    best = None
    for sides in itertools.product((None, 0, 1), repeat=len(w)):
        free = np.array([s is None for s in sides])
        d = np.array([0 if s is None else (lower, upper)[s][i] for i, s in enumerate(sides)])
        rest = gap - w @ d
        norm2 = (w[free] ** 2).sum()
        if norm2 == 0 and abs(rest) > 1e-12:
            continue
        if norm2 > 0:
            d = d + np.where(free, w * rest / norm2, 0)
        inside = (d >= lower - 1e-12).all() and (d <= upper + 1e-12).all()
        if inside and (best is None or np.linalg.norm(d) < best):
            best = np.linalg.norm(d)
    return best


SOLVERS = {"linf": solve_linf, "l2": solve_l2, "l1": solve_l1}


def problems(seed, reach):
    """Random boxes around 0 with gaps up to ``reach`` times what the box allows."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(ROWS, D)) * rng.choice([0, 0.1, 1, 1], size=(ROWS, D))
    w[:, 0] += 0.3
    w[::4, 2] = w[::4, 1]  # ties
    lower = -rng.uniform(0, 1, (ROWS, D)) * rng.choice([0, 1, 1], size=(ROWS, D))
    upper = rng.uniform(0, 1, (ROWS, D))
    most = np.maximum(w * lower, w * upper).sum(1)
    least = np.minimum(w * lower, w * upper).sum(1)
    share = rng.uniform(0, reach, ROWS)
    gap = share * np.where(rng.random(ROWS) < 0.5, most, least)
    single = [v.astype(np.float32) for v in (w, gap, lower, upper)]
    return single, share


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
@pytest.mark.parametrize("seed", range(3))
def test_the_solution_is_as_short_as_the_solvers_and_feasible(norm, seed):
    (w, gap, lower, upper), _ = problems(seed, 0.95)
    d = np.asarray(displacement(norm, w, gap, lower, upper), np.float64)
    np.testing.assert_allclose((w * d).sum(1), gap, atol=1e-6)
    assert (d >= lower - 1e-7).all() and (d <= upper + 1e-7).all()
    lengths = np.asarray(norm.value(jnp.asarray(d), batch_ndim=1))
    wide = [v.astype(np.float64) for v in (w, gap, lower, upper)]
    exact = [SOLVERS[norm.name](*row) for row in zip(*wide, strict=True)]
    np.testing.assert_allclose(lengths, exact, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_a_hyperplane_out_of_reach_gives_the_corner_nearest_to_it(norm):
    (w, gap, lower, upper), share = problems(3, 2)
    gap = gap * (1.01 + share) / share
    kept = np.abs(gap) > 1e-3
    d = np.asarray(displacement(norm, w, gap, lower, upper))
    corner = np.where(w * gap[:, None] > 0, upper, lower)
    expected = np.where(w == 0, 0, corner)
    assert kept.sum() > ROWS // 2
    np.testing.assert_array_equal(d[kept], expected[kept])


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_a_gap_of_exactly_what_the_box_allows(norm):
    w = full([1.0, -2.0, 0.5, 0.0, 0.25])
    d = displacement(norm, w, jnp.full(ROWS, 1.875), full(-0.5), full(0.5))
    np.testing.assert_array_equal(d, full([0.5, -0.5, 0.5, 0.0, 0.5]))


def full(value):
    """Of one shape with the random problems, so that one program serves the tests."""
    return jnp.broadcast_to(jnp.asarray(value, jnp.float32), (ROWS, D))


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_without_a_box_the_closed_forms_come_out_to_the_last_bit(norm):
    w = jax.random.normal(jax.random.key(0), (ROWS, D))
    gap = jnp.linspace(-2, 3, ROWS)[:, None]
    size = jnp.abs(w)
    peaks = jax.nn.one_hot(jnp.argmax(size, axis=1), D)
    closed = {
        "linf": gap / size.sum(1, keepdims=True) * jnp.sign(w),
        "l2": gap / jnp.square(w).sum(1, keepdims=True) * w,
        "l1": gap / size.max(1, keepdims=True) * jnp.sign(w) * peaks,
    }
    d = displacement(norm, w, gap[:, 0], full(-jnp.inf), full(jnp.inf))
    np.testing.assert_array_equal(d, closed[norm.name])
    np.testing.assert_array_equal(d, displacement(norm, w, gap[:, 0], full(-100), full(100)))


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_powers_of_two_change_no_bit(norm):
    (w, gap, lower, upper), _ = problems(4, 1.2)
    once = displacement(norm, w, gap, lower, upper)
    for power in (-90, -20, 7, 60):
        scaled = displacement(norm, w * 2.0**power, gap * 2.0**power, lower, upper)
        np.testing.assert_array_equal(once, scaled)


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
@pytest.mark.parametrize("normal", [0.0, math.nan, math.inf])
def test_no_normal_no_displacement(norm, normal):
    w, gap = full(1.0).at[1].set(normal), jnp.zeros(ROWS).at[1].set(1.0)
    d = displacement(norm, w, gap, full(-1.0), full(1.0))
    np.testing.assert_array_equal(d, full(0.0))


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_rows_do_not_depend_on_each_other(norm):
    (w, gap, lower, upper), _ = problems(5, 1.2)
    together = displacement(norm, w, gap, lower, upper)
    for i in (0, 7, ROWS - 1):
        alone = [np.repeat(v[i : i + 1], ROWS, axis=0) for v in (w, gap, lower, upper)]
        np.testing.assert_array_equal(displacement(norm, *alone)[i], together[i])


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_project_reaches_the_hyperplane_inside_the_box(norm, dtype):
    lower, upper = jnp.array([0.0, 0.125, 0.25]), jnp.array([1.0, 0.875, 0.75])  # of channels
    x = jax.random.uniform(jax.random.key(1), (16, 4, 4, 3))
    x = jnp.clip(x, lower, upper).astype(dtype)
    w = jax.random.normal(jax.random.key(2), x.shape).astype(dtype)
    value = jnp.sum(x.astype(jnp.float32) * w.astype(jnp.float32), axis=(1, 2, 3))
    b = value + jnp.linspace(-3, 3, 16)
    u = project(norm, x, w, b, lower, upper)
    assert u.dtype == dtype and u.shape == x.shape
    assert bool(jnp.all((u >= lower) & (u <= upper)))
    reached = jnp.sum(u.astype(jnp.float32) * w.astype(jnp.float32), axis=(1, 2, 3))
    np.testing.assert_allclose(reached, b, atol=1e-5 if dtype == jnp.float32 else 0.1)


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_many_coordinates_of_very_different_size(norm):
    rng = np.random.default_rng(6)
    w = (rng.normal(size=(20, 3000)) * 10.0 ** rng.uniform(-8, 0, (20, 3000))).astype(np.float32)
    room = (10.0 ** rng.uniform(-6, 0, (20, 3000))).astype(np.float32)
    most = (np.abs(w).astype(np.float64) * room).sum(1)
    gap = (most * np.linspace(0.01, 0.99, 20)).astype(np.float32)
    d = np.asarray(displacement(norm, w, gap, -room, room), np.float64)
    np.testing.assert_allclose((w * d).sum(1), gap, rtol=3e-6)
    assert (np.abs(d) <= room).all()


@pytest.mark.parametrize("args", [(Lp(3), 1.0), ("l3", 1.0), (L2(), jnp.zeros(5))])
def test_bad_input(args, plain_calls):
    norm, gap = args
    with pytest.raises(ValueError, match=r"norm must be one of|gap must be one number"):
        hyperplane.displacement(norm, jnp.ones((2, 3)), gap)


def test_project_wants_a_normal_per_point(plain_calls):
    with pytest.raises(ValueError, match="w must have the shape of x"):
        hyperplane.project(L2(), jnp.ones((2, 3)), jnp.ones((2, 4)), 0.0)
