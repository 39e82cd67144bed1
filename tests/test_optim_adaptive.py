import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from trajectories import PARAMS, STEPS, assert_close, assert_equal, gradients, rows, run

from robustjax.optim import scale_by_adaptive_family, sign_gd

FAMILY = {
    "adam": ((1 - 0.9, 1 - 0.999, 1e-8, True), optax.adam),
    "rmsprop": (
        (1.0, 1 - 0.99, 1e-8, False),
        functools.partial(optax.rmsprop, decay=0.99, eps_in_sqrt=False, initial_scale=0.0),
    ),
    "sign": ((1.0, 1.0, 0.0, False), optax.sign_sgd),
}


def descent(lr, *arguments, **options):
    return optax.chain(
        scale_by_adaptive_family(*arguments, **options), optax.scale_by_learning_rate(lr)
    )


@pytest.mark.parametrize("name", FAMILY)
def test_is_the_optimizer_of_optax(name):
    arguments, theirs = FAMILY[name]
    found = run(descent(0.1, *arguments), gradients())[1]
    assert_close(found, run(theirs(0.1), gradients())[1], rtol=1e-6)


@pytest.mark.parametrize("beta1, beta2, eps, correct", [(0.3, 0.2, 1e-3, False), (0.6, 1, 0, True)])
def test_the_equations(beta1, beta2, eps, correct):
    updates = run(scale_by_adaptive_family(beta1, beta2, eps, correct), gradients())[0]
    m = v = 0.0
    for t, g in enumerate(rows(gradients()), start=1):
        m = beta1 * g + (1 - beta1) * m
        v = beta2 * g**2 + (1 - beta2) * v
        scales = (1 - (1 - beta1) ** t, 1 - (1 - beta2) ** t) if correct else (1, 1)
        expected = m / scales[0] / (np.sqrt(v / scales[1]) + eps)
        np.testing.assert_allclose(rows(updates)[t - 1], expected, rtol=1e-5, atol=1e-6)


def test_sign_descent_to_the_bit_with_zeros():
    grads = gradients()
    grads["b"][:, 0] = 0
    found = run(descent(0.1, 1.0, 1.0, 0.0), grads)[0]
    assert_equal(found, run(sign_gd(0.1), grads)[0])
    assert not np.any(found["b"][:, 0]) and np.all(found["b"][:, 1])


def test_constant_gradient():
    constant = jax.tree.map(lambda p: np.broadcast_to(p, (STEPS, *p.shape)), PARAMS)
    adam = run(descent(0.1, 0.1, 0.001, bias_correction=True), constant)[0]
    np.testing.assert_allclose(rows(adam), -0.1 * np.sign(rows(constant)), rtol=1e-4)
    rmsprop = run(descent(0.1, 1.0, 0.01), constant)[0]
    shrinking = 0.1 / np.sqrt(1 - 0.99 ** np.arange(1, STEPS + 1))
    assert shrinking[0] == pytest.approx(1.0)
    expected = -shrinking[:, None] * np.sign(rows(constant))
    np.testing.assert_allclose(rows(rmsprop), expected, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILY)
def test_without_eps_the_scale_of_the_loss_does_not_matter(name):
    beta1, beta2, _, correct = FAMILY[name][0]
    transform = descent(0.1, beta1, beta2, 0.0, correct)
    scaled = jax.tree.map(lambda g: 1e-4 * g, gradients())
    assert_close(run(transform, scaled)[1], run(transform, gradients())[1])
    plain = optax.sgd(0.1)
    assert not np.allclose(rows(run(plain, scaled)[1]), rows(run(plain, gradients())[1]))


@pytest.mark.parametrize("name", ["sgd", *FAMILY])
def test_only_sgd_is_equivariant_to_rotations(name):
    rotation = scipy.stats.ortho_group.rvs(4, random_state=0)
    g = np.random.default_rng(0).normal(size=(STEPS, 4))
    transform = optax.sgd(0.1) if name == "sgd" else descent(0.1, *FAMILY[name][0])
    start = np.arange(4.0)

    def end(g, start):
        trajectory = run(transform, jnp.asarray(g, jnp.float32), jnp.asarray(start, jnp.float32))
        return np.asarray(trajectory[1][-1])

    difference = np.abs(end(g @ rotation.T, rotation @ start) - rotation @ end(g, start)).max()
    assert difference < 1e-5 if name == "sgd" else difference > 1e-2


def test_zero_gradients():
    zeros = jax.tree.map(np.zeros_like, gradients())
    for eps in (0.0, 1e-8):
        for correct in (False, True):
            updates = run(scale_by_adaptive_family(0.1, 0.001, eps, correct), zeros)[0]
            assert not np.any(rows(updates))


@pytest.mark.parametrize("arrays", [False, True], ids=["numbers", "arrays"])
def test_dtypes_are_kept_and_state_is_arrays(arrays):
    wrap = jnp.float32 if arrays else float
    params = {"w": PARAMS["w"].astype(jnp.bfloat16), "b": PARAMS["b"]}
    transform = scale_by_adaptive_family(wrap(0.1), wrap(0.1), wrap(1e-8), bias_correction=True)
    updates, _, state = run(transform, gradients(like=params), params)
    for tree in (updates, state.mu, state.nu):
        assert {k: v.dtype for k, v in tree.items()} == {"w": jnp.bfloat16, "b": jnp.float32}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(transform.init(params)))
    expected = run(scale_by_adaptive_family(0.1, 0.1, bias_correction=True), gradients())[0]
    np.testing.assert_allclose(rows(updates), rows(expected), atol=0.1)


def test_injected_hyperparameters():
    make = optax.inject_hyperparams(scale_by_adaptive_family)
    betas = optax.linear_schedule(0.1, 1.0, 3)
    updates, _, state = run(make(beta1=betas, beta2=betas, eps=0.0), gradients())
    assert state.hyperparams["beta1"] == 1
    np.testing.assert_array_equal(rows(updates)[-1], np.sign(rows(gradients())[-1]))


@pytest.mark.usefixtures("plain_calls")
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0.0, 0.5), "beta1 must be > 0, got 0.0"),
        ((0.5, 1.5), "beta2 must be <= 1, got 1.5"),
        ((float("nan"), 0.5), "beta1 must be a number, got nan"),
        ((0.5, "0.9"), "beta2 must be a number, got '0.9'"),
        ((0.5, 0.5, -1e-8), "eps must be >= 0, got -1e-08"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        scale_by_adaptive_family(*arguments)
