"""Accuracies of predictions, per example and along the trace of an attack."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from robustjax import checks


def correct(logits: Float[Array, "n k"], y: Int[Array, " n"]) -> Bool[Array, " n"]:
    """Whether the largest logit is that of the label; a row with NaN is never correct.

    Raises:
      ValueError: shapes, dtypes or labels do not fit.
    """
    checks.logits_and_labels(logits, y)
    return (jnp.argmax(logits, axis=-1) == y) & ~jnp.isnan(logits).any(axis=-1)


def instantaneous_accuracy(
    prediction: Int[Array, "iterates n"], reference: Int[Array, " n"]
) -> Float[Array, " iterates"]:
    """Share of examples that still have the reference class at each iterate of an attack.

    ``a_I(k) = 1 - mean 1[y_a(x; k) != y_a(x; 0)]``, with the clean predictions (or the labels) as
    the reference. It need not fall monotonically.

    Args:
      prediction: class at each iterate, ``(iterates, n)``, e.g. ``PGDTrace.prediction[0]``.
      reference: clean predictions or labels, ``(n,)``.

    Raises:
      ValueError: shapes or dtypes do not fit.

    Source: Sanyal (2021), "Identifying and exploiting structures for reliable deep learning",
    equation (3.15).
    """
    return jnp.mean(_kept(prediction, reference), axis=-1)


def cumulative_accuracy(
    prediction: Int[Array, "iterates n"], reference: Int[Array, " n"]
) -> Float[Array, " iterates"]:
    """Share of examples that have kept the reference class at every iterate so far, a_C(k).

    This is what an attack that stops on success reaches with a budget of k steps. Never larger
    than the instantaneous accuracy, and never rising. Arguments as there.

    Source: Sanyal (2021), equation (3.16).
    """
    kept = jnp.cumprod(_kept(prediction, reference).astype(jnp.int32), axis=0)
    return jnp.mean(kept, axis=-1, dtype=jnp.float32)


def _kept(prediction: Array, reference: Array) -> Bool[Array, "iterates n"]:
    checks.integers("reference", reference)
    n = reference.shape[0]
    if checks.array("prediction", prediction).ndim != 2 or prediction.shape[1] != n:
        raise ValueError(f"prediction must have shape (iterates, {n}), got {prediction.shape}")
    return prediction == reference
