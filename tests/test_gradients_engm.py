"""Oracles that weight examples by gradient norms: identities between them, and data parallelism."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import models, parallel, training
from robustjax.attacks import pgd
from robustjax.gradients import (
    AENGMState,
    a_engm,
    awp,
    engm,
    f_engm,
    ghost_norms,
    input_gradient_norms,
    n_engm,
    plain,
    reweighted,
    vjp_norms,
    vmap_norms,
)
from robustjax.norms import LInf
from robustjax.objectives import madry, mart, outer_only, standard, trades, trades_attack
from robustjax.optim import engm as engm_chain
from robustjax.optim import mgnc, msgd, sngm
from robustjax.threat import ThreatModel

KEY = jax.random.key(0)
N, K = 8, 3
RNG = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(RNG.uniform(size=(N, 3, 2, 1)), jnp.float32),
    "label": jnp.arange(N, dtype=jnp.int32) % K,
    "index": jnp.arange(N, dtype=jnp.int32),
}
MODEL = models.from_linen(models.MLP((8,), num_classes=K))
PARAMS = jax.tree.map(
    lambda p: jnp.asarray(RNG.normal(size=p.shape), p.dtype), MODEL.init(KEY, BATCH["image"])[0]
)
MADRY = madry(pgd(ThreatModel(LInf(), 0.1), steps=2))
LOSS = MADRY(MODEL.apply)

# Tiny programs: what takes time is compiling them. (But XLA:CPU 0.10 at this level gets the
# derivative of a maximum over two axes wrong, so no VGG here.)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def gradient(oracle, params=PARAMS, batch=BATCH, loss_fn=LOSS, state=None):
    state = oracle.init(params) if state is None else state
    grad_fn = oracle.oracle(loss_fn)
    return jit(lambda p, s: grad_fn(p, {}, s, KEY, batch))(params, state)


@functools.cache
def per_example():
    """Gradient of each example, and its norm, by brute force."""
    attacked = LOSS.inner(PARAMS, {}, KEY, BATCH)
    losses = lambda p: LOSS.outer(p, {}, KEY, attacked)[0]  # noqa: E731
    gradients = jit(jax.jacrev(losses))(PARAMS)
    norms = jax.vmap(optax.tree.norm)(gradients)
    return gradients, norms


def weighted_mean(weights):
    return jax.tree.map(lambda g: jnp.tensordot(jnp.asarray(weights), g, 1) / N, per_example()[0])


def assert_close(a, b, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def bound():
    """An alpha that lies amidst the norms."""
    return float(np.median(per_example()[1]))


NORMS = {"ghost": ghost_norms(), "vmap": vmap_norms(3), "vjp": vjp_norms(3)}


@pytest.mark.parametrize("rule", NORMS)
def test_engm_is_the_mean_of_clipped_gradients(rule):
    norms, alpha = per_example()[1], bound()
    grads, (_, _, metrics) = gradient(engm(alpha, norms=NORMS[rule]))
    weights = np.minimum(alpha / np.asarray(norms), 1)
    assert 0 < (weights < 1).sum() < N
    np.testing.assert_allclose(metrics["weight"], weights, rtol=1e-4)
    np.testing.assert_allclose(metrics["parameter_norm"], norms, rtol=1e-4)
    assert_close(grads, weighted_mean(weights))
    assert optax.tree.norm(grads) <= min(alpha, norms.mean()) + 1e-6


def test_engm_is_differentially_private_sgd_without_noise():
    alpha = bound()
    private = optax.contrib.differentially_private_aggregate(alpha, 0.0, 0)
    expected, _ = private.update(per_example()[0], private.init(PARAMS), PARAMS)
    assert_close(gradient(engm(alpha))[0], expected)


def test_without_bound_it_is_the_plain_gradient_to_the_last_bit():
    expected, (_, _, metrics) = gradient(plain())
    for oracle in (engm(np.inf), n_engm(np.inf), a_engm(np.inf), awp(0.0)):
        grads, (_, _, got) = gradient(oracle)
        assert_equal(grads, expected)
        assert_equal({name: got[name] for name in metrics}, metrics)


def test_below_all_norms_it_has_a_fixed_norm():
    alpha = float(per_example()[1].min()) / 2
    fixed, (_, _, metrics) = gradient(f_engm(alpha))
    assert_close(gradient(engm(alpha))[0], fixed, rtol=1e-5)
    np.testing.assert_allclose(metrics["weight"] * per_example()[1], alpha, rtol=1e-4)
    # Twice alpha is twice the gradient: only alpha times the learning rate matters.
    doubled = jax.tree.map(lambda g: 2 * g, fixed)
    assert_close(gradient(f_engm(2 * alpha))[0], doubled, rtol=1e-5)


def test_a_single_example_is_clipped_as_mgnc_clips_the_batch():
    one = jax.tree.map(lambda x: x[:1], BATCH)
    alpha = bound() / 2
    ours = gradient(engm(alpha), batch=one)[0]
    clip = optax.clip_by_global_norm(alpha)
    theirs = clip.update(gradient(plain(), batch=one)[0], clip.init(PARAMS))[0]
    assert_close(ours, theirs)
    fixed = gradient(f_engm(1.0), batch=one)[0]
    assert optax.tree.norm(fixed) == pytest.approx(1, rel=1e-5)


def test_losses_and_alpha_scale_together():
    scaled = madry(pgd(ThreatModel(LInf(), 0.1), steps=2), loss=lambda z, y: 7 * _cross(z, y))
    for make, alpha in ((engm, bound()), (n_engm, 0.5)):
        grads = gradient(make(7 * alpha), loss_fn=scaled(MODEL.apply))[0]
        assert_close(grads, jax.tree.map(lambda g: 7 * g, gradient(make(alpha))[0]), atol=1e-5)


def _cross(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def test_the_order_of_the_examples_does_not_matter():
    order = RNG.permutation(N)
    shuffled = jax.tree.map(lambda x: x[order], BATCH)
    for oracle in (engm(bound()), n_engm(0.5), a_engm(bound())):
        assert_close(gradient(oracle, batch=shuffled)[0], gradient(oracle)[0])


def test_weights_are_constants():
    """Differentiating through the weights gives another gradient."""
    alpha, attacked = bound(), LOSS.inner(PARAMS, {}, KEY, BATCH)

    def moving(params):
        norm = vmap_norms()(LOSS, params, {}, KEY, attacked)
        losses = LOSS.outer(params, {}, KEY, attacked)[0]
        return (jnp.minimum(alpha / norm, 1) * losses).mean()

    through, ours = jit(jax.grad(moving))(PARAMS), gradient(engm(alpha))[0]
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, through, ours))
    assert difference > 0.01 * optax.tree.norm(ours)


def test_the_chain_for_per_example_gradients_makes_the_same_step():
    alpha = bound()
    chain = engm_chain(0.1, alpha, weight_decay=1e-3)
    expected = chain.update(per_example()[0], chain.init(PARAMS), PARAMS)[0]
    own = msgd(0.1, weight_decay=1e-3)
    got = own.update(gradient(engm(alpha))[0], own.init(PARAMS), PARAMS)[0]
    assert_close(got, expected)


def test_naive_weights_come_from_the_input_gradients():
    attacked = LOSS.inner(PARAMS, {}, KEY, BATCH)
    norms = input_gradient_norms()(LOSS, PARAMS, {}, KEY, attacked)
    alpha = float(np.median(norms))
    grads, (_, _, metrics) = gradient(n_engm(alpha))
    weights = np.minimum(alpha / np.asarray(norms), 1)
    np.testing.assert_allclose(metrics["weight"], weights, rtol=1e-5)
    assert_close(grads, weighted_mean(weights))
    # It is the approximation with slope 1 and intercept 0, between two refreshments.
    state = AENGMState(jnp.ones(()), jnp.zeros(()), jnp.ones((), jnp.int32))
    assert_close(gradient(a_engm(alpha, tau=2), state=state)[0], grads)


def test_the_regression_is_least_squares_and_its_average_is_as_printed():
    attacked = LOSS.inner(PARAMS, {}, KEY, BATCH)
    x = input_gradient_norms()(LOSS, PARAMS, {}, KEY, attacked)
    slope, intercept = np.polyfit(x, per_example()[1], 1)
    alpha = bound()

    grads, (_, state, metrics) = gradient(a_engm(alpha, tau=3, start="first"))
    np.testing.assert_allclose([state.slope, state.intercept], [slope, intercept], rtol=1e-3)
    predicted = np.abs(slope * np.asarray(x) + intercept)
    np.testing.assert_allclose(metrics["predicted_norm"], predicted, rtol=1e-3)
    np.testing.assert_allclose(metrics["weight"], np.minimum(alpha / predicted, 1), rtol=1e-3)
    assert_close(grads, weighted_mean(np.minimum(alpha / predicted, 1)), rtol=1e-3, atol=1e-5)

    # As printed: after k regressions on the same batch, gamma = g + decay^k (start - g).
    oracle = a_engm(alpha, tau=2, decay=0.7)
    step = jit(lambda s: oracle.oracle(LOSS)(PARAMS, {}, s, KEY, BATCH)[1][1])
    state, refreshed = oracle.init(PARAMS), 0
    for t in range(5):
        before, state = state, step(state)
        refreshed += int(before.slope != state.slope)
        k = t // 2 + 1
        np.testing.assert_allclose(state.slope, slope + 0.7**k * (1 - slope), rtol=1e-3)
        np.testing.assert_allclose(state.intercept, intercept * (1 - 0.7**k), rtol=2e-3)
    assert refreshed == 3 and state.count == 5  # ceil(5 / 2)


def test_measured_norms_on_every_step_are_engm():
    alpha = bound()
    grads = gradient(a_engm(alpha, tau=1, exact_on_refresh=True))[0]
    assert_close(grads, gradient(engm(alpha))[0], rtol=1e-5)


def test_where_the_two_norms_are_proportional_the_approximation_is_exact():
    """Softmax regression without bias, inputs of one length, ``W W^T`` a multiple of 1."""
    d, length = 6, 1.7
    x = RNG.normal(size=(N, d))
    x *= length / np.linalg.norm(x, axis=1, keepdims=True)
    rows = np.linalg.qr(RNG.normal(size=(d, K)))[0]
    params = {"w": jnp.asarray(2.5 * rows, jnp.float32)}

    def model_fn(params, model_state, x, train, key):
        return x @ params["w"], model_state

    batch = {**BATCH, "image": jnp.asarray(x, jnp.float32)}
    loss_fn = standard()(model_fn)
    rule = vmap_norms()
    exact, (_, _, metrics) = gradient(engm(1.0, norms=rule), params, batch, loss_fn)
    assert metrics["weight"].min() < 0.99
    oracle = a_engm(1.0, decay=0.0, norms=rule)
    estimate, (_, state, predicted) = gradient(oracle, params, batch, loss_fn)
    assert_close(estimate, exact, rtol=1e-4)
    np.testing.assert_allclose([state.slope, state.intercept], [length / 2.5, 0], atol=1e-4)
    np.testing.assert_allclose(predicted["predicted_norm"], metrics["parameter_norm"], rtol=1e-4)


def test_a_batch_of_equal_input_norms_leaves_the_regression_alone():
    same = jax.tree.map(lambda x: jnp.repeat(x[:1], N, axis=0), BATCH)
    _, (_, state, _) = gradient(a_engm(1.0), batch=same)
    assert (state.slope, state.intercept, state.count) == (1, 0, 1)


def test_any_rule_of_weights():
    oracle = reweighted(lambda loss, p, m, s, key, batch: (batch["label"] + 1.0, s, {}))
    grads, (_, _, metrics) = gradient(oracle)
    assert_close(grads, weighted_mean(np.asarray(BATCH["label"]) + 1.0))
    np.testing.assert_array_equal(metrics["weight"], BATCH["label"] + 1)


def test_weight_perturbation_is_one_relative_step_uphill():
    gamma = 0.05
    attacked = LOSS.inner(PARAMS, {}, KEY, BATCH)
    mean = lambda p: LOSS.outer(p, {}, KEY, attacked)[0].mean()  # noqa: E731
    ascent = jax.grad(mean)(PARAMS)

    def move(kernel, d):
        if kernel.ndim < 2:
            return kernel
        return kernel + gamma * np.linalg.norm(kernel) * d / np.linalg.norm(d)

    moved = jax.tree.map(move, PARAMS, ascent)
    assert mean(moved) > mean(PARAMS)
    assert_close(gradient(awp(gamma))[0], jax.grad(mean)(moved))
    # The attack is that on the weights as they are; around ENGM, norms are those at the moved ones.
    fixed = {**attacked}
    inside = engm(bound()).oracle(outer_only(LOSS))(moved, {}, (), KEY, fixed)[0]
    assert_close(gradient(awp(gamma, oracle=engm(bound())))[0], inside)


def test_weight_perturbation_waits_for_its_warmup():
    oracle = awp(0.05, warmup=3)
    early = gradient(oracle, batch={**BATCH, "step": jnp.asarray(2)})[0]
    assert_equal(early, gradient(plain())[0])
    late = gradient(oracle, batch={**BATCH, "step": jnp.asarray(3)})[0]
    assert_equal(late, gradient(awp(0.05))[0])


def test_zero_kernels_and_zero_gradients_are_not_perturbed():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    grads, _ = gradient(awp(0.1), params=zero)
    assert_equal(grads, gradient(plain(), params=zero)[0])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: engm(0), "alpha must be > 0, got 0"),
        (lambda: engm(float("nan")), "alpha must"),
        (lambda: f_engm(-1.0), "alpha must be > 0, got -1.0"),
        (lambda: n_engm(-0.5), "alpha must be > 0, got -0.5"),
        (lambda: a_engm(5, tau=0), "tau must be >= 1, got 0"),
        (lambda: a_engm(5, decay=1.0), "decay must be < 1, got 1.0"),
        (lambda: a_engm(5, start="zero"), "start must be one of 'identity', 'first', got 'zero'"),
        (lambda: awp(-1e-3), "gamma must be >= 0, got -0.001"),
        (lambda: awp(oracle=plain), "oracle must be an Oracle"),
        (lambda: engm(5, norms="ghost"), "norms must be a function, got 'ghost'"),
    ],
)
def test_refusals(make, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        make()


# Training steps

ORACLES = {
    "plain": lambda axis: plain(),
    "engm": lambda axis: engm(1.0),
    "a_engm": lambda axis: a_engm(1.0, tau=2, axis_name=axis),
    "n_engm": lambda axis: n_engm(0.3),
    "awp": lambda axis: awp(0.01, warmup=1, oracle=engm(1.0), axis_name=axis),
}
CHAINS = {
    "msgd": lambda axis: msgd(0.1, weight_decay=1e-3),
    # The step has taken the mean over the devices by then.
    "sngm": lambda axis: sngm(0.1),
    "mgnc": lambda axis: mgnc(0.1, max_norm=0.2),
}
PARALLEL = [(name, "msgd") for name in ORACLES] + [("plain", "sngm"), ("plain", "mgnc")]


def trained(oracle, chain, objective, model, devices, steps=3):
    """Parameters and oracle state after some steps on so many devices."""
    mesh = parallel.device_mesh(jax.devices()[:devices])
    optimizer, oracle = CHAINS[chain](None), ORACLES[oracle](parallel.AXIS)
    step = training.train_step(
        model.apply, objective, optimizer, oracle=oracle, axis_name=parallel.AXIS
    )
    params, model_state = model.init(KEY, BATCH["image"])
    state = training.create_state(params, model_state, optimizer, KEY, oracle=oracle)
    run = parallel.parallel(
        training.several_steps(step),
        mesh,
        in_specs=(parallel.REPLICATED, parallel.SPLIT_SECOND),
        out_specs=(parallel.REPLICATED, parallel.REPLICATED),
    )
    batches = jax.tree.map(lambda x: jnp.stack([x] * steps), BATCH)
    state, metrics = run(parallel.replicate(state, mesh), batches)
    return jax.device_get((state.params, state.oracle_state, metrics))


@pytest.mark.parametrize("oracle, chain", PARALLEL)
def test_any_number_of_devices_trains_the_same_network(oracle, chain):
    one = trained(oracle, chain, MADRY, MODEL, 1)
    for devices in (2, 8):
        assert_close(trained(oracle, chain, MADRY, MODEL, devices), one, rtol=2e-4, atol=2e-5)


def test_random_combinations_train():
    """Any oracle x objective x transform x model: two steps, finite and not standing still."""
    choose = np.random.default_rng(5)
    objectives = {
        "standard": standard(),
        "madry": MADRY,
        "trades": trades(trades_attack(ThreatModel(LInf(), 0.1), steps=1)),
        "mart": mart(pgd(ThreatModel(LInf(), 0.1), steps=1)),
    }
    transforms = {
        "msgd": msgd(0.1),
        "mgnc": mgnc(0.1, max_norm=1.0),
        "sngm": sngm(0.1, weight_decay=1e-3),
        "adam": optax.adam(1e-2),
        "accumulated": optax.MultiSteps(msgd(0.1), 1).gradient_transformation(),
    }
    oracles = {
        "plain": plain(),
        "engm": engm(0.5),
        "engm, vmap": engm(0.5, norms=vmap_norms(4)),
        "engm, vjp": engm(0.5, norms=vjp_norms(4)),
        "f_engm": f_engm(0.1),
        "a_engm": a_engm(0.5, tau=1),
        "n_engm": n_engm(0.1),
        "awp": awp(0.01),
        "awp, a_engm": awp(0.01, oracle=a_engm(0.5)),
    }
    networks = {
        "mlp": models.MLP((6,), num_classes=K),
        "cnn": models.SmallCNN(num_classes=K, channels=(2, 3), hidden=4),
        "batch": models.VGG(((1,),), num_classes=K, width=2),
        "group": models.VGG(((2,),), num_classes=K, width=2, norm="group"),
    }
    batch = {**BATCH, "image": jnp.asarray(RNG.uniform(size=(N, 6, 6, 1)), jnp.float32)}
    for _ in range(8):
        parts = [part[choose.choice(list(part))]
                 for part in (objectives, transforms, oracles, networks)]  # fmt: skip
        objective, transform, oracle, network = parts
        model = models.from_linen(network)
        step = training.train_step(model.apply, objective, transform, oracle=oracle)
        params, model_state = model.init(KEY, batch["image"])
        state = training.create_state(params, model_state, transform, KEY, oracle=oracle)
        batches = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
        new, metrics = jax.jit(training.several_steps(step))(state, batches)
        assert all(np.isfinite(v).all() for v in jax.tree.leaves((new.params, metrics)))
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), new.params, params)
        assert max(jax.tree.leaves(moved)) > 0
        assert new.step == 2
        structure = jax.tree.structure(state)
        assert jax.tree.structure(new) == structure  # it can be scanned and checkpointed
