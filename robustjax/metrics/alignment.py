"""Local linearity of the loss in the input: alignment of gradients, error of the first order.

``logits_fn(x (n, ...)) -> (n, K)`` must treat examples apart (evaluation mode); everything is per
example, and differentiable, so that training can use it as a penalty.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robustjax import checks
from robustjax.losses import cross_entropy
from robustjax.norms import L2


class ForwardPass(NamedTuple):
    """A model's forward pass at some inputs, to be used more than once.

    Attributes:
      logits: its result, ``(n, K)``.
      pullback: from ``jax.vjp`` for the inputs: ``pullback(g (n, K)) -> ((n, ...),)``.
    """

    logits: Float[Array, "n k"]
    pullback: Callable


def input_gradient(
    logits_fn: Callable,
    x: Array,
    y: Array,
    loss: Callable = cross_entropy,
    forward_pass: ForwardPass | None = None,
) -> Float[Array, "n ..."]:
    """``d loss_i / d x_i`` of each example's loss, from the derivative of their sum.

    Args:
      logits_fn: ``(n, ...) -> (n, K)``.
      x: inputs ``(n, ...)``.
      y: labels, or whatever ``loss`` takes.
      loss: ``loss(logits, y) -> (n,)``.
      forward_pass: that of ``logits_fn`` at ``x``, if it has been run.
    """
    if forward_pass is None:
        return jax.grad(lambda x: loss(logits_fn(x), y).sum())(x)
    of_logits = jax.grad(lambda logits: loss(logits, y).sum())(forward_pass.logits)
    return forward_pass.pullback(of_logits)[0]


def cosine(a: Float[Array, "n ..."], b: Float[Array, "n ..."]) -> Float[Array, " n"]:
    """Cosine of the angle between ``a_i`` and ``b_i``, in ``[-1, 1]``; 1 where one of them is zero.

    The value at zero is that of Andriushchenko and Flammarion's code; the derivative there is zero.

    Raises:
      ValueError: the shapes differ.
    """
    checks.same_shape("b", b, "a", a)
    norm = L2()
    products = norm.steepest(a, batch_ndim=1) * norm.steepest(b, batch_ndim=1)
    defined = (norm.value(a, batch_ndim=1) > 0) & (norm.value(b, batch_ndim=1) > 0)
    return jnp.where(defined, products.reshape(products.shape[0], -1).sum(axis=1), 1)


def gradient_alignment(
    logits_fn: Callable,
    x: Float[Array, "n ..."],
    y: Array,
    perturbation: Float[Array, "n ..."],
    *,
    loss: Callable = cross_entropy,
) -> Float[Array, " n"]:
    """Cosine of the input gradients at ``x`` and at ``x + perturbation``, ``(n,)``.

    1 for a loss that is linear near ``x``. Its collapse from about 1 to about 0 within an epoch is
    the mark of catastrophic overfitting in single-step adversarial training. It does not change
    when the loss is multiplied by a positive number, but does when the logits are.

    Args:
      logits_fn: ``(n, ...) -> (n, K)``.
      x: inputs.
      y: labels, or whatever ``loss`` takes.
      perturbation: uniform in the ball of the threat model in the source; any ``(n, ...)``.
      loss: ``loss(logits, y) -> (n,)``.

    Source: Andriushchenko and Flammarion (2020), "Understanding and improving fast adversarial
    training", equation (5).
    """
    checks.same_shape("perturbation", perturbation, "x", x)
    return cosine(
        input_gradient(logits_fn, x, y, loss), input_gradient(logits_fn, x + perturbation, y, loss)
    )


def linearization_error(
    logits_fn: Callable,
    x: Float[Array, "n ..."],
    y: Array,
    perturbation: Float[Array, "n ..."],
    *,
    loss: Callable = cross_entropy,
) -> Float[Array, " n"]:
    """``|l(x + d) - l(x) - <d, grad l(x)>|`` for each example: what the first order misses.

    Arguments as for ``gradient_alignment``. For a quadratic loss it is ``|d^T A d| / 2``.

    Source: Andriushchenko (2024), "Understanding generalization and robustness in modern deep
    learning", figure 2.10; Qin et al. (2019), "Adversarial robustness through local linearization",
    equation (5).
    """
    checks.same_shape("perturbation", perturbation, "x", x)

    def losses(x):
        return loss(logits_fn(x), y)

    value, slope = jax.jvp(losses, (x,), (perturbation,))
    return jnp.abs(losses(x + perturbation) - value - slope)
