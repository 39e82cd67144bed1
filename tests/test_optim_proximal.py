"""Proximal gradient descent and FISTA against closed forms, and preconditioning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax.fourier_norms import FourierL1, FourierLInf
from robustjax.norms import L1, L2, LInf
from robustjax.optim import (
    ball_constraint,
    fista,
    fista_params,
    norm_penalty,
    proximal_gradient,
    scale_by_preconditioner,
    scale_by_steepest,
    squared_norm_penalty,
    steepest_descent,
)

NORMS = [LInf(), L2(), L1(), FourierL1(), FourierLInf()]

# Tiny programs: what takes time is compiling them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
every_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)

RNG = np.random.default_rng(0)
TARGET = RNG.normal(size=8)
DESIGN = RNG.normal(size=(12, 8))
Z = RNG.normal(size=(5, 8)) * np.sign(RNG.normal(size=8))


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def quadratic(w):
    """Half the squared distance to the target: ``f + h`` is least at ``prox(target, 1)``."""
    return jnp.sum((w - TARGET) ** 2) / 2


def least_squares(w):
    return jnp.sum((DESIGN @ w - DESIGN @ TARGET - 1) ** 2) / 2


def logistic(w):
    return jax.nn.softplus(-Z @ w).mean()


def run(transform, f, steps, start=None):
    """Results after every step: ``x_k`` of FISTA, the parameters of proximal gradient descent."""

    def step(carry, _):
        params, state = carry
        value, g = jax.value_and_grad(f)(params)
        updates, state = transform.update(g, state, params, value=value, value_fn=f)
        params = optax.apply_updates(params, updates)
        result = fista_params(state) if hasattr(state, "momentum") else params
        return (params, state), (result, state.step_size)

    start = jnp.zeros(8) if start is None else start
    return jit(lambda w: jax.lax.scan(step, (w, transform.init(w)), length=steps)[1])(start)


@every_norm
def test_one_step_on_an_orthogonal_design_is_the_prox(norm):
    prox = norm_penalty(norm, 0.4)
    expected = norm.prox(jnp.asarray(TARGET), 0.4)
    for transform in (proximal_gradient(prox, 1.0), fista(prox, 1.0)):
        w = jnp.zeros(8)
        state = transform.init(w)
        for _ in range(3):
            updates, state = transform.update(w - TARGET, state, w)
            w = w + updates
            np.testing.assert_allclose(w, expected, atol=1e-12)
    np.testing.assert_allclose(fista_params(state), expected, atol=1e-12)
    if norm == L1():
        soft = np.sign(TARGET) * np.maximum(np.abs(TARGET) - 0.4, 0)
        np.testing.assert_allclose(expected, soft, atol=1e-12)
        assert np.array_equal(w == 0, soft == 0) and (soft == 0).any()


@every_norm
def test_penalties_constraints_and_the_identity_of_moreau(norm):
    t, v = 0.7, jnp.asarray(TARGET)
    dual = ball_constraint(norm.dual, t)(v, 1.0)
    penalty = norm_penalty(norm, 1.0)(v, t)
    np.testing.assert_allclose(penalty + dual, v, atol=1e-9)
    np.testing.assert_allclose(norm_penalty(norm, 2.0)(v, t / 2), penalty, atol=1e-12)
    transform = proximal_gradient(ball_constraint(norm, 0.5), 1.0)
    change, _ = transform.update(-v, transform.init(v), 0 * v)
    np.testing.assert_allclose(change, norm.project(v, 0.5), atol=1e-12)
    squared = squared_norm_penalty(norm, 0.5)(v, 2.0)
    np.testing.assert_allclose(squared, norm.prox_squared(v, 1.0), atol=1e-12)
    # Its optimality: the rest is the value times the steepest direction of the dual norm.
    value = float(norm.value(squared))
    assert float(norm.dual.value(v - squared)) == pytest.approx(value, rel=1e-6)
    assert squared @ (v - squared) == pytest.approx(value**2, rel=1e-6)


@pytest.mark.parametrize("norm", [LInf(), L1()], ids=lambda norm: norm.name)
def test_rates_on_a_quadratic(norm):
    smooth = np.linalg.norm(DESIGN, 2) ** 2
    prox = norm_penalty(norm, 3.0)

    def total(w):
        return least_squares(w) + 3 * norm.value(w)

    plain, _ = run(proximal_gradient(prox, 1 / smooth), least_squares, 400)
    fast, _ = run(fista(prox, 1 / smooth), least_squares, 400)
    plain, best = jax.vmap(total)(plain), fast[-1]
    fast = jax.vmap(total)(fast)
    assert (np.diff(plain) <= 1e-9).all()
    assert fast[-1] == pytest.approx(float(plain[-1]), rel=1e-5)
    k, distance = np.arange(1, 101), float(best @ best)
    least = min(fast.min(), plain.min())
    assert (plain[:100] - least <= smooth * distance / (2 * k) + 1e-9).all()
    assert (fast[:100] - least <= 2 * smooth * distance / (k + 1) ** 2 + 1e-9).all()
    # Optimality: minus the gradient is the coefficient times a subgradient of the norm.
    pull = -jax.grad(least_squares)(best)
    assert float(norm.dual.value(pull)) <= 3 + 1e-4
    assert pull @ best == pytest.approx(3 * float(norm.value(best)), rel=1e-5)


def test_fista_is_the_published_recursion():
    step, x, y, t = 0.02, np.zeros(8), np.zeros(8), 1.0
    results, _ = run(fista(norm_penalty(L1(), 3.0), step), least_squares, 6)
    for result in results:
        v = y - step * DESIGN.T @ (DESIGN @ y - DESIGN @ TARGET - 1)
        new = np.sign(v) * np.maximum(np.abs(v) - 3 * step, 0)
        ahead = (1 + np.sqrt(1 + 4 * t**2)) / 2
        y, x, t = new + (t - 1) / ahead * (new - x), new, ahead
        np.testing.assert_allclose(result, x, atol=1e-12)


@pytest.mark.parametrize("make", [proximal_gradient, fista])
def test_line_search(make):
    prox = norm_penalty(L1(), 3.0)
    smooth = np.linalg.norm(DESIGN, 2) ** 2
    results, sizes = run(make(prox, 64.0, max_halvings=20), least_squares, 300)
    assert (np.diff(sizes) <= 0).all() and 1 / (2 * smooth) <= sizes[-1] < 64
    fixed, _ = run(make(prox, 1 / smooth), least_squares, 3000)
    np.testing.assert_allclose(results[-1], fixed[-1], atol=1e-6)
    # The first search by hand: from 0 the point is the soft threshold of -s g.
    g, size = np.asarray(jax.grad(least_squares)(jnp.zeros(8))), 64.0
    while True:
        x = -np.sign(g) * np.maximum(np.abs(size * g) - 3 * size, 0)
        if least_squares(x) <= least_squares(0 * x) + g @ x + x @ x / (2 * size):
            break
        size /= 2
    assert sizes[0] == size
    _, sizes = run(make(prox, 64.0, max_halvings=2), least_squares, 1)
    assert sizes[0] == 16


def test_searches_that_begin_high_again_follow_a_flattening_loss():
    prox = norm_penalty(L2(), 1e-5)
    for factor in (1.0, np.inf):
        transform = proximal_gradient(prox, 1000.0, max_halvings=20, increase_factor=factor)
        results, sizes = run(transform, logistic, 60, start=jnp.zeros(8))
        values = jax.vmap(lambda w: logistic(w) + 1e-5 * L2().value(w))(results)
        assert (np.diff(values) <= 1e-12).all()
        if factor == 1:
            assert (np.diff(sizes) <= 0).all()
            slow = values[-1]
    assert sizes.max() > 100 and values[-1] < slow


@every_norm
def test_the_penalty_that_leaves_nothing_and_the_path_below_it(norm):
    threshold = float(norm.dual.value(jnp.asarray(Z.mean(0)))) / 2
    coefficients = threshold * jnp.array([1.01, 0.9, 0.3, 0.1])
    step = 4 / np.linalg.norm(Z, 2) ** 2 * len(Z)

    def solve(coefficient):
        return run(fista(norm_penalty(norm, coefficient), step), logistic, 1500)[0][-1]

    w = jax.vmap(solve)(coefficients)
    lengths = norm.value(w, batch_ndim=1)
    assert lengths[0] < 1e-12 and (np.diff(lengths) > 0).all()
    pull = -jax.vmap(jax.grad(logistic))(w)
    assert (norm.dual.value(pull, batch_ndim=1) <= coefficients * (1 + 1e-4)).all()
    np.testing.assert_allclose(jnp.sum(pull * w, 1), coefficients * lengths, rtol=1e-4, atol=1e-12)


def test_trees_dtypes_and_vmap():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    g = jax.tree.map(lambda w: 0.5 * w, params)
    for make in (proximal_gradient, fista):
        transform = make(norm_penalty(L1(), 1.0), jnp.float32(0.1))
        state = transform.init(params)
        updates, state = jax.jit(transform.update)(g, state, params)
        assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
        np.testing.assert_allclose(updates["b"], -0.15, rtol=1e-5)
        assert state.step_size.dtype == jnp.float32

    def final(coefficient):
        return run(fista(norm_penalty(L1(), coefficient), 1.0), quadratic, 2)[0][-1]

    coefficients = jnp.array([0.1, 0.5])
    expected = [L1().prox(jnp.asarray(TARGET), t) for t in coefficients]
    np.testing.assert_allclose(jax.vmap(final)(coefficients), expected, atol=1e-12)


# Steepest descent beyond the norms of the steepest tests.


def test_fourier_coordinate_descent_moves_one_frequency():
    g = RNG.normal(size=7)
    transform = steepest_descent(FourierL1(), 1.0, scale_by_dual_norm=True)
    updates, _ = transform.update(jnp.asarray(g), transform.init(g))
    spectrum = np.fft.fft(g, norm="ortho")
    k = int(np.argmax(np.abs(spectrum)))
    expected = np.zeros(7, complex)
    expected[k] -= spectrum[k] / 2
    expected[-k % 7] -= np.conj(spectrum[k]) / 2
    np.testing.assert_allclose(np.fft.fft(updates, norm="ortho"), expected, atol=1e-12)
    peak = np.abs(spectrum[k])
    assert g @ updates == pytest.approx(-(peak**2))
    assert np.abs(np.fft.fft(updates, norm="ortho")).sum() == pytest.approx(peak)


def test_preconditioned_steps():
    g = jnp.array(RNG.normal(size=3))
    a = RNG.normal(size=(3, 3))
    p = jnp.array(a @ a.T + np.eye(3))
    tree = {"a": g[:1], "b": g[1:]}
    for matrix, factor in ((p, p), (jnp.diagonal(p), jnp.diag(jnp.diagonal(p)))):
        step, _ = scale_by_preconditioner(matrix).update(tree, optax.EmptyState())
        flat = np.concatenate([step["a"], step["b"]])
        np.testing.assert_allclose(factor @ flat, g, atol=1e-12)
        # The steepest step: its squared length in P is minus its product with the gradient, and
        # no other step has a lower quadratic model.
        others = RNG.normal(size=(100, 3))
        model = -others @ g + np.einsum("ni,ij,nj->n", others, factor, others) / 2
        assert flat @ factor @ flat == pytest.approx(float(g @ flat))
        assert (model >= -g @ flat / 2).all()
    small = scale_by_preconditioner(jnp.ones(3)).update(g.astype(jnp.bfloat16), optax.EmptyState())
    assert small[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("norm", [L2(), L1(), LInf()], ids=lambda norm: norm.name)
def test_backtracking_with_any_steepest_direction_meets_armijo(norm):
    """Halving from 1000 on the logistic risk: the steps of gradient descent with line search."""
    transform = optax.chain(
        scale_by_steepest(norm, scale_by_dual_norm=True),
        optax.scale(-1.0),
        optax.scale_by_backtracking_linesearch(
            20, slope_rtol=1e-4, decrease_factor=0.5, increase_factor=np.inf,
            max_learning_rate=1000.0,
        ),
    )  # fmt: skip

    def step(carry, _):
        w, state = carry
        value, g = jax.value_and_grad(logistic)(w)
        updates, state = transform.update(g, state, w, value=value, grad=g, value_fn=logistic)
        return (w + updates, state), (value, logistic(w + updates), g @ updates)

    w = jnp.zeros(8)
    fn = jit(lambda w: jax.lax.scan(step, (w, transform.init(w)), length=15)[1])
    before, after, slope = fn(w)
    assert (slope < 0).all() and (after <= before + 1e-4 * slope + 1e-12).all()


@pytest.mark.usefixtures("plain_calls")
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: norm_penalty("l1", 1.0), "norm must be a norm"),
        (lambda: norm_penalty(L1(), -1.0), "coefficient must be >= 0"),
        (lambda: squared_norm_penalty(L1(), -1.0), "coefficient must be >= 0"),
        (lambda: ball_constraint(L1(), -1.0), "radius must be >= 0"),
        (lambda: fista(L1(), 1.0), "prox must be a function"),
        (lambda: proximal_gradient(norm_penalty(L1(), 1.0), 0.0), "step_size must be > 0"),
        (lambda: fista(norm_penalty(L1(), 1.0), 1.0, max_halvings=-1), "max_halvings must be >= 0"),
        (
            lambda: fista(norm_penalty(L1(), 1.0), 1.0, increase_factor=0.5),
            "increase_factor must be >= 1",
        ),
        (lambda: scale_by_preconditioner(jnp.array([1.0, 0.0])), "must be positive definite"),
        (lambda: scale_by_preconditioner(-jnp.eye(2)), "must be positive definite"),
        (lambda: scale_by_preconditioner(jnp.ones((2, 3))), r"must be \(d,\) or \(d, d\)"),
        (
            lambda: scale_by_preconditioner(jnp.ones(2)).update(jnp.ones(3), optax.EmptyState()),
            "size of the updates, 3, got 2",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.usefixtures("plain_calls")
def test_what_an_update_needs():
    g = jnp.ones(2)
    transform = proximal_gradient(norm_penalty(L1(), 1.0), 1.0, max_halvings=3)
    with pytest.raises(ValueError, match="params must be the point"):
        transform.update(g, transform.init(g))
    with pytest.raises(ValueError, match="value and value_fn must be given"):
        transform.update(g, transform.init(g), g, value=1.0)
