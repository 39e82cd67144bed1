"""Statistics of per-example gradients, and the robust overfitting that they are to explain.

The functions take norms and means that were computed elsewhere, so that nothing here needs a
gradient per example in memory. ``gradient_moments`` works under ``jit``; the others compute in
float64 on the host and return Python numbers.

Source: Dabouei et al. (2022), "Revisiting outer optimization in adversarial training".
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from robustjax import checks
from robustjax.norms import L2


class GradientMoments(NamedTuple):
    """Moments of the gradients ``g_i`` of ``m`` examples, in l_2 norms over all parameters.

    Attributes:
      mean_norm: ``mu = mean ||g_i||``; ``mu^2 <= second_moment``.
      variance: ``sigma^2 = mean ||g_i - mean g||^2``, ``>= 0``.
      second_moment: ``mean ||g_i||^2``.
      mean_gradient_norm: ``||mean g||``, at most ``mu``.
    """

    mean_norm: Float[Array, ""]
    variance: Float[Array, ""]
    second_moment: Float[Array, ""]
    mean_gradient_norm: Float[Array, ""]


def gradient_moments(
    norms: Float[ArrayLike, " m"],
    mean_gradient: PyTree[Float[ArrayLike, "..."]],
    *,
    unbiased: bool = False,
) -> GradientMoments:
    """Mean norm and variance of gradients, from their norms and their mean.

    ``sigma^2 = mean ||g_i||^2 - ||mean g||^2``. The difference is computed in float32 and loses
    digits where the gradients are nearly equal; rounding below 0 counts as 0.

    Args:
      norms: ``||g_i||_2`` of each example, ``(m,)``.
      mean_gradient: ``mean_i g_i``, a pytree in the shapes of the parameters.
      unbiased: multiply the variance by ``m / (m - 1)``, which makes it an unbiased estimate of
        that of the distribution the examples are drawn from.

    Raises:
      ValueError: ``norms`` is not ``(m,)`` with ``m >= 1`` (``m >= 2`` with ``unbiased``) or holds
        a negative or non-finite number.

    Source: Dabouei et al. (2022), section 2.2 and equation (2), at the current parameters in place
    of the supremum over all.
    """
    checks.number("norms", norms, at_least=0)
    norms = jnp.asarray(norms)
    needed = 2 if unbiased else 1
    if norms.ndim != 1 or norms.size < needed:
        raise ValueError(f"norms must be (m,) with m >= {needed}, got shape {norms.shape}")
    norms = norms.astype(jnp.promote_types(norms.dtype, jnp.float32))
    of_mean = L2().value(mean_gradient).astype(norms.dtype)
    second = jnp.mean(jnp.square(norms))
    variance = jnp.maximum(second - jnp.square(of_mean), 0)
    if unbiased:
        variance = variance * (norms.size / (norms.size - 1))
    return GradientMoments(jnp.mean(norms), variance, second, of_mean)


def correlation(a: ArrayLike | Sequence[float], b: ArrayLike | Sequence[float]) -> float:
    """Pearson's correlation of two measurements, such as norms of gradients, in ``[-1, 1]``.

    Of the gradients for the parameters and for the input it is what lets the second stand in for
    the first. NaN if one of them is the same for all examples, where it is not defined.

    Args:
      a: one number per example, ``(n,)``, ``n >= 2``, e.g. ``||grad_params L_i||``.
      b: likewise, e.g. ``||grad_x L_i||``.

    Raises:
      ValueError: shapes do not fit, or a number is not finite.

    Source: Dabouei et al. (2022), section 2.5 and figure 3.
    """
    a, b = _pair("a", a, "b", b)
    if a.size < 2:
        raise ValueError(f"a must hold at least two numbers, got {a.size}")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def weight_error(
    estimated: ArrayLike | Sequence[float], exact: ArrayLike | Sequence[float]
) -> float:
    """Mean of ``|estimated - exact| / exact`` in per cent: how well weights are estimated.

    Args:
      estimated: weights of the examples by the regression on input gradients, ``(n,)``.
      exact: weights ``min(alpha / ||g_i||, 1)`` by their own gradients, ``(n,)``, ``> 0``.

    Raises:
      ValueError: shapes do not fit, a number is not finite, or an exact weight is not positive.

    Source: Dabouei et al. (2022), figure 3; the text says "absolute value of error (%)", taken
    relative to the exact weight here.
    """
    estimated, exact = _pair("estimated", estimated, "exact", exact)
    checks.number("exact", exact, above=0)
    return float(100 * np.mean(np.abs(estimated - exact) / exact))


def regressed_weight_error(
    parameter_norm: ArrayLike | Sequence[float],
    input_norm: ArrayLike | Sequence[float],
    alpha: float,
) -> float:
    """``weight_error`` of weights whose norms are predicted by least squares on the same examples.

    The best that a linear prediction of parameter norms from input norms can do.

    Args:
      parameter_norm: ``||g_i||``, ``(n,)``, ``n >= 2``.
      input_norm: ``||h_i||``, ``(n,)``; all the same predicts the mean.
      alpha: norm bound of the weights ``min(alpha / norm, 1)``, ``> 0``.

    Raises:
      ValueError: shapes do not fit, a number is not finite, or ``alpha`` is not positive.
    """
    checks.number("alpha", alpha, above=0)
    norm, inputs = _pair("parameter_norm", parameter_norm, "input_norm", input_norm)
    spread = np.var(inputs)
    slope = np.mean((inputs - inputs.mean()) * norm) / spread if spread else 0.0
    predicted = norm.mean() + slope * (inputs - inputs.mean())
    weights = (np.minimum(alpha / np.maximum(np.abs(v), 1e-12), 1) for v in (predicted, norm))
    return weight_error(*weights)


def robust_overfitting(accuracy: ArrayLike | Sequence[float]) -> float:
    """``(best - last) / best`` of a curve of robust accuracies over training, in per cent.

    0 if the last is the best (also where all are 0), 100 if robustness is lost altogether.

    Args:
      accuracy: robust accuracy after each epoch, ``(epochs,)``, ``>= 0``, as shares or per cent.

    Raises:
      ValueError: the curve is empty, not one-dimensional, or holds a negative or non-finite number.

    Source: Dabouei et al. (2022), table 2.
    """
    accuracy = _vector("accuracy", accuracy)
    checks.number("accuracy", accuracy, at_least=0)
    best, last = accuracy.max(), accuracy[-1]
    return float(100 * (best - last) / best) if best > last else 0.0


def _vector(name: str, value: Any) -> Float[np.ndarray, " n"]:
    """At least one number, in float64."""
    value = np.asarray(checks.number(name, value), np.float64)
    if value.ndim != 1 or value.size == 0:
        raise ValueError(f"{name} must be (n,) with n >= 1, got shape {value.shape}")
    return value


def _pair(
    a_name: str, a: Any, b_name: str, b: Any
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    a, b = _vector(a_name, a), _vector(b_name, b)
    checks.same_shape(b_name, b, a_name, a)
    return a, b
