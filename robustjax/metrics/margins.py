"""How much perturbation a model withstands: the largest eps of an attack, and margins by gradient.

``max_eps`` and ``bisect_max_eps`` find the largest eps at which a criterion still holds for the
accuracy under attack. ``linear_margin`` is the distance to the decision boundary of a linear model,
and the first-order estimate of it for any other.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from robustjax import checks, norms
from robustjax.norms import Norm

Criterion = Callable[[float], bool]

# Accuracies are means in float32; one example among 100,000 is ten times as much.
_ROUNDING = 1e-6


def no_error(accuracy: float) -> bool:
    """Criterion: every example is classified correctly. For training sets of linear models."""
    return accuracy >= 1 - _ROUNDING


def near_clean(clean: float, drop: float = 0.01) -> Criterion:
    """Criterion: the accuracy is at most ``drop`` below the clean one; default 1 point.

    Args:
      clean: accuracy without attack, 0 to 1.
      drop: what may be lost, 0 to 1.

    Raises:
      ValueError: an argument is out of range.
    """
    checks.number("clean", clean, at_least=0, at_most=1)
    checks.number("drop", drop, at_least=0, at_most=1)
    return lambda accuracy: accuracy >= clean - drop - _ROUNDING


def max_eps(
    accuracy: Callable[[float], float],
    grid: Sequence[float] | Float[np.ndarray, " m"],
    criterion: Criterion = no_error,
    *,
    all_smaller: bool = False,
) -> float | None:
    """The largest eps of a grid whose accuracy meets the criterion.

    Only as many eps are tried as the answer needs.

    Args:
      accuracy: ``accuracy(eps)`` under attack of that size, 0 to 1.
      grid: values of eps, ``>= 0``, in any order.
      criterion: ``criterion(accuracy) -> bool``: ``no_error`` or ``near_clean(clean)``.
      all_smaller: stricter: the criterion must hold at every smaller eps of the grid too, so that
        an attack that happens to fail at a large eps does not count.

    Returns:
      An element of the grid; None if the criterion holds at none (with ``all_smaller``, not at the
      smallest).

    Raises:
      ValueError: the grid is empty or holds a negative number, or a function is none.

    Source: Faghri et al., "Bridging the gap between adversarial robustness and optimization bias"
    (2021): linear models with ``no_error``, CIFAR-10 with ``near_clean``.
    """
    checks.function("accuracy", accuracy)
    checks.function("criterion", criterion)
    grid = sorted(float(eps) for eps in checks.number("grid", np.asarray(grid), at_least=0))
    if not grid:
        raise ValueError("grid must hold at least one eps, got none")
    if not all_smaller:
        return next((eps for eps in reversed(grid) if criterion(accuracy(eps))), None)
    best = None
    for eps in grid:
        if not criterion(accuracy(eps)):
            break
        best = eps
    return best


def bisect_max_eps(
    accuracy: Callable[[float], float],
    lower: float,
    upper: float,
    criterion: Criterion = no_error,
    *,
    tolerance: float = 1e-6,
) -> float | None:
    """The largest eps in ``[lower, upper]`` that meets the criterion, for a falling accuracy.

    Args:
      accuracy: ``accuracy(eps)`` under attack of that size, not rising, as in closed forms.
      lower: smallest eps, ``>= 0``.
      upper: largest eps, ``>= lower``.
      criterion: ``criterion(accuracy) -> bool``.
      tolerance: the answer meets the criterion and is this close to one that does not, > 0.

    Returns:
      The eps; ``upper`` if the criterion holds there, None if it does not hold at ``lower``.

    Raises:
      ValueError: an argument is out of range.
    """
    checks.function("accuracy", accuracy)
    checks.function("criterion", criterion)
    checks.number("lower", lower, at_least=0)
    checks.number("upper", upper, at_least=lower)
    checks.number("tolerance", tolerance, above=0)
    if not criterion(accuracy(lower)):
        return None
    if criterion(accuracy(upper)):
        return upper
    while upper - lower > tolerance:
        middle = (lower + upper) / 2
        if middle in (lower, upper):  # no number lies between
            break
        lower, upper = (middle, upper) if criterion(accuracy(middle)) else (lower, middle)
    return lower


def linear_margin(
    value: Float[Array, " n"],
    gradient: Float[Array, "n ..."],
    norm: Norm,
    *,
    cap: ArrayLike = jnp.inf,
) -> Float[Array, " n"]:
    """``min(cap, value / ||gradient||_*)``: by how much x may change before the value is 0.

    Exact if the value is linear in x within that distance, and for perturbations no larger than
    ``cap``, if it is within ``cap``. Scaling the value changes nothing. Negative values have
    negative margins; without a gradient the margin is infinite, and 0 for the value 0.

    Args:
      value: signed outputs ``y phi(x)``, positive where the classification is right.
      gradient: their derivatives with respect to x.
      norm: norm of the perturbation, whose dual measures the gradient.
      cap: largest distance up to which the value is known to be linear, ``>= 0``.

    Raises:
      ValueError: shapes do not fit, or ``norm`` is no norm.

    Source: Faghri et al. (2021), the lemma on the gradient-norm weighted maximum margin.
    """
    norms.check(norm)
    checks.number("cap", cap, at_least=0, at_most=np.inf)
    checks.array("gradient", gradient)
    if checks.array("value", value).ndim != 1 or gradient.shape[:1] != value.shape:
        raise ValueError(
            f"value must be (n,) and gradient (n, ...), got {value.shape} and {gradient.shape}"
        )
    size = norm.dual.value(gradient, batch_ndim=1)
    flat = size == 0
    margin = value / jnp.where(flat, 1, size)
    margin = jnp.where(flat & (value != 0), jnp.copysign(jnp.inf, value), margin)
    return jnp.minimum(margin, jnp.asarray(cap, margin.dtype))


def binary_margin(
    phi: Callable[[Array], Array],
    x: Float[Array, "n ..."],
    y: Float[ArrayLike, " n"] | Int[ArrayLike, " n"],
    norm: Norm,
    *,
    cap: ArrayLike = jnp.inf,
) -> Float[Array, " n"]:
    """``linear_margin`` of a binary classifier ``sign(phi(x))`` at each example.

    The smallest of them estimates the largest eps that the classifier withstands on all examples.
    It is exact for linear models, and for piecewise linear ones where the ball lies in one piece.
    With curvature it is not: where phi saturates, gradients are small and the estimate too large.

    Args:
      phi: outputs ``(n, ...) -> (n,)``, each of its own example.
      x: examples.
      y: labels, -1 or 1.
      norm: norm of the perturbation.
      cap: as in ``linear_margin``.

    Raises:
      ValueError: shapes do not fit, or ``norm`` is no norm.

    Source: Faghri et al. (2021), as ``linear_margin``.
    """
    checks.function("phi", phi)
    value, pull = jax.vjp(phi, x)
    checks.per_example("phi(x)", value, x.shape[0])
    y = jnp.asarray(y, value.dtype)
    checks.per_example("y", y, x.shape[0])
    return linear_margin(y * value, pull(y)[0], norm, cap=cap)


def multiclass_margin(
    logits_fn: Callable[[Array], Array],
    x: Float[Array, "n ..."],
    y: Int[Array, " n"],
    norm: Norm,
    *,
    cap: ArrayLike = jnp.inf,
) -> Float[Array, " n"]:
    """The smallest ``linear_margin`` of ``z_y - z_k`` over the other classes k, for each example.

    The multi-class form of ``binary_margin``, exact in the same cases. One gradient per class.

    Args:
      logits_fn: ``(n, ...) -> (n, K)``, each row of its own example.
      x: examples.
      y: labels.
      norm: norm of the perturbation.
      cap: as in ``linear_margin``.

    Raises:
      ValueError: shapes do not fit, or ``norm`` is no norm.

    Source: Faghri et al. (2021), as ``linear_margin``, applied to each pair of classes.
    """
    checks.function("logits_fn", logits_fn)
    norms.check(norm)
    logits, pull = jax.vjp(logits_fn, x)
    checks.logits_and_labels(logits, y)
    classes = logits.shape[1]
    own = jax.nn.one_hot(y, classes, dtype=logits.dtype)

    def against(k: Array) -> Float[Array, " n"]:
        difference = own - jax.nn.one_hot(k, classes, dtype=logits.dtype)
        value = jnp.sum(jnp.where(difference != 0, logits * difference, 0), axis=1)
        margin = linear_margin(value, pull(difference)[0], norm, cap=cap)
        return jnp.where(y == k, jnp.inf, margin)

    # One class after the other: all at once would take K times the memory.
    margins = jax.lax.map(against, jnp.arange(classes))
    return jnp.minimum(jnp.min(margins, axis=0), jnp.asarray(cap, margins.dtype))
