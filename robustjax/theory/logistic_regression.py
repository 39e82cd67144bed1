"""Logistic regression, where every surrogate of the attacked loss has a closed form.

For ``l = -log sigmoid(m)`` with the margin ``m = (2 y - 1) <w, x>``, ``f = sigmoid(<w, x>)``,
``r = f - y`` and ``u = f (1 - f) = |r| (1 - |r|)``, the input gradient is ``r w`` and the Hessian
``u w w^T``. So for a ball of radius eps, with ``||w||_*`` the dual norm,

==========================  ======================================================
``first_order_maximum``     ``l + eps |r| ||w||_*``                         (FOAR)
``second_order_maximum``    ``l + eps |r| ||w||_* + eps^2 u ||w||_*^2 / 2``
``worst_case``              ``softplus(-m + eps ||w||_*)``
``frobenius_bound``         ``l + (d eps^2 + 1) ||H||_F / 2 - 1/2``         (SOAR)
==========================  ======================================================

A confident and correct model has ``r, u -> 0``: the first two say that there is no attack although
``worst_case`` grows with ``||w||_*``, and a regulariser made of them vanishes together with its
gradient. That is why SOAR expands the loss at an attacked point.

Everything is differentiable, for one example, and in the dtype of its arrays.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", section 3.3.4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from robustjax import checks, norms
from robustjax.norms import LInf, Norm


class LogisticExpansion(NamedTuple):
    """The loss of one example and its derivatives in the input.

    Attributes:
      loss: ``l``.
      residual: ``r = f - y``.
      curvature: ``u = f (1 - f)``.
      gradient: ``r w``, ``(d,)``.
      hessian: ``u w w^T``, ``(d, d)``.
    """

    loss: Float[Array, ""]
    residual: Float[Array, ""]
    curvature: Float[Array, ""]
    gradient: Float[Array, " d"]
    hessian: Float[Array, "d d"]


def expansion(w: Float[Array, " d"], x: Float[Array, " d"], y: ArrayLike) -> LogisticExpansion:
    """Value, gradient and Hessian of the logistic loss in the input.

    Accurate for confident predictions too, where ``f`` itself rounds to 0 or 1.

    Args:
      w: weights ``(d,)``.
      x: input ``(d,)``.
      y: label, 0 or 1.

    Raises:
      ValueError: shapes differ, or the label is neither 0 nor 1.
    """
    side, margin = _margin(w, x, y)
    wrong = jax.nn.sigmoid(-margin)
    residual, curvature = -side * wrong, wrong * jax.nn.sigmoid(margin)
    return LogisticExpansion(
        jax.nn.softplus(-margin), residual, curvature, residual * w, curvature * jnp.outer(w, w)
    )


def first_order_maximum(
    w: Float[Array, " d"],
    x: Float[Array, " d"],
    y: ArrayLike,
    eps: ArrayLike,
    norm: Norm | None = None,
) -> Float[Array, ""]:
    """``l + eps |r| ||w||_*``: the maximum of the linearised loss, a lower bound of the worst case.

    Arguments as of ``worst_case``.
    """
    at = expansion(w, x, y)
    return at.loss + _reach(w, eps, norm) * jnp.abs(at.residual)


def second_order_maximum(
    w: Float[Array, " d"],
    x: Float[Array, " d"],
    y: ArrayLike,
    eps: ArrayLike,
    norm: Norm | None = None,
) -> Float[Array, ""]:
    """``l + eps |r| ||w||_* + eps^2 u ||w||_*^2 / 2``: the maximum of the quadratic model.

    Exact, and attained where the linearised loss is largest, ``eps sign(r) w / ||w||`` for l_2.
    Arguments as of ``worst_case``.
    """
    at, reach = expansion(w, x, y), _reach(w, eps, norm)
    return at.loss + reach * jnp.abs(at.residual) + jnp.square(reach) * at.curvature / 2


def worst_case(
    w: Float[Array, " d"],
    x: Float[Array, " d"],
    y: ArrayLike,
    eps: ArrayLike,
    norm: Norm | None = None,
) -> Float[Array, ""]:
    """``softplus(-m + eps ||w||_*)``: the maximum of the loss itself over the ball.

    Args:
      w: weights ``(d,)``.
      x: input ``(d,)``.
      y: label, 0 or 1.
      eps: radius, ``>= 0``.
      norm: of the ball; default ``LInf()``.

    Raises:
      ValueError: shapes differ, ``eps < 0``, or the label is neither 0 nor 1.
    """
    return jax.nn.softplus(_reach(w, eps, norm) - _margin(w, x, y)[1])


def augmented_frobenius(
    w: Float[Array, " d"], x: Float[Array, " d"], y: ArrayLike
) -> Float[Array, ""]:
    """``||H||_F = sqrt(u^2 ||w||_2^4 + 2 r^2 ||w||_2^2 + 1)``, ``H = [[K, g], [g^T, 1]]``."""
    at, square = expansion(w, x, y), jnp.vdot(w, w)
    return jnp.sqrt(jnp.square(at.curvature * square) + 2 * jnp.square(at.residual) * square + 1)


def reduced_determinant(
    w: Float[Array, " d"], x: Float[Array, " d"], y: ArrayLike
) -> Float[Array, ""]:
    """``||w||_2^2 (u - r^2)``: the determinant of ``H`` on the plane where it acts.

    ``H`` is zero across the span of ``(w / ||w||, 0)`` and ``(0, 1)``. In that basis it has the
    rows ``(u ||w||^2, r ||w||)`` and ``(r ||w||, 1)``. The determinant is
    ``||w||^2 |r| (1 - 2 |r|)``: zero, and ``H`` of rank one, at the decision boundary, positive for
    a correct prediction and negative for a wrong one.
    """
    at = expansion(w, x, y)
    wrong = jnp.abs(at.residual)
    return jnp.vdot(w, w) * wrong * (1 - 2 * wrong)


def frobenius_bound(
    w: Float[Array, " d"], x: Float[Array, " d"], y: ArrayLike, eps: ArrayLike
) -> Float[Array, ""]:
    """``l + (d eps^2 + 1) ||H||_F / 2 - 1/2``, above ``second_order_maximum`` for l_inf.

    Its excess over ``l`` tends to ``d eps^2 / 2``, not to 0, as the confidence grows.

    Source: Ma (2025), proposition 3.3.1, with ``||H||_F`` in the place of its estimate.
    """
    checks.number("eps", eps, at_least=0)
    factor = w.shape[0] * jnp.square(eps) + 1
    return expansion(w, x, y).loss + (factor * augmented_frobenius(w, x, y) - 1) / 2


def _margin(w: Array, x: Array, y: ArrayLike) -> tuple[Array, Array]:
    if checks.array("w", w).ndim != 1:
        raise ValueError(f"w must be weights of shape (d,), got shape {w.shape}")
    checks.same_shape("x", x, "w", w)
    if jnp.ndim(y):
        raise ValueError(f"y must be one label, got shape {jnp.shape(y)}")
    if checks.is_known(y):
        checks.choice("y", int(y), (0, 1))
    side = 2 * jnp.asarray(y, jnp.asarray(w).dtype) - 1
    return side, side * jnp.vdot(w, x)


def _reach(w: Array, eps: ArrayLike, norm: Norm | None) -> Array:
    checks.number("eps", eps, at_least=0)
    return eps * (LInf() if norm is None else norms.check(norm)).dual.value(w)
