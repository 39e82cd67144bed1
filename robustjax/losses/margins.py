"""Margin losses of logits: what an attack maximises to cross the decision boundary.

Every loss here grows as the attack succeeds. The untargeted ones are positive exactly where the
example is misclassified, the targeted ones exactly where it is classified as the target. At ties
between the largest other classes their derivative is shared evenly.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robustjax import checks


def _of_class(logits: Float[Array, "n k"], y: Int[Array, " n"]) -> Float[Array, " n"]:
    return jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]


def _largest_other(logits: Float[Array, "n k"], y: Int[Array, " n"]) -> Float[Array, " n"]:
    own = jax.nn.one_hot(y, logits.shape[-1], dtype=bool)
    return jnp.where(own, -jnp.inf, logits).max(axis=-1)


def margin(logits: Float[Array, "n k"], y: Int[Array, " n"]) -> Float[Array, " n"]:
    """``max_{j != y} z_j - z_y``, in units of the logits: positive iff misclassified.

    Args:
      logits: scores ``(n, K)``, ``K >= 2``.
      y: labels ``(n,)``.

    Raises:
      ValueError: shapes, dtypes or labels do not fit.
    """
    checks.logits_and_labels(logits, y)
    logits = logits.astype(jnp.float32)
    return _largest_other(logits, y) - _of_class(logits, y)


def soft_margin(logits: Float[Array, "n k"], y: Int[Array, " n"]) -> Float[Array, " n"]:
    """Soft logit margin ``logsumexp_{j != y} z_j - z_y``: negative iff ``p_y > 1/2``.

    A smooth upper bound of ``margin``, and equal to it for two classes. The cross-entropy is
    its softplus, hence flat where it is very negative; this is not.

    Args:
      logits: scores ``(n, K)``, ``K >= 2``.
      y: labels ``(n,)``.

    Raises:
      ValueError: shapes, dtypes or labels do not fit.

    Source: Ding et al. (2020), "MMA training: direct input space margin maximization through
    adversarial training", section 2.
    """
    checks.logits_and_labels(logits, y)
    logits = logits.astype(jnp.float32)
    own = jax.nn.one_hot(y, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), axis=-1)
    return others - _of_class(logits, y)


def cw(
    logits: Float[Array, "n k"], y: Int[Array, " n"], confidence: float = 0.0
) -> Float[Array, " n"]:
    """Carlini–Wagner loss ``min(max_{j != y} z_j - z_y, confidence)``, to be maximised.

    Carlini & Wagner (2017), section V, the function f6 in its untargeted form and with the sign
    turned: their attack minimises ``max(z_y - max_{j != y} z_j, -confidence)``.

    Args:
      logits: scores ``(n, K)``, ``K >= 2``.
      y: labels ``(n,)``.
      confidence: margin, in units of the logits, beyond which there is nothing more to gain;
        ``>= 0``.

    Raises:
      ValueError: shapes, dtypes or labels do not fit, or ``confidence < 0``.
    """
    checks.number("confidence", confidence, at_least=0)
    return jnp.minimum(margin(logits, y), confidence)


def cw_targeted(
    logits: Float[Array, "n k"], target: Int[Array, " n"], confidence: float = 0.0
) -> Float[Array, " n"]:
    """Targeted Carlini–Wagner loss ``min(z_t - max_{j != t} z_j, confidence)``, maximised.

    Carlini & Wagner (2017), section V, the function f6 with the sign turned.

    Args:
      logits: scores ``(n, K)``, ``K >= 2``.
      target: the class ``(n,)`` that the attack wants.
      confidence: margin, in units of the logits, beyond which there is nothing more to gain;
        ``>= 0``.

    Raises:
      ValueError: shapes, dtypes or labels do not fit, or ``confidence < 0``.
    """
    checks.logits_and_labels(logits, target, name="target")
    checks.number("confidence", confidence, at_least=0)
    return jnp.minimum(-margin(logits, target), confidence)


# Guards 0 / 0 where the three (four) largest logits coincide; the value of Croce & Hein (2020).
_DLR_GUARD = 1e-12


def dlr(logits: Float[Array, "n k"], y: Int[Array, " n"]) -> Float[Array, " n"]:
    """Difference of logits ratio ``-(z_y - max_{j != y} z_j) / (z_(1) - z_(3))``.

    Invariant to adding a constant to the logits and to multiplying them by a positive one. In
    ``[-1, 0]`` where ``y`` is the largest class, positive iff misclassified. ``z_(i)`` is the
    i-th largest logit; where ``z_(1) = z_(3)`` the ratio is only guarded, and can be large.

    Croce & Hein (2020), "Reliable evaluation of adversarial robustness ...", equation (6).

    Args:
      logits: scores ``(n, K)``, ``K >= 3``.
      y: labels ``(n,)``.

    Raises:
      ValueError: shapes, dtypes or labels do not fit, or fewer than three classes.
    """
    checks.logits_and_labels(logits, y, min_classes=3)
    logits = logits.astype(jnp.float32)
    top = jax.lax.top_k(logits, 3)[0]
    return margin(logits, y) / (top[:, 0] - top[:, 2] + _DLR_GUARD)


def dlr_targeted(
    logits: Float[Array, "n k"], y: Int[Array, " n"], target: Int[Array, " n"]
) -> Float[Array, " n"]:
    """Targeted DLR ``-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)``, to be maximised.

    Invariant like ``dlr``; zero iff ``z_y = z_t``. Croce & Hein (2020), equation (7).

    Args:
      logits: scores ``(n, K)``, ``K >= 4``.
      y: labels ``(n,)``.
      target: the classes ``(n,)`` that the attack wants.

    Raises:
      ValueError: shapes, dtypes or labels do not fit, or fewer than four classes.
    """
    checks.logits_and_labels(logits, y, min_classes=4)
    checks.logits_and_labels(logits, target, min_classes=4, name="target")
    logits = logits.astype(jnp.float32)
    top = jax.lax.top_k(logits, 4)[0]
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _DLR_GUARD
    return (_of_class(logits, target) - _of_class(logits, y)) / scale
