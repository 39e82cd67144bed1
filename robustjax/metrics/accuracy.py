"""Accuracies of predictions, per example, under noise, and along the trace of an attack."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from robustjax import checks


def correct(logits: Float[Array, "n k"], y: Int[Array, " n"], *, top: int = 1) -> Bool[Array, " n"]:
    """Whether the logit of the label is among the largest; a row with NaN is never correct.

    Args:
      logits: ``(n, k)``.
      y: labels.
      top: how many logits are looked at, ``1 .. k``; of equal ones the first come first.

    Raises:
      ValueError: shapes, dtypes or labels do not fit, or ``top`` is out of range.
    """
    checks.logits_and_labels(logits, y)
    checks.integer("top", top, at_least=1, at_most=logits.shape[1])
    if top == 1:
        found = jnp.argmax(logits, axis=-1) == y
    else:
        found = (jax.lax.top_k(logits, top)[1] == y[:, None]).any(axis=-1)
    return found & ~jnp.isnan(logits).any(axis=-1)


def accuracy_drop(
    logits_fn: Callable[[Array], Array],
    x: Float[Array, "n ..."],
    y: Int[Array, " n"],
    noise: Float[Array, "kinds draws ..."],
) -> Float[Array, "n kinds"]:
    """What each kind of noise costs on each example; the mean over examples is the accuracy lost.

    ``1[F(x) = y] - mean_k 1[F(x + noise_ik) = y]`` for kind ``i``, in [-1, 1]: noise may help.
    The sum is not clipped to the range of images, and all examples get the same noise.

    Args:
      logits_fn: the classifier.
      x: examples.
      y: labels.
      noise: such as ``dct.band_noise`` in each of ``dct.dct_bands``, ``(kinds, draws, ...)`` with
        the shape of one example.

    Raises:
      ValueError: shapes, dtypes or labels do not fit.

    Source: Ma (2025), "Understanding adversarial robustness in deep learning", equation (4.5), with
    kinds of noise the ten bands of frequencies; the public code draws anew for each example.
    """
    checks.function("logits_fn", logits_fn)
    if checks.array("noise", noise).ndim < 2 or noise.shape[2:] != x.shape[1:]:
        raise ValueError(f"noise must have shape (kinds, draws, *{x.shape[1:]}), got {noise.shape}")

    def mean_correct(draws: Array) -> Float[Array, " n"]:
        found = jax.lax.map(lambda delta: correct(logits_fn(x + delta), y), draws)
        return found.mean(axis=0, dtype=jnp.float32)

    clean = correct(logits_fn(x), y).astype(jnp.float32)
    return clean[:, None] - jax.lax.map(mean_correct, noise).T


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
