"""Classes for targeted attacks to aim at."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robustjax import checks


def likeliest_wrong_classes(
    logits: Float[Array, "n k"], y: Int[Array, " n"], count: int | None = None
) -> Int[Array, "n count"]:
    """The ``count`` wrong classes with the largest logits, in descending order; default all.

    Raises:
      ValueError: ``count`` is more than the ``K - 1`` wrong classes, or labels do not fit.
    """
    checks.logits_and_labels(logits, y)
    k = logits.shape[-1]
    if count is not None and count > k - 1:
        raise ValueError(
            f"targets must be <= K - 1, here {k - 1} because there are K = {k} classes, got {count}"
        )
    own = jax.nn.one_hot(y, k, dtype=bool)
    # The own class first, whatever its logit; NaN logits come last.
    order = jnp.argsort(jnp.where(own, jnp.inf, logits), axis=-1, descending=True)
    return order[:, 1:][:, :count].astype(jnp.int32)
