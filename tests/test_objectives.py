"""Objectives: limits, closed forms on linear models, and what the attack may not touch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.attacks import fgsm, pgd
from robustjax.losses import cross_entropy, kl_divergence
from robustjax.norms import L2, LInf
from robustjax.objectives import madry, standard, trades, trades_attack
from robustjax.threat import ThreatModel

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

    (_, aux), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return *aux, grads


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


NOTHING = {
    "madry": madry(pgd(ThreatModel(LInf(), 0.0), steps=3)),
    "madry-fgsm": madry(fgsm(ThreatModel(L2(), 0.0))),
    "trades": trades(trades_attack(ThreatModel(LInf(), 0.0))),
    "trades-beta-0": trades(trades_attack(ThreatModel(LInf(), 0.3)), beta=0.0),
}


@pytest.mark.parametrize("name", NOTHING)
def test_without_perturbation_it_is_standard_training(name):
    losses, _, _, grads = value_and_grad(NOTHING[name])
    expected, _, _, expected_grads = value_and_grad(standard())
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
    _, state, _, _ = value_and_grad(madry(pgd(threat, steps=2), attack_mode=mode))
    assert state["calls"] == 1
    _, state, _, _ = value_and_grad(trades(trades_attack(threat, steps=2), attack_mode=mode))
    assert state["calls"] == 2


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
    clean, _, _, _ = value_and_grad(standard())
    assert float(losses.mean()) > float(clean.mean())
    assert set(metrics) == {"loss", "robust_accuracy"}


def test_an_example_is_attacked_alike_wherever_it_stands_in_the_batch():
    objective = madry(pgd(ThreatModel(LInf(), 0.3), steps=2))
    losses, *_ = value_and_grad(objective)
    order = RNG.permutation(N)
    shuffled = {name: value[order] for name, value in BATCH.items()}
    permuted, *_ = value_and_grad(objective, batch=shuffled)
    np.testing.assert_allclose(permuted, losses[order], rtol=1e-5)
