"""The linear classifier that withstands the largest perturbation: closed forms and certificates.

``sign(<w, x> + b)`` is right on all examples, labels -1 and 1, under all perturbations of norm
below

    eps(w, b) = min_i y_i (<w, x_i> + b) / ||w||_*,

with the dual of the norm that measures the perturbation. The largest eps of all classifiers is the
largest margin, ``1 / min {||w||_* : y_i (<w, x_i> + b) >= 1}``, and by duality the length of the
shortest convex combination,

    eps* = min {||sum_i lambda_i y_i x_i|| : lambda_i >= 0, sum_i lambda_i = 1},

with ``sum_i lambda_i y_i = 0`` too if there may be a bias. So any ``w`` gives a lower bound and any
``lambda`` an upper bound: where they meet, both are optimal (``certificate``). No loss appears in
this, and no size of an attack has to be chosen, as the saddle point of adversarial training wants
it: ``theory.saddle_point`` has what goes wrong there.

Inputs are ``(n, d)`` or, with a Fourier norm, also images ``(n, h, w, c)``. Everything is in the
dtype of its arrays and may be differentiated, compiled and mapped over weights and data sets.
``theory.max_margin`` finds the optimum.

Source: Faghri et al., "Bridging the gap between adversarial robustness and optimization bias"
(2021), on the maximally robust classifier. Corrected from there: the margin is divided by the dual
norm.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key

from robustjax import checks, keys, norms
from robustjax.norms import Norm

Inputs = Float[ArrayLike, "n ..."]
Signs = Float[ArrayLike, " n"] | Int[ArrayLike, " n"]


# One classifier.


def scores(
    w: Float[ArrayLike, "..."], x: Inputs, y: Signs, *, bias: ArrayLike = 0.0
) -> Float[Array, " n"]:
    """``y_i (<w, x_i> + b)``, positive where the classification is right. Args as of ``margins``.

    Raises:
      ValueError: shapes do not fit, or a label is neither -1 nor 1.
    """
    return _scores(*_classifier(w, x, y), bias)


def margins(
    w: Float[ArrayLike, "..."], x: Inputs, y: Signs, norm: Norm, *, bias: ArrayLike = 0.0
) -> Float[Array, " n"]:
    """``y_i (<w, x_i> + b) / ||w||_*``: the norm of the smallest perturbation that errs.

    Negative where the example is classified wrongly. Scaling ``(w, b)`` changes nothing. For
    ``w = 0``, which no perturbation changes, margins are infinite with the sign of ``y_i b``, and 0
    for ``b = 0``.

    Args:
      w: weights, shaped like one input.
      x: inputs.
      y: labels, -1 or 1.
      norm: norm of the perturbation.
      bias: ``b``.

    Raises:
      ValueError: shapes do not fit, a label is neither -1 nor 1, or ``norm`` is no norm.
    """
    norms.check(norm)
    w, x, y = _classifier(w, x, y)
    return _per_norm(_scores(w, x, y, bias), norm.dual.value(w))


def largest_eps(
    w: Float[ArrayLike, "..."], x: Inputs, y: Signs, norm: Norm, *, bias: ArrayLike = 0.0
) -> Float[Array, ""]:
    """``eps(w, b)``, the smallest of the ``margins``; negative if an example is classified wrongly.

    Every perturbation of smaller norm leaves all examples right, and ``worst_perturbations`` of a
    larger one errs on one.
    """
    return jnp.min(margins(w, x, y, norm, bias=bias))


def worst_perturbations(
    w: Float[ArrayLike, "..."], y: Signs, norm: Norm, eps: ArrayLike
) -> Float[Array, "n ..."]:
    """``-y_i eps d`` with ``d = norm.steepest(w)``: lowers each score by ``eps ||w||_*``.

    Args:
      w: weights.
      y: labels, -1 or 1.
      norm: norm of the perturbation.
      eps: its size, ``>= 0``.

    Raises:
      ValueError: an argument is out of range.
    """
    norms.check(norm)
    checks.number("eps", eps, at_least=0)
    w = jnp.asarray(w)
    direction = norm.steepest(w) * jnp.asarray(eps, w.dtype)
    signs = labels(y, jnp.shape(y)[0], w.dtype)
    return -signs.reshape(-1, *[1] * w.ndim) * direction


def slack_eps(
    w: Float[ArrayLike, "..."],
    x: Inputs,
    y: Signs,
    norm: Norm,
    slack: ArrayLike,
    *,
    bias: ArrayLike = 0.0,
) -> Float[Array, ""]:
    """The largest eps with ``mean_i [1 - y_i (<w, x_i> + b) + eps ||w||_*]_+ <= slack``.

    The soft-margin form of ``largest_eps``, for data that are not separable. The left side is
    ``saddle_point.attacked_risk`` with the ``hinge``: the largest of n lines in eps, one for each
    number of examples that count, so the answer is the smallest of their roots. It depends on the
    scale of ``w``. With ``slack=0`` it is ``min_i (y_i (<w, x_i> + b) - 1) / ||w||_*``. A negative
    answer: the slack does not suffice even without a perturbation. For ``w = 0`` it is infinite,
    with the sign of ``slack - 1`` if b is 0: from 1 on the trivial classifier solves the problem.

    Args:
      w: weights, shaped like one input.
      x: inputs.
      y: labels, -1 or 1.
      norm: norm of the perturbation.
      slack: mean of the hinge losses that is allowed, ``>= 0``.
      bias: ``b``.

    Raises:
      ValueError: an argument is out of range, or shapes do not fit.

    Source: Faghri et al. (2021), the maximally robust classifier with slack.
    """
    checks.number("slack", slack, at_least=0)
    norms.check(norm)
    w, x, y = _classifier(w, x, y)
    need = jnp.sort(1 - _scores(w, x, y, bias), descending=True)
    count = jnp.arange(1, need.size + 1, dtype=need.dtype)
    root = jnp.min((need.size * jnp.asarray(slack, need.dtype) - jnp.cumsum(need)) / count)
    size = norm.dual.value(w)
    unbounded = jnp.where(root >= 0, jnp.inf, -jnp.inf)
    return jnp.where(size > 0, root / jnp.where(size > 0, size, 1), unbounded)


# The optimum.


class Certificate(NamedTuple):
    """Bounds on the largest eps of all classifiers.

    Attributes:
      lower: ``eps(w, b)``, which is reached.
      upper: ``||sum_i lambda_i y_i x_i||``, which is not exceeded.
    """

    lower: Float[Array, "*batch"]
    upper: Float[Array, "*batch"]

    @property
    def gap(self) -> Float[Array, "*batch"]:
        """``upper - lower``, 0 at the optimum and up to rounding never negative."""
        return self.upper - self.lower


def eps_bound(
    weights: Float[ArrayLike, " n"], x: Inputs, y: Signs, norm: Norm, *, bias: bool = False
) -> Float[Array, ""]:
    """``||sum_i lambda_i y_i x_i||``: no linear classifier has a larger eps.

    Any weights will do. The ones that descent itself gives to the examples, its shares of the
    exponential loss (``max_margin.example_weights``), tend to the best ones.

    Args:
      weights: of the examples, ``>= 0``, on any scale: they are divided by their sum, and with a
        bias each class by twice its own.
      x: inputs.
      y: labels, -1 or 1.
      norm: norm of the perturbation.
      bias: whether the classifiers may have a bias.

    Returns:
      The bound; infinite if the weights are zero (with a bias: those of a class).

    Raises:
      ValueError: an argument is out of range, or shapes do not fit.

    Source: the dual of the minimum-norm problem of Faghri et al. (2021).
    """
    norms.check(norm)
    x, y = examples(x, y)
    checks.number("weights", weights, at_least=0)
    weights = jnp.asarray(weights, x.dtype)
    checks.per_example("weights", weights, x.shape[0])
    if bias:
        totals = 2 * jnp.stack([jnp.sum(jnp.where(y == side, weights, 0)) for side in (-1, 1)])
        total, usable = jnp.where(y > 0, totals[1], totals[0]), jnp.all(totals > 0)
    else:
        total = jnp.sum(weights)
        usable = total > 0
    shares = weights / jnp.where(usable, total, 1)
    return jnp.where(usable, norm.value(jnp.tensordot(shares * y, x, 1)), jnp.inf)


def certificate(
    w: Float[ArrayLike, "..."],
    weights: Float[ArrayLike, " n"],
    x: Inputs,
    y: Signs,
    norm: Norm,
    *,
    bias: ArrayLike | None = None,
) -> Certificate:
    """Between what ``w`` reaches and what ``weights`` allow lies the largest eps.

    Args:
      w: weights of a classifier.
      weights: of the examples, as in ``eps_bound``.
      x: inputs.
      y: labels, -1 or 1.
      norm: norm of the perturbation.
      bias: that of the classifier; ``None`` among classifiers without one.

    Raises:
      ValueError: as ``largest_eps`` and ``eps_bound``.
    """
    lower = largest_eps(w, x, y, norm, bias=0.0 if bias is None else bias)
    return Certificate(lower, eps_bound(weights, x, y, norm, bias=bias is not None))


class Separable(NamedTuple):
    """Examples with the labels of a linear classifier.

    Attributes:
      x: inputs ``(n, d)``.
      y: labels, -1.0 or 1.0.
      teacher: the weights that gave the labels, of l_2 norm 1.
    """

    x: Float[Array, "n d"]
    y: Float[Array, " n"]
    teacher: Float[Array, " d"]


def sample_separable(key: Key[Array, ""], n: int, d: int) -> Separable:
    """Normal inputs ``N(0, I_d)`` with labels ``sign(<teacher, x>)``.

    Args:
      key: one key; callers ``vmap`` over keys.
      n: number of examples.
      d: dimension.

    Raises:
      ValueError: a number is ``< 1``, or ``key`` is not one key.

    Source: Faghri et al. (2021), the synthetic data of the linear experiments.
    """
    keys.check_one(key)
    checks.integer("n", n, at_least=1)
    checks.integer("d", d, at_least=1)
    of_teacher, of_inputs = jax.random.split(key)
    teacher = jax.random.normal(of_teacher, (d,))
    x = jax.random.normal(of_inputs, (n, d))
    return Separable(x, jnp.where(x @ teacher >= 0, 1.0, -1.0), teacher / jnp.linalg.norm(teacher))


def examples(x: Any, y: Any) -> tuple[Float[Array, "n ..."], Float[Array, " n"]]:
    """Inputs and labels as arrays of one dtype; ``ValueError`` unless they are examples."""
    x = jnp.asarray(x)
    if x.ndim < 2 or x.shape[0] == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating-point inputs (n, ...), got {x.dtype}{x.shape}")
    return x, labels(y, x.shape[0], x.dtype)


def _classifier(w: Any, x: Any, y: Any) -> tuple[Array, Array, Array]:
    w = jnp.asarray(w)
    x, y = examples(x, y)
    if w.shape != x.shape[1:]:
        raise ValueError(f"w must be shaped like one input, {x.shape[1:]}, got {w.shape}")
    return w, x, y


def labels(y: Any, n: int, dtype: Any) -> Float[Array, " n"]:
    """The labels of n examples as an array of this dtype; ``ValueError`` unless -1 and 1."""
    signs = jnp.asarray(y, dtype)
    checks.per_example("y", signs, n)
    if checks.is_known(y) and not np.all(np.abs(np.asarray(y)) == 1):
        raise ValueError(f"y must hold labels -1 and 1, got {checks.shown(y)}")
    return signs


def _scores(w: Array, x: Array, y: Array, bias: Any) -> Float[Array, " n"]:
    return y * (jnp.tensordot(x, w, w.ndim) + bias)


def _per_norm(scores: Array, size: Array) -> Float[Array, " n"]:
    flat = size == 0
    divided = scores / jnp.where(flat, 1, size)
    return jnp.where(flat & (scores != 0), jnp.copysign(jnp.inf, scores), divided)
