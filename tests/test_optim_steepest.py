import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax.norms import L1, L2, LInf, Lp
from robustjax.optim import scale_by_steepest, sign_gd, steepest_descent

NORMS = [LInf(), L2(), L1(), Lp(1.5), Lp(3)]
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1, "l1.5": 1.5, "l3": 3}
every_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)

# Tiny programs: what takes time is compiling them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
GRADS = {"w": jnp.array([[1.0, -2.0], [0.0, 0.5]]), "b": jnp.array([0.3, -0.1])}


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0], np.float64)


def update(transform, grads=GRADS, params=PARAMS):
    return jit(lambda g: transform.update(g, transform.init(params), params)[0])(grads)


def test_closed_forms():
    g = flat(GRADS)
    largest = np.where(np.arange(g.size) == np.argmax(np.abs(g)), g, 0)
    forms = {
        LInf(): -np.abs(g).sum() * np.sign(g),
        L2(): -g,
        L1(): -largest,
        Lp(1.5): -(np.linalg.norm(g, 3) ** -1) * np.abs(g) ** 2 * np.sign(g),
        Lp(3): -(np.linalg.norm(g, 1.5) ** 0.5) * np.abs(g) ** 0.5 * np.sign(g),
    }
    for norm, expected in forms.items():
        scaled = update(steepest_descent(norm, 0.1, scale_by_dual_norm=True))
        np.testing.assert_allclose(flat(scaled), 0.1 * expected, rtol=1e-5, atol=1e-7)
        unit = update(steepest_descent(norm, 0.1))
        length = norm.dual.value(GRADS)
        np.testing.assert_allclose(flat(unit) * length, 0.1 * expected, rtol=1e-5, atol=1e-7)


@every_norm
def test_scaled_update_minimises_the_quadratic_model(norm):
    g, d = flat(GRADS), update(steepest_descent(norm, 1.0, scale_by_dual_norm=True))
    dual = float(norm.dual.value(GRADS))
    assert g @ flat(d) == pytest.approx(-(dual**2), rel=1e-5)
    assert norm.value(d) == pytest.approx(dual, rel=1e-5)
    others = np.random.default_rng(0).normal(size=(200, g.size))
    sizes = np.linalg.norm(others, ORDERS[norm.name], axis=1)
    assert np.all(others @ g + sizes**2 / 2 >= -(dual**2) / 2 - 1e-5)


@every_norm
def test_the_link_is_the_direction_of_the_norm(norm):
    link = scale_by_steepest(norm)
    assert link.init(PARAMS) == optax.EmptyState()
    np.testing.assert_allclose(flat(update(link)), flat(norm.steepest(GRADS)), rtol=1e-6)
    assert norm.value(update(link)) == pytest.approx(1, rel=1e-5)
    for scale in (False, True):
        chain = optax.chain(scale_by_steepest(norm, scale_by_dual_norm=scale), optax.scale(-0.1))
        whole = steepest_descent(norm, 0.1, scale_by_dual_norm=scale)
        np.testing.assert_allclose(flat(update(chain)), flat(update(whole)), rtol=1e-6)
    found = flat(GRADS) @ flat(update(scale_by_steepest(norm, scale_by_dual_norm=True)))
    assert found == pytest.approx(float(norm.dual.value(GRADS)) ** 2, rel=1e-5)


def test_sign_gd_moves_every_coordinate_by_the_learning_rate_or_not_at_all():
    step = flat(update(sign_gd(0.1)))
    np.testing.assert_allclose(
        step[flat(GRADS) != 0], -0.1 * np.sign(flat(GRADS))[flat(GRADS) != 0]
    )
    assert not np.any(step[flat(GRADS) == 0]) and np.any(flat(GRADS) == 0)


def test_l2_with_the_dual_norm_is_gradient_descent():
    ours = steepest_descent(L2(), 0.3, scale_by_dual_norm=True)
    np.testing.assert_allclose(flat(update(ours)), flat(update(optax.sgd(0.3))), rtol=1e-6)


def test_all_norms_are_one_in_one_dimension():
    g = jnp.array([-3.0])
    for norm in NORMS:
        step = update(steepest_descent(norm, 0.1, scale_by_dual_norm=True), g, g)
        np.testing.assert_allclose(step, 0.3, rtol=1e-5)


def test_l_p_runs_from_gradient_descent_to_sign_gd():
    nearly = flat(update(steepest_descent(Lp(1e5), 0.1)))
    np.testing.assert_allclose(nearly, flat(update(sign_gd(0.1))), atol=1e-5)
    middle = flat(update(steepest_descent(Lp(2), 0.1, scale_by_dual_norm=True)))
    np.testing.assert_allclose(middle, flat(update(optax.sgd(0.1))), rtol=1e-5)


def test_sign_gd_is_optax_sign_sgd():
    expected = update(optax.sign_sgd(0.1))
    np.testing.assert_array_equal(flat(update(sign_gd(0.1))), flat(expected))


def test_coordinate_descent_moves_one_coordinate_of_the_whole_tree():
    step = update(steepest_descent(L1(), 0.1))
    assert np.count_nonzero(flat(step)) == 1
    assert step["w"][0, 1] == pytest.approx(0.1)


@every_norm
def test_a_zero_gradient_gives_a_zero_update(norm):
    transform = steepest_descent(norm, 0.1, scale_by_dual_norm=True)
    assert not np.any(flat(update(transform, jax.tree.map(jnp.zeros_like, GRADS))))


def test_schedule():
    transform = steepest_descent(L2(), optax.piecewise_constant_schedule(1.0, {1: 0.1, 2: 0.1}))
    state = transform.init(PARAMS)
    for expected in (1.0, 0.1, 0.01):
        step, state = transform.update(GRADS, state)
        assert L2().value(step) == pytest.approx(expected, rel=1e-5)


def test_traced_learning_rate_and_state_of_arrays():
    fn = jax.jit(lambda lr: steepest_descent(L2(), lr).update(GRADS, state)[0])
    state = steepest_descent(L2(), 0.1).init(PARAMS)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert [float(L2().value(fn(lr))) for lr in (0.5, 2.0)] == pytest.approx([0.5, 2.0])
    assert fn._cache_size() == 1


@every_norm
def test_dtypes_are_kept(norm):
    grads = {"a": jnp.full(3, 2.0, jnp.bfloat16), "b": jnp.ones((2, 2)), "c": jnp.zeros((0,))}
    for scale, lr in ((True, jnp.float32(0.1)), (False, optax.constant_schedule(0.1))):
        step = update(steepest_descent(norm, lr, scale_by_dual_norm=scale), grads, grads)
        assert jax.tree.map(lambda x: x.dtype, step) == jax.tree.map(lambda x: x.dtype, grads)
        assert np.all(np.isfinite(flat(step)))


def test_vmapped_over_examples_is_the_step_rule_of_an_attack():
    g = jax.random.normal(jax.random.key(0), (5, 3, 3, 1))
    for norm in (LInf(), L2()):
        transform = steepest_descent(norm, 0.1)
        step = jit(lambda g, t=transform: jax.vmap(t.update)(g, jax.vmap(t.init)(g))[0])(-g)
        np.testing.assert_allclose(step, 0.1 * norm.steepest(g, batch_ndim=1), atol=1e-6)


def test_inject_hyperparams():
    transform = optax.inject_hyperparams(steepest_descent)(norm=L2(), learning_rate=0.1)
    state = transform.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.7)
    step, _ = jax.jit(transform.update)(GRADS, state, PARAMS)
    assert L2().value(step) == pytest.approx(0.7)


def test_masked():
    transform = optax.masked(steepest_descent(L1(), 0.1), {"w": False, "b": True})
    step = update(transform)
    np.testing.assert_array_equal(step["w"], GRADS["w"])
    np.testing.assert_allclose(step["b"], [-0.1, 0.0], rtol=1e-6)


def test_multi_steps():
    transform = optax.MultiSteps(steepest_descent(LInf(), 0.1), every_k_schedule=2)
    state = transform.init(PARAMS)
    first, state = transform.update(GRADS, state, PARAMS)
    assert not np.any(flat(first))
    second, _ = transform.update(jax.tree.map(lambda g: -3 * g, GRADS), state, PARAMS)
    np.testing.assert_allclose(flat(second), 0.1 * np.sign(flat(GRADS)), rtol=1e-6)


@every_norm
def test_descends_a_quadratic(norm):
    target = jnp.array([1.0, -2.0, 0.5])
    transform = steepest_descent(norm, 0.3, scale_by_dual_norm=True)

    def step(carry, _):
        params, state = carry
        loss, g = jax.value_and_grad(lambda w: jnp.sum((w - target) ** 2) / 2)(params)
        change, state = transform.update(g, state, params)
        return (optax.apply_updates(params, change), state), loss

    start = jnp.zeros(3)
    run = functools.partial(jax.lax.scan, step, length=60)
    (_, _), losses = jax.jit(run)((start, transform.init(start)))
    assert np.all(np.diff(losses) <= 1e-6) and losses[-1] < 1e-3


@pytest.mark.usefixtures("plain_calls")
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: steepest_descent("linf", 0.1), "norm must be a norm such as"),
        (lambda: scale_by_steepest(L2), "norm must be a norm such as"),
        (lambda: steepest_descent(L2(), -0.1), "learning_rate must be >= 0, got -0.1"),
        (lambda: sign_gd(float("nan")), "learning_rate must be a number"),
        (lambda: sign_gd("0.1"), "learning_rate must be a number, got '0.1'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
