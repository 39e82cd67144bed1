"""Exact statements about adversarial training that span several rooms of the library."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import brentq

from robustjax import models
from robustjax.attacks import fgsm, pgd
from robustjax.losses import cross_entropy
from robustjax.norms import L2, LInf
from robustjax.objectives import (
    cure,
    first_order,
    grad_align,
    madry,
    penalized,
    soar,
    standard,
)
from robustjax.theory import logistic_regression as logistic
from robustjax.threat import ThreatModel
from robustjax.training import create_state, train_step

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
N, D, K = 6, 5, 3
X = jnp.asarray(RNG.uniform(0.2, 0.8, size=(N, D)), jnp.float32)
Y = jnp.arange(N, dtype=jnp.int32) % K
BATCH = {"image": X, "label": Y, "index": jnp.arange(N, dtype=jnp.int32)}
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(D, 8)), jnp.float32),
    "v": jnp.asarray(RNG.normal(size=(8, K)), jnp.float32),
}
W = jnp.asarray(RNG.normal(size=D), jnp.float32)


def smooth(params, x):
    return jax.nn.softplus(x @ params["w"]) @ params["v"]


MODEL = models.from_function(smooth)


def binary(x):
    score = x @ W
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


# The second-order surrogate


@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("y", [0, 1])
def test_the_second_order_expansion_is_exact_at_a_point_between(y, scale):
    """Lagrange: ``l(x + d) = l(x) + g.d + d^T Hess(x + h d) d / 2`` for some ``0 < h < 1``."""
    with jax.enable_x64(True):
        w, x, delta = np.random.default_rng(y).normal(size=(3, 4))
        delta = scale * delta
        at = jax.jit(lambda z: logistic.expansion(jnp.asarray(w), z, y))
        here, there = at(jnp.asarray(x)), at(jnp.asarray(x + delta))
        rest = float(there.loss - here.loss - here.gradient @ delta)

        def gap(h):
            return float(delta @ at(jnp.asarray(x + h * delta)).hessian @ delta / 2) - rest

        grid = np.linspace(0, 1, 33)
        gaps = np.array([gap(h) for h in grid])
        low, high = sorted(grid[[gaps.argmin(), gaps.argmax()]])
        assert gaps.min() < 0 < gaps.max()  # the remainder is a mean of what lies between
        h = brentq(gap, low, high, xtol=1e-14)
        assert 0 < h < 1
        found = here.loss + here.gradient @ delta
        found += delta @ at(jnp.asarray(x + h * delta)).hessian @ delta / 2
        np.testing.assert_allclose(found, there.loss, rtol=1e-12)
        # Not that of the surrogate, which takes the Hessian at x.
        assert abs(gap(0.0)) > 1e-3 * rest > 0


# Adversarial training


def test_adversarial_training_of_radius_zero_is_empirical_risk_minimisation():
    """Every parameter is the same, to the last bit, after several updates."""
    optimizer = optax.sgd(0.3, momentum=0.9)

    def trained(objective):
        step = train_step(MODEL.apply, objective, optimizer)
        state = create_state(PARAMS, {}, optimizer, KEY)

        @jax.jit
        def steps(params):
            def body(state, _):
                state, _ = step(state, BATCH)
                return state, None

            return jax.lax.scan(body, state._replace(params=params), length=5)[0].params

        return steps(PARAMS)

    expected = trained(standard())
    assert all(jnp.abs(expected[name] - PARAMS[name]).max() > 0.01 for name in PARAMS)
    for attack in (
        pgd(ThreatModel(LInf(), 0.0), steps=2),
        fgsm(ThreatModel(L2(), 0.0)),
    ):
        jax.tree.map(np.testing.assert_array_equal, trained(madry(attack)), expected)


PENALTIES = soar(0.1), first_order(0.1), grad_align(0.1), cure(0.1)


def test_a_penalty_of_a_batch_is_that_of_each_example_alone():
    """A gradient of the mean loss in place of the sum would shrink with the batch."""

    @jax.jit
    def each(batch):
        losses = [penalized(standard(), penalty)(MODEL.apply) for penalty in PENALTIES]
        return jnp.stack([f(PARAMS, {}, KEY, batch)[1][1]["penalty"] for f in losses])

    whole = each(BATCH)
    alone = [each({name: v[i : i + 1] for name, v in BATCH.items()}) for i in range(N)]
    assert (whole > 1e-6).all()
    np.testing.assert_allclose(np.concatenate(alone, axis=1), whole, rtol=2e-3, atol=1e-6)


def test_the_point_of_expansion_is_held():
    """The gradient of SOAR is that at an attacked input which does not move with the parameters."""
    threat = ThreatModel(L2(), 0.2, lower=-jnp.inf, upper=jnp.inf)
    loss_fn = penalized(madry(fgsm(threat)), soar(0.1), at="adversarial")(MODEL.apply)

    def step_of(params):
        gradient = jax.grad(lambda x: cross_entropy(smooth(params, x), Y).sum())(X)
        return X + 0.2 * L2().steepest(gradient, batch_ndim=1)

    def at(x_adv):
        return lambda p: loss_fn.outer(p, {}, KEY, {**BATCH, "adversarial": x_adv(p)})[0].mean()

    @jax.jit
    def gradients(params):
        whole = jax.grad(lambda p: loss_fn(p, {}, KEY, BATCH)[0].mean())(params)
        frozen = jax.lax.stop_gradient(step_of(params))
        return whole, jax.grad(at(lambda p: frozen))(params), jax.grad(at(step_of))(params)

    whole, held, through = gradients(PARAMS)
    for name in PARAMS:
        np.testing.assert_allclose(whole[name], held[name], rtol=1e-4, atol=1e-5)
        assert jnp.abs(through[name] - held[name]).max() > 0.01


# The attacks inside it


def test_one_step_is_the_maximum_where_the_gradient_keeps_its_sign():
    """And a longer attack cannot beat it: a network that is monotone in every pixel."""
    eps, signs = 0.15, np.sign(np.asarray(W))
    hidden = jnp.abs(PARAMS["w"]) * signs[:, None]
    out = jnp.abs(PARAMS["v"][:, 0])

    def monotone(x):
        score = jnp.tanh(x @ hidden) @ out
        return jnp.stack([jnp.zeros_like(score), score], axis=-1)

    y, threat = Y % 2, ThreatModel(LInf(), eps)
    attacks = fgsm(threat), pgd(threat, steps=8, iterate="best")
    one, many = jax.jit(lambda x: [attack(monotone, KEY, x, y) for attack in attacks])(X)
    side = np.where(np.asarray(y) == 0, 1, -1)[:, None] * signs
    np.testing.assert_allclose(one, X + eps * side, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(one - X, axis=1), eps * math.sqrt(D), rtol=1e-5)

    loss = jax.jit(lambda x: cross_entropy(monotone(x), y))
    best = loss(one)
    assert (loss(many) <= best + 1e-6).all()
    for corner in itertools.product([-eps, eps], repeat=D):
        assert (loss(X + jnp.asarray(corner, jnp.float32)) <= best + 1e-6).all()


@pytest.mark.parametrize("step_size", [0.07, 0.25, 0.7])
def test_a_linear_model_is_maximised_in_as_many_steps_as_cross_the_ball(step_size):
    """``ceil(2 eps / alpha)`` from any start, and not one fewer from the opposite corner."""
    eps, y = 0.3, Y % 2
    threat = ThreatModel(LInf(), eps, lower=-jnp.inf, upper=jnp.inf)
    side = jnp.where(y == 0, 1, -1)[:, None] * jnp.sign(W)
    steps = math.ceil(2 * eps / step_size)
    attack = functools.partial(pgd, threat, step_size=step_size)

    def opposite(keys, x):
        return x - eps * side

    @jax.jit
    def run(x):
        starts = "zero", "uniform", opposite
        enough = [attack(steps=steps, start=start)(binary, KEY, x, y) for start in starts]
        return enough, attack(steps=steps - 1, start=opposite)(binary, KEY, x, y)

    enough, short = run(X)
    for x_adv in enough:
        np.testing.assert_allclose(x_adv, X + eps * side, atol=1e-6)
    missing = 2 * eps - (steps - 1) * step_size
    np.testing.assert_allclose(jnp.abs(X + eps * side - short), missing, atol=1e-5)
    assert missing > 0.01
