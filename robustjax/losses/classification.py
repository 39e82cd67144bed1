"""Losses of logits and labels, one per example. An attack maximises them; training minimises."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int

from robustjax import checks


def cross_entropy(logits: Float[Array, "n k"], y: Int[Array, " n"]) -> Float[Array, " n"]:
    """Softmax cross-entropy ``-z_y + logsumexp(z)`` in nats, computed in float32.

    Args:
      logits: scores ``(n, K)``; ``K >= 2``.
      y: labels ``(n,)`` in ``0 .. K-1``.

    Raises:
      ValueError: shapes, dtypes or labels do not fit.
    """
    checks.logits_and_labels(logits, y)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y)


def kl_divergence(
    logits: Float[Array, "n k"], reference: Float[Array, "n k"]
) -> Float[Array, " n"]:
    """``KL(softmax(reference) || softmax(logits))`` in nats, computed in float32.

    The order of the arguments is that of a loss, prediction first and target second, so this is
    what an attack maximises when its ``y`` are the clean logits (TRADES). Swap the arguments for
    the other direction. Zero where the two differ by a constant; never negative up to rounding.

    Args:
      logits: scores ``(n, K)`` of the distribution that is judged.
      reference: scores ``(n, K)`` of the distribution under which the mean is taken.

    Raises:
      ValueError: the shapes differ or are not ``(n, K)``.
    """
    if checks.array("logits", logits).ndim != 2:
        raise ValueError(f"logits must have shape (n, K), got {logits.shape}")
    checks.same_shape("reference", reference, "logits", logits)
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_p = jax.nn.log_softmax(reference.astype(jnp.float32))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def boosted_cross_entropy(
    logits: Float[Array, "n k"], y: Int[Array, " n"], *, guard: ArrayLike = 1e-4
) -> Float[Array, " n"]:
    """``-log p_y - log(1 + guard - max_{k != y} p_k)``: a cross-entropy with a margin term.

    Args:
      logits: scores ``(n, K)``; ``K >= 2``.
      y: labels ``(n,)`` in ``0 .. K-1``.
      guard: keeps the second logarithm finite where another class takes all; ``>= 0``. The authors'
        code has 1e-4, the formula 0.

    Raises:
      ValueError: shapes, dtypes or labels do not fit, or ``guard`` is negative.

    Source: Wang et al. (2020), "Improving adversarial robustness requires revisiting misclassified
    examples", equation (8).
    """
    checks.logits_and_labels(logits, y)
    checks.number("guard", guard, at_least=0)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    classes = jnp.arange(logits.shape[1])
    is_label = classes == y[:, None]
    other = jnp.argmax(jnp.where(is_label, -jnp.inf, log_p), axis=1)
    # 1 - p_other as a sum over the rest: the difference rounds to zero in float32 near p = 1.
    log_rest = jax.nn.logsumexp(jnp.where(classes == other[:, None], -jnp.inf, log_p), axis=1)
    log_label = jnp.sum(jnp.where(is_label, log_p, 0), axis=1)
    return -log_label - jnp.logaddexp(jnp.log(guard), log_rest)
