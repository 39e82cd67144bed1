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
from robustjax.optim import (
    clip_per_example,
    engm,
    engm_weights,
    f_engm,
    f_engm_weights,
    mean_over_examples,
    mgnc,
    msgd,
    normalize_per_example,
    scale_alpha,
)

N = 8
ALPHA = 1.5
CHAINS = {"engm": engm, "f_engm": f_engm}
each_chain = pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS.keys())


def examples(seed=0, n=N, steps=STEPS, like=PARAMS, heavy=True):
    """Per-example gradients ``(steps, n, ...)`` whose norms lie on both sides of ALPHA."""
    g = gradients(seed, steps=steps, like=like, examples=(n,))
    sizes = 2.0 ** np.random.default_rng(seed).integers(-4, 5, (steps, n)) if heavy else 1.0
    return scaled(g, np.broadcast_to(sizes, (steps, n)))


def scaled(g, factors):
    """Every vector times its own factor, in the dtypes of the vectors."""

    def scale(leaf):
        return (leaf * factors.reshape(factors.shape + (1,) * (leaf.ndim - factors.ndim))).astype(
            leaf.dtype
        )

    return jax.tree.map(scale, g)


def one_step(seed=0, **options):
    return jax.tree.map(lambda g: g[0], examples(seed, steps=1, **options))


def apply(link, g, params=PARAMS):
    return jit(lambda g, params: link.update(g, link.init(params), params)[0])(g, params)


def mean(g, axis=1):
    return jax.tree.map(lambda leaf: leaf.mean(axis), g)


def after_the_mean(*links, alpha=ALPHA):
    return optax.chain(clip_per_example(alpha), mean_over_examples(), *links)


def test_weights():
    norms = jnp.array([0.0, 1e-20, 0.5, 1.5, 3.0, 1e20])
    np.testing.assert_allclose(engm_weights(norms, 1.5), [1, 1, 1, 1, 0.5, 1.5e-20], rtol=1e-6)
    expected = 3 / (np.asarray(norms, np.float64) + 1e-12)
    np.testing.assert_allclose(f_engm_weights(norms, 3.0), expected, rtol=1e-6)
    np.testing.assert_array_equal(f_engm_weights(norms), f_engm_weights(norms, 1.0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("largest", [1e-4, 3.7, 5e4])
def test_weights_are_one_to_the_bit_from_the_largest_norm_on(largest, dtype):
    norms = (largest * jnp.linspace(0, 1, 50)).astype(dtype)
    alphas = [norms.max(), 2 * largest, np.inf, jnp.float32(jnp.inf)]
    for alpha in alphas:
        for weights in (engm_weights(norms, alpha), jit(engm_weights)(norms, alpha)):
            assert weights.dtype == dtype
            np.testing.assert_array_equal(np.asarray(weights, np.float32), 1)
    half = np.asarray(engm_weights(norms, norms.max() / 2), np.float64)
    assert np.all((half[norms > norms.max() / 2] < 1) & (half[norms > norms.max() / 2] > 0.49))


def test_weights_are_differentiable():
    for rule, alpha in ((engm_weights, 1.0), (engm_weights, jnp.inf), (f_engm_weights, 1.0)):
        slopes = jax.grad(lambda v, r=rule, a=alpha: r(v, a).sum())(jnp.array([0.0, 0.5, 2.0]))
        assert np.all(np.isfinite(slopes))


@each_chain
@pytest.mark.parametrize("scheduled", [False, True])
def test_the_equations(make, scheduled):
    g = examples()
    norms = lengths(g, 2)[..., None]
    assert norms.min() < ALPHA < norms.max()
    weights = ALPHA / norms if make is f_engm else np.minimum(ALPHA / norms, 1)
    gs = (rows(g, 2) * weights).mean(1)

    rate = optax.piecewise_constant_schedule(0.2, {2: 0.1, 4: 0.5}) if scheduled else 0.2
    theta, v, expected = flat(PARAMS), 0.0, []
    for t in range(STEPS):
        v = 0.7 * v + gs[t] + 0.01 * theta
        theta = theta - (float(rate(t)) if scheduled else rate) * v
        expected.append(theta)
    _, trajectory, _ = run(make(rate, ALPHA, momentum=0.7, weight_decay=0.01), g)
    np.testing.assert_allclose(rows(trajectory), expected, rtol=1e-5, atol=1e-5)


@functools.cache
def trajectory_of_msgd(compiled, weight_decay):
    plain = optax.chain(mean_over_examples(), msgd(0.1, weight_decay=weight_decay))
    return compiled(functools.partial(scan, plain))(examples())[1]


@pytest.mark.parametrize(
    "alpha, weight_decay",
    [(np.inf, 0.0), (np.float32(np.inf), 5e-4), (jnp.array(jnp.inf), 5e-4)],
)
def test_engm_with_infinite_alpha_is_msgd_to_the_bit(alpha, weight_decay):
    transform = engm(0.1, alpha, weight_decay=weight_decay)
    for compiled in (jit, jax.jit):  # which order their sums differently
        ours = compiled(functools.partial(scan, transform))(examples())[1]
        assert_equal(ours, trajectory_of_msgd(compiled, weight_decay))


@pytest.mark.parametrize("alpha", [1e30, "the largest norm"])
def test_engm_with_an_unreached_alpha_is_msgd_to_the_bit(alpha):
    if alpha != 1e30:
        alpha = jnp.max(L2().value(examples(), batch_ndim=2))
    ours, plain = engm(0.1, alpha), msgd(0.1)
    our_state, state = ours.init(PARAMS), plain.init(PARAMS)
    for t in range(2):  # without jit, which sums in another order
        g = jax.tree.map(lambda g, t=t: g[t], examples())
        our_update, our_state = ours.update(g, our_state, PARAMS)
        mean_gradient = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), g)
        update, state = plain.update(mean_gradient, state, PARAMS)
        assert_equal(our_update, update)
    expected = run(plain, mean(examples()))[1]
    traced = jit(lambda a: scan(engm(0.1, a), examples())[1])(alpha)
    assert_close(traced, expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.01, ALPHA, 100.0])
def test_engm_is_differentially_private_aggregation_without_noise(alpha):
    private = optax.contrib.differentially_private_aggregate(alpha, 0.0, key=jax.random.key(0))
    theirs = optax.chain(private, optax.sgd(0.1, momentum=0.9))
    assert_close(run(engm(0.1, alpha), examples())[1], run(theirs, examples())[1], rtol=1e-6)

    g = one_step()
    ours = apply(optax.chain(clip_per_example(alpha), mean_over_examples()), g)
    summed, clipped = optax.per_example_global_norm_clip(jax.tree.leaves(g), alpha)
    assert_close(jax.tree.leaves(ours), [s / N for s in summed], rtol=1e-6)
    assert int(clipped) == (lengths(g) > alpha).sum()


@pytest.mark.parametrize("alpha", [0.01, ALPHA, 100.0, np.inf])
def test_one_example_is_mgnc(alpha):
    g = examples(n=1)
    ours = run(engm(0.1, alpha, weight_decay=1e-2), g)[1]
    assert_close(ours, run(mgnc(0.1, max_norm=alpha, weight_decay=1e-2), mean(g))[1])


def test_below_the_smallest_norm_engm_is_f_engm():
    g = examples()
    alpha = lengths(g, 2).min() * 0.99
    options = {"weight_decay": 1e-2}
    assert_close(run(engm(0.1, alpha, **options), g)[1], run(f_engm(0.1, alpha, **options), g)[1])


def logistic_gradients(params, x):
    def loss(params, x):
        return jnp.logaddexp(0.0, -(x @ params["w"] + params["b"]))

    return jax.vmap(jax.grad(loss), (None, 0))(params, x)


@pytest.mark.parametrize("factor", [4.0, 0.3])
def test_below_the_smallest_norm_only_learning_rate_times_alpha_matters(factor):
    x = np.float32(np.random.default_rng(0).normal(size=(N, 3)))
    start = {"w": np.float32([0.1, -0.2, 0.3]), "b": np.float32(0.0)}

    @jit
    def train(lr, alpha):
        transform = engm(lr, alpha)

        def step(carry, _):
            params, state = carry
            g = logistic_gradients(params, x)
            updates, state = transform.update(g, state, params)
            smallest = L2().value(g, batch_ndim=1).min()
            return (optax.apply_updates(params, updates), state), smallest

        start_of_all = (start, transform.init(start))
        (params, _), smallest = jax.lax.scan(step, start_of_all, length=20)
        return params, smallest.min() > alpha

    found, expected = train(0.5 * factor, 0.01 / factor), train(0.5, 0.01)
    assert found[1] and expected[1]
    assert_close(found[0], expected[0])
    assert np.abs(flat(expected[0]) - flat(start)).max() > 0.05


@each_chain
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_bounds_under_heavy_tails(make, momentum):
    rng = np.random.default_rng(0)
    g = {k: np.float32(rng.standard_t(1.1, (40, N, *p.shape))) for k, p in PARAMS.items()}
    norms = lengths(g, 2)
    assert norms.max() > 20 * ALPHA
    alone, _, _ = run(make(1.0, ALPHA, momentum=0.0), g)
    bound = ALPHA if make is f_engm else np.minimum(ALPHA, norms.mean(1))
    assert np.all(lengths(alone) <= bound * (1 + 1e-5))
    updates, trajectory, _ = run(make(0.1, ALPHA, momentum=momentum), g)
    assert np.all(lengths(buffers(updates, 0.1)) <= ALPHA * geometric(momentum, 40) * (1 + 1e-5))
    steps = np.linalg.norm(np.diff(rows(trajectory), axis=0), axis=1)
    assert np.all(steps <= 0.1 * ALPHA / (1 - momentum) * (1 + 1e-5))


def test_the_bounds_are_attained():
    g = jax.tree.map(lambda p: np.broadcast_to(7 * p, (STEPS, N, *p.shape)), PARAMS)
    updates, _, _ = run(engm(0.1, ALPHA, momentum=0.9), g)
    np.testing.assert_allclose(lengths(updates), 0.1 * ALPHA * geometric(0.9), rtol=1e-5)


def test_clipping_is_the_projection_on_the_ball():
    g = one_step()
    clipped = apply(clip_per_example(ALPHA), g)
    assert_close(clipped, L2().project(g, ALPHA, batch_ndim=1), rtol=1e-6)
    assert_close(apply(clip_per_example(ALPHA), clipped), clipped, rtol=1e-6)
    assert np.all(lengths(clipped) <= ALPHA * (1 + 1e-6))


@pytest.mark.parametrize("alpha", [0.1, 3.0])
def test_normalising_gives_every_example_the_norm_alpha(alpha):
    g = one_step()
    normalized = apply(normalize_per_example(alpha), g)
    np.testing.assert_allclose(lengths(normalized), alpha, rtol=1e-6)
    other_losses = scaled(g, np.geomspace(1e-3, 1e3, N))
    assert_close(apply(normalize_per_example(alpha), other_losses), normalized)


@each_chain
def test_the_order_of_the_examples_does_not_matter(make):
    order = np.random.default_rng(3).permutation(N)
    mixed = jax.tree.map(lambda g: g[:, order], examples())
    assert_close(run(make(0.1, ALPHA), mixed)[1], run(make(0.1, ALPHA), examples())[1])


@pytest.mark.parametrize("link", [clip_per_example(ALPHA), normalize_per_example()])
def test_microbatches_sum_to_the_batch(link):
    g = one_step()
    whole, parts = rows(apply(link, g)), []
    for part in (slice(0, 1), slice(1, 4), slice(4, N)):
        parts.append(rows(apply(link, jax.tree.map(lambda leaf, part=part: leaf[part], g))))
        np.testing.assert_array_equal(parts[-1], whole[part])
    np.testing.assert_allclose(sum(part.sum(0) for part in parts), whole.sum(0), rtol=1e-12)


@pytest.mark.parametrize("factor", [8.0, 0.37])
def test_scaling_losses_and_alpha_scales_the_update(factor):
    larger = jax.tree.map(lambda g: factor * g, examples())
    updates = run(engm(0.1, factor * ALPHA), larger)[0]
    expected = run(engm(0.1, ALPHA), examples())[0]
    expected = jax.tree.map(lambda u: factor * np.asarray(u), expected)
    if factor == 8:
        assert_equal(updates, expected)
    assert_close(updates, expected)


def test_bounded_sensitivity():
    g = one_step()
    huge = jax.tree.map(lambda leaf: 1e4 * np.ones_like(leaf[:1]), g)
    opposite = jax.tree.map(np.negative, huge)

    def join(*parts):
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    rest = jax.tree.map(lambda leaf: leaf[1:], g)
    batches = {"g": g, "rest": rest, "huge": join(huge, rest), "opposite": join(opposite, rest)}
    sums = {k: rows(apply(clip_per_example(ALPHA), batch)).sum(0) for k, batch in batches.items()}

    def change(a, b):
        return np.linalg.norm(sums[a] - sums[b])

    # One more, one less: alpha. One in place of another: twice that. Both are attained.
    assert change("g", "rest") <= ALPHA * (1 + 1e-5)
    assert change("huge", "rest") == pytest.approx(ALPHA, rel=1e-5)
    assert change("g", "huge") <= 2 * ALPHA * (1 + 1e-5)
    assert change("huge", "opposite") == pytest.approx(2 * ALPHA, rel=1e-5)
    # Without clipping there is no such bound.
    assert np.linalg.norm(rows(batches["huge"]).sum(0) - rows(rest).sum(0)) > 1000 * ALPHA


@pytest.mark.parametrize("seed", range(2))
def test_clipped_mean_keeps_the_sign_of_a_symmetric_distribution(seed):
    rng = np.random.default_rng(seed)
    center, spread = rng.normal(size=()), 10.0 ** rng.uniform(-2, 3, 50)
    g = np.float32(np.concatenate([center + spread, center - spread]))

    @jit
    def clipped_mean(alpha):
        link = optax.chain(clip_per_example(alpha), mean_over_examples())
        return link.update(g, link.init(g[0]))[0]

    for alpha in (0.01, 0.3, 5.0, 1e4):
        found = float(clipped_mean(alpha))
        # Pairs that are clipped on both sides cancel; rounding is of the size of alpha 1e-7.
        assert found * np.sign(center) > -1e-6 * alpha
    assert abs(found) > 0


def test_clipped_mean_of_a_skewed_distribution_can_change_sign():
    g = np.float32([10.0] + [-1.0] * 9)
    link = optax.chain(clip_per_example(1.0), mean_over_examples())
    assert g.mean() > 0
    assert apply(link, g, np.float32(0)) == pytest.approx(-0.8)


def test_softmax_regression_closed_form_and_the_weighted_loss():
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(N, 5)) * np.linspace(0.1, 4, N)[:, None])
    y = np.arange(N) % 3
    params = {"w": np.float32(rng.normal(size=(5, 3))), "b": np.zeros(3, np.float32)}
    link = optax.chain(clip_per_example(1.0), mean_over_examples())

    def losses(params):
        return optax.softmax_cross_entropy_with_integer_labels(x @ params["w"] + params["b"], y)

    def closed_form(params):
        errors = jax.nn.softmax(x @ params["w"] + params["b"]) - jax.nn.one_hot(y, 3)
        return errors, jnp.linalg.norm(errors, axis=1) * jnp.sqrt(jnp.sum(x**2, 1) + 1)

    @jit
    def everything(params):
        def weighted_loss(params, weights_at):
            return jnp.mean(engm_weights(closed_form(weights_at)[1], 1.0) * losses(params))

        g = jax.jacobian(losses)(params)
        norms = L2().value(g, batch_ndim=1)
        clipped, _ = link.update(g, link.init(params), params)
        weighted = jax.grad(weighted_loss)(params, params)
        without_stop_gradient = jax.grad(lambda p: weighted_loss(p, p))(params)
        return closed_form(params), norms, clipped, weighted, without_stop_gradient

    (errors, expected), norms, clipped, weighted, without_stop_gradient = everything(params)
    np.testing.assert_allclose(norms, expected, rtol=1e-5)
    weights = np.minimum(1 / np.asarray(norms), 1)
    assert 0 < (weights < 1).sum() < N
    assert_close(clipped["w"], np.einsum("n,nd,nk->dk", weights, x, errors) / N)
    assert_close(weighted, clipped)
    assert np.abs(flat(without_stop_gradient) - flat(clipped)).max() > 1e-3


@each_chain
def test_zero_gradients_move_nothing(make):
    updates, _, _ = run(make(0.1, ALPHA), jax.tree.map(np.zeros_like, examples()))
    assert not np.any(rows(updates))
    transform = make(0.1, ALPHA)

    def length(g):
        return L2().value(transform.update(g, transform.init(PARAMS))[0])

    slopes = jit(jax.grad(length))(jax.tree.map(np.zeros_like, one_step()))
    assert np.all(np.isfinite(flat(slopes)))


def test_large_and_small_gradients_keep_their_direction():
    for size in (1e25, 1e-25):
        g = jax.tree.map(lambda leaf, s=size: s * leaf, one_step(heavy=False))
        clipped = apply(clip_per_example(ALPHA), g)
        expected = ALPHA if size > 1 else lengths(g)
        np.testing.assert_allclose(lengths(clipped), expected, rtol=1e-5)


@each_chain
def test_injected_hyperparameters(make):
    rate, alpha = optax.linear_schedule(0.2, 0.1, 5), optax.linear_schedule(3.0, 0.5, 5)
    transform = optax.inject_hyperparams(make)(learning_rate=rate, alpha=alpha, weight_decay=1e-3)
    updates, _, state = run(transform, examples())
    assert state.hyperparams["alpha"] == pytest.approx(0.5)
    theta, v = flat(PARAMS), 0.0
    norms = lengths(examples(), 2)
    for t in range(STEPS):
        weights = float(alpha(t)) / norms[t]
        weights = weights if make is f_engm else np.minimum(weights, 1)
        v = 0.9 * v + (weights[:, None] * rows(examples(), 2)[t]).mean(0) + 1e-3 * theta
        np.testing.assert_allclose(rows(updates)[t], -float(rate(t)) * v, rtol=1e-4, atol=1e-6)
        theta = theta - float(rate(t)) * v


def test_alpha_can_be_set_between_steps():
    transform = optax.inject_hyperparams(engm)(learning_rate=1.0, alpha=ALPHA, momentum=0.0)
    state, update = transform.init(PARAMS), jax.jit(transform.update)
    g = jax.tree.map(lambda leaf: 1e3 * leaf, one_step(n=1))
    for alpha in (0.5, 4.0):
        state.hyperparams["alpha"] = jnp.float32(alpha)
        updates, state = update(g, state, PARAMS)
        assert np.linalg.norm(flat(updates)) == pytest.approx(alpha, rel=1e-5)
    assert update._cache_size() == 1


def test_multi_steps_of_microbatches_are_the_batch():
    g = examples()
    halves = jax.tree.map(lambda leaf: leaf.reshape(2 * STEPS, N // 2, *leaf.shape[2:]), g)
    options = {"weight_decay": 1e-2}
    accumulate = optax.MultiSteps(msgd(0.1, **options), 2).gradient_transformation()
    found = run(after_the_mean(accumulate), halves)[1]
    expected = run(engm(0.1, ALPHA, **options), g)[1]
    assert_close(jax.tree.map(lambda p: p[1::2], found), expected)


def test_apply_if_finite_skips_a_spoiled_batch():
    g = examples()
    factors = np.ones((STEPS, N))
    factors[2, 5] = np.nan
    spoiled = scaled(g, factors)
    assert np.all(np.isnan(rows(run(engm(0.1, ALPHA), spoiled)[1])[2:]))
    found = run(after_the_mean(optax.apply_if_finite(msgd(0.1), 3)), spoiled)[1]
    left_out = jax.tree.map(lambda leaf: np.delete(leaf, 2, axis=0), g)
    expected = run(engm(0.1, ALPHA), left_out)[1]
    assert_close(jax.tree.map(lambda p: np.delete(p, 2, axis=0), found), expected)


def test_masked_and_partition():
    mask = {"w": False, "b": True}
    frozen = optax.chain(
        optax.masked(msgd(0.1), mask),
        optax.masked(optax.set_to_zero(), {"w": True, "b": False}),
    )
    labelled = optax.partition(
        {"train": msgd(0.1), "freeze": optax.set_to_zero()}, {"w": "freeze", "b": "train"}
    )
    whole = run(engm(0.1, ALPHA), examples())[0]
    for links in (frozen, labelled):
        updates = run(after_the_mean(links), examples())[0]
        # The norm is still over all leaves.
        assert_close(updates["b"], whole["b"])
        assert not np.any(updates["w"])


def test_wrappers_around_the_ready_chain_are_refused_or_leave_the_axis():
    g, transform = one_step(), engm(0.1, ALPHA)
    accumulated = optax.MultiSteps(transform, 2)
    with pytest.raises(ValueError, match="updates must be per-example gradients"):
        accumulated.update(g, accumulated.init(PARAMS), PARAMS)
    guarded = optax.apply_if_finite(transform, 2)
    with pytest.raises(TypeError, match="equal output types"):
        guarded.update(g, guarded.init(PARAMS), PARAMS)
    updates = apply(optax.masked(transform, {"w": True, "b": False}), g)
    assert updates["w"].shape == (2, 2) and updates["b"].shape == (N, 2)


def test_any_optimizer_follows_the_mean():
    g = examples()
    clipped = scaled(g, np.minimum(ALPHA / lengths(g, 2), 1))
    assert_close(run(after_the_mean(optax.adam(0.1)), g)[1], run(optax.adam(0.1), mean(clipped))[1])


@pytest.mark.parametrize("arrays", [False, True], ids=["numbers", "arrays"])
@each_chain
def test_dtypes_are_kept(make, arrays):
    params = {"w": PARAMS["w"].astype(jnp.bfloat16), "b": PARAMS["b"]}
    dtypes = {"w": jnp.bfloat16, "b": jnp.float32}
    wrap = jnp.float32 if arrays else float
    transform = make(wrap(0.1), wrap(ALPHA), momentum=wrap(0.9), weight_decay=wrap(5e-4))
    updates, trajectory, _ = run(transform, examples(like=params), params)
    for tree in (updates, trajectory):
        assert {k: v.dtype for k, v in tree.items()} == dtypes
    expected = run(make(0.1, ALPHA, weight_decay=5e-4), examples())[1]
    np.testing.assert_allclose(rows(trajectory), rows(expected), atol=0.05)
    for link in (clip_per_example(wrap(ALPHA)), normalize_per_example(wrap(ALPHA))):
        each = apply(link, one_step(like=params), params)
        assert {k: v.dtype for k, v in each.items()} == dtypes
        assert np.all(lengths(each) <= ALPHA * (1 + 2**-8))


@each_chain
def test_state_is_arrays_and_steps_need_no_jit(make):
    transform = make(0.1, ALPHA)
    state = transform.init(PARAMS)
    assert jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    updates, new_state = transform.update(one_step(), state)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    jitted = jit(lambda g: transform.update(g, state)[0])(one_step())
    assert_close(updates, jitted, rtol=1e-6)


def over_devices(fn, n_devices, in_specs, **options):
    mesh = Mesh(jax.devices()[:n_devices], ("data",))
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=P(), **options))


@pytest.mark.parametrize("n_devices", [2, 8])
@each_chain
def test_devices_together_are_one_device(make, n_devices):
    transform = make(0.1, ALPHA, weight_decay=1e-3, axis_name="data")
    together = over_devices(lambda g: scan(transform, g)[1], n_devices, P(None, "data"))
    expected = run(make(0.1, ALPHA, weight_decay=1e-3), examples())[1]
    assert_close(together(examples()), expected)


@pytest.mark.parametrize("vary", [False, True], ids=["check_vma=False", "pcast"])
def test_per_example_gradients_inside_shard_map(vary):
    x = np.float32(np.random.default_rng(0).normal(size=(N, 3)))
    x *= np.float32(np.linspace(0.1, 4, N))[:, None]
    params = {"w": np.float32([0.1, -0.2, 0.3]), "b": np.float32(0.0)}
    transform = engm(0.1, 0.5, axis_name="data")

    def step(params, x):
        at = jax.lax.pcast(params, "data", to="varying") if vary else params
        return transform.update(logistic_gradients(at, x), transform.init(params), params)[0]

    alone = engm(0.1, 0.5)
    gradients_of = jit(logistic_gradients)
    expected = apply(alone, gradients_of(params, x), params)
    found = over_devices(step, 8, (P(), P("data")), check_vma=vary)(params, x)
    assert_close(found, expected)


@pytest.mark.parametrize(
    "arguments, expected",
    [((5, 11.1e6, 48.2e6), 10.4), ((5, 11.17e6, 46.16e6), 10.2), ((3.0, 100, 25), 1.5)],
)
def test_scale_alpha(arguments, expected):
    assert round(scale_alpha(*arguments), 1) == expected


@pytest.mark.usefixtures("plain_calls")
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: engm(0.1, 0.0), "alpha must be > 0, got 0.0"),
        (lambda: engm(0.1, -np.inf), "alpha must be > 0, got -inf"),
        (lambda: engm(0.1, float("nan")), "alpha must be a number, got nan"),
        (lambda: engm(0.1, optax.constant_schedule(5.0)), "alpha must be a number, got <function"),
        (lambda: engm(-0.1, 5.0), "learning_rate must be >= 0, got -0.1"),
        (lambda: engm(0.1, 5.0, momentum=1), "momentum must be < 1, got 1"),
        (lambda: f_engm(0.1, np.inf), "alpha must be finite, got inf"),
        (lambda: f_engm(0.1, 0), "alpha must be > 0, got 0"),
        (lambda: f_engm(0.1, weight_decay="no"), "weight_decay must be a number, got 'no'"),
        (lambda: clip_per_example(-1.0), "alpha must be > 0, got -1.0"),
        (lambda: normalize_per_example(np.inf), "alpha must be finite, got inf"),
        (lambda: engm_weights(jnp.ones(2), 0.0), "alpha must be > 0, got 0.0"),
        (lambda: f_engm_weights(jnp.ones(2), np.inf), "alpha must be finite, got inf"),
        (lambda: scale_alpha(5.0, 0, 10), "params_from must be > 0, got 0"),
        (lambda: scale_alpha(5.0, 10, -1), "params_to must be > 0, got -1"),
        (lambda: scale_alpha(float("nan"), 10, 10), "alpha must be a number, got nan"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


LINKS = [clip_per_example(1.0), normalize_per_example(), mean_over_examples(), engm(0.1, 1.0)]


@pytest.mark.parametrize("link", LINKS, ids=["clip", "normalize", "mean", "engm"])
@pytest.mark.parametrize(
    "updates, message",
    [
        (PARAMS, r"shapes \(n, \*shape of the parameter\), got shapes \[\(2,\), \(2, 2\)\]"),
        ({"b": jnp.ones((3, 2)), "w": jnp.ones((4, 2, 2))}, "one leading axis of n >= 1 examples"),
        ({"b": jnp.ones(()), "w": jnp.ones((4, 2, 2))}, "one leading axis of n >= 1 examples"),
        ({"b": jnp.ones((0, 2)), "w": jnp.ones((0, 2, 2))}, "one leading axis of n >= 1"),
    ],
)
def test_gradients_that_are_not_per_example(link, updates, message):
    with pytest.raises(ValueError, match=f"updates must be per-example gradients.*{message}"):
        apply(link, updates)
