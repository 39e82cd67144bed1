"""Linear classifiers trained under attack or with a penalty: exact risks, thresholds, failures.

The inner maximum of adversarial training has a closed form for a linear classifier,

    mean_i loss(y_i (<w, x_i> + b) - eps ||w||_*),

and the size eps of the attack decides what its minimum is. Below the largest eps of the data
(``theory.robust_classifiers``) the risk falls to 0 without a minimiser, and the classifier need not
be the most robust one; above ``zero_eps`` the minimiser is ``w = 0``, which with a bias says the
label of the majority (``constant_score``); and the risk cannot tell an error from a lack of
confidence (``tied_margins``). A penalty ``lambda ||w||`` has its threshold too,
``zero_coefficient``, and no such failures: the smaller lambda, the more robust the classifier.

Source: Faghri et al., "Bridging the gap between adversarial robustness and optimization bias"
(2021), on the saddle point and on explicit regularisation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from robustjax import checks, norms
from robustjax.norms import Norm
from robustjax.theory.robust_classifiers import Inputs, Signs, eps_bound, labels, scores

Loss = Callable[[Array], Array]


def exponential(margin: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """``exp(-m)``."""
    return jnp.exp(-jnp.asarray(margin))


def logistic(margin: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """``log(1 + exp(-m))``."""
    return jax.nn.softplus(-jnp.asarray(margin))


def hinge(margin: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """``max(0, 1 - m)``."""
    return jax.nn.relu(1 - jnp.asarray(margin))


def attacked_risk(
    w: Float[ArrayLike, "..."],
    x: Inputs,
    y: Signs,
    norm: Norm,
    eps: ArrayLike,
    *,
    loss: Loss = logistic,
    bias: ArrayLike = 0.0,
) -> Float[Array, ""]:
    """``mean_i loss(y_i (<w, x_i> + b) - eps ||w||_*)``: the risk under the worst perturbations.

    The inner maximum of adversarial training in closed form. Below ``eps*`` it has no minimum, and
    descent drives it to 0; above, its minimiser is bounded, and from ``zero_eps`` on it is 0.

    Args:
      w: weights, shaped like one input.
      x: inputs.
      y: labels, -1 or 1.
      norm: norm of the perturbation.
      eps: its size, ``>= 0``.
      loss: a falling function of the margin: ``logistic``, ``exponential``, ``hinge``.
      bias: ``b``.

    Raises:
      ValueError: an argument is out of range, or shapes do not fit.
    """
    checks.number("eps", eps, at_least=0)
    checks.function("loss", loss)
    length = norms.check(norm).dual.value(jnp.asarray(w))
    return jnp.mean(loss(scores(w, x, y, bias=bias) - eps * length))


def zero_eps(x: Inputs, y: Signs, norm: Norm) -> Float[Array, ""]:
    """``||mean_i y_i x_i||``: from this eps on ``w = 0`` minimises the ``attacked_risk``.

    For every loss that is convex and falling, and classifiers without a bias. It is at least
    ``eps*``, being the ``eps_bound`` of equal weights.

    Args:
      x: inputs.
      y: labels, -1 or 1.
      norm: norm of the perturbation.

    Raises:
      ValueError: shapes do not fit, a label is neither -1 nor 1, or ``norm`` is no norm.
    """
    return eps_bound(jnp.ones(jnp.shape(y)), x, y, norm)


def zero_coefficient(x: Inputs, y: Signs, norm: Norm, *, loss: Loss = logistic) -> Float[Array, ""]:
    """From this coefficient on ``w = 0`` minimises ``mean_i loss(y_i <w, x_i>) + lambda ||w||``.

    It is ``-loss'(0) ||mean_i y_i x_i||_*``, half of ``zero_eps`` for the logistic loss. Below it
    the optimum has ``||grad||_* = lambda`` and ``<-grad, w> = lambda ||w||``, and as lambda falls
    to 0 its direction tends, as slowly as ``1 / log(1 / lambda)``, to that of the largest margin.

    Args:
      x: inputs.
      y: labels, -1 or 1.
      norm: norm of the penalty, whose dual measures the perturbations it makes robust to.
      loss: ``logistic``, ``exponential`` or ``hinge``.

    Raises:
      ValueError: shapes do not fit, a label is neither -1 nor 1, or an argument is none of these.

    Source: Faghri et al. (2021), on explicit regularisation; the threshold is the optimality of 0.
    """
    checks.function("loss", loss)
    length = zero_eps(x, y, norms.check(norm).dual)
    return -jax.grad(loss)(jnp.zeros_like(length)) * length


def constant_score(y: Signs, *, loss: Loss = logistic) -> Float[Array, ""]:
    """The bias that minimises the risk alone: the limit of training under ever larger attacks.

    With ``n+`` and ``n-`` examples of the classes it is ``log(n+ / n-)`` for the logistic loss and
    half of it for the exponential: the classifier says the label of the majority.

    Args:
      y: labels, -1 or 1.
      loss: ``logistic`` or ``exponential``.

    Raises:
      ValueError: a label is neither -1 nor 1, or the loss is another.

    Source: Faghri et al. (2021), an attack that is too large.
    """
    checks.choice("loss", loss, (logistic, exponential))
    y = labels(y, jnp.shape(y)[0], jnp.result_type(float))
    odds = jnp.log(jnp.sum(y > 0) / jnp.sum(y < 0))
    return (odds if loss is logistic else odds / 2).astype(y.dtype)


def tied_margins(
    n: int, low: float, high: float, *, loss: Loss = logistic
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Margins of two classifiers of equal risk: one errs on no example, the other on one.

    The first has the margin ``low`` on all examples, the second ``high`` on all but the last, whose
    loss is what remains of the risk. The risk under attack cannot tell them apart; the largest eps
    can, whose sign is that of the smallest margin.

    Args:
      n: number of examples, ``>= 2``.
      low: ``> 0``.
      high: ``> low``.
      loss: ``logistic`` or ``exponential``.

    Raises:
      ValueError: an argument is out of range.

    Source: Faghri et al. (2021), the counter-example to the saddle point.
    """
    checks.integer("n", n, at_least=2)
    checks.number("low", low, above=0)
    checks.number("high", high, above=low)
    checks.choice("loss", loss, (logistic, exponential))
    first = jnp.full(n, low, jnp.result_type(float))
    rest = n * loss(first[0]) - (n - 1) * loss(jnp.full_like(first[0], high))
    last = -jnp.log(jnp.expm1(rest) if loss is logistic else rest)
    return first, jnp.full_like(first, high).at[-1].set(last)
