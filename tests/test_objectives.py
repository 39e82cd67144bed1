"""Objectives: limits, closed forms on linear models, and what the attack may not touch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from robustjax.attacks import fgsm, pgd
from robustjax.losses import boosted_cross_entropy, cross_entropy, kl_divergence
from robustjax.norms import L2, LInf
from robustjax.objectives import (
    Stages,
    madry,
    mart,
    outer_only,
    scheduled,
    stages,
    standard,
    trades,
    trades_attack,
)
from robustjax.threat import ThreatModel

# Tiny programs: what takes time is compiling them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

RNG = np.random.default_rng(0)
N, D, K = 6, 5, 4
BATCH = {
    "image": jnp.array(RNG.uniform(size=(N, D)), jnp.float32),
    "label": jnp.array(RNG.integers(0, K, N), jnp.int32),
    "index": jnp.arange(N, dtype=jnp.int32),
}
KEY = jax.random.key(0)
PARAMS = {
    "w": jnp.array(RNG.normal(size=(D, 8)), jnp.float32),
    "v": jnp.array(RNG.normal(size=(8, K)), jnp.float32),
}
BINARY = jnp.array(RNG.normal(size=D), jnp.float32)


def network(params, model_state, x, train, key):
    del key
    calls = model_state["calls"] + (1 if train else 0)
    return jnp.tanh(x @ params["w"]) @ params["v"], {"calls": calls}


def binary(w, model_state, x, train, key):
    del train, key
    score = x @ w
    return jnp.stack([jnp.zeros_like(score), score], axis=-1), model_state


def free(norm, eps):
    return ThreatModel(norm, eps, lower=-jnp.inf, upper=jnp.inf)


def value_and_grad(objective, params=PARAMS, model_fn=network, batch=BATCH):
    loss_fn = objective(model_fn)

    def mean(params):
        losses, (state, metrics) = loss_fn(params, {"calls": jnp.zeros(())}, KEY, batch)
        return losses.mean(), (losses, state, metrics)

    (_, aux), grads = jit(jax.value_and_grad(mean, has_aux=True))(params)
    return *aux, grads


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


NOTHING = {
    "madry": madry(pgd(ThreatModel(LInf(), 0.0), steps=3)),
    "madry-fgsm": madry(fgsm(ThreatModel(L2(), 0.0))),
    "trades": trades(trades_attack(ThreatModel(LInf(), 0.0))),
    "trades-beta-0": trades(trades_attack(ThreatModel(LInf(), 0.3)), beta=0.0),
}


@functools.cache
def plain_training():
    return value_and_grad(standard())


@pytest.mark.parametrize("name", NOTHING)
def test_without_perturbation_it_is_standard_training(name):
    losses, _, _, grads = value_and_grad(NOTHING[name])
    expected, _, _, expected_grads = plain_training()
    np.testing.assert_allclose(losses, expected, atol=2e-6)
    assert_trees_close(grads, expected_grads, atol=1e-6)


@pytest.mark.parametrize("norm", [LInf(), L2()], ids=lambda n: n.name)
def test_linear_adversarial_training_is_the_dual_norm_loss(norm):
    """Loss and gradient of softplus(-y w.x + eps ||w||_*)."""
    eps = 0.2
    y = BATCH["label"] % 2
    batch = {**BATCH, "label": y}

    def closed_form(w):
        margin = (2 * y - 1) * (batch["image"] @ w) - eps * norm.dual.value(w)
        return jax.nn.softplus(-margin).mean()

    attack = pgd(free(norm, eps), steps=20, step_size=eps)
    losses, _, _, grads = value_and_grad(madry(attack), BINARY, binary, batch)
    np.testing.assert_allclose(losses.mean(), closed_form(BINARY), rtol=1e-5)
    np.testing.assert_allclose(grads, jax.grad(closed_form)(BINARY), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("direction", ["clean_to_adversarial", "adversarial_to_clean"])
def test_trades_is_its_two_terms_at_the_attacked_point(direction):
    shift = 0.1

    def attack(logits_fn, key, x, y):
        assert y.shape == (N, K)  # the clean logits, not the labels
        return x + shift

    losses, _, metrics, grads = value_and_grad(trades(attack, beta=3.0, kl_direction=direction))

    def by_hand(params):
        clean = network(params, {"calls": 0}, BATCH["image"], True, None)[0]
        moved = network(params, {"calls": 0}, BATCH["image"] + shift, True, None)[0]
        pair = (moved, clean) if direction == "clean_to_adversarial" else (clean, moved)
        return cross_entropy(clean, BATCH["label"]) + 3.0 * kl_divergence(*pair)

    np.testing.assert_allclose(losses, by_hand(PARAMS), rtol=1e-5)
    assert_trees_close(grads, jax.grad(lambda p: by_hand(p).mean())(PARAMS), rtol=1e-4, atol=1e-6)
    assert (np.asarray(metrics["divergence"]) > 0).all()


def by_shift(logits_fn, key, x, y):
    assert y.shape == (N,)  # the labels
    return x + 0.3


def mart_by_hand(params, beta, guard):
    """The printed formula, in float64."""

    def softmax(x):
        w, v = (np.asarray(params[name], float) for name in "wv")
        return special.softmax(np.tanh(x @ w) @ v, axis=1)

    x, y, rows = np.asarray(BATCH["image"], float), np.asarray(BATCH["label"]), np.arange(N)
    clean, moved = softmax(x), softmax(x + 0.3)
    largest_other = np.where(np.arange(K) == y[:, None], 0, moved).max(axis=1)
    boosted = -np.log(moved[rows, y]) - np.log(1 + guard - largest_other)
    divergence = (clean * np.log(clean / moved)).sum(axis=1)
    return boosted + beta * divergence * (1 - clean[rows, y]), divergence


# Each is in one of the terms alone.
@pytest.mark.parametrize("beta, guard", [(0.0, 1e-4), (6.0, 0.0)])
def test_mart_is_its_two_terms_at_the_attacked_point(beta, guard):
    losses, state, metrics, grads = value_and_grad(mart(by_shift, beta=beta, guard=guard))
    expected, divergence = mart_by_hand(PARAMS, beta, guard)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["divergence"], divergence, rtol=1e-3, atol=1e-6)
    assert state["calls"] == 2

    # The derivative along the gradient, by central differences of the formula.
    step = 1e-5

    def moved(sign):
        return {name: PARAMS[name].astype(float) + sign * step * grads[name] for name in PARAMS}

    with jax.enable_x64():
        ahead, behind = (mart_by_hand(moved(sign), beta, guard)[0].mean() for sign in (1, -1))
    squared = sum(float((g**2).sum()) for g in grads.values())
    np.testing.assert_allclose((ahead - behind) / (2 * step), squared, rtol=1e-3)


def test_the_derivative_of_mart_flows_through_its_factor():
    def by_hand(params, factor):
        clean = network(params, {"calls": 0}, BATCH["image"], True, None)[0]
        moved = network(params, {"calls": 0}, BATCH["image"] + 0.3, True, None)[0]
        doubt = factor(1 - jnp.exp(-cross_entropy(clean, BATCH["label"])))
        boosted = boosted_cross_entropy(moved, BATCH["label"])
        return (boosted + 6.0 * kl_divergence(moved, clean) * doubt).mean()

    *_, grads = value_and_grad(mart(by_shift))
    through = jax.grad(by_hand)(PARAMS, lambda doubt: doubt)
    assert_trees_close(grads, through, rtol=1e-3, atol=1e-5)
    held = jax.grad(by_hand)(PARAMS, jax.lax.stop_gradient)
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), through, held)
    assert min(difference.values()) > 1e-3


@pytest.mark.parametrize("guard", [0.0, 1e-4])
def test_mart_without_perturbation_is_the_boosted_cross_entropy(guard):
    objective = mart(pgd(ThreatModel(LInf(), 0.0), steps=2), guard=guard)
    losses, _, metrics, grads = value_and_grad(objective)
    boosted = standard(lambda logits, y: boosted_cross_entropy(logits, y, guard=guard))
    expected, _, _, expected_grads = value_and_grad(boosted)
    np.testing.assert_array_equal(metrics["divergence"], 0)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert_trees_close(grads, expected_grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("guard", [0.0, 1e-4])
def test_mart_is_finite_at_extreme_logits(guard):
    """Logits +-100 from which the attack goes to the other end: right to wrong, wrong to right."""

    def scaled(scale, model_state, x, train, key):
        return x * scale, model_state

    y, other = (200 * jax.nn.one_hot((BATCH["label"] + i) % K, K) - 100 for i in (0, 1))
    wrong = jnp.arange(N) % 2 == 0

    def attack(logits_fn, key, x, labels):
        return jnp.where(wrong[:, None], y, other)

    batch = {**BATCH, "image": jnp.where(wrong[:, None], other, y)}
    objective = mart(attack, guard=guard)
    losses, _, metrics, grads = value_and_grad(objective, jnp.ones(K), scaled, batch)
    np.testing.assert_array_equal(metrics["accuracy"], ~wrong)
    np.testing.assert_array_equal(metrics["robust_accuracy"], wrong)
    # Wrong at first: the divergence, 200, counts in full. Right at first: its factor is zero.
    boosted = 200 - np.log(guard + (K - 1) * np.exp(-200.0))
    np.testing.assert_allclose(losses, np.where(wrong, 6 * 200, boosted), rtol=1e-5)
    assert np.isfinite(grads).all()


def test_a_constant_model_has_no_divergence():
    def constant(params, model_state, x, train, key):
        return jnp.zeros((len(x), K)) + params.sum(), model_state

    objective = trades(trades_attack(ThreatModel(LInf(), 0.3)))
    losses, _, metrics, _ = value_and_grad(objective, BINARY, constant)
    np.testing.assert_array_equal(metrics["divergence"], 0)
    np.testing.assert_allclose(losses, np.log(K), rtol=1e-6)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_attack_leaves_the_statistics_alone(mode):
    threat = ThreatModel(LInf(), 0.1)
    attack, divergence_attack = pgd(threat, steps=2), trades_attack(threat, steps=2)
    for objective, calls in (
        (madry(attack, attack_mode=mode), 1),
        (trades(divergence_attack, attack_mode=mode), 2),
        (mart(attack, attack_mode=mode), 2),
    ):
        _, (state, _) = call(jit(objective(network)), BATCH)
        assert state["calls"] == calls


def test_no_gradient_through_the_attack():
    """The gradient is that at the attacked inputs, held fixed (Danskin)."""
    attack = pgd(ThreatModel(L2(), 0.3), steps=4)
    seen = {}

    def spy(logits_fn, key, x, y):
        seen["x"] = attack(logits_fn, key, x, y)
        return seen["x"]

    loss_fn = madry(spy)(network)
    grads = jax.grad(lambda p: loss_fn(p, {"calls": 0}, KEY, BATCH)[0].mean())(PARAMS)
    fixed = jax.lax.stop_gradient(seen["x"])
    expected = jax.grad(
        lambda p: cross_entropy(
            network(p, {"calls": 0}, fixed, True, None)[0], BATCH["label"]
        ).mean()
    )(PARAMS)
    assert_trees_close(grads, expected, rtol=1e-5, atol=1e-7)
    assert float(jnp.abs(fixed - BATCH["image"]).max()) > 0.01


def test_adversarial_training_raises_the_loss():
    losses, _, metrics, _ = value_and_grad(madry(pgd(ThreatModel(LInf(), 0.3), steps=5)))
    clean, _, _, _ = plain_training()
    assert float(losses.mean()) > float(clean.mean())
    assert set(metrics) == {"loss", "robust_accuracy"}


def test_an_example_is_attacked_alike_wherever_it_stands_in_the_batch():
    objective = madry(pgd(ThreatModel(LInf(), 0.3), steps=2))
    losses, *_ = value_and_grad(objective)
    order = RNG.permutation(N)
    shuffled = {name: value[order] for name, value in BATCH.items()}
    permuted, *_ = value_and_grad(objective, batch=shuffled)
    np.testing.assert_allclose(permuted, losses[order], rtol=1e-5)


# Stages: the attack and the loss apart.

THREAT = ThreatModel(LInf(), 0.2)
WITH_STEP = {**BATCH, "step": jnp.asarray(2, jnp.int32)}
STAGED = {
    "standard": standard(),
    "madry": madry(pgd(THREAT, steps=2)),
    "trades": trades(trades_attack(THREAT, steps=2, step_size=0.1)),
    "mart": mart(pgd(THREAT, steps=2)),
    "scheduled": scheduled(
        lambda eps: madry(pgd(ThreatModel(LInf(), eps), steps=2)), lambda step: 0.1 * step
    ),
    "scheduled standard": scheduled(lambda _: standard(), lambda step: step),
}
ATTACKING = [name for name in STAGED if "standard" not in name]


def modal(params, model_state, x, train, key):
    """Another function in each mode, and a count of the passes in training mode."""
    assert (key is None) is not train
    logits, model_state = network(params, model_state, x, train, key)
    return logits * (1.5 if train else 1.0), model_state


def call(function, *arguments, **options):
    """``function`` at the parameters, from statistics that count from zero."""
    return function(PARAMS, {"calls": jnp.zeros(())}, KEY, *arguments, **options)


@functools.cache
def found_by(name):
    """The batch of the inner stage: what takes time is compiling its attack."""
    return call(stages(STAGED[name](modal)).inner, WITH_STEP)


@functools.cache
def whole_of(name):
    return call(STAGED[name](modal), WITH_STEP)


@pytest.mark.parametrize("name", STAGED)
def test_a_loss_is_its_outer_stage_at_what_the_inner_one_finds(name):
    parts, found = stages(STAGED[name](modal)), found_by(name)
    added = {"adversarial"} if name in ATTACKING else set()
    assert found.keys() == WITH_STEP.keys() | added
    for field in WITH_STEP:
        np.testing.assert_array_equal(found[field], WITH_STEP[field])
    if added:
        moved = jnp.abs(found["adversarial"] - WITH_STEP["image"]).max()
        np.testing.assert_allclose(moved, 0.2, rtol=1e-5)
    whole, (state, metrics) = whole_of(name)
    apart, (state_apart, metrics_apart) = call(parts.outer, found)
    assert_trees_close((apart, metrics_apart), (whole, metrics), rtol=0)
    assert state_apart["calls"] == state["calls"] == (2 if name in ("trades", "mart") else 1)


@pytest.mark.parametrize("name", ATTACKING)
def test_no_derivative_of_the_inner_stage(name):
    inner = STAGED[name](network).inner

    def found(params, x):
        batch = {**WITH_STEP, "image": x}
        return inner(params, {"calls": jnp.zeros(())}, KEY, batch)["adversarial"]

    arguments = PARAMS, BATCH["image"]
    value, tangent = jax.jvp(found, arguments, arguments)
    assert float(jnp.abs(value - BATCH["image"]).max()) > 0.1
    np.testing.assert_array_equal(tangent, 0)


def test_no_tangent_enters_the_attack():
    """An attack may contain what has no forward-mode derivative."""

    @jax.custom_vjp
    def reverse_only(x):
        return x

    reverse_only.defvjp(lambda x: (x, None), lambda _, g: (g,))

    def attack(logits_fn, key, x, y):
        return x + 0.1 * jnp.sign(jax.grad(lambda x: reverse_only(logits_fn(x)).sum())(x))

    loss_fn = madry(attack)(network)
    _, tangent = jax.jvp(
        lambda p: call(lambda _, *a: loss_fn(p, *a)[0], BATCH), (PARAMS,), (PARAMS,)
    )
    assert float(jnp.abs(tangent).max()) > 0


@pytest.mark.parametrize("name", STAGED)
def test_the_outer_stage_in_evaluation_mode(name):
    """It is the loss of the model in evaluation mode, and no pass is counted."""
    parts, found = stages(STAGED[name](modal)), found_by(name)
    losses, (state, metrics) = call(parts.outer, found, train=False)
    assert state["calls"] == 0
    np.testing.assert_array_equal(metrics["loss"], losses)

    def logits(x):
        return modal(PARAMS, {"calls": 0}, x, False, None)[0]

    y = BATCH["label"]
    clean, attacked = logits(BATCH["image"]), logits(found.get("adversarial", BATCH["image"]))
    if name == "trades":
        expected = cross_entropy(clean, y) + 6 * kl_divergence(attacked, clean)
    elif name == "mart":
        doubt = 1 - jnp.exp(-cross_entropy(clean, y))
        expected = boosted_cross_entropy(attacked, y) + 6 * kl_divergence(attacked, clean) * doubt
    else:
        expected = cross_entropy(attacked, y)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(losses - call(parts.outer, found)[0]).max()) > 0.01


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", STAGED)
def test_the_outer_stage_of_a_part_of_the_batch(name, train):
    parts, found = stages(STAGED[name](modal)), found_by(name)
    whole, (_, metrics) = call(parts.outer, found, train=train)
    part = {field: v if v.ndim == 0 else v[1:4] for field, v in found.items()}
    losses, (_, part_metrics) = call(parts.outer, part, train=train)
    np.testing.assert_allclose(losses, whole[1:4], rtol=1e-5, atol=1e-6)
    assert_trees_close(
        part_metrics, {field: v[1:4] for field, v in metrics.items()}, rtol=1e-4, atol=1e-6
    )


def test_a_plain_loss_has_no_inner_stage():
    def plain(params, model_state, key, batch):
        return cross_entropy(batch["image"] @ params["w"], batch["label"]), (model_state, {})

    parts = stages(plain)
    assert call(parts.inner, BATCH) is BATCH
    assert_trees_close(call(parts, BATCH), call(plain, BATCH), rtol=0)
    assert_trees_close(call(parts.outer, BATCH), call(plain, BATCH), rtol=0)
    with pytest.raises(ValueError, match="argument train"):
        call(parts.outer, BATCH, train=False)


def test_a_plain_loss_with_modes_has_both():
    def plain(params, model_state, key, batch, train=True):
        return jnp.full(N, 2.0 if train else 1.0), (model_state, {})

    parts = stages(plain)
    assert [float(call(parts.outer, BATCH, train=t)[0][0]) for t in (True, False)] == [2, 1]
    assert float(call(parts, BATCH)[0][0]) == 2


def test_stages_of_stages_are_themselves():
    loss_fn = madry(by_shift)(network)
    assert isinstance(loss_fn, Stages)
    assert stages(loss_fn) is loss_fn


@pytest.mark.parametrize("name", STAGED)
def test_outer_only_attacks_no_more(name):
    found, second = found_by(name), outer_only(STAGED[name](modal))
    assert call(second.inner, found) is found
    assert_trees_close(call(second, found)[0], whole_of(name)[0], rtol=0)
    # With other inputs to attack but the same attacked ones, only what looks at the clean ones
    # changes.
    elsewhere = call(second, {**found, "image": found["image"] + 1})[0]
    clean_matters = name not in ("madry", "scheduled")
    assert (float(jnp.abs(elsewhere - call(second, found)[0]).max()) > 0) is clean_matters


def test_a_schedule_reaches_both_stages():
    """The attack moves by the scheduled value, and the loss is that many cross-entropies."""

    def objective_at(value):
        return madry(
            lambda logits_fn, key, x, y: x + value, loss=lambda z, y: value * cross_entropy(z, y)
        )

    parts = scheduled(objective_at, lambda step: 0.25 * step)(network)
    for step in (0, 1, 4):
        batch = {**BATCH, "step": jnp.asarray(step, jnp.int32)}
        found = call(parts.inner, batch)
        np.testing.assert_allclose(found["adversarial"], BATCH["image"] + 0.25 * step, rtol=1e-6)
        logits = network(PARAMS, {"calls": 0}, found["adversarial"], True, None)[0]
        expected = 0.25 * step * cross_entropy(logits, BATCH["label"])
        np.testing.assert_allclose(call(parts.outer, found)[0], expected, rtol=1e-5)
        np.testing.assert_allclose(call(parts, batch)[0], expected, rtol=1e-5)
