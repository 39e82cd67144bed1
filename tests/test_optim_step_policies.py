"""Steps that follow the loss: the bound on separable data, and halving line search."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax.norms import L1, L2, LInf
from robustjax.optim import scale_by_loss_bound, scale_by_steepest

RNG = np.random.default_rng(0)
N, D = 4, 12
TRUE = RNG.normal(size=D)
X = RNG.normal(size=(N, D))
Z = jnp.asarray(np.sign(X @ TRUE)[:, None] * X, jnp.float32)  # y_i x_i


def loss(w):
    return jnp.exp(-Z @ w).mean()


def descend(norm, steps):
    """Losses and iterates of steepest descent with the bound as its step."""
    radius = norm.dual.value(Z, batch_ndim=1).max()
    transform = optax.chain(
        scale_by_steepest(norm, scale_by_dual_norm=True),
        scale_by_loss_bound(radius),
        optax.scale(-1.0),
    )

    def step(carry, _):
        w, state = carry
        value, gradient = jax.value_and_grad(loss)(w)
        updates, state = transform.update(gradient, state, w, value=value)
        return (w + updates, state), (value, w)

    w = jnp.zeros(D)
    return jax.jit(lambda w: jax.lax.scan(step, (w, transform.init(w)), length=steps)[1])(w)


@pytest.mark.parametrize("norm", [L2(), LInf(), L1()], ids=lambda n: n.name)
def test_the_loss_falls_and_the_margin_grows_to_the_largest(norm):
    values, iterates = descend(norm, 400)
    assert (np.diff(values) <= 1e-7).all()
    # The softmax form: the step is steepest(Z^T p) / B^2 with p the weights of the examples.
    p = jax.nn.softmax(-Z @ iterates[3])
    radius = norm.dual.value(Z, batch_ndim=1).max()
    direction = Z.T @ p
    step = norm.dual.value(direction) * norm.steepest(direction) / radius**2
    np.testing.assert_allclose(iterates[4] - iterates[3], step, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(-jax.grad(lambda w: jnp.log(loss(w)))(iterates[3]), direction,
                               rtol=1e-3, atol=1e-5)  # fmt: skip
    # p is a point of the simplex: ||Z^T p||_* bounds the largest margin from above.
    margin = (Z @ iterates[-1]).min() / norm.value(iterates[-1])
    bound = norm.dual.value(Z.T @ jax.nn.softmax(-Z @ iterates[-1]))
    assert 0.85 * bound <= margin <= bound + 1e-5


def test_the_largest_factor_and_the_missing_loss(plain_calls):
    transform = scale_by_loss_bound(2.0, max_step=3.0)
    state = transform.init(jnp.ones(2))
    scaled, _ = transform.update(jnp.ones(2), state, value=0.5)
    np.testing.assert_allclose(scaled, 0.5)  # 1 / (4 * 0.5)
    for value in (1e-3, 0.0):
        scaled, _ = transform.update(jnp.ones(2, jnp.bfloat16), state, value=value)
        np.testing.assert_allclose(scaled.astype(jnp.float32), 3)
        assert scaled.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="value must be the loss"):
        transform.update(jnp.ones(2), state)
    with pytest.raises(ValueError, match="data_norm must be > 0, got 0"):
        scale_by_loss_bound(0)


def test_halving_line_search_of_optax_meets_a_hand_count():
    """On ``5 x^2`` from 1000: the first ``g`` with ``f(x - g f') <= f - 1e-4 g f'^2``."""
    search = optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=20, slope_rtol=1e-4, decrease_factor=0.5,
        increase_factor=np.inf, max_learning_rate=1000.0,
    )  # fmt: skip

    def f(x):
        return 5 * x**2

    x = jnp.array(0.7)
    value, gradient = jax.value_and_grad(f)(x)
    state = search.init(x)
    update, _ = search.update(-gradient, state, x, value=value, grad=gradient, value_fn=f)
    size = 1000.0
    while f(x - size * gradient) > value - 1e-4 * size * gradient**2:
        size /= 2
    np.testing.assert_allclose(update, -size * gradient, rtol=1e-5)
