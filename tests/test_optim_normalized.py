import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from trajectories import (
    PARAMS,
    STEPS,
    assert_close,
    assert_equal,
    buffers,
    flat,
    geometric,
    gradients,
    jit,
    lengths,
    rows,
    run,
    scan,
)

from robustjax.norms import L2
from robustjax.optim import engm, f_engm, mean_over_devices, mgnc, msgd, sngm

EVERY = {
    "msgd": msgd,
    "mgnc": functools.partial(mgnc, max_norm=1.5),
    "sngm": sngm,
    "sngm after decay": functools.partial(sngm, normalize_after_weight_decay=True),
}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())


def reference(grads, params, transform_of_g, lr, momentum, weight_decay, decay_first=False):
    """The equations, in NumPy."""
    theta, v, trajectory = flat(params), 0.0, []
    for t, g in enumerate(rows(grads)):
        if decay_first:
            g = transform_of_g(g + weight_decay * theta)
        else:
            g = transform_of_g(g) + weight_decay * theta
        v = momentum * v + g
        theta = theta - lr(t) * v
        trajectory.append(theta)
    return np.array(trajectory)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_the_equations(name, scheduled):
    def clip(g):
        return g * min(1.5 / np.linalg.norm(g), 1)

    def unit(g):
        return g / np.linalg.norm(g)

    rule = {"msgd": lambda g: g, "mgnc": clip}.get(name, unit)
    rate = optax.piecewise_constant_schedule(0.2, {2: 0.1, 4: 0.5}) if scheduled else 0.2
    decay = optax.constant_schedule(0.01) if scheduled else 0.01
    transform = EVERY[name](rate, momentum=0.7, weight_decay=decay)
    # From gradients that are not clipped to gradients that are.
    growing = np.float32(2) ** np.arange(-3, STEPS - 3)
    grads = {
        "w": gradients()["w"] * growing[:, None, None],
        "b": gradients()["b"] * growing[:, None],
    }
    assert lengths(grads).min() < 1.5 < lengths(grads).max()
    expected = reference(
        grads,
        PARAMS,
        rule,
        lambda t: float(rate(t)) if scheduled else rate,
        momentum=0.7,
        weight_decay=0.01,
        decay_first=name == "sngm after decay",
    )
    _, trajectory, _ = run(transform, grads)
    np.testing.assert_allclose(rows(trajectory), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
def test_msgd_is_the_optax_chain(weight_decay):
    theirs = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(0.1, momentum=0.9))
    assert_equal(
        run(msgd(0.1, weight_decay=weight_decay), gradients())[1], run(theirs, gradients())[1]
    )


def test_without_momentum_and_decay_it_is_sgd():
    assert_equal(run(msgd(0.1, momentum=0.0), gradients())[1], run(optax.sgd(0.1), gradients())[1])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_constant_gradient(momentum):
    g = jax.tree.map(lambda p: np.broadcast_to(p, (STEPS, *p.shape)), PARAMS)
    updates, _, _ = run(msgd(0.1, momentum=momentum), g)
    expected = -0.1 * geometric(momentum)[:, None] * flat(PARAMS)
    np.testing.assert_allclose(rows(updates), expected, rtol=1e-5)


def test_constant_gradient_steady_displacement():
    g = jax.tree.map(lambda p: np.broadcast_to(p, (200, *p.shape)), PARAMS)
    updates, _, _ = run(msgd(0.1, momentum=0.9), g)
    np.testing.assert_allclose(rows(updates)[-1], -0.1 / 0.1 * flat(PARAMS), rtol=1e-5)


@pytest.mark.parametrize("curvature, momentum, lr", [(2.0, 0.9, 0.1), (0.5, 0.3, 1.0)])
def test_two_term_recurrence_on_a_quadratic(curvature, momentum, lr):
    transform, theta = msgd(lr, momentum=momentum), jnp.array(1.5)
    state, trajectory = transform.init(theta), [1.5, 1.5]
    for _ in range(12):
        updates, state = transform.update(curvature * theta, state)
        theta = optax.apply_updates(theta, updates)
        now, before = trajectory[-1], trajectory[-2]
        trajectory.append((1 + momentum - lr * curvature) * now - momentum * before)
        assert float(theta) == pytest.approx(trajectory[-1], rel=1e-4, abs=1e-5)


def test_one_random_example_is_unbiased_and_sums_are_means_with_another_rate():
    w, x = jnp.array([0.3, -1.0, 2.0]), jax.random.normal(jax.random.key(1), (8, 3))

    def loss(w, x):
        return jnp.logaddexp(0.0, x @ w)

    each = jax.vmap(jax.grad(loss), (None, 0))(w, x)
    full = jax.grad(lambda w: jax.vmap(loss, (None, 0))(w, x).mean())(w)
    np.testing.assert_allclose(each.mean(0), full, rtol=1e-5, atol=1e-7)
    per_batch = gradients(2, examples=(8,))
    by_sum = run(msgd(0.1 / 8), jax.tree.map(lambda g: g.sum(1), per_batch))[1]
    by_mean = run(msgd(0.1), jax.tree.map(lambda g: g.mean(1), per_batch))[1]
    assert_close(by_sum, by_mean)


@pytest.mark.parametrize("max_norm", [np.inf, 1e30, 1e3])
def test_an_unreached_clip_is_msgd_to_the_bit(max_norm):
    grads = gradients(3)
    options = {"momentum": 0.8, "weight_decay": 1e-3}
    assert_equal(
        run(mgnc(0.1, max_norm=max_norm, **options), grads)[1], run(msgd(0.1, **options), grads)[1]
    )
    traced = jit(lambda c: scan(mgnc(0.1, max_norm=c, **options), grads)[1])
    assert_equal(traced(max_norm), run(msgd(0.1, **options), grads)[1])


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_mgnc_is_the_optax_clip(size):
    grads = gradients(4, size)
    theirs = optax.chain(optax.clip_by_global_norm(2.0), optax.sgd(0.1, momentum=0.9))
    assert_close(run(mgnc(0.1, max_norm=2.0), grads)[1], run(theirs, grads)[1])


@pytest.mark.parametrize("size", [0.1, 1.0, 1e4])
def test_mgnc_bounds(size):
    grads = gradients(5, size)
    clipped, _, _ = run(mgnc(1.0, max_norm=2.0, momentum=0.0), grads)
    assert np.all(lengths(clipped) <= np.minimum(2.0, lengths(grads)) * (1 + 1e-6))
    updates, _, _ = run(mgnc(0.1, max_norm=2.0, momentum=0.9), grads)
    assert np.all(lengths(buffers(updates, 0.1)) <= 2.0 * geometric(0.9) * (1 + 1e-5))


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_sngm_bounds_whatever_the_size_of_the_gradient(size):
    updates, _, _ = run(sngm(0.1, momentum=0.9), gradients(6, size))
    assert np.all(lengths(buffers(updates, 0.1)) <= geometric(0.9) * (1 + 1e-5))
    aligned = jax.tree.map(lambda g: np.repeat(g[:1], STEPS, axis=0), gradients(6, size))
    updates, _, _ = run(sngm(0.1, momentum=0.9), aligned)
    np.testing.assert_allclose(lengths(updates), 0.1 * geometric(0.9), rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-6, 8.0, 3e7])
def test_sngm_is_invariant_to_the_scale_of_the_loss(factor):
    grads = gradients(7)
    scaled = jax.tree.map(lambda g: factor * g, grads)
    options = {"weight_decay": 1e-2}
    assert_close(run(sngm(0.1, **options), scaled)[1], run(sngm(0.1, **options), grads)[1])
    other = sngm(0.1, normalize_after_weight_decay=True, **options)
    assert not np.allclose(rows(run(other, scaled)[1]), rows(run(other, grads)[1]), atol=1e-6)


def test_sngm_of_a_sum_or_a_mean_is_one():
    each = gradients(8, examples=(4,))
    by_sum = run(sngm(0.1), jax.tree.map(lambda g: g.sum(1), each))[1]
    assert_equal(by_sum, run(sngm(0.1), jax.tree.map(lambda g: g.mean(1), each))[1])


def test_batches_of_one_example():
    each = gradients(9, examples=(1,))
    alone = jax.tree.map(lambda g: g[:, 0], each)
    options = {"momentum": 0.8, "weight_decay": 1e-3}
    assert_close(
        run(mgnc(0.1, max_norm=1.5, **options), alone)[1], run(engm(0.1, 1.5, **options), each)[1]
    )
    assert_close(run(sngm(0.1, **options), alone)[1], run(f_engm(0.1, **options), each)[1])


@every
def test_a_zero_gradient_moves_nothing(make):
    updates, _, _ = run(make(0.1), jax.tree.map(np.zeros_like, gradients()))
    assert not np.any(rows(updates))


@pytest.mark.parametrize("arrays", [False, True], ids=["numbers", "arrays"])
@every
def test_dtypes_are_kept(make, arrays):
    params = {"w": PARAMS["w"].astype(jnp.bfloat16), "b": PARAMS["b"]}
    wrap = jnp.float32 if arrays else float
    transform = make(wrap(0.1), momentum=wrap(0.9), weight_decay=wrap(5e-4))
    updates, trajectory, state = run(transform, gradients(1, like=params), params)
    expected = run(make(0.1, weight_decay=5e-4), gradients(1, like=params))[1]
    (buffer,) = optax.tree.get_all_with_path(state, "trace")
    for tree in (updates, trajectory, buffer[1]):
        assert {k: v.dtype for k, v in tree.items()} == {"w": jnp.bfloat16, "b": jnp.float32}
    np.testing.assert_allclose(rows(trajectory), rows(expected), atol=0.05)


@every
def test_injected_hyperparameters(make):
    transform = optax.inject_hyperparams(make)(
        learning_rate=optax.linear_schedule(0.2, 0.1, 5), momentum=0.5, weight_decay=1e-3
    )
    plain = make(optax.linear_schedule(0.2, 0.1, 5), momentum=0.5, weight_decay=1e-3)
    assert_close(run(transform, gradients())[1], run(plain, gradients())[1])
    assert run(transform, gradients())[2].hyperparams["learning_rate"] == pytest.approx(0.1)
    halves = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    assert run(transform, gradients(like=halves), halves)[0]["w"].dtype == jnp.bfloat16


@every
def test_multi_steps_accumulate_the_mean(make):
    grads = gradients(3)
    pairs = jax.tree.map(lambda g: g.reshape(-1, 2, *g.shape[1:]).mean(1), grads)
    options = {"momentum": 0.8, "weight_decay": 1e-2}
    accumulated = run(optax.MultiSteps(make(0.1, **options), 2), grads)[1]
    at_ends = jax.tree.map(lambda p: p[1::2], accumulated)
    assert_close(at_ends, run(make(0.1, **options), pairs)[1])


@every
def test_masked_and_apply_if_finite(make):
    masked = run(optax.masked(make(0.1), {"w": False, "b": True}), gradients())[0]
    assert_equal(masked["w"], gradients()["w"])
    alone = run(make(0.1), {"b": gradients()["b"]}, {"b": PARAMS["b"]})[0]
    assert_equal(masked["b"], alone["b"])

    spoiled = jax.tree.map(np.copy, gradients())
    spoiled["b"][2, 0] = np.nan
    left_out = jax.tree.map(lambda g: np.delete(g, 2, axis=0), gradients())
    survived = run(optax.apply_if_finite(make(0.1), 3), spoiled)[1]
    expected = run(make(0.1), left_out)[1]
    assert_close(jax.tree.map(lambda p: np.delete(p, 2, axis=0), survived), expected)


@every
def test_state_is_arrays_and_steps_need_no_jit(make):
    transform = make(0.1, weight_decay=1e-3)
    state = transform.init(PARAMS)
    assert jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    g = jax.tree.map(lambda g: g[0], gradients(steps=1))
    updates, new_state = transform.update(g, state, PARAMS)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    jitted = run(transform, gradients(steps=1))[0]
    assert_close(jax.tree.map(lambda u: u[None], updates), jitted, rtol=1e-6)


def on_devices(transform, n_devices, per_example, params=PARAMS):
    """The trajectory when each device means its own share of the examples."""
    mesh = Mesh(jax.devices()[:n_devices], ("data",))

    def share(params, grads):
        return scan(transform, jax.tree.map(lambda g: g.mean(1), grads), params)[1]

    mapped = jax.shard_map(share, mesh=mesh, in_specs=(P(), P(None, "data")), out_specs=P())
    return jax.jit(mapped)(params, per_example)


@pytest.mark.parametrize("n_devices", [2, 8])
@pytest.mark.parametrize("make", [mgnc, sngm], ids=["mgnc", "sngm"])
def test_devices_together_are_one_device(make, n_devices):
    if make is mgnc:
        make = functools.partial(mgnc, max_norm=0.8)
    each = gradients(5, examples=(8,))
    for g in each.values():
        g[:, 0] *= 20
    expected = run(make(0.1, weight_decay=1e-3), jax.tree.map(lambda g: g.mean(1), each))[1]
    together = on_devices(make(0.1, weight_decay=1e-3, axis_name="data"), n_devices, each)
    assert_close(together, expected)
    # Clipping or normalising on each device, and averaging then, is another method.
    apart = optax.chain(make(0.1, weight_decay=1e-3), mean_over_devices("data"))
    mesh = Mesh(jax.devices()[:n_devices], ("data",))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P(None, "data"), out_specs=P(), check_vma=False
    )
    def separately(grads):
        return scan(apart, jax.tree.map(lambda g: g.mean(1), grads))[1]

    assert np.abs(rows(separately(each)) - rows(expected)).max() > 0.01


def test_gradients_of_replicated_parameters_inside_shard_map():
    """The two ways that the documentation of ``mean_over_devices`` names."""
    mesh = Mesh(jax.devices()[:2], ("data",))
    x, w = jax.random.normal(jax.random.key(0), (4, 3)), jnp.array([1.0, -2.0, 0.5])
    transform = mgnc(0.1, max_norm=0.5, axis_name="data")

    def loss(w, x):
        return jnp.logaddexp(0.0, x @ w).mean()

    def step(w, x, vary):
        at = jax.lax.pcast(w, "data", to="varying") if vary else w
        return transform.update(jax.grad(loss)(at, x), transform.init(w), w)[0]

    expected = mgnc(0.1, max_norm=0.5).update(jax.grad(loss)(w, x), transform.init(w), w)[0]
    for vary in (False, True):
        mapped = jax.shard_map(
            functools.partial(step, vary=vary),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
            check_vma=vary,
        )
        np.testing.assert_allclose(jax.jit(mapped)(w, x), expected, rtol=1e-5)


def test_mean_over_devices_without_an_axis_does_nothing():
    link = mean_over_devices()
    assert link.update(PARAMS, link.init(PARAMS))[0] is PARAMS


def test_norms_are_of_the_whole_tree():
    g = {"w": jnp.full((2, 2), 3.0), "b": jnp.array([8.0, 0.0])}
    link = sngm(1.0, momentum=0.0)
    updates, _ = link.update(g, link.init(PARAMS), PARAMS)
    assert_close(updates, jax.tree.map(lambda g: -g / 10, g))
    assert L2().value(updates) == pytest.approx(1)


@pytest.mark.usefixtures("plain_calls")
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: msgd(-0.1), "learning_rate must be >= 0, got -0.1"),
        (lambda: msgd("0.1"), "learning_rate must be a number, got '0.1'"),
        (lambda: msgd(0.1, momentum=1.0), "momentum must be < 1, got 1.0"),
        (lambda: msgd(0.1, momentum=-0.5), "momentum must be >= 0, got -0.5"),
        (lambda: msgd(0.1, momentum=None), "momentum must be a number, got None"),
        (lambda: msgd(0.1, weight_decay=-1e-4), "weight_decay must be >= 0, got -0.0001"),
        (lambda: msgd(0.1, weight_decay=float("nan")), "weight_decay must be a number, got nan"),
        (lambda: mgnc(0.1, max_norm=0.0), "max_norm must be > 0, got 0.0"),
        (lambda: mgnc(0.1, max_norm=float("nan")), "max_norm must be a number, got nan"),
        (lambda: mgnc(float("inf")), "learning_rate must be finite, got inf"),
        (lambda: sngm(0.1, weight_decay=float("inf")), "weight_decay must be finite, got inf"),
        (
            lambda: sngm(0.1, weight_decay=-1.0, normalize_after_weight_decay=True),
            "weight_decay must be >= 0, got -1.0",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
